"""An inspection: every check, a comparison with a manifest, and each line's verdict."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from itertools import product
from typing import Any, Literal

from packaging.version import Version

from vllm_forge.checkpoints.errors import CheckpointDepartsError, CheckpointRefusedError
from vllm_forge.checkpoints.inspect import checks_config, checks_tensors
from vllm_forge.checkpoints.inspect.checks_config import weights_only_experts
from vllm_forge.checkpoints.inspect.dry_load import Answer, Load
from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope, label
from vllm_forge.checkpoints.inspect.manifest import (
    against_record,
    config_facts,
    departures,
    nearest,
)
from vllm_forge.checkpoints.inspect.profile import DRAFT, Drafter, Part, Profile, part_of
from vllm_forge.checkpoints.inspect.values import ValueRow, compare
from vllm_forge.matrix import FrozenModel
from vllm_forge.patches.dispositions import FILE, Disposition, decisions
from vllm_forge.patches.errors import DispositionError

# What the status of a disposition means for a line that has the fault.
COPES = {"carried": "patched", "retired": "in the release", "not-applicable": "not concerned"}
RULES = "the matching rules of compressed-tensors"
# Conversions that keep what the bytes mean. FP32 to BF16 is what vLLM itself does to a parameter;
# FP32 to E8M0 is exact for powers of two, and checks_config.native_scales reads whether they are.
KEEP = {
    ("int64", "int32"), ("int8", "uint8"), ("uint8", "int8"), ("float8_e8m0fnu", "float32"),
    ("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"),
    ("float16", "bfloat16"), ("float32", "float8_e8m0fnu"),
}  # fmt: skip
# Sinks are padded to the heads that a kernel takes; the rest keeps -inf, which means no sink.
PADDED = ("attn_sink",)
# Parameters that vLLM makes for a format and fills from nothing: orders of activations (they are
# emptied after loading unless actorder is "group"), and the shapes of packed weights.
VOID = ("_g_idx", "_g_idx_sort_indices", "_weight_shape")
NOT_READ = ("weight_shape",)
# Of NVFP4 experts whose group has weights alone: vLLM makes these parameters, and takes a backend
# without activation scales (compressed_tensors_moe.py:140 and fused_moe/oracle/nvfp4.py:478 in
# 0.22.1; :193 and :481 in 0.26.0; :159 and :554 in 0.33.0).
INPUT_SCALES = ("_input_global_scale",)
# The draft model gets these from the target after loading.
SHARED = (".embed_tokens.weight", ".shared_head.head.weight", "lm_head.weight")
SCALES = ("scale", "scale_inv", "scale_2", "zero_point")
WRONG = (Effect.DEPARTS, Effect.LOSES)


class Outcome(StrEnum):
    """What a line does with a checkpoint."""

    WITH_MTP = "serves with MTP"
    WITH_DSPARK = "serves with DSpark"
    WITHOUT = "serves without MTP"
    NOT = "does not serve"
    UNKNOWN = "unknown"


class LineVerdict(FrozenModel):
    """What a line does with a checkpoint."""

    outcome: Outcome
    checks: tuple[str, ...]  # of the findings that count on this line
    why: tuple[str, ...]  # reasons for what it does not do
    line: str
    vllm: str
    findings: tuple[int, ...]  # that count on this line: their indices in the report
    handled: tuple[str, ...]  # findings that this line copes with, and how
    by: str  # who resolved the modules: a vLLM, or rules without one
    # Module -> what it resolves to there, e.g. "CompressedTensorsW8A8Fp8"; numbers are N.
    modules: dict[str, str]


class PartRow(FrozenModel):
    part: Part
    draft: bool
    tensors: int
    dtypes: dict[str, int]
    formats: dict[str, int]


class Report(FrozenModel):
    """Everything that an inspection says. Stable: a change of meaning changes ``schema``."""

    schema_version: Literal[2] = 2
    place: str
    read: Literal["headers", "index"]
    artifact: str | None  # the manifest that it was compared with
    asked: bool  # that manifest was asked for, rather than found to be its own
    resembles: str | None = None  # the nearest manifest, from which it departs: not compared
    drafter: Drafter
    promised: int  # draft layers that config.json has
    tensors: int
    draft_tensors: int
    shards: int
    bytes: int | None  # of all tensors; None without headers
    config: dict[str, Any]  # see manifest.config_facts
    parts: tuple[PartRow, ...]
    values: tuple[ValueRow, ...] = ()  # decoded weights against the source
    findings: tuple[Finding, ...]  # from bad to harmless
    lines: tuple[LineVerdict, ...]

    def line(self, name: str) -> LineVerdict:
        return next(verdict for verdict in self.lines if verdict.line == name)

    def error(
        self, line: str, *, without_mtp: bool = False
    ) -> CheckpointRefusedError | CheckpointDepartsError | None:
        """What the command ends with on that line; ``without_mtp``: its MTP block is waived."""
        verdict = self.line(line)
        served = {Outcome.WITH_MTP}
        if without_mtp or not self.promised:
            served |= {Outcome.WITHOUT, Outcome.WITH_DSPARK}
        what, remedy = f"line {line}: {verdict.outcome}", "see the remedies of the findings above"
        if verdict.outcome not in served:
            waive = "" if without_mtp else "; --without-mtp if serving without it is enough"
            what = "\n  - ".join([what, *verdict.why])
            return CheckpointRefusedError(what, where=self.place, remedy=remedy + waive)
        if not (wrong := [row.sentence for row in self.findings if row.effect in WRONG]):
            return None
        what = "\n  - ".join([f"{what}, but it is not what it should be", *wrong])
        return CheckpointDepartsError(what, where=self.place, remedy=remedy)


def find_all(
    profile: Profile,
    artifact: str | None = None,
    source: Profile | None = None,
    *,
    digests: bool = False,
) -> list[Finding]:
    """Everything that is found without a vLLM, from bad to harmless.

    Where shards are missing, only that: what they have is not known.
    """
    if profile.tensors and profile.missing_shards:
        return _sorted(list(checks_tensors.files(profile)))
    checks = [*checks_tensors.NAMES]
    if profile.tensors:
        checks += [*checks_config.CHECKS, *checks_tensors.TENSORS]
    findings = [finding for check in checks for finding in check(profile)]
    if source is not None:
        findings += checks_tensors.against_source(profile, source.tensors)
    if artifact is not None and profile.tensors:
        findings += departures(profile, artifact)
    findings += against_record(profile, digests=digests)
    return _sorted(findings)


def _sorted(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: list(Effect).index(finding.effect))


def inspect(
    profile: Profile,
    lines: Mapping[str, str],
    dispositions: tuple[Disposition, ...],
    answers: Mapping[str, Answer],
    *,
    artifact: str | None = None,
    source: Profile | None = None,
    values: int | None = None,
    digests: bool = False,
) -> Report:
    """Inspect a checkpoint for ``lines`` (line -> vLLM release).

    ``answers`` are the dry loads that were made, by line. It is compared with the manifest of
    ``artifact`` (None: the one that it fits), its dtypes with those of ``source``, so many decoded
    ``values`` of each part (0: all) with the source's, and with ``digests`` all of its data with
    the SHA-256 in its manifest.json. A checkpoint that fits none is somebody else's: no fault.
    """
    compared, resembles = artifact, None
    if artifact is None and (like := nearest(profile)) is not None:
        fits = next(departures(profile, like), None) is None
        compared, resembles = (like, None) if fits else (None, like)
    findings = find_all(profile, compared, source, digests=digests)
    rows: list[ValueRow] = []
    if source is not None and values is not None:
        rows, wrong = compare(profile, source, values)
        findings = _sorted([*findings, *wrong])
    return Report(
        place=str(profile.source),
        read="headers" if profile.tensors else "index",
        artifact=compared,
        asked=artifact is not None,
        resembles=resembles,
        drafter=profile.drafter,
        promised=len(profile.draft_layers),
        tensors=len(profile.names),
        draft_tensors=len(profile.draft_names),
        shards=len(profile.shards),
        bytes=profile.bytes,
        config=config_facts(profile),
        parts=tuple(_parts(profile)),
        values=tuple(rows),
        findings=tuple(findings),
        lines=tuple(
            judge(
                name, vllm, profile,
                findings=findings, dispositions=dispositions, answer=answers.get(name),
            )
            for name, vllm in lines.items()
        ),
    )  # fmt: skip


def _parts(profile: Profile) -> Iterator[PartRow]:
    dtypes: dict[tuple[bool, Part], Counter[str]] = defaultdict(Counter)
    formats: dict[tuple[bool, Part], Counter[str]] = defaultdict(Counter)
    for name, tensor in profile.tensors.items():
        dtypes[name.startswith(DRAFT), part_of(name)][tensor.dtype] += 1
    for module, kind in profile.formats.items():
        formats[module.startswith(DRAFT), part_of(f"{module}.weight")][kind.value] += 1
    for draft, part in product((False, True), Part):
        if counted := dtypes[draft, part]:
            yield PartRow(
                part=part,
                draft=draft,
                tensors=counted.total(),
                dtypes=dict(sorted(counted.items())),
                formats=dict(sorted(formats[draft, part].items())),
            )


def judge(
    line: str,
    vllm: str,
    profile: Profile,
    *,
    findings: Iterable[Finding],
    dispositions: tuple[Disposition, ...],
    answer: Answer | None,
) -> LineVerdict:
    """Put together what one line, with its vLLM release and the answer of its dry load, does."""
    counted: dict[int, Finding] = {}
    handled: list[str] = []
    for index, finding in enumerate(findings):
        if not applies(finding, vllm):
            continue
        if finding.handled_by:
            status = _status(finding.handled_by, line, dispositions)
            if status in COPES:
                handled.append(f"{label(finding.check)}: {finding.title}: {COPES[status]}")
                continue
        counted[index] = finding
    idle = VOID + (INPUT_SCALES if weights_only_experts(profile) else ())
    load = answer.target if answer else None
    target = list(_problems(counted.values(), Scope.TARGET, load, idle))
    draft, outcome = _draft(profile, counted.values(), answer, idle)
    if target:
        outcome = Outcome.NOT
    elif not profile.tensors:
        outcome = Outcome.UNKNOWN
        target = ["needs headers: dtypes, shapes and what vLLM makes of them are not known"]
    why = [*target, *(f"draft: {reason}" for reason in draft)]
    why += [finding.sentence for finding in counted.values() if finding.effect is Effect.LOSES]
    return LineVerdict(
        line=line,
        vllm=vllm,
        outcome=outcome,
        why=tuple(why),
        checks=tuple(sorted({finding.check for finding in counted.values()})),
        findings=tuple(counted),
        handled=tuple(handled),
        by=f"vLLM {vllm} itself, in a dry load" if answer else RULES,
        modules=_modules(answer),
    )


def _status(about: str, line: str, dispositions: Iterable[Disposition]) -> str:
    entries = tuple(entry for entry in dispositions if entry.about == about)
    if not entries:
        remedy = f'add a [[disposition]] with about = "{about}"'
        raise DispositionError(f"missing disposition of {about}", where=FILE, remedy=remedy)
    ((_, decision),) = decisions(entries, line)
    return decision.status


def applies(finding: Finding, vllm: str) -> bool:
    version, before = Version(vllm), finding.before
    return Version(finding.since or "0") <= version and not (before and version >= Version(before))


def _draft(
    profile: Profile, counted: Collection[Finding], answer: Answer | None, idle: tuple[str, ...]
) -> tuple[list[str], Outcome]:
    """Reasons against the drafter, and the best that is left."""
    if not profile.draft_layers or profile.drafter is Drafter.NONE:
        return list(_problems(counted, Scope.DRAFT, None, idle)), Outcome.WITHOUT
    loads = answer.drafts if answer else {}
    reasons = list(_problems(counted, Scope.DRAFT, loads.get("mtp"), idle))
    if profile.drafter is Drafter.DSPARK and (load := loads.get("dspark")) is not None:
        other = list(_load_problems(load, idle, draft=True))
        if not other:
            return reasons, Outcome.WITH_DSPARK
        reasons += [f"as DSpark: {reason}" for reason in other]
    return reasons, Outcome.WITHOUT if reasons else Outcome.WITH_MTP


def _problems(
    counted: Iterable[Finding], scope: Scope, load: Load | None, idle: tuple[str, ...]
) -> Iterator[str]:
    """Why one model does not serve. vLLM's own errors come first, and decide.

    A prediction that it refuses is a reason only where it was not asked, or where the fault shows
    after loading: in the forward pass, or when an upstream change is named.
    """
    draft = scope is Scope.DRAFT
    observed = list(_load_problems(load, idle, draft=draft)) if load is not None else []
    yield from observed
    for finding in counted:
        if finding.scope is not scope or not finding.effect.breaks:
            continue
        late = finding.in_forward or bool(finding.handled_by)
        predicted = finding.effect is Effect.REFUSES and not late and load is not None
        drafter = finding.check == "other-drafter"  # which method fits is not for a loader to say
        if not predicted or observed or drafter:
            yield finding.sentence


def _load_problems(load: Load, idle: tuple[str, ...], *, draft: bool) -> Iterator[str]:
    """What a dry load shows; ``idle``: ends of parameters that vLLM makes and does not use."""
    if load.error is not None:
        at = f" at {load.error.tensor}" if load.error.tensor else ""
        yield f"vLLM stops{at}: {load.error.message}"
    for row in load.short:
        if row.filled and row.parameter.endswith(PADDED):
            continue
        if not row.filled and row.parameter.endswith((*idle, *(SHARED if draft else ()))):
            continue
        more = f" and {row.count - 1} like it" if row.count > 1 else ""
        elements = f"{row.filled} of {row.of} elements"
        yield f"vLLM silently loads only {elements} of {row.parameter}{more}"
    for cast in load.casts:
        if (cast.source, cast.to) not in KEEP and not cast.example.endswith(NOT_READ):
            yield (
                f"vLLM converts {cast.count} tensors from {cast.source} to {cast.to}, e.g. "
                f"{cast.example}: the values mean something else"
            )
    for unread in load.unread:
        if unread.tensor.rpartition("_")[2] in SCALES or unread.tensor.endswith(".scale"):
            yield f"vLLM does not read {unread.tensor}, nor {unread.count - 1} like it"


def _modules(answer: Answer | None) -> dict[str, str]:
    modules: dict[str, list[str]] = {}
    for prefix, load in (("", answer.target), *answer.drafts.items()) if answer else ():
        for row in load.modules:
            name = f"{prefix}:{row.module}" if prefix else row.module
            kind = row.scheme or row.method
            modules.setdefault(name, []).append(f"{kind} x {row.count}" if row.count > 1 else kind)
    return {name: ", ".join(kinds) for name, kinds in modules.items()}
