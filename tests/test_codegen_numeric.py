"""Tests the numbers of generated kernels under Triton's interpreter, in processes of their own, against the fp64 references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from codegen_cases import QUICK, THOROUGH, recurrence

pytest.importorskip("triton")

RUNNER = Path(__file__).with_name("codegen_runner.py")
LIMIT = {"float32": 1e-5, "float16": 1e-2}


def run_under_interpreter(cases, tmp_path):
    """Errors of each case, from one process whose Triton is the interpreter; bf16 is refused, since there its products are wrong."""
    if any(case["dtype"] not in LIMIT for case in cases):
        raise ValueError("Triton's interpreter multiplies raw bf16 bit patterns; test float32 or float16.")
    environment = os.environ | {"TRITON_INTERPRET": "1", "SUBQUAD_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, RUNNER], input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(cases, dtype, tmp_path):
    cases = [case | {"dtype": dtype} for case in cases]
    for case, errors in zip(cases, run_under_interpreter(cases, tmp_path), strict=True):
        assert max(errors.values()) < LIMIT[dtype], (case, errors)


def test_kernels_equal_the_reference_in_fp32(tmp_path):
    check(QUICK, "float32", tmp_path)


def test_kernels_equal_the_reference_in_fp16(tmp_path):
    check([case | {"grad": False} for case in (QUICK[4], QUICK[8])], "float16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", THOROUGH, ids=str)
def test_every_axis_equals_the_reference(case, tmp_path):
    check([case], "float32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [32, 64])
def test_larger_chunks_give_the_same(chunk, tmp_path):
    """Two levels of decays and the block inverse have more than one block only in chunks of 32 and more."""
    cases = [
        recurrence((1, 1, 12, 9, 70), decay=d, update=u, grad=True, chunk=chunk)
        for d, u in (("channel", "add"), ("token", "delta"))
    ]
    check(cases, "float32", tmp_path)


def test_bf16_is_refused_under_the_interpreter(tmp_path):
    with pytest.raises(ValueError, match="bf16"):
        run_under_interpreter([QUICK[0] | {"dtype": "bfloat16"}], tmp_path)
