"""Questions about quality in a session: answers are kept by the server's host, scored elsewhere."""

from __future__ import annotations

import io
import os
import shutil
import socket
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sessions import write_quality
from vllm_forge.bench import arms, turns
from vllm_forge.bench.errors import InvalidResultError, ResultFileError, SessionFileError
from vllm_forge.bench.results import read_arm
from vllm_forge.cli import main
from vllm_forge.host import Reply
from vllm_forge.host.files import file_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

REPO = Path(__file__).parents[3]
GPU = "0, NVIDIA H200, 9.0, 580.1, 143771, Disabled, Completed, Success\n"


class StubProbe:
    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return Reply(code=0, text=GPU)


@contextmanager
def host() -> Iterator[None]:
    """A host with a GPU and an image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_FORGE_ROOT", str(REPO))
        patch.setattr(arms, "built_digest", lambda path: "sha256:" + "3" * 64)
        patch.setattr(turns, "HostProbe", StubProbe)
        patch.setattr(turns, "POLL_S", 0.02)
        yield


@dataclass
class Asked:
    """A session that was run: its command, its data, and the answers of its two starts."""

    command: list[str]
    data: Path
    paths: list[Path]

    def score(self, answers: Path, record: Path, **options: str) -> int:
        known = {"sha256": file_digest(self.data), "license": "CC0", "workload": "own"}
        words = [f"--{name}={value}" for name, value in (known | options).items()]
        output = f"--output={record}"
        return main(["bench", "score", str(answers), output, f"--data={self.data}", *words])


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("session")
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    session = write_quality(folder, port, env, checkpoint=".")
    session.write_text(session.read_text().replace("python3", sys.executable))
    command = ["bench", "run", "b300", str(session), f"--caches={folder}",
               f"--output={folder / 'out'}"]  # fmt: skip
    out = io.StringIO()
    with host(), redirect_stdout(out):
        assert main(command) == 0
    paths = [Path(line) for line in out.getvalue().split()]
    assert paths == [folder / f"out/mtp-c2.answers-{order}.jsonl" for order in (0, 1)]
    return Asked(command, folder / "own.data.jsonl", paths)


def test_kept_answers_become_a_record_as_of_quality(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "mtp.json"
    for path in asked.paths:
        assert asked.score(path, record) == 0
        assert "flexible 3 of 4; strict 3 of 4; 1 answer" in capsys.readouterr().out
    result = read_arm(record).result
    assert [start.order for start in result.starts] == [0, 1]
    assert (result.arm, result.session) == ("mtp", "december")
    assert (result.server.image, result.server.gpu) == ("sha256:" + "3" * 64, "NVIDIA H200")
    conditions = result.conditions
    assert (conditions.workload, conditions.max_tokens) == ("own", 2048)
    assert conditions.prefix_cache
    assert asked.score(asked.paths[0], record) != 0
    assert "the record has start 0" in capsys.readouterr().err


def test_session_whose_answers_are_gone_is_refused(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with host():
        assert main(asked.command) == 0  # nothing is left to do
        path = asked.paths[1].rename(tmp_path / "answers")
        assert main(asked.command) == SessionFileError.exit_code
    path.rename(asked.paths[1])
    assert "start 1 is done" in capsys.readouterr().err


FAULTS: dict[str, tuple[str, str, dict[str, str], str]] = {
    "license": ("", "", {"license": "MIT"}, "another license: 'CC0', now 'MIT'"),
    "items": ('"item":"q3"', '"item":"q4"', {}, "missing answers: 1 of 4"),
    "conditions": ('"temperature":0.0', '"temperature":0.5', {}, "conditions.temperature: 0.5"),
    "digest": ('"prompts_sha256":"', '"prompts_sha256":"0', {}, "invalid file of answers"),
    "session": (',"session":"december"', "", {}, "invalid file of answers"),
    "field": ('"session":', '"x":1,"session":', {}, "invalid file of answers"),
    "format": ('"bench-answers/1"', '"bench-answers/2"', {}, "invalid file of answers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_answers_to_other_questions_are_not_scored(
    fault: str, asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, options, message = FAULTS[fault]
    path, record = tmp_path / asked.paths[0].name, tmp_path / "mtp.json"
    text = asked.paths[0].read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else text)
    assert asked.score(path, record, **options) == ResultFileError.exit_code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not record.exists()


def test_missing_answers_are_named(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / asked.paths[0].name
    assert asked.score(path, tmp_path / "mtp.json") == ResultFileError.exit_code
    error = capsys.readouterr().err
    assert "missing file of answers" in error
    assert "--output" not in error  # which is not what is wrong


@pytest.mark.parametrize("name", ["answers", *(f"mtp-c2.answers-{n}" for n in ("-1", "1_0", "01"))])
def test_answers_under_another_name_are_not_scored(name: str, asked: Asked, tmp_path: Path) -> None:
    """The name has the order of the start."""
    path = tmp_path / f"{name}.jsonl"
    shutil.copy(asked.paths[0], path)
    assert asked.score(path, tmp_path / "mtp.json") == ResultFileError.exit_code


def test_answers_are_not_two_starts(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, path = tmp_path / "mtp.json", tmp_path / asked.paths[1].name
    shutil.copy(asked.paths[0], path)
    assert asked.score(asked.paths[0], record) == 0
    before = record.read_bytes()
    assert asked.score(path, record) == InvalidResultError.exit_code
    assert "the record has these answers" in capsys.readouterr().err
    assert record.read_bytes() == before


def test_item_that_is_answered_twice_is_not_scored(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one would count."""
    path = tmp_path / asked.paths[0].name
    text = asked.paths[0].read_text()
    path.write_text(text + text.splitlines(keepends=True)[-1])
    assert asked.score(path, tmp_path / "mtp.json") == ResultFileError.exit_code
    assert "duplicate answers: 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[quality]", 'workload = "x.jsonl"\n[quality]', "expected workload and max_tokens"),
        ("[quality]", "max_tokens = 4\n[quality]", "expected workload and max_tokens"),
        ('license = "CC0"', "", "data, sha256 and license belong together"),
        ('workload = "own"', 'workload = "ownn"', "unknown workload 'ownn' (did you mean 'own'?)"),
        ('workload = "own"', 'workload = "random"', "random has no right answers"),
        ('"CC0"', '"CC0"\ncolour = 1', "colour"),
        ("[arm.mtp]", '[crosscheck]\narm = "mtp"\ncommand = ["x"]\n[arm.mtp]',
         "crosscheck: expected none beside [quality]"),
        ("[quality]", 'differs = "gpus"\n[quality]', "differs: Input should be a list"),
        ('sha256 = "', 'sha256 = "0', "quality.sha256"),
    ],
)  # fmt: skip
def test_invalid_questions_of_a_session_are_refused(
    old: str, new: str, message: str, *, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = write_quality(tmp_path, 8000, {}, checkpoint=".")
    text = session.read_text()
    assert old in text
    session.write_text(text.replace(old, new))
    with host():
        assert main(["bench", "run", "b300", str(session), f"--caches={tmp_path}",
                     f"--output={tmp_path}"])  # fmt: skip
    assert message in " ".join(capsys.readouterr().err.split())
