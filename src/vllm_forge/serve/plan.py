"""The plan of a cell: its pins, series, image, kernels, contract, commands and receipts.

Read from files of the repository only; equal files give equal bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_forge.kernels.coverage.families import FINE
from vllm_forge.kernels.selection.questions import preset_question
from vllm_forge.kernels.selection.record import read_selection, selection_path
from vllm_forge.matrix import serve_arguments
from vllm_forge.patches import read_series, read_tree_lock
from vllm_forge.receipts.lookup import image_receipts, preset_state
from vllm_forge.serve.command import bare_command, build_command, build_record, container_command
from vllm_forge.serve.deployment import find_deployment, needs_of, presets_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.kernels.selection.model import Answer, Choice
    from vllm_forge.matrix import ImageCell
    from vllm_forge.project import Project
    from vllm_forge.receipts.lookup import ImageReceipts
    from vllm_forge.serve.deployment import Deployment
    from vllm_forge.sources import Lock

Table = dict[str, Any]
UNKNOWN, NONE = "unknown", "none"
SELECTED = (
    "attention", "experts", "clamp", "linear", "draft", "graphs", "kv_cache_dtype", "block_size",
)  # fmt: skip
# Raise when a key changes its name or meaning.
FORMAT = 1


def make_plan(project: Project, cell: ImageCell) -> Table:
    """A cell's plan, as plain data.

    Raises:
        LockFileError, BuildRecordError, and the errors of read_series.
    """
    matrix = project.matrix
    lock = project.lock(cell.line_name)
    image = build_record(project.root, cell)
    digest = None if image is None else image.digest
    receipts = image_receipts(project, digest)
    selections = Selections(project, cell.line_name)
    deployments = [
        find_deployment(matrix, cell, name, artifact)
        for name in presets_of(matrix, cell.sku_name).values()
        for artifact in matrix.preset[name].artifacts
    ]
    return {
        "format": FORMAT,
        "cell": _cell(cell),
        "pins": _pins(cell, lock),
        "series": _series(project.root, cell),
        "image": {
            "digest": "not built here" if digest is None else digest,
            "build": build_command(cell),
            "receipts": receipts.words(project.root),
        },
        "lines": {name: _line(project, name, deployments) for name in matrix.line},
        "contract": _contract(project, cell, lock),
        "presets": [
            _preset(project, deployment, digest, receipts)
            | {"needs": needs_of(matrix, lock, deployment).as_json()}
            | {"selection": _selection(deployment, cell.line_name, selections)}
            for deployment in deployments
        ],
    }


def as_json(plan: Table) -> str:
    """The plan as JSON, keys sorted."""
    return json.dumps(plan, indent=1, sort_keys=True)


def _cell(cell: ImageCell) -> Table:
    sku = cell.sku
    return {
        "sku": cell.sku_name,
        "line": cell.line_name,
        "image": cell.name,
        "arch": sku.arch,
        "compute_capability": sku.compute_capability,
        "device": sku.device,
        "memory_gb": sku.memory_gb,
        "development": sku.development,
    }


def _pins(cell: ImageCell, lock: Lock) -> Table:
    line = cell.line
    return {
        "vllm": line.vllm,
        "torch": line.torch,
        "python": line.python,
        "cuda": line.cuda,
        "lock": {
            "path": line.lock,
            "sha256": lock.digest,
            "wheels": len(lock.wheels),
            "bytes": sum(wheel.size for wheel in lock.wheels),
        },
        "packages": {wheel.name: wheel.version for wheel in lock.wheels},
    }


def _series(root: Path, cell: ImageCell) -> Table:
    folder = root / cell.line.series
    return {
        "path": cell.line.series,
        "tree": read_tree_lock(folder, cell.line_name).result,
        "patches": [
            {"name": patch.name, "summary": patch.summary, "proves": patch.proves}
            for patch in read_series(folder)
        ],
    }


def _line(project: Project, name: str, deployments: Sequence[Deployment]) -> Table:
    """What a line selects for the SKU's first preset and artifact."""
    if not deployments:
        return {"refused": "the SKU has no preset"} | dict.fromkeys(SELECTED, NONE)
    sku = deployments[0].cell.sku_name
    if sku in project.matrix.line[name].unsupported:
        reason = project.matrix.line[name].unsupported[sku]
        return {"refused": reason} | dict.fromkeys(SELECTED, NONE)
    return _selection(deployments[0], name, Selections(project, name))


