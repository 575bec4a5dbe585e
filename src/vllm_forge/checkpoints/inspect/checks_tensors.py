"""Checks of files and tensors: names (from the index alone), dtypes, shapes and single scales."""

import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.fixtures.sparse import MARK
from vllm_forge.checkpoints.inspect.findings import (
    Effect,
    Finding,
    Scope,
    by_scope,
    finding,
    scoped,
    summarize,
)
from vllm_forge.checkpoints.inspect.profile import (
    DRAFT,
    HALF,
    LINEAR,
    PIECES,
    Drafter,
    Format,
    Part,
    Profile,
    RequiredTensor,
    part_of,
    split,
    stored_as,
)
from vllm_forge.checkpoints.tensors import StoredTensor, TensorSpec
from vllm_forge.host import printable

ROWS = re.compile(r"ffn\.shared_experts\.(down_proj|w2)\.\d+(\.|$)")
# Modules as transformers (in memory, and before 5.x in files), MLX and torch's wrappers name them.
FOREIGN = re.compile(
    r"\.(self_attn|mlp|switch_mlp)\.|_layernorm\.|^(model\.)?(embed_tokens|lm_head|model\.norm)\."
    r"|^(module|_orig_mod|(model\.)?language_model)\."
)
ROUTERS = (".gate.bias", ".gate.tid2eid")
# Buffers that older writers saved, and that vLLM skips (model_executor/models/utils.py,
# ROTARY_EMBEDS_UNUSED_WEIGHTS).
SKIPPED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
TOKENIZER = "tokenizer.json"
SHOWN = 80  # characters of a mark
# A matrix is stored if one of these suffixes is.
WEIGHTS = ("weight", "weight_packed")


def files(profile: Profile) -> Iterator[Finding]:
    """Shards, index and sizes agree, and what serving needs beside the tensors is there."""
    if mark := profile.config.get(MARK):
        yield finding("rehearsal", printable(str(mark))[:SHOWN])
    elif reason := profile.source.worthless:
        yield finding("rehearsal", f"an artifact without its mark: {reason}")
    if missing := profile.missing_shards:
        total = len({*missing, *profile.shards})
        effect = Effect.REFUSES if profile.tensors else Effect.NOTES
        yield finding("missing-shards", len(missing), total, missing[0], effect=effect)
    if profile.misplaced:
        yield finding("index-differs", summarize(profile.misplaced))
    total_size, size = profile.total_size, profile.bytes
    if not missing and profile.tensors and total_size not in (None, size):
        yield finding("total-size", total_size, size)
    if profile.tensors:
        try:
            if profile.source.json(TOKENIZER) is None:
                yield finding("no-tokenizer")
        except CheckpointUnreadableError as error:
            yield finding("bad-tokenizer", error.what)


def drafter(profile: Profile) -> Iterator[Finding]:
    """The drafter is the one that the config promises, and complete."""
    promised, count = len(profile.draft_layers), len(profile.draft_names)
    if not promised and profile.drafter is not Drafter.NONE:
        yield finding("unpromised-drafter", count)
        return
    match profile.drafter:
        case Drafter.NONE if promised:
            yield finding("no-mtp", promised)
        case Drafter.DSPARK:
            block = profile.model.get("dspark_block_size")
            k = "the checkpoint's block size, which config.json lacks" if block is None else block
            yield finding(
                "dspark",
                count,
                remedy='serve it with {"method": "dspark", "num_speculative_tokens": K} on a line '
                f"that has it, K = {k}: what is drafted beyond a block is hardly accepted",
            )
        case Drafter.UNKNOWN:
            yield finding("unknown-drafter", summarize(profile.draft_names))
    if profile.drafter not in (Drafter.MTP, Drafter.DSPARK):
        return
    if absent := list(_absent(profile, profile.draft.values())):
        check = "missing-mtp" if profile.drafter is Drafter.MTP else "other-drafter"
        yield finding("incomplete-drafter", summarize(absent), len(profile.draft), check=check)
    if profile.drafter is Drafter.MTP and not profile.names.keys() >= profile.aliases.keys():
        yield finding("no-aliases")


def experts(profile: Profile) -> Iterator[Finding]:
    """Every projection of every expert of every layer."""
    wanted = [t for t in profile.main.values() if part_of(t.name) is Part.EXPERTS]
    if absent := list(_absent(profile, wanted)):
        here = len(wanted) - len(absent)
        yield finding("missing-experts", here, len(wanted), summarize(absent))


