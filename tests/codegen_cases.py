"""Cases that show every generated kernel with every optional input, for Triton's interpreter and for benchmarks/gpu.py."""


def softmax(shape, **case):
    """shape: query heads, KV heads, K, V, query rows, keys."""
    spec = {"scale": 0.3} | {name: case.pop(name) for name in ("mask", "softcap", "empty_rows") if name in case}
    return {"op": "softmax", "shape": shape, "spec": spec} | case


def recurrence(shape, feature_map=("x",), **case):
    """shape: query heads, KV heads, K, V, tokens."""
    names = ("normaliser", "decay", "update", "window", "sinks", "branch", "feature_map_k", "causal")
    spec = {"scale": 0.3, "normaliser": "none"} | {name: case.pop(name) for name in names if name in case}
    return {"op": "recurrence", "shape": shape, "spec": spec | {"feature_map": feature_map}} | case


AROUND = {
    "q": {"norm": "rms", "weight": True, "rotary": 8, "start": 2},
    "k": {"norm": "l2", "rotary": 8, "start": 2, "style": "interleaved"},
    "o": {"norm": "rms", "weight": True, "gate": "silu"},
}
"""Surroundings of a call, by side."""
TURNED_FIRST = {"norm": "rms", "norm_last": True, "weight": True, "rotary": 36, "start": 20, "style": "deinterleaved"}
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
    softmax((2, 1, 12, 9, 19, 19), mask="q >= kv", grad=True, around=AROUND),
    recurrence((2, 1, 12, 9, 19), decay="token", grad=True, packed=True, around=AROUND),
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
    softmax((2, 1, 16, 9, 5, 33), sinks=True, bias=True, grad=True, tables=2, around=AROUND | {"k": {}}),
    softmax(
        (2, 2, 70, 8, 4, 18),
        mask="kv < 0",
        empty_rows="mean",
        grad=True,
        tables=2,
        around={"q": TURNED_FIRST, "k": TURNED_FIRST, "o": {"gate": "sigmoid"}},
    ),
    softmax((4, 2, 16, 8, 1, 18), pages="rows", around={"q": {"norm": "l2", "rotary": 16}, "o": {"gate": "sigmoid"}}),
    softmax(
        (4, 2, 16, 8, 2, 18), mask="q >= kv", shared=True, sinks=True, batch=5, grad=True, around=AROUND | {"k": {}}
    ),
    recurrence(
        (2, 1, 12, 9, 37),
        update="delta",
        padded=True,
        state=True,
        grad=True,
        cut=34,
        steps=True,
        tables=2,
        around=AROUND,
    ),
    recurrence(
        (1, 1, 70, 5, 19),
        decay="channel",
        grad=True,
        around={"q": {"norm": "rms", "weight": True, "rotary": 70}, "k": TURNED_FIRST},
    ),
    recurrence(
        (2, 1, 12, 9, 19), ("relu(x) + 0.1",), decay="token", normaliser="sum", causal=False, grad=True, around=AROUND
    ),
    recurrence(
        (2, 2, 12, 9, 21),
        decay="token",
        normaliser="rms",
        window=6,
        sinks=1,
        branch="convex",
        padded=True,
        grad=True,
        state=True,
        around=AROUND,
    ),
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
