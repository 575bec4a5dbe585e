"""A report: figures of results, and the arms of each session compared with its first one.

A session that is kept with the project is a folder: its records with their rows, its list of
starts, a report with its charts. The page is made of that report, which has the records' hashes.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_forge.bench import plots
from vllm_forge.bench.errors import InvalidResultError, ResultFileError
from vllm_forge.bench.exchange import check
from vllm_forge.bench.gate import gate
from vllm_forge.bench.results import LARGEST_ROWS, Arm, read_arm, summarize
from vllm_forge.bench.signed import SUFFIX
from vllm_forge.bench.statistics import ratio
from vllm_forge.bench.turns import JOURNAL, Journal
from vllm_forge.bench.validity import differences, intended, require_valid
from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path, printable, read_data, read_plain, write_json
from vllm_forge.host.files import file_digest
from vllm_forge.matrix.model import Gate

REPORT, PAGE, CROSSCHECK = "report.json", "report.md", "crosscheck.json"
CHECKED = ("figure", "own", "other", "bound")


def report(
    arms: Sequence[Arm], gates: Mapping[str, Gate]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The report, and its charts by name; InvalidResultError."""
    require_valid(*arms)
    summaries = [summarize(arm) for arm in arms]
    results = [
        {
            "record": arm.path.name,
            "sha256": file_digest(arm.path),
            "session": arm.result.session,
            "figures": {**summary.figures(), "later half": _later_half(arm)},
            **{key: getattr(arm.result.server, key) for key in ("image", "gpu", "driver")},
            "kernels": next((start.kernels for start in arm.result.starts if start.kernels), None),
            "gpu_state": _gpu_state(arm),
            "counters": list(_counters(arm)),
        }
        for arm, summary in zip(arms, summaries, strict=True)
    ]
    comparisons = list(_comparisons(arms, gates))
    charts = {"starts": plots.starts(summaries), "pareto": plots.pareto(summaries),
              "first-tokens": plots.first_tokens(summaries)}  # fmt: skip
    if any(summary.positions for summary in summaries):
        charts["positions"] = plots.positions(summaries)
    if any(one["interval"] for row in comparisons for one in row["gates"]):
        charts["verdicts"] = plots.verdicts(comparisons)
    if len({row["concurrency"] for row in comparisons}) > 1:
        charts["speed-up"] = plots.speed_up(comparisons)
    return {"results": results, "comparisons": comparisons}, charts


def _later_half(arm: Arm) -> str:
    """By how much the later half of a start's answers is faster than the first half."""
    logs = []
    for index, start in enumerate(arm.result.starts):
        rows = arm.of_start(index) if start.window else []
        middle = len(rows) // 2
        tokens, seconds = (
            [sum(getattr(row, name) for row in part) for part in (rows[:middle], rows[middle:])]
            for name in ("output_tokens", "seconds")
        )
        if all((*tokens, *seconds)):
            logs.append(math.log(tokens[1] / seconds[1] / tokens[0] * seconds[0]))
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*ratio(logs)) if len(logs) > 1 else "not run"


def _counters(arm: Arm) -> Iterator[dict[str, Any]]:
    """Of each start of a model whose acceptance is known; validity compared them with it."""
    for start in arm.result.starts:
        if start.window and start.window.predicted:
            change = start.window.change
            yield {"start": start.order, "drafts": change["drafts"],
                   "accepted": list(change["per_position"])}  # fmt: skip


def _gpu_state(arm: Arm) -> str:
    """The range of what nvidia-smi said after the windows."""
    states = [gpu for start in arm.result.starts if start.window for gpu in start.window.gpus_after]
    texts = []
    for name, unit in (("sm_mhz", "MHz"), ("celsius", "°C"), ("watts", "W")):
        if values := [value for gpu in states if (value := getattr(gpu, name)) is not None]:
            texts.append(f"{min(values):g} to {max(values):g} {unit}")
    return ", ".join(texts) or "unknown"


def _comparisons(arms: Sequence[Arm], gates: Mapping[str, Gate]) -> Iterator[dict[str, Any]]:
    """Each arm against the first that was started in its session, at the same concurrency."""
    groups: defaultdict[tuple[str, int], list[Arm]] = defaultdict(list)
    for arm in sorted(arms, key=lambda arm: min(start.order for start in arm.result.starts)):
        groups[arm.result.session, arm.result.conditions.concurrency].append(arm)
    for (session, concurrency), (reference, *others) in sorted(groups.items()):
        again = [
            arm
            for arm in others
            if arm.result.server == reference.result.server and not any(differences(reference, arm))
        ]
        for arm in others:
            row = {
                "session": session, "concurrency": concurrency, "refused": "", "gates": [],
                "reference": reference.result.arm, "candidate": arm.result.arm,
                "differs": intended(reference, arm),
            }  # fmt: skip
            repeat = next((one for one in again if one is not arm), None)
            try:
                row["gates"] = [one.as_json() for one in gate(gates, reference, arm, repeat)]
            except InvalidResultError as error:
                row["refused"] = error.what
            yield row


