"""The verdicts on every tiny variant, as the record records/verdicts.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import CheckpointDepartsError, CheckpointRefusedError
from vllm_forge.checkpoints.inspect.findings import CheckId, Effect, Record
from vllm_forge.checkpoints.inspect.verdict import Outcome, applies

if TYPE_CHECKING:
    from vllm_forge.checkpoints.fixtures.variants import Variant
    from vllm_forge.checkpoints.inspect.inspection import Report

DATA = "records/verdicts.json"


class LineRow(Record):
    """One line's verdict."""

    outcome: Outcome
    checks: tuple[CheckId, ...]
    why: tuple[str, ...]


class FindingRow(Record):
    """One finding; ``counts_on``: lines that do not cope with it."""

    check: CheckId
    title: str
    effect: Effect
    counts_on: tuple[str, ...]


class VariantRow(Record):
    """One variant.

    Attributes:
        about, breaks: as variants.toml has them.
        artifact: the manifest that it was compared with.
        error: class of the error that an inspection on the default line ends with.
        findings: each finding that is about one of the lines.
        lines: a verdict each.
    """

    about: str
    breaks: str
    artifact: str | None
    error: str | None
    findings: tuple[FindingRow, ...]
    lines: dict[str, LineRow]


class Verdicts(Record):
    """All of it.

    Attributes:
        vllm: line -> release.
        device: what was declared.
        variants: by name.
    """

    vllm: dict[str, str]
    device: str
    variants: dict[str, VariantRow]

    def text(self) -> str:
        """JSON, as committed."""
        return self.model_dump_json(indent=1) + "\n"


def variant_row(variant: Variant, report: Report, default_line: str) -> VariantRow:
    """What an inspection found in a variant."""
    error = error_of(report, default_line)
    rows: dict[tuple[str, str], FindingRow] = {}
    for index, finding in enumerate(report.findings):
        if not any(applies(finding, verdict.vllm) for verdict in report.lines):
            continue
        lines = tuple(v.line for v in report.lines if index in v.findings)
        key = (finding.check, finding.title)
        before = rows[key].counts_on if key in rows else ()
        rows[key] = FindingRow(
            check=finding.check,
            title=finding.title,
            effect=finding.effect,
            counts_on=tuple(sorted({*before, *lines})),
        )
    return VariantRow(
        about=variant.about,
        breaks=variant.breaks,
        artifact=report.artifact,
        error=error and error.__name__,
        findings=tuple(rows.values()),
        lines={
            verdict.line: LineRow(outcome=verdict.outcome, checks=verdict.checks, why=verdict.why)
            for verdict in report.lines
        },
    )


def error_of(
    report: Report, line: str, *, without_mtp: bool = False
) -> type[CheckpointRefusedError | CheckpointDepartsError] | None:
    """The error that the command ends with on that line; None for none."""
    if not report.serves(line, without_mtp=without_mtp):
        return CheckpointRefusedError
    return CheckpointDepartsError if report.departures else None
