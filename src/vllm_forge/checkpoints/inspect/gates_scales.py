"""Gates about scales: which are there, their names, shapes, and the values of the single ones."""

from __future__ import annotations

import math
import struct
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, some
from vllm_forge.checkpoints.inspect.formats import PIECES, Format, stored_as
from vllm_forge.checkpoints.inspect.parts import DRAFT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vllm_forge.checkpoints.inspect.header import Entry
    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.checkpoints.inventory import Expected

SINGLE = ("weight_global_scale", "input_global_scale", "weight_scale_2", "input_scale")
GAP = 1 << 16  # bytes between two scalars that are read in one go rather than in two
SHARED = ("weight_global_scale", "weight_scale_2")


def shapes(profile: Profile) -> Iterator[Finding]:
    """Every scale that its format has, under its name, in its dtype and shape; G08, G09."""
    absent: list[str] = []
    renamed: list[str] = []
    lists: list[str] = []
    wrong: list[str] = []
    for tensor in _weights(profile):
        module = tensor.name.removesuffix(".weight")
        kind = profile.formats.get(module, Format.UNKNOWN)
        if kind in (Format.UNKNOWN, Format.PLAIN):
            continue
        for want in stored_as(tensor, kind):
            entry = profile.tensors.get(want.name)
            if entry is None:
                inverse = want.name.replace(".weight_scale", ".weight_scale_inv")
                if inverse != want.name and inverse in profile.tensors:
                    renamed.append(inverse)
                elif not want.optional:
                    absent.append(want.name)
            elif want.shape == () and entry.shape == (1,):
                lists.append(want.name)
            elif entry.shape != want.shape or entry.dtype not in want.dtypes:
                wrong.append(f"{want.name} {entry.dtype} {list(entry.shape)}")
    if renamed:
        yield Finding(
            gate="G09",
            title="block scales are named weight_scale_inv",
            effect=Effect.REFUSES,
            what=f"{some(renamed)}; a compressed-tensors group registers weight_scale",
            remedy="name them weight_scale",
        )
    if lists:
        yield Finding(
            gate="G08",
            title="global scales are lists of one element",
            effect=Effect.NOTES,
            what=f"shape (1,) instead of (): {some(lists)}; the loaders of all lines take both",
            remedy="squeeze them, for loaders that do not",
            handled_by="vllm-project/vllm#43297",
        )
    if absent:
        yield Finding(
            gate="scales",
            title="scales are missing",
            effect=Effect.CORRUPTS,
            what=some(absent),
            remedy="quantize these modules again: without its scale a weight means nothing",
        )
    if wrong:
        yield Finding(
            gate="scales",
            title="scales or packed weights of the wrong dtype or shape",
            effect=Effect.REFUSES,
            what=f"{len(wrong)}, e.g. {wrong[0]}",
        )


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
    if bad := [name for name, value in found.items() if not (math.isfinite(value) and value > 0)]:
        yield Finding(
            gate="scales",
            title="global scales that are no positive numbers",
            effect=Effect.CORRUPTS,
            what=f"{some(bad)}, e.g. {found[bad[0]]}",
            remedy="calibrate again: these experts saw no token, or only zeros",
        )
    pairs: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in found.items():
        module, _, suffix = name.rpartition(".")
        expert, _, projection = module.rpartition(".")
        if suffix in SHARED and projection in {"w1", "w3"}:
            pairs[f"{expert}.w1.{suffix}"][projection] = value
    split = [key for key, row in pairs.items() if len(set(row.values())) > 1]
    if split:
        worst = max(max(pairs[key].values()) / min(pairs[key].values()) for key in split)
        yield Finding(
            gate="w1/w3",
            title="w1 and w3 of an expert have different global scales",
            effect=Effect.CORRUPTS,
            what=f"{len(split)} of {len(pairs)} experts, e.g. {split[0]}; up to x {worst:.3g}. "
            "vLLM keeps w1's for both, with a warning",
            remedy="quantize gate and up projection of an expert with one global scale",
        )


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
        data = profile.seen.place.read(run[0].shard, begin, end)
        for entry in run:
            (value,) = struct.unpack_from("<f", data, entry.begin - begin)
            found[entry.name.removeprefix("model.")] = value
    return found


FLOAT = 4


def _runs(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Neighbours of one shard, to be read together."""
    run: list[Entry] = []
    for entry in sorted(entries, key=lambda item: (item.shard, item.begin)):
        if run and (entry.shard != run[-1].shard or entry.begin - run[-1].end > GAP):
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def formats(profile: Profile) -> Iterator[Finding]:
    """Weights whose dtype and scales make no format."""
    if unknown := [m for m, kind in profile.formats.items() if kind is Format.UNKNOWN]:
        yield Finding(
            gate="formats",
            title="weights in no known format",
            effect=Effect.CORRUPTS,
            scope=_scope(unknown),
            what=f"{some(unknown)}; known: {', '.join(kind for kind in PIECES)}",
        )
    for draft in (False, True):
        kinds: dict[str, Counter[Format]] = defaultdict(Counter)
        for tensor in profile.draft.values() if draft else profile.main.values():
            module = tensor.name.removesuffix(".weight")
            if module in profile.formats and ".ffn.experts." in module:
                kinds["experts"][profile.formats[module]] += 1
        yield from _mixed(kinds, draft=draft)


def _mixed(kinds: Mapping[str, Counter[Format]], *, draft: bool) -> Iterator[Finding]:
    for part, counted in kinds.items():
        if len(counted) > 1:
            yield Finding(
                gate="formats",
                title=f"{part} in more than one format",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT if draft else Scope.TARGET,
                what=", ".join(f"{count} {kind}" for kind, count in counted.most_common()),
                remedy="vLLM has one parameter for all experts of a layer",
            )


def _weights(profile: Profile) -> Iterator[Expected]:
    for tensor in (*profile.main.values(), *profile.draft.values()):
        if tensor.name.endswith(".weight") and len(tensor.shape) == MATRIX:
            yield tensor


MATRIX = 2


def _scope(names: Iterable[str]) -> Scope:
    return Scope.DRAFT if all(name.startswith(DRAFT) for name in names) else Scope.TARGET


GATES = (shapes, block_scale_names, values, formats)
