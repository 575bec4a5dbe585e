"""A cell, resolved: what an image is made of, what runs in it, how it is served, what is known.

Read from files of the repository only; equal files give equal bytes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_forge.kernels.coverage.families import FINE
from vllm_forge.patches import read_series, read_tree_lock
from vllm_forge.receipts.lookup import image_receipts, preset_state
from vllm_forge.serve import (
    Selections,
    bare_command,
    build_command,
    built_image,
    container_command,
    presets_of,
    serving,
)
from vllm_forge.serve.needs import needs_of
from vllm_forge.sources import read_lock

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.kernels.selection.model import Answer, Choice
    from vllm_forge.matrix import ImageCell, Matrix
    from vllm_forge.receipts.lookup import ImageReceipts
    from vllm_forge.serve import BuiltImage, Serving
    from vllm_forge.sources import Lock

Table = dict[str, Any]
UNKNOWN, NONE = "unknown", "none"
SELECTED = (
    "attention", "experts", "clamp", "linear", "draft", "graphs", "kv_cache_dtype", "block_size",
)  # fmt: skip
# Raise when a key changes its name or meaning.
FORMAT = 1


def make_plan(root: Path, matrix: Matrix, cell: ImageCell) -> Table:
    """All that is known of a cell, as plain data.

    Raises:
        LockFileError, BuildRecordError, and what read_series raises.
    """
    lock = read_lock(root, cell.line_name, cell.line, matrix.base)
    image = built_image(cell)
    found = image_receipts(root, matrix, None if image is None else image.digest)
    selections = Selections(root, cell.line_name)
    items = [
        serving(matrix, cell, name, artifact)
        for name in presets_of(matrix, cell.sku_name).values()
        for artifact in matrix.preset[name].artifacts
    ]
    return {
        "format": FORMAT,
        "cell": _cell(cell),
        "pins": _pins(cell, lock),
        "series": _series(root, cell),
        "image": _image(cell, image, found),
        "lines": {name: _line(root, matrix, name, items) for name in matrix.line},
        "contract": _contract(root, cell, lock),
        "presets": [
            _preset(matrix, item, image, lock, found)
            | {"selection": _selection(matrix, item, cell.line_name, selections)}
            for item in items
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


def _image(cell: ImageCell, image: BuiltImage | None, found: ImageReceipts) -> Table:
    return {
        "digest": "not built here" if image is None else image.digest,
        "build": build_command(cell),
        "receipts": found.words(cell.root),
    }


def _line(root: Path, matrix: Matrix, name: str, items: Sequence[Serving]) -> Table:
    """What a line does with the SKU's first preset and artifact."""
    if not items:
        return {"refused": "the SKU has no preset"} | dict.fromkeys(SELECTED, NONE)
    sku = items[0].cell.sku_name
    if sku in matrix.line[name].unsupported:
        return {"refused": matrix.line[name].unsupported[sku]} | dict.fromkeys(SELECTED, NONE)
    return _selection(matrix, items[0], name, Selections(root, name))


def _selection(matrix: Matrix, item: Serving, line: str, selections: Selections) -> Table:
    """What the line's vLLM selects for a preset and an artifact; "unknown" is: nobody asked."""
    if (reason := item.why_not(line)) is not None:
        return {"refused": reason} | dict.fromkeys(SELECTED, NONE)
    answer = selections.of(matrix, item.preset_name, item.artifact_name)
    if answer is None:
        return {"refused": None} | dict.fromkeys(SELECTED, UNKNOWN)
    if answer.refused is not None:
        words = f"{answer.refused.kind}: {answer.refused.message}"
        return {"refused": words} | dict.fromkeys(SELECTED, NONE)
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


def _contract(root: Path, cell: ImageCell, lock: Lock) -> Table:
    """Kernel families that the SKU's presets need, as records/coverage/<line>.json has them."""
    path = root / "records" / "coverage" / f"{cell.line_name}.json"
    if not path.is_file():
        return {"state": f"{UNKNOWN}: no {path.relative_to(root)}", "families": {}}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["lock"] != lock.digest:
        return {"state": f"{UNKNOWN}: {path.relative_to(root)} is of another lock", "families": {}}
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
    matrix: Matrix, item: Serving, image: BuiltImage | None, lock: Lock, found: ImageReceipts
) -> Table:
    digest = None if image is None else image.digest
    run = container_command(matrix, item, digest=digest)
    return {
        "preset": item.preset_name,
        "artifact": item.artifact_name,
        "note": item.preset.note,
        "state": preset_state(item.cell.root, found.held, item.preset_name, item.artifact_name),
        "command": list(run.argv),
        "shell": run.text(),
        "bare": bare_command(matrix, item).text(),
        "needs": needs_of(matrix, lock, item).as_json(),
    }
