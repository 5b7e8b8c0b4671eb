"""The torch.compile door: the backend is found by name, and gradients pass through the rewritten graph."""

import torch
from torch import nn


def main() -> None:
    """Compile a transformer layer with and without Subquad and compare outputs and gradients."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 50, 32)
    layer(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]
    layer.zero_grad()
    compiled = torch.compile(layer, backend="subquad", options={"inner": "eager"})
    out = compiled(x)
    out.square().sum().backward()
    found = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    worst = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    print(f"output {tuple(out.shape)}, largest difference of a gradient {worst:.1e}")


if __name__ == "__main__":
    main()
