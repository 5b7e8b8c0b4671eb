"""The inputs a forward is captured with: what the user gave or what a Hugging Face model takes, and their symbolic axes."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from subquad.ir.errors import CaptureError

IMAGES = re.compile(r"pixel|image|video|frames")
BATCH, TOKENS, TARGETS = 2, 8, 6


def arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; raises CaptureError for what is neither a tensor, a tuple nor a dict."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if (
        isinstance(example_inputs, tuple)
        and len(example_inputs) == 2
        and isinstance(example_inputs[0], tuple)
        and isinstance(example_inputs[1], dict)
    ):
        return example_inputs
    if isinstance(example_inputs, Sequence):
        return tuple(example_inputs), {}
    raise CaptureError(f"example_inputs is a {type(example_inputs).__name__}; give a tuple, a dict or a tensor.")


def batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes a tensor an example: dense, no other input's memory, and two rows where every input is a batch of one.

    torch.export would fix an axis of size one, and read inputs of one memory from the last of them.
    """
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    batch_of_one = bool(tensors) and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors)
    taken: set[int] = set()

    def example(tensor: torch.Tensor) -> torch.Tensor:
        dense = torch.cat([tensor, tensor]) if batch_of_one else tensor.contiguous()
        if dense.data_ptr() in taken:
            dense = dense.clone()
        taken.add(dense.data_ptr())
        return dense

    return example


def symbolic_axes(given: Any, most: int = 2, channels_first: frozenset[int] = frozenset()) -> Any:
    """For every tensor of a tree the axes that become symbolic, as torch.export's dynamic shapes; None for other leaves.

    most: 2 for batch and sequence, 1 for the batch alone, 0 for none.  channels_first: numbers, among the tensors, of those
    that are [B, C, T].
    """
    leaves, structure = pytree.tree_flatten_with_path(given)
    tensors = [value for _, value in leaves if isinstance(value, torch.Tensor)]
    lengths = {value.shape[1] for value in tensors if value.dim() in (2, 3)}
    axes = [
        _axes(pytree.keystr(path), value, lengths) if isinstance(value, torch.Tensor) else None
        for path, value in leaves
    ]
    for n in channels_first:
        axes[[m for m, (_, value) in enumerate(leaves) if isinstance(value, torch.Tensor)][n]] = [0, 2]
    kept = [None if a is None else dict.fromkeys((x for x in a if most == 2 or x < most), Dim.AUTO) for a in axes]
    return pytree.tree_unflatten(kept, structure)


