"""The decoder stored with an artifact: the same tokens, no code in it, refused when damaged, left alone when torch differs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import subquad
from subquad.artifact_directory import stored_decoder
from subquad.incremental import decoder
from subquad.ir.errors import ArtifactError
from subquad.model_source import open_model


@pytest.fixture(scope="module")
def saved(tiny_llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoder") / "out"
    return subquad.save(subquad.rewrite(open_model(str(tiny_llama_source)).module, verify=False), out)


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def test_tokens_are_those_of_generate(saved: Path, tiny_llama_source: Path) -> None:
    ids = torch.tensor([[1, 40, 50, 60]])
    made = stored_decoder(saved)
    assert made is not None
    ours = [row[0] for row in made.generate(ids, max_new_tokens=12)]
    theirs = open_model(str(tiny_llama_source)).module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert ours == theirs[0, 4:].tolist()


def test_trained_weights_reach_the_stored_decoder(tiny_llama_source: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_llama_source)).module
    fast = subquad.rewrite(model, verify=False)
    with torch.no_grad():
        fast.model.layers[1].mlp.up_proj.weight.mul_(3.0)
        expected = fast(input_ids=torch.tensor([[1, 40, 50]])).logits[:, -1]
    made = stored_decoder(subquad.save(fast, tmp_path / "out"))
    assert made is not None
    logits, _ = made.prefill(torch.tensor([[1, 40, 50]]))
    torch.testing.assert_close(logits[:, -1], expected, rtol=1e-4, atol=1e-5)


def test_another_torch_falls_back(out: Path) -> None:
    data = json.loads((out / "decoder.json").read_text())
    (out / "decoder.json").write_text(json.dumps(data | {"torch": "1.0"}))
    assert stored_decoder(out) is None
    (out / "decoder.json").unlink()
    assert stored_decoder(out) is None


@pytest.mark.parametrize("target", ["os.system", "aten.from_file.default", "builtins.eval"])
def test_an_operation_that_is_not_allowed_is_refused(out: Path, target: str) -> None:
    data = json.loads((out / "decoder.json").read_text())
    node = next(n for n in data["programs"][-1]["graph"] if n["op"] == "call_function")
    node["target"] = target
    (out / "decoder.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="not allowed"):
        stored_decoder(out)


def _without_schedule(data: dict) -> None:
    del data["schedules"]["first"]


def _with_wrong_side(data: dict) -> None:
    data["schedules"]["step"]["calls"][0][1][0] = 99


def _with_wrong_program(data: dict) -> None:
    data["schedules"]["one"]["entry"] = 99


def _with_unknown_weight(data: dict) -> None:
    data["weights"]["model.norm.weight"] = "absent"


def _with_code_as_dtype(data: dict) -> None:
    data["schedules"]["one"]["forms"][0][0][0] = "load"


@pytest.mark.parametrize(
    "change", [_without_schedule, _with_wrong_side, _with_wrong_program, _with_unknown_weight, _with_code_as_dtype]
)
def test_a_damaged_description_is_refused(out: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((out / "decoder.json").read_text())
    change(data)
    (out / "decoder.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError):
        stored_decoder(out)


def test_torn_files_are_refused(out: Path) -> None:
    whole = (out / "decoder.json").read_text()
    (out / "decoder.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="damaged"):
        stored_decoder(out)
    (out / "decoder.json").write_text(whole)
    tensors = (out / "decoder.safetensors").read_bytes()
    (out / "decoder.safetensors").write_bytes(tensors[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        stored_decoder(out)
    (out / "decoder.safetensors").unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        stored_decoder(out)


def test_an_older_format_falls_back(out: Path) -> None:
    data = json.loads((out / "decoder.json").read_text())
    (out / "decoder.json").write_text(json.dumps(data | {"format": 1}))
    assert stored_decoder(out) is None


def test_the_stored_decoder_is_the_derived_one(saved: Path, tiny_llama_source: Path) -> None:
    """Same programs under the same keys, so that both find what either has compiled; weights side by side in one storage."""
    stored = stored_decoder(saved)
    derived = decoder(subquad.rewrite(open_model(str(tiny_llama_source)).module, verify=False))
    assert stored is not None
    for name, schedule in derived.programs.schedules.items():
        again = stored.programs.schedules[name]
        assert [p.key for p in again.programs()] == [p.key for p in schedule.programs()]
        if name in {one.name for one in derived.programs.layout.classes}:
            assert [o.key for o in stored._orders(again)] == [o.key for o in derived._orders(schedule)]
    assert {n: t.shape for n, t in derived.weights.items() if n.startswith("packed_")} == {
        n: t.shape for n, t in stored.weights.items() if n.startswith("packed_")
    }
    parts = {t.untyped_storage().data_ptr() for n, t in stored.weights.items() if n.startswith("model.layers")}
    assert len(parts) == 1


LEAN = """
import sys
from subquad.text_generation import Sampling, generate_text, open_for_generation
result = generate_text(open_for_generation(sys.argv[1]), "hello", Sampling(max_new_tokens=3))
assert result.engine == "subquad" and len(result.tokens) >= 1
print("\\n".join(sys.modules))
"""
HEAVY = (
    "sympy", "torch.fx.experimental.symbolic_shapes", "torch._dynamo", "torch._inductor", "triton", "transformers",
    "networkx", "subquad.passes.recognize", "subquad.passes.fuse", "subquad.derivation", "subquad.capture", "subquad.blocks",
)  # fmt: skip


def modules_of(code: str, *arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_generating_imports_no_compiler(saved: Path) -> None:
    assert not modules_of(LEAN, str(saved)) & set(HEAVY)


def test_that_check_sees_an_import(saved: Path) -> None:
    assert modules_of("import torch._dynamo" + LEAN, str(saved)) & set(HEAVY)
