"""Lint of presets: what is asked of each with each artifact, one function a rule.

No rule knows what a release does: the line's vLLM said it, its argument parser, its environment
variables and the configuration that it resolves (kernels/selection).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllm_forge.kernels.selection import questions as asking
from vllm_forge.kernels.selection.questions import Answer
from vllm_forge.kernels.selection.record import SelectionRecord, require_fresh
from vllm_forge.matrix.flags import KV_CACHE, values
from vllm_forge.project import Project
from vllm_forge.serve.deployment import Deployment, find_deployment
from vllm_forge.serve.errors import PresetLintError
from vllm_forge.serve.variables import PREFIX, doubt

# How experts are stored -> parts of the names of the classes that build them so. The experts of
# MegaMoE have the parameters of MXFP4 in groups of 32 (0.26.0, nvidia/model.py:195).
SCHEMES = {
    "bf16": ("unquantized",), "fp8": ("fp8",), "mxfp4": ("mxfp4", "megamoe"),
    "nvfp4": ("nvfp4",), "w4a16": ("wna16",),
}  # fmt: skip
# Kind of refusal -> what vLLM does, and the remedy.
REFUSALS = {
    "arguments": ("its parser refuses the arguments", "correct flags in {row}"),
    "config": ("it refuses the configuration", "correct flags in {row}"),
    "device": (
        "it has no kernels for this",
        "take the artifact out of {row}; or the SKU out of line.{line}.skus",
    ),
    "start": ("it stops after it has loaded the weights", "correct flags in {row}"),
    "failed": ("the question failed", "fix src/vllm_forge/kernels/selection/inside"),
}
THINKS = {True: "thinks", False: "does not think"}
Problems: TypeAlias = Iterator[tuple[str, str]]  # of a case, each with its remedy


@dataclass(frozen=True, kw_only=True)
class LintCase(Deployment):
    """A deployment, and the answers about it."""

    answer: Answer  # of the line's vLLM, with the line's series applied
    # Retired variable -> the answer of the release as published, where that is set.
    published: Mapping[str, Answer]
    config: Mapping[str, Any]  # the artifact's config.json

    @property
    def release(self) -> str:
        """The line's vLLM in messages."""
        return f"vLLM {self.cell.line.vllm}"


@dataclass(frozen=True)
class LintFinding:
    """A problem of a preset with an artifact on a line, and its remedy."""

    case: LintCase
    what: str
    remedy: str

    def text(self) -> str:
        case = self.case
        return (
            f"preset {case.preset_name}, {case.artifact_name}, line {case.cell.line_name}: "
            f"{self.what}\n"
            f"    remedy: {self.remedy}"
        )


def served(case: LintCase) -> Problems:
    """The line's vLLM accepts the arguments and makes a configuration of them."""
    if (refused := case.answer.refused) is not None and case.why_not(case.cell.line_name) is None:
        what, remedy = REFUSALS[refused.kind]
        row, line = f"matrix.toml, preset.{case.preset_name}", case.cell.line_name
        yield f"{case.release}: {what}: {refused.message}", remedy.format(row=row, line=line)


def answer_is_complete(case: LintCase) -> Problems:
    """Whatever is served has experts, attention and settings: silence about them is a fault."""
    answer = case.answer
    if answer.refused is not None:
        return
    parts = {
        "experts": answer.moe, "attention": answer.attention, "CUDA graphs": answer.cuda_graphs,
        "settings": answer.engine,
    }  # fmt: skip
    if missing := [name for name, part in parts.items() if part is None]:
        what = f"{case.release} serves it, and its {' and '.join(missing)} are unknown"
        yield what, "teach src/vllm_forge/kernels/selection/inside what this release builds there"


def known_variables(case: LintCase) -> Problems:
    """Every variable of vLLM's is known to this vLLM; those of others: see ``notes``."""
    for name in sorted(case.environment):
        if not name.startswith(PREFIX) or name not in case.answer.unknown_environment:
            continue
        retired, near = case.matrix.retired.get(name), case.answer.similar.get(name)
        more, remedy = "", f"take it out of preset.{case.preset_name}.env, or correct its name"
        if retired is not None:
            more, remedy = f" any more ({retired.source})", f"use instead: {retired.replacement}"
        elif near is not None:
            more = f" (did you mean {near!r}?)"
        what = f"{case.release} has no variable {name}{more}: setting it has no effect"
        yield what, remedy