def grown(given: Any, shapes: Any) -> Any:
    """The arguments with one more of everything along each symbolic axis but the batch, the last repeated; None without one.

    shapes: as `symbolic_axes` gives them.  A vector as long as such an axis grows with it.
    """
    leaves, structure = pytree.tree_flatten(given)
    axes = structure.flatten_up_to(shapes)
    lengths = {leaf.shape[axis] for leaf, found in zip(leaves, axes, strict=True) for axis in found or () if axis > 0}
    batches = {leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() > 1}

    def longer(leaf: Any, found: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        vector = leaf.dim() == 1 and leaf.shape[0] in lengths - batches
        for axis in [0] if vector else [axis for axis in found or () if axis > 0]:
            leaf = torch.cat([leaf, leaf.narrow(axis, leaf.shape[axis] - 1, 1)], axis)
        return leaf

    if not lengths:
        return None
    return pytree.tree_unflatten([longer(*one) for one in zip(leaves, axes, strict=True)], structure)


def with_lists(shapes: Any) -> Any:
    """The axes of a call with lists in the places of containers of other classes, as torch.export asks for them."""
    if isinstance(shapes, list) or type(shapes) is tuple:
        return type(shapes)(with_lists(one) for one in shapes)
    if type(shapes) is dict:
        return {key: with_lists(one) for key, one in shapes.items()}
    if type(shapes) in pytree.SUPPORTED_NODES:
        return [with_lists(one) for one in pytree.SUPPORTED_NODES[type(shapes)].flatten_fn(shapes)[0]]
    return shapes


def _axes(name: str, value: torch.Tensor, lengths: set[int]) -> list[int]:
    """Batch and sequence, never heads, channels or features; axes of size one stay fixed.

    lengths: of the call's sequences [B, T] and [B, T, D].  [B], [B, T] and [B, T, D] → the first two, and all three of what
    is over pairs, [B, T, T], [B, T, T, D] and boolean [B, Tq, Tk]; [B, H, T, …] and more → the first and the third, and the
    fourth of a mask [B, H, Tq, Tk] (boolean, as wide as it is high, or one row for all queries and heads); of images
    [B, C, H, W] or [B, H, W, C] → the first.
    """
    axes = {0, 1} if value.dim() < 4 else {0, 2}
    square = value.dim() in (3, 4) and value.shape[1] == value.shape[2]
    if (square and (value.dim() == 3 or value.shape[1] in lengths)) or (value.dim() == 3 and value.dtype == torch.bool):
        axes = {0, 1, 2}
    elif _is_image(name, value):
        axes = {0}
    elif value.dim() == 4 and (
        value.dtype == torch.bool or value.shape[2] == value.shape[3] or value.shape[1] == value.shape[2] == 1
    ):
        axes.add(3)
    return sorted(axis for axis in axes if axis < value.dim() and value.shape[axis] != 1)


def _is_image(name: str, value: torch.Tensor) -> bool:
    if value.dim() < 4 or not value.dtype.is_floating_point:
        return False
    channels_last = value.dim() == 4 and 1 < value.shape[1] == value.shape[2] != value.shape[3]
    return bool(IMAGES.search(name)) or (value.dim() == 4 and value.shape[1] == 3) or channels_last


def one_batch(given: Any, shapes: Any) -> None:
    """State, inside a capture, that first axes of one size are the same size: they are one batch."""
    if shapes is None:
        return
    leaves, structure = pytree.tree_flatten(given)
    axes = structure.flatten_up_to(shapes)
    batched = [
        x for x, a in zip(leaves, axes, strict=True) if isinstance(x, torch.Tensor) and x.dim() > 1 and a and 0 in a
    ]
    for one, other in itertools.pairwise(batched):
        if _hint(one.shape[0]) == _hint(other.shape[0]):
            torch._check(one.shape[0] == other.shape[0])


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def default_inputs(model: torch.nn.Module) -> dict[str, Any]:
    """Example inputs for a Hugging Face model of any kind: two rows, no cache.

    Token ids with a padding mask (text), decoder ids beside them (sequence to sequence), images at the config's size,
    audio features or samples; what the model names in `main_input_name` and its forward takes.
    Raises CaptureError for any other module, which needs example_inputs.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "main_input_name"):
        raise _needs_inputs(model)
    parameters = inspect.signature(model.forward).parameters
    main = str(model.main_input_name)
    inputs: dict[str, Any] = {}
    for name, make in _MAKERS.items():
        wanted = name == main or (name in _ALWAYS and name in parameters)
        if wanted and name in parameters:
            made = make(config)
            if made is not None:
                inputs[name] = made
    if main not in inputs:
        inputs = {key: torch.as_tensor(value) for key, value in getattr(model, "dummy_inputs", {}).items()}
        if main not in inputs:
            raise _needs_inputs(model)
    if "input_ids" in inputs and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    targets = _ids(config)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters and targets is not None:
        inputs["decoder_input_ids"] = targets[:, :TARGETS].contiguous()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "use_cache" in parameters or (takes_any and getattr(config, "use_cache", None)):
        inputs["use_cache"] = False
    return inputs


def _needs_inputs(model: torch.nn.Module) -> CaptureError:
    return CaptureError(
        f"{type(model).__name__} needs example_inputs: a tuple or dict of the tensors its forward takes."
    )


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings that the config, or a part of it, has."""
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


_PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config", "speech_encoder")


def _ids(config: Any) -> torch.Tensor | None:
    vocabulary = _setting(config, "vocab_size")
    if vocabulary is None:
        return None
    return torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) * 7919 % int(vocabulary)


def _pixels(config: Any) -> torch.Tensor | None:
    size, channels = _setting(config, "image_size", "input_size"), _setting(config, "num_channels") or 3
    if isinstance(size, Mapping):
        size = size.get("height", size.get("shortest_edge"))
    if size is None:
        size = 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames = _setting(config, "num_frames")
    shape = [BATCH, channels, height, width] if frames is None else [BATCH, frames, channels, height, width]
    return _noise(shape)


def _features(config: Any) -> torch.Tensor | None:
    """Log-mel features: [B, bins, frames] for a model that reads a fixed length (Whisper), else [B, frames, bins]."""
    bins, longest = _setting(config, "num_mel_bins"), _setting(config, "max_source_positions")
    if bins is not None and longest is not None and _setting(config, "num_conv_layers") is None:
        return _noise([BATCH, bins, 2 * longest])
    width = bins or _setting(config, "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
    return None if width is None else _noise([BATCH, 32, width])


def _samples(config: Any) -> torch.Tensor | None:
    """A waveform [B, samples], or a spectrogram [B, frames, bins] for a model of patches."""
    bins, frames = _setting(config, "num_mel_bins"), _setting(config, "max_length")
    if bins is not None and frames is not None and _setting(config, "patch_size") is not None:
        return _noise([BATCH, frames, bins])
    return _noise([BATCH, 4000])


def _noise(shape: list[int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_MAKERS: dict[str, Callable[[Any], torch.Tensor | None]] = {
    "input_ids": _ids, "pixel_values": _pixels, "pixel_values_videos": _pixels, "input_features": _features,
    "input_values": _samples,
}  # fmt: skip
_ALWAYS = ("input_ids", "pixel_values")
