"""`subquad inspect` explains: spelling, proof, provenance and decision of each site, line and advice of each refusal, the nearest miss."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from subquad.ir.advice import ADVICE

ROOT = Path(__file__).resolve().parent.parent
OWN = """
import time
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.change = change

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(1, 2) / 4
        return self.change(scores) @ v  # the weights


class Linear(Attention):
    def forward(self, x):
        q, k, v = self.q(x).relu(), self.k(x).relu(), self.v(x)
        return q @ (k.transpose(1, 2) @ v)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(lambda s: s.softmax(-1))
        self.gate = nn.Linear(16, 4)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))

    def forward(self, x):
        x = self.attention(x)
        weights = torch.softmax(self.gate(x), dim=-1)  # the router
        return torch.einsum("bte,edf,btd->btf", weights, self.experts, x)


class Plain(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


X = (torch.randn(2, 9, 16),)
QKV = tuple(torch.randn(2, 2, 9, 8) for _ in range(3))

def right(): return Attention(lambda s: s.softmax(-1)).eval(), X
def low(): return Attention(lambda s: torch.where(torch.ones(9, 9).tril() == 1, s, -100.0).softmax(-1)).eval(), X
def sigmoid(): return Attention(torch.sigmoid).eval(), X
def unnormalised(): return Attention(torch.exp).eval(), X
def linear(): return Linear(None).eval(), X
def experts(): return Experts().eval(), X
def layers(): return nn.Sequential(*[Attention(lambda s: s.softmax(-1)) for _ in range(3)]).eval(), X
def mlp(): return nn.Sequential(nn.Linear(16, 8), nn.ReLU()), X
def plain(): return Plain(), QKV
def slow():
    print("waiting", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def inspect(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command in this process, as in a pipe of 80 columns."""
    from subquad.cli.ending import run

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subquad.cli.ending._quiet", lambda: None)
        status = run(["inspect", *map(str, arguments)])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def line_of(text: str) -> int:
    return next(n for n, line in enumerate(OWN.splitlines(), 1) if text in line)


def test_equal_layers_are_one_block_that_says_how_each_part_was_read(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = inspect(capsys, monkeypatch, tiny_llama, "--attention", "eager")
    words = " ".join(out.split())
    assert (status, err) == (0, "")
    assert "2 sites model.layers.0-1.self_attn" in words
    assert "matmul → mul → mask" in words
    assert "causal & padding(attention_mask) — mask proved" in words
    assert "6 concrete cases" in words
    assert "q q_proj → rotary half at position t, θ 10000" in words
    assert "v v_proj" in words
    assert "q, k and v are projections of one tensor" in words
    assert "modeling_llama.py" in words
    assert "decision" in words
    assert "\x1b" not in out
    long = [line for line in out.splitlines() if len(line) > 80 and not line.startswith(("seconds", "note"))]
    assert all(" " not in line.strip().split(maxsplit=1)[-1] for line in long), long


def test_layers_without_the_word_layer_are_grouped_too(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = inspect(capsys, monkeypatch, f"{own}:layers", "--trust")
    assert "3 sites  0-2" in out
    assert out.count("spelling") == 1


def test_a_refusal_shows_the_users_line_and_what_would_make_it_rewritable(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = inspect(capsys, monkeypatch, f"{own}:low", "--trust")
    words = " ".join(out.split())
    assert (status, err) == (3, "")
    assert "filled with -100" in words
    assert "Fill hidden scores with float('-inf')" in words
    assert f"{own}:{line_of('# the weights')} return self.change(scores) @ v" in words
    assert "nearest" not in words


@pytest.mark.parametrize(
    ("name", "seen", "line"),
    [
        ("sigmoid", "two products of activations with `sigmoid` between them", "# the weights"),
        ("unnormalised", "two products of activations with `exp` between them", "# the weights"),
        ("linear", "keys and values are multiplied first", "return q @ (k"),
        ("mlp", "no product of two activations was seen: 1 products by weights", ""),
    ],
)
def test_the_nearest_miss_is_named_with_what_it_lacks(
    name: str, seen: str, line: str, own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = inspect(capsys, monkeypatch, f"{own}:{name}", "--trust")
    words = " ".join(out.split())
    assert status == 2
    assert "has no attention" in err
    assert "the nearest miss" in words
    assert seen in words
    assert "advice" in words
    assert not line or f"{own}:{line_of(line)}" in words


def test_a_router_beside_attention_is_refused_with_its_line_and_the_site_is_shown(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = inspect(capsys, monkeypatch, f"{own}:experts", "--trust")
    words = " ".join(out.split())
    assert status == 0
    assert "1 site attention" in words
    assert "Refused softmax <root>" in words
    assert "Nothing to do: a softmax over experts" in words
    assert f"{own}:{line_of('# the router')} weights = torch.softmax" in words
    assert "nearest" not in words


def test_json_carries_provenance_advice_and_decisions(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = inspect(capsys, monkeypatch, f"{own}:experts", "--trust", "--json")
    report = json.loads(out)
    assert report["nearest_miss"] is None
    (refusal,) = report["refusals"]
    assert refusal["kind"] == "projection"
    assert refusal["advice"] == ADVICE["projection"]
    assert "torch.softmax(self.gate(x)" in refusal["code"]
    (site,) = report["sites"]
    assert site["provenance"]["q"]["parts"][0]["projection"]["weight"] == "attention.q"
    assert site["provenance"]["layer_input"]
    assert {*report["chosen"]} | {d["path"] for d in report["declined"]} == {"attention"}
    _, out, _ = inspect(capsys, monkeypatch, f"{own}:sigmoid", "--trust", "--json")
    assert json.loads(out)["nearest_miss"]["kind"] == "no-softmax"


def test_a_site_that_no_rewrite_would_speed_up_says_so(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = inspect(capsys, monkeypatch, f"{own}:plain", "--trust")
    words = " ".join(out.split())
    assert "decision declined by the cost model: fuse is predicted to gain nothing" in words
    assert "q unknown (it is made by `q`" in words
    assert "input not found" in words


def test_a_path_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = inspect(capsys, monkeypatch, tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert "does not exist" in err


def test_ctrl_c_is_one_sentence(own: Path) -> None:
    command = [sys.executable, "-m", "subquad.cli", "inspect", f"{own}:slow", "--trust"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert "interrupted" in err


def test_every_kind_that_recognition_raises_has_advice() -> None:
    raised: set[str] = set()
    for path in (ROOT / "passes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("NotAttention", "refuse"):
                given = [*node.args[2:], *(k.value for k in node.keywords if k.arg == "kind")]
                raised |= {x.value for x in given if isinstance(x, ast.Constant) and isinstance(x.value, str)}
    assert {"projection", "dropout"} <= raised
    assert raised <= set(ADVICE), raised - set(ADVICE)
    assert all(sentence.endswith(".") and len(sentence) < 125 for sentence in ADVICE.values())
