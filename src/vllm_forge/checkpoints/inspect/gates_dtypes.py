"""Gates about precision: what was rounded on the way, and what a loader wants unquantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, by_scope, some
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.parts import (
    DRAFT,
    LINEAR,
    Drafter,
    Part,
    alias_tensors,
    part_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_forge.checkpoints.inspect.profile import Profile
    from vllm_forge.checkpoints.tensors import StoredTensor

FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
INTEGERS = {"I64", "I32"}


def downcasts(profile: Profile) -> Iterator[Finding]:
    """G19: BF16 where the model itself has FP32."""
    wanted = {**profile.main, **profile.draft}
    found = [
        name
        for name, tensor in wanted.items()
        if tensor.dtype == "F32"
        and name in profile.tensors
        and profile.tensors[name].dtype in {"BF16", "F16"}
    ]
    if found:
        total = sum(tensor.dtype == "F32" for tensor in wanted.values())
        yield Finding(
            gate="G19",
            title="FP32 tensors were rounded",
            effect=Effect.LOSES,
            what=f"{some(found)}, of {total} that the model has in FP32",
            remedy="take these tensors from the source, byte for byte",
        )


def against_source(profile: Profile, source: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """G19, by the source's own dtypes: unquantized tensors that are narrower than there."""
    found = []
    for name, entry in profile.tensors.items():
        before = source.get(name)
        if before is None or before.shape != entry.shape:
            continue
        if FLOATS.get(before.dtype, 0) > FLOATS.get(entry.dtype, 99):
            found.append(name)
    if found:
        first = found[0]
        yield Finding(
            gate="G19",
            title="tensors are narrower than in the source",
            effect=Effect.LOSES,
            what=f"{some(found)}; there {source[first].dtype}, here {profile.tensors[first].dtype}",
            remedy="take these tensors from the source, byte for byte",
        )


def kept_unquantized(profile: Profile) -> Iterator[Finding]:
    """G23: compressor and indexer projections that vLLM builds without a quantization config."""
    found = []
    for module, kind in profile.formats.items():
        part = part_of(f"{module}.weight")
        inside = part is Part.COMPRESSOR or (part is Part.INDEXER and not module.endswith(".wq_b"))
        if inside and kind is not Format.PLAIN:
            found.append(module)
    for scope, names in by_scope(found):
        yield Finding(
            gate="G23",
            title="compressor or indexer projections are quantized",
            effect=Effect.REFUSES,
            scope=scope,
            what=f"{some(names)}; vLLM builds these modules unquantized",
            remedy="store them as BF16",
        )


def uniform_draft(profile: Profile) -> Iterator[Finding]:
    """A drafter of which one part was quantized and another was not."""
    kinds = {kind for module, kind in profile.formats.items() if module.startswith(DRAFT)}
    foreign = kinds & {Format.NVFP4, Format.W4A16, Format.MODELOPT_NVFP4}
    if foreign and Format.PLAIN in profile.format_of(Part.EXPERTS, draft=True):
        yield Finding(
            gate="G16",
            title="a drafter that is quantized in part",
            effect=Effect.CORRUPTS,
            scope=Scope.DRAFT,
            what=", ".join(sorted(kinds)),
            remedy="pass all of mtp.* through unchanged",
        )


def plain_tensors(profile: Profile) -> Iterator[Finding]:
    """What is stored as it is: its shape as the config says, and numbers of the right kind."""
    draft = profile.draft if profile.drafter is not Drafter.NONE else {}
    aliases = {tensor.name: tensor for tensor in alias_tensors(profile.config)}
    for scope, wanted in ((Scope.TARGET, profile.main), (Scope.DRAFT, {**draft, **aliases})):
        shapes, kinds = [], []
        for name, tensor in wanted.items():
            entry = profile.tensors.get(name)
            module = name.removesuffix(".weight")
            if entry is None or (
                LINEAR.search(name) and profile.formats.get(module) is not Format.PLAIN
            ):
                continue
            if entry.shape != tensor.shape:
                shapes.append(name)
            elif entry.dtype not in (INTEGERS if tensor.dtype == "I64" else FLOATS):
                kinds.append(name)
        if shapes:
            first = shapes[0]
            yield Finding(
                gate="names",
                title="tensors of another shape than config.json says",
                effect=Effect.REFUSES,
                scope=scope,
                what=f"{some(shapes)}; {list(profile.tensors[first].shape)}, not "
                f"{list(wanted[first].shape)}",
                remedy="take config.json and tensors from the same model",
            )
        if kinds:
            first = kinds[0]
            yield Finding(
                gate="formats",
                title="numbers of a kind that means something else",
                effect=Effect.CORRUPTS,
                scope=scope,
                what=f"{some(kinds)}; {profile.tensors[first].dtype}, not {wanted[first].dtype}",
                remedy="take these tensors from the source, byte for byte",
            )


GATES = (downcasts, plain_tensors, kept_unquantized, uniform_draft)
