"""Answers are asked of a fake server, kept, scored and judged; each fault is refused."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.answer_server import AnswerServer, Reply
from tests.support.bench import CONDITIONS, SERVER
from vllm_forge.bench import arms, measure, quality, sandbox
from vllm_forge.bench.client import Prompt
from vllm_forge.bench.errors import (
    InvalidResultError,
    ResultFileError,
    SandboxError,
    ServerUnreachableError,
)
from vllm_forge.bench.gate import Word, gate
from vllm_forge.bench.quality import Answers, Header, answers_path, measure_quality, summary
from vllm_forge.bench.results import Arm, Conditions, Row, Server, Setup, read_arm, write_arm
from vllm_forge.bench.scoring import score
from vllm_forge.bench.workloads import Item, Loaded, load, read_workloads
from vllm_forge.cli import main
from vllm_forge.host import Reply as HostReply
from vllm_forge.matrix.model import Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

IMAGE = "sha256:" + "2" * 64
GPUS = "0, NVIDIA B300, 10.3, 580.1, 288000, Disabled, Completed, Success\n"
STRICT = Gate(measure="score", score="strict", margin=0.01)


def workload(count: int = 8) -> Loaded:
    """Questions with the answers word-0, word-1, ..."""
    items = tuple(Item(f"q{n}", f"question {n}", answer=f"word-{n}") for n in range(count))
    return Loaded("own", read_workloads()["own"], items, "CC0", "0" * 64)


def right(question: str) -> Reply:
    return Reply(f"word-{question.rsplit(maxsplit=1)[-1]}")


def arm(image: str = IMAGE, loaded: Loaded | None = None) -> Setup:
    asked = (loaded or workload()).asked()
    conditions = Conditions.model_validate({**CONDITIONS, "concurrency": 2, **asked})
    return Setup(
        arm="a", session="s", conditions=conditions,
        server=Server.model_validate({**SERVER, "image": image}),
    )  # fmt: skip


def run(
    reply: Callable[[str], Reply], output: Path, *, count: int = 8, order: int = 0,
    images: Sequence[str] = (IMAGE, IMAGE),
) -> tuple[list[Row], list[dict[str, Any]]]:  # fmt: skip
    """Rows, and the requests; ``images``: of the host at the begin and at the end."""
    left = iter(images)
    with AnswerServer(reply=reply) as server:
        loaded = workload(count)
        rows = measure_quality(
            server.url, "model", loaded, lambda: arm(next(left)), output, order=order
        )
        return rows, server.seen


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "a.json"


def test_answers_are_scored_and_bound_to_the_image(output: Path) -> None:
    def reply(question: str) -> Reply:
        texts = {"1": "Word-1.", "2": "other", "3": "word-3"}
        number = question.rsplit(maxsplit=1)[-1]
        cut = "length" if number == "3" else "stop"
        return Reply(
            texts.get(number, f"word-{number}"), finish=cut, tokens=2048 if cut == "length" else 5
        )

    rows, seen = run(reply, output)
    found = read_arm(output)
    assert list(found.rows) == rows
    assert found.result.server.image == IMAGE
    scores = {row.item: (row.scores["strict"], row.scores["flexible"]) for row in rows}
    assert scores == {
        **{f"q{n}": (True, True) for n in (0, 4, 5, 6, 7)},
        "q1": (False, True), "q2": (False, False), "q3": (False, False),
    }  # fmt: skip
    faults = {row.item: row.fault for row in rows if row.fault}
    assert faults == {"q1": "form: other characters", "q2": "answer: other text", "q3": "truncated"}
    assert summary(rows) == ("flexible 6 of 8; strict 5 of 8; 1 answer; 1 form; 1 truncated")
    first, *lines = answers_path(output, 0).read_text().splitlines()
    header = json.loads(first)
    assert (header["arm"]["server"]["image"], header["license"]) == (IMAGE, "CC0")
    kept = {line["item"]: line for line in map(json.loads, lines)}
    assert kept["q3"]["text"] == "word-3"
    for row in rows:
        answer = json.dumps(["", kept[row.item]["text"]], separators=(",", ":"))
        assert row.answer_sha256 == hashlib.sha256(answer.encode()).hexdigest()
    names = ("max_tokens", "temperature", "top_p", "ignore_eos", "chat_template_kwargs")
    assert [seen[0][name] for name in names] == [2048, 0.0, 1.0, False, {"thinking": False}]


def test_failed_requests_are_refused_and_asked_again(output: Path) -> None:
    def failing(question: str) -> Reply:
        return replace(right(question), failed=question.endswith(("3", "5")))

    with pytest.raises(InvalidResultError, match="2 failed requests"):
        run(failing, output)
    assert not output.exists()
    rows, seen = run(right, output)
    asked = sorted(body["messages"][0]["content"] for body in seen)
    assert asked == ["question 3", "question 5"]
    assert len(rows) == 8
    assert all(row.scores["strict"] for row in rows)


def test_run_that_was_killed_is_resumed(output: Path) -> None:
    """In the middle of a line: kill -9 leaves what the file system has."""
    run(right, output)
    expected = output.read_bytes()
    path = answers_path(output, 0)
    content = path.read_bytes()
    output.unlink()
    path.write_bytes(content[:-40])
    rows, seen = run(right, output)
    assert len(seen) == 1
    assert len(rows) == 8
    assert json.loads(output.read_text())["conditions"] == json.loads(expected)["conditions"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["item"] for line in lines[1:]) == [row.item for row in rows]


def test_answers_of_another_image_are_not_mixed(output: Path) -> None:
    with pytest.raises(InvalidResultError):
        run(lambda question: replace(right(question), failed="3" in question), output)
    other = "sha256:" + "3" * 64
    with pytest.raises(
        InvalidResultError, match=f"of another server.image: '{IMAGE}', now '{other}"
    ):
        run(right, output, images=(other, other))
    assert not output.exists()


def test_image_that_changes_during_the_run_is_refused(output: Path) -> None:
    with pytest.raises(InvalidResultError, match="this host changed during the run: server"):
        run(right, output, images=(IMAGE, "sha256:" + "3" * 64))
    assert not output.exists()


FAULTS: dict[str, tuple[Callable[[str], Reply], str]] = {
    "short": (
        lambda question: replace(right(question), finish="length"),
        "8 answers cut below 2048 tokens",
    ),
    "thinking": (
        lambda question: replace(right(question), reasoning="hm"),
        "thinking is False, but the answers say True",
    ),
    "thinking in the text": (
        lambda question: Reply(f"hm</think>{right(question).text}"),
        "thinking is False, but the answers say True",
    ),
    "ended": (lambda question: replace(right(question), finish="abort"), "8 failed requests"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_server_is_refused(fault: str, output: Path) -> None:
    reply, message = FAULTS[fault]
    with pytest.raises(InvalidResultError, match=message):
        run(reply, output)
    assert not output.exists()


def test_truncated_answer_scored_as_right_is_refused(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer's own fault: validity finds it whoever scores."""
    monkeypatch.setattr(quality, "score", lambda row, item, _, text: score(row, item, "stop", text))
    with pytest.raises(InvalidResultError, match="8 truncated answers scored as right"):
        run(lambda question: replace(right(question), finish="length", tokens=2048), output)


