"""What others can write to a cluster's storage: markers, results, folders; what Slurm prints."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import rows_of, write_result
from tests.support.site import HEX, JOB, make_site
from vllm_forge.bench.results import read_arm
from vllm_forge.dispatch import results
from vllm_forge.dispatch.errors import (
    ClusterMismatchError,
    RunFolderError,
    SchedulerError,
    SiteFileError,
)
from vllm_forge.dispatch.results import Outcome, State, judge
from vllm_forge.dispatch.runs import RunRecord, make_own, require_own
from vllm_forge.dispatch.slurm import batches, require_cluster, send
from vllm_forge.host import read_plain
from vllm_forge.host.files import file_digest
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REPO = Path(__file__).parents[2]
ENDED = State(text="COMPLETED", ended=True)
RESULT = {"plan": {"subject": {"sha256": HEX}, "sku": "b300", "line": "0.26"}, "tier": "kernel"}
CONTENT = json.dumps(RESULT).encode()


class Storage:
    """A green job's folder of results, which a test changes."""

    def __init__(self, folder: Path) -> None:
        self.results, self.local = folder / "results", folder / "run" / JOB.name
        (self.results / "7_0").mkdir(parents=True)
        self.result = self.results / "7_0" / "kernel.json"
        self.result.write_bytes(CONTENT)
        self.marker = self.results / "7_0.done"
        self.mark()

    def mark(self, **changes: Any) -> None:
        files = {"kernel.json": hashlib.sha256(CONTENT).hexdigest()}
        marker = {"job": JOB.name, "image": JOB.image, "attempt": "7_0", "restarts": 0,
                  "node": "n1", "exit": 0, "fault": "", "files": files}  # fmt: skip
        self.marker.write_text(json.dumps(marker | changes))

    def judge(self) -> Outcome:
        return judge(JOB, "7_0", self.results, ENDED, self.local)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize("what", ["marker", "result"])
@pytest.mark.parametrize("attack", [_fifo, _link, _huge])
def test_only_plain_files_of_bounded_size_count(
    storage: Storage, what: str, attack: Callable[[Path], None]
) -> None:
    attack(getattr(storage, what))
    assert storage.judge().verdict == "refused"
    assert not storage.local.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"node": "n" * 1_000_000, "exit": 91}, {"fault": "x" * 1_000_000}, {"exit": 10**400},
        {"exit": False}, {"exit": "0"}, {"restarts": False}, {"files": {"a\n": HEX}},
    ],
    ids=["node", "fault", "exit", "bool", "text", "restarts", "newline"],
)  # fmt: skip
def test_marker_has_bounds(storage: Storage, changes: dict[str, Any]) -> None:
    storage.mark(**changes)
    outcome = storage.judge()
    assert outcome.verdict == "refused"
    assert len(outcome.why) < 1000


def test_marker_of_other_files_fills_no_disk_here(storage: Storage) -> None:
    more = {f"f{number}": hashlib.sha256(CONTENT).hexdigest() for number in range(3)}
    for name in more:
        (storage.results / "7_0" / name).write_bytes(CONTENT)
    storage.mark(files=more, exit=91)
    assert "lists f0, which the job does not write" in storage.judge().why
    assert not storage.local.exists()


def test_results_in_place_of_a_folder_are_a_fault(storage: Storage) -> None:
    storage.results.rename(storage.results.with_name("old"))
    storage.results.write_text("no folder")
    assert storage.judge().verdict == "fault"


