"""Gates about scales: which are there, their names, shapes, and the values of the single ones."""

from __future__ import annotations

import math
import struct
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.checkpoint import plain_name
from vllm_forge.checkpoints.inspect.findings import Effect, Finding, by_scope, some
from vllm_forge.checkpoints.inspect.formats import PIECES, Format, RequiredTensor, stored_as

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorSpec

SINGLE = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")
GAP = 1 << 16  # bytes between two scalars that are read in one go rather than in two
SHARED = ("weight_global_scale", "weight_scale_2")


def shapes(profile: Profile) -> Iterator[Finding]:
    """Every scale that its format has, under its name, in its dtype and shape; G08, G09."""
    faults: dict[str, list[str]] = defaultdict(list)
    for tensor in _weights(profile):
        module = tensor.name.removesuffix(".weight")
        kind = profile.formats.get(module, Format.UNKNOWN)
        if kind in (Format.UNKNOWN, Format.PLAIN):
            continue
        for want in stored_as(tensor, kind):
            fault, name = _fault(profile, want)
            faults[fault].append(name)
    for scope, names in by_scope(faults["renamed"]):
        yield Finding(
            gate="G09",
            title="block scales are named weight_scale_inv",
            effect=Effect.REFUSES,
            scope=scope,
            what=f"{some(names)}; a compressed-tensors group registers weight_scale",
            remedy="name them weight_scale",
        )
    if lists := faults["list"]:
        yield Finding(
            gate="G08",
            title="global scales are lists of one element",
            effect=Effect.NOTES,
            what=f"shape (1,) instead of (): {some(lists)}; the loaders of all lines take both",
            remedy="squeeze them, for loaders that do not",
            handled_by="vllm-project/vllm#43297",
        )
    for scope, names in by_scope(faults["absent"]):
        yield Finding(
            gate="scales",
            title="scales are missing",
            effect=Effect.CORRUPTS,
            scope=scope,
            what=some(names),
            remedy="quantize these modules again: without its scale a weight means nothing",
        )
    if converted := faults["converted"]:
        yield Finding(
            gate="scales",
            title="scales or packed weights of a dtype that vLLM converts",
            effect=Effect.DEPARTS,
            what=_as_stored(profile, converted),
            remedy="store them as the format has it",
        )
    for scope, names in by_scope(faults["wrong"]):
        yield Finding(
            gate="scales",
            title="scales or packed weights of the wrong dtype or shape",
            effect=Effect.REFUSES,
            scope=scope,
            what=_as_stored(profile, names),
        )


def _fault(profile: Profile, want: RequiredTensor) -> tuple[str, str]:
    """What is wrong with a tensor that must be there, "" for nothing, and its name."""
    entry = profile.tensors.get(want.name)
    if entry is None:
        inverse = want.name.replace(".weight_scale", ".weight_scale_inv")
        if inverse != want.name and inverse in profile.tensors:
            return "renamed", inverse
        return "" if want.optional else "absent", want.name
    if want.shape == () and entry.shape == (1,):
        return "list", want.name
    if entry.shape != want.shape or entry.dtype not in (*want.dtypes, *want.converted):
        return "wrong", want.name
    return "" if entry.dtype in want.dtypes else "converted", want.name


def _as_stored(profile: Profile, names: list[str]) -> str:
    entry = profile.tensors[names[0]]
    return f"{len(names)}, e.g. {names[0]} {entry.dtype} {list(entry.shape)}"


def block_scale_names(profile: Profile) -> Iterator[Finding]:
    """G09, for the one projection that reads its scale by name."""
    if profile.has_module(".attn.wo_a", Format.FP8_BLOCK):
        yield Finding(
            gate="G09",
            title="wo_a's block scale is named weight_scale",
            effect=Effect.REFUSES,
            what="the output projection of vLLM before 0.27.0 reads weight_scale_inv",
            handled_by="vllm-project/vllm#43290",
            before="0.27.0",
        )


