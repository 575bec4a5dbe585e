"""What a preset must be, one rule a function: it reads what a line's vLLM answered, and judges.

The facts are the oracle's: vLLM's own argument parser, its environment variables, the
configuration that it resolves. Nothing here knows what a release does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_forge.matrix import serve_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vllm_forge.serve.case import Case, Finding

# How experts are stored -> what is in the name of the class that builds them so.
SCHEMES = {
    "bf16": "unquantized", "fp8": "fp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4", "w4a16": "wna16",
}  # fmt: skip
KV_FLAG, BLOCK_FLAG = "--kv-cache-dtype=", "--block-size="


def served(case: Case) -> Iterator[Finding]:
    """The line's vLLM takes the arguments and makes a configuration of them."""
    refused = case.answer.refused
    if refused is None:
        return
    row = f"matrix.toml, preset.{case.preset_name}"
    match refused.kind:
        case "arguments":
            what, remedy = "its parser refuses the arguments", f"correct flags in {row}"
        case "config":
            what, remedy = "it refuses the configuration", f"correct flags in {row}"
        case "device":
            what = "it has no kernels for this"
            remedy = f"take the artifact out of {row}; or the SKU out of line.{case.line_name}.skus"
        case "oracle":
            what, remedy = "the question failed", "mend src/vllm_forge/oracle"
    yield case.finding(f"{case.release}: {what}: {refused.message}", remedy)


def known_variables(case: Case) -> Iterator[Finding]:
    """Every variable is one of this vLLM's, and not one that it was good to be rid of."""
    for name in sorted(case.preset.env):
        retired = case.matrix.retired.get(name)
        unknown = name in case.answer.unknown_environment or not name.startswith("VLLM_")
        if unknown and retired is None:
            yield case.finding(
                f"{case.release} has no variable {name}: setting it has no effect",
                f"take it out of preset.{case.preset_name}.env, or correct its name",
            )
        elif unknown and retired is not None:
            yield case.finding(
                f"{case.release} has no variable {name} any more ({retired.source}): setting it "
                "has no effect",
                f"instead of it: {retired.replacement}",
            )


def retired_variables(case: Case) -> Iterator[Finding]:
    """A retired variable that loses the clamp in the release as published is an error."""
    for name in sorted(case.preset.env.keys() & case.matrix.retired.keys()):
        retired = case.matrix.retired[name]
        answer = case.published.get(name)
        moe = answer.moe if answer is not None else None
        if moe is not None and moe.clamp == "lost":
            yield case.finding(
                f"{name} takes {moe.chosen} for the experts, and {case.release} as published does "
                "not hand it swiglu_limit: the clamp is lost, results are wrong",
                f"instead of it: {retired.replacement}",
            )


def graphs_cover_decode(case: Case) -> Iterator[Finding]:
    """The largest captured size holds a full decode batch: max_num_seqs x (k + 1) tokens.

    A larger batch runs eager, an order of magnitude slower, and nothing says so:
    https://github.com/vllm-project/vllm/pull/50488.
    """
    graphs, engine = case.answer.cuda_graphs, case.answer.engine
    if graphs is None or engine is None:
        return
    per_sequence = case.preset.speculative_tokens + 1
    needed = engine.max_num_seqs * per_sequence
    largest = max(graphs.sizes, default=0)
    if largest < needed:
        yield case.finding(
            f"CUDA graphs ({graphs.mode}) are captured up to {largest} tokens, and a full decode "
            f"batch has {engine.max_num_seqs} x {per_sequence} = {needed}: it runs eager",
            f"--max-num-seqs={max(largest // per_sequence, 1)}, or --cudagraph-capture-sizes with "
            f"multiples of {per_sequence} up to {needed}",
        )


def drafter_takes_k(case: Case) -> Iterator[Finding]:
    """The draft layer is there, and drafts as many tokens as the preset says."""
    wanted = case.preset.speculative_tokens
    if case.answer.refused is not None:
        return
    draft = case.answer.draft
    found = 0 if draft is None else draft.speculative_tokens
    if found != wanted:
        yield case.finding(
            f"the preset drafts {wanted} tokens, and {case.release} {found}",
            f"correct speculative_tokens in preset.{case.preset_name}",
        )
        return
    layers = case.config.get("num_nextn_predict_layers", 0)
    if wanted and (not layers or (wanted > layers and wanted % layers)):
        yield case.finding(
            f"k = {wanted}, and the drafter has {layers} layers: k must be a multiple",
            f"correct speculative_tokens in preset.{case.preset_name}",
        )


