"""What the checks of a checkpoint share: parts of the model, formats of weights, the drafter.

Names and dtypes of the unquantized model are in architecture.py. Suffixes, dtypes and shapes of
formats are those that vLLM registers for the same scheme:
compressed_tensors_moe_w4a4_nvfp4.py, compressed_tensors_w8a8_fp8.py, compressed_tensors_moe_wna16
of vllm/model_executor/layers/quantization/compressed_tensors, and modelopt.py, fp8.py, mxfp4.py
beside it (0.22.1, 0.26.0, 0.33.0). DeepSeek's own ``.scale`` is renamed by its loaders
(models/deepseek_v4/nvidia/model.py, `_make_deepseek_v4_weights_mapper`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

from vllm_forge.checkpoints import architecture
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect import matching
from vllm_forge.checkpoints.tensors import TensorSpec

DRAFT = "mtp."
BLOCK = re.compile(r"^(?:layers|mtp)\.\d+\.")
# Matrices that a quantizer may take; every other tensor is stored as it is.
LINEAR = re.compile(
    r"\.(w1|w2|w3|wq_a|wq_b|wkv|wo_a|wo_b|wgate|weights_proj|e_proj|h_proj|main_proj)\.weight$"
)
HALF = ("BF16", "F16")
INT4_GROUP, INT4_GROUPS = 128, (32, 64, 128)  # the usual columns of a scale, and all that run
# Of embedding and head, which some artifacts repeat: name -> whose bytes.
ALIASES = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}


class Part(StrEnum):
    """The classes of DeepSeek V4's tensors, in the order of tables, by their names in a block."""

    pattern: re.Pattern[str]

    EXPERTS = "experts", r"ffn\.experts\.\d+\."
    ATTENTION = "attention", r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)\."
    COMPRESSOR = "compressor", r"attn\.compressor\."
    INDEXER = "indexer", r"attn\.indexer\."
    SHARED_EXPERTS = "shared experts", r"ffn\.shared_experts\."
    ROUTER = "router", r"ffn\.gate\."
    NORMS = "norms", r"(attn\.)?(\w*_)?norm\.weight$|[eh]norm\.weight$"
    HYPER = "hyper-connections", r"hc_(attn|ffn|head)_"
    SINKS = "attention sinks", r"attn\.attn_sink$"
    EMBEDDING = "embedding and head", r"(embed|head|emb\.tok_emb|lm_head|embed_tokens)\.weight$"
    PROJECTIONS = "draft projections", r"(e_proj|h_proj|main_proj)\."
    DRAFT_HEADS = "draft heads", r"(markov_head|confidence_head)\."
    OTHER = "other", ""

    def __new__(cls, title: str, pattern: str) -> Self:
        part = str.__new__(cls, title)
        part._value_, part.pattern = title, re.compile(pattern)
        return part


class Drafter(StrEnum):
    """What the tensors under ``mtp.`` are."""

    NONE = "none"
    MTP = "mtp"
    DSPARK = "dspark"
    UNKNOWN = "unknown"


def part_of(name: str) -> Part:
    """The class of a stored tensor, by its name."""
    local = BLOCK.sub("", name)
    return next(part for part in Part if part.pattern.match(local))


def drafter_of(names: Iterable[str]) -> Drafter:
    """By the tensors that only one of them has: MTP's enorm and hnorm, DSpark's Markov head."""
    drafts = {BLOCK.sub("", name).partition(".")[0] for name in names if name.startswith(DRAFT)}
    if not drafts:
        return Drafter.NONE
    if "markov_head" in drafts:
        return Drafter.DSPARK
    return Drafter.MTP if drafts & {"enorm", "hnorm", "e_proj", "h_proj"} else Drafter.UNKNOWN


def draft_tensors(config: Mapping[str, Any], drafter: Drafter) -> Iterator[TensorSpec]:
    if drafter is Drafter.MTP:
        yield from architecture.mtp_tensors(config)
    elif drafter is Drafter.DSPARK and architecture.has_dspark(config):
        yield from architecture.dspark_tensors(config)