def keep(folder: Path, target: Path, gates: Mapping[str, Gate]) -> Path:
    """Copy a session's results to a folder of ``target`` that is named after it and its day.

    ResultFileError: its records have other starts than its list, or lack a concurrency; a file is
    a link; its crosscheck is of another record; another session would be replaced.
    """
    journal: Journal = read_data(
        folder / JOURNAL, Journal.model_validate, ResultFileError, what="list of starts",
        remedy="give the output folder of a session",
    )  # fmt: skip
    arms = [read_arm(path) for path in sorted(folder.glob("*-c*[0-9].json"))]
    starts = {(row.order, row.arm) for row in journal.attempts if row.state == "done"}
    kept: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)
    for arm in arms:
        names = {(start.order, arm.result.arm) for start in arm.result.starts}
        kept[arm.result.conditions.concurrency] |= names
    sessions, what = {arm.result.session for arm in arms}, ""
    if len(sessions) != 1 or any(names != starts for names in kept.values()):
        known = {concurrency: sorted(names) for concurrency, names in kept.items()}
        what = f"by concurrency, its records have {known}, its list of starts {sorted(starts)}"
    elif lacking := set(journal.concurrency) - kept.keys():
        what = f"there is no record at concurrency {', '.join(map(str, sorted(lacking)))}"
    if what:
        remedy = "give the whole output folder of one session"
        raise ResultFileError(what, where=folder, remedy=remedy)
    began = journal.attempts[0].began
    document, charts = report(arms, gates)
    others = [row for row in journal.attempts if row.state != "done"]
    document["began"] = began
    document["refused"] = [row.model_dump(mode="json", exclude={"began"}) for row in others]
    if (folder / CROSSCHECK).exists():
        document["crosscheck"] = _crosscheck(folder / CROSSCHECK, arms)
    files = {path.name: _read(path) for path in [folder / JOURNAL, *_files(arms)]}
    final = target / f"{sessions.pop()}-{began[:10]}"
    if (final / JOURNAL).exists() and _read(final / JOURNAL) != files[JOURNAL]:
        what = "another session of this name and day is kept there"
        remedy = "delete it, or run the session under another name"
        raise ResultFileError(what, where=final, remedy=remedy)
    with atomic_path(final) as aside:
        aside.mkdir()
        for file, content in files.items():
            (aside / file).write_bytes(content)
        write_report(aside, document, charts)
    return final


def _crosscheck(path: Path, arms: Sequence[Arm]) -> dict[str, Any]:
    """What `bench crosscheck` wrote about one of the arms; ResultFileError."""

    def parse(document: Any) -> dict[str, Any]:
        files = document["files"]
        if not any(files.get(arm.path.name) == file_digest(arm.path) for arm in arms):
            raise ValueError("its record is not in this folder, or was changed")
        rows = [check(**{key: row[key] for key in CHECKED}) for row in document["rows"]]
        return {"tool": printable(str(document["tool"])), "rows": rows}

    remedy = "write it again: nox -s bench -- crosscheck RECORD OTHER --output crosscheck.json"
    return read_data(path, parse, ResultFileError, what="crosscheck", remedy=remedy)


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, LARGEST_ROWS)
    except ValueError as error:
        remedy = "give the folder as the session left it"
        raise ResultFileError(f"cannot be kept: {error}", where=path, remedy=remedy) from None


def _files(arms: Sequence[Arm]) -> Iterator[Path]:
    for arm in arms:
        yield arm.path
        yield arm.path.with_name(arm.result.rows.file)
        if (signature := arm.path.with_suffix(SUFFIX)).exists():
            yield signature


def require_replaceable(folder: Path) -> None:
    """UsageError if ``folder`` has files of something else than a report, which would be lost."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in names if not name.endswith(".svg")} - {REPORT, PAGE}
    if others or (names and REPORT not in names):
        what = f"--output has other files than those of a report: {sorted(others or names)[0]}"
        raise UsageError(what, where=str(folder), remedy="give a new folder, or that of a report")


def write_report(folder: Path, document: dict[str, Any], charts: Mapping[str, bytes]) -> None:
    write_json(folder / REPORT, {**document, "charts": list(charts)})
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_bytes(chart)