def test_server_that_does_not_answer_is_named(output: Path) -> None:
    with pytest.raises(ServerUnreachableError):
        measure_quality("http://127.0.0.1:9", "model", workload(), arm, output, order=0)


def test_code_without_isolation_is_refused_before_a_question(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "which", lambda _: None)
    loaded = load("chat-code")
    with AnswerServer() as server:
        with pytest.raises(SandboxError):
            measure_quality(
                server.url, "model", loaded, lambda: arm(loaded=loaded), output, order=0
            )
        assert server.seen == []


def test_starts_are_added(output: Path) -> None:
    run(right, output)
    with pytest.raises(InvalidResultError, match="the record has start 0"):
        run(right, output)
    run(right, output, order=3)
    assert [start.order for start in read_arm(output).result.starts] == [0, 3]
    other = "sha256:" + "3" * 64
    with pytest.raises(InvalidResultError, match="another server"):
        run(right, output, order=4, images=(other, other))


@pytest.mark.parametrize(
    "content", [b"x\n", b'{"format": "bench-answers/2"}\n', b'{"a": 1}\n[1]\n', b"\xff\n"]
)
def test_invalid_file_of_answers_is_refused(content: bytes, output: Path) -> None:
    answers_path(output, 0).write_bytes(content)
    with pytest.raises(ResultFileError, match="invalid file of answers"):
        run(right, output)


