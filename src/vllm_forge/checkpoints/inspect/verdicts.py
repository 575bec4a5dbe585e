"""The verdicts on every tiny variant, as a record in the repository and as a page made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from vllm_forge.checkpoints.errors import CheckpointDepartsError, CheckpointRefusedError
from vllm_forge.checkpoints.inspect.findings import Effect
from vllm_forge.checkpoints.inspect.verdict import Outcome, applies

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_forge.checkpoints.fixtures.variants import Variant
    from vllm_forge.checkpoints.inspect.inspection import Report

DATA, PAGE = "records/verdicts.json", "docs/generated/verdicts.md"
HEAD = """# Verdicts on the tiny checkpoints

Made by `nox -s verdicts` from [verdicts.json](verdicts.json). Each line's own vLLM, patched as its
images have it, loaded each checkpoint without its data ([checkpoints.md](checkpoints.md)), on a
declared {device}. No GPU was involved. A sound checkpoint leaves `nox -s inspect-checkpoint` with
exit code 0; 105 is "does not serve on the default line with what its config promises", 106 is
"serves, but departs from its manifest, its source or the model's own dtypes". Gates in parentheses
were found, and every line copes with them: by a patch, or in its release.

"""


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


def page(verdicts: Verdicts) -> str:
    """docs/generated/verdicts.md."""
    return HEAD.format(device=verdicts.device) + "\n".join(_lines(verdicts)) + "\n"


def _lines(verdicts: Verdicts) -> Iterator[str]:
    lines = list(verdicts.vllm)
    heads = [f"{name} (vLLM {version})" for name, version in verdicts.vllm.items()]
    yield f"| variant | {' | '.join(heads)} | gates | exit |"
    yield f"|{'---|' * (len(lines) + 3)}"
    for name, found in verdicts.variants.items():
        outcomes = [_short(found.lines[line].outcome) for line in lines]
        gates = ", ".join(dict.fromkeys(_gate(row) for row in found.findings)) or "-"
        yield f"| {name} | {' | '.join(outcomes)} | {gates} | {found.exit_code} |"
    yield ""
    yield "## Why"
    for name, found in verdicts.variants.items():
        yield ""
        yield f"**{name}**: {found.about}."
        yield ""
        for row in found.findings:
            yield f"* {_gate(row)} ({row.effect}): {row.title}"
        for text, where in _reasons(found.lines).items():
            yield f"* on {', '.join(where)}: `{text}`"
        if not found.findings and not any(r.why for r in found.lines.values()):
            yield "* nothing was found"


def _gate(row: FindingRow) -> str:
    return row.gate if row.counts_on else f"({row.gate})"


def _reasons(lines: Mapping[str, LineRow]) -> dict[str, list[str]]:
    """VLLM's own words, with the lines that said them."""
    told: dict[str, list[str]] = {}
    for line, found in lines.items():
        for reason in found.why:
            if "vLLM " in reason.partition(":")[0] or reason.startswith("vLLM"):
                told.setdefault(reason.replace("`", "'"), []).append(line)
    return told


def _short(outcome: Outcome) -> str:
    return {
        Outcome.WITH_MTP: "with MTP",
        Outcome.WITH_DSPARK: "with DSpark",
        Outcome.WITHOUT: "without MTP",
        Outcome.NOT: "**no**",
        Outcome.UNKNOWN: "unknown",
    }[outcome]
