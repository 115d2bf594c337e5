"""LoRA adapters in a loaded model: which one a row of a batch goes through is chosen token by token."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from processors.generation.providers.hf.batching import Span
from processors.generation.providers.hf.loading import Loaded

BASE = "__base__"
"""What peft calls the model without an adapter."""
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Of the names of an adapter's tensors."""


class AdapterError(Exception):
    """The adapter cannot be used with this model; the text says why."""


class Adapters:
    """The adapters of one model. `rows` names, for the next forward pass, the adapter of each of its rows."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._hooked: set[LoraLayer] = set()
        self._rows: list[str] = []
        self._inner: dict[str, str] = {"": BASE}
        """Our name of an adapter -> PyTorch's, which holds no dot."""

    def load(self, name: str, path: str) -> None:
        """Read an adapter as peft saved it. Raises `AdapterError`; the model is then as it was."""
        inner = f"adapter{len(self._inner)}"
        try:
            config, weights = _read(Path(path).expanduser())
            self._inject(inner, config, weights)
            self._hook()
            self._try(inner)
        except Exception as problem:  # peft raises whatever fits a fault of the file; none of it is the model's
            self._remove(inner)
            raise AdapterError(f"{path}: {problem}") from problem
        self._inner[name] = inner

    def __contains__(self, name: str) -> bool:
        return name in self._inner

    def begin(self, rows: list[str]) -> None:
        """Name the adapter of each row of the next forward pass; empty for none."""
        self._rows = [self._inner[row] for row in rows]

    def _inject(self, name: str, config: LoraConfig, weights: dict[str, torch.Tensor]) -> None:
        model = self._loaded.model
        inject_adapter_in_model(config, model, adapter_name=name)
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
        if result.unexpected_keys:
            raise AdapterError(f"it has tensors that the model has no place for: {result.unexpected_keys[0]}")
        missing = [key for key in result.missing_keys if f".{name}." in key]
        if missing:
            raise AdapterError(f"it lacks tensors, such as {missing[0]}")
        model.eval().requires_grad_(False)

    def _hook(self) -> None:
        for layer in self._layers():
            if layer not in self._hooked:
                self._hooked.add(layer)
                layer.register_forward_pre_hook(self._choose, with_kwargs=True)

    def _choose(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, object]]:
        return args, {**kwargs, "adapter_names": self._rows}

    def _try(self, name: str) -> None:
        """Variants that peft does not mix in a batch are found out here."""
        self._rows = [name, name]
        self._loaded.scores([1, 2], [Span(0, 0, 2)], [0, 1])

    def _remove(self, name: str) -> None:
        for layer in self._layers():
            layer.delete_adapter(name)
        getattr(self._loaded.model, "peft_config", {}).pop(name, None)
        self._rows = []

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self._loaded.model.modules() if isinstance(module, LoraLayer)]


def _read(path: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    if not (path / WEIGHTS).is_file():
        raise AdapterError(f"there is no {WEIGHTS}")
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"it is of type {config.peft_type}, and only LoRA is served")
    head = {"lm_head", "embed_tokens"} & set(config.target_modules or ()) or config.modules_to_save
    if head:
        raise AdapterError(f"it changes {', '.join(sorted(head))}: only adapters of the layers between are served")
    config.inference_mode = True
    weights = load_file(path / WEIGHTS)
    return config, {key.removeprefix(PREFIX): tensor for key, tensor in weights.items()}