def retired_variables(case: LintCase) -> Problems:
    """A retired variable that loses the clamp in the release as published is an error."""
    for name in sorted(case.environment.keys() & case.matrix.retired.keys()):
        retired = case.matrix.retired[name]
        answer = case.published.get(name)
        if answer and (moe := answer.moe) and moe.clamp == "lost":
            what = f"{name} takes {moe.chosen} for the experts, and {case.release} as published "
            what += "does not hand it swiglu_limit: the clamp is lost, results are wrong"
            yield what, f"use instead: {retired.replacement}"


def graphs_are_on(case: LintCase) -> Problems:
    """Batches run in CUDA graphs, in the mode that was asked for."""
    graphs, row = case.answer.cuda_graphs, f"preset.{case.preset_name}"
    if graphs is None:
        return
    if graphs.mode == "NONE":
        eager = "--enforce-eager" in values(case.arguments)
        remedy = f"take {'--enforce-eager' if eager else 'what turns them off'} out of {row}"
        yield "CUDA graphs are off: every batch runs eager", remedy
    elif "PIECEWISE" in graphs.asked and not graphs.piecewise:
        what = "no piecewise CUDA graph is captured, as the model is not compiled and breakable "
        what += "graphs are off: batches with prefill run eager, whatever the mode "
        what += f"({graphs.asked})"
        yield what, f"take VLLM_USE_BREAKABLE_CUDAGRAPH out of {row}.env"
    elif graphs.asked and graphs.asked != graphs.mode:
        what = f"it asks for CUDA graphs in mode {graphs.asked}, and {case.release} runs "
        yield f"{what}{graphs.mode} with this attention", f"ask for {graphs.mode} in {row}"


def graphs_cover_decode(case: LintCase) -> Problems:
    """The largest captured size holds a full decode batch: max_num_seqs x (k + 1) tokens.

    A larger batch runs eager, an order of magnitude slower, and nothing says so:
    https://github.com/vllm-project/vllm/pull/50488.
    """
    graphs, engine = case.answer.cuda_graphs, case.answer.engine
    if graphs is None or engine is None or graphs.mode == "NONE":
        return
    per_sequence = (0 if case.drafter is None else case.drafter.tokens) + 1
    needed = engine.max_num_seqs * per_sequence
    largest = max(graphs.sizes, default=0)
    if largest < needed:
        what = f"CUDA graphs ({graphs.mode}) are captured up to {largest} tokens, and a full "
        what += f"decode batch has {engine.max_num_seqs} x {per_sequence} = {needed}: it runs eager"
        remedy = f"--max-num-seqs={max(largest // per_sequence, 1)}, or --cudagraph-capture-sizes "
        yield what, f"{remedy}with multiples of {per_sequence} up to {needed}"


def drafter_takes_k(case: LintCase) -> Problems:
    """The draft layer is there, and drafts as many tokens as the preset says."""
    if case.answer.refused is not None:
        return
    asked, draft = case.drafter, case.answer.draft
    tokens = 0 if asked is None else asked.tokens
    drafted = 0 if draft is None else draft.speculative_tokens
    layers = case.config.get("num_nextn_predict_layers", 0)
    if drafted != tokens:
        what = f"the preset drafts {tokens} tokens, and {case.release} {drafted}"
    elif case.other_drafter:
        what = f"{case.artifact_name} {case.other_drafter}"
    elif asked is not None and asked.method == "dspark":
        return  # it has blocks, and builds other layers than the config says
    elif tokens and (not layers or (tokens > layers and tokens % layers)):
        what = f"k = {tokens}, and the drafter has {layers} layers: k must be a multiple"
    else:
        return
    yield what, f"correct speculative_tokens in preset.{case.preset_name}"


