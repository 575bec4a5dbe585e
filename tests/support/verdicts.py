"""Let every line's vLLM load the tiny checkpoints, and record what it does with each.

    python -m tests.support.verdicts [VARIANT ...]    # default: all; else the others' rows are kept

Writes records/verdicts.json. Needs root and the checkpoints: ``nox -s test -- --checkpoints``.
"""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.support.variants import Variant, cached_variant, load_variants
from vllm_forge.checkpoints.inspect.inspection import Report, applies, inspect
from vllm_forge.checkpoints.inspect.manifest import nearest
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.host import Runner, write_json
from vllm_forge.patches import read_dispositions
from vllm_forge.project import Project
from vllm_forge.proofs.environment import DISPOSITIONS, dry_load

VERDICTS = "records/verdicts.json"


def record_verdicts(project: Project, runner: Runner, names: Collection[str] = ()) -> Path:
    """Ask about ``names``, default all; write and return the record."""
    variants, matrix = load_variants(), project.matrix
    kept: dict[str, Any] = project.read_json(VERDICTS)["variants"] if names else {}
    profiles = {name: Profile.open(cached_variant(project, name)) for name in names or variants}
    answers = {line: dry_load(project, line, profiles, runner) for line in matrix.line}
    releases = {name: line.vllm for name, line in matrix.line.items()}
    dispositions = read_dispositions(project.root / DISPOSITIONS)
    for name, profile in profiles.items():
        cases = {line: answer[name] for line, answer in answers.items()}
        # What is broken is measured by what it was to be.
        artifact = nearest(profile) if variants[name].breaks else None
        report = inspect(profile, releases, dispositions, cases, artifact=artifact)
        kept[name] = row_of(variants[name], report, matrix.default_line)
    record = {
        "vllm": releases,
        "device": matrix.sku[matrix.line[matrix.default_line].skus[0]].device,
        "variants": {name: kept[name] for name in variants if name in kept},
    }
    write_json(project.root / VERDICTS, record, ensure_ascii=False)
    return project.root / VERDICTS


def row_of(variant: Variant, report: Report, default_line: str) -> dict[str, Any]:
    """A variant's row: findings about one of the lines, with those that do not cope with it.

    ``error`` is the class of what an inspection on the default line ends with.
    """
    findings: dict[tuple[str, str], dict[str, Any]] = {}
    for index, finding in enumerate(report.findings):
        if not any(applies(finding, verdict.vllm) for verdict in report.lines):
            continue
        row = finding.model_dump(mode="json", include={"check", "title", "effect"})
        row = findings.setdefault((finding.check, finding.title), row | {"counts_on": []})
        lines = {verdict.line for verdict in report.lines if index in verdict.findings}
        row["counts_on"] = sorted({*row["counts_on"], *lines})
    error = report.error(default_line)
    return {
        "about": variant.about,
        "breaks": variant.breaks,
        "artifact": report.artifact,
        "error": error and type(error).__name__,
        "findings": list(findings.values()),
        "lines": {
            verdict.line: verdict.model_dump(mode="json", include={"outcome", "checks", "why"})
            for verdict in report.lines
        },
    }


if __name__ == "__main__":
    print(record_verdicts(Project.find(), Runner(), sys.argv[1:]))
