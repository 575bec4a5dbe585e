"""What a DeepSeek-V4 is: the keys of its config, and the names, dtypes and shapes that they imply.

Names are upstream's (``layers.0.attn.wq_a.weight``, ``mtp.0.enorm.weight``), which vLLM's loaders
take (vLLM 0.26.0, vllm/models/deepseek_v4/nvidia/model.py:1150 and mtp.py). Everything is BF16 but
what upstream keeps in FP32: hyper-connections, attention sinks, router biases and the position
biases (``ape``) of the compressors; and the token table of hash routing, which is I64.

A config that lies about sizes is found out by its tensors; one whose sizes are words, negative or
absurd would end in a traceback, or fill the memory. Limits are far above any model's.
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import chain
from typing import Annotated, Any, Self

from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.tensors import TensorSpec
from vllm_forge.errors import problems, shortened
from vllm_forge.host import printable

MODEL_TYPE = "deepseek_v4"
# Entries of compress_ratios (transformers 5.17.0, configuration_deepseek_v4.py:33).
SLIDING, SPARSE, HEAVY = 0, 4, 128
DSPARK_BLOCKS = 3
MOST = 1 << 24
MOST_EXPERTS = 1 << 18  # of all layers
MOST_GROUPS = 256
MOST_CHARACTERS = 200  # of what messages show whole
SHOWN = 5  # problems
PATTERN = "re:"
# From here on the model says which projections are fused (nvidia/model.py packed_modules_mapping),
# so a rule that names the parts is taken for the whole.
FUSION_KNOWN = Version("0.29.0")
FUSED = {
    "fused_wqa_wkv": ("wq_a", "wkv"),
    "gate_up_proj": ("w1", "w3"),
    "fused_wkv_wgate": ("wkv", "wgate"),
}


def _one_line(text: str) -> str:
    if not text.isprintable():  # messages show it
        raise ValueError("expected printable characters")
    return text


def _scalar(value: Any) -> Any:
    if isinstance(value, list | dict):
        raise ValueError("expected a name, a number or a truth value")  # noqa: TRY004 - of pydantic
    if len(str(value)) > MOST_CHARACTERS:
        raise ValueError(f"expected at most {MOST_CHARACTERS} characters")
    return value.lower() if isinstance(value, str) else value  # as compressed-tensors reads it


Size = Annotated[int, Field(ge=1, le=MOST)]
Text = Annotated[str, AfterValidator(_one_line)]
Name = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Scalar = Annotated[Any, AfterValidator(_scalar)]


class Rules:
    """Rules that are asked together, compiled."""

    def __init__(self, rules: Iterable[str]) -> None:
        self.literal = set[str]()  # names, or the class of a module
        self.malformed = list[str]()  # not regular expressions; they match nothing
        self._patterns = list[re.Pattern[str]]()
        for rule in dict.fromkeys(rules):
            if not rule.startswith(PATTERN):
                self.literal.add(rule)
            elif (pattern := compiled(rule)) is None:
                self.malformed.append(rule)
            else:
                self._patterns.append(pattern)

    def match(self, name: str) -> bool:
        """Whether one of the rules means a module of that name."""
        return name in self.literal or any(pattern.match(name) for pattern in self._patterns)

    def means(self, name: str, version: Version) -> bool:
        """Whether one of the rules means the module, as this vLLM asks."""
        if self.match(name):
            return True
        parts = self._parts(name, version)
        return bool(parts) and all(parts)

    def divides(self, name: str, version: Version) -> bool:
        """Whether they mean some of the parts of a fused module, and not the others."""
        parts = self._parts(name, version)
        return not self.match(name) and any(parts) and not all(parts)

    def _parts(self, name: str, version: Version) -> list[bool]:
        prefix, _, last = name.rpartition(".")
        parts = FUSED.get(last, ()) if version >= FUSION_KNOWN else ()
        return [self.match(f"{prefix}.{part}") for part in parts]


def compiled(rule: str) -> re.Pattern[str] | None:
    """A regular expression, or wildcards, as a pattern; None for a malformed one."""
    try:
        is_regular = rule.startswith(PATTERN)
        return re.compile(rule.removeprefix(PATTERN) if is_regular else fnmatch.translate(rule))
    except (re.error, OverflowError, RecursionError):  # the latter: too much, too deep
        return None


class _Keys(BaseModel):
    """Keys that are read; others may be anything."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Scheme(BaseModel):
    """The arguments that compressed-tensors knows (0.15 to 0.19, quant_args.py); no others."""

    model_config = ConfigDict(strict=True, extra="forbid")
    num_bits: Scalar = 8
    type: Scalar = "int"
    symmetric: Scalar = True
    strategy: Scalar = None
    group_size: Scalar = None
    block_structure: list[int] | None = None
    actorder: Scalar = None
    dynamic: Scalar = False
    scale_dtype: Any = None
    zp_dtype: Any = None
    observer: Any = None
    observer_kwargs: Any = None

    @model_validator(mode="before")
    @classmethod
    def _split_blocks(cls, row: Any) -> Any:
        """Older writers' "128x128" as [128, 128]."""
        if isinstance(row, dict) and isinstance(blocks := row.get("block_structure"), str):
            return {**row, "block_structure": [int(side) for side in blocks.split("x")]}
        return row

    @model_validator(mode="after")
    def _infer_strategy(self) -> Self:
        if self.strategy is None:
            self.strategy = {None: "tensor", -1: "channel"}.get(self.group_size, "group")
        return self

    def has(self, arguments: Mapping[str, Any]) -> bool:
        """Whether it says so, and has no zero points, which no format has."""
        return self.symmetric is True and all(getattr(self, k) == v for k, v in arguments.items())


