"""Saving and loading: the same model comes back, half-written things never stay, wrong things are refused in one sentence."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import subquad
from subquad import artifact
from subquad.ir.errors import ArtifactError, PlanError, SubquadError, TrustError
from subquad.model_source import open_model

PLAIN = """
import torch
from torch import nn
import torch.nn.functional as F

class Attention(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, d // self.heads).transpose(1, 2) for z in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, d))

def make(width=16):
    torch.manual_seed(3)
    return Attention(width), (torch.randn(2, 6, width),)

def wide():
    return make(32)
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(PLAIN)
    return f"{tmp_path / 'own.py'}:make"


@pytest.fixture
def fast(factory: str) -> torch.nn.Module:
    loaded = open_model(factory, trust=True)
    return subquad.rewrite(loaded.module, passes="fuse", example_inputs=loaded.example_inputs, verify=False)


def listing(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def fails(kind: type[SubquadError], call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?")), text
    return text


def test_hugging_face_round_trip(tiny_llama: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 20, 30, 40, 50], [1, 22, 33, 44, 55]])
    model = subquad.rewrite(open_model(str(tiny_llama)).module, verify=False)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    out = subquad.save(model, tmp_path / "out")
    names = set(load_file(out / "model.safetensors"))
    assert names == set(load_file(tiny_llama / "model.safetensors"))
    back = subquad.load(out)
    assert type(back).__name__ == "LlamaForCausalLM"
    assert back.report.plan_hash == model.report.plan_hash
    assert [entry["contract"] for entry in back.report.applied] == ["exact", "exact", "lossless"]
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, before)
    opened = open_model(str(out))
    assert opened.codec is not None
    assert opened.codec.chat("hi") == open_model(str(tiny_llama)).codec.chat("hi")  # type: ignore[union-attr]


