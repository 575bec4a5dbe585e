"""Gates about how a config says what is quantized: no config, an unknown method, DeepSeek's own."""

from __future__ import annotations

import fnmatch
import json
from typing import TYPE_CHECKING

import numpy as np
from packaging.version import Version

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, by_scope, some
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.gates_config import (
    COMPRESSED,
    EXPERTS,
    STORED,
    ignore_rules,
    over_eras,
)
from vllm_forge.checkpoints.inspect.parts import DRAFT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_forge.checkpoints.inspect.profile import Profile

ARCHITECTURES = ["DeepseekV4ForCausalLM"]
SHOWN = 80  # characters of what is there instead
BLOCK = 128
SIGN_AND_MANTISSA = 0x807FFFFF  # of FP32
NATIVE = {"fp8", "deepseek_v4_fp8"}
IGNORE_READ = Version("0.33.0")


def form(profile: Profile) -> Iterator[Finding]:
    """What a config.json must say for vLLM to build the model at all."""
    served, named = profile.checkpoint.served, profile.config.get("architectures")
    if not named:
        yield Finding(
            gate="config",
            title="config.json names no architecture",
            effect=Effect.REFUSES,
            what="vLLM before 0.33.0 does not find DeepseekV4ForCausalLM without it",
            remedy=f'set "architectures": {json.dumps(ARCHITECTURES)}',
            before="0.33.0",
        )
    elif named != ARCHITECTURES:
        yield Finding(
            gate="config",
            title="another architecture",
            effect=Effect.REFUSES,
            what=f"{str(named)[:SHOWN]!r}, not {ARCHITECTURES}",
            remedy="take config.json from the source model",
        )
    if "compress_ratios" not in served:
        yield Finding(
            gate="config",
            title="config.json has transformers' layer_types alone",
            effect=Effect.REFUSES,
            what="vLLM 0.22.1 reads compress_ratios, 0.26.0 takes no layer types of this model, "
            "0.33.0 derives the one from the other",
            remedy="add compress_ratios and num_hash_layers of the source model's config.json, and "
            "drop layer_types, compress_rates and mlp_layer_types",
            before="0.33.0",
        )


def method(profile: Profile) -> Iterator[Finding]:
    """The method that the config names is one for the formats that are stored."""
    named = profile.quantization.get("quant_method")
    quantized = [
        f"{module}.weight"
        for module, kind in profile.formats.items()
        if kind is not Format.PLAIN and not module.startswith(DRAFT)
    ]
    if not profile.quantization:
        if quantized:
            yield Finding(
                gate="config",
                title="config.json has no quantization_config",
                effect=Effect.REFUSES,
                what=f"vLLM builds everything unquantized; stored quantized: {some(quantized)}",
                remedy="take config.json from where the tensors are from",
            )
    elif named != COMPRESSED and named not in NATIVE:
        yield Finding(
            gate="config",
            title="quant_method is none that is known for this model",
            effect=Effect.REFUSES,
            what=f"{named!r}; known: {', '.join(sorted({COMPRESSED, *NATIVE}))}",
            remedy="take config.json from where the tensors are from",
        )


def native_linears(profile: Profile) -> Iterator[Finding]:
    """DeepSeek's own config means FP8 blocks for every linear layer that is not a router's."""
    if profile.quantization.get("quant_method") not in NATIVE:
        return
    for draft in (False, True):
        blocks = (
            [f"mtp.{n}" for n in range(len(profile.draft_layers))]
            if draft
            else [f"layers.{n}" for n in range(profile.layers)]
        )
        modules = [f"{block}.{name}" for block in blocks for name in STORED.values()]
        wrong = [
            f"{module}.weight"
            for module in modules
            if profile.formats.get(module, Format.FP8_NATIVE) is not Format.FP8_NATIVE
        ]
        if wrong:
            yield Finding(
                gate="G16" if draft else "config",
                title="linear layers that are not in FP8 as the config says",
                effect=Effect.REFUSES,
                scope=Scope.DRAFT if draft else Scope.TARGET,
                what=some(wrong),
                remedy="store codes and E8M0 scales of 128 x 128 blocks, named weight and scale",
            )


