"""Low-rank adapters by peft, put into a module tree in place: names, switching, merging, saving beside the artifact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from subquad.ir.errors import ConversionError
from subquad.tensor_writing import write_tensors

NAME = "default"


class Adapters:
    """The adapters of one model, by peft's `inject_adapter_in_model`; the tree keeps its class and module names.

    Trained in fp32 whatever the dtype of the weights under them.
    """

    def __init__(self, model: nn.Module, targets: list[str], rank: int, alpha: int, seed: int) -> None:
        """Put an adapter on every linear layer named in `targets`; raises ConversionError when peft is not installed."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConversionError("training adapters needs the package peft; install subquad[hf].") from error
        self.model = model
        self.config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0, bias="none")
        frozen = {name: p.requires_grad for name, p in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.config, model, adapter_name=NAME)
        self.layers = dict(self._layers())
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.requires_grad_(frozen[name])
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)

    def _layers(self) -> Iterator[tuple[str, Any]]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield name, module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' tensors by name."""
        return {
            f"{path}.{kind}": getattr(layer, kind)[NAME].weight
            for path, layer in self.layers.items()
            for kind in ("lora_A", "lora_B")
        }

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Inside the block the model computes with its own weights alone."""
        for layer in self.layers.values():
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    def merge(self) -> None:
        """Add the adapters to the weights, in fp32 with one rounding, and take peft's layers out of the tree."""
        for layer in self.layers.values():
            base = layer.get_base_layer()
            with torch.no_grad():
                base.weight.copy_(base.weight.float() + layer.get_delta_weight(NAME).float())
        self.remove()

    def remove(self) -> None:
        """Take peft's layers out of the tree; the weights stay as they are."""
        for path, layer in self.layers.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, layer.get_base_layer())

    def save(self, directory: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json as peft reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"base_model.model.{name}.weight": p.detach().contiguous() for name, p in self.parameters.items()}
        write_tensors(tensors, directory / "adapter_model.safetensors")
        self.config.save_pretrained(str(directory))


def linear_layers(model: nn.Module, paths: list[str]) -> list[str]:
    """Names of the linear layers that belong to the modules at `paths`, in the order of the tree.

    Raises ConversionError when they own none.
    """
    names = []
    for name, module in model.named_modules():
        inside = any(not path or name == path or name.startswith(path + ".") for path in paths)
        if inside and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            names.append(name)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    names = [name for name in names if model.get_submodule(name) is not output]
    if not names:
        raise ConversionError("the rewritten attention modules own no linear layer that an adapter could sit on.")
    return names
