"""The llama.cpp peer: a bf16 GGUF of the demo weights and the time of its tokens, in a process of its own."""

from __future__ import annotations

import argparse
import time
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


def main() -> None:
    """Load the model once, then answer each line of standard input with the tokens per second of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", default="")
    arguments = parser.parse_args()
    from llama_cpp import Llama

    model = Llama(str(arguments.gguf), n_ctx=2048, n_threads=arguments.threads, verbose=False)
    chat = [{"role": "user", "content": arguments.prompt}]
    print("ready", flush=True)
    while True:
        try:
            input()
        except EOFError:
            return
        stream = model.create_chat_completion(
            chat, max_tokens=arguments.tokens, temperature=0, stream=True, logit_bias={"2": -100}
        )
        times = [time.perf_counter() for piece in stream if "content" in piece["choices"][0]["delta"]]
        print((len(times) - 1) / (times[-1] - times[0]), flush=True)


if __name__ == "__main__":
    main()
