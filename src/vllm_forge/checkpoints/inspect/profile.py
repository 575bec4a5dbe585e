"""What the checks of a checkpoint share: parts of the model, formats of weights, the drafter.

Names and dtypes of the unquantized model are in architecture.py. Suffixes, dtypes and shapes
of formats are those that vLLM registers for the same scheme:
compressed_tensors_moe_w4a4_nvfp4.py, compressed_tensors_w8a8_fp8.py, compressed_tensors_moe_wna16
of vllm/model_executor/layers/quantization/compressed_tensors, and modelopt.py, fp8.py, mxfp4.py
beside it (0.22.1, 0.26.0, 0.33.0). DeepSeek's own ``.scale`` is renamed by its loaders
(models/deepseek_v4/nvidia/model.py, `_make_deepseek_v4_weights_mapper`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.architecture import (
    all_tensors,
    dspark_tensors,
    has_dspark,
    mtp_tensors,
    require_deepseek_v4,
)
from vllm_forge.checkpoints.inspect.matching import (
    Group,
    asked_names,
    read_groups,
    require_termination,
)
from vllm_forge.checkpoints.tensors import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorSpec

DRAFT = "mtp."
BLOCK = re.compile(r"^(?:layers|mtp)\.\d+\.")
# Matrices that a quantizer may take; every other tensor is stored as it is.
LINEAR = re.compile(
    r"\.(w1|w2|w3|wq_a|wq_b|wkv|wo_a|wo_b|wgate|weights_proj|e_proj|h_proj|main_proj)\.weight$"
)
Shape = tuple[int, ...]
# Global scales are scalars. Lists of one element are taken too (tests/patches/
# test_global_scale_shape.py); the difference is reported, see checks_tensors.py.
HALF = ("BF16", "F16")


class Part(StrEnum):
    """The classes of DeepSeek V4's tensors. Order of rows in tables."""

    EXPERTS = "experts"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    SHARED_EXPERTS = "shared experts"
    ROUTER = "router"
    NORMS = "norms"
    HYPER = "hyper-connections"
    SINKS = "attention sinks"
    EMBEDDING = "embedding and head"
    PROJECTIONS = "draft projections"
    DRAFT_HEADS = "draft heads"
    OTHER = "other"


# First match wins; the names are without "layers.<i>." or "mtp.<i>.".
RULES = tuple(
    (re.compile(pattern), part)
    for pattern, part in (
        (r"ffn\.experts\.\d+\.", Part.EXPERTS),
        (r"ffn\.shared_experts\.", Part.SHARED_EXPERTS),
        (r"ffn\.gate\.", Part.ROUTER),
        (r"attn\.indexer\.", Part.INDEXER),
        (r"attn\.compressor\.", Part.COMPRESSOR),
        (r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)\.", Part.ATTENTION),
        (r"attn\.attn_sink$", Part.SINKS),
        (r"hc_(attn|ffn|head)_", Part.HYPER),
        (r"(attn\.)?(\w*_)?norm\.weight$|[eh]norm\.weight$", Part.NORMS),
        (r"(embed|head|emb\.tok_emb|lm_head|embed_tokens)\.weight$", Part.EMBEDDING),
        (r"(e_proj|h_proj|main_proj)\.", Part.PROJECTIONS),
        (r"(markov_head|confidence_head)\.", Part.DRAFT_HEADS),
    )
)


class Drafter(StrEnum):
    """What the tensors under ``mtp.`` are."""

    NONE = "none"
    MTP = "mtp"
    DSPARK = "dspark"
    UNKNOWN = "unknown"


def part_of(name: str) -> Part:
    """The class of a stored tensor, by its name."""
    local = BLOCK.sub("", name)
    return next((part for pattern, part in RULES if pattern.match(local)), Part.OTHER)


def drafter_of(names: Iterable[str]) -> Drafter:
    """By the tensors that only one of them has: MTP's enorm and hnorm, DSpark's Markov head."""
    drafts = [name for name in names if name.startswith(DRAFT)]
    if not drafts:
        return Drafter.NONE
    locals_ = {BLOCK.sub("", name).partition(".")[0] for name in drafts}
    if "markov_head" in locals_:
        return Drafter.DSPARK
    if locals_ & {"enorm", "hnorm", "e_proj", "h_proj"}:
        return Drafter.MTP
    return Drafter.UNKNOWN


