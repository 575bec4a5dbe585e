"""Decoded weights against the model that they were made from; this one reads tensor data.

Quantized weights must lie within the bounds that numerics derives from the source's weights
alone; unquantized tensors must be the source's bytes. A weight is decoded as vLLM decodes it: with
w1's global scale for w3 as well (compressed_tensors_moe_w4a4_nvfp4.py:193 and modelopt.py:1564 in
0.26.0).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_forge.checkpoints.codecs import fp8_block, grouped, nvfp4
from vllm_forge.checkpoints.codecs.small_floats import e8m0_decode
from vllm_forge.checkpoints.inspect.checks_tensors import MATRIX, stored_fault
from vllm_forge.checkpoints.inspect.findings import Finding, Scope, finding, summarize
from vllm_forge.checkpoints.inspect.profile import (
    ALIASES,
    DRAFT,
    INT4_GROUP,
    PIECES,
    Format,
    Part,
    Profile,
    part_of,
    split,
    stored_as,
)
from vllm_forge.matrix import FrozenModel

FLOATS = {"BF16", "F16", "F32"}
NUMPY = {
    "F32": "<f4", "F16": "<f2", "I32": "<i4", "U8": "u1", "I8": "i1", "F8_E4M3": "u1",
    "F8_E8M0": "u1",
}  # fmt: skip
Weight = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Decoded = tuple[NDArray[np.float64], NDArray[np.float64]]  # values, and bounds of their errors


class ValueRow(FrozenModel):
    part: Part
    draft: bool
    format: Format
    weights: int  # that were compared
    worst: float | None  # largest error over its bound; at most 1. None where bytes are compared
    different: tuple[str, ...]  # names of weights beyond their bound, or with other bytes


def compare(made: Profile, source: Profile, most: int = 0) -> tuple[list[ValueRow], list[Finding]]:
    """Compare a checkpoint with the unquantized one that it was made from.

    ``most``: how many weights of each part and format, spread evenly; 0: all.
    """
    rows, findings = [], []
    for (part, draft, kind), modules in sorted(_grouped(made, source).items()):
        step = max(1, len(modules) // most) if most else 1
        chosen = modules[::step][: most or None]
        if kind is Format.PLAIN:
            different = [name for name in chosen if not _same_bytes(made, source, name)]
            worst = None
        else:
            ratios = {module: _ratio(made, source, module, kind) for module in chosen}
            different = [module for module, ratio in ratios.items() if ratio > 1]
            worst = max(ratios.values())
        row = ValueRow(
            part=part, draft=draft, format=kind,
            weights=len(chosen), worst=worst, different=tuple(different),
        )  # fmt: skip
        rows.append(row)
        if different:
            fault = "other-bytes" if worst is None else "other-weights"
            excess = "" if worst is None else f"; the error is {worst:.3g} times its bound"
            what = f"{summarize(different)}, of {len(chosen)} {part} compared{excess}"
            findings.append(finding(fault, what, scope=Scope.DRAFT if draft else Scope.TARGET))
    return rows, findings


def _grouped(made: Profile, source: Profile) -> dict[tuple[Part, bool, Format], list[str]]:
    """Modules of quantized weights and names of plain tensors, by what they are."""
    grouped: dict[tuple[Part, bool, Format], list[str]] = defaultdict(list)
    for name in sorted(made.tensors):
        module, suffix = split(name)
        kind = made.formats.get(module, Format.PLAIN) if suffix else Format.PLAIN
        weight = name if kind is Format.PLAIN else f"{module}.weight"
        if (
            suffix in ("", "weight", "weight_packed")
            and kind is not Format.UNKNOWN
            and (kind is not Format.W4A16 or made.int4_group == INT4_GROUP)  # no codec of others
            and _source_name(source, weight) in source.tensors
        ):
            key = (part_of(weight), name.startswith(DRAFT), kind)
            grouped[key].append(name if kind is Format.PLAIN else module)
    return grouped


def _source_name(source: Profile, name: str) -> str:
    return name if name in source.tensors else ALIASES.get(name, name)


def _same_bytes(made: Profile, source: Profile, name: str) -> bool:
    ours, theirs = made.tensors[name], source.tensors[_source_name(source, name)]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    return all(here == there for here, there in zip(ours.chunks(), theirs.chunks(), strict=True))


def _ratio(made: Profile, source: Profile, module: str, kind: Format) -> float:
    """The largest error of a decoded weight over its bound; infinite where it cannot be decoded."""
    shared = _shared(module)
    if not all(_whole(made, source, name, kind) for name in shared):
        return math.inf
    weights = [_read(source, f"{name}.weight").astype(np.float32) for name in shared]
    weight = weights[shared.index(module)]
    with np.errstate(all="ignore"):  # a zero, infinite or NaN scale is beyond its bound, below
        values, bound = _decode(made, module, kind, weight, weights)
        error = np.abs(values - weight)
        ratio = np.divide(error, bound, out=np.where(error == 0, 0.0, np.inf), where=bound > 0)
    # An error that is not a number is beyond any bound.
    return float(np.where(np.isnan(ratio), np.inf, ratio).max())


def _shared(module: str) -> list[str]:
    """The modules that have one global scale."""
    stem, _, projection = module.rpartition(".")
    pair = ".ffn.experts." in module and projection in {"w1", "w3"}
    return [f"{stem}.w1", f"{stem}.w3"] if pair else [module]


def _whole(made: Profile, source: Profile, module: str, kind: Format) -> bool:
    """Whether the source has the weight, and the checkpoint all that its format stores of it.

    Groups along K are whole; blocks may be cut at the edge.
    """
    weight = source.tensors.get(f"{module}.weight")
    if weight is None or len(weight.shape) != MATRIX or weight.dtype not in FLOATS:
        return False
    groups = [columns for rows, columns in (piece.block for piece in PIECES[kind]) if rows == 1]
    if 0 in weight.shape or weight.shape[1] % max(groups):
        return False
    faults = {stored_fault(made, required)[0] for required in stored_as(weight, kind)}
    return faults <= {"", "global-scale-shape", "converted"}  # that vLLM takes


def _decode(
    made: Profile, module: str, kind: Format, source: Weight, shared: Sequence[Weight]
) -> Decoded:
    """Values of a weight, and bounds; ``shared``: all source weights with one global scale."""

    def read(leaf: str, of: str = module) -> NDArray[Any]:
        return _read(made, f"{of}.{leaf}")

    def codes(leaf: str) -> NDArray[np.uint8]:
        return read(leaf).view(np.uint8)

    match kind:
        case Format.NVFP4 | Format.MODELOPT_NVFP4:
            # None of the checkpoint's own scales decides what is right.
            expected, first = nvfp4.global_scale_of(*shared), _shared(module)[0]
            if kind is Format.NVFP4:
                divisor = read("weight_global_scale", first).reshape(-1)[0]
            else:  # ModelOpt stores what to multiply with
                divisor = np.float32(1) / read("weight_scale_2", first).reshape(-1)[0]
            packed = codes("weight_packed" if kind is Format.NVFP4 else "weight")
            fp4 = nvfp4.Nvfp4(packed=packed, scales=codes("weight_scale"), global_scale=divisor)
            return fp4.values(), nvfp4.bound(source, expected)
        case Format.MXFP4_NATIVE:
            mxfp4 = grouped.Mxfp4(packed=codes("weight"), scales=codes("scale"))
            return mxfp4.values(), grouped.mxfp4_bound(source)
        case Format.W4A16:
            words, by = read("weight_packed").view(np.int32), read("weight_scale")
            int4 = grouped.Int4(packed=words, scales=by.astype(np.float32))
            return int4.values(), grouped.int4_bound(source)
    native = kind is Format.FP8_NATIVE
    scales = read("scale" if native else "weight_scale")
    if scales.itemsize == 1:
        scales = e8m0_decode(scales.view(np.uint8))
    fp8 = fp8_block.Fp8Block(codes=codes("weight"), scales=scales.astype(np.float32))
    # Native scales are powers of two, rounded up; or FP32, which lie below those.
    return fp8.values(), fp8_block.bound(source, powers_of_two=native)


def _read(profile: Profile, name: str) -> NDArray[np.generic]:
    """A tensor as an array; BF16 as float32, 8-bit floats as their codes."""
    tensor = profile.tensors[name]
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.read(), "<u2").astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32).reshape(tensor.shape)
    return np.frombuffer(tensor.read(), NUMPY[tensor.dtype]).reshape(tensor.shape)
