"""Notes of a release, in Markdown: made of its statements and of the checkout, nothing by hand."""

import tempfile
from pathlib import Path
from typing import Any

from vllm_forge.errors import shortened
from vllm_forge.host import git
from vllm_forge.images.record import differences
from vllm_forge.kernels.selection.record import differences as leaves
from vllm_forge.kernels.selection.record import read_selection, selection_path
from vllm_forge.matrix import ImageCell, gpus_of
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project
from vllm_forge.receipts.verification import preset_state, read_receipts
from vllm_forge.release.published import read_stack
from vllm_forge.release.verify import Report, Verification

MOST = 40  # differences of one kind


def make_notes(project: Project, verified: Verification, before: Verification | None) -> str:
    """Notes of an image that was verified; ``before``: the one to compare it with, as verified."""
    report, stack = verified.report, verified.stack
    cell = project.cell(stack["sku"], stack["line"])
    tags = ", ".join(report.decision["tags"]) if report.decision else report.stage
    rows = [(row["name"], escape(row["summary"]), row["bug"]) for row in stack["series"]]
    patches = table(["patch", "what", "bug"], rows) if rows else "None."
    waived = (
        f"**Released without tier {row['tier']}** (until {row['until']}): {escape(row['reason'])}\n"
        for row in report.decision.get("waivers", [])
    )
    lines = [
        f"# vLLM {stack['vllm']} for {cell.sku.device}: {tags}", "", f"`{report.where}`", "",
        *waived, *_runs_on(project, cell, report.digest), *_proven(report),
        *_does_not_run(project, cell), "## Patches", "", patches, "",
    ]  # fmt: skip
    if before is not None:
        lines += _changes(project, verified, before)
    lines += ["## Built by", "", table(["builder", "commit", "signed by"], (
        (row["builder"], row["commit"], row["signer"]) for row in report.builders))]  # fmt: skip
    end, supported = project.matrix.support_end(cell.line_name), ", ".join(project.matrix.line)
    lines += ["", "## Support", "", f"End of support for line {cell.line_name}: {end}.", "",
              f"Lines of the project now: {supported}."]  # fmt: skip
    return "\n".join(lines)


def _runs_on(project: Project, cell: ImageCell, digest: str) -> list[str]:
    matrix, receipts = project.matrix, read_receipts(project, image=digest)
    rows = []
    for name, preset in matrix.preset.items():
        for artifact in preset.artifacts if preset.sku == cell.sku_name else ():
            row, drafting = matrix.artifact[artifact], preset.speculative_tokens > 0
            if row.why_not(cell.line_name, cell.sku_name, drafting=drafting) is None:
                state = preset_state(project, receipts, cell, name, artifact)
                rows.append((name, gpus_of(matrix, name), artifact, state))
    driver = matrix.cuda[cell.line.cuda].driver
    head = f"{cell.sku.device}, NVIDIA driver {driver} or newer."
    return ["## Runs on", "", head, "", table(["preset", "GPUs", "artifact", "state"], rows), ""]


def _proven(report: Report) -> list[str]:
    rows = [
        (row["tier"], f"{row['count']} x {row['gpu']}", row["driver"], row["tests"],
         escape(row["margin"]), row["expires"][:10], row["signer"])
        for row in report.receipts
    ]  # fmt: skip
    head = ["tier", "GPUs", "driver", "tests", "closest margin", "until", "signed by"]
    return ["## Proven", "", table(head, rows) if rows else "Nothing was run on a GPU.", ""]


def _does_not_run(project: Project, cell: ImageCell) -> list[str]:
    matrix, line = project.matrix, cell.line_name
    rows = [f"* {sku}: {escape(reason)}" for sku, reason in cell.line.unsupported.items()]
    for name, artifact in matrix.artifact.items():
        if artifact.unasked is not None:
            rows.append(f"* {name}: {escape(artifact.unasked)}")
        for row in artifact.unserved:
            where = f" on {', '.join(row.skus)}" if row.skus else ""
            where += " with speculative decoding" if row.drafting else ""
            if line in row.lines:
                rows.append(f"* {name}{where}: {escape(row.reason)}")
    return [f"## Does not run on line {line}", "", *(rows or ["Nothing is known."]), ""]


def _changes(project: Project, after: Verification, before: Verification) -> list[str]:
    old, new = read_stack(before.published), after.stack
    parts = {
        "vLLM": tuple({key: x[key] for key in ("vllm", "tree")} for x in (old, new)),
        "Python packages": (old["packages"], new["packages"]),
        "Debian packages": (old["debian"], new["debian"]),
        "Patches": tuple({row["name"]: row["summary"] for row in x["series"]} for x in (old, new)),
    }
    lines = [f"## Changes since {before.published.tag or before.published.where}", ""]
    for what, (was, now) in parts.items():
        lines += _listed(what, [] if was == now else list(differences(was, now)))
    commits = [row.provenances[0].commit for row in (before, after) if row.provenances]
    lines += _listed("Kernel selection", _selection(project, new, commits))
    return [*lines, ""]


def _selection(project: Project, stack: dict[str, Any], commits: list[str]) -> list[str] | None:
    """How the recorded selection of a SKU differs between two commits; None: not known."""
    answers: list[dict[str, Any]] = []
    for commit in commits:
        path = f"records/selection/{stack['line']}.json"
        if (shown := git(project.root, "show", f"{commit}:{path}")) is None:
            return None
        with tempfile.TemporaryDirectory() as records:
            copy = selection_path(Path(records), stack["line"])
            copy.parent.mkdir()
            copy.write_text(shown)
            recorded = read_selection(Path(records), stack["line"])
        device = project.matrix.sku[stack["sku"]].device
        rows = recorded.of_device(device).answers
        answers.append({name: answer.model_dump(mode="json") for name, answer in rows.items()})
    if len(answers) != 2:  # noqa: PLR2004
        return None
    return [f"{path}: {old} -> {new}" for path, old, new in leaves(answers[0], answers[1])]


def _listed(what: str, rows: list[str] | None) -> list[str]:
    if rows is None:
        return [f"* {what}: not compared, its record of both commits is not here"]
    lines = [f"  * {escape(row)}" for row in shortened(rows, MOST)]
    return [f"* {what}: {len(rows) or 'nothing'} changed", *lines]