def router(profile: Profile) -> Iterator[Finding]:
    """The bias of the routers, under the name that the loader renames."""
    wanted = (*profile.main, *profile.own_draft)
    tables = [n for n in wanted if n.endswith(ROUTERS) and n not in profile.names]
    if renamed := [n for n in tables if _other_name(n) in profile.names]:
        yield finding("renamed-router-bias", summarize(map(_other_name, renamed)))
    yield from scoped("missing-router-bias", sorted(set(tables) - set(renamed)))


def others(profile: Profile) -> Iterator[Finding]:
    """Everything else that the config implies is stored, and no matrix row by row."""
    if rows := [name for name in profile.names if ROWS.search(name)]:
        yield finding("split-rows", summarize(rows))
    others = (t for t in profile.main.values() if part_of(t.name) is not Part.EXPERTS)
    if absent := [name for name in _absent(profile, others) if not name.endswith(ROUTERS)]:
        yield finding("missing-tensors", summarize(absent))


def unknown(profile: Profile) -> Iterator[Finding]:
    """No names that no module of the model has; loaders look each of them up."""
    expected = [*profile.main, *profile.own_draft, *profile.aliases]
    known = {split(name)[0] for name in expected} | {_other_name(name) for name in expected}
    names = [
        name
        for name in profile.names
        if split(name)[0] not in known and not ROWS.search(name) and not name.endswith(SKIPPED)
    ]
    if profile.drafter is Drafter.UNKNOWN or not profile.draft_layers:  # `drafter` reports these
        names = [name for name in names if not name.startswith(DRAFT)]
    foreign = [name for name in names if FOREIGN.search(name)]
    yield from scoped("foreign-names", foreign)
    names = [name for name in names if not FOREIGN.search(name)]
    numbers = tuple(f"layers.{number}." for number in profile.draft_layers)
    for scope, own in by_scope(names):
        misnamed = scope is Scope.DRAFT or bool(numbers and own[0].startswith(numbers))
        hint = "loaders look for the draft layer under mtp.0, without a model. in front"
        remedy = {"remedy": hint} if misnamed and not profile.draft_names else {}
        yield finding("unknown-tensors", summarize(own), scope=scope, **remedy)


def _absent(profile: Profile, wanted: Iterable[TensorSpec]) -> Iterator[str]:
    """Tensors, or weights in whatever format, that are not stored."""
    for name in (tensor.name for tensor in wanted):
        module, names = name.removesuffix(".weight"), {name, _other_name(name)}
        if LINEAR.search(name):
            names = {f"{module}.{suffix}" for suffix in WEIGHTS}
        if not names & profile.names.keys():
            yield name


def _other_name(name: str) -> str:
    return name.replace(".gate.bias", ".gate.e_score_correction_bias")


SINGLE = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")
SHARED = ("weight_global_scale", "weight_scale_2")
SINGLE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # what vLLM takes for one
GAP = 1 << 16  # bytes between two scalars that are read in one go rather than in two
MOST_RUN = 1 << 24  # bytes read in one go
MATRIX = 2  # dimensions
FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
INTEGERS = {"I64", "I32"}


def shapes(profile: Profile) -> Iterator[Finding]:
    """Every scale that its format has, under its name, in its dtype and shape."""
    faults: dict[str, list[str]] = defaultdict(list)
    group = profile.int4_group
    for tensor in (*profile.main.values(), *profile.draft.values()):
        if not tensor.name.endswith(".weight") or len(tensor.shape) != MATRIX:
            continue
        kind = profile.formats.get(tensor.name.removesuffix(".weight"), Format.UNKNOWN)
        if kind not in (Format.UNKNOWN, Format.PLAIN):
            for required in stored_as(tensor, kind, group):
                fault, name = stored_fault(profile, required)
                faults[fault].append(name)
    yield from _surplus(profile)
    yield from scoped("scale-inv", faults["scale-inv"])
    if lists := faults["global-scale-shape"]:
        yield finding("global-scale-shape", summarize(lists))
    yield from scoped("missing-scales", faults["missing-scales"])
    if converted := faults["converted"]:
        yield finding("converted", _as_stored(profile, converted))
    yield from scoped("wrong-scales", faults["wrong-scales"], partial(_as_stored, profile))
    if any(
        kind is Format.FP8_BLOCK and module.endswith(".attn.wo_a") and not module.startswith(DRAFT)
        for module, kind in profile.formats.items()
    ):
        yield finding("wo_a-scale")