def test_link_in_place_of_the_answers_is_refused(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    answers_path(output, 0).symlink_to(other)
    with pytest.raises(ResultFileError, match="not a plain file"):
        run(right, output)
    answers_path(output, 0).unlink()
    header = Header(model="m", license="l", arm=arm())
    answers_path(output, 0).symlink_to(other)
    monkeypatch.setattr(quality, "read_counters", lambda _: None)
    with pytest.raises(OSError, match="symbolic"):
        quality.ask("", [Prompt("q", "question")], Answers(answers_path(output, 0), header))
    assert other.read_text() == "mine"


ITEMS = 600


def losing(lost: int) -> Callable[[str], Reply]:
    """Answers of which so many have lost their form."""

    def reply(question: str) -> Reply:
        found = right(question)
        number = int(question.rsplit(maxsplit=1)[-1])
        return found if number >= lost else Reply(f"**{found.text}**")

    return reply


def measured(path: Path, count: int = ITEMS, lost: int = 0) -> Arm:
    run(losing(lost), path, count=count)
    return read_arm(path)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Arm, Arm]:
    """The reference, twice."""
    folder = tmp_path_factory.mktemp("reference")
    return measured(folder / "a.json"), measured(folder / "b.json")


def verdict(reference: tuple[Arm, Arm], candidate: Arm) -> Word:
    (outcome,) = gate({"strict": STRICT}, reference[0], candidate, reference[1])
    return outcome.word


def test_gate_passes_equal_arms(reference: tuple[Arm, Arm], output: Path) -> None:
    assert verdict(reference, measured(output)) is Word.PASS


def test_gate_fails_a_loss_of_two_points(reference: tuple[Arm, Arm], output: Path) -> None:
    assert verdict(reference, measured(output, lost=ITEMS // 50)) is Word.FAIL


def test_gate_on_few_answers_is_undecided(tmp_path: Path) -> None:
    arms = [measured(tmp_path / f"{name}.json", count=50) for name in "abc"]
    assert verdict((arms[0], arms[1]), arms[2]) is Word.UNDECIDED


class StubProbe:
    """Answers each question with one text."""

    def ask(self, name: str, argv: Sequence[str]) -> HostReply:
        return HostReply(code=0, text=GPUS)


def test_command_asks_and_prints(
    output: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr(arms, "built_digest", lambda _: IMAGE)
    monkeypatch.setattr("vllm_forge.host.HostProbe", StubProbe)
    text = "".join(
        json.dumps({"item": item.name, "prompt": item.prompt, "answer": item.answer}) + "\n"
        for item in workload().items
    )
    data = output.parent / "data.jsonl"
    data.write_text(text)
    command = ["bench", "quality", "b300", "--preset=mtp", "--arm=mtp", "--session=s",
               f"--checkpoint={output.parent}", f"--output={output}", "--workload=own",
               f"--data={data}", f"--sha256={hashlib.sha256(text.encode()).hexdigest()}",
               "--license=CC0"]  # fmt: skip
    with AnswerServer(reply=right) as server:
        assert main([*command, f"--url={server.url}/"]) == 0
    assert "start 0: flexible 8 of 8; strict 8 of 8" in capsys.readouterr().out
    found = read_arm(output).result
    assert (found.conditions.workload, found.conditions.max_tokens) == ("own", 2048)
    assert found.server.gpu == "NVIDIA B300"
    assert main([*command[:-4], "--workload=random", "--url=http://127.0.0.1:9"]) == 2
    assert "has no right answers" in capsys.readouterr().err


def test_starts_that_end_at_once_are_both_kept(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two servers, for one record: neither is written over the other."""
    both = threading.Barrier(2)

    def together(*args: Any, **options: Any) -> None:
        with suppress(threading.BrokenBarrierError):  # the other one waits for the lock
            both.wait(0.5)
        write_arm(*args, **options)

    monkeypatch.setattr(measure, "write_arm", together)
    starts = [threading.Thread(target=run, args=(right, output), kwargs={"order": order})
              for order in (0, 1)]  # fmt: skip
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert {start.order for start in read_arm(output).result.starts} == {0, 1}
