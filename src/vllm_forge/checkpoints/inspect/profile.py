"""What the checks of a checkpoint share: formats per part, counts, drafter."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.config_check import require_deepseek_v4
from vllm_forge.checkpoints.inspect.findings import Scope
from vllm_forge.checkpoints.inspect.formats import (
    DRAFT,
    Drafter,
    Format,
    Part,
    draft_tensors,
    drafter_of,
    main_tensors,
    part_of,
    recognize,
    split,
)
from vllm_forge.checkpoints.inspect.matching import asked_names, read_groups, require_termination

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorSpec


@dataclass(frozen=True)
class Profile:
    """A DeepSeek V4 checkpoint, for the checks."""

    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        """Refuse another model, and patterns that do not terminate.

        Raises:
            CheckpointUnreadableError: see require_deepseek_v4 and require_termination.
        """
        where = f"{self.checkpoint.source}, config.json"
        require_deepseek_v4(self.config, where)
        if groups := read_groups(self.quantization):
            layers = (*range(self.layers), *self.draft_layers)
            require_termination(
                [target for group in groups for target in group.targets],
                self.quantization.get("ignore") or [],
                asked_names(self.config, layers),
                [*self.modules, *(f"model.{module}" for module in self.modules)],
                where,
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The config as vLLM reads it, see ``filled_in``."""
        return filled_in(self.checkpoint.served)

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """quantization_config, empty without one."""
        return quantization_of(self.config)

    @property
    def layers(self) -> int:
        """Decoder layers, draft layers not counted."""
        return int(self.config["num_hidden_layers"])

    @property
    def draft_layers(self) -> range:
        """Numbers that vLLM gives the draft layers: the ones after the last decoder layer."""
        return range(self.layers, self.layers + int(self.config["num_nextn_predict_layers"]))

    def blocks(self, scope: Scope) -> dict[int, str]:
        """VLLM's number of each layer of a model -> its name in the checkpoint."""
        if scope is Scope.DRAFT:
            return {layer: f"mtp.{layer - self.layers}" for layer in self.draft_layers}
        return {layer: f"layers.{layer}" for layer in range(self.layers)}

    @property
    def names(self) -> Mapping[str, str]:
        """Tensor -> shard."""
        return self.checkpoint.names

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Tensor -> entry; empty when only the index is at hand."""
        return self.checkpoint.tensors

    @cached_property
    def drafter(self) -> Drafter:
        """What lies under ``mtp.``."""
        return drafter_of(self.names)

    @cached_property
    def draft_names(self) -> list[str]:
        """Tensors under ``mtp.``."""
        return [name for name in self.names if name.startswith(DRAFT)]

    @cached_property
    def main(self) -> dict[str, TensorSpec]:
        """The unquantized model's tensors by name, drafter left out."""
        return {tensor.name: tensor for tensor in main_tensors(self.config)}

    @cached_property
    def draft(self) -> dict[str, TensorSpec]:
        """The unquantized drafter's tensors by name; MTP's where there is none."""
        kind = self.drafter if self.drafter is Drafter.DSPARK else Drafter.MTP
        return {tensor.name: tensor for tensor in draft_tensors(self.config, kind)}

    @cached_property
    def modules(self) -> dict[str, dict[str, str]]:
        """Module -> suffix -> full name, of every tensor with a known suffix."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.names:
            module, suffix = split(name)
            if suffix:
                found[module][suffix] = name
        return dict(found)

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Module -> how its weight is stored; empty when only the index is at hand."""
        if not self.tensors:
            return {}
        return {
            module: recognize({suffix: self.tensors[name].dtype for suffix, name in rows.items()})
            for module, rows in self.modules.items()
        }

    def format_of(self, part: Part, *, draft: bool) -> Counter[Format]:
        """How often which format, over the linear layers of a part."""
        return self._by_part[part, draft]

    @cached_property
    def _by_part(self) -> dict[tuple[Part, bool], Counter[Format]]:
        counted: dict[tuple[Part, bool], Counter[Format]] = defaultdict(Counter)
        for module, kind in self.formats.items():
            counted[part_of(f"{module}.weight"), module.startswith(DRAFT)][kind] += 1
        return counted

    @cached_property
    def dtypes(self) -> dict[tuple[Part, bool], Counter[str]]:
        """Part and whether it is the drafter's -> dtype -> tensors."""
        counted: dict[tuple[Part, bool], Counter[str]] = defaultdict(Counter)
        for name, entry in self.tensors.items():
            counted[part_of(name), name.startswith(DRAFT)][entry.dtype] += 1
        return dict(counted)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization of a config, with ``quant_method`` as vLLM spells it; empty for none.

    vLLM 0.33.0, transformers_utils/model_arch_config_convertor.py:241.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        quantization = config.get("compression_config")
    if not isinstance(quantization, dict):
        return {}
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        return quantization
    spelled = method.lower().replace("compressed_tensors", "compressed-tensors")
    return {**quantization, "quant_method": spelled}


def filled_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of DeepSeek's own config.json, from those that other writers have instead.

    transformers writes ``layer_types``, ``compress_rates`` and ``mlp_layer_types`` (5.17.0,
    configuration_deepseek_v4.py:250-282). A config without a number of draft layers has none.
    """
    filled = {"num_nextn_predict_layers": 0, **config}
    types, rates = config.get("layer_types"), config.get("compress_rates")
    if "compress_ratios" not in filled and isinstance(types, list) and isinstance(rates, dict):
        filled["compress_ratios"] = [
            rates.get(kind, 0) if isinstance(kind, str) else None for kind in types
        ]
    kinds = config.get("mlp_layer_types")
    if "num_hash_layers" not in filled and isinstance(kinds, list):
        filled["num_hash_layers"] = kinds.count("hash_moe")
    return filled