def stored_fault(profile: Profile, required: RequiredTensor) -> tuple[str, str]:
    """The row of checks.toml for a tensor that must be stored, "" for none, and its name."""
    name, stored = required.name, profile.tensors.get(required.name)
    if stored is None:
        inverse = name.replace(".weight_scale", ".weight_scale_inv")
        if inverse != name and inverse in profile.tensors:
            return "scale-inv", inverse
        return "" if required.optional else "missing-scales", name
    as_list = required.shape == () and stored.shape == (1,)
    if not as_list and stored.shape != required.shape:
        return "wrong-scales", name
    if stored.dtype in required.dtypes:
        return "global-scale-shape" if as_list else "", name
    return "converted" if stored.dtype in required.converted else "wrong-scales", name


def _surplus(profile: Profile) -> Iterator[Finding]:
    """Suffixes that a module's format does not have.

    vLLM has weight_g_idx for every W4A16 expert before 0.30.0, and for none since
    (compressed_tensors_moe_wna16.py).
    """
    names = list[str]()
    for module, kind in profile.formats.items():
        known = {"weight_scale_inv", *(piece.suffix for piece in PIECES.get(kind, ()))}
        if kind is not Format.UNKNOWN:
            names += [
                name for suffix, name in profile.modules[module].items() if suffix not in known
            ]
    orders = [name for name in names if name.endswith(".weight_g_idx")]
    yield from scoped("surplus", orders, since="0.30.0")
    yield from scoped("surplus", sorted({*names} - {*orders}))


def _as_stored(profile: Profile, names: list[str]) -> str:
    tensor = profile.tensors[names[0]]
    return f"{len(names)}, e.g. {names[0]} {tensor.dtype} {list(tensor.shape)}"


def single_scales(profile: Profile) -> Iterator[Finding]:
    """Single scales: finite, positive, and one for gate and up projection of an expert."""
    scalars = read_scalars(profile)
    yield from scoped(
        "not-positive",
        [name for name, value in scalars.items() if not (math.isfinite(value) and value > 0)],
        lambda names: f"{summarize(names)}, e.g. {scalars[names[0]]}",
    )
    pairs: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in scalars.items():
        module, _, suffix = name.rpartition(".")
        expert, _, projection = module.rpartition(".")
        if suffix in SHARED and projection in {"w1", "w3"}:
            pairs[f"{expert}.w1.{suffix}"][projection] = value

    def what(names: list[str]) -> str:
        ends = [(min(pairs[name].values()), max(pairs[name].values())) for name in names]
        worst = max(high / low if low else math.inf for low, high in ends)
        return (
            f"{len(names)} of {len(pairs)} experts, e.g. {names[0]}; up to x {worst:.3g}. "
            "vLLM keeps w1's for both, with a warning"
        )

    unequal = [name for name, pair in pairs.items() if len(set(pair.values())) > 1]
    yield from scoped("unequal-global-scales", unequal, what)


def read_scalars(profile: Profile) -> dict[str, float]:
    """The values of all single scales, reading those bytes and small gaps between them."""
    names = {
        tensor: name
        for name, tensor in profile.tensors.items()
        if name.rpartition(".")[2] in SINGLE
        and tensor.dtype in SINGLE_BYTES
        and tensor.size == SINGLE_BYTES[tensor.dtype]
    }
    runs: list[list[StoredTensor]] = []
    for tensor in sorted(names, key=lambda tensor: (tensor.shard, tensor.begin)):
        first, last = (runs[-1][0], runs[-1][-1]) if runs else (tensor, tensor)
        near = tensor.begin - last.end <= GAP and tensor.end - first.begin <= MOST_RUN
        if not runs or tensor.shard != last.shard or not near:
            runs.append([])
        runs[-1].append(tensor)
    scalars: dict[str, float] = {}
    for run in runs:
        first, last = run[0], run[-1]
        data = profile.source.read(first.shard, first.begin, last.end)
        for tensor in run:
            number = data[tensor.begin - first.begin : tensor.end - first.begin]
            code, above = ("<e", b"") if tensor.dtype == "F16" else ("<f", bytes(4 - len(number)))
            (scalars[names[tensor]],) = struct.unpack(code, above + number)  # BF16: half of FP32
    return scalars


