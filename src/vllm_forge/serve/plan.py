"""The plan of a cell: its pins, series, image, kernels, contract, commands and receipts.

Read from files of the repository and the build's records; equal files give equal bytes.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vllm_forge.host import gigabytes
from vllm_forge.images.checks import recorded_downloads
from vllm_forge.images.record import built_digest, carries_kernels
from vllm_forge.kernels.coverage.families import AT_START, FINE
from vllm_forge.kernels.selection.questions import Answer, Choice
from vllm_forge.kernels.selection.record import Rows
from vllm_forge.matrix import ImageCell
from vllm_forge.patches import known_issues, read_dispositions, read_series, read_tree_lock
from vllm_forge.project import Project
from vllm_forge.receipts.verification import preset_state, read_receipts
from vllm_forge.serve.command import bare_command, build_command, plain_command
from vllm_forge.serve.deployment import (
    Deployment,
    find_deployment,
    needs_of,
    presets_of,
    recorded_rows,
)
from vllm_forge.sources import Lock

Plan = dict[str, Any]
UNKNOWN, NONE = "unknown", "none"
SELECTED = (
    "attention", "experts", "clamp", "linear", "draft", "graphs", "kv_cache_dtype", "block_size",
)  # fmt: skip
# Raise when a key changes its name or meaning.
FORMAT = 2


def make_plan(project: Project, cell: ImageCell) -> Plan:
    matrix = project.matrix
    lock = project.lock(cell.line_name)
    digest = built_digest(project.root / "dist" / f"{cell.name}.json")
    receipts = read_receipts(project, datetime.now(UTC), image=digest)
    answers = {name: recorded_rows(project, name) for name in matrix.line}
    deployments = [
        find_deployment(matrix, cell, name, artifact)
        for name in presets_of(matrix, cell.sku_name).values()
        for artifact in matrix.preset[name].artifacts
    ]
    sku, line, rows = cell.sku, cell.line, answers[cell.line_name]
    series = project.root / line.series
    of_sku = ("arch", "compute_capability", "device", "memory_gb", "development")
    return {
        "format": FORMAT,
        "cell": {"sku": cell.sku_name, "line": cell.line_name, "image": cell.name}
        | {key: getattr(sku, key) for key in of_sku},
        "pins": {key: getattr(line, key) for key in ("vllm", "torch", "python", "cuda")}
        | {
            "lock": {
                "path": line.lock,
                "sha256": lock.digest,
                "wheels": len(lock.wheels),
                "bytes": sum(wheel.size for wheel in lock.wheels),
            },
            "packages": {wheel.name: wheel.version for wheel in lock.wheels},
        },
        "series": {
            "path": line.series,
            "tree": read_tree_lock(series, cell.line_name).result,
            "patches": [
                {"name": patch.name, "summary": patch.summary, "proves": patch.proves}
                for patch in read_series(series)
            ],
        },
        "image": {
            "digest": "not built here" if digest is None else digest,
            "build": build_command(matrix, cell),
            "receipts": receipts.lines(project.root),
            "network": first_start(project, cell) or NONE,
        },
        "chat": chat_note(cell) or UNKNOWN,
        "known_issues": issue_notes(project, cell),
        # Of the SKU's first preset and artifact.
        "lines": {
            name: _selection(project, deployments[0], name, answers[name])
            if deployments
            else _refused("the SKU has no preset")
            for name in matrix.line
        },
        "contract": _contract(project, cell, lock),
        "presets": [
            {
                "preset": (preset := deployment.preset_name),
                "artifact": (artifact := deployment.artifact_name),
                "note": deployment.preset.note,
                "state": preset_state(project, receipts, cell, preset, artifact),
                "command": list((run := plain_command(deployment, digest)).argv),
                "shell": run.text(),
                "bare": bare_command(deployment).text(),
                "needs": needs_of(lock, deployment, rows).as_json(),
                "selection": _selection(project, deployment, cell.line_name, rows),
            }
            for deployment in deployments
        ],
    }


def _refused(reason: str) -> Plan:
    return {"refused": reason} | dict.fromkeys(SELECTED, NONE)


def _selection(project: Project, deployment: Deployment, line: str, rows: Rows) -> Plan:
    """What a line's vLLM selects for a deployment; "unknown" if it was not asked."""
    unsupported = project.matrix.line[line].unsupported.get(deployment.cell.sku_name)
    if (reason := unsupported or deployment.why_not(line)) is not None:
        return _refused(reason)
    answer = deployment.recorded(rows)
    if answer is None:
        return {"refused": None} | dict.fromkeys(SELECTED, UNKNOWN)
    if answer.refused is not None:
        return _refused(f"{answer.refused.kind}: {answer.refused.message}")
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


def _graphs(answer: Answer) -> Plan | str:
    graphs = answer.cuda_graphs
    if graphs is None:
        return NONE
    largest = max(graphs.sizes, default=0)
    return {
        "mode": graphs.mode,
        "piecewise": graphs.piecewise,
        "sizes": list(graphs.sizes),
        "largest": largest,
        "needed": graphs.needed,
        "covers": largest >= graphs.needed,
    }


def _contract(project: Project, cell: ImageCell, lock: Lock) -> Plan:
    """Kernel families that the SKU's presets need, by records/coverage/<line>.json."""
    name = f"records/coverage/{cell.line_name}.json"
    if not (project.root / name).is_file():
        return {"state": f"{UNKNOWN}: no {name}", "families": {}}

    def parse(record: dict[str, Any]) -> Plan:
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
        state = f"broken: {', '.join(broken)}" if broken else "holds"
        return {"state": state, "families": families}

    return dict(project.read_json(name, parse))


