"""Gates about what the groups of a quantization_config say, and what a vLLM makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, some
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.gates_config import ARGUMENTS
from vllm_forge.checkpoints.inspect.matching import read_groups
from vllm_forge.checkpoints.inspect.parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile

# Orders that permute at run time (compressed_tensors/quantization/quant_args.py).
ORDERED = {"group", "dynamic"}


def scale_fmt(profile: Profile) -> Iterator[Finding]:
    """G07: a key that only DeepSeek's own configs have."""
    if profile.quantization and "scale_fmt" not in profile.quantization:
        yield Finding(
            gate="G07",
            title="quantization_config has no scale_fmt",
            effect=Effect.REFUSES,
            what="vLLM before 0.23.0 reads it: KeyError",
            remedy='set "scale_fmt": "ue8m0"',
            handled_by="vllm-project/vllm#43288",
            before="0.23.0",
        )


def activations(profile: Profile) -> Iterator[Finding]:
    """G12: an FP8 block group for weights alone."""
    for group in read_groups(profile.quantization):
        fp8 = all(group.weights.get(k) == v for k, v in ARGUMENTS[Format.FP8_BLOCK].items())
        if fp8 and group.inputs is None:
            yield Finding(
                gate="G12",
                title="an FP8 block group without input_activations",
                effect=Effect.REFUSES,
                what=f"{group.name}: is_static_input_scheme becomes None, and an assert stops it",
                remedy="state the activations: FP8, dynamic, groups of 128",
                handled_by="vllm-project/vllm#43248",
            )


def actorder(profile: Profile) -> Iterator[Finding]:
    """G57: GPTQ's order of activations."""
    for group in read_groups(profile.quantization):
        order = group.weights.get("actorder")
        if order in ORDERED and not any(n.endswith("weight_g_idx") for n in profile.names):
            yield Finding(
                gate="G57",
                title=f"actorder is {order!r} without weight_g_idx",
                effect=Effect.CORRUPTS,
                what=f"{group.name}: weights are read in an order that is not stored",
                remedy='drop "actorder", or store the order',
            )
        elif order is not None and group.weights.get("type") == "int":
            yield Finding(
                gate="G57",
                title=f"actorder is {order!r}",
                effect=Effect.CORRUPTS,
                what=f"{group.name}: with tensor parallelism every rank keeps all scales of w2 "
                "and reads those of other groups",
                remedy='drop "actorder": a format without weight_g_idx has its groups in order',
                handled_by="vllm-project/vllm#41161",
            )


def nvfp4_backend(profile: Profile) -> Iterator[Finding]:
    """G58: what NVFP4 experts ask of a vLLM, and what their group asks of them."""
    scaled = any(
        group.inputs is not None
        and all(group.weights.get(k) == v for k, v in ARGUMENTS[Format.NVFP4].items())
        for group in read_groups(profile.quantization)
    )
    if scaled and (absent := _without_input_scale(profile)):
        yield Finding(
            gate="G58",
            title="NVFP4 modules without the scale of their input",
            effect=Effect.CORRUPTS,
            what=f"the group quantizes activations, but there is no input_global_scale of "
            f"{some(absent)}",
            remedy="calibrate the activations, or leave input_activations out of the group",
        )
    if profile.has(Part.EXPERTS, Format.NVFP4):
        yield Finding(
            gate="G58",
            title="NVFP4 experts with a scale per expert",
            effect=Effect.REFUSES,
            what="KeyError w13_input_scale before vLLM 0.22.0; on every later one with "
            "--moe-backend deep_gemm_mega_moe, whose experts have no such parameter",
            remedy="leave --moe-backend to vLLM",
            handled_by="vllm-project/vllm#42209",
            before="0.22.0",
        )


def _without_input_scale(profile: Profile) -> list[str]:
    return [
        f"{module}.weight_packed"
        for module, kind in profile.formats.items()
        if kind is Format.NVFP4 and "input_global_scale" not in profile.modules[module]
    ]


def output_projection(profile: Profile) -> Iterator[Finding]:
    """A draft block in BF16 has a wo_a without scales."""
    if profile.formats.get("mtp.0.attn.wo_a") is Format.PLAIN:
        yield Finding(
            gate="wo_a",
            title="wo_a of the draft layer is BF16",
            effect=Effect.REFUSES,
            scope=Scope.DRAFT,
            what="the output projection of vLLM before 0.30.0 knows FP8 alone",
            handled_by="vllm-project/vllm#43319 (5acabf31)",
            before="0.30.0",
        )


GATES = (scale_fmt, activations, actorder, nvfp4_backend, output_projection)