def main_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Everything but the drafter."""
    return (tensor for tensor in all_tensors(config) if not tensor.name.startswith(DRAFT))


def draft_tensors(config: Mapping[str, Any], drafter: Drafter) -> Iterator[TensorSpec]:
    """The tensors under ``mtp.`` that the config implies."""
    if drafter is Drafter.MTP:
        yield from mtp_tensors(config)
    elif drafter is Drafter.DSPARK and has_dspark(config):
        yield from dspark_tensors(config)


def alias_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Copies of embedding and head below ``mtp.0``, which some artifacts have.

    vLLM gives the draft model the target's own modules after loading
    (tests/patches/test_draft_shares_embeddings.py), so they are optional.
    """
    shape = (config["vocab_size"], config["hidden_size"])
    for name in ("mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"):
        yield TensorSpec(name=name, dtype="BF16", shape=shape)


class Format(StrEnum):
    """How a weight is stored."""

    PLAIN = "plain"
    NVFP4 = "nvfp4"
    MODELOPT_NVFP4 = "modelopt-nvfp4"
    W4A16 = "w4a16"
    FP8_BLOCK = "fp8-block"
    FP8_NATIVE = "fp8-native"
    MXFP4_NATIVE = "mxfp4-native"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Piece:
    """One stored tensor of a weight.

    Attributes:
        suffix: after the module's name, e.g. ``weight_scale``.
        dtypes: safetensors names that are right; the first one is what our tools write.
        shape: from the weight's rows and columns.
        optional: some writers leave it out.
        converted: dtypes that are not right, and that vLLM's copy turns into the right one without
            a change of meaning (verdict.KEEP).
    """

    suffix: str
    dtypes: tuple[str, ...]
    shape: Callable[[int, int], Shape]
    optional: bool = False
    converted: tuple[str, ...] = ()


def _matrix(rows: int, columns: int) -> Shape:
    return (rows, columns)


def _scalar(_rows: int, _columns: int) -> Shape:
    return ()