def values(profile: Profile) -> Iterator[Finding]:
    """Single scales: finite, positive, and one for gate and up projection of an expert."""
    found = read_scalars(profile)
    bad = (name for name, value in found.items() if not (math.isfinite(value) and value > 0))
    for scope, names in by_scope(bad):
        yield Finding(
            gate="scales",
            title="global scales that are no positive numbers",
            effect=Effect.CORRUPTS,
            scope=scope,
            what=f"{some(names)}, e.g. {found[names[0]]}",
            remedy="calibrate again: these experts saw no token, or only zeros",
        )
    pairs: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in found.items():
        module, _, suffix = name.rpartition(".")
        expert, _, projection = module.rpartition(".")
        if suffix in SHARED and projection in {"w1", "w3"}:
            pairs[f"{expert}.w1.{suffix}"][projection] = value
    split = [key for key, row in pairs.items() if len(set(row.values())) > 1]
    for scope, names in by_scope(split):
        worst = max(_ratio(pairs[key].values()) for key in names)
        yield Finding(
            gate="w1/w3",
            title="w1 and w3 of an expert have different global scales",
            effect=Effect.CORRUPTS,
            scope=scope,
            what=f"{len(names)} of {len(pairs)} experts, e.g. {names[0]}; up to x {worst:.3g}. "
            "vLLM keeps w1's for both, with a warning",
            remedy="quantize gate and up projection of an expert with one global scale",
        )


def _ratio(values: Iterable[float]) -> float:
    """The largest over the smallest; infinite or no number where one of them is zero or none."""
    low, high = min(values := list(values)), max(values)
    return high / low if low else math.inf


def read_scalars(profile: Profile) -> dict[str, float]:
    """The values of all single FP32 scales, reading those bytes and small gaps between them.

    Raises:
        CheckpointUnreadableError: a file is shorter than its header says.
        HubUnreachableError: the hub stopped answering.
    """
    wanted = [
        entry
        for name, entry in profile.tensors.items()
        if name.rpartition(".")[2] in SINGLE and entry.dtype == "F32" and entry.size == FLOAT
    ]
    found: dict[str, float] = {}
    for run in _runs(wanted):
        begin, end = run[0].begin, run[-1].end
        data = profile.checkpoint.source.read(run[0].shard, begin, end)
        for entry in run:
            (value,) = struct.unpack_from("<f", data, entry.begin - begin)
            found[plain_name(entry.name)] = value
    return found


FLOAT = 4


def _runs(entries: Iterable[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """Neighbours of one shard, to be read together."""
    run: list[StoredTensor] = []
    for entry in sorted(entries, key=lambda item: (item.shard, item.begin)):
        if run and (entry.shard != run[-1].shard or entry.begin - run[-1].end > GAP):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def formats(profile: Profile) -> Iterator[Finding]:
    """Weights whose dtype and scales make no format."""
    unknown = (m for m, kind in profile.formats.items() if kind is Format.UNKNOWN)
    for scope, names in by_scope(unknown):
        yield Finding(
            gate="formats",
            title="weights in no known format",
            effect=Effect.CORRUPTS,
            scope=scope,
            what=f"{some(names)}; known: {', '.join(kind for kind in PIECES)}",
        )
    kinds: dict[str, Counter[Format]] = defaultdict(Counter)
    for tensor in (*profile.main.values(), *profile.draft.values()):
        module = tensor.name.removesuffix(".weight")
        layer, experts, _ = module.partition(".ffn.experts.")
        if experts and module in profile.formats:
            kinds[layer][profile.formats[module]] += 1
    for scope, layers in by_scope(layer for layer, counted in kinds.items() if len(counted) > 1):
        counted = kinds[layers[0]]
        yield Finding(
            gate="formats",
            title="experts of a layer in more than one format",
            effect=Effect.REFUSES,
            scope=scope,
            what=f"{len(layers)} layers, e.g. {layers[0]}: "
            + ", ".join(f"{count} {kind}" for kind, count in counted.most_common()),
            remedy="vLLM has one parameter for all experts of a layer",
        )


def _weights(profile: Profile) -> Iterator[TensorSpec]:
    for tensor in (*profile.main.values(), *profile.draft.values()):
        if tensor.name.endswith(".weight") and len(tensor.shape) == MATRIX:
            yield tensor


MATRIX = 2


GATES = (shapes, block_scale_names, values, formats)
