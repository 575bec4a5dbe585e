"""docs/generated/coverage.md, selection.md and late-stops.md, and tables of a line."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from vllm_forge.kernels.coverage.families import FINE, Catalogue, catalogue
from vllm_forge.kernels.selection.questions import GRID_ARGUMENTS, Answer, Choice, Draft
from vllm_forge.kernels.selection.record import (
    Rows,
    SelectionRecord,
    read_selection,
    selection_path,
)
from vllm_forge.pages.markdown import escape, table, terminal_table
from vllm_forge.project import Project

NONE = "-"
UNSHOWN = ("internal", "elsewhere")  # of the late stops: only counted
GRID_COLUMNS = ("SKU", "artifact", "experts", "clamp")
MORE_COLUMNS = ("linear", "attention", "draft", "refused")
PRESET_COLUMNS = (
    "preset", "artifact", "experts", "clamp", "draft", "decode graphs", "KV cache", "refused",
)  # fmt: skip
REASON_COLUMNS = ("SKU", "artifact", "taken", "passed over")


def selection(project: Project) -> str:
    """Of the record of each line that has one."""
    names = [name for name in project.matrix.line if selection_path(project.records, name).exists()]
    return render_selection([read_selection(project.records, name) for name in names])


def late_stops(project: Project) -> str:
    """docs/generated/late-stops.md: what covers the stops, and those that are not internal."""
    parts = []
    for name, line in project.matrix.line.items():
        path = f"records/late-stops/{name}.json"
        if not (project.root / path).exists():
            continue
        record = project.read_json(path)
        counts = Counter(cover for *_, cover in record["stops"])
        covers = [[cover, counts[cover], text] for cover, text in record["covers"].items()]
        shown = [
            [f"`{where}`", escape(text), cover]
            for where, _, text, cover in record["stops"]
            if cover not in UNSHOWN
        ]
        parts += [
            f"\n## Line {name}: vLLM {line.vllm}\n",
            table(["cover", "places", "is"], covers),
            "",
            table(["place", "statement", "cover"], shown),
        ]
    return "\n".join(parts).strip("\n")


def render_selection(lines: Sequence[SelectionRecord]) -> str:
    parts = []
    for recorded in lines:
        line, vllm = recorded.line_name, recorded.vllm
        grid = list(_grid_rows(recorded.rows))
        others = [row for row in _grid_rows(recorded.published) if row not in grid]
        with_ = dict.fromkeys(name for row in grid for name in row if name.startswith("with "))
        columns = (*GRID_COLUMNS, *with_, *MORE_COLUMNS)
        presets = [
            {"preset": name, "artifact": artifact} | _cells(answer)
            for (kind, name, artifact, *_), answer in _places(recorded.rows)
            if kind == "preset"
        ]
        parts += [
            f"\n## Line {line}: every SKU with every artifact\n",
            f"At `{' '.join(GRID_ARGUMENTS)}`, with MTP where the artifact has it. vLLM {vllm}, "
            f"asked on {recorded.made}.\n",
            _markdown(columns, grid),
            f"\n### vLLM {vllm} as published\n",
            "The rows in which the release without the line's series answers otherwise.\n",
            _markdown(columns, others),
            f"\n## Line {line}: presets\n",
            _markdown(PRESET_COLUMNS, presets),
            f"\n## Line {line}: why not another backend\n",
            "What vLLM said of the candidates for the routed experts that it passed over.\n",
            _markdown(REASON_COLUMNS, _reasons(recorded.rows)),
        ]
    return "\n".join(parts).strip("\n")


def selection_table(recorded: SelectionRecord) -> Table:
    """The grid of a line, for a terminal."""
    columns = ("SKU", "artifact", "experts", "attention", "draft", "refused")
    rows = []
    for sku, artifact, answer, others in _grid(recorded.rows):
        experts = [_moe(answer), *(f"{n}: {_with(answer, o)}" for n, o in others.items())]
        cells = _cells(answer) | {"SKU": sku, "artifact": artifact, "experts": "\n".join(experts)}
        rows.append([cells[name] for name in columns])
    title = f"line {recorded.line_name}, vLLM {recorded.vllm}"
    return terminal_table(columns, rows, title=title, show_lines=True)


def _places(rows: Rows) -> Iterator[tuple[tuple[str, ...], Answer]]:
    return ((tuple(question.name.split("/")), answer) for question, answer in rows)


def _grid(rows: Rows) -> Iterator[tuple[str, str, Answer, dict[str, Answer]]]:
    """SKU, artifact, its answer, and the answers with a variable set."""
    answers = dict(_places(rows))
    for place, answer in answers.items():
        if place[0] == "grid" and len(place) == len(("grid", "SKU", "artifact")):
            others = {p[-1]: other for p, other in answers.items() if p[:-1] == place}
            yield place[1], place[2], answer, others


def _grid_rows(rows: Rows) -> Iterator[dict[str, str]]:
    for sku, artifact, answer, others in _grid(rows):
        changes = {f"with `{name}`": _with(answer, other) for name, other in others.items()}
        yield {"SKU": sku, "artifact": artifact} | _cells(answer) | changes


def _cells(answer: Answer) -> dict[str, str]:
    moe, graphs, engine, refused = answer.moe, answer.cuda_graphs, answer.engine, answer.refused
    cells = dict.fromkeys(
        ("experts", "clamp", "draft", "decode graphs", "KV cache", "refused"), NONE
    )
    cells |= {"linear": _chosen(answer.linear), "attention": _chosen(answer.attention)}
    if moe is not None:
        cells["experts"] = f"{_chosen(moe)} ({_scheme(answer.experts_scheme)})"
        cells["clamp"] = moe.clamp
    if answer.draft is not None:
        cells["draft"] = _scheme(answer.draft.experts_scheme)
        if answer.draft.moe is not None:
            cells["draft"] += f": {_moe(answer.draft)}"
    if graphs is not None:
        largest = max(graphs.sizes, default=0)
        cells["decode graphs"] = f"{largest} of {graphs.needed}, {graphs.mode}"
    if engine is not None:
        cells["KV cache"] = f"{engine.kv_cache_dtype}, {engine.block_size}"
    if refused is not None:
        cells["refused"] = f"{refused.kind}: {refused.message}"
    return cells


def _with(answer: Answer, other: Answer) -> str:
    if other.unknown_environment:
        return "unknown to this vLLM"
    return "the same" if _moe(answer) == _moe(other) else _moe(other)


def _moe(part: Answer | Draft) -> str:
    return NONE if part.moe is None else f"{_chosen(part.moe)}, clamp {part.moe.clamp}"


def _scheme(name: str | None) -> str:
    """A method's class without what all of them have in their names."""
    if name is None:
        return NONE
    return name.removesuffix("Method").removesuffix("MoE").removesuffix("Fused") or name


