"""Sessions of benchmarks that are kept in records/bench/sessions, from their reports."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_forge.bench.errors import ResultFileError
from vllm_forge.host.files import file_digest
from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project

SESSIONS = "records/bench/sessions"
PAGE = "docs/generated/benchmarks.md"
REPORT = "report.json"
CHECK_HEAD = ["figure", "record", "other", "difference", "its bound", "agrees"]
CHART = "records/bench/published.svg"


def sessions(project: Project) -> str:
    """A section for each; ResultFileError if a record is not the one that was reported."""
    paths = sorted((project.root / SESSIONS).glob(f"*/{REPORT}"))
    return "\n\n".join(_section(project, path.parent.name) for path in paths) or "not run"


def _section(project: Project, name: str) -> str:
    folder = f"{SESSIONS}/{name}"
    document = project.read_json(f"{folder}/{REPORT}")
    for row in document["results"]:
        path = project.root / folder / row["record"]
        if file_digest(path) != row["sha256"]:
            what = "the record does not match the hash in its report"
            remedy = "restore it, or keep the session again: nox -s bench -- keep FOLDER"
            raise ResultFileError(what, where=path, remedy=remedy)
    return f"## {name}\n\n{report_text(document, f'../../{folder}/')}"


def report_text(document: Mapping[str, Any], charts: str = "") -> str:
    """A report as Markdown; ``charts``: their folder."""
    results = document["results"]
    kinds = dict.fromkeys((row["gpu"], row["driver"], row["image"]) for row in results)
    lines = [
        f"{escape(gpu)}, driver {escape(driver)}, image `{image}`." for gpu, driver, image in kinds
    ]
    if "began" in document:
        lines.append(f"Begun at {document['began']}.")
    rows = [list(map(escape, row["figures"].values())) for row in results]
    parts = [" ".join(lines), table(list(results[0]["figures"]), rows)]
    ran = ("; ".join(row["kernels"] or ["unknown"]) for row in results)
    cells = [
        [row["figures"]["result"], escape(row["gpu_state"]), escape(kernels)]
        for row, kernels in zip(results, ran, strict=True)
    ]
    parts.append(table(["result", "GPUs after the windows", "kernels, by the log"], cells))
    parts += _comparisons(document)
    parts += _counters(results)
    if attempts := document.get("refused"):
        cells = [[a["order"], a["arm"], a["state"], escape(a["error"])] for a in attempts]
        parts += ["Starts that were not measured:", table(["start", "arm", "state", "why"], cells)]
    if check := document.get("crosscheck"):
        cells = [[escape(name), *own] for name, *own in check_cells(check)]
        parts += [f"Against {escape(check['tool'])}:", table(CHECK_HEAD, cells)]
    parts.append("\n".join(f"![{name}]({charts}{name}.svg)" for name in document["charts"]))
    return "\n\n".join(parts)


def _comparisons(document: Mapping[str, Any]) -> Iterator[str]:
    """Verdicts; and what each interval excludes."""
    cells = []
    for row in document["comparisons"]:
        pair = f"{row['candidate']} against {row['reference']}, c={row['concurrency']}"
        if row["differs"]:
            pair += f" ({'; '.join(row['differs'])})"
        if row["refused"]:
            cells.append([pair, "", "refused", "", "", escape(row["refused"])])
        for gate in row["gates"]:
            excluded, value = "nothing", ""
            if gate["interval"]:
                value, low, high = (
                    f"{100 * x:+.2f} {gate['unit']}"
                    for x in (gate["difference"], *gate["interval"])
                )
                excluded = f"below {low}, above {high}"
            name = f"{gate['gate']}, {100 * gate['margin']:g} {gate['unit']}"
            cells.append([pair, name, gate["verdict"], value, excluded, escape(gate["why"])])
    if cells:
        yield table(["arms", "gate", "verdict", "difference", "excluded at 95 %", "why"], cells)


def _counters(results: list[dict[str, Any]]) -> Iterator[str]:
    cells = [
        [row["figures"]["result"], each["start"], each["drafts"],
         " / ".join(map(str, each["accepted"]))]
        for row in results
        for each in row["counters"]
    ]  # fmt: skip
    if cells:
        yield "Counters of a model whose acceptance is known; each equals the prediction:"
        yield table(["result", "start", "drafts", "accepted, by position"], cells)


def check_cells(check: Mapping[str, Any]) -> list[list[str]]:
    """Of a table with ``CHECK_HEAD``."""
    words = {True: "yes", False: "no", None: "unknown"}
    return [
        [row["figure"], *(f"{row[key]:.6g}" for key in ("own", "other", "difference")),
         "unknown" if row["bound"] is None else f"{row['bound']:.3g}", words[row["agrees"]]]
        for row in check["rows"]
    ]  # fmt: skip
