"""Tests that the GPU script says when it measured nothing, and that its path runs from end to end."""

import json
import os
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
def test_a_rehearsal_under_the_interpreter_writes_both_files(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--rehearse", "--out", tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert len(result["checks"]) == 2
    assert all(row["right"] for row in result["checks"])
    assert "softmax_attention_forward" not in result["unchecked"], "its check ran"
    assert "recurrence_step" in result["unchecked"], "no case of the rehearsal runs it"
    assert {row["operator"] for row in result["timings"]} >= {
        "GLA",
        "delta",
        "gated delta",
        "causal",
        "decode, 32 shared",
    }
    assert all(isinstance(row["milliseconds"]["subquad"], float) for row in result["timings"])
    assert "SDPA" in (tmp_path / "gpu.md").read_text()


def test_the_cases_of_the_gpu_show_every_kernel_and_every_optional_input():
    sys.path.append(str(SCRIPT.parent))
    from codegen_cases import QUICK, THOROUGH
    from gpu_cases import RECURRENCES

    cases = [*QUICK, *THOROUGH]
    specs = [case["spec"] for case in cases if case["op"] == "recurrence"]
    for name, values in {"decay": {"head", "token", "channel", "additive"}, "normaliser": {"sum", "rms", "group", "none"},
                         "update": {"delta"}, "branch": {"convex"}, "causal": {False}}.items():  # fmt: skip
        assert values <= {spec.get(name) for spec in specs}, name
    for option in ("bias", "sinks", "shared", "pages", "tree", "ragged", "grad", "padded", "packed", "state", "steps"):
        assert any(case.get(option) for case in cases), option
    for axis in ("window", "decay", "update", "causal"):
        assert {getattr(spec, axis) for spec in RECURRENCES.values()} >= {
            spec.get(axis) for spec in specs if axis != "window"
        } - {None}