def kv_cache_fits(case: LintCase) -> Problems:
    """The KV cache has the dtype and the block that were asked for, and attention takes them."""
    engine, attention = case.answer.engine, case.answer.attention
    dtype, block = (_value(case, name) for name in KV_CACHE)
    row = f"preset.{case.preset_name}"
    stored = {"auto": "", "fp8_e4m3": "fp8"}.get(dtype, dtype)  # config/cache.py: fp8 is fp8_e4m3
    if engine is not None and not engine.kv_cache_dtype.startswith(stored):
        what = f"the preset asks for a KV cache in {dtype}, and {case.release} stores "
        yield what + engine.kv_cache_dtype, f"correct --kv-cache-dtype in {row}"
    if engine is not None and block and str(engine.block_size) != block:
        what = f"the preset asks for blocks of {block} tokens, and {case.release} takes "
        yield f"{what}{engine.block_size}", f"correct --block-size in {row}"
    if empty := [row for row in case.answer.kv_cache if row.page_bytes <= 0]:
        what = f"a block of {empty[0].block_size} tokens is too small: "
        what += f"{sum(r.layers for r in empty)} layers, which keep a token of many, get blocks of "
        yield f"{what}0 bytes", f"take --block-size out of {row}, or raise it"
    if attention is not None and attention.chosen is None:
        what = f"{case.release} has no attention for KV dtype and block size: {attention.error}"
        yield what, f"correct --kv-cache-dtype or --block-size in {row}"


def experts_are_served(case: LintCase) -> Problems:
    """A backend takes the experts, and it clamps where the model says so."""
    moe = case.answer.moe
    if moe is None or case.answer.refused is not None:
        return
    if moe.chosen is None:
        what = f"{case.release} has no backend for the experts: {moe.error}"
        yield what, "take the artifact out of the preset, or the SKU out of the line"
    elif moe.clamp == "lost":
        what = f"{case.release} takes {moe.chosen} without swiglu_limit: results are wrong"
        yield what, "choose another --moe-backend"
    elif moe.clamp == "none" and case.config.get("swiglu_limit") is not None:
        what = f"whether {moe.chosen} of {case.release} gets swiglu_limit is unknown"
        yield what, "teach src/vllm_forge/kernels/selection/inside/experts.py to ask it"


def experts_are_built_as_stored(case: LintCase) -> Problems:
    """The experts' scheme is the checkpoint's; exceptions are rows [artifact.*.unserved]."""
    if case.answer.refused is not None or case.other_drafter:
        return
    artifact, draft = case.artifact, case.answer.draft
    pairs: list[tuple[str, str, str | None]] = [
        ("experts", artifact.experts, case.answer.experts_scheme)
    ]
    if draft is not None and artifact.mtp in SCHEMES:
        pairs.append(("draft experts", artifact.mtp, draft.experts_scheme))
    wrong = [
        f"{what} are stored as {stored} and built as {scheme or 'nothing that is known'}"
        for what, stored, scheme in pairs
        if not any(part in (scheme or "").lower() for part in SCHEMES[stored])
    ]
    row = f"artifact.{case.artifact_name}.unserved"
    cell = case.cell
    reason = artifact.why_not(cell.line_name, cell.sku_name, drafting=draft is not None)
    if wrong and reason is None:
        remedy = f"take the artifact out of preset.{case.preset_name}, or say in {row} why not"
        yield f"{case.release}: {'; '.join(wrong)}", remedy
    elif reason is not None and not wrong:
        yield f"{row} says that it is not served, but it is", f"delete the row {row}"


def backend_is_the_one_asked_for(case: LintCase) -> Problems:
    """--moe-backend and --attention-backend are not passed over silently."""
    lacks = {
        "--moe-backend": f"does not take {case.artifact.experts} experts",
        "--attention-backend": "is not for this model's attention",
    }
    for flag, choice in zip(lacks, (case.answer.moe, case.answer.attention), strict=True):
        asked = _value(case, flag) or _value(case, flag.replace("-backend", "-config.backend"))
        if asked in {"", "auto"} or choice is None or choice.chosen is None:
            continue
        if asked.upper() not in choice.chosen:
            what = f"it asks for {flag}={asked}, and {case.release} takes {choice.chosen}, as "
            remedy = f"take {flag} out of preset.{case.preset_name}, or the artifact"
            yield f"{what}{asked} {lacks[flag]}", remedy


def chat_is_the_lines(case: LintCase) -> Problems:
    """The renderer is this model's, and line.*.chat says what the release does."""
    chat, said, row = case.cell.line.chat, case.answer.chat, f"line.{case.cell.line_name}.chat"
    if chat is None or case.answer.refused is not None:
        return
    if said is None:
        what = f"{case.release} does not render chats with its own code for this model"
        yield what, f"take --tokenizer-mode out of preset.{case.preset_name}"
    elif said.thinking != chat.thinking:
        listed, actual = (THINKS[row.thinking] for row in (chat, said))
        what = f"{row} says that a chat {listed} by default, and with {case.release} it {actual}"
        yield what, f"correct {row}.thinking"


