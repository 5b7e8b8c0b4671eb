"""A model of your own: inspect it, rewrite it exactly, and see how close the result is to the original."""

import torch
from torch import nn

import subquad


class Attention(nn.Module):
    """Causal attention written out by hand, with its own mask buffer."""

    def __init__(self, width: int, heads: int, longest: int = 1024) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("hidden", torch.ones(longest, longest, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, tokens, width]; returns the same shape."""
        batch, tokens, width = x.shape
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)) / (width // self.heads) ** 0.5
        weights = scores.masked_fill(self.hidden[:tokens, :tokens], float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


def main() -> None:
    """Rewrite two layers and compare."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(64, 4), nn.GELU(), Attention(64, 4)).eval()
    x = torch.randn(2, 100, 64)
    for site in subquad.inspect(model, (x,)).sites:
        print(f"layer {site.path}: {site.origin}, {site.heads} heads, mask {site.mask.family}")
    with torch.no_grad():
        before = model(x)
        fast = subquad.rewrite(model, example_inputs=(x,))
        after = fast(x)
    print("applied:", [entry["pass"] for entry in fast.report.applied])
    print(f"largest difference: {(after - before).abs().max():.1e}")


if __name__ == "__main__":
    main()
