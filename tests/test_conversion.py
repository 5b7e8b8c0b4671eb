"""convert: both stages on a tiny model, resumption, interruption, plain modules, and the sentences for bad input."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import subquad
from subquad.ir.errors import ArtifactError, ConversionError
from subquad.training.checkpoint import Checkpoint, Progress
from subquad.training.losses import mixed_loss, transfer_loss
from subquad.training.settings import Settings

pytest.importorskip("peft")

PASS = "linearize:lolcats(window=4, sinks=1, features=8)"
SMALL = Settings(
    tokens=1024, length=32, transfer_share=0.5, transfer_rows=4, transfer_updates=3, rows=4, rank=2, alpha=4, held_out=256,
    adapter_rate=1e-2, added_rate=1e-2, compile=False,
)  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"{n} times {n} makes {n * n}.\n" for n in range(300)))
    return path


def rewritten(directory: Path) -> nn.Module:
    return subquad.rewrite(open_tiny(directory), passes=PASS, verify=False)


def open_tiny(directory: Path) -> nn.Module:
    from subquad.model_source import open_model

    return open_model(str(directory), dtype="fp32").module


def test_convert_trains_both_stages_and_saves(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    fast = rewritten(tiny_llama)
    names = set(fast.state_dict())
    maps = {n: p.detach().clone() for n, p in fast.named_parameters() if ".subquad." in n}
    query = fast.model.layers[0].self_attn.q_proj.weight
    weight = query.detach().clone()
    out = tmp_path / "out"
    result = subquad.convert(fast, text=text, tokens=1024, out=out, settings=SMALL)
    assert result is fast
    assert set(fast.state_dict()) == names
    assert fast.model.layers[0].self_attn.q_proj.weight is query
    assert not torch.equal(query, weight)
    assert all(not torch.equal(p, maps[n]) for n, p in fast.named_parameters() if n in maps)
    assert all(p.requires_grad for p in fast.parameters())
    stages = fast.report.conversion
    assert [entry["stage"] for entry in stages] == ["before", "transfer", "adapters"]
    assert [entry["tokens"] for entry in stages] == [0, 512, 1024]
    assert stages[1]["kl"] < stages[0]["kl"]
    assert stages[2]["perplexity"] < min(stages[0]["perplexity"], stages[2]["original_perplexity"])
    assert stages[2]["merged_perplexity"] == pytest.approx(stages[2]["perplexity"], rel=1e-4)
    assert json.loads((out / "conversion.json").read_text())["stages"] == stages
    assert fast.report.json()["conversion"] == stages
    assert not out.with_name("out.unfinished").exists()

    ids = torch.arange(40)[None] % 200
    again = subquad.load(out)
    torch.testing.assert_close(again(ids).logits, fast(ids).logits, rtol=1e-5, atol=1e-5)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    delta = adapter[name + "B.weight"] @ adapter[name + "A.weight"] * (4 / 2)
    torch.testing.assert_close(weight + delta, query.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_reads_the_saved_adapter(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    fast = rewritten(tiny_llama)
    other = _file(tmp_path / "other.txt", b"Quite another text. " * 40)
    subquad.convert(fast, text=text, tokens=1024, out=tmp_path / "out", settings=SMALL, measure_on=(other, text))
    measured = fast.report.conversion[-1]["texts"]
    assert list(measured) == ["other.txt", "words.txt"]
    assert measured["other.txt"]["perplexity"] > measured["words.txt"]["perplexity"]
    names = [entry["stage"] for entry in fast.report.conversion]
    assert names == ["before", "transfer", "adapters"]
    original = PeftModel.from_pretrained(open_tiny(tiny_llama), str(tmp_path / "out" / "adapter")).merge_and_unload()
    want = fast.model.layers[1].self_attn.o_proj.weight
    torch.testing.assert_close(original.model.layers[1].self_attn.o_proj.weight, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiling_changes_speed_alone(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    results = []
    for compile_it in (False, True):
        fast = rewritten(tiny_llama)
        settings = replace(SMALL, compile=compile_it)
        subquad.convert(fast, text=text, tokens=1024, out=tmp_path / str(compile_it), settings=settings)
        results.append(fast.report.conversion[-1])
    assert results[0]["perplexity"] == pytest.approx(results[1]["perplexity"], rel=1e-2)


CHILD = """
import sys, os, signal
from pathlib import Path
import torch
import subquad
from subquad.model_source import open_model
from subquad.training import session
from subquad.training.settings import Settings
torch.set_num_threads(1)
directory, text, out, kill, sent = sys.argv[1:]
fast = subquad.rewrite(open_model(directory, dtype="fp32").module, passes={PASS!r}, verify=False)
settings = {SMALL!r}
session.STORE_EVERY = 0.0
store = session.Checkpoint.store
def counted(self, state, tensors):
    store(self, state, tensors)
    if f"{{state.stage}}-{{state.batch}}" == kill:
        os.kill(os.getpid(), getattr(signal, sent))