class Group(_Keys):
    """One of config_groups: the modules that its targets mean, and how they are quantized."""

    targets: list[Text]
    weights: Scheme
    input_activations: Scheme | None = None
    format: str | None = None

    @cached_property
    def rules(self) -> Rules:
        return Rules(self.targets)


class Quantization(_Keys):
    quant_method: Name | None = None
    format: Name | None = None
    moe_quant_algo: Name | None = None
    scale_fmt: Scalar = None
    ignore: list[Text] | None = None
    config_groups: dict[Text, Group] | None = Field(default=None, max_length=MOST_GROUPS)

    @model_validator(mode="before")
    @classmethod
    def _without_attention(cls, row: Any) -> Any:
        """Leave out groups that mean an attention's class, for its cache, as vLLM does."""
        groups = row.get("config_groups") if isinstance(row, dict) else None
        if not isinstance(groups, dict):
            return row
        kept = dict(groups)
        for name, group in groups.items():
            match group:
                case {"targets": [str(only)]} if only.endswith("Attention"):
                    del kept[name]
        return {**row, "config_groups": kept}


class Config(_Keys):
    compress_ratios: list[int]
    hc_mult: int = Field(ge=1, le=64)
    head_dim: Size
    hidden_size: Size
    index_head_dim: Size
    index_n_heads: Size
    moe_intermediate_size: Size
    n_routed_experts: int = Field(ge=1, le=4096)
    n_shared_experts: int = Field(ge=1, le=64)
    num_attention_heads: Size
    num_experts_per_tok: int = Field(ge=1, le=4096)
    num_hash_layers: int = Field(ge=0, le=1024)
    num_hidden_layers: int = Field(ge=1, le=1024)
    num_nextn_predict_layers: int = Field(ge=0, le=16)
    o_groups: Size
    o_lora_rank: Size
    q_lora_rank: Size
    vocab_size: Size
    dspark_target_layer_ids: list[int] = Field(default=[], min_length=1)
    dspark_markov_rank: Size | None = None
    dspark_block_size: Size | None = None
    quantization_config: Quantization | None = None
    compression_config: Quantization | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        layers, experts = self.num_hidden_layers, self.n_routed_experts
        if layers * experts > MOST_EXPERTS:
            raise ValueError(f"{layers} layers of {experts} experts are beyond any model")
        if (ratios := len(self.compress_ratios)) < layers:
            raise ValueError(f"compress_ratios has {ratios} entries for {layers} layers")
        if self.dspark_target_layer_ids and self.dspark_markov_rank is None:
            raise ValueError("dspark_target_layer_ids without dspark_markov_rank")
        return self


