"""Tables and charts of results."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import condition, rows_of, write_result
from vllm_forge.bench import plots
from vllm_forge.bench.arms import published
from vllm_forge.bench.errors import InvalidResultError, ResultFileError
from vllm_forge.bench.plots import _crossings
from vllm_forge.bench.report import CROSSCHECK, keep, report
from vllm_forge.bench.results import read_arm, summarize
from vllm_forge.bench.signed import SUFFIX
from vllm_forge.bench.turns import JOURNAL
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host import write_json
from vllm_forge.host.files import file_digest
from vllm_forge.matrix import Gate
from vllm_forge.pages.sessions import SESSIONS, sessions
from vllm_forge.project import Project
from vllm_forge.serve.command import bare_command
from vllm_forge.serve.deployment import find_deployment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

A, B = (0, 3, 4, 7, 8), (1, 2, 5, 6, 9)  # ABBA
GATES = {"throughput": Gate(measure="throughput", margin=0.02),
         "acceptance": Gate(measure="acceptance", margin=0.01)}  # fmt: skip
ROWS = [{"figure": "mean_ttft_ms", "own": 1.0, "other": 2.0, "bound": 0.5, "agrees": True}]


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    paths = [
        write_result(tmp_path / f"{arm}{c}.json", rows_of(c, items=20, starts=2),
                     orders=(0, 3), edit=condition(concurrency=c))
        for arm, c in (("mtp", 1), ("plain", 8))
    ]  # fmt: skip
    return list(map(str, paths))


def test_summary_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [
        row.model_copy(
            update={"output_tokens": 91, "drafted": 100, "accepted": 80, "positions": (49, 31)}
        )
        for row in rows_of(1, items=10)
    ]
    found = summarize(read_arm(write_result(tmp_path / "a.json", rows)))
    assert found.rates == {0: 10 * 91 / 1.25}
    assert (found.ttft, found.acceptance) == (0.1, 0.8)
    assert found.tpot == pytest.approx(0.01)
    assert list(found.figures().values()) == [
        "a, c=8", "chat-code", "2" * 12, "1", "1", "728.0", "728.0", "not run", "0.100", "10.00",
        "80.00%", "98.00% / 62.00%",
    ]  # fmt: skip


def test_answers_alone_have_no_speed(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"ttft": None}) for row in rows_of(1, items=5)]
    path = write_result(tmp_path / "a.json", rows, edit=lambda record: record["starts"][0].clear()
                        or record["starts"][0].update(order=0))  # fmt: skip
    assert list(summarize(read_arm(path)).figures().values())[5:] == ["not run"] * 7
    assert main(["bench", "report", str(path), f"--output={tmp_path / 'report'}"]) == 0


@pytest.mark.parametrize(
    ("faster", "expected"),
    [((1.2, 1.2), "+20.0% [+20.0%, +20.0%]"), ((1.1, 1.3), "+19.6% [-58.6%, +245.6%]")],
)
def test_servers_that_warm_up_in_the_window_are_seen(
    faster: tuple[float, float], expected: str, tmp_path: Path
) -> None:
    rows = [
        row.model_copy(update={"seconds": row.seconds * faster[row.start]} if n % 20 < 10 else {})
        for n, row in enumerate(rows_of(1, items=20, starts=2))
    ]
    path = write_result(tmp_path / "a.json", rows, orders=(0, 3))
    (result,) = report([read_arm(path)], {})[0]["results"]
    assert result["figures"]["later half"] == expected


def test_one_start_says_nothing_of_warming_up(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", rows_of(1, items=20))
    (result,) = report([read_arm(path)], {})[0]["results"]
    assert result["figures"]["later half"] == "not run"


def test_report_has_the_same_bytes_each_time(results: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / "x", tmp_path / "y"]
    for folder in folders:
        assert main(["bench", "report", *results, f"--output={folder}"]) == 0
    names = {path.name for path in folders[0].iterdir()}
    assert names == {"report.md", "report.json", "starts.svg", "pareto.svg", "first-tokens.svg",
                     "positions.svg"}  # fmt: skip
    for name in names:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert b"mtp1, c=1" in (folders[0] / "starts.svg").read_bytes()
    assert b"c=8" in (folders[0] / "pareto.svg").read_bytes()


@pytest.mark.parametrize("name", ["mine.txt", "a.svg"])
def test_report_replaces_nothing_but_a_report(
    name: str, results: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of a session's records is a likely mistake."""
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / name).write_text("mine")
    assert main(["bench", "report", *results, f"--output={folder}"]) == UsageError.exit_code
    assert f"other files than those of a report: {name}" in capsys.readouterr().err
    (folder / name).unlink()
    for _ in range(2):
        assert main(["bench", "report", *results, f"--output={folder}"]) == 0


