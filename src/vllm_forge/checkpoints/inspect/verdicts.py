"""The verdicts on every tiny variant, as the record records/verdicts.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vllm_forge.checkpoints.errors import CheckpointDepartsError, CheckpointRefusedError
from vllm_forge.checkpoints.inspect.findings import Effect
from vllm_forge.checkpoints.inspect.verdict import Outcome, applies

if TYPE_CHECKING:
    from vllm_forge.checkpoints.fixtures.variants import Variant
    from vllm_forge.checkpoints.inspect.inspection import Report

DATA = "records/verdicts.json"


class Record(BaseModel):
    """Base of the records; their fields are the keys of verdicts.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LineRow(Record):
    """One line's verdict."""

    outcome: Outcome
    gates: tuple[str, ...]
    why: tuple[str, ...]


class FindingRow(Record):
    """One finding; ``counts_on``: lines that do not cope with it."""

    gate: str
    title: str
    effect: Effect
    counts_on: tuple[str, ...]


class VariantRow(Record):
    """One variant.

    Attributes:
        about, breaks: as variants.toml has them.
        artifact: the manifest that it was compared with.
        exit_code: of an inspection on the default line.
        findings: each finding that is about one of the lines.
        lines: a verdict each.
    """

    about: str
    breaks: str
    artifact: str | None
    exit_code: int
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
    """What an inspection says of a variant."""
    told: dict[tuple[str, str], FindingRow] = {}
    for index, finding in enumerate(report.findings):
        if not any(applies(finding, verdict.vllm) for verdict in report.lines):
            continue
        lines = tuple(v.line for v in report.lines if index in v.findings)
        key = (finding.gate, finding.title)
        before = told[key].counts_on if key in told else ()
        told[key] = FindingRow(
            gate=finding.gate,
            title=finding.title,
            effect=finding.effect,
            counts_on=tuple(sorted({*before, *lines})),
        )
    return VariantRow(
        about=variant.about,
        breaks=variant.breaks,
        artifact=report.artifact,
        exit_code=exit_code(report, default_line),
        findings=tuple(told.values()),
        lines={
            verdict.line: LineRow(outcome=verdict.outcome, gates=verdict.gates, why=verdict.why)
            for verdict in report.lines
        },
    )


def exit_code(report: Report, line: str, *, without_mtp: bool = False) -> int:
    """Of the command, for that line."""
    if not report.serves(line, without_mtp=without_mtp):
        return CheckpointRefusedError.exit_code
    return CheckpointDepartsError.exit_code if report.departures else 0
