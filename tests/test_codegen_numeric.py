"""Tests the numbers of generated kernels under Triton's interpreter, in processes of their own, against the fp64 references."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

RUN = """
import json, sys, torch
from subquad.codegen.launch import recurrence_forward, softmax_forward
from subquad.codegen.schedule import Schedule
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, recurrence_reference, softmax_attention_reference
BLOCKS = Schedule(16, 16, 4)
for case in json.loads(sys.stdin.read()):
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    draw = lambda *shape: torch.randn(*shape).to(dtype)
    h, hkv, d, dv, tq, t = case["shape"]
    given = {"q": draw(2, tq, h, d)}
    if case["op"] == "softmax":
        given |= {"k": [draw(2, t, hkv, d)], "v": [draw(2, t, hkv, dv)], "rows": [], "lengths": [], "positions": [], "q_positions": None}
        given |= {"bias": draw(h, 1, t).float() if case.get("bias") else None, "sinks": draw(h) if case.get("sinks") else None}
        given |= {"operands": [torch.rand(2, t) > 0.3, torch.arange(t) // 7], "scalars": [5, -3]}
        if case.get("ragged"):
            given |= {"lengths": [torch.tensor([t, 3])], "q_positions": torch.tensor([t, 3])[:, None] - tq + torch.arange(tq)}
        given["spec"] = SoftmaxSpec(**case["spec"]).json()
        got, want = softmax_forward(given, BLOCKS), softmax_attention_reference(**given)
    else:
        w = lambda: [torch.randn(h, d, 5).to(dtype)]
        names = ("decay", "beta", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens")
        given |= dict.fromkeys(names) | {"k": draw(2, tq, hkv, d), "v": draw(2, tq, hkv, dv), "feature_q": w(), "feature_k": w()}
        given |= {"window_gate": torch.randn(h), "spec": RecurrenceSpec(("softmax(x @ w0)", "softmax(-(x @ w0))"), **case["spec"]).json()}
        if case.get("padded"):
            given["valid"] = torch.rand(2, tq) > 0.3
            given["valid"][1] = False
        want = recurrence_reference(**given)
        cut = tq // 3
        take = lambda part: {n: None if given[n] is None else given[n][:, part] for n in ("q", "k", "v", "valid")}
        first = recurrence_forward(given | take(slice(0, cut)), BLOCKS)
        state = dict(zip(("state", "window_k", "window_v", "seen"), first[1:]))
        second = recurrence_forward(given | take(slice(cut, None)) | state, BLOCKS)
        got = (torch.cat([first[0], second[0]], 1), *second[1:])
    errors = []
    for g, w in zip(got, want):
        g, w = g.double(), w.double()
        same = (g == w) | (g.isnan() & w.isnan())
        errors.append(float(torch.where(same, 0.0, ((g - w).abs() / (1 + w.abs())).nan_to_num(1e9)).max()) if g.numel() else 0.0)
    print(json.dumps(errors))
"""

MASKS = [
    "q >= kv",
    "(q >= kv) & ((q - kv < 9) | (kv < 3))",
    "t0[b, kv] & (q >= kv)",
    "t1[q] == t1[kv]",
    "(q - s0) // 4 >= (kv + s1) // 4",
    "(j < s0) | bit(t1[i], j - s0) & (q - kv < 20)",
]
SOFTMAX = [{"op": "softmax", "shape": (4, 2, 24, 20, 37, 37), "spec": {"scale": 0.2, "mask": mask}} for mask in MASKS]
SOFTMAX += [
    {"op": "softmax", "shape": (3, 1, 16, 16, 5, 33), "spec": {"scale": 0.2}, "sinks": True, "bias": True},
    {
        "op": "softmax",
        "shape": (2, 2, 40, 8, 18, 18),
        "spec": {"scale": 0.5, "softcap": 3.0, "mask": "q > kv"},
        "bias": True,
    },
    {"op": "softmax", "shape": (2, 2, 8, 8, 4, 18), "spec": {"scale": 0.5, "mask": "kv < 0", "empty_rows": "mean"}},
    {
        "op": "softmax",
        "shape": (2, 1, 8, 8, 4, 18),
        "spec": {"scale": 0.5, "mask": "kv < q", "empty_rows": "nan"},
        "ragged": True,
    },
    {
        "op": "softmax",
        "shape": (2, 1, 8, 8, 2, 18),
        "spec": {"scale": 0.5, "mask": "q >= kv"},
        "ragged": True,
        "sinks": True,
    },
]
RECURRENCE = [
    {"op": "recurrence", "shape": (4, 2, 12, 9, tokens, 0), "spec": {"scale": 0.3, "window": window, "sinks": sinks}}
    for tokens, window, sinks in ((37, 8, 2), (50, 16, 0), (20, 40, 3), (33, 0, 0))
]
RECURRENCE.append({**RECURRENCE[0], "padded": True})


def run_under_interpreter(cases, tmp_path):
    """Errors of each case, from one process whose Triton is the interpreter; bf16 is refused, since there its products are wrong."""
    if any(case["dtype"] not in ("float32", "float16") for case in cases):
        raise ValueError("Triton's interpreter multiplies raw bf16 bit patterns; test float32 or float16.")
    environment = os.environ | {"TRITON_INTERPRET": "1", "SUBQUAD_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("cases", [SOFTMAX, RECURRENCE], ids=["softmax", "recurrence"])
def test_kernels_equal_the_reference(cases, dtype, tmp_path):
    cases = [case | {"dtype": dtype} for case in cases]
    for case, errors in zip(cases, run_under_interpreter(cases, tmp_path), strict=True):
        assert max(errors) < (5e-6 if dtype == "float32" else 4e-3), (case, errors)


def test_bf16_is_refused_under_the_interpreter(tmp_path):
    with pytest.raises(ValueError, match="bf16"):
        run_under_interpreter([SOFTMAX[0] | {"dtype": "bfloat16"}], tmp_path)
