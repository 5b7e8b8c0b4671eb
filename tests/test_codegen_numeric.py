"""Tests the numbers of generated kernels under Triton's interpreter, in processes of their own, against the fp64 references."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RUNNER = Path(__file__).with_name("codegen_runner.py")
LIMIT = {"float32": 1e-5, "float16": 1e-2}


def softmax(shape, **case):
    """shape: query heads, KV heads, K, V, query rows, keys."""
    spec = {"scale": 0.3} | {name: case.pop(name) for name in ("mask", "softcap", "empty_rows") if name in case}
    return {"op": "softmax", "shape": shape, "spec": spec} | case


def recurrence(shape, feature_map=("x",), **case):
    """shape: query heads, KV heads, K, V, tokens."""
    names = ("normaliser", "decay", "update", "window", "sinks", "branch", "feature_map_k", "causal")
    spec = {"scale": 0.3, "normaliser": "none"} | {name: case.pop(name) for name in names if name in case}
    return {"op": "recurrence", "shape": shape, "spec": spec | {"feature_map": feature_map}} | case


LOLCATS = ("softmax(x @ w0)", "softmax(-(x @ w0))")
QUICK = [
    softmax((2, 1, 20, 12, 19, 19), mask="q >= kv", grad=True, batch=1),
    softmax((3, 1, 16, 16, 5, 33), sinks=True, bias=True, grad=True),
    softmax((2, 2, 40, 8, 18, 18), mask="q > kv", softcap=3.0, bias=True, grad=True),
    softmax((2, 2, 8, 8, 4, 18), mask="kv < 0", empty_rows="mean", grad=True),
    softmax((4, 2, 16, 8, 2, 18), mask="q >= kv", shared=True, sinks=True, batch=5),
    softmax((4, 2, 16, 8, 2, 18), pages="heads", sinks=True),
    softmax((4, 2, 16, 8, 5, 18), mask="(j < t1[b]) | t0[b, i, j - t1[b]]", tree=True),
    recurrence((2, 1, 12, 9, 19), decay="token", grad=True, state=True, padded=True),
    recurrence((2, 2, 12, 9, 21), LOLCATS, normaliser="sum", window=8, sinks=2),
    recurrence((1, 1, 12, 9, 35), decay="token", update="delta", alike=True, cut=33, steps=True),
    recurrence((1, 1, 12, 9, 19), ("relu(x) + 0.1",), decay="token", normaliser="sum", grad=True, padded=True),
    recurrence((1, 1, 12, 9, 19), decay="token", update="delta", grad=True),
    recurrence((1, 1, 12, 9, 19), decay="channel", decay_scale=30.0),
    recurrence(
        (1, 1, 4, 3, 19), ("relu(x) + 0.1",), decay="token", normaliser="sum", causal=False, grad=True, padded=True
    ),
    recurrence(
        (2, 1, 4, 3, 19), ("softmax(x @ w0)",), normaliser="sum", window=4, sinks=2, grad=True, padded=True, state=True
    ),
]
THOROUGH = [
    softmax((4, 2, 24, 20, 37, 37), mask=mask, grad=True)
    for mask in ("(q >= kv) & ((q - kv < 9) | (kv < 3))", "t0[b, kv] & (q >= kv)", "t1[q] == t1[kv]", "(q - s0) // 4 >= (kv + s1) // 4",
                 "h * 3 + q >= kv")
]  # fmt: skip
THOROUGH += [
    softmax((2, 1, 8, 8, 4, 18), mask="kv < q", empty_rows="nan", ragged=True),
    softmax((2, 1, 8, 8, 2, 18), mask="q >= kv", ragged=True, sinks=True, grad=True),
    softmax((4, 2, 16, 8, 3, 18), mask="q >= kv", shared=True, sinks=True, batch=5, grad=True),
    softmax((4, 2, 16, 8, 1, 18), pages="rows"),
    softmax((6, 2, 80, 40, 1, 50)),
]
THOROUGH += [
    recurrence(
        (2, 1, 12, 9, 37),
        ("relu(x) + 0.1",),
        decay=decay,
        update=update,
        normaliser=normaliser,
        grad=True,
        padded=True,
        state=True,
    )
    for decay in ("none", "head", "token", "channel")
    for update in ("add", "delta")
    for normaliser in ("none", "sum")
]
THOROUGH += [
    recurrence((2, 1, 12, 9, 37), ("relu(x)",), decay="head", normaliser="sum", grad=True, packed=True),
    recurrence((2, 1, 70, 70, 21), decay="channel", update="delta", grad=True),
    recurrence((2, 1, 12, 9, 37), update="delta", normaliser="rms", grad=True, padded=True, cut=34, steps=True),
    recurrence((2, 2, 12, 9, 37), LOLCATS, normaliser="sum", grad=True, cut=34, steps=True),
    recurrence((2, 2, 12, 9, 37), ("exp(x - amax(x))", "1"), normaliser="group", padded=True, grad=True),
    recurrence((2, 2, 4, 9, 21), ("1", "x", "outer(x, x)"), normaliser="sum", grad=True),
    recurrence((2, 2, 12, 9, 21), decay="additive", grad=True, padded=True),
    recurrence((2, 2, 12, 9, 37), decay="channel", decay_scale=30.0, padded=True, cut=34, steps=True, grad=True),
    recurrence((2, 2, 12, 9, 20), ("relu(x)",), feature_map_k=("exp(x)",), normaliser="sum", grad=True),
    recurrence((2, 1, 12, 9, 20), ("x / sqrt(sum(x * x) + 1e-6)",), update="delta", grad=True, cut=18, steps=True),
    recurrence((4, 2, 12, 9, 50), ("softmax(x @ w0)",), normaliser="sum", window=16, padded=True, grad=True),
    recurrence((4, 2, 12, 9, 20), ("softmax(x)",), normaliser="sum", window=40, sinks=3, grad=True, state=True),
    recurrence((4, 2, 12, 9, 37), decay="token", window=8, branch="convex", padded=True, grad=True, state=True),
    recurrence((2, 1, 12, 9, 21), update="delta", normaliser="rms", window=6, sinks=1, branch="convex", grad=True),
]
THOROUGH += [
    recurrence(
        (2, 1, 12, 9, 37),
        ("relu(x) + 0.1",),
        decay=decay,
        normaliser="sum",
        causal=False,
        grad=True,
        padded=True,
        state=True,
    )
    for decay in ("none", "head", "token", "channel")
]
THOROUGH += [
    recurrence((2, 1, 12, 9, 37), decay="additive", causal=False, grad=True, padded=True),
    recurrence((2, 1, 12, 9, 37), ("relu(x)",), decay="token", normaliser="sum", causal=False, grad=True, packed=True),
    recurrence(
        (2, 2, 12, 9, 37), ("softmax(x @ w0)",), decay="channel", normaliser="rms", causal=False, grad=True, hidden=12
    ),
    recurrence((2, 2, 4, 9, 21), ("1", "x", "outer(x, x)"), normaliser="sum", causal=False, grad=True),
]


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