def native_experts(profile: Profile) -> Iterator[Finding]:
    """G16: DeepSeek's own config says one format for the experts of all layers.

    ``moe_quant_algo`` NVFP4 means every layer's, the draft's too, until vLLM reads in ``ignore``
    which are left in MXFP4 (models/deepseek_v41/quant_config.py `_is_nvfp4_expert_layer`: in
    0.33.0, not in 0.26.0; the releases between were not looked at). MXFP4 fits into half of NVFP4's
    parameters, so vLLM says nothing (docs/generated/verdicts.md, nvidia-modelopt).
    """
    if profile.quantization.get("quant_method") not in NATIVE or not profile.formats:
        return
    seen: list[tuple[Version, Version | None, dict[str, list[str]]]] = []
    for since, before in ((Version("0"), IGNORE_READ), (IGNORE_READ, None)):
        wrong: dict[str, list[str]] = {}
        for layer in (*range(profile.layers), *profile.draft_layers):
            draft = layer >= profile.layers
            local = f"mtp.{layer - profile.layers}" if draft else f"layers.{layer}"
            kind = profile.formats.get(f"{local}.{EXPERTS}.0.w1")
            ignored = since >= IGNORE_READ and any(
                fnmatch.fnmatchcase(f"{local}.{EXPERTS}", rule) for rule in ignore_rules(profile)
            )
            if kind not in (None, _native_format(profile, ignored=ignored)):
                wrong.setdefault("G16 experts" if draft else "scheme", []).append(
                    f"{local}.{EXPERTS}"
                )
        seen.append((since, before, wrong))
    yield from over_eras(seen, Effect.CORRUPTS)


def native_scales(profile: Profile) -> Iterator[Finding]:
    """FP32 block scales where vLLM keeps E8M0: what is no power of two is rounded to one.

    Beside MXFP4 experts the linear layers' scales are E8M0, beside FP8 experts FP32
    (0.33.0, models/deepseek_v4/quant_config.py, `is_scale_e8m0`).

    Raises:
        CheckpointUnreadableError: a file is shorter than its header says.
        HubUnreachableError: the hub stopped answering.
    """
    if (
        profile.quantization.get("quant_method") not in NATIVE
        or profile.config.get("expert_dtype", "fp4") != "fp4"
    ):
        return
    rounded = []
    for module, kind in profile.formats.items():
        entry = profile.tensors.get(f"{module}.scale")
        if kind is not Format.FP8_NATIVE or entry is None or entry.dtype != "F32":
            continue
        blocks = tuple(-(-size // BLOCK) for size in profile.tensors[f"{module}.weight"].shape)
        if entry.shape != blocks:
            continue  # told by gates_scales.shapes
        if (np.frombuffer(entry.read(), "<u4") & SIGN_AND_MANTISSA).any():
            rounded.append(f"{module}.scale")
    for scope, names in by_scope(rounded):
        yield Finding(
            gate="scales",
            title="block scales that are no powers of two",
            effect=Effect.CORRUPTS,
            scope=scope,
            what=f"{some(names)}; vLLM keeps scales as E8M0 beside MXFP4 experts, and rounds these",
            remedy="quantize with E8M0 scales, or state expert_dtype fp8 if the experts are FP8",
        )


def _native_format(profile: Profile, *, ignored: bool) -> Format:
    if profile.config.get("expert_dtype", "fp4") != "fp4":
        return Format.FP8_NATIVE
    algorithm = str(profile.quantization.get("moe_quant_algo") or "").upper()
    return Format.MODELOPT_NVFP4 if algorithm == "NVFP4" and not ignored else Format.MXFP4_NATIVE


GATES = (form, method, native_linears, native_experts, native_scales)