def _chosen(choice: Choice | None) -> str:
    return NONE if choice is None or choice.chosen is None else choice.chosen


def _reasons(rows: Rows) -> Iterator[dict[str, str]]:
    for sku, artifact, answer, _ in _grid(rows):
        if answer.moe is not None:
            passed = [f"{row.candidate}: {row.reason}" for row in answer.moe.rejected]
            cells = (sku, artifact, _chosen(answer.moe), "<br>".join(passed) or NONE)
            yield dict(zip(REASON_COLUMNS, cells, strict=True))


def _markdown(columns: Sequence[str], rows: Iterable[dict[str, str]]) -> str:
    cells = [[row.get(name, NONE) for name in columns] for row in rows]
    return table(columns, cells) if cells else "None."


def coverage(project: Project) -> str:
    return render_coverage(coverages(project), catalogue())


def coverages(project: Project) -> list[Mapping[str, Any]]:
    """The record of each line that has one."""
    paths = [f"records/coverage/{name}.json" for name in project.matrix.line]
    rows = catalogue()
    # Rendered once here: a fault of the record is an error that names its file.
    return [
        project.read_json(path, lambda record: render_coverage([record], rows) and record)
        for path in paths
        if (project.root / path).exists()
    ]


def render_coverage(records: Sequence[Mapping[str, Any]], rows: Catalogue) -> str:
    lines = []
    libraries = [
        "## Device code by library\n",
        "MB of machine code, PTX and LTO code in each library, by major version.",
    ]
    for record in records:
        skus = record["skus"]
        families = (
            [f"{rows.family[name].what} (`{name}`)", *(_codes(cells[sku]) for sku in skus)]
            for name, cells in record["coverage"].items()
        )
        grid = table(["family", *(f"{name} ({arch})" for name, arch in skus.items())], families)
        lines += [f"## Line {record['line']} (vLLM {record['vllm']})", "", grid]
        lines += _problems(record, rows)
        libraries += ["", f"### Line {record['line']}", "", _library_table(record["libraries"])]
    return "\n".join([*lines, *libraries])


def coverage_table(record: Mapping[str, Any], rows: Catalogue) -> str:
    """The table of one line with short names, and what is missing, as plain text."""
    skus = record["skus"]
    grid = [["family", *(f"{name} {arch}" for name, arch in skus.items())]]
    for name, cells in record["coverage"].items():
        grid.append([name, *(plain_codes(cells[sku]) for sku in skus)])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [f"line {record['line']}, vLLM {record['vllm']}"]
    for row in grid:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, *_problems(record, rows)]).rstrip() + "\n"


def plain_codes(cell: Mapping[str, Any]) -> str:
    """What a family runs as on a SKU, as text."""
    return _codes(cell).replace("\\*", "*").replace("**", "")


def _codes(cell: Mapping[str, Any]) -> str:
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
