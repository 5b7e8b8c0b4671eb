"""The decoder stored with an artifact: the same tokens, no code in it, refused when damaged, left alone when torch differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import subquad
from subquad.artifact import stored_decoder
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
    decoder = stored_decoder(saved)
    assert decoder is not None
    ours = [row[0] for row in decoder.generate(ids, max_new_tokens=12)]
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
    decoder = stored_decoder(subquad.save(fast, tmp_path / "out"))
    assert decoder is not None
    logits, _ = decoder.prefill(torch.tensor([[1, 40, 50]]))
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
    node = next(n for n in data["step"] if n["op"] == "call_function")
    node["target"] = target
    (out / "decoder.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="not allowed"):
        stored_decoder(out)


def test_torn_files_are_refused(out: Path) -> None:
    whole = (out / "decoder.json").read_text()
    (out / "decoder.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="damaged"):
        stored_decoder(out)
    (out / "decoder.json").write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "first"}))
    with pytest.raises(ArtifactError, match="damaged"):
        stored_decoder(out)
    (out / "decoder.json").write_text(whole)
    (out / "decoder.safetensors").unlink()
    with pytest.raises(ArtifactError):
        stored_decoder(out)
