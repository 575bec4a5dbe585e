"""Checks of config.json: the model and method that it names, its groups, and what its rules match.

Rules are compared with how the weights are stored, for every vLLM of a line.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from packaging.version import Version

from vllm_forge.checkpoints.architecture import FUSION_KNOWN, Group, Rules, compiled
from vllm_forge.checkpoints.inspect import matching
from vllm_forge.checkpoints.inspect.findings import Effect, Finding, finding, scoped, summarize
from vllm_forge.checkpoints.inspect.matching import PROBES_CHANGED
from vllm_forge.checkpoints.inspect.profile import DRAFT, Format, Profile

# From a vLLM on: faults (rows of checks.toml), each with a module.
Faults = Callable[[Version], Iterator[tuple[str, str]]]

HALF = ("float16", "half")
ARCHITECTURES = ["DeepseekV4ForCausalLM"]
SHOWN = 80  # characters of what is there instead
# Beside the keys of architecture.Config: without one, 0.26.0 ends in an AttributeError or KeyError.
WITHOUT_DEFAULT = (
    "compress_rope_theta", "hc_eps", "hc_sinkhorn_iters", "hidden_act", "index_topk",
    "norm_topk_prob", "qk_rope_head_dim", "rms_norm_eps", "sliding_window", "swiglu_limit",
    "topk_method",
)  # fmt: skip
COMPRESSED = "compressed-tensors"
NATIVE = {"fp8", "deepseek_v4_fp8"}
BLOCK = 128
SIGN_AND_MANTISSA, INFINITY = 0x807FFFFF, 0x7F800000  # of FP32
FIRST = Version("0")
IGNORE_READ = Version("0.33.0")
# From each of these on, vLLM matches a config in another way; see matching.py.
ERAS = (FIRST, FUSION_KNOWN, PROBES_CHANGED)
# What a group must say for weights that are stored so.
ARGUMENTS: dict[Format, dict[str, Any]] = {
    Format.FP8_BLOCK: {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK],
    },
    Format.NVFP4: {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    Format.W4A16: {"num_bits": 4, "type": "int", "strategy": "group"},
}  # fmt: skip
# What its format must be, its own or else the config's (compressed_tensors.py,
# `_get_scheme_from_parts`, and compressed_tensors_moe.py); NVFP4 is not asked.
WRITTEN = {
    Format.FP8_BLOCK: {
        "float-quantized", "int-quantized", "naive-quantized", "nvfp4-pack-quantized",
    },
    Format.W4A16: {"pack-quantized"},
}  # fmt: skip
# What DeepSeek's own config must say for FP8 blocks (fp8.py, `from_config`).
NATIVE_ARGUMENTS = {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
PACKED = {Format.NVFP4, Format.MODELOPT_NVFP4, Format.W4A16, Format.MXFP4_NATIVE}
# Orders that permute at run time (compressed_tensors/quantization/quant_args.py).
ORDERED = {"group", "dynamic"}
# Literal entries that people write for what is never quantized.
HARMLESS = {"lm_head", "head", "embed", "embed_tokens", "model.embed_tokens"}
# vLLM's linear module -> the stored module whose format it has.
STORED = {
    "attn.fused_wqa_wkv": "attn.wq_a",
    "attn.wq_b": "attn.wq_b",
    "attn.wo_a": "attn.wo_a",
    "attn.wo_b": "attn.wo_b",
    "attn.indexer.wq_b": "attn.indexer.wq_b",
    "ffn.shared_experts.gate_up_proj": "ffn.shared_experts.w1",
    "ffn.shared_experts.down_proj": "ffn.shared_experts.w2",
    "e_proj": "e_proj",
    "h_proj": "h_proj",
}
EXPERTS = "ffn.experts"


def form(profile: Profile) -> Iterator[Finding]:
    """A config.json from which vLLM builds the model at all."""
    named = profile.model.get("architectures")
    if not named:
        yield finding("no-architecture")
    elif named != ARCHITECTURES:
        yield finding("other-architecture", str(named)[:SHOWN], ARCHITECTURES)
    # transformers reads both keys, the newer one first.
    if (dtype := profile.model.get("dtype") or profile.model.get("torch_dtype")) in HALF:
        yield finding("half", dtype)
    if "compress_ratios" not in profile.served:
        yield finding("layer-types")
    if lacking := [key for key in WITHOUT_DEFAULT if key not in profile.served]:
        yield finding("missing-keys", ", ".join(lacking))


def method(profile: Profile) -> Iterator[Finding]:
    """A quant_method that reads the formats that are stored."""
    named = profile.quantization.get("quant_method")
    quantized = [
        f"{module}.weight"
        for module, kind in profile.formats.items()
        if kind is not Format.PLAIN and not module.startswith(DRAFT)
    ]
    if not profile.quantization:
        if quantized:
            yield finding("no-quantization-config", summarize(quantized))
        return
    if named != COMPRESSED and named not in NATIVE:
        yield finding("unknown-method", named, ", ".join(sorted({COMPRESSED, *NATIVE})))
    if "scale_fmt" not in profile.quantization:
        yield finding("no-scale-fmt")
    sparsity = profile.quantization.get("sparsity_config")
    if named == COMPRESSED and isinstance(sparsity, dict) and sparsity.get("targets"):
        yield finding("sparsity")
    if named == COMPRESSED and profile.quantization.get("ignore", ()) is None:
        yield finding("null-ignore")


def native(profile: Profile) -> Iterator[Finding]:
    """DeepSeek's own config means FP8 blocks for every linear layer that is not a router's.

    And one format for all experts, the draft's too, until vLLM reads in ``ignore`` which are left
    in MXFP4 (0.33.0, models/deepseek_v41/quant_config.py `_is_nvfp4_expert_layer`), which fits into
    half of NVFP4's parameters, so that 0.26.0 says nothing.
    """
    if profile.quantization.get("quant_method") not in NATIVE:
        return
    for key, value in NATIVE_ARGUMENTS.items():
        if (stated := profile.quantization.get(key)) != value:
            yield finding("native-arguments", key, str(stated)[:SHOWN], value)
    yield from _native_linears(profile)
    wildcards = [compiled(rule) for rule in profile.ignore if matching.is_pattern(rule)]
    fp4 = profile.model.get("expert_dtype", "fp4") == "fp4"
    nvfp4 = str(profile.quantization.get("moe_quant_algo") or "").upper() == "NVFP4"

    def faults(since: Version) -> Iterator[tuple[str, str]]:
        for block in profile.blocks.values():
            name = f"{block}.{EXPERTS}"
            kind = profile.formats.get(f"{name}.0.w1")
            ignored = since >= IGNORE_READ and (
                name in profile.ignored.literal
                or any(pattern and pattern.match(name) for pattern in wildcards)
            )
            expected = Format.MODELOPT_NVFP4 if nvfp4 and not ignored else Format.MXFP4_NATIVE
            if kind not in (None, expected if fp4 else Format.FP8_NATIVE):
                yield "draft-experts" if name.startswith(DRAFT) else "other-arguments", name

    yield from _over_eras((FIRST, IGNORE_READ), faults, Effect.CORRUPTS)
    if fp4:
        yield from _native_scales(profile)


def _native_linears(profile: Profile) -> Iterator[Finding]:
    """FP8 for each linear layer, but for those that the config excepts by their whole names.

    vLLM 0.33.0, layers/quantization/fp8.py:162 and utils/quant_utils.py `is_layer_skipped`; names
    of the drafter's layers were not looked at.
    """
    stated = profile.quantization.get("ignored_layers")
    stated = stated or profile.quantization.get("modules_to_not_convert")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    excepted = Rules(f"model.{name.removeprefix('model.')}" for name in names)
    stored = [
        (f"model.{block}.{module}", f"{block}.{part}", kind)
        for block in profile.blocks.values()
        for module, part in STORED.items()
        if (kind := profile.formats.get(f"{block}.{part}")) is not None
    ]
    drafts = [n for _, n, kind in stored if n.startswith(DRAFT) and kind is not Format.FP8_NATIVE]
    names = [f"{name}.weight" for name in drafts]
    yield from scoped("not-native", names, check="draft-format")

    def faults(since: Version) -> Iterator[tuple[str, str]]:
        for module, name, kind in stored:
            plain = excepted.means(module, since)
            if plain != (kind is not Format.FP8_NATIVE) and not name.startswith(DRAFT):
                yield "broad-ignore" if plain else "not-native", name

    yield from _over_eras((FIRST, FUSION_KNOWN), faults, Effect.REFUSES)


def _native_scales(profile: Profile) -> Iterator[Finding]:
    """FP32 block scales where vLLM keeps E8M0: it rounds what is not a power of two to one.

    Beside MXFP4 experts the linear layers' scales are E8M0, beside FP8 experts FP32
    (0.33.0, models/deepseek_v4/quant_config.py, `is_scale_e8m0`).
    """
    import numpy as np  # noqa: PLC0415 - `plan` imports this module for manifests alone

    rounded = []
    for module, kind in profile.formats.items():
        scale = profile.tensors.get(f"{module}.scale")
        if kind is not Format.FP8_NATIVE or scale is None or scale.dtype != "F32":
            continue
        blocks = tuple(-(-size // BLOCK) for size in profile.tensors[f"{module}.weight"].shape)
        # Another shape is reported by checks_tensors.shapes.
        if scale.shape == blocks and any(
            (words & SIGN_AND_MANTISSA).any() or (words == INFINITY).any()
            for words in (np.frombuffer(chunk, "<u4") for chunk in scale.chunks())
        ):
            rounded.append(f"{module}.scale")
    yield from scoped("not-powers-of-two", rounded)


def activations(profile: Profile) -> Iterator[Finding]:
    """No FP8 block group for weights alone, and what comes of the modules in it.

    0.22.1 has Marlin alone for them, which refuses compute capability 8.9 and above
    (kernels/linear/__init__.py:321, scaled_mm/marlin.py:46); 0.26.0 has Humming too (:379).
    """
    for name, group in profile.groups.items():
        if _weights_only(group):
            yield finding("no-activations", name)
            yield finding("no-kernel", name)
    yield from _repacked_wo_a(profile)


def is_of(group: Group, kind: Format) -> bool:
    """Whether a group says of its weights what a format needs."""
    return group.weights.has(ARGUMENTS[kind]) and not group.weights.dynamic


def _fits(group: Group, kind: Format) -> bool:
    """Whether vLLM takes a group for weights that are stored so."""
    inputs = group.input_activations
    if inputs is not None and not {
        Format.FP8_BLOCK: bool(inputs.dynamic),  # static scales are not stored beside blocks
        Format.NVFP4: inputs.has(ARGUMENTS[Format.NVFP4]),
    }.get(kind, False):
        return False
    return is_of(group, kind) and group.format in WRITTEN.get(kind, (group.format,))


def _weights_only(group: Group) -> bool:
    return is_of(group, Format.FP8_BLOCK) and group.input_activations is None


def _repacked_wo_a(profile: Profile) -> Iterator[Finding]:
    """A wo_a in such a group, or in 4 bits: the output projection cannot multiply its words.

    It never calls the layer, but takes the weight out of it; docs/develop/checkpoints.md says where
    in each release, and tests/patches/test_repacked_wo_a.py has it of each line.
    """
    if profile.malformed is not None:
        return  # `rules` reports it
    modules, packed = [], []
    for layer, block in profile.blocks.items():
        name = f"model.layers.{layer}.attn.wo_a"
        group = matching.resolve(profile.groups, profile.ignored, name, FIRST)
        kind = profile.formats.get(f"{block}.attn.wo_a")
        if kind is Format.FP8_BLOCK and group is not None and _weights_only(group):
            modules.append(f"{block}.attn.wo_a.weight")
        elif kind in PACKED:
            packed.append(f"{block}.attn.wo_a.weight")
    yield from scoped("repacked-wo_a", modules)
    yield from scoped("packed-wo_a", packed)


def actorder(profile: Profile) -> Iterator[Finding]:
    """Orders of activations, as GPTQ has them."""
    for name, group in profile.groups.items():
        order = group.weights.actorder
        if order in ORDERED and not any(n.endswith("weight_g_idx") for n in profile.names):
            yield finding("order-not-stored", name, order)
        elif order is not None and group.weights.type == "int":
            yield finding("actorder", name, order)


def weights_only_experts(profile: Profile) -> bool:
    """Whether NVFP4 weights run with unquantized activations (NVFP4A16)."""
    groups = [group for group in profile.groups.values() if is_of(group, Format.NVFP4)]
    return bool(groups) and all(group.input_activations is None for group in groups)


def nvfp4_scales(profile: Profile) -> Iterator[Finding]:
    """What NVFP4 experts ask of a vLLM, and what their group asks of them."""
    absent = [
        f"{module}.weight_packed"
        for module, kind in profile.formats.items()
        if kind is Format.NVFP4 and "input_global_scale" not in profile.modules[module]
    ]
    groups = [group for group in profile.groups.values() if is_of(group, Format.NVFP4)]
    if absent and any(group.input_activations is not None for group in groups):
        yield finding("no-input-scales", summarize(absent))
    scales = (name for name in profile.names if name.endswith(".input_global_scale"))
    if next(scales, None) is not None:
        yield finding("scale-per-expert")
    if profile.formats.get("mtp.0.attn.wo_a") is Format.PLAIN:  # of a draft block in BF16
        yield finding("bf16-wo_a")


def rules(profile: Profile) -> Iterator[Finding]:
    """No rules that are malformed, or that match no module at all."""
    if not profile.groups:
        return
    if profile.malformed is not None:
        yield finding("malformed-rule", profile.malformed)
        return
    known = matching.asked_names(profile.model, profile.blocks)
    stored = (*profile.modules, *(f"model.{module}" for module in profile.modules))
    # In this order: patterns that match a known name were not tried on the others, see matching.
    names = dict.fromkeys((*known, *stored, "Linear"))
    for name, group in profile.groups.items():
        literal = group.rules.literal
        idle = [
            target
            for target in dict.fromkeys(group.targets)
            if target not in names
            and (target in literal or not any(map(Rules([target]).match, names)))
        ]
        if idle:
            more = f" and {len(idle) - 1} more" if idle[1:] else ""
            yield finding("targets-none", f"{name}: {idle[0]}{more}")
    if stale := sorted(profile.ignored.literal - HARMLESS - {*known}):
        yield finding("stale-ignore", len(stale), stale[0])


def resolution(profile: Profile) -> Iterator[Finding]:
    """What each module gets fits how it is stored, for every vLLM."""
    if profile.quantization.get("quant_method") != COMPRESSED or not profile.formats:
        return
    if profile.malformed is not None:
        return  # `rules` reports it

    def faults(since: Version) -> Iterator[tuple[str, str]]:
        for layer, block in profile.blocks.items():
            for name, kind, group, hidden in _modules(profile, layer, block, since):
                draft = block.startswith(DRAFT)
                if not draft and profile.ignored.divides(name, since):
                    yield "divided", name
                elif fault := _fault(kind, group, draft=draft, hidden=hidden):
                    yield fault, name

    yield from _over_eras(ERAS, faults, Effect.REFUSES)


def _modules(
    profile: Profile, layer: int, block: str, version: Version
) -> Iterator[tuple[str, Format, Group | None, bool]]:
    """Name, stored format, group, and whether the ignore list took it, of a layer's modules."""
    groups, ignore = profile.groups, profile.ignored
    prefix = f"model.layers.{layer}"
    for module, stored in STORED.items():
        if (kind := profile.formats.get(f"{block}.{stored}")) is not None:
            name = f"{prefix}.{module}"
            # Without a prefix of its own before 0.24.0; then no rule can match it.
            group = matching.resolve(groups, ignore, name, version)
            yield name, kind, group, ignore.means(name, version)
    if (kind := profile.formats.get(f"{block}.{EXPERTS}.0.w1")) is not None:
        first, *others = matching.resolve_experts(groups, ignore, layer, version)
        targeted = matching.resolve_experts(groups, Rules(()), layer, version)[0]
        hidden = None in (first, *others) and targeted is not None
        group = first if all(other is first for other in others) else None
        yield f"{prefix}.{EXPERTS}", kind, group, hidden


