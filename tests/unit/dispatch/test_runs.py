"""Runs: what is brought to storage, what this host knows of them, and waiting."""

from __future__ import annotations

import argparse
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.registry_client import small_layout
from tests.support.site import JOB, make_site
from vllm_forge.commands import dispatch
from vllm_forge.dispatch import runs
from vllm_forge.dispatch.errors import (
    JobsRedError,
    JobsUndecidedError,
    RunFolderError,
    SchedulerError,
)
from vllm_forge.dispatch.results import Outcome, State
from vllm_forge.dispatch.runs import (
    RunRecord,
    bring_image,
    new_run,
    read_record,
    wait,
    write_record,
)
from vllm_forge.images.layout import read_image
from vllm_forge.project import Project
from vllm_forge.receipts import verification
from vllm_forge.receipts.errors import ReceiptKeyError

if TYPE_CHECKING:
    from pathlib import Path

RECORD = RunRecord(run="r1", scheduler="slurm", storage="/s", specs=(), attempts={})


def test_archive_that_others_wrote_is_written_again(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive is named by its image's digest, which nobody can compare its content with."""
    project, written = Project(checkout), []

    def write(_: Any, _layout: Path, _name: str, target: Path, _epoch: int) -> None:
        written.append(target)
        target.write_bytes(b"squashfs")

    monkeypatch.setattr(runs, "write_archive", write)
    (tmp_path / "storage").mkdir()
    site = make_site(tmp_path, project, "/shared/forge", str(tmp_path / "storage"))
    small_layout(tmp_path / "layout", count=1, size=10)
    image, cell = read_image(tmp_path / "layout"), project.cell("b300", "0.26")
    digest = bring_image(project, site, cell, image)
    assert bring_image(project, site, cell, image) == digest
    assert len(written) == 1
    written[0].write_bytes(b"of somebody else")
    assert bring_image(project, site, cell, image) == digest
    assert len(written) == 2
    shutil.rmtree(checkout / runs.LOCAL)
    bring_image(project, site, cell, image)
    assert len(written) == 3, "an archive is believed that this host did not write"


def test_unknown_run_is_named(checkout: Path) -> None:
    project = Project(checkout)
    with pytest.raises(RunFolderError, match="no run was sent"):
        read_record(project, None)
    write_record(project, RECORD)
    assert read_record(project, None) == RECORD
    with pytest.raises(RunFolderError, match=r"unknown run r2 \(did you mean 'r1'\?\)"):
        read_record(project, "r2")


def test_runs_sort_by_time() -> None:
    """Also those of one second: the latest is the default of `status` and `collect`."""
    names = [new_run() for _ in range(100)]
    assert sorted(names) == names


def test_missing_image_is_named_with_its_build(checkout: Path) -> None:
    project = Project(checkout)
    with pytest.raises(RunFolderError, match=r"vllm-0\.26\.0-b300 is not built") as caught:
        runs.built_image(project, project.cell("b300", "0.26"))
    assert "build b300 --line 0.26" in caught.value.remedy


@pytest.mark.parametrize(
    ("attempts", "states", "why"),
    [
        ({}, {}, "it was not sent"),
        ({JOB.name: "7_0"}, {}, "no result was written (the scheduler does not know it)"),
        ({JOB.name: "7_0"}, {"7_0": "CANCELLED"}, "no result was written (CANCELLED)"),
        ({JOB.name: "7_0"}, {"7_0": "NODE_FAIL"}, "no result was written (NODE_FAIL)"),
    ],
    ids=["not sent", "forgotten", "never started", "node lost"],
)
def test_job_without_a_result_ends(
    attempts: dict[str, str], states: dict[str, str], why: str, tmp_path: Path
) -> None:
    update = {"specs": (JOB,), "attempts": attempts, "storage": str(tmp_path)}
    known = {name: State(text=text, ended=True) for name, text in states.items()}
    (row,) = runs.outcomes(Project(tmp_path), RECORD.model_copy(update=update), known)
    assert (row.verdict, row.why) == ("undecided", why)


class Scheduler:
    """Answers in turn: an error, or the verdict on one job."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def __call__(self) -> list[Outcome]:
        answer = self.answers.pop(0)
        if answer == "silent":
            raise SchedulerError("no answer")
        return [Outcome(name="job", verdict=answer)]


def test_waiting_outlasts_a_silent_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "POLL_S", 0)
    ask = Scheduler("waiting", "silent", "silent", "waiting", "green")
    assert wait(ask)[0].verdict == "green"
    monkeypatch.setattr(runs, "SILENCE_S", -1)
    with pytest.raises(SchedulerError):
        wait(Scheduler("waiting", "silent"))


def test_waiting_ends_at_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the scheduler is silent; what waits is listed so."""
    monkeypatch.setattr(runs, "POLL_S", 0)
    ask = Scheduler(*["waiting"] * 10_000)
    assert wait(ask, 1e-6)[0].verdict == "waiting"
    assert len(ask.answers) > 9_000
    with pytest.raises(SchedulerError):
        wait(Scheduler(*["silent"] * 10_000), 1e-6)


def test_collecting_begins_while_the_scheduler_is_silent(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "POLL_S", 0)
    answers = Scheduler("silent", "silent", "red")
    monkeypatch.setattr(dispatch, "_outcomes", lambda *_: answers())
    args = argparse.Namespace(wait=True, timeout=None, json=True)
    record = RECORD.model_copy(update={"specs": (JOB.model_copy(update={"name": "job"}),)})
    with pytest.raises(JobsRedError):
        dispatch._collect(Project(checkout), args, record)
    assert answers.answers == []


def test_result_without_a_receipt_says_what_to_do(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unsigned one needs a key here, and no other run."""

    def refuse(*_: object) -> None:
        raise ReceiptKeyError("the receipt is unsigned", remedy="sign it")

    monkeypatch.setattr(verification, "make_receipt", refuse)
    monkeypatch.setattr(dispatch, "_outcomes", lambda *_: [Outcome(name="job", verdict="green")])
    args = argparse.Namespace(wait=False, json=True, key=None)
    record = RECORD.model_copy(update={"specs": (JOB.model_copy(update={"name": "job"}),)})
    with pytest.raises(JobsUndecidedError) as raised:
        dispatch._collect(Project(checkout), args, record)
    assert '"the receipt is unsigned; sign it"' in capsys.readouterr().out
    assert raised.value.remedy.startswith("do what its row says")