def first_start(project: Project, cell: ImageCell) -> str:
    """What is to be said of the first start of a cell's image; empty if it needs no network."""
    if carries_kernels(project.root / "dist" / f"{cell.name}.json"):
        return ""
    names = ", ".join(recorded_downloads(project, cell))
    return f"{AT_START}: {names}; or build with --kernels" if names else ""


def chat_note(cell: ImageCell) -> str:
    """What a chat request gets that sets nothing; "" where the line's row does not say."""
    chat = cell.line.chat
    if chat is None:
        return ""
    does, other = ("thinks", "false") if chat.thinking else ("does not think", "true")
    place = ":".join(chat.source.split(":")[:2])
    return (
        f"{does} unless a request has "
        f'"chat_template_kwargs": {{"thinking": {other}}} (vLLM {cell.line.vllm}, {place})'
    )


def issue_notes(project: Project, cell: ImageCell) -> list[dict[str, str]]:
    """Reports from elsewhere that nobody has settled on this line and SKU."""
    entries = read_dispositions(project.root / "patches" / "vllm")
    return [
        {"about": entry.about, "title": entry.title, "settled_by": decision.undecided or ""}
        for entry, decision in known_issues(entries, cell.line_name, cell.sku_name)
    ]


def page(plan: Plan) -> Iterator[RenderableType]:
    """The parts of a plan for a terminal, one below the other."""
    cell, pins, series, image = plan["cell"], plan["pins"], plan["series"], plan["image"]
    kind = "development, " if cell["development"] else ""
    yield Text(
        f"{cell['image']}: {cell['sku']} ({kind}{cell['arch']}, {cell['device']}), "
        f"line {cell['line']}",
        style="bold",
    )
    lock = pins["lock"]
    rows = [
        ("pins", f"vLLM {pins['vllm']}, torch {pins['torch']}, Python {pins['python']}, "
                 f"CUDA {pins['cuda']}"),
        ("lock", f"{lock['path']}: {lock['wheels']} wheels, {gigabytes(lock['bytes'])}, "
                 f"sha256 {lock['sha256'][:12]}"),
        ("series", f"{series['path']}: {len(series['patches'])} patches, tree "
                   f"{series['tree'][:12]}"),
        *(("", f"{patch['name']}: {patch['summary']}") for patch in series["patches"]),
        ("image", f"{image['digest']}; {image['build']}"),
        ("network", image["network"]),
        ("receipts", ", ".join(image["receipts"]) or "none: nothing was run"),
        ("chat", plan["chat"]),
        *(("undecided", f"{issue['about']}: {issue['title']}") for issue in plan["known_issues"]),
    ]  # fmt: skip
    yield _grid(rows)
    yield Text("\nLines, for the first preset and artifact of this SKU", style="bold")
    yield _lines(plan["lines"])
    yield Text("\nPresets", style="bold")
    yield _presets(plan["presets"])
    yield Text("\nContract", style="bold")
    families = [("state", plan["contract"]["state"])]
    for name, row in plan["contract"]["families"].items():
        accepted = f"; accepted: {row['exception']}" if row["exception"] else ""
        families.append((name, f"{row['verdict']} {' + '.join(row['codes'])}{accepted}"))
    yield _grid(families)
    if plan["presets"]:
        yield from _needs(plan["presets"][0])


def _lines(lines: Plan) -> Table:
    table = _table("line", "experts", "clamp", "attention", "FP8 linear")
    for name, row in lines.items():
        refused = row["refused"] and [Text(f"refused: {row['refused']}", style="yellow")]
        kernels = (row[key] for key in ("experts", "clamp", "attention", "linear"))
        table.add_row(name, *(refused or kernels))
    return table


def _presets(presets: list[Plan]) -> Table:
    table = _table(
        "preset", "artifact", "GPUs", "memory", "experts", "clamp", "draft", "graphs", "state"
    )  # fmt: skip
    for row in presets:
        choice = row["selection"]
        if choice.get("refused"):
            words: list[Any] = [Text(f"refused: {choice['refused']}", style="red"), "", "", ""]
        else:
            graphs = choice["graphs"]
            if isinstance(graphs, dict):
                sign, eager = (">=", "") if graphs["covers"] else ("<", ": eager")
                eager += "" if graphs["piecewise"] else "; prefill eager"
                graphs = f"{graphs['largest']} {sign} {graphs['needed']}{eager}"
            words = [choice["experts"], choice["clamp"], choice["draft"], graphs]
        memory = row["needs"]["memory"].partition(":")[0]
        gpus = str(row["needs"]["gpus"])
        table.add_row(row["preset"], row["artifact"], gpus, memory, *words, row["state"])
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold", no_wrap=title in {"preset", "artifact"})
    return table


def _needs(row: Plan) -> Iterator[RenderableType]:
    needs = row["needs"]
    yield Text(f"\n{row['preset']}, {row['artifact']}", style="bold")
    yield _grid(
        [
            ("note", row["note"]),
            ("GPUs", f"{needs['gpus']}; driver {needs['driver']}"),
            ("GPU memory", f"{needs['memory']}"),
            ("disk", f"{_size(needs['disk_bytes'])}: image {_size(needs['image_bytes'])}, weights "
                     f"{_size(needs['weights_bytes'])}"),
            ("RAM", f"{_size(needs['ram_bytes'])} at least; {_size(needs['page_cache_bytes'])} to "
                    "read the disk only once"),
            ("/dev/shm", _size(needs["shm_bytes"])),  # noqa: S108
        ]
    )  # fmt: skip
    yield Text(row["shell"])


def _grid(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _size(value: int | str) -> str:
    return gigabytes(value) if isinstance(value, int) else value