def formats(profile: Profile) -> Iterator[Finding]:
    """Weights whose dtype and scales make a format; one for all experts of a layer.

    And no drafter of which one part was quantized and another was not.
    """
    drafts = {name: kind for name, kind in profile.formats.items() if name.startswith(DRAFT)}
    of_experts = {
        kind for name, kind in drafts.items() if part_of(f"{name}.weight") is Part.EXPERTS
    }
    quantized = {Format.NVFP4, Format.W4A16, Format.MODELOPT_NVFP4}.intersection(drafts.values())
    if quantized and Format.PLAIN in of_experts:
        yield finding("partial-draft", ", ".join(sorted(set(drafts.values()))))
    yield from scoped(
        "unknown-format",
        [module for module, kind in profile.formats.items() if kind is Format.UNKNOWN],
        lambda names: f"{summarize(names)}; known: {', '.join(PIECES)}",
    )
    kinds: dict[str, Counter[Format]] = defaultdict(Counter)
    for name in (*profile.main, *profile.draft):
        module = name.removesuffix(".weight")
        layer, experts, _ = module.partition(".ffn.experts.")
        if experts and module in profile.formats:
            kinds[layer][profile.formats[module]] += 1
    yield from scoped(
        "mixed-experts",
        [layer for layer, counted in kinds.items() if len(counted) > 1],
        lambda layers: (
            f"{len(layers)} layers, e.g. {layers[0]}: "
            + ", ".join(f"{count} {kind}" for kind, count in kinds[layers[0]].most_common())
        ),
    )


def downcasts(profile: Profile) -> Iterator[Finding]:
    """FP32 where the model itself has FP32."""
    wide = [t.name for t in (*profile.main.values(), *profile.draft.values()) if t.dtype == "F32"]
    stored = {name: profile.tensors[name].dtype for name in wide if name in profile.tensors}
    if rounded := [name for name, dtype in stored.items() if dtype in HALF]:
        yield finding("rounded", summarize(rounded), len(wide))


def against_source(profile: Profile, source: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Unquantized tensors in the source's own dtypes."""
    narrower = [
        name
        for name, tensor in profile.tensors.items()
        if (origin := source.get(name)) is not None
        and origin.shape == tensor.shape
        and FLOATS.get(origin.dtype, 0) > FLOATS.get(tensor.dtype, 99)
    ]
    if narrower:
        there, here = source[narrower[0]].dtype, profile.tensors[narrower[0]].dtype
        yield finding("narrower", summarize(narrower), there, here)


def kept_unquantized(profile: Profile) -> Iterator[Finding]:
    """Compressor and indexer projections that vLLM builds without a quantization config."""
    quantized = []
    for module, kind in profile.formats.items():
        part = part_of(f"{module}.weight")
        inside = part is Part.COMPRESSOR or (part is Part.INDEXER and not module.endswith(".wq_b"))
        if inside and kind is not Format.PLAIN:
            quantized.append(module)
    yield from scoped("quantized-compressor", quantized)


def plain_tensors(profile: Profile) -> Iterator[Finding]:
    """What is stored as it is: its shape as the config says, and numbers of the right kind."""
    wanted = {**profile.main, **profile.own_draft, **profile.aliases}
    other_shapes, other_kinds = [], []
    for name, spec in wanted.items():
        tensor = profile.tensors.get(name)
        kind = profile.formats.get(name.removesuffix(".weight"))
        if tensor is None or (LINEAR.search(name) and kind is not Format.PLAIN):
            continue
        if tensor.shape != spec.shape:
            other_shapes.append(name)
        elif tensor.dtype not in (INTEGERS if spec.dtype == "I64" else FLOATS):
            other_kinds.append(name)

    def compared(of: Callable[[TensorSpec], object], names: list[str]) -> str:
        have, need = of(profile.tensors[names[0]]), of(wanted[names[0]])
        return f"{summarize(names)}; {have}, not {need}"

    yield from scoped("other-shape", other_shapes, partial(compared, lambda t: list(t.shape)))
    yield from scoped("other-numbers", other_kinds, partial(compared, lambda t: t.dtype))


NAMES = (files, drafter, experts, router, others, unknown)
TENSORS = (shapes, single_scales, formats, downcasts, plain_tensors, kept_unquantized)