session.Checkpoint.store = counted
session.Session.__init__.__defaults__ = (0.0,)
try:
    subquad.convert(fast, text=text, tokens=1024, out=out, settings=settings)
except subquad.SubquadError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def interruptible() -> None:
    """Give a child the default SIGINT: tests started in the background inherit an ignored one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_child(directory: Path, text: Path, out: Path, kill: str, sent: str) -> subprocess.CompletedProcess[str]:
    code = CHILD.format(PASS=PASS, SMALL=SMALL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(directory), str(text), str(out), kill, sent],
        capture_output=True, text=True, env=environment, cwd=out.parent, timeout=250, preexec_fn=interruptible,
    )  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_result(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = rewritten(tiny_llama)
        subquad.convert(whole, text=text, tokens=1024, out=tmp_path / "whole", settings=SMALL)
        out = tmp_path / "out"
        assert run_child(tiny_llama, text, out, "transfer-2", "SIGKILL").returncode == -signal.SIGKILL
        assert not out.exists()
        stopped = run_child(tiny_llama, text, out, "adapters-2", "SIGINT")
        assert stopped.returncode == 2, stopped.stderr
        assert "interrupted after batch" in stopped.stderr.strip()
        assert "Traceback" not in stopped.stderr
        assert out.with_name("out.unfinished").is_dir()
        fast = rewritten(tiny_llama)
        subquad.convert(fast, text=text, tokens=1024, out=out, settings=SMALL)
    finally:
        torch.set_num_threads(threads)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fast.state_dict()[name]), name
    for one, other in zip(whole.report.conversion, fast.report.conversion, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_failure_leaves_the_model_as_it_was(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = rewritten(tiny_llama)
    before = {name: value.clone() for name, value in fast.state_dict().items()}
    from subquad.training import stages

    work = stages.AdapterTraining.work

    def fail(self: stages.AdapterTraining, number: int) -> dict[str, float]:
        if number == 2:
            raise ConversionError("made up.")
        return work(self, number)

    monkeypatch.setattr(stages.AdapterTraining, "work", fail)
    with pytest.raises(ConversionError, match="made up"):
        subquad.convert(fast, text=text, tokens=1024, out=tmp_path / "out", settings=SMALL)
    assert not (tmp_path / "out").exists()
    assert {n: type(m) for n, m in fast.named_modules() if "q_proj" in n}.popitem()[1] is nn.Linear
    after = fast.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


class Tiny(nn.Module):
    """A language model of one attention layer in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(256, 16), nn.LayerNorm(16)
        self.attention = TinyAttention()
        self.head = nn.Linear(16, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.attention(x)))


class TinyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        t = x.shape[1]
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -torch.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_plain_module_converts_through_its_graph(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    packed = tmp_path / "words.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    ids = torch.randint(0, 256, (2, 9))
    fast = subquad.rewrite(model, passes=PASS, example_inputs=(ids,), verify=False)
    out = tmp_path / "out"
    subquad.convert(fast, text=packed, tokens=1024, out=out, settings=SMALL, tokenizer=lambda line: list(line.encode()))
    stages = fast.report.conversion
    assert stages[1]["kl"] < stages[0]["kl"]
    assert stages[2]["perplexity"] < stages[2]["original_perplexity"]
    assert stages[2]["merged_perplexity"] == pytest.approx(stages[2]["perplexity"], rel=1e-4)
    loaded = subquad.load(out, model=Tiny())
    torch.testing.assert_close(loaded(ids), fast(ids), rtol=1e-5, atol=1e-6)


def test_the_loss_is_cross_entropy_and_kl_with_their_gradient() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 6, requires_grad=True)
    teacher, weight, bias = torch.randn(300, 6), torch.randn(11, 6), torch.randn(11)
    targets = torch.randint(0, 11, (300,))
    loss, means = mixed_loss(hidden, teacher, (weight, bias), targets, 0.3, 0.7)
    logits, wanted = hidden @ weight.T + bias, (teacher @ weight.T + bias).softmax(-1)
    ce = nn.functional.cross_entropy(logits, targets)
    kl = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean")
    torch.testing.assert_close(means.float(), torch.stack([ce, kl]).detach())
    torch.testing.assert_close(loss, 0.3 * ce + 0.7 * kl)
    ours = torch.autograd.grad(loss, hidden)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(0.3 * ce + 0.7 * kl, hidden)[0])
    alone, means = mixed_loss(logits.detach().requires_grad_(), None, None, targets, 1.0, 0.7)
    torch.testing.assert_close(alone, ce)
    assert means[1] == 0
    assert transfer_loss(2 * teacher, teacher) == pytest.approx(1.0)


def test_bad_input_is_one_sentence(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    fast = rewritten(tiny_llama)
    out = tmp_path / "out"

    def fails(words: str, kind: type[Exception] = ConversionError, **changes: object) -> None:
        arguments = {"text": text, "tokens": 1024, "out": out, "settings": SMALL, **changes}
        model = arguments.pop("model", fast)
        with pytest.raises(kind, match=words) as caught:
            subquad.convert(model, **arguments)
        assert "\n" not in str(caught.value)

    fails("does not exist", text=tmp_path / "none.txt")
    fails("is a directory", text=tmp_path)
    fails("holds 9.* tokens, which is less than the 1024", text=_file(tmp_path / "short.txt", b"too short"))
    fails("is not UTF-8", text=_file(tmp_path / "binary.txt", b"\xff\xfe\x00" * 9))
    fails("not a whole gzip file", text=_file(tmp_path / "torn.gz", gzip.compress(text.read_bytes())[:40]))
    fails("at least 256: one batch of each stage", tokens=100)
    fails("the id 999, but the model knows 258", tokenizer=lambda line: [999] * len(line))
    fails("nothing to train", model=subquad.rewrite(open_tiny(tiny_llama), passes="fuse", verify=False))
    fails("was not rewritten", model=open_tiny(tiny_llama))
    fails("saved as a directory", out=tmp_path / "x.pt2")
    _file(out, b"")
    fails("exists", kind=ArtifactError)


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_checkpoint_of_another_run_or_a_torn_one_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "state"
    ours = Checkpoint(place, "digest")
    assert ours.load() is None
    ours.store(Progress("transfer", 1), {"a": torch.ones(2)})
    ours.store(Progress("transfer", 2), {"a": torch.zeros(2)})
    progress, tensors = ours.load()
    assert (progress.batch, tensors["a"].tolist()) == (2, [0.0, 0.0])
    assert len(list(place.iterdir())) == 2
    with pytest.raises(ConversionError, match="another model, text or setting"):
        Checkpoint(place, "other").load()
    (place / "transfer-2.safetensors").write_bytes(b"torn")
    with pytest.raises(ConversionError, match="remove it to start again"):
        ours.load()
