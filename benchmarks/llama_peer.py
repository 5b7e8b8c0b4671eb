"""The llama.cpp peer: a bf16 GGUF of the demo weights and the time of its tokens, in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_bf16(source: Path, target: Path) -> None:
    """Copy a GGUF file with every matrix dequantised and stored as bf16, vectors as fp32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    skipped = {"general.architecture", "general.file_type", "general.quantization_version"}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in skipped:
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = gguf.GGMLQuantizationType.BF16 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(values, kind) if values.ndim > 1 else values
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def llama_cpp(
    count: int, dtype: str, ends: bool, python: str = sys.executable
) -> Iterator[Callable[[str], tuple[int, float]] | None]:
    """A function from a prompt to (tokens, seconds after the first) of llama.cpp in a process of its own, on the same tensors.

    python: an interpreter that has llama-cpp-python.  ends: stop at the end token.  None when it is not installed there, or for
    another dtype than bf16.
    """
    if dtype != "bf16" or subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        yield None
        return
    import torch

    from subquad.packaged_weights import packaged_gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bf16.gguf"
        write_bf16(packaged_gguf(), path)
        options = ["--tokens", str(count), "--threads", str(torch.get_num_threads()), *(["--ends"] if ends else [])]
        with subprocess.Popen(
            [python, __file__, str(path), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        ) as process:  # fmt: skip
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()

            def run(prompt: str) -> tuple[int, float]:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(prompt) + "\n")
                process.stdin.flush()
                tokens, seconds = process.stdout.readline().split()
                return int(tokens), float(seconds)

            yield run
            process.stdin.close()


def main() -> None:
    """Load the model once, then answer each line of standard input, a prompt in JSON, with tokens and seconds after the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ends", action="store_true", help="stop at the end token")
    arguments = parser.parse_args()
    from llama_cpp import Llama

    model = Llama(str(arguments.gguf), n_ctx=4096, n_threads=arguments.threads, verbose=False)
    bias = None if arguments.ends else {"2": -100}
    print("ready", flush=True)
    for line in sys.stdin:
        chat = [{"role": "user", "content": json.loads(line)}]
        stream = model.create_chat_completion(
            chat, max_tokens=arguments.tokens, temperature=0, stream=True, logit_bias=bias
        )
        times = [time.perf_counter() for piece in stream if "content" in piece["choices"][0]["delta"]]
        print(len(times) - 1, times[-1] - times[0], flush=True)


if __name__ == "__main__":
    main()
