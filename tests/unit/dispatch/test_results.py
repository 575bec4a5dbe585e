"""A result counts only if its marker says all of it, and is of the job that was sent."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import CONDITIONS, SERVER, rows_of, write_result
from tests.support.site import HEX, JOB
from vllm_forge.bench.quality import Header
from vllm_forge.bench.results import Setup, read_arm
from vllm_forge.dispatch.errors import JobsFaultError, JobsRedError, JobsUndecidedError
from vllm_forge.dispatch.results import Outcome, State, judge, require_green
from vllm_forge.host.files import file_digest

if TYPE_CHECKING:
    from pathlib import Path

OTHER = "0" * 64
ENDED = State(text="COMPLETED", ended=True)


class Job:
    """What a green job left on storage."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.local = folder / "results", folder / "local"
        self.output = self.folder / "7_0"
        self.output.mkdir(parents=True)
        plan = {"subject": {"sha256": HEX}, "sku": "b300", "line": "0.26"}
        self.write_result({"plan": plan, "tier": "kernel"})

    def write_result(self, result: dict[str, Any]) -> None:
        content = json.dumps(result).encode()
        (self.output / "kernel.json").write_bytes(content)
        self.marker = {
            "job": JOB.name, "image": JOB.image, "attempt": "7_0", "restarts": 0, "node": "n1",
            "exit": 0, "fault": "", "files": {"kernel.json": hashlib.sha256(content).hexdigest()},
        }  # fmt: skip

    def judge(self, state: State = ENDED) -> Outcome:
        (self.folder / "7_0.done").write_text(json.dumps(self.marker))
        return judge(JOB, "7_0", self.folder, state, self.local)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_green_result_is_copied(job: Job) -> None:
    assert job.judge() == Outcome(name=JOB.name, verdict="green", why="n1")
    copied = (job.local / "kernel.json").read_bytes()
    assert copied == (job.output / "kernel.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "verdict", "why"),
    [
        ({"image": f"sha256:{OTHER}"}, "refused", f"image sha256:{OTHER}, expected sha256:{HEX}"),
        ({"job": "b300-0.26-server"}, "refused", "job b300-0.26-server"),
        ({"attempt": "6_0"}, "refused", "attempt 6_0, expected 7_0"),
        ({"restarts": 1}, "refused", "restarts 1, expected 0"),
        ({"files": {"kernel.json": OTHER}}, "refused", "kernel.json was changed"),
        ({"files": {"../../key": OTHER}}, "refused", "files"),
        ({"files": {"gone.json": OTHER}}, "refused", "gone.json"),
        ({"files": {}}, "refused", "exit code 0 without kernel.json"),
        ({"more": 1}, "refused", "more"),
        ({"exit": 91}, "red", "exit code 91"),
        ({"exit": 92}, "undecided", "exit code 92"),
        ({"exit": 93}, "fault", "exit code 93"),
        ({"exit": 90}, "refused", "exit code 90"),
        ({"exit": 1}, "undecided", "exit code 1"),
        ({"exit": 137}, "undecided", "exit code 137"),
        ({"exit": -9}, "undecided", "exit code -9"),
        ({"exit": None, "fault": "Fault: no space"}, "fault", "n1: Fault: no space"),
        ({"exit": None}, "fault", "did not start"),
    ],
)  # fmt: skip
def test_marker_decides(job: Job, change: dict[str, Any], verdict: str, why: str) -> None:
    job.marker |= change
    outcome = job.judge()
    assert (outcome.verdict, why in outcome.why) == (verdict, True), outcome


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1, "job": 2}', "x" * 9])
def test_broken_marker_is_refused(job: Job, text: str) -> None:
    (job.folder / "7_0.done").write_text(text)
    assert judge(JOB, "7_0", job.folder, ENDED, job.local).verdict == "refused"


