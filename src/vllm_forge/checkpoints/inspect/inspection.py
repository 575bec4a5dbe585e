"""An inspection: look, take apart, run every gate, compare with a manifest, judge each line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from vllm_forge.checkpoints.inspect import checks_config, checks_tensors
from vllm_forge.checkpoints.inspect.findings import Effect, Finding
from vllm_forge.checkpoints.inspect.manifest import (
    against_record,
    config_facts,
    departures,
    nearest,
)
from vllm_forge.checkpoints.inspect.profile import Drafter, Part, Profile
from vllm_forge.checkpoints.inspect.values import ValueRow, compare
from vllm_forge.checkpoints.inspect.verdict import LineVerdict, Outcome, judge
from vllm_forge.matrix import FrozenModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_forge.checkpoints.inspect.dry_load import Answer
    from vllm_forge.patches.dispositions import Disposition

SHOWN = {Effect.DEPARTS, Effect.LOSES}


class PartRow(FrozenModel):
    """One part of the model, as it is stored."""

    part: Part
    draft: bool
    tensors: int
    dtypes: dict[str, int]
    formats: dict[str, int]


class Report(FrozenModel):
    """Everything that an inspection says. Stable: a change of meaning changes ``schema``.

    Attributes:
        place: where it was read.
        read: headers, or the index alone.
        artifact: the manifest that it was compared with, None for none.
        asked: that manifest was asked for, rather than the nearest one taken.
        drafter: what lies under ``mtp.``.
        tensors, draft_tensors, shards, bytes: counts; bytes is None without headers.
        config: facts of quantization_config, see manifest.config_facts.
        parts: what is stored how.
        values: decoded weights against the source, where that was asked for.
        findings: from bad to harmless.
        lines: a verdict each.
    """

    schema_version: Literal[2] = 2
    place: str
    read: Literal["headers", "index"]
    artifact: str | None
    asked: bool
    drafter: Drafter
    promised: int
    tensors: int
    draft_tensors: int
    shards: int
    bytes: int | None
    config: dict[str, Any]
    parts: tuple[PartRow, ...]
    values: tuple[ValueRow, ...] = ()
    findings: tuple[Finding, ...]
    lines: tuple[LineVerdict, ...]

    def line(self, name: str) -> LineVerdict:
        """The verdict of one line."""
        return next(verdict for verdict in self.lines if verdict.line == name)

    def serves(self, name: str, *, without_mtp: bool) -> bool:
        """Whether it serves there, with its MTP block unless that is waived."""
        outcome = self.line(name).outcome
        if outcome is Outcome.WITH_MTP:
            return True
        waived = without_mtp or not self.promised
        return waived and outcome in (Outcome.WITHOUT, Outcome.WITH_DSPARK)

    @property
    def departures(self) -> list[Finding]:
        """What is not as its manifest, its source or the model's own dtypes say."""
        return [finding for finding in self.findings if finding.effect in SHOWN]


def find_all(
    profile: Profile,
    artifact: str | None = None,
    source: Profile | None = None,
    *,
    digests: bool = False,
) -> list[Finding]:
    """Everything that is found without a vLLM, from bad to harmless."""
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
    """Inspect a checkpoint.

    Args:
        profile: the checkpoint.
        lines: line -> vLLM release.
        dispositions: what was decided about each upstream change.
        answers: line -> its vLLM's dry load, where one was made.
        artifact: manifest to compare with; None: the nearest one.
        source: the checkpoint that it was made from, to compare dtypes.
        values: how many weights of each part to decode and compare with the source's; 0: all;
            None: none.
        digests: read all data and compare it with the SHA-256 in the checkpoint's manifest.json.
    """
    compared = artifact or nearest(profile)
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
                name,
                vllm,
                profile,
                findings=findings,
                dispositions=dispositions,
                answer=answers.get(name),
            )
            for name, vllm in lines.items()
        ),
    )


def _parts(profile: Profile) -> Iterator[PartRow]:
    for draft in (False, True):
        for part in Part:
            dtypes = profile.dtypes.get((part, draft))
            if dtypes is None:
                continue
            formats = profile.formats_of[part, draft]
            yield PartRow(
                part=part,
                draft=draft,
                tensors=sum(dtypes.values()),
                dtypes=dict(sorted(dtypes.items())),
                formats={kind.value: count for kind, count in sorted(formats.items())},
            )
