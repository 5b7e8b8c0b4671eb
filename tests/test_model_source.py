"""Opening models by name: every kind that works, and one sentence for every way it can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from subquad.ir.errors import GenerationError, ModelSourceError, SubquadError, TrustError
from subquad.model_source import open_model, source_note
from subquad.tokenization import render_chat

FACTORY = """
import torch
def make():
    torch.manual_seed(1)
    return torch.nn.Linear(3, 2), (torch.zeros(4, 3),)
def wrong():
    return torch.nn.Linear(3, 2)
def broken():
    raise RuntimeError("no such\\nlayer")
"""


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert isinstance(error, SubquadError)
    assert "\n" not in text
    assert text.endswith((".", "?")), text
    return text


def fails(spec: object, kind: type[SubquadError] = ModelSourceError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        open_model(str(spec), **options)  # type: ignore[arg-type]
    return one_sentence(caught.value)


def test_directory_opens_with_its_tokenizer(tiny_llama: Path) -> None:
    loaded = open_model(str(tiny_llama))
    assert type(loaded.module).__name__ == "LlamaForCausalLM"
    assert loaded.kind == "huggingface"
    assert not loaded.module.training
    assert loaded.codec is not None
    assert loaded.codec.eos == (0,)
    assert loaded.codec.decode(loaded.codec.encode("café ok")) == "café ok"
    ids = loaded.codec.chat("hi")
    assert loaded.tokenizer.decode(ids, skip_special_tokens=False) == "<bos>user: hi\nassistant: "
    assert source_note(loaded.module) is loaded
    assert "_subquad_source" not in str(list(loaded.module.state_dict()))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_dtype(tiny_llama: Path, name: str, dtype: torch.dtype) -> None:
    assert {p.dtype for p in open_model(str(tiny_llama), dtype=name).module.parameters()} == {dtype}


def test_attention_spelling(tiny_llama: Path) -> None:
    assert open_model(str(tiny_llama), attention="eager").config._attn_implementation == "eager"


def test_chat_matches_transformers(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "naïve? 123"}]
    ours = open_model(str(tiny_llama)).codec
    assert ours is not None
    assert ours.chat(turns) == theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def test_template_runs_in_a_sandbox() -> None:
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(GenerationError):
        render_chat(attack, [{"role": "user", "content": "x"}], {})
    with pytest.raises(GenerationError, match="roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", [], {})


def test_unknown_dtype_suggests(tiny_llama: Path) -> None:
    assert "did you mean 'bf16'?" in fails(tiny_llama, dtype="bf-16")


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "gone")
    assert "does not exist" in fails(tmp_path / "gone.gguf")
    assert "does not exist" in fails("./owner/name/deeper")


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "neither a path here nor in the local hub cache" in fails("someone-else/some-model")


def test_directory_without_config(tiny_llama: Path) -> None:
    (tiny_llama / "config.json").unlink()
    assert "no config.json" in fails(tiny_llama)


def test_directory_one_level_up_is_suggested(tiny_llama: Path) -> None:
    assert f"did you mean {tiny_llama}?" in fails(tiny_llama.parent)


def test_torn_config(tiny_llama: Path) -> None:
    (tiny_llama / "config.json").write_text('{"architectures": ["Llama')
    assert "not valid JSON" in fails(tiny_llama)


def test_no_weights(tiny_llama: Path) -> None:
    (tiny_llama / "model.safetensors").unlink()
    assert "no weights" in fails(tiny_llama)


def test_half_downloaded_weights(tiny_llama: Path) -> None:
    path = tiny_llama / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "only half there" in fails(tiny_llama)
    path.write_bytes(whole[:20])
    assert "cut off" in fails(tiny_llama)
    path.write_bytes(b"")
    assert "is empty" in fails(tiny_llama)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "Git LFS pointer" in fails(tiny_llama)
    path.write_bytes(whole)
    (tiny_llama / "model-00002.safetensors.incomplete").write_bytes(b"")
    assert "has not finished" in fails(tiny_llama)


def test_missing_shard(tiny_llama: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tiny_llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00002-of-00002.safetensors" in fails(tiny_llama)


def test_missing_tensor_is_not_filled_with_noise(tiny_llama: Path) -> None:
    path = tiny_llama / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight" in fails(tiny_llama)


def test_unknown_architecture(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config["model_type"] = config["architectures"][0] = "nonesuch"
    (tiny_llama / "config.json").write_text(json.dumps(config))
    fails(tiny_llama)


def test_own_modelling_code_needs_trust(tiny_llama: Path) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (tiny_llama / "config.json").write_text(json.dumps(config))
    (tiny_llama / "mine.py").write_text("raise SystemExit('ran')")
    assert "--trust" in fails(tiny_llama, TrustError)


def test_factory(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FACTORY)
    spec = f"{tmp_path / 'own.py'}:make"
    assert "--trust" in fails(spec, TrustError)
    loaded = open_model(spec, trust=True, dtype="fp64")
    assert loaded.kind == "factory"
    assert loaded.module.weight.dtype == torch.float64
    assert loaded.origin == spec
    assert "did you mean 'make'?" in fails(tmp_path / "own.py:mak", trust=True)
    assert "returns (model, example_inputs)" in fails(tmp_path / "own.py:wrong", trust=True)
    assert "at line 9: RuntimeError: no such" in fails(tmp_path / "own.py:broken", trust=True)
    (tmp_path / "torn.py").write_text("def make(:\n")
    assert "at line 1: SyntaxError" in fails(tmp_path / "torn.py:make", trust=True)
    assert "does not exist" in fails(tmp_path / "gone.py:make", trust=True)


def test_program(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(4, 3),)), str(path))
    assert "can run code" in fails(path, TrustError)
    loaded = open_model(str(path), trust=True)
    assert loaded.kind == "program"
    assert loaded.module.module()(torch.zeros(4, 3)).shape == (4, 2)
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot be loaded as an exported program" in fails(path, trust=True)


def test_torn_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"nothing of the kind")
    assert "GGUF mark" in fails(path)
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 16)
    assert "cannot be read as a GGUF model" in fails(path)
    path.write_bytes(b"")
    assert "is empty" in fails(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert "a kind that subquad does not read" in fails(tmp_path / "m.onnx")


def small_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A one-layer Llama with q8_0 matrices, written by the gguf package; returns the dequantised tensors."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"<{i}>" for i in range(3)] + [chr(ord("a") + i) for i in range(26)] + ["ab", "1", "2"])
    writer.add_token_types([3] * 3 + [1] * 29)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (32, 64), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64),
              "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64), "blk.0.ffn_down": (64, 96)}  # fmt: skip
    plain = {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        plain[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return plain


def test_gguf_keeps_what_makes_the_model(tmp_path: Path) -> None:
    plain = small_gguf(tmp_path / "m.gguf")
    loaded = open_model(str(tmp_path / "m.gguf"), dtype="fp32")
    config = loaded.config
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.max_position_embeddings) == (1e-5, True, 128)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert not hasattr(config, "quantization_config")
    assert type(loaded.module.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(loaded.module.model.layers[0].mlp.up_proj.weight, plain["blk.0.ffn_up"])
    assert torch.equal(loaded.module.lm_head.weight, plain["token_embd"])
    assert loaded.codec is not None
    assert loaded.codec.eos == (2,)
    assert loaded.codec.encode("ab12") == [29, 30, 31]
    assert "MiB in memory" in loaded.notes[0]
    assert {p.dtype for p in open_model(str(tmp_path / "m.gguf")).module.parameters()} == {torch.bfloat16}
