"""Names the machine and its limits, for the head of every benchmark table."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def line() -> str:
    """Processor, cores, load and versions, on one line."""
    import transformers

    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{processor()}, {cores} cores, {torch.get_num_threads()} threads, load {load:.1f}, {versions}"


def read_bandwidth(megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes per second of the fastest of several sums over a large fp32 tensor."""
    data = torch.ones(megabytes * 1024 * 1024 // 4)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.numel() * 4 / best