def test_full_disk_here_does_not_refuse_a_result(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was sent stays valid: it is collected again, not sent again."""

    def full(self: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        outcome = storage.judge()
    assert outcome.verdict == "fault"
    assert "No space left on device" in outcome.why
    assert "collect again" in outcome.why
    assert list(storage.local.parent.iterdir()) == []
    assert storage.judge().verdict == "green"


def test_half_copied_result_is_refused_until_it_is_there(storage: Storage) -> None:
    storage.result.rename(storage.result.with_name("later"))
    assert "missing kernel.json" in storage.judge().why
    storage.result.with_name("later").rename(storage.result)
    assert storage.judge().verdict == "green"


def test_two_collects_at_once_agree(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one starts while the first copies; neither removes what the other has."""
    copying, second = threading.Event(), list[Outcome]()

    def slow(path: Path, most: int = 1 << 26) -> bytes:
        if path == storage.result and not copying.is_set():
            copying.set()
            other = threading.Thread(target=lambda: second.append(storage.judge()))
            other.start()
            other.join(0.5)  # it waits for the lock
            threads.append(other)
        return read_plain(path, most)

    threads: list[threading.Thread] = []
    monkeypatch.setattr(results, "read_plain", slow)
    first = storage.judge()
    threads[0].join()
    assert [first.verdict, second[0].verdict] == ["green", "green"]


def test_collected_result_stays_when_storage_is_changed(storage: Storage) -> None:
    assert storage.judge().verdict == "green"
    before = storage.local.stat().st_ino
    assert storage.judge().verdict == "green"
    assert storage.local.stat().st_ino == before, "a command that reads it would have lost it"


def test_changed_copy_here_is_replaced(storage: Storage) -> None:
    storage.judge()
    (storage.local / "kernel.json").write_text("{}")
    assert storage.judge().verdict == "green"
    assert (storage.local / "kernel.json").read_bytes() == CONTENT


def test_invalid_record_of_a_session_is_not_green(storage: Storage) -> None:
    """Its hash is right, but a request of it failed."""
    names, output = ("a.json", "a.jsonl.gz"), storage.results / "7_0"
    rows = rows_of(1, items=3)
    write_result(output / names[0], [*rows[:2], rows[2].model_copy(update={"finish": "error"})])
    image = read_arm(output / names[0]).result.server.image
    files = {name: file_digest(output / name) for name in names}
    storage.mark(files=files, image=image)
    spec = JOB.model_copy(update={"image": image, "session": True, "artifacts": names})
    outcome = judge(spec, "7_0", storage.results, ENDED, storage.local)
    assert outcome.verdict == "refused"
    assert "1 failed requests" in outcome.why


@pytest.mark.parametrize(
    "printed", ["", "b300", "b300|", "b300|gpu:b300:x|1", "\0|||||", "x" * 9999]
)
def test_hostile_list_of_nodes_is_a_mismatch(tmp_path: Path, printed: str) -> None:
    site = make_site(tmp_path, Project(REPO))
    with pytest.raises(ClusterMismatchError):
        require_cluster([JOB], site, lambda _: printed)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_storage_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """They could change the program of the node, which runs as this user."""
    folder = tmp_path / "runs"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(RunFolderError, match="can be written by others"):
        make_own(folder)


def test_link_in_place_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, match="is a link"):
        require_own(tmp_path / "run")


def test_what_is_written_to_storage_is_closed_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_own(tmp_path / "runs")
        (tmp_path / "runs" / "node.py").write_text("")
        modes = [path.stat().st_mode & 0o022 for path in (tmp_path / "runs").rglob("*")]
        assert modes == [0]
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "printed", ["", "../../x", "12\n34", "12;a\n12;b", "Submitted batch job 12", "1" * 40]
)
def test_hostile_job_id_is_refused_and_cancelled(tmp_path: Path, printed: str) -> None:
    site = make_site(tmp_path, Project(REPO))
    asked: list[str] = []

    def ask(argv: Sequence[str]) -> str:
        asked.append(argv[0])
        return printed if "--parsable" in argv else ""

    record = RunRecord(run="r", scheduler="slurm", storage="/s", specs=(JOB,), attempts={})
    with pytest.raises(SchedulerError, match="no job id"):
        send(batches([JOB], site, "r"), tmp_path, ask, record)
    assert asked[-1] == "scancel"


@pytest.mark.parametrize(
    "option",
    [
        "--array=0-99",
        "--job-name=x",
        "--export=ALL",
        "--requeue",
        "--wrap=true",
        "--parti=x",
        "--reque",
        "--gpus=9",
        "--gpus-per-node=9",
    ],
)
def test_option_of_dispatch_itself_is_refused(tmp_path: Path, option: str) -> None:
    """With another array or name, a result would be of another job, or none would be found."""
    new = f'account = "lab"\noptions = ["{option}"]'
    site = make_site(tmp_path, Project(REPO), 'account = "lab"', new)
    with pytest.raises(SiteFileError, match=option.partition("=")[0]):
        batches([JOB], site, "r")


@pytest.mark.parametrize("field", ["root", "partition", "gres", "account", "registry", "options"])
@pytest.mark.parametrize(
    "text",
    ["a; rm -rf /", "a\\n#SBATCH --uid=0", "$(id)", "a`id`", "a b", "{{ 1 }}", "'x", "a\\u2028"],
)
def test_site_file_has_no_words_of_a_shell(tmp_path: Path, field: str, text: str) -> None:
    values = {
        "root": ('root = "/shared/forge"', f'root = "/{text}"'),
        "partition": ('partition = "b300"', f'partition = "{text}"'),
        "gres": ('gres = "b300"', f'gres = "{text}"'),
        "account": ('account = "lab"', f'account = "{text}"'),
        "registry": ('"registry.lab:5000/forge/vllm"', f'"registry.lab/{text}"'),
        "options": ('account = "lab"', f'options = ["--comment={text}"]'),
    }
    with pytest.raises(SiteFileError):
        make_site(tmp_path, Project(REPO), *values[field])