def kv_cache_fits(case: Case) -> Iterator[Finding]:
    """The KV cache has the dtype and the block that were asked for, and attention takes them."""
    engine, attention = case.answer.engine, case.answer.attention
    dtype, block = _value(case, KV_FLAG), _value(case, BLOCK_FLAG)
    if engine is not None and dtype and not engine.kv_cache_dtype.startswith(dtype):
        yield case.finding(
            f"the preset asks for a KV cache in {dtype}, and {case.release} stores "
            f"{engine.kv_cache_dtype}",
            f"correct --kv-cache-dtype in preset.{case.preset_name}",
        )
    if engine is not None and block and str(engine.block_size) != block:
        yield case.finding(
            f"the preset asks for blocks of {block} tokens, and {case.release} takes "
            f"{engine.block_size}",
            f"correct --block-size in preset.{case.preset_name}",
        )
    if empty := [row for row in case.answer.kv_cache if row.page_bytes <= 0]:
        yield case.finding(
            f"a block of {empty[0].block_size} tokens is too small: {sum(r.layers for r in empty)} "
            "layers, which keep a token of many, get blocks of 0 bytes",
            f"take --block-size out of preset.{case.preset_name}, or raise it",
        )
    if attention is not None and attention.chosen is None:
        yield case.finding(
            f"{case.release} has no attention for KV dtype and block size: {attention.error}",
            f"correct --kv-cache-dtype or --block-size in preset.{case.preset_name}",
        )


def experts_are_served(case: Case) -> Iterator[Finding]:
    """A backend takes the experts, and it clamps where the model says so."""
    moe = case.answer.moe
    if moe is None:
        return
    if moe.chosen is None:
        yield case.finding(
            f"{case.release} has no backend for the experts: {moe.error}",
            "take the artifact out of the preset, or the SKU out of the line",
        )
    elif moe.clamp == "lost":
        yield case.finding(
            f"{case.release} takes {moe.chosen} without swiglu_limit: results are wrong",
            "choose another --moe-backend",
        )


def experts_are_built_as_stored(case: Case) -> Iterator[Finding]:
    """The scheme of the experts is that of the checkpoint; a line that is known not to is a row."""
    if case.answer.refused is not None:
        return
    artifact, draft = case.matrix.artifact[case.artifact_name], case.answer.draft
    pairs: list[tuple[str, str, str | None]] = [
        ("experts", artifact.experts, case.answer.experts_scheme)
    ]
    if draft is not None and artifact.mtp in SCHEMES:
        pairs.append(("draft experts", artifact.mtp, draft.experts_scheme))
    wrong = [
        f"{what} are stored as {stored} and built as {scheme}"
        for what, stored, scheme in pairs
        if scheme is not None and SCHEMES[stored] not in scheme.lower()
    ]
    row = f"artifact.{case.artifact_name}.unserved"
    reason = artifact.why_not(case.line_name, drafting=draft is not None)
    if wrong and reason is None:
        yield case.finding(
            f"{case.release}: {'; '.join(wrong)}",
            f"take the artifact out of preset.{case.preset_name}, or say in {row} why not",
        )
    elif reason is not None and not wrong:
        yield case.finding(f"{row} says that it is not served, and it is", f"delete the row {row}")


def tensor_parallel_divides(case: Case) -> Iterator[Finding]:
    """Heads, output groups and the experts' quantization groups split evenly over the GPUs.

    vLLM asserts the heads (models/deepseek_v4/attention.py, ``n_heads % tp_size``) and floors
    the output groups (``n_groups // tp_size``) without a word.
    """
    parts = case.preset.tensor_parallel
    for name, count in divisible(case.config).items():
        if count % parts:
            yield case.finding(
                f"{name} = {count} is not divided by --tensor-parallel-size={parts}",
                f"choose another tensor_parallel in preset.{case.preset_name}",
            )


def divisible(config: Mapping[str, Any]) -> dict[str, int]:
    """What a tensor-parallel split must divide, by name, of a DeepSeek V4 config.json."""
    counts = {
        name: int(config[name]) for name in ("num_attention_heads", "o_groups") if name in config
    }
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    for group in groups:
        width = (group.get("weights") or {}).get("group_size")
        if any("experts" in target for target in group.get("targets", ())) and width:
            size = config["moe_intermediate_size"]
            counts[f"moe_intermediate_size / group_size {width}"] = size // width
    return counts


RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    served,
    known_variables,
    retired_variables,
    graphs_cover_decode,
    drafter_takes_k,
    kv_cache_fits,
    experts_are_served,
    experts_are_built_as_stored,
    tensor_parallel_divides,
)


def judge(case: Case) -> list[Finding]:
    """All findings about a case, by rule."""
    return [finding for rule in RULES for finding in rule(case)]


def _value(case: Case, flag: str) -> str:
    """What the preset gives to a flag, the last time; empty where it does not."""
    words, _ = serve_arguments(case.matrix, case.preset_name)
    return next((w.removeprefix(flag) for w in reversed(words) if w.startswith(flag)), "")