def test_saved_directory_is_still_a_hugging_face_directory(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = subquad.save(subquad.rewrite(open_model(str(tiny_llama)).module, verify=False), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config._attn_implementation in ("sdpa", "eager")
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]


def test_parameters_that_a_rewrite_added_come_back(factory: str, tmp_path: Path) -> None:
    if "linearize:lolcats" not in {p.name for p in subquad.list_passes()}:
        pytest.skip("no rewrite here adds parameters")
    loaded = open_model(factory, trust=True)
    model = subquad.rewrite(
        loaded.module, passes="linearize:lolcats(window=4)", example_inputs=loaded.example_inputs, verify=False
    )
    added = {name for name in model.state_dict() if ".subquad." in f".{name}"}
    assert added
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    out = subquad.save(model, tmp_path / "out")
    back = subquad.load(out, trust=True)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(back(*loaded.example_inputs), model(*loaded.example_inputs))


def test_factory_round_trip_needs_trust(fast: torch.nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        fast.out.weight.add_(1.0)
    out = subquad.save(fast, tmp_path / "out")
    assert "--trust" in fails(TrustError, subquad.load, out)
    assert torch.equal(subquad.load(out, trust=True).out.weight, fast.out.weight)


def test_module_without_a_source_is_given_at_load(fast: torch.nn.Module, tmp_path: Path, factory: str) -> None:
    del fast.__dict__["_subquad_source"]
    out = subquad.save(fast, tmp_path / "out")
    assert "subquad.load(out, model=...)" in fails(ArtifactError, subquad.load, out)
    other = open_model(factory, trust=True).module
    torch.nn.init.zeros_(other.out.weight)
    back = subquad.load(out, model=other)
    assert back is other
    assert torch.equal(back.out.weight, fast.out.weight)


def test_same_plan_same_files(fast: torch.nn.Module, tmp_path: Path) -> None:
    first, second = (subquad.save(fast, tmp_path / name) for name in ("a", "b"))
    assert listing(first)["plan.json"] == listing(second)["plan.json"]
    assert listing(first)["model.safetensors"] == listing(second)["model.safetensors"]


def test_existing_output_is_refused(fast: torch.nn.Module, tmp_path: Path) -> None:
    out = subquad.save(fast, tmp_path / "out")
    assert "--overwrite" in fails(ArtifactError, subquad.save, fast, out)
    subquad.save(fast, out, overwrite=True)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_text("x")
    text = fails(ArtifactError, subquad.save, fast, tmp_path / "holiday", overwrite=True)
    assert "did not write" in text
    assert (tmp_path / "holiday" / "photo.jpg").read_text() == "x"
    fails(ArtifactError, subquad.save, fast, tmp_path / "own.py", overwrite=True)


@pytest.mark.parametrize("writer", ["write_weights", "write_config"])
def test_full_disk_leaves_the_old_artifact_whole(
    writer: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subquad.rewrite(open_model(str(tiny_llama)).module, verify=False)
    out = subquad.save(model, tmp_path / "out")
    before = listing(out)

    def full(_model: object, path: Path) -> None:
        (path if path.is_dir() else path.parent).joinpath("torn").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, writer, full)
    text = fails(ArtifactError, subquad.save, model, out, overwrite=True)
    assert "No space left on device" in text
    assert listing(out) == before
    fails(ArtifactError, subquad.save, model, tmp_path / "fresh")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "tiny-llama") == ["out"]


def test_what_the_disk_refuses_is_one_sentence(fast: torch.nn.Module, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        text = fails(ArtifactError, subquad.save, fast, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.strerror(errno.EFBIG) in text
    assert not (tmp_path / "out").exists()


def test_interrupted_save_leaves_nothing(
    fast: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        subquad.save(fast, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["own.py"]


def test_unrewritten_model_is_refused(tmp_path: Path) -> None:
    assert "was not rewritten" in fails(ArtifactError, subquad.save, torch.nn.Linear(2, 2), tmp_path / "out")


def change(path: Path, **values: object) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | values))


def test_newer_format_is_refused(fast: torch.nn.Module, tmp_path: Path) -> None:
    out = subquad.save(fast, tmp_path / "out")
    change(out / "subquad.json", format=artifact.FORMAT + 1)
    assert "upgrade subquad" in fails(ArtifactError, subquad.load, out, trust=True)


def test_torn_artifacts_are_refused(fast: torch.nn.Module, tmp_path: Path) -> None:
    out = subquad.save(fast, tmp_path / "out")
    whole = listing(out)
    for name, words in [
        ("subquad.json", "torn"),
        ("plan.json", "neither JSON nor TOML"),
        ("model.safetensors", "half there"),
    ]:
        (out / name).write_bytes(whole[name][: len(whole[name]) * 2 // 3])
        assert words in fails(SubquadError, subquad.load, out, trust=True)
        (out / name).unlink()
        fails(SubquadError, subquad.load, out, trust=True)
        (out / name).write_bytes(whole[name])
    change(out / "plan.json", steps=[])
    assert "was changed after it was saved" in fails(ArtifactError, subquad.load, out, trust=True)
    (out / "plan.json").write_bytes(whole["plan.json"])
    tensors = load_file(out / "model.safetensors")
    tensors.pop("out.bias")
    save_file(tensors, out / "model.safetensors")
    assert "lacks out.bias" in fails(ArtifactError, subquad.load, out, trust=True)
    fails(ArtifactError, subquad.load, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no subquad.json" in fails(ArtifactError, subquad.load, tmp_path / "empty")


def test_plan_of_another_model_is_refused(fast: torch.nn.Module, tmp_path: Path, factory: str) -> None:
    wide = open_model(factory.replace(":make", ":wide"), trust=True)
    with pytest.raises(PlanError, match="made for another model"):
        subquad.rewrite(wide.module, plan=fast.report.plan, example_inputs=wide.example_inputs)
    out = subquad.save(fast, tmp_path / "out")
    with pytest.raises(PlanError, match="made for another model"):
        subquad.load(out, model=wide.module)


def test_program_loads_with_torch_and_subquad_alone(tiny_llama: Path, tmp_path: Path) -> None:
    model = subquad.rewrite(open_model(str(tiny_llama)).module, verify=False)
    ids = torch.tensor([[1, 20, 30, 40, 50, 60, 70]] * 3)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.save({"ids": ids, "logits": expected}, tmp_path / "expected.pt")
    path = subquad.save(model, tmp_path / "model.pt2")
    code = (
        "import sys, torch, subquad\n"
        f"kept = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"program = torch.export.load({str(path)!r})\n"
        "ids = kept['ids']\n"
        "out = program.module()(ids, torch.ones_like(ids))[0]\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'subquad.softmax_attention' in program.graph_module.code.replace('::', '.')\n"
        "torch.testing.assert_close(out, kept['logits'], rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--overwrite" in fails(ArtifactError, subquad.save, model, path)
