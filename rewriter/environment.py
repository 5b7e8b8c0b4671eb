"""Versions and machine: what an artifact records and what a bug report needs."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import subquad

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "safetensors", "peft", "gguf")


def versions() -> dict[str, str]:
    """Version of subquad and of each package it works with that is installed."""
    found = {"subquad": subquad.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Versions, interpreter, processor, threads, memory, accelerators and import path, without touching a GPU driver twice."""
    return {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "path": list(sys.path),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