def _selection(deployment: Deployment, line: str, selections: Selections) -> Table:
    """What the line's vLLM selects for a deployment; "unknown" if it was not asked."""
    if (reason := deployment.why_not(line)) is not None:
        return {"refused": reason} | dict.fromkeys(SELECTED, NONE)
    answer = selections.of(deployment)
    if answer is None:
        return {"refused": None} | dict.fromkeys(SELECTED, UNKNOWN)
    if answer.refused is not None:
        reason = f"{answer.refused.kind}: {answer.refused.message}"
        return {"refused": reason} | dict.fromkeys(SELECTED, NONE)
    draft, engine = answer.draft, answer.engine
    values = (
        _chosen(answer.attention),
        _chosen(answer.moe),
        NONE if answer.moe is None else answer.moe.clamp,
        _chosen(answer.linear),
        NONE if draft is None else f"k={draft.speculative_tokens} {_chosen(draft.moe)}",
        _graphs(answer),
        NONE if engine is None else engine.kv_cache_dtype,
        NONE if engine is None else engine.block_size,
    )
    return {"refused": None} | dict(zip(SELECTED, values, strict=True))


def _chosen(choice: Choice | None) -> str:
    return NONE if choice is None or choice.chosen is None else choice.chosen


def _graphs(answer: Answer) -> Table | str:
    graphs = answer.cuda_graphs
    if graphs is None:
        return NONE
    largest = max(graphs.sizes, default=0)
    return {
        "mode": graphs.mode,
        "sizes": list(graphs.sizes),
        "largest": largest,
        "needed": graphs.needed,
        "covers": largest >= graphs.needed,
    }


def _contract(project: Project, cell: ImageCell, lock: Lock) -> Table:
    """Kernel families that the SKU's presets need, by records/coverage/<line>.json."""
    path = project.records / "coverage" / f"{cell.line_name}.json"
    name = path.relative_to(project.root)
    if not path.is_file():
        return {"state": f"{UNKNOWN}: no {name}", "families": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["lock"] != lock.digest:
        return {"state": f"{UNKNOWN}: {name} is of another lock", "families": {}}
    rows = {name: cells.get(cell.sku_name) for name, cells in record["coverage"].items()}
    families = {
        name: {key: row[key] for key in ("verdict", "codes", "exception")}
        for name, row in rows.items()
        if row is not None and row["needed_by"] is not None
    }
    broken = [
        name
        for name, row in families.items()
        if row["verdict"] not in FINE and row["exception"] is None
    ]
    return {"state": f"broken: {', '.join(broken)}" if broken else "holds", "families": families}


def _preset(
    project: Project, deployment: Deployment, digest: str | None, receipts: ImageReceipts
) -> Table:
    preset, artifact = deployment.preset_name, deployment.artifact_name
    run = container_command(project.matrix, deployment, digest=digest)
    return {
        "preset": preset,
        "artifact": artifact,
        "note": deployment.preset.note,
        "state": preset_state(project.root, receipts.held, preset, artifact),
        "command": list(run.argv),
        "shell": run.text(),
        "bare": bare_command(project.matrix, deployment).text(),
    }


class Selections:
    """A line's recorded answers for plans; without a record, everything is unknown.

    Lint checks whether they belong to the current series and lock.

    Raises:
        SelectionFileError: malformed record.
    """

    def __init__(self, project: Project, line_name: str) -> None:
        self._matrix = project.matrix
        known = selection_path(project.records, line_name).is_file()
        rows = read_selection(project.records, line_name).rows if known else ()
        self._rows = {question.name: (question, answer) for question, answer in rows}

    def of(self, deployment: Deployment) -> Answer | None:
        """The answer for a deployment; None if the preset was not asked as it is now."""
        name = preset_question(deployment.preset_name, deployment.artifact_name)
        if name not in self._rows:
            return None
        question, answer = self._rows[name]
        arguments, environment = serve_arguments(self._matrix, deployment.preset_name)
        environment = {**self._matrix.sku[deployment.preset.sku].env, **environment}
        same = question.arguments == tuple(arguments) and question.environment == environment
        return answer if same else None