def alias_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Copies of embedding and head below ``mtp.0``, which some artifacts have.

    vLLM gives the draft model the target's own modules after loading
    (tests/patches/test_draft_shares_embeddings.py), so they are optional.
    """
    shape = (config["vocab_size"], config["hidden_size"])
    for name in ALIASES:
        yield TensorSpec(name=name, dtype="BF16", shape=shape)


class Format(StrEnum):
    """How the weight of a linear layer is stored."""

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
    """One stored tensor of a weight."""

    suffix: str  # after the module's name, e.g. `weight_scale`
    dtypes: tuple[str, ...]  # that are right; the first one is what our tools write
    block: tuple[int, int] = (1, 1)  # rows and columns of the weight for each of its elements
    # Its shape where that does not depend on the weight's. () is a scalar; lists of one element
    # are taken too (tests/patches/test_global_scale_shape.py), and reported.
    fixed: tuple[int, ...] | None = None
    optional: bool = False  # some writers leave it out
    # Not right, and turned into the right one by vLLM's copy, with their meaning: inspection.KEEP.
    converted: tuple[str, ...] = ()


PIECES: dict[Format, tuple[Piece, ...]] = {
    Format.PLAIN: (Piece("weight", ("BF16", "F32")),),
    Format.NVFP4: (
        Piece("weight_packed", ("U8",), (1, 2), converted=("I8",)),
        Piece("weight_scale", ("F8_E4M3",), (1, 16)),
        Piece("weight_global_scale", ("F32",), fixed=(), converted=HALF),
        Piece("input_global_scale", ("F32",), fixed=(), optional=True, converted=HALF),
    ),
    Format.MODELOPT_NVFP4: (
        Piece("weight", ("U8",), (1, 2), converted=("I8",)),
        Piece("weight_scale", ("F8_E4M3",), (1, 16)),
        Piece("weight_scale_2", ("F32",), fixed=(), converted=HALF),
        Piece("input_scale", ("F32",), fixed=(), converted=HALF),
    ),
    Format.W4A16: (
        Piece("weight_packed", ("I32",), (1, 8)),
        Piece("weight_scale", ("BF16",), (1, INT4_GROUP)),
        Piece("weight_shape", ("I64", "I32"), fixed=(2,)),
    ),
    Format.FP8_BLOCK: (
        Piece("weight", ("F8_E4M3",)),
        Piece("weight_scale", ("F32", "BF16"), (128, 128), converted=("F16", "F8_E8M0")),
    ),
    Format.FP8_NATIVE: (
        Piece("weight", ("F8_E4M3",)),
        Piece("scale", ("F8_E8M0", "F32"), (128, 128)),
    ),
    Format.MXFP4_NATIVE: (
        Piece("weight", ("I8", "U8"), (1, 2)),
        Piece("scale", ("F8_E8M0",), (1, 32), converted=("U8",)),
    ),
}
SUFFIXES = {"weight_scale_inv", "weight_zero_point", "weight_g_idx"}
SUFFIXES |= {piece.suffix for pieces in PIECES.values() for piece in pieces}


@dataclass(frozen=True, kw_only=True)
class RequiredTensor(TensorSpec):
    """A tensor that a format stores; all of ``dtypes`` are right. See Piece."""

    dtypes: tuple[str, ...]
    optional: bool = False
    converted: tuple[str, ...] = ()


def stored_as(
    tensor: TensorSpec, kind: Format, int4_group: int = INT4_GROUP
) -> Iterator[RequiredTensor]:
    """The stored tensors of a weight of the unquantized model (``tensor`` is [rows, columns])."""
    module = tensor.name.removesuffix(".weight")
    for piece in PIECES[kind]:
        block = (1, int4_group) if piece.block == (1, INT4_GROUP) else piece.block
        dtypes = (tensor.dtype,) if kind is Format.PLAIN else piece.dtypes
        shape = (-(-extent // part) for extent, part in zip(tensor.shape, block, strict=True))
        yield RequiredTensor(
            name=f"{module}.{piece.suffix}",
            dtype=dtypes[0],
            dtypes=dtypes,
            shape=tuple(shape) if piece.fixed is None else piece.fixed,
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


@dataclass(frozen=True, kw_only=True)
class Profile(Checkpoint):
    """A DeepSeek V4 checkpoint, for the checks."""

    def __post_init__(self) -> None:
        """Refuse another model, and patterns that do not terminate."""
        where = f"{self.source}, config.json"
        architecture.require_deepseek_v4(self.model, where)
        targets = [rule for group in self.groups.values() for rule in group.targets]
        patterns = sum(map(matching.is_pattern, [*self.ignore, *targets]))
        if patterns > matching.MOST_PATTERNS:
            raise CheckpointUnreadableError(
                f"quantization_config has {patterns} patterns, more than {matching.MOST_PATTERNS}",
                where=where,
                remedy="write one pattern for the modules of all layers",
            )
        if patterns:
            names = [*self.modules, *(f"model.{module}" for module in self.modules)]
            asked = matching.asked_names(self.model, self.blocks)
            matching.require_termination(targets, self.ignore, asked, names, where)

    @cached_property
    def model(self) -> Mapping[str, Any]:
        """The config as vLLM reads it, with the keys of DeepSeek's own config.json.

        transformers writes ``layer_types``, ``compress_rates`` and ``mlp_layer_types`` instead
        (5.17.0, configuration_deepseek_v4.py:250-282). A config without a number of draft layers
        has none.
        """
        model = {"num_nextn_predict_layers": 0, **self.served}
        types, rates = model.get("layer_types"), model.get("compress_rates")
        if "compress_ratios" not in model and isinstance(types, list) and isinstance(rates, dict):
            model["compress_ratios"] = [
                rates.get(kind, 0) if isinstance(kind, str) else None for kind in types
            ]
        kinds = model.get("mlp_layer_types")
        if "num_hash_layers" not in model and isinstance(kinds, list):
            model["num_hash_layers"] = kinds.count("hash_moe")
        return model

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """quantization_config, with ``quant_method`` as vLLM spells it; empty without one.

        vLLM 0.33.0, transformers_utils/model_arch_config_convertor.py:241.
        """
        quantization = self.model.get("quantization_config")
        if quantization is None:
            quantization = self.model.get("compression_config")
        if not quantization or not (method := quantization.get("quant_method")):
            return quantization or {}
        spelled = method.lower().replace("compressed_tensors", "compressed-tensors")
        return {**quantization, "quant_method": spelled}

    @cached_property
    def groups(self) -> dict[str, architecture.Group]:
        """Those of config_groups, each with a format: its own, or else the config's."""
        config = architecture.Quantization.model_validate(self.quantization)
        return {
            name: group.model_copy(update={"format": group.format or config.format})
            for name, group in (config.config_groups or {}).items()
        }

    @property
    def int4_group(self) -> int:
        """Columns of a scale of INT4 weights, where one size is stated that vLLM has."""
        stated = {g.weights.group_size for g in self.groups.values() if g.weights.type == "int"}
        (size,) = stated if len(stated) == 1 else (INT4_GROUP,)
        return size if size in INT4_GROUPS else INT4_GROUP

    @property
    def ignore(self) -> list[str]:
        """Rules of modules that are not quantized."""
        return list(self.quantization.get("ignore") or ())

    @cached_property
    def ignored(self) -> architecture.Rules:
        return architecture.Rules(self.ignore)

    @property
    def malformed(self) -> str | None:
        """The first rule that is not a regular expression."""
        rules = (self.ignored, *(group.rules for group in self.groups.values()))
        return next((rule for each in rules for rule in each.malformed), None)

    @property
    def layers(self) -> int:
        """Decoder layers, draft layers not counted."""
        return int(self.model["num_hidden_layers"])

    @property
    def draft_layers(self) -> range:
        """Numbers that vLLM gives the draft layers: the ones after the last decoder layer."""
        return range(self.layers, self.layers + int(self.model["num_nextn_predict_layers"]))

    @property
    def blocks(self) -> dict[int, str]:
        """VLLM's number of each layer, draft layers last -> its name in the checkpoint."""
        names = {layer: f"layers.{layer}" for layer in range(self.layers)}
        return names | {layer: f"mtp.{layer - self.layers}" for layer in self.draft_layers}

    @cached_property
    def drafter(self) -> Drafter:
        return drafter_of(self.names)

    @cached_property
    def draft_names(self) -> list[str]:
        return [name for name in self.names if name.startswith(DRAFT)]

    @cached_property
    def main(self) -> dict[str, TensorSpec]:
        """The unquantized model's tensors by name, drafter left out."""
        return {tensor.name: tensor for tensor in architecture.main_tensors(self.model)}

    @cached_property
    def draft(self) -> dict[str, TensorSpec]:
        """The unquantized drafter's tensors by name; MTP's where there is none."""
        kind = self.drafter if self.drafter is Drafter.DSPARK else Drafter.MTP
        return {tensor.name: tensor for tensor in draft_tensors(self.model, kind)}

    @property
    def own_draft(self) -> dict[str, TensorSpec]:
        """The same; empty where there is none."""
        return {} if self.drafter is Drafter.NONE else self.draft

    @cached_property
    def aliases(self) -> dict[str, TensorSpec]:
        return {tensor.name: tensor for tensor in alias_tensors(self.model)}

    @cached_property
    def modules(self) -> dict[str, dict[str, str]]:
        """Module -> suffix -> full name, of every tensor with a known suffix."""
        modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.names:
            module, suffix = split(name)
            if suffix:
                modules[module][suffix] = name
        return dict(modules)

    @cached_property
    def formats(self) -> dict[str, Format]:
        """Module -> how its weight is stored; empty when only the index is at hand."""
        if not self.tensors:
            return {}
        return {
            module: recognize({suffix: self.tensors[name].dtype for suffix, name in rows.items()})
            for module, rows in self.modules.items()
        }