def _blocks(rows: int, columns: int) -> Shape:
    return (-(-rows // 128), -(-columns // 128))


def _columns(block: int) -> Callable[[int, int], Shape]:
    """One element per ``block`` columns."""
    return lambda rows, columns: (rows, -(-columns // block))


PIECES: dict[Format, tuple[Piece, ...]] = {
    Format.PLAIN: (Piece("weight", ("BF16", "F32"), _matrix),),
    Format.NVFP4: (
        Piece("weight_packed", ("U8",), _columns(2), converted=("I8",)),
        Piece("weight_scale", ("F8_E4M3",), _columns(16)),
        Piece("weight_global_scale", ("F32",), _scalar, converted=HALF),
        Piece("input_global_scale", ("F32",), _scalar, optional=True, converted=HALF),
    ),
    Format.MODELOPT_NVFP4: (
        Piece("weight", ("U8",), _columns(2)),
        Piece("weight_scale", ("F8_E4M3",), _columns(16)),
        Piece("weight_scale_2", ("F32",), _scalar),
        Piece("input_scale", ("F32",), _scalar),
    ),
    Format.W4A16: (
        Piece("weight_packed", ("I32",), _columns(8)),
        Piece("weight_scale", ("BF16",), _columns(128)),
        Piece("weight_shape", ("I64", "I32"), lambda _rows, _columns: (2,)),
    ),
    Format.FP8_BLOCK: (
        Piece("weight", ("F8_E4M3",), _matrix),
        Piece("weight_scale", ("F32", "BF16"), _blocks, converted=("F16", "F8_E8M0")),
    ),
    Format.FP8_NATIVE: (
        Piece("weight", ("F8_E4M3",), _matrix),
        Piece("scale", ("F8_E8M0", "F32"), _blocks),
    ),
    Format.MXFP4_NATIVE: (
        Piece("weight", ("I8", "U8"), _columns(2)),
        Piece("scale", ("F8_E8M0",), _columns(32), converted=("U8",)),
    ),
}
SUFFIXES = frozenset(piece.suffix for pieces in PIECES.values() for piece in pieces) | {
    "weight_scale_inv",
    "weight_zero_point",
    "weight_g_idx",
}


@dataclass(frozen=True, kw_only=True)
class RequiredTensor(TensorSpec):
    """A tensor that a format stores; ``alternatives`` to its dtype are right too. See Piece."""

    alternatives: tuple[str, ...] = ()
    optional: bool = False
    converted: tuple[str, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that are right; the first one is what our tools write."""
        return (self.dtype, *self.alternatives)


def stored_as(tensor: TensorSpec, kind: Format) -> Iterator[RequiredTensor]:
    """The stored tensors of a weight of the unquantized model (``tensor`` is [rows, columns])."""
    rows, columns = tensor.shape
    module = tensor.name.removesuffix(".weight")
    for piece in PIECES[kind]:
        dtype, *alternatives = (tensor.dtype,) if kind is Format.PLAIN else piece.dtypes
        yield RequiredTensor(
            name=f"{module}.{piece.suffix}",
            dtype=dtype,
            alternatives=tuple(alternatives),
            shape=piece.shape(rows, columns),
            optional=piece.optional,
            converted=piece.converted,
        )


def split(name: str) -> tuple[str, str]:
    """A tensor's module and its suffix; no suffix for names like ``attn.attn_sink``."""
    module, _, suffix = name.rpartition(".")
    return (module, suffix) if suffix in SUFFIXES else (name, "")


def recognize(dtypes: Mapping[str, str]) -> Format:
    """The format of a module, from the dtype of each of its suffixes.

    Told by what vLLM would read, so that a faulty scale does not change the answer.
    """
    weight = dtypes.get("weight")
    if "weight_packed" in dtypes:
        return Format.W4A16 if dtypes["weight_packed"] == "I32" else Format.NVFP4
    if "weight_scale_2" in dtypes:
        return Format.MODELOPT_NVFP4
    if weight == "F8_E4M3":
        return Format.FP8_NATIVE if "scale" in dtypes else Format.FP8_BLOCK
    if weight in {"I8", "U8"}:
        return Format.MXFP4_NATIVE
    if weight in {"BF16", "F32", "F16"} and not {"scale", "weight_scale"} & dtypes.keys():
        return Format.PLAIN
    return Format.UNKNOWN


@dataclass(frozen=True)
class Profile:
    """A DeepSeek V4 checkpoint, for the checks."""

    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        """Refuse another model, and patterns that do not terminate."""
        where = f"{self.checkpoint.source}, config.json"
        require_deepseek_v4(self.config, where)
        if self.groups:
            require_termination(
                [target for group in self.groups for target in group.targets],
                self.ignore,
                asked_names(self.config, self.blocks),
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

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups of a compressed-tensors config."""
        return read_groups(self.quantization)

    @property
    def ignore(self) -> list[str]:
        """Rules of modules that are not quantized."""
        return list(self.quantization.get("ignore") or ())

    @property
    def rules(self) -> list[str]:
        """All rules: those of the ignore list first."""
        return [*self.ignore, *(target for group in self.groups for target in group.targets)]

    @property
    def layers(self) -> int:
        """Decoder layers, draft layers not counted."""
        return int(self.config["num_hidden_layers"])

    @property
    def draft_layers(self) -> range:
        """Numbers that vLLM gives the draft layers: the ones after the last decoder layer."""
        return range(self.layers, self.layers + int(self.config["num_nextn_predict_layers"]))

    @property
    def blocks(self) -> dict[int, str]:
        """VLLM's number of each layer, draft layers last -> its name in the checkpoint."""
        names = {layer: f"layers.{layer}" for layer in range(self.layers)}
        return names | {layer: f"mtp.{layer - self.layers}" for layer in self.draft_layers}

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
    if not quantization or not (method := quantization.get("quant_method")):
        return quantization or {}
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