def require_deepseek_v4(config: Mapping[str, Any], where: str) -> None:
    """Refuse the config of another model, or one that cannot be right, with its problems."""
    if (kind := config.get("model_type")) != MODEL_TYPE:
        what = f"model_type is {repr(kind)[:MOST_CHARACTERS]}, not {MODEL_TYPE!r}"
        raise CheckpointUnreadableError(what, where=where, remedy="give a DeepSeek V4 checkpoint")
    try:
        Config.model_validate(dict(config))
    except ValidationError as error:
        rows = shortened([printable(row) for row in problems(error)], SHOWN)
        what = f"invalid config.json: {'; '.join(rows)}"
        remedy = "take it from where the tensors are from"
        raise CheckpointUnreadableError(what, where=where, remedy=remedy) from None


def shared_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """Embedding, output head, final norm and the hyper-connection that collapses the streams."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield _bf16("embed.weight", vocab, hidden)
    yield _bf16("head.weight", vocab, hidden)
    yield _bf16("norm.weight", hidden)
    yield from _head_streams("", config)


def layer_tensors(config: Mapping[str, Any], index: int) -> Iterator[TensorSpec]:
    """Decoder layer ``index``."""
    prefix = f"layers.{index}."
    yield from _block(prefix, config, hashed=index < config["num_hash_layers"])
    ratio = config["compress_ratios"][index]
    if ratio != SLIDING:
        # The sparse kind overlaps neighbouring windows: two series in one projection.
        series = 2 if ratio == SPARSE else 1
        yield from _compressor(f"{prefix}attn.", config, ratio, series, config["head_dim"])
    if ratio == SPARSE:
        indexer = f"{prefix}attn.indexer."
        heads, dim = config["index_n_heads"], config["index_head_dim"]
        yield _bf16(f"{indexer}wq_b.weight", heads * dim, config["q_lora_rank"])
        yield _bf16(f"{indexer}weights_proj.weight", heads, config["hidden_size"])
        yield from _compressor(indexer, config, ratio, 2, dim)


def mtp_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """The multi-token-prediction blocks, ``mtp.{0..}.*``: 797 tensors with 256 experts."""
    hidden = config["hidden_size"]
    for index in range(config["num_nextn_predict_layers"]):
        prefix = f"mtp.{index}."
        yield from _block(prefix, config, hashed=False)
        for name in ("e_proj", "h_proj"):
            yield _bf16(f"{prefix}{name}.weight", hidden, hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield _bf16(f"{prefix}{name}.weight", hidden)
        yield from _head_streams(prefix, config)


def dspark_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """DSpark's draft blocks, which also are called ``mtp.*``: 2376 tensors with 256 experts.

    vLLM 0.26.0, vllm/models/deepseek_v4/nvidia/dspark.py:78-123 and ``_remap_dspark_name``.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    last = f"mtp.{DSPARK_BLOCKS - 1}."
    for index in range(DSPARK_BLOCKS):
        yield from _block(f"mtp.{index}.", config, hashed=False)
    yield _bf16("mtp.0.main_proj.weight", hidden, hidden * len(config["dspark_target_layer_ids"]))
    yield _bf16("mtp.0.main_norm.weight", hidden)
    yield _bf16(f"{last}norm.weight", hidden)
    yield from _head_streams(last, config)
    for name in ("markov_w1", "markov_w2"):
        yield _bf16(f"{last}markov_head.{name}.weight", vocab, config["dspark_markov_rank"])
    # A ReplicatedLinear named proj, on hidden state and Markov embedding (0.33.0, qwen3_dspark.py).
    width = hidden + config["dspark_markov_rank"]
    yield _bf16(f"{last}confidence_head.proj.weight", 1, width)