@pytest.mark.parametrize(
    "change",
    [
        {"tier": "server"}, {"plan": {}}, {"plan": {"subject": {"sha256": OTHER}, "sku": "b300",
        "line": "0.26"}}, {"plan": {"subject": {"sha256": HEX}, "sku": "h200", "line": "0.26"}},
    ],
)  # fmt: skip
def test_result_of_another_image_or_tier_is_refused(job: Job, change: dict[str, Any]) -> None:
    plan = {"subject": {"sha256": HEX}, "sku": "b300", "line": "0.26"}
    job.write_result({"plan": plan, "tier": "kernel"} | change)
    assert job.judge().verdict == "refused"


def test_link_in_place_of_a_result_is_refused(job: Job) -> None:
    path = job.output / "kernel.json"
    path.rename(job.folder / "elsewhere")
    path.symlink_to(job.folder / "elsewhere")
    assert job.judge().verdict == "refused"
    assert not (job.local / "kernel.json").exists()


@pytest.mark.parametrize(
    ("state", "verdict", "why"),
    [
        (State(text="RUNNING", ended=False), "waiting", "RUNNING"),
        (ENDED, "undecided", "half a result: the job ended before it was complete (COMPLETED)"),
    ],
)
def test_result_without_marker_does_not_count(
    job: Job, state: State, verdict: str, why: str
) -> None:
    outcome = judge(JOB, "7_0", job.folder, state, job.local)
    assert (outcome.verdict, why in outcome.why) == (verdict, True)


def test_requeued_job_is_refused(job: Job) -> None:
    (job.folder / "7_0-r1.done").write_text(json.dumps(job.marker))
    assert judge(JOB, "7_0", job.folder, ENDED, job.local).verdict == "refused"


def test_the_worst_verdict_is_the_exit_code() -> None:
    rows = [Outcome(name=word, verdict=word) for word in ("green", "fault", "refused", "red")]
    require_green("r", rows[:1])
    for count, kind in ((2, JobsFaultError), (3, JobsUndecidedError), (4, JobsRedError)):
        with pytest.raises(kind, match=rows[count - 1].name):
            require_green("r", rows[:count])


@pytest.mark.parametrize(
    ("image", "verdict"), [("sha256:" + "2" * 64, "green"), (JOB.image, "refused")]
)
def test_records_of_a_session_are_of_the_image(job: Job, image: str, verdict: str) -> None:
    names = ("tiny/mtp-c8.json", "tiny/mtp-c8.jsonl.gz")
    (job.output / "tiny").mkdir()
    write_result(job.output / names[0], rows_of(1, items=3))
    spec = JOB.model_copy(update={"image": image, "session": True, "artifacts": names})
    hashes = {name: file_digest(job.output / name) for name in names}
    marker = job.marker | {"image": image, "files": hashes}
    (job.folder / "7_0.done").write_text(json.dumps(marker))
    outcome = judge(spec, "7_0", job.folder, ENDED, job.local)
    assert outcome.verdict == verdict, outcome.why
    assert read_arm(job.local / names[0]).rows


ANSWERS: dict[str, tuple[str, str, str]] = {
    "right": (JOB.image, "", "green"),
    "another image": (f"sha256:{OTHER}", "", "refused"),
    "a damaged line": (JOB.image, "{}\n", "refused"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_of_a_session_are_of_the_image(job: Job, case: str) -> None:
    image, more, verdict = ANSWERS[case]
    name = "december/mtp-c2.answers-0.jsonl"
    path = job.output / name
    path.parent.mkdir()
    server = {**SERVER, "image": image}
    setup = {"arm": "mtp", "session": "s", "conditions": CONDITIONS, "server": server}
    header = Header(model="m", license="CC0", arm=Setup.model_validate(setup))
    path.write_text(f"{header.model_dump_json()}\n{more}")
    spec = JOB.model_copy(update={"session": True, "artifacts": (name,)})
    marker = job.marker | {"files": {name: file_digest(path)}}
    (job.folder / "7_0.done").write_text(json.dumps(marker))
    outcome = judge(spec, "7_0", job.folder, ENDED, job.local)
    assert outcome.verdict == verdict, outcome.why
