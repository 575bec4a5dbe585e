"""A plan as a person reads it in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vllm_forge.host import gigabytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

UNKNOWN = "unknown"


def page(plan: dict[str, Any]) -> RenderableType:
    """The plan's parts, one below the other."""
    return Group(*_parts(plan))


def _parts(plan: dict[str, Any]) -> Iterator[RenderableType]:
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
        ("receipts", ", ".join(image["receipts"]) or "none: nothing was run"),
    ]  # fmt: skip
    yield _grid(rows)
    yield Text("\nLines, for the first preset and artifact of this SKU", style="bold")
    yield _lines(plan["lines"])
    yield Text("\nPresets", style="bold")
    yield _presets(plan["presets"])
    yield Text("\nContract", style="bold")
    yield _grid(_contract(plan["contract"]))
    yield from _first(plan["presets"])


def _lines(lines: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("line", "experts", "clamp", "attention", "FP8 linear"):
        table.add_column(title, overflow="fold")
    for name, row in lines.items():
        if row["refused"]:
            table.add_row(name, Text(f"refused: {row['refused']}", style="yellow"))
        else:
            table.add_row(name, row["experts"], row["clamp"], row["attention"], row["linear"])
    return table


def _presets(presets: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("preset", "artifact", "GPUs", "experts", "clamp", "draft", "graphs", "state"):
        table.add_column(title, overflow="fold", no_wrap=title in {"preset", "artifact"})
    for row in presets:
        choice = row["selection"]
        if choice.get("refused"):
            words: list[Any] = [Text(f"refused: {choice['refused']}", style="red"), "", "", ""]
        else:
            words = [choice["experts"], choice["clamp"], choice["draft"], _graphs(choice["graphs"])]
        table.add_row(
            row["preset"], row["artifact"], str(row["needs"]["gpus"]), *words, row["state"]
        )
    return table


def _graphs(graphs: Any) -> str:
    if not isinstance(graphs, dict):
        return str(graphs)
    return (
        f"{graphs['largest']} >= {graphs['needed']}"
        if graphs["covers"]
        else (f"{graphs['largest']} < {graphs['needed']}: eager")
    )


def _contract(contract: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("state", contract["state"])]
    for name, row in contract["families"].items():
        accepted = f"; accepted: {row['exception']}" if row["exception"] else ""
        rows.append((name, f"{row['verdict']} {' + '.join(row['codes'])}{accepted}"))
    return rows


def _first(presets: list[dict[str, Any]]) -> Iterator[RenderableType]:
    if not presets:
        return
    row = presets[0]
    needs = row["needs"]
    yield Text(f"\n{row['preset']}, {row['artifact']}", style="bold")
    yield _grid(
        [
            ("note", row["note"]),
            ("GPUs", f"{needs['gpus']}; weights {_size(needs['weights_per_gpu_bytes'])} of "
                     f"{_size(needs['memory_per_gpu_bytes'])} each; driver {needs['driver']}"),
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