def test_invalid_result_is_not_reported(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"finish": "error"}) for row in rows_of(1, items=5)]
    path = write_result(tmp_path / "a.json", rows)
    code = main(["bench", "report", str(path), f"--output={tmp_path / 'report'}"])
    assert code == InvalidResultError.exit_code
    assert not (tmp_path / "report").exists()


def served(folder: Path, arm: str, orders: tuple[int, ...], *, c: int = 8, **planted: Any) -> Path:
    rows = rows_of(orders[0] + c, items=30, starts=5, **planted)
    path = folder / f"{arm}-c{c}.json"

    def edit(record: dict[str, Any]) -> None:
        condition(concurrency=c)(record)
        record["arm"] = arm

    return write_result(path, rows, orders=orders, edit=edit)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """What a session leaves: 5 starts of each arm, and one that was refused."""
    folder = tmp_path / "output"
    served(folder, "plain", A)
    served(folder, "mtp", B, speed=1.1)
    rows = [
        {"order": order, "arm": arm, "state": "done", "began": "2026-11-30T10:00:00+00:00"}
        for order, arm in sorted(
            [(order, "plain") for order in A] + [(order, "mtp") for order in B]
        )
    ]
    cold = {**rows[0], "state": "failed", "error": "the caches were cold | <b>"}
    write_json(folder / JOURNAL, {"plan_sha256": "0", "attempts": [cold, *rows]})
    files = {"plain-c8.json": file_digest(folder / "plain-c8.json")}
    write_json(folder / CROSSCHECK, {"tool": "vllm bench serve", "files": files, "rows": ROWS})
    return folder


def test_signatures_are_kept_with_their_records(output: Path, tmp_path: Path) -> None:
    signature = (output / "mtp-c8.json").with_suffix(SUFFIX)
    signature.write_text("{}")
    assert (keep(output, tmp_path / SESSIONS, GATES) / signature.name).read_text() == "{}"


def test_kept_session_has_a_page_of_its_verdicts(output: Path, tmp_path: Path) -> None:
    final = keep(output, tmp_path / SESSIONS, GATES)
    assert final.name == "s1-2026-11-30"
    page = sessions(Project(tmp_path))
    assert "| mtp against plain, c=8 | throughput, 2 % | pass | +1" in page
    assert re.search(r"acceptance, 1 pp \| pass \| -0\.12 pp \| below -1\.08 pp", page)
    assert "below +" in page  # the interval is above no difference
    assert "| 0 | plain | failed | the caches were cold \\| \\<b\\> |" in page
    assert "| mean\\_ttft\\_ms | 1 | 2 | 1 | 0.5 | no |" in page  # whatever the file says
    charts = {path.name for path in final.glob("*.svg")}
    assert charts == {"starts.svg", "pareto.svg", "first-tokens.svg", "positions.svg",
                      "verdicts.svg"}  # fmt: skip
    assert all(f"(../../{SESSIONS}/{final.name}/{name})" in page for name in charts)
    assert read_arm(final / "mtp-c8.json").result == read_arm(output / "mtp-c8.json").result
    record = json.loads((final / "mtp-c8.json").read_text())
    write_json(final / "mtp-c8.json", {**record, "session": "other"})
    with pytest.raises(ResultFileError, match="does not match the hash in its report"):
        sessions(Project(tmp_path))


def other_session(output: Path, name: str, *arms: str) -> None:
    for path in (output / f"{arm}-c8.json" for arm in arms):
        write_json(path, {**json.loads(path.read_text()), "session": name})


def two_levels(output: Path) -> None:
    """As if the records of the other one had been left out."""
    journal = json.loads((output / JOURNAL).read_text())
    write_json(output / JOURNAL, {**journal, "concurrency": [8, 32]})


def other_list(output: Path, **fields: object) -> None:
    journal = json.loads((output / JOURNAL).read_text())
    rows = [{**row, **fields} for row in journal["attempts"]]
    write_json(output / JOURNAL, {**journal, "attempts": rows})


def other_check(output: Path, **fields: object) -> None:
    check = json.loads((output / CROSSCHECK).read_text())
    write_json(output / CROSSCHECK, {**check, "rows": [{**ROWS[0], **fields}]})


