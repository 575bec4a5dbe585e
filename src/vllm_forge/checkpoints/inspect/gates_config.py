"""Gates about targets and ignore list: what they mean against what is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.version import Version

from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, some
from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.matching import (
    FUSION_KNOWN,
    PROBES_CHANGED,
    Group,
    is_rule,
    means,
    read_groups,
    resolve,
    resolve_experts,
    serving_modules,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vllm_forge.checkpoints.inspect.profile import Profile

COMPRESSED = "compressed-tensors"
# Between these, vLLM asks a config in the same way; see matching.py.
ERAS = (
    (Version("0"), FUSION_KNOWN),
    (FUSION_KNOWN, PROBES_CHANGED),
    (PROBES_CHANGED, None),
)
# What a group must say for weights that are stored so.
ARGUMENTS: dict[Format, dict[str, Any]] = {
    Format.FP8_BLOCK: {"num_bits": 8, "type": "float", "strategy": "block"},
    Format.NVFP4: {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    Format.W4A16: {"num_bits": 4, "type": "int", "strategy": "group"},
}
# Literal entries that people write for what is never quantized.
HARMLESS = {"lm_head", "head", "embed", "embed_tokens", "model.embed_tokens"}
# vLLM's linear module -> the stored module that tells its format; "{}" is the layer.
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


def rules(profile: Profile) -> Iterator[Finding]:
    """G11, G18: rules that are malformed, or mean no module at all, or every one."""
    groups = read_groups(profile.quantization)
    ignore = ignore_rules(profile)
    if not groups:
        return
    for rule in (*ignore, *(target for group in groups for target in group.targets)):
        if not is_rule(rule):
            yield Finding(
                gate="G11",
                title="a rule is no regular expression",
                effect=Effect.REFUSES,
                what=rule,
                remedy='write "re:" and a regular expression, or the whole name of a module',
            )
            return
    known = serving_modules(profile.config, (*range(profile.layers), *profile.draft_layers))
    stored = [f"model.{module}" for module in profile.modules] + list(profile.modules)
    for group in groups:
        for target in group.targets:
            hits = sum(means([target], name, Version("0")) for name in known)
            if hits == len(known):
                yield _targets("mean every module", target, group)
            elif not hits and not any(means([target], n, Version("0")) for n in stored):
                yield _targets("mean no module", target, group)
    literal = {rule for rule in ignore if not rule.startswith("re:") and rule not in HARMLESS}
    stale = sorted(literal - set(known))
    if stale:
        yield Finding(
            gate="G18",
            title="the ignore list names paths that vLLM does not have",
            effect=Effect.DEPARTS,
            what=f"{len(stale)} literal entries mean nothing, e.g. {stale[0]}",
            remedy='ignore by pattern ("re:..."), with the names of vLLM\'s modules',
        )


def _targets(what: str, target: str, group: Group) -> Finding:
    return Finding(
        gate="G11",
        title=f"targets that {what}",
        effect=Effect.DEPARTS,
        what=f"{group.name}: {target}",
        remedy="name the modules as vLLM does: attn.fused_wqa_wkv for wq_a and wkv",
    )


def resolution(profile: Profile) -> Iterator[Finding]:
    """G11, G13, G14, G16: what each module gets against how it is stored, for every vLLM."""
    if profile.quantization.get("quant_method") != COMPRESSED or not profile.formats:
        return
    groups, ignore = read_groups(profile.quantization), ignore_rules(profile)
    if not all(is_rule(rule) for rule in (*ignore, *(t for g in groups for t in g.targets))):
        return  # told by `rules`
    seen: list[tuple[Version, Version | None, dict[str, list[str]]]] = []
    for since, before in ERAS:
        lost: dict[str, list[str]] = {}
        for layer in (*range(profile.layers), *profile.draft_layers):
            draft = layer >= profile.layers
            for name, kind, group, hidden in _modules(profile, groups, ignore, layer, since):
                if fault := _fault(kind, group, draft=draft, hidden=hidden):
                    lost.setdefault(fault, []).append(name)
        seen.append((since, before, lost))
    yield from over_eras(seen)


def over_eras(
    seen: Iterable[tuple[Version, Version | None, Mapping[str, list[str]]]],
    effect: Effect = Effect.REFUSES,
) -> Iterator[Finding]:
    """One finding per fault, over the neighbouring eras in which it is the same.

    Args:
        seen: since which vLLM, before which, fault (a key of TOLD) -> modules; in order.
        effect: of each fault.
    """
    seen = list(seen)
    for fault in {fault: None for _, _, faults in seen for fault in faults}:
        runs: list[tuple[Version, Version | None, list[str]]] = []
        for since, before, faults in seen:
            names = faults.get(fault)
            if names is None:
                continue
            if runs and runs[-1][1] == since and runs[-1][2] == names:
                runs[-1] = (runs[-1][0], before, names)
            else:
                runs.append((since, before, names))
        for since, before, names in runs:
            yield _resolved(fault, names, since, before, effect)


def _modules(
    profile: Profile, groups: tuple[Group, ...], ignore: list[str], layer: int, version: Version
) -> Iterator[tuple[str, Format, Group | None, bool]]:
    """Name, stored format, group, and whether the ignore list took it, of a layer's modules."""
    draft = layer >= profile.layers
    local = f"mtp.{layer - profile.layers}" if draft else f"layers.{layer}"
    prefix = f"model.layers.{layer}"
    for module, stored in STORED.items():
        kind = profile.formats.get(f"{local}.{stored}")
        if kind is not None:
            name = f"{prefix}.{module}"
            # Without a prefix of its own before 0.24.0; then no rule can mean it.
            group = resolve(groups, ignore, name, version)
            yield name, kind, group, means(ignore, name, version)
    kind = profile.formats.get(f"{local}.{EXPERTS}.0.w1")
    if kind is not None:
        found = resolve_experts(groups, ignore, layer, version)
        name = f"{prefix}.{EXPERTS}"
        hidden = any(row is None for row in found) and bool(
            resolve_experts(groups, (), layer, version)[0]
        )
        yield name, kind, found[0] if all(row == found[0] for row in found) else None, hidden


