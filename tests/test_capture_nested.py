"""nn.TransformerEncoder with nested tensors: rewritten, padded rows are what the original gives them, in both gradient modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import subquad

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
RIGHT, LEFT = (torch.tensor([[5], [9]]) <= torch.arange(9)), (torch.arange(9) < torch.tensor([[2], [0]]))


class _Pooled(nn.Module):
    """The mean over all rows, padded ones included, so that their value matters."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding).mean(1)


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = _Pooled().eval()
    nn.init.normal_(model.encoder.norm.bias)
    plain = _Pooled().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 32)
    fast = subquad.rewrite(model, passes=["fuse"], example_inputs=(x, RIGHT))
    assert len(fast.report.applied) == 2, fast.report.rolled_back
    return fast, plain, x


@pytest.mark.parametrize("padding", [RIGHT, LEFT, RIGHT.roll(1, 0)], ids=["right", "left", "other lengths"])
def test_padded_rows_are_zero_where_the_original_packs_them(
    both: tuple[nn.Module, nn.Module, Tensor], padding: Tensor
) -> None:
    fast, plain, x = both
    with torch.no_grad():
        torch.testing.assert_close(fast(x, padding), plain(x, padding), rtol=0, atol=2e-6)


def test_with_gradients_the_original_runs_and_says_so(both: tuple[nn.Module, nn.Module, Tensor]) -> None:
    fast, plain, x = both
    with pytest.warns(UserWarning, match="without gradients only"):
        torch.testing.assert_close(fast(x, RIGHT), plain(x, RIGHT), rtol=0, atol=0)
