"""A checkpoint taken apart once, for all gates: formats per part, counts, drafter."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.config_check import config_problems
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect.config_forms import quantization_of
from vllm_forge.checkpoints.inspect.formats import Format, recognize, split
from vllm_forge.checkpoints.inspect.matching import asked_names, read_groups
from vllm_forge.checkpoints.inspect.parts import (
    DRAFT,
    Drafter,
    Part,
    draft_tensors,
    drafter_of,
    main_tensors,
    part_of,
)
from vllm_forge.checkpoints.inspect.regex_limits import require_an_end
from vllm_forge.checkpoints.inventory import MODEL_TYPE, Expected

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_forge.checkpoints.inspect.header import Entry
    from vllm_forge.checkpoints.inspect.snapshot import Seen

SHOWN = 5


@dataclass(frozen=True)
class Profile:
    """What gates ask of a checkpoint."""

    seen: Seen

    def __post_init__(self) -> None:
        """Refuse what is no DeepSeek V4, or has endless patterns, before anything is concluded."""
        config, where = self.seen.config, f"{self.seen.place}, config.json"
        if config.get("model_type") != MODEL_TYPE:
            raise CheckpointUnreadableError(
                f"model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}",
                where=where,
                remedy="only DeepSeek V4 checkpoints are known here",
            )
        if problems := list(config_problems(config)):
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise CheckpointUnreadableError(
                f"config.json cannot be right: {'; '.join(problems[:SHOWN])}{more}",
                where=where,
                remedy="take it from the source model",
            )
        if groups := read_groups(self.quantization):
            layers = (*range(self.layers), *self.draft_layers)
            require_an_end(
                [target for group in groups for target in group.targets],
                self.quantization.get("ignore") or [],
                asked_names(config, layers),
                [*self.modules, *(f"model.{module}" for module in self.modules)],
                where,
            )

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json, see Seen."""
        return self.seen.config

    @property
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

    @property
    def names(self) -> Mapping[str, str]:
        """Tensor -> shard."""
        return self.seen.names

    @property
    def tensors(self) -> Mapping[str, Entry]:
        """Tensor -> entry; empty when only the index is at hand."""
        return self.seen.tensors or {}

    @cached_property
    def drafter(self) -> Drafter:
        """What lies under ``mtp.``."""
        return drafter_of(self.names)

    @cached_property
    def draft_names(self) -> list[str]:
        """Tensors under ``mtp.``."""
        return [name for name in self.names if name.startswith(DRAFT)]

    @cached_property
    def main(self) -> dict[str, Expected]:
        """The unquantized model's tensors by name, drafter left out."""
        return {tensor.name: tensor for tensor in main_tensors(self.config)}

    @cached_property
    def draft(self) -> dict[str, Expected]:
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

    def has_module(self, ending: str, kind: Format) -> bool:
        """Whether some module of that ending is stored so, the drafter's left out."""
        return any(
            found is kind and module.endswith(ending) and not module.startswith(DRAFT)
            for module, found in self.formats.items()
        )

    def has(self, part: Part, kind: Format, *, draft: bool = False) -> bool:
        """Whether some linear layer of the part is stored so."""
        return bool(self._by_part[part, draft][kind])