def _fault(kind: Format, group: Group | None, *, draft: bool, hidden: bool) -> str:
    if group is None:
        if kind is Format.PLAIN:
            return ""
        if draft:
            return "G16"
        return "G13" if hidden else "G11"
    if kind is Format.PLAIN:
        return "G14" if draft else "plain"
    wanted = ARGUMENTS.get(kind)
    fits = wanted is not None and all(group.weights.get(k) == v for k, v in wanted.items())
    return "" if fits else "scheme"


TOLD = {
    "G11": (
        "quantized weights that no target means",
        "vLLM builds these modules unquantized",
        'target "re:.*\\.attn\\.(fused_wqa_wkv|wq_a|wkv|wq_b|wo_a|wo_b)$" and '
        '"re:.*\\.ffn\\.experts\\.\\d+\\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"',
    ),
    "G13": (
        "the ignore list hides quantized weights",
        "vLLM builds these modules unquantized",
        "make the pattern narrower: a name like layers.3 is also a part of layers.31",
    ),
    "G14": (
        "the draft layer would be quantized, its weights are not",
        "the draft model takes the target's quantization",
        'ignore "re:.*\\.layers\\.N\\..*" with N = num_hidden_layers',
    ),
    "G16": (
        "the draft layer is quantized in a way that its config does not tell",
        "vLLM builds it as its config says",
        "pass mtp.* through as the source has it, or let the groups mean it",
    ),
    "G16 experts": (
        "the draft's experts are not in the format that vLLM builds",
        "vLLM gives all layers the format of moe_quant_algo, and since 0.33.0 reads in ignore "
        "which are left in MXFP4",
        "serve it on a line that reads ignore, and name mtp.* there",
    ),
    "plain": (
        "weights that would be quantized are not",
        "vLLM builds these modules quantized",
        "add them to the ignore list",
    ),
    "scheme": (
        "the group's arguments do not fit how the weights are stored",
        "bits, type or strategy differ",
        "write the group of the format that is stored",
    ),
}


def _resolved(
    fault: str, names: list[str], since: Version, before: Version | None, effect: Effect
) -> Finding:
    title, why, remedy = TOLD[fault]
    draft = fault.startswith(("G14", "G16"))
    return Finding(
        gate=fault.partition(" ")[0] if fault.startswith("G") else "G11",
        title=title,
        effect=effect,
        scope=Scope.DRAFT if draft else Scope.TARGET,
        what=f"{why}: {some(f'{name}.weight' for name in names)}",
        remedy=remedy,
        since="" if since == Version("0") else str(since),
        before="" if before is None else str(before),
    )


def ignore_rules(profile: Profile) -> list[str]:
    found = profile.quantization.get("ignore") or []
    return [str(rule) for rule in found] if isinstance(found, list) else []


GATES = (rules, resolution)
