"""Draws arguments of the recurrence for every point of its axes, and runs them in pieces."""

import itertools

import torch

from subquad.kernels import RecurrenceSpec

STATE = ("state", "window_k", "window_v", "seen")
FLOATING = ("q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "state", "window_k", "window_v")
TOKENS = ("q", "k", "v", "decay", "beta", "valid")
HEDGEHOG = ("softmax(x @ w0)", "softmax(-(x @ w0))")
MAPS = ((("x",), None), (HEDGEHOG, None), (("softmax(x)", "1"), ("sigmoid(x)", "sum(x * x) * 0.1")))
WINDOWS = ({}, {"window": 3, "sinks": 2}, {"window": 4, "sinks": 1, "branch": "convex"})


def points():
    """Every admitted combination of decay, update, normaliser, window and direction, the maps taken in turn."""
    axes = itertools.product(
        ("none", "head", "token", "channel", "additive"),
        ("add", "delta"),
        ("none", "sum", "rms", "group"),
        WINDOWS,
        (True, False),
    )
    found = []
    for decay, update, normaliser, window, causal in axes:
        texts, texts_k = MAPS[len(found) % 3]
        try:
            spec = RecurrenceSpec(
                texts, 0.4, decay=decay, update=update, normaliser=normaliser, causal=causal, feature_map_k=texts_k, **window
            )  # fmt: skip
        except ValueError:
            continue
        found.append(spec)
    return found


def draw(
    spec, batch=2, length=21, heads=4, kv_heads=2, width=6, value=5, hidden=3, dtype=torch.float64, padded=False,
    shared_gates=False, closed=1.0, seed=0,
):  # fmt: skip
    """Random arguments for `spec`: keys of unit norm for delta, log decays from -closed to 0, per KV head with
    `shared_gates`.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    def uniform(*shape):
        return torch.rand(*shape, dtype=dtype, generator=generator)

    gates = kv_heads if shared_gates else heads
    texts = len(spec.feature_map)
    features = texts * hidden if "w0" in spec.feature_map[0] else width + texts - 1
    k = normal(batch, length, kv_heads, width)
    shapes = {"head": (gates,), "token": (batch, length, gates), "channel": (batch, length, gates, features)}
    return {
        "q": normal(batch, length, heads, width),
        "k": k / k.norm(dim=-1, keepdim=True) if spec.update == "delta" else k,
        "v": normal(batch, length, kv_heads, value),
        "decay": -closed * uniform(*shapes[spec.decay]) if spec.decay in shapes else None,
        "beta": 2 * uniform(batch, length, gates) if spec.update == "delta" else None,
        "feature_q": [normal(heads, width, hidden)] if "w0" in spec.feature_map[0] else [],
        "feature_k": [normal(heads, width, hidden)] if "w0" in spec.feature_map[0] else [],
        "window_gate": normal(heads) if spec.window else None,
        "valid": torch.rand(batch, length, generator=generator) > 0.3 if padded else None,
        **dict.fromkeys(STATE),
        "cu_seqlens": None,
        "spec": spec.json(),
    }  # fmt: skip


def piece(arguments, start, stop):
    """The arguments of tokens start .. stop."""
    tokens = {name: arguments[name] for name in TOKENS if arguments[name] is not None and arguments[name].dim() > 1}
    return arguments | {name: value[:, start:stop] for name, value in tokens.items()}


def in_pieces(form, arguments, cuts):
    """Outputs of `form` over the tokens cut at `cuts`, each piece with the state of the one before."""
    outs, bounds = [], [0, *sorted(cuts), arguments["q"].shape[1]]
    for start, stop in itertools.pairwise(bounds):
        o, *state = form(**piece(arguments, start, stop))
        outs.append(o)
        arguments = arguments | dict(zip(STATE, state, strict=True))
    return torch.cat(outs, 1), *state


def leaves(arguments):
    """[(name, tensor)] of everything that has a gradient."""
    found = []
    for name in FLOATING:
        value = arguments[name]
        found += [(name, x) for x in (value if isinstance(value, list) else [] if value is None else [value])]
    return found


def gradients(form, arguments, seed=1):
    """Outputs of `form` and the gradients of random weightings of all of them, zeros where there is none."""
    copies = {
        name: [x.detach().clone().requires_grad_() for x in value]
        if isinstance(value, list)
        else value.detach().clone().requires_grad_()
        if name in FLOATING and value is not None
        else value
        for name, value in arguments.items()
    }
    outputs = form(**copies)
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (x * torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)).sum() for x in outputs[:4]
    )
    inputs = [x for _, x in leaves(copies)]
    found = [None] * len(inputs)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def close(got, wanted, tolerance=1e-10):
    """Assert that tensors agree up to `tolerance`, relative to the largest entry or 1."""
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert one.shape == other.shape, (number, one.shape, other.shape)
        if one.numel():
            error = (one.double() - other.double()).abs().max() / (1 + other.double().abs().max())
            assert error <= tolerance, (number, float(error))


def error(got, wanted):
    """RMS of the difference over RMS of `wanted`."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())