def _fault(kind: Format, group: Group | None, *, draft: bool, hidden: bool) -> str:
    """The row of checks.toml, "" for none."""
    if kind is Format.PLAIN:
        return "" if group is None else "draft-not-ignored" if draft else "not-quantized"
    if group is not None:
        return "" if kind in ARGUMENTS and _fits(group, kind) else "other-arguments"
    return "draft-not-described" if draft else "broad-ignore" if hidden else "no-target"


def _over_eras(starts: Sequence[Version], faults: Faults, effect: Effect) -> Iterator[Finding]:
    """One finding per fault, over the neighbouring eras, in order, in which it is the same."""
    runs: dict[str, list[tuple[Version, Version | None, list[str]]]] = defaultdict(list)
    for since, before in zip_longest(starts, starts[1:]):
        found: dict[str, list[str]] = defaultdict(list)
        for fault, name in faults(since):
            found[fault].append(f"{name}.weight")
        for fault, names in found.items():
            same = runs[fault][-1:] and runs[fault][-1][1:] == (since, names)
            runs[fault].append((runs[fault].pop()[0] if same else since, before, names))
    for fault, rows in runs.items():
        for since, before, names in rows:
            bounds = {"since": "" if since == FIRST else str(since), "before": str(before or "")}
            yield finding(fault, summarize(names), effect=effect, **bounds)


CHECKS = (form, method, native, activations, actorder, nvfp4_scales, rules, resolution)
