"""Gates about what the groups of a quantization_config say, and what a vLLM makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from packaging.version import Version

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, some
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.gates_config import ARGUMENTS, ignore_rules
from vllm_forge.checkpoints.inspect.matching import Group, is_rule, read_groups, resolve
from vllm_forge.checkpoints.inspect.parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile

# Orders that permute at run time (compressed_tensors/quantization/quant_args.py).
ORDERED = {"group", "dynamic"}
ACTIVATIONS = "state the activations: FP8, dynamic, groups of 128"


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
    """G12: an FP8 block group for weights alone, and what comes of the modules in it.

    Their kernel is none of those for block FP8 but one that dequantizes. 0.22.1 has Marlin alone
    for that, which refuses compute capability 8.9 and above (kernels/linear/__init__.py:321,
    scaled_mm/marlin.py:46); 0.26.0 and 0.33.0 have Humming too (:379, :522), and the releases
    between were not looked at.
    """
    groups = [group for group in read_groups(profile.quantization) if _weights_only(group)]
    for group in groups:
        yield Finding(
            gate="G12",
            title="an FP8 block group without input_activations",
            effect=Effect.REFUSES,
            what=f"{group.name}: is_static_input_scheme becomes None, and an assert stops it",
            remedy=ACTIVATIONS,
            handled_by="vllm-project/vllm#43248",
        )
        yield Finding(
            gate="G12",
            title="no kernel for FP8 blocks without activations",
            effect=Effect.REFUSES,
            what=f"{group.name}: Marlin, the only one that vLLM has for it, does not take compute "
            "capability 8.9 and above",
            remedy=ACTIVATIONS,
            before="0.26.0",
        )
    if groups:
        yield from _repacked_wo_a(profile)


def _weights_only(group: Group) -> bool:
    fp8 = all(group.weights.get(k) == v for k, v in ARGUMENTS[Format.FP8_BLOCK].items())
    return fp8 and group.inputs is None


def _repacked_wo_a(profile: Profile) -> Iterator[Finding]:
    """G12: wo_a in such a group. Its kernel repacks the weight, and no kernel multiplies it.

    The output projection never calls the layer: it takes ``wo_a.weight`` out of it, on every GPU
    (models/deepseek_v4/attention.py:329 in 0.22.1, nvidia/ops/o_proj.py:63 in 0.26.0 and :61 in
    0.33.0; FlashMLA's and FlashInfer's attention all end there). Humming and Marlin have left int32
    words of two dimensions in it, where DeepGEMM's fp8_einsum wants FP8 codes of three. Since
    0.30.0 what is not FP8 is taken for BF16 there, so torch.bmm gets them instead.
    tests/patches/test_repacked_wo_a.py has this of each line.
    """
    groups, ignore = read_groups(profile.quantization), ignore_rules(profile)
    if not all(is_rule(rule) for rule in (*ignore, *(t for g in groups for t in g.targets))):
        return  # told by gates_config.rules
    blocks = {layer: f"layers.{layer}" for layer in range(profile.layers)}
    drafts = {layer: f"mtp.{layer - profile.layers}" for layer in profile.draft_layers}
    for scope, rows in ((Scope.TARGET, blocks), (Scope.DRAFT, drafts)):
        names = []
        for layer, stored in rows.items():
            group = resolve(groups, ignore, f"model.layers.{layer}.attn.wo_a", Version("0"))
            kind = profile.formats.get(f"{stored}.attn.wo_a")
            if kind is Format.FP8_BLOCK and group is not None and _weights_only(group):
                names.append(f"{stored}.attn.wo_a.weight")
        if names:
            yield Finding(
                gate="G12",
                title="wo_a is repacked for a kernel that the output projection does not use",
                effect=Effect.REFUSES,
                scope=scope,
                what=f"its group has no input_activations, so that a weight-only kernel repacks it "
                "to int32 after loading; the first forward pass hands that to DeepGEMM's "
                f"fp8_einsum, since 0.30.0 to torch.bmm, and stops: {some(names)}",
                remedy=f"for wo_a's group: {ACTIVATIONS}",
                in_forward=True,
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
