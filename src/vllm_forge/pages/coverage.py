"""docs/generated/coverage.md and the table of a line, from records/coverage."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_forge.kernels.coverage.families import FINE, Catalogue, catalogue
from vllm_forge.pages.markdown import table
from vllm_forge.project import Project


def coverage(project: Project) -> str:
    """The page of the lines that have a record."""
    paths = [f"records/coverage/{name}.json" for name in project.matrix.line]
    records = [project.read_json(path, _record) for path in paths if (project.root / path).exists()]
    return render(records, catalogue())


def _record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    render([record], catalogue())  # a fault of the record is an error that names its file
    return record


def render(records: Sequence[Mapping[str, Any]], rows: Catalogue) -> str:
    """The page, from the records of lines."""
    lines = []
    libraries = [
        "## Device code by library\n",
        "MB of machine code, PTX and LTO code in each library, by major version.",
    ]
    for record in records:
        skus = record["skus"]
        families = (
            [f"{rows.family[name].what} (`{name}`)", *(_cell(cells[sku]) for sku in skus)]
            for name, cells in record["coverage"].items()
        )
        grid = table(["family", *(f"{name} ({arch})" for name, arch in skus.items())], families)
        lines += [f"## Line {record['line']} (vLLM {record['vllm']})", "", grid]
        lines += _problems(record, rows)
        libraries += ["", f"### Line {record['line']}", "", _library_table(record["libraries"])]
    return "\n".join([*lines, *libraries])


def terminal(record: Mapping[str, Any], rows: Catalogue) -> str:
    """The table of one line with short names, and what is missing, as plain text."""
    skus = record["skus"]
    grid = [
        ["family", *(f"{name} {arch}" for name, arch in skus.items())],
        *(
            [name, *(_cell(cells[sku]).replace("\\*", "*").replace("**", "") for sku in skus)]
            for name, cells in record["coverage"].items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [f"line {record['line']}, vLLM {record['vllm']}"]
    for row in grid:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_problems(record, rows)]).rstrip() + "\n"


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["verdict"] is None:
        return "-"
    missing = cell["verdict"] == "missing"
    text = "missing" if missing else " + ".join(cell["codes"])
    if cell["needed_by"] is None:
        return f"({text})"
    if cell["exception"] is not None:
        return f"{text} \\*"
    return f"**{text}**" if missing else text


def _problems(record: Mapping[str, Any], rows: Catalogue) -> list[str]:
    """Exceptions with their reasons, and what is missing with what would help."""
    accepted: dict[tuple[str, str], list[str]] = {}
    broken: dict[tuple[str, str], list[str]] = {}
    for name, cells in record["coverage"].items():
        for sku, cell in cells.items():
            if cell["needed_by"] is None:
                continue
            if cell["exception"] is not None:
                accepted.setdefault((name, cell["exception"]), []).append(sku)
            elif cell["verdict"] not in FINE:
                broken.setdefault((name, cell["detail"]), []).append(sku)
    lines = [""]
    for (name, detail), skus in broken.items():
        lines.append(f"* **{name}** is missing on {', '.join(skus)}: {detail}. What would help:")
        lines.append(f"  {rows.family[name].fix}")
    for (name, reason), skus in accepted.items():
        lines.append(f"* \\* `{name}` on {', '.join(skus)}: {reason}")
    return [*lines, ""] if len(lines) > 1 else lines


def _library_table(libraries: Mapping[str, Mapping[str, Any]]) -> str:
    majors = ("7", "8", "9", "10", "11", "12")
    rows = []
    for name, row in sorted(libraries.items(), key=lambda item: -sum(item[1]["code"].values())):
        by_major = dict.fromkeys((*majors, "other", "PTX", "LTO"), 0)
        for key, size in row["code"].items():
            kind, _, target = key.partition(" ")
            major = target.rstrip("af")[:-1]
            column = major if major in majors else "other"
            by_major[column if kind == "cubin" else kind.upper()] += size
        sizes = [f"{size / 1e6:.1f}" if size else "" for size in by_major.values()]
        rows.append([f"`{name}`", f"{row['size'] / 1e6:.1f}", *sizes])
    head = ["library", "file", *(f"{major}.x" for major in majors), "other", "PTX", "LTO"]
    return table(head, rows)
