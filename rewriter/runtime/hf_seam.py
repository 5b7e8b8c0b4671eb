"""Hugging Face's attention and mask registries as our dispatch point: one site implementation per attention module."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from subquad.kernels.spec import RecurrenceSpec, SoftmaxSpec
from subquad.runtime.hf_cache import TAG, RecurrentLayer, with_recurrent_layers

NAME = "subquad"
SITE = "_subquad_site"
"""Instance attribute of an attention module that holds its SeamSite."""
MASK = "_subquad_mask"
Observer = Callable[[nn.Module, Tensor, Tensor, Tensor, "MaskCall"], Tensor | None]


@dataclass(eq=False)
class MaskCall:
    """The arguments of one mask construction, so that a dense mask is built only when someone needs it."""

    arguments: dict[str, Any]
    _dense: Tensor | None = field(default=None, repr=False)
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def plain(self) -> bool:
        """True when the mask is causal or full, with padding at most: then a predicate says it all."""
        return self.causal or self.arguments["mask_function"] is bidirectional_mask_function

    @property
    def causal(self) -> bool:
        """True for the plain causal mask."""
        return self.arguments["mask_function"] is causal_mask_function

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return int(self.arguments["q_offset"])

    @property
    def key_offset(self) -> int:
        """Position of the first key."""
        return int(self.arguments["kv_offset"])

    def valid(self) -> Tensor | None:
        """bool [B, keys] from position 0 on; None when nothing is padded."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return mask

    def dense(self) -> Tensor | None:
        """bool [B, 1, Tq, Tk] as sdpa wants it."""
        if self._dense is None:
            self._dense = sdpa_mask(**{**self.arguments, "allow_is_causal_skip": False})
        return self._dense

    def made_by(self, implementation: str) -> Any:
        """The mask that another attention implementation builds from the same arguments."""
        if implementation not in self._made:
            self._made[implementation] = ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)
        return self._made[implementation]


@dataclass(eq=False)
class SeamSite:
    """What an attention module runs instead of its own attention.

    operator: "softmax_attention" | "recurrence", or "original" for a module that was not rewritten.  spec: canonical JSON.
    parameters: learned tensors by operator argument.  previous: name of the attention implementation the module had.
    observer: called with (module, q, k, v, mask) before the operator; a tensor it returns is used as the output
    (conversion uses this to pass the original's output on).
    """

    operator: str
    spec: str
    parameters: Mapping[str, tuple[Tensor, ...]]
    observer: Observer | None = None
    previous: str = "sdpa"


PREVIOUS = "_subquad_previous"
"""Instance attribute of a model that holds the name of the attention implementation it had before."""


def attach(model: nn.Module, sites: Mapping[str, SeamSite]) -> None:
    """Route the attention of the named modules through our operators; `detach` undoes it.

    model: a transformers PreTrainedModel.  sites: implementation by module path.  Modules without one keep the
    implementation they had.
    """
    _register()
    before: str = model.config._attn_implementation  # type: ignore[union-attr,assignment]
    if before != NAME:
        model.__dict__[PREVIOUS] = before
    previous: str = model.__dict__[PREVIOUS]
    for path, site in sites.items():
        site.previous = previous
        model.get_submodule(path).__dict__[SITE] = site
    untouched = SeamSite("original", "", {}, previous=previous)
    for module in model.modules():
        module.__dict__.setdefault(SITE, untouched)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    recurrent = {
        int(model.get_submodule(path).layer_idx)  # type: ignore[arg-type]
        for path, site in sites.items()
        if site.operator == "recurrence"
    }
    if recurrent and hasattr(model, "_prepare_cache_for_generation"):
        model.__dict__["_prepare_cache_for_generation"] = _CachePreparation(model, recurrent)


def detach(model: nn.Module) -> None:
    """Give the model and its attention modules back what they had before `attach`."""
    for module in model.modules():
        module.__dict__.pop(SITE, None)
    model.__dict__.pop("_prepare_cache_for_generation", None)
    model.set_attn_implementation(model.__dict__.pop(PREVIOUS))  # type: ignore[operator]


def dispatched(model: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """How often each module reaches the attention registry while `run` calls the model.

    The masks are ours meanwhile, so an attention that takes its mask past the registry may make the call fail; what was
    reached until then is returned.
    """
    names = {module: name for name, module in model.named_modules()}
    _reached.append([])
    attach(model, {})
    try:
        run()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        pass
    finally:
        detach(model)
        reached = _reached.pop()
    return Counter(names[module] for module in reached if module in names)


_reached: list[list[nn.Module]] = []
"""One list for each `dispatched` under way."""


class _CachePreparation:
    """`generate` prepares its cache as always; then linearized layers get theirs."""

    def __init__(self, model: nn.Module, layers: set[int]) -> None:
        self.model, self.layers = weakref.ref(model), layers

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> Any:
        model = self.model()
        given = model_kwargs.get("past_key_values")
        result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *rest)  # type: ignore[union-attr]
        cache = model_kwargs.get("past_key_values")
        if cache is not None and given is None:
            with_recurrent_layers(cache, self.layers)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _CachePreparation:
        copied = _CachePreparation.__new__(_CachePreparation)
        model = memo.get(id(self.model()))
        copied.model, copied.layers = weakref.ref(model) if model is not None else self.model, set(self.layers)
        return copied


