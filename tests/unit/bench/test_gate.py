"""Equal arms pass, planted regressions fail, too little data is undecided, faults are refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import CONDITIONS, condition, rows_of, write_result
from vllm_forge.bench.claims import CLAIMS, read_claims, read_run
from vllm_forge.bench.errors import (
    GateFailedError,
    GateUndecidedError,
    InvalidResultError,
    ResultFileError,
)
from vllm_forge.bench.gate import Outcome, Word, gate, require_pass
from vllm_forge.bench.results import Row, parse_lines, read_arm
from vllm_forge.bench.validity import intended, require_valid
from vllm_forge.cli import main
from vllm_forge.matrix import Gate
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ITEMS = 1500
CUT = {"finish": "length", "output_tokens": CONDITIONS["max_tokens"]}
A, B = (0, 3, 4, 7, 8), (1, 2, 5, 6, 9)  # ABBA
STRICT = Gate(measure="score", score="strict", margin=0.01)


@pytest.fixture
def matrix(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Answers of one artifact, twice."""
    folder = tmp_path_factory.mktemp("answers")
    return (
        write_result(folder / "reference.json", rows_of(1, items=ITEMS)),
        write_result(folder / "again.json", rows_of(2, items=ITEMS)),
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five starts of one server."""
    rows = rows_of(1, items=100, starts=5)
    return write_result(tmp_path_factory.mktemp("serve") / "a.json", rows, orders=A)


def compare(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, str]]:
    code = main(["bench", "gate", "--json", *map(str, argv)])
    text = capsys.readouterr().out
    answer, _ = json.JSONDecoder().raw_decode(text)
    assert {name: row["image"] for name, row in answer["arms"].items()}.keys() >= {"reference"}
    for row in answer["gates"]:
        assert not row["interval"] or row["interval"][0] <= row["difference"] <= row["interval"][1]
    return code, {row["gate"]: row["verdict"] for row in answer["gates"]}


def test_equal_answers_pass(
    matrix: Path, reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, again = reference
    candidate = write_result(tmp_path / "b.json", rows_of(3, items=ITEMS))
    gates = ("--gate=strict", "--gate=flexible")
    code, found = compare(capsys, first, candidate, f"--repeat={again}", *gates)
    assert code == 0, found
    assert found == {"strict": "pass", "flexible": "pass"}


@pytest.mark.parametrize(
    ("regression", "failing"),
    [({"right": 0.93}, {"strict", "flexible"}), ({"strict": 0.97}, {"strict"})],
    ids=["answer", "form"],
)
@pytest.mark.usefixtures("matrix")
def test_planted_loss_of_answers_fails(
    regression: dict[str, Any], failing: set[str], reference: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    candidate = write_result(tmp_path / "b.json", rows_of(3, items=ITEMS, **regression))
    code, found = compare(capsys, reference[0], candidate, f"--repeat={reference[1]}")
    assert code == GateFailedError.exit_code
    assert {name for name, word in found.items() if word == "fail"} == failing


def test_remedy_of_a_loss_is_not_more_data() -> None:
    row = Outcome(gate="strict", margin=0.01, unit="pp", word=Word.FAIL, reason="-3 pp")
    with pytest.raises(GateFailedError) as failed:
        require_pass([row])
    assert "keep the reference" in failed.value.remedy
    with pytest.raises(GateUndecidedError) as undecided:
        require_pass([replace(row, word=Word.UNDECIDED)])
    assert "how much data" in undecided.value.remedy


def test_lost_answers_are_counted_by_cause(reference: tuple[Path, Path], tmp_path: Path) -> None:
    rows = rows_of(1, items=ITEMS)
    right = [number for number, row in enumerate(rows) if row.scores["strict"]]
    form, cut = right[:30], right[30:35]
    for number in form:
        rows[number] = rows[number].model_copy(
            update={"scores": {"strict": False, "flexible": True}}
        )
    for number in cut:
        rows[number] = rows[number].model_copy(update={"scores": {}, **CUT})
    candidate = read_arm(write_result(tmp_path / "b.json", rows))
    (outcome,) = gate({"strict": STRICT}, read_arm(reference[0]), candidate)
    assert "lost 35: 30 by form, 5 truncated" in outcome.reason


@pytest.mark.parametrize(
    ("regression", "failing"),
    [
        ({}, set()),
        ({"speed": 0.95}, {"throughput"}),
        ({"acceptance": 0.76}, {"acceptance", "positions"}),
    ],
    ids=["equal", "throughput", "acceptance"],
)
@pytest.mark.usefixtures("matrix")
def test_server_with_a_planted_loss_fails(
    regression: dict[str, Any], failing: set[str], served: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = rows_of(9, items=100, starts=5, **regression)
    candidate = write_result(tmp_path / "b.json", rows, orders=B)
    gates = ("--gate=throughput", "--gate=acceptance", "--gate=positions")
    code, found = compare(capsys, served, candidate, *gates)
    assert code == (GateFailedError.exit_code if failing else 0), found
    assert {name for name, word in found.items() if word == "fail"} == failing


def later(rows: list[Row], number: int) -> list[Row]:
    """The same answers, at other times."""
    return [row.model_copy(update={"seconds": 1 + number / 1000}) for row in rows]


@pytest.mark.parametrize("starts", [1, 5])
def test_acceptance_of_restarts_is_not_that_of_prompts(starts: int, tmp_path: Path) -> None:
    """All prompts of a start move alike, by 2 pp: a loss of 1 pp by pairs of starts is chance."""
    arms = []
    for n, orders in enumerate((A, B)):
        rows = rows_of(n, items=100, starts=starts)
        for place, row in enumerate(rows):
            less = round(row.drafted * (0.01 * n + 0.02 * ((row.start + n) % 2)))
            first, second = row.positions
            rows[place] = row.model_copy(
                update={"accepted": row.accepted - less, "positions": (first - less, second)}
            )
        arms.append(read_arm(write_result(tmp_path / f"{n}.json", rows, orders=orders[:starts])))
    (outcome,) = gate({"acceptance": Gate(measure="acceptance", margin=0.001)}, *arms)
    assert outcome.word is Word.UNDECIDED
    assert ("two or more of each arm" in outcome.reason) == (starts == 1)
    assert outcome.test is None or outcome.test.difference.high > 0


def of_gpus(number: int, *differs: str) -> Callable[[dict[str, Any]], None]:
    def edit(record: dict[str, Any]) -> None:
        record["server"]["gpus"] = number
        record["differs"] = differs

    return edit


@pytest.fixture(scope="module")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A server on one GPU, and one on two that is 1.5 times as fast."""
    folder = tmp_path_factory.mktemp("gpus")
    return [
        write_result(folder / f"tp{number}.json", rows_of(number, items=30, starts=5, speed=speed),
                     orders=orders, edit=of_gpus(number, "gpus"))
        for number, speed, orders in ((1, 1.0, A), (2, 1.5, B))
    ]  # fmt: skip


@pytest.mark.usefixtures("matrix")
def test_declared_gpus_are_compared_for_the_server_and_for_a_gpu(
    two_gpus: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    gates = ("--gate=throughput", "--gate=throughput-per-gpu")
    code, found = compare(capsys, *two_gpus, *gates)
    assert code == GateFailedError.exit_code
    assert found == {"throughput": "pass", "throughput-per-gpu": "fail"}
    assert main(["bench", "gate", *map(str, two_gpus), *gates]) == code
    shown = capsys.readouterr()
    assert "the arms differ in GPUs: 1 against 2" in shown.err
    assert "-25." in shown.out


@pytest.mark.parametrize("declared", [0, 1, 2])
def test_gpus_must_be_declared_by_both(declared: int, two_gpus: list[Path], tmp_path: Path) -> None:
    arms = [read_arm(path) for path in two_gpus]
    for place in range(declared, 2):
        result = arms[place].result.model_copy(update={"differs": ()})
        arms[place] = replace(arms[place], result=result)
    if declared == 2:
        assert intended(*arms) == ["GPUs: 1 against 2"]
        return
    with pytest.raises(InvalidResultError, match="gpus: 1 against 2"):
        gate({"throughput": Gate(measure="throughput", margin=0.02)}, *arms)


@pytest.mark.parametrize(("speed", "word"), [(1.0, Word.FAIL), (1.08, Word.UNDECIDED)])
def test_reference_must_be_as_fast_as_itself(speed: float, word: Word, tmp_path: Path) -> None:
    """Three arms in turns: abc, cba, ..."""
    orders = ((0, 5, 6, 11, 12), (1, 4, 7, 10, 13), (2, 3, 8, 9, 14))
    arms = [
        read_arm(write_result(tmp_path / f"{n}.json", rows_of(n, items=30, starts=5, speed=fast),
                              orders=order))
        for n, (fast, order) in enumerate(zip((1.0, 0.9, speed), orders, strict=True))
    ]  # fmt: skip
    (outcome,) = gate({"throughput": Gate(measure="throughput", margin=0.02)}, *arms)
    assert outcome.word is word
    assert ("the reference differs from itself by +" in outcome.reason) == (speed > 1)


def test_starts_are_paired_by_the_order_in_which_they_were_run(tmp_path: Path) -> None:
    """A host slows down by 2 % from one pair to the next; a record lists its starts backwards."""

    def drift(record: dict[str, Any]) -> None:
        for one in record["starts"]:
            one["window"]["seconds"] *= 1.02 ** (one["order"] // 2)

    rows = rows_of(1, items=30, starts=5)
    level = [row.model_copy(update={"output_tokens": 200}) for row in rows]
    arms = [
        read_arm(write_result(tmp_path / f"{n}.json", later(level, n), orders=orders, edit=drift))
        for n, orders in enumerate((A, B[::-1]))
    ]
    rate = Gate(measure="throughput", margin=0.02)
    (outcome,) = gate({"throughput": rate}, *arms)
    assert outcome.word is Word.PASS


def test_little_data_is_undecided(
    matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, again = (
        write_result(
            tmp_path / f"{seed}.json", rows_of(seed, items=10, starts=4, flips=0), orders=o
        )
        for seed, o in ((1, (0, 5, 6, 11)), (2, (1, 4, 7, 10)), (3, (2, 3, 8, 9)))
    )
    code, found = compare(capsys, first, second, f"--repeat={again}")
    assert code == GateUndecidedError.exit_code
    assert set(found.values()) == {"undecided"}
    assert set(found) == {"strict", "flexible", "throughput", "acceptance", "positions"}


def test_without_a_noise_floor_is_undecided(reference: tuple[Path, Path]) -> None:
    arms = [read_arm(path) for path in reference]
    (outcome,) = gate({"strict": STRICT}, *arms)
    assert outcome.word is Word.UNDECIDED
    assert "no noise floor" in outcome.reason


def test_reference_that_differs_from_itself_is_undecided(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    worse = write_result(tmp_path / "again.json", rows_of(2, items=ITEMS, right=0.9))
    arms = [read_arm(path) for path in (*reference, worse)]
    (outcome,) = gate({"strict": STRICT}, *arms)
    assert outcome.word is Word.UNDECIDED
    assert "differs from itself by -" in outcome.reason


def test_truncation_that_could_hide_a_loss_is_undecided(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    """Wrong answers of the reference may have been right, had they not been cut off."""

    def cut(row: Row) -> Row:
        return row if row.scores["flexible"] else row.model_copy(update=CUT)

    rows = [[cut(row) for row in rows_of(seed, items=ITEMS)] for seed in (1, 2, 3)]
    arms = [read_arm(write_result(tmp_path / f"{n}.json", own)) for n, own in enumerate(rows)]
    (outcome,) = gate({"strict": STRICT}, *arms)
    assert outcome.word is Word.UNDECIDED
    assert "at their worst" in outcome.reason


def test_repeats_of_items_are_averaged(tmp_path: Path) -> None:
    arms = []
    for seed in (1, 2, 3):
        rows = [
            row.model_copy(update={"repeat": repeat})
            for repeat in range(3)
            for row in rows_of(10 * seed + repeat, items=300)
        ]
        arms.append(read_arm(write_result(tmp_path / f"{seed}.json", rows)))
    (outcome,) = gate({"strict": STRICT.model_copy(update={"margin": 0.02})}, *arms)
    assert outcome.test is not None
    assert outcome.test.units == 300
    assert outcome.word is Word.PASS


def test_families_are_clusters(tmp_path: Path) -> None:
    arms = []
    for seed in (1, 2):
        rows = [
            row.model_copy(update={"family": f"f{number // 4}"})
            for number, row in enumerate(rows_of(seed, items=400))
        ]
        arms.append(read_arm(write_result(tmp_path / f"{seed}.json", rows)))
    (outcome,) = gate({"strict": STRICT}, *arms)
    assert outcome.test is not None
    assert outcome.test.units == 100


def edited(**updates: object) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [rows[0].model_copy(update=updates), *rows[1:]]


def keep(rows: list[Row]) -> list[Row]:
    return rows


def start(**updates: object) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["starts"][0]["window"].update(updates)


def counter(moment: str, **updates: int) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["starts"][0]["window"][moment].update(updates)


GPU_STATE = {"index": 0, "sm_mhz": 1980, "memory_mhz": 2619, "watts": 300.0, "celsius": 40,
             "reasons": 0x4, "slowed_us": 7}  # fmt: skip
WARM = [{**GPU_STATE, "index": 1}]


def hot(**changes: int) -> list[dict[str, Any]]:
    return [{**GPU_STATE, "index": 1, **changes}]


def starts_with(*kernels: list[str] | None) -> Callable[[dict[str, Any]], None]:
    def edit(record: dict[str, Any]) -> None:
        for one, names in zip(record["starts"], kernels, strict=True):
            one["kernels"] = names

    return edit


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "failed": (edited(finish="error"), keep, "1 failed requests (q0)"),
    "truncated-right": (
        edited(finish="length", scores={"strict": True}), keep, "truncated answers scored as right"
    ),
    "unscored": (edited(scores={}), keep, "1 answers without the score flexible (q0)"),
    "short": (keep, condition(ignore_eos=True), "answers below 512 tokens"),
    "twice": (edited(item="q1"), keep, "an item was answered twice"),
    "counters": (keep, counter("before", drafts=10**6), "counters went backwards: drafts"),
    "prefix": (keep, counter("after", prefix_hits=5), "5 prefix-cache hits"),
    "silent": (
        lambda rows: [row.model_copy(update={"output_tokens": 0}) for row in rows],
        keep,
        "no tokens",
    ),
    "jit": (keep, start(new_files=[f"/caches/triton/{64 * x}/a.cubin" for x in "KL"]),
            "2 files were compiled in the window (in /caches/triton: a.cubin, a.cubin)"),
    "heat": (keep, start(gpus_before=WARM, gpus_after=hot(reasons=0x44)),
             "GPU 1 was slowed down: HW thermal slowdown"),
    "heat before": (keep, start(gpus_before=hot(reasons=0x20), gpus_after=WARM),
                    "GPU 1 was slowed down: SW thermal slowdown"),
    "lost GPU": (keep, start(gpus_before=[GPU_STATE, *WARM], gpus_after=WARM),
                 "GPU 0 answered only before the window, or only after it"),
    "no answer": (keep, start(gpus_before=WARM, gpus_after=()),
                  "GPU 1 answered only before the window, or only after it"),
    "power": (keep, start(gpus_before=WARM, gpus_after=hot(slowed_us=12)),
              "GPU 1 was slowed down: for 5 us"),
    "short window": (keep, start(seconds=3.5), "30 s, 8 at a time, need 3.75 to 4.75 s"),
    "idle": (keep, start(seconds=6.1), "they cannot be those of 6.1 s"),
    "client": (keep, start(headroom=4.0), "client headroom 4.0 is below 10"),
    "unexplained": (keep, counter("after", accepted=10**6), "accepted drafts, counted are 1000000"),
    "cap": (keep, condition(max_tokens=256), "max_tokens: 512 against 256"),
    "template": (keep, condition(template_sha256="1" * 64), "template_sha256"),
    "driver": (keep, lambda record: record["server"].update(driver="590"), "driver: '580.1'"),
    "session": (keep, lambda record: record.update(session="s2"), "different sessions"),
    "items": (edited(item="other"), keep, "different items"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_refused(
    name: str, matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, edit, message = FAULTS[name]
    first = write_result(tmp_path / "a.json", rows_of(1, items=30))
    rows = change(rows_of(2, items=30))
    candidate = write_result(
        tmp_path / "b.json", rows, edit=(lambda _: None) if edit is keep else edit
    )
    assert main(["bench", "gate", str(first), str(candidate)]) == InvalidResultError.exit_code
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("matrix")
@pytest.mark.parametrize(
    ("change", "differs", "refused"),
    [
        ({}, (), True), ({}, ("kernels",), False),
        ({"argv": ["vllm", "serve", "--moe-backend=x"]}, (), False),
        ({"image": "sha256:" + "3" * 64}, (), False),
    ],
    ids=["same server", "declared", "command", "image"],
)  # fmt: skip
def test_kernels_may_differ_with_what_is_served(
    change: dict[str, Any], differs: tuple[str, ...], refused: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def edit(record: dict[str, Any]) -> None:
        starts_with(["Using MARLIN"])(record)
        record["differs"] = differs

    def other(record: dict[str, Any]) -> None:
        starts_with(["Using TRITON"])(record)
        record["differs"] = differs
        record["server"].update(change)

    first = write_result(tmp_path / "a.json", rows_of(1, items=30), edit=edit)
    second = write_result(tmp_path / "b.json", rows_of(2, items=30), edit=other)
    code = main(["bench", "gate", str(first), str(second), "--gate=acceptance"])
    text = " ".join(capsys.readouterr().err.split())
    assert "kernels: Using MARLIN in one, Using TRITON in the other" in text
    assert (code == InvalidResultError.exit_code) == refused
    assert ("the arms differ in kernels" in text) != refused


def test_starts_of_an_arm_must_run_the_same_kernels(tmp_path: Path) -> None:
    """A start without a log says nothing; the second one ran another kernel."""
    rows = rows_of(1, items=30, starts=3)
    paths = [
        write_result(tmp_path / f"{n}.json", rows, orders=(0, 3, 4), edit=starts_with(*kernels))
        for n, kernels in enumerate(([["x"], None, ["x"]], [["x"], None, ["y"]]))
    ]
    require_valid(read_arm(paths[0]))
    with pytest.raises(InvalidResultError, match="different kernels: x in one, y in the other"):
        require_valid(read_arm(paths[1]))


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ((5, 6, 7, 8, 9), "not in turns"),
        ((5, 6, 7, 8, 4), "both have a start of order 4"),
        ((5, 6, 7, 7, 8), "two starts have the order 7"),
        ((1, 2), "5 starts against 2"),
        (tuple(range(5, 22)), "more than 16 starts"),
    ],
)
def test_arms_that_were_not_run_in_turns_are_refused(
    orders: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    first, second = (
        read_arm(write_result(tmp_path / f"{n}.json", rows_of(n, items=5, starts=len(o)), orders=o))
        for n, o in enumerate([(0, 1, 2, 3, 4), orders])
    )
    with pytest.raises(InvalidResultError, match=message):
        gate({"strict": STRICT}, first, second)


def test_copied_start_is_refused(tmp_path: Path) -> None:
    rows = rows_of(1, items=5)
    copies = [row.model_copy(update={"start": n}) for n in range(2) for row in rows]
    arm = read_arm(write_result(tmp_path / "a.json", copies, orders=(0, 3)))
    with pytest.raises(InvalidResultError, match="same answers and times: one is a copy"):
        require_valid(arm)


@pytest.mark.parametrize("twice", ["candidate", "repeat", "repeat of the candidate", "copy"])
def test_one_measurement_is_not_compared_with_itself(
    twice: str, reference: tuple[Path, Path], tmp_path: Path
) -> None:
    first, again = map(read_arm, reference)
    other = read_arm(write_result(tmp_path / "b.json", rows_of(3, items=ITEMS)))
    copy = read_arm(write_result(tmp_path / "c.json", first.rows))
    arms = {"candidate": (first, first, again), "repeat": (first, other, first),
            "repeat of the candidate": (first, other, other), "copy": (first, copy)}  # fmt: skip
    with pytest.raises(InvalidResultError, match="they are one measurement"):
        gate({"strict": STRICT}, *arms[twice])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", "sha256:" + "3" * 64),
        ("artifact", "other"),
        ("argv", ["vllm", "serve", "-x"]),
        ("env_sha256", "0" * 64),
    ],
)
def test_repeat_of_another_server_is_refused(
    key: str, value: object, reference: tuple[Path, Path], tmp_path: Path
) -> None:
    arms = [
        read_arm(write_result(tmp_path / f"{n}.json", rows_of(n, items=ITEMS),
                              edit=lambda record: record["server"].update({key: value})))
        for n in (3, 4)
    ]  # fmt: skip
    with pytest.raises(InvalidResultError, match=f"--repeat is not the reference: its {key}"):
        gate({"strict": STRICT}, read_arm(reference[0]), *arms)


def test_published_sweep_has_unequal_caps(root: Path, tmp_path: Path) -> None:
    """The card's c=1 against c=4, which differ in more than their concurrency."""
    claims = read_claims(root / CLAIMS)
    arms = []
    for name in ("aime-c1", "aime-c4"):
        run = read_run((root / CLAIMS).parent, claims.raw[name])
        rows = [
            Row(start=0, item=item, finish="stop" if row.stopped else "length", seconds=1.0,
                output_tokens=row.tokens, scores={"strict": row.right and row.stopped})
            for item, row in run.answers.items()
        ]  # fmt: skip
        path = write_result(tmp_path / f"{name}.json", rows, edit=condition(max_tokens=run.cap))
        arms.append(read_arm(path))
    with pytest.raises(InvalidResultError, match="max_tokens: 13000 against 10000"):
        gate({"strict": STRICT}, *arms)


def test_starts_with_different_items_are_refused(tmp_path: Path) -> None:
    rows = rows_of(1, items=5, starts=2)
    rows[-1] = rows[-1].model_copy(update={"item": "other"})
    arm = read_arm(write_result(tmp_path / "a.json", rows, orders=(0, 3)))
    with pytest.raises(InvalidResultError, match="the starts answered different items"):
        gate({"strict": STRICT}, arm, arm)


def test_gate_without_data_of_one_result_is_undecided(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not passed over: the candidate's answers may not have been scored at all."""
    rows = [row.model_copy(update={"scores": {}}) for row in rows_of(3, items=ITEMS)]
    candidate = write_result(tmp_path / "b.json", rows)
    code, found = compare(capsys, reference[0], candidate)
    assert code == GateUndecidedError.exit_code
    assert {found["strict"], found["flexible"]} == {"undecided"}


def test_results_without_scores_have_nothing_to_judge(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"scores": {}}) for row in rows_of(1, items=5)]
    arms = [read_arm(write_result(tmp_path / f"{n}.json", later(rows, n))) for n in range(2)]
    with pytest.raises(InvalidResultError, match="none of the gates"):
        gate({"strict": STRICT}, *arms)


@pytest.mark.parametrize(
    ("key", "value"),
    [("seconds", math.nan), ("seconds", "60.0"), ("headroom", math.nan), ("headroom", math.inf),
     ("seconds", True), ("headroom", "50")],
)  # fmt: skip
def test_number_of_a_record_must_be_one(key: str, value: object, tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", rows_of(1, items=5))
    record = json.loads(path.read_text())
    record["starts"][0]["window"][key] = value
    path.write_text(json.dumps(record))
    with pytest.raises(ResultFileError, match=f"window.{key}: Input should be a"):
        read_arm(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [(b'"seconds":1.0', b'"seconds":NaN', "line 1: seconds: Input should be a finite number"),
     (b'"seconds":1.0', b'"seconds":"1.0"', "line 1: seconds: Input should be a valid number"),
     (b'"strict":true', b'"strict":"yes"', "scores.strict: Input should be a valid boolean"),
     (b'"ttft":0.1', b'"ttft":100.0', "the first token came after the last one")],
)  # fmt: skip
def test_row_that_cannot_be_is_named(old: bytes, new: bytes, message: str, tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", rows_of(1, items=5))
    record, rows = json.loads(path.read_text()), tmp_path / "a.jsonl.gz"
    rows.write_bytes(gzip.compress(gzip.decompress(rows.read_bytes()).replace(old, new)))
    record["rows"]["sha256"] = hashlib.sha256(rows.read_bytes()).hexdigest()
    path.write_text(json.dumps(record))
    with pytest.raises(ResultFileError, match=message):
        read_arm(path)


def test_record_outlives_a_kill_between_its_files(tmp_path: Path) -> None:
    """The rows of a second start are there, the record of it is not."""
    path, rows = tmp_path / "a.json", rows_of(1, items=5, starts=2)
    one = write_result(path, rows[:5]).read_bytes()
    write_result(path, rows, orders=(0, 3))
    path.write_bytes(one)
    arm = read_arm(path)
    assert (len(arm.result.starts), list(arm.rows)) == (1, rows[:5])
    write_result(path, [*rows[:4], rows[3], *rows[5:]], orders=(0, 3))
    path.write_bytes(one)
    with pytest.raises(ResultFileError, match="SHA-256 does not match the record"):
        read_arm(path)


def test_rows_of_nothing_are_refused(tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", rows_of(1, items=5))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 1_000_001))
    with pytest.raises(ResultFileError, match="1000001 rows, at most 1000000 are read"):
        read_arm(path)


def test_lines_are_those_that_are_counted() -> None:
    """A lone carriage return would end a line that is not."""
    assert parse_lines(b"1\r\n\r\n2", int) == [1, 2]
    with pytest.raises(ValueError, match="line 1: Extra data"):
        parse_lines(b"1\r2\r3", int)


@pytest.mark.parametrize("fault", ["changed", "not-gzip", "two-members", "count", "start", "key"])
def test_damaged_result_is_refused(fault: str, tmp_path: Path) -> None:
    path = write_result(tmp_path / "a.json", rows_of(1, items=5))
    record, rows = json.loads(path.read_text()), tmp_path / "a.jsonl.gz"
    if fault == "changed":
        text = gzip.decompress(rows.read_bytes()).replace(b'"seconds":1.0', b'"seconds":2.0')
        rows.write_bytes(gzip.compress(text))
    elif fault in {"not-gzip", "two-members", "start"}:
        text = gzip.decompress(rows.read_bytes()).replace(b'"start":0', b'"start":3')
        forms = {
            "not-gzip": text,
            "two-members": rows.read_bytes() * 2,
            "start": gzip.compress(text),
        }
        rows.write_bytes(forms[fault])
        record["rows"]["sha256"] = hashlib.sha256(forms[fault]).hexdigest()
    elif fault == "count":
        record["rows"]["count"] = 4
    else:
        record["rowz"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ResultFileError):
        read_arm(path)


def test_result_has_the_same_bytes_each_time(tmp_path: Path) -> None:
    paths = [write_result(tmp_path / n / "a.json", rows_of(1, items=5)) for n in ("x", "y")]
    for suffix in (".json", ".jsonl.gz"):
        assert len({path.with_suffix(suffix).read_bytes() for path in paths}) == 1


def test_unknown_gate_is_suggested(
    matrix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "gate", "a.json", "b.json", "--gate=strickt"]) == 2
    assert "did you mean 'strict'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [{"measure": "score"}, {"measure": "throughput", "score": "x"},
     {"measure": "acceptance", "per": "gpu"}],
)  # fmt: skip
def test_gate_has_what_its_measure_needs(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"score|throughput"):
        Gate.model_validate({**row, "margin": 0.01})


def test_gates_of_the_matrix_have_the_margins_of_the_page(root: Path) -> None:
    page = (root / "docs/operate/bench.md").read_text()
    for name, row in Project(root).matrix.gate.items():
        assert f"| `{name}` |" in page
        assert f"| {100 * row.margin:g} " in page