def signed_by_link(output: Path) -> None:
    """It would be published with the results."""
    (output.parent / "private").write_text("mine")
    (output / "mtp-c8.json").with_suffix(SUFFIX).symlink_to(output.parent / "private")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda output: served(output, "mtp", (1, 2, 5, 6, 10)), "its list of starts"),
        (lambda output: other_list(output, state="running"), "its list of starts"),
        (lambda output: other_list(output, arm="mtp"), "its list of starts"),
        (lambda output: served(output, "plain", A, c=1), "its list of starts"),  # without mtp's
        (two_levels, "no record at concurrency 32"),
        (signed_by_link, "not a plain file"),
        (lambda output: other_session(output, "s2", "mtp"), "its list of starts"),
        (lambda output: (output / "mtp-c8.json").unlink(), "its list of starts"),
        (lambda output: (output / JOURNAL).unlink(), "missing list of starts"),
        (lambda output: other_session(output, "../s", "mtp", "plain"), "session: String should"),
        (lambda output: other_list(output, began="/../../../x"), "began: String should"),
        (lambda output: write_json(output / CROSSCHECK, {"files": {}}), "or was changed"),
        (lambda output: write_json(output / CROSSCHECK, []), "invalid crosscheck"),
        (lambda output: other_check(output, figure=1), "figure: Input should be a valid string"),
        (lambda output: other_check(output, own=math.nan), "own: Input should be a finite number"),
        (lambda output: other_check(output, bound=True), "bound: Input should be a valid number"),
    ],
)
def test_part_of_a_session_is_not_kept(
    fault: Callable[[Path], object], message: str, output: Path, tmp_path: Path
) -> None:
    fault(output)
    with pytest.raises(ResultFileError, match=message):
        keep(output, tmp_path / SESSIONS, GATES)
    assert not (tmp_path / SESSIONS).exists()


def test_kept_session_is_replaced_only_by_itself(output: Path, tmp_path: Path) -> None:
    """Two runs of one recipe on one day, perhaps on two hosts, have the same name."""
    first = keep(output, tmp_path / SESSIONS, GATES)
    assert keep(output, tmp_path / SESSIONS, GATES) == first
    other_list(output, seconds=5)
    with pytest.raises(ResultFileError, match="another session of this name and day"):
        keep(output, tmp_path / SESSIONS, GATES)
    assert json.loads((first / JOURNAL).read_text())["attempts"][1].get("seconds", 0) == 0


def test_report_compares_the_arms_of_a_session(tmp_path: Path) -> None:
    """At each concurrency; what cannot be compared says why."""
    paths = [served(tmp_path, arm, orders, c=c, speed=speed)
             for c, faster in ((1, 1.4), (32, 0.7))
             for arm, orders, speed in (("plain", A, 1.0), ("mtp", B, faster))]  # fmt: skip
    paths.append(served(tmp_path, "late", (20, 21, 22, 23, 24), c=32))
    document, charts = report([read_arm(path) for path in paths], GATES)
    rows = {(row["candidate"], row["concurrency"]): row for row in document["comparisons"]}
    assert {key: row["reference"] for key, row in rows.items()} == {
        ("mtp", 1): "plain", ("mtp", 32): "plain", ("late", 32): "plain"
    }  # fmt: skip
    words = {key: [gate["verdict"] for gate in row["gates"]] for key, row in rows.items()}
    assert words["mtp", 1] == ["pass", "pass"]
    assert words["mtp", 32][0] == "fail"
    assert "not in turns" in rows["late", 32]["refused"]
    assert b"1 at c=" in charts["speed-up"]


@pytest.mark.parametrize(
    ("change", "measured"),
    [({}, True), ({"gpu": "NVIDIA H200"}, False), ({"argv": ["vllm", "serve", "x"]}, False)],
    ids=["as published", "another GPU", "another command"],
)
def test_measured_is_held_against_published(
    change: dict[str, Any], measured: bool, root: Path, tmp_path: Path
) -> None:
    """The card has 1104.89 tokens a second of the preset at c=8; nothing else was run."""
    project = Project(root)
    deployment = find_deployment(project.matrix, project.cell("b300"), "mtp", None)
    server = {"gpu": "NVIDIA B300 SXM6 AC", "argv": bare_command(deployment).argv, **change}
    path = write_result(tmp_path / "a.json", rows_of(1, items=30),
                        edit=lambda record: record["server"].update(server))  # fmt: skip
    arm = read_arm(path)
    rows = dict(published(project, [arm]))
    found = {name: ratio for name, ratio in rows.items() if ratio is not None}
    (rate,) = arm.rates().values()
    name = "mtp, chat-code, c=8: 1104.89 tok/s"
    assert found == ({name: pytest.approx(rate / 1104.89)} if measured else {})
    assert plots.published(list(rows.items())).count(b"not run") == len(rows) - measured > 10


def test_charts_of_nothing_are_drawn_or_left_out(tmp_path: Path) -> None:
    """Without rows matplotlib has no axis; five prompts decide no acceptance."""
    assert plots.published([]).startswith(b"<?xml")
    paths = [write_result(tmp_path / f"{arm}.json", rows_of(orders[0], items=5, starts=5),
                          orders=orders) for arm, orders in (("plain", A), ("mtp", B))]  # fmt: skip
    document, charts = report(list(map(read_arm, paths)), {"acceptance": GATES["acceptance"]})
    assert [gate["interval"] for gate in document["comparisons"][0]["gates"]] == [None]
    assert "verdicts" not in charts


def test_crossing_is_on_a_logarithmic_axis() -> None:
    assert _crossings([1, 4, 16], [1.5, 1.25, 0.75]) == [pytest.approx(8)]
    assert _crossings([1, 4], [1.5, 1.25]) == []