def _register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**arguments: Any) -> Tensor | None:
    """The mask function of the registry: a small tensor that carries the call's arguments.

    While a graph is being traced a plain dense sdpa mask is returned instead.
    """
    if torch.compiler.is_compiling():
        return sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    arguments.setdefault("q_offset", 0)
    arguments.setdefault("kv_offset", 0)
    arguments.setdefault("mask_function", causal_mask_function)
    call = MaskCall(arguments)
    carrier = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=arguments.get("device", "cpu"))
    setattr(carrier, MASK, call)
    return carrier


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the registry: [B, H, T, D] in, [B, T, H, V] out.

    A module that was not rewritten, or active dropout, runs the implementation the model had before, with its own mask.
    """
    for reached in _reached:
        reached.append(module)
    site: SeamSite | None = module.__dict__.get(SITE)
    call: MaskCall | None = getattr(attention_mask, MASK, None)
    if site is None or site.operator == "original" or dropout > 0:
        previous = "sdpa" if site is None else site.previous
        own = call.made_by(previous) if call is not None else attention_mask
        output: tuple[Tensor, None] = _implementation(module, previous)(
            module, query, key, value, own, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    if site.observer is not None:
        if call is None:
            raise ValueError("an observed attention needs the model's own mask, not a mask given as a tensor.")
        given = site.observer(module, query, key, value, call)
        if given is not None:
            return given, None
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if site.operator == "softmax_attention":
        return softmax_output(site, q, k, v, call, attention_mask, scaling), None
    return recurrence_output(site, q, k, v, call, getattr(key, TAG, None)), None


def _implementation(module: nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that the module would call under this name; eager ones live beside the module's class."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", sdpa_attention_forward)
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return function


def softmax_output(
    site: SeamSite,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: MaskCall | None,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """The site's softmax attention of q [B, Tq, H, D] over k, v [B, Tk, Hkv, D] under the mask of this call.

    scaling: the factor that the module asks for, which leaves out what it already multiplied into q or k; None means the
    site's own.
    """
    spec = SoftmaxSpec.parse(site.spec)
    if scaling is not None:
        spec = replace(spec, scale=scaling)
    if call is None or not call.plain:
        dense = call.dense() if call is not None else attention_mask
        bias = None
        if dense is not None:
            bias = (
                torch.zeros_like(dense, dtype=q.dtype).masked_fill(~dense, float("-inf"))
                if dense.dtype == torch.bool
                else dense
            )
        return _softmax(
            SoftmaxSpec(spec.scale, spec.softcap, None, spec.empty_rows).json(), q, k, v, bias, None, None, []
        )
    valid = call.valid()
    sees_all = not call.causal or (q.shape[1] == 1 and k.shape[1] + call.key_offset == call.offset + 1)
    terms = ([] if sees_all else ["(kv <= q)"]) + ([] if valid is None else ["(t0[b, kv] != 0)"])
    text = " & ".join(terms) or None
    positions = key_positions = None
    if call.offset and not sees_all:
        positions = torch.arange(call.offset, call.offset + q.shape[1], device=q.device).expand(q.shape[0], -1)
    if call.key_offset and text is not None:
        key_positions = torch.arange(call.key_offset, call.key_offset + k.shape[1], device=q.device).expand(
            k.shape[0], -1
        )
    tables = [] if valid is None else [valid]
    moved = SoftmaxSpec(spec.scale, spec.softcap, text, spec.empty_rows).json()
    return _softmax(moved, q, k, v, None, positions, key_positions, tables)


def _softmax(
    spec: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, positions: Tensor | None,
    key_positions: Tensor | None, tables: list[Tensor],
) -> Tensor:  # fmt: skip
    keys = [] if key_positions is None else [key_positions]
    o: Tensor = torch.ops.subquad.softmax_attention(q, [k], [v], [], [], keys, positions, bias, None, tables, [], spec)[
        0
    ]
    return o


def recurrence_output(
    site: SeamSite, q: Tensor, k: Tensor, v: Tensor, call: MaskCall | None, layer: RecurrentLayer | None
) -> Tensor:
    """The site's linearized attention; advances the layer's state when the cache holds one."""
    if call is None or not call.plain:
        raise ValueError(
            "a linearized layer takes a causal mask with padding only; this call brought another mask "
            "(packed sequences or a mask of its own)."
        )
    RecurrenceSpec.parse(site.spec)
    valid = call.valid()
    new = k.shape[1]
    if valid is not None:
        valid = valid[:, call.offset : call.offset + new] if layer is not None else valid[:, :new]
    missing = 0 if layer is not None else new - q.shape[1]
    if missing:
        q = torch.cat([q.new_zeros(q.shape[0], missing, *q.shape[2:]), q], dim=1)
    state = layer.state if layer is not None and layer.state is not None else (None, None, None, None)
    o, *after = _recurrence(site, q, k, v, valid, state)
    if layer is not None:
        layer.state = tuple(after)
    return o[:, missing:]


def _recurrence(
    site: SeamSite, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, state: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    learned = site.parameters

    def one(name: str) -> Tensor | None:
        return learned[name][0] if learned.get(name) else None

    result: tuple[Tensor, ...] = torch.ops.subquad.recurrence(
        q, k, v, one("decay"), one("beta"), list(learned.get("feature_q", ())), list(learned.get("feature_k", ())),
        one("window_gate"), valid, *state, None, site.spec,
    )  # fmt: skip
    return result
