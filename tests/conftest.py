"""Settings every test runs under: no folder of the repository may hide an installed package of the same name; shared models."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def native_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ forms of operators, built once."""
    from subquad import native_library

    path = tmp_path_factory.mktemp("native") / "forms.so"
    if not native_library.build(path):
        pytest.skip("no C++ compiler")
    return path


@pytest.fixture(params=["torch", "native"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs without the C++ forms of operators, and with them."""
    from subquad import native_library
    from subquad.kernels import native_code

    before = list(native_code._loaded)
    native_code._loaded.clear()
    native_code._loader.clear()
    if request.param == "native":
        native_library.load(request.getfixturevalue("native_path"))
    yield request.param
    native_code._loaded[:] = before


@pytest.fixture(scope="session")
def tiny_llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template, in Hugging Face format."""
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, eos_token_id=0, bos_token_id=1, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "chat_template": "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def tiny_llama(tiny_llama_source: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama directory that the test may spoil."""
    return Path(shutil.copytree(tiny_llama_source, tmp_path / "tiny-llama"))