def tensor_parallel_divides(case: LintCase) -> Problems:
    """Heads, output groups and the experts' quantization groups split evenly over the GPUs.

    vLLM asserts the heads (models/deepseek_v4/attention.py, ``n_heads % tp_size``) and floors
    the output groups (``n_groups // tp_size``) silently. Experts are split over all ranks
    (fused_moe/config.py, flatten_tp_across_dp_and_pcp), or kept whole by expert parallelism.
    """
    spread, whole = case.spread, "--enable-expert-parallel" in case.arguments
    ranks = 1 if whole else spread.gpus // spread.pipeline
    for name, count in divisible(case.config).items():
        if count % (ranks if name.startswith("moe") else spread.tensor):
            remedy = f"choose other parallel sizes in preset.{case.preset_name}"
            yield f"{name} = {count} is not divided by {spread.text}", remedy


def memory_suffices(case: LintCase) -> Problems:
    """Weights and the KV cache of one request fit into the SKU's GPUs."""
    memory = case.memory((), case.answer)
    if memory is not None and memory.verdict == "red":
        yield f"{memory.seen}; needed are {memory.needed}", memory.remedy


def divisible(config: Mapping[str, Any]) -> dict[str, int]:
    """Counts that a tensor-parallel split must divide, by name, of a DeepSeek V4 config.json."""
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


RULES: tuple[Callable[[LintCase], Problems], ...] = (
    served, answer_is_complete, known_variables, retired_variables, graphs_are_on,
    graphs_cover_decode, drafter_takes_k, kv_cache_fits, experts_are_served,
    experts_are_built_as_stored, backend_is_the_one_asked_for, chat_is_the_lines,
    tensor_parallel_divides, memory_suffices,
)  # fmt: skip


def judge(case: LintCase) -> list[LintFinding]:
    return [LintFinding(case, what, remedy) for rule in RULES for what, remedy in rule(case)]


def notes(case: LintCase) -> list[str]:
    """What is doubtful, without being known to be wrong."""
    near = case.answer.similar
    texts = [
        f"unknown variable {name} (did you mean {near[name]!r}?)"
        if name in near and not name.startswith(PREFIX)
        else doubt(name)
        for name in sorted(case.environment)
    ]
    # Parsers that replace the line's: vLLM takes any name that it knows, or of a plugin.
    chat = case.cell.line.chat
    line, own = values(chat.flags if chat else ()), values(case.arguments)
    texts += [
        f"{name}={own[name]} replaces {right}, which {case.release} has for this model"
        for name, right in line.items()
        if right and own.get(name, right) != right
    ]
    return [f"preset {case.preset_name}: {text}" for text in texts if text]


def _value(case: LintCase, name: str) -> str:
    """The last value of a flag; "" if none."""
    return values(case.arguments).get(name, "")


def cases(project: Project, recorded: SelectionRecord) -> Iterator[LintCase]:
    """All cases of a line, in the matrix's order."""
    matrix = project.matrix
    answers, published = recorded.answers, recorded.published_answers
    for name, preset in matrix.preset.items():
        if preset.sku not in matrix.line[recorded.line_name].skus:
            continue
        cell = project.cell(preset.sku, recorded.line_name)
        for artifact in preset.artifacts:
            yield LintCase(
                **vars(find_deployment(matrix, cell, name, artifact)),
                answer=answers[asking.preset_question(name, artifact)],
                published={
                    variable: published[asking.grid_question(preset.sku, artifact, variable)]
                    for variable in matrix.retired
                },
                config=asking.artifact_config(artifact),
            )


def lint_line(project: Project, line_name: str) -> tuple[list[LintFinding], list[str]]:
    """Findings, and notes on what is doubtful and no fault."""
    found = list(cases(project, require_fresh(project, line_name)))
    texts = dict.fromkeys(note for case in found for note in notes(case))
    return [finding for case in found for finding in judge(case)], list(texts)


def require_clean(
    findings: Sequence[LintFinding],
    where: str = "matrix.toml, [preset]",
    remedy: str = "fix the rows as each finding says",
) -> None:
    if findings:
        what = f"{len(findings)} findings:\n" + "\n".join(finding.text() for finding in findings)
        raise PresetLintError(what, where=where, remedy=remedy)