def main_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    yield from shared_tensors(config)
    for index in range(config["num_hidden_layers"]):
        yield from layer_tensors(config, index)


def all_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    return chain(main_tensors(config), draft_tensors(config))


def draft_tensors(config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    """What is called ``mtp.*``: MTP blocks, or DSpark's where the config has its target layers."""
    return (dspark_tensors if has_dspark(config) else mtp_tensors)(config)


def has_dspark(config: Mapping[str, Any]) -> bool:
    return "dspark_target_layer_ids" in config


def _bf16(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="BF16", shape=shape)


def _f32(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="F32", shape=shape)


def _block(prefix: str, config: Mapping[str, Any], *, hashed: bool) -> Iterator[TensorSpec]:
    """What every block has: attention, experts, norms, hyper-connections."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, rank = config["head_dim"], config["q_lora_rank"]
    output_rank = config["o_groups"] * config["o_lora_rank"]
    attention = f"{prefix}attn."
    yield _f32(f"{attention}attn_sink", heads)
    yield _bf16(f"{attention}wq_a.weight", rank, hidden)
    yield _bf16(f"{attention}q_norm.weight", rank)
    yield _bf16(f"{attention}wq_b.weight", heads * head_dim, rank)
    yield _bf16(f"{attention}wkv.weight", head_dim, hidden)
    yield _bf16(f"{attention}kv_norm.weight", head_dim)
    # Block diagonal: each group of heads has its own rows.
    yield _bf16(f"{attention}wo_a.weight", output_rank, heads * head_dim // config["o_groups"])
    yield _bf16(f"{attention}wo_b.weight", hidden, output_rank)
    yield _bf16(f"{prefix}attn_norm.weight", hidden)
    yield _bf16(f"{prefix}ffn_norm.weight", hidden)
    yield from _experts(f"{prefix}ffn.", config, hashed=hashed)
    streams = config["hc_mult"]
    mixes = (2 + streams) * streams  # to collapse, to spread, and to mix the streams
    for site in ("attn", "ffn"):
        yield _f32(f"{prefix}hc_{site}_fn", mixes, streams * hidden)
        yield _f32(f"{prefix}hc_{site}_base", mixes)
        yield _f32(f"{prefix}hc_{site}_scale", 3)


def _experts(prefix: str, config: Mapping[str, Any], *, hashed: bool) -> Iterator[TensorSpec]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    count = config["n_routed_experts"]
    yield _bf16(f"{prefix}gate.weight", count, hidden)
    if hashed:
        shape = (config["vocab_size"], config["num_experts_per_tok"])
        yield TensorSpec(name=f"{prefix}gate.tid2eid", dtype="I64", shape=shape)
    else:
        yield _f32(f"{prefix}gate.bias", count)
    shared = width * config["n_shared_experts"]
    mlps = [(f"{prefix}experts.{index}.", width) for index in range(count)]
    for mlp, rows in [*mlps, (f"{prefix}shared_experts.", shared)]:
        yield _bf16(f"{mlp}w1.weight", rows, hidden)
        yield _bf16(f"{mlp}w2.weight", hidden, rows)
        yield _bf16(f"{mlp}w3.weight", rows, hidden)


def _compressor(
    prefix: str, config: Mapping[str, Any], ratio: int, series: int, dim: int
) -> Iterator[TensorSpec]:
    name = f"{prefix}compressor."
    yield _f32(f"{name}ape", ratio, series * dim)
    yield _bf16(f"{name}wkv.weight", series * dim, config["hidden_size"])
    yield _bf16(f"{name}wgate.weight", series * dim, config["hidden_size"])
    yield _bf16(f"{name}norm.weight", dim)


def _head_streams(prefix: str, config: Mapping[str, Any]) -> Iterator[TensorSpec]:
    streams = config["hc_mult"]
    yield _f32(f"{prefix}hc_head_fn", streams, streams * config["hidden_size"])
    yield _f32(f"{prefix}hc_head_base", streams)
    yield _f32(f"{prefix}hc_head_scale", 1)
