"""Tests that the GPU script says when it measured nothing, and that its path runs from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "No GPU is visible to torch, so nothing was measured.\n"
    assert not done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_writes_both_files(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--rehearse", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["operator"] for row in result["timings"]} >= {
        "GLA",
        "delta",
        "gated delta",
        "causal",
        "decode, 32 shared",
    }
    assert all(isinstance(row["milliseconds"]["subquad"], float) for row in result["timings"])
    assert "SDPA" in (tmp_path / "gpu.md").read_text()
