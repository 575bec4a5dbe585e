"""A session starts its servers in turns, keeps what is valid, and goes on where it was ended."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import SERVER
from vllm_forge.bench import arms, measure, turns
from vllm_forge.bench.errors import (
    ArmUnknownError,
    GateUndecidedError,
    InvalidResultError,
    ServerStartError,
    SessionFileError,
    StartFailedError,
)
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.session import (
    PLAN,
    Launch,
    Plan,
    Session,
    read_plan,
)
from vllm_forge.bench.turns import JOURNAL, record_path, run_plan
from vllm_forge.cli import main
from vllm_forge.host import Reply, write_json
from vllm_forge.host import run as run_module
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GPU = "0, NVIDIA H200, 9.0, 580.1, 143771, Disabled, Completed, Success\n"
ROW: dict[str, Any] = {"command": ["x"], "model": "m"}
SESSION: dict[str, Any] = {
    "session": "s", "starts": 2, "workload": "texts.jsonl", "checkpoint": "x", "warm": 1,
    "concurrency": [1, 2], "max_tokens": 4, "ignore_eos": True, "arm": {"a": ROW, "b": ROW},
}  # fmt: skip


class StubProbe:
    def __init__(self, text: str = GPU) -> None:
        self.text = text

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return Reply(code=0, text=self.text)


@pytest.fixture
def free_port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(turns, "POLL_S", 0.02)
    monkeypatch.setattr(measure, "client_rate", lambda *_: 1e12)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@pytest.fixture
def planned(tmp_path: Path, free_port: int) -> Callable[..., Path]:
    """Write a plan of fake servers; ``faults``: of arms. The folder of the plan."""

    def plan(*, starts: int = 2, prompts: int = 6, **faults: str) -> Path:
        folder = tmp_path / "plan"
        folder.mkdir(exist_ok=True)
        (tmp_path / "caches").mkdir(exist_ok=True)
        lines = [json.dumps({"item": f"q{n}", "prompt": f"text {n}"}) for n in range(prompts)]
        text = "\n".join(lines).encode()
        (folder / "texts.jsonl").write_bytes(text)
        session = Session.model_validate({**SESSION, "starts": starts})
        digest = hashlib.sha256(text).hexdigest()
        server = {**SERVER, "image": "sha256:" + "2" * 64, "gpu": "unknown", "driver": "unknown"}
        launches = {
            name: Launch.model_validate({
                "argv": [sys.executable, "-m", "tests.support.bench_server", str(free_port),
                         faults.get(name, ""), str(tmp_path / "caches" / "kernels")],
                "env": {"PYTHONPATH": os.pathsep.join(sys.path)}, "model": "m", "server": server,
            })
            for name in session.arm
        }  # fmt: skip
        asked = arms.asked_by(session)
        plan = Plan(
            session="s", turns=session.turns, arms=launches, workload="texts.jsonl", warm=1,
            conditions=[arms.conditions_of(asked, folder / "texts.jsonl", c, digest, tmp_path)
                        for c in (1, 2)],
            port=free_port, ready_s=30, caches=(str(tmp_path / "caches"),),
        )  # fmt: skip
        write_json(folder / PLAN, plan.model_dump(mode="json"))
        return folder

    return plan


def run(folder: Path, *, retry: bool = False) -> Path:
    output = folder.parent / "output"
    run_plan(folder, output, retry=retry, probe=StubProbe())
    return output


def attempts(output: Path) -> list[tuple[int, str, str]]:
    rows = json.loads((output / JOURNAL).read_text())["attempts"]
    return [(row["order"], row["arm"], row["state"]) for row in rows]


def test_turns_are_abba() -> None:
    arms = {"arm": {"a": ROW, "b": ROW, "c": ROW}, "starts": 4}
    assert "".join(Session.model_validate({**SESSION, **arms}).turns) == "abccbaabccba"


def test_each_start_has_a_server_of_its_own(
    planned: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(planned())
    assert attempts(output) == [(0, "a", "done"), (1, "b", "done"), (2, "b", "done"),
                                (3, "a", "done")]  # fmt: skip
    assert "start 3 of arm a: " in capsys.readouterr().err
    assert len(list((output / "logs").iterdir())) == 4
    assert json.loads((output / JOURNAL).read_text())["concurrency"] == [1, 2]
    for concurrency in (1, 2):
        a, b = (read_arm(record_path(output, name, concurrency)) for name in "ab")
        assert [start.order for start in a.result.starts] == [0, 3]
        assert [start.order for start in b.result.starts] == [1, 2]
        assert (a.result.server.gpu, a.result.server.driver) == ("NVIDIA H200", "580.1")
        assert a.result.conditions.concurrency == concurrency
        # A new process counts from zero: only the warm-up was before the window of the first cell.
        windows = [start.window for start in a.result.starts]
        assert {window.before.drafts for window in windows if window} == {
            2 if concurrency < 2 else 8
        }
    items = {row.item for row in read_arm(record_path(output, "a", 2)).rows}
    assert items == {"q4", "q5"}
    paths = [str(record_path(output, name, 1)) for name in "ab"]
    assert main(["bench", "gate", *paths]) == GateUndecidedError.exit_code


def test_failing_crosscheck_costs_only_its_result(
    planned: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planned(starts=1)
    script = "printf 'called \\033[2J'; exit 3"
    edit(folder, crosscheck={"arm": "b", "command": ["sh", "-c", script]})
    output = run(folder)
    assert attempts(output) == [(0, "a", "done"), (1, "b", "done")]
    assert "no crosscheck: sh exited with 3\ncalled \\x1b[2J" in capsys.readouterr().err


def test_other_tool_and_we_begin_in_turns(
    planned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = planned(starts=2), dict[int, bool]()

    def noted(*args: Any, order: int, **options: Any) -> Any:
        before[order] = (results / f"{order:02}" / "other.json").exists()
        return measure.measure(*args, order=order, **options)

    monkeypatch.setattr(turns, "measure", noted)
    edit(folder, crosscheck={"arm": "b", "command": ["touch", "{output}/other.json"]})
    results = folder.parent / "output" / "crosscheck"
    run(folder)
    assert before == {0: False, 1: False, 2: True, 3: False}
    assert sorted(path.parent.name for path in results.glob("*/other.json")) == ["01", "02"]


def test_run_goes_on_after_the_last_start(planned: Callable[..., Path], monkeypatch: Any) -> None:
    folder, began = planned(starts=1), []
    start = turns.Run.start

    def interrupted(self: turns.Run, order: int) -> None:
        began.append(order)
        if order == 1 and len(began) == 2:
            raise KeyboardInterrupt
        start(self, order)

    monkeypatch.setattr(turns.Run, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    output = run(folder)
    assert run(folder) == output
    assert began == [0, 1, 1]
    assert attempts(output)[1:] == [(1, "b", "interrupted"), (1, "b", "done")]


def test_killed_run_is_written_down(planned: Callable[..., Path]) -> None:
    """The file says "running" where nothing could be written; half a start is kept once."""
    folder = planned(starts=1)
    output = run(folder)
    journal = json.loads((output / JOURNAL).read_text())
    journal["attempts"][1]["state"] = "running"
    write_json(output / JOURNAL, journal)
    before = record_path(output, "b", 1).read_bytes()
    record_path(output, "b", 2).unlink()
    run(folder)
    assert attempts(output)[1:] == [(1, "b", "interrupted"), (1, "b", "done")]
    assert record_path(output, "b", 1).read_bytes() == before
    assert [s.order for s in read_arm(record_path(output, "b", 2)).result.starts] == [1]


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [("dead", ServerStartError, "it ended with 1\nno model here"),
     ("failed", InvalidResultError, "failed requests"),
     ("jit", InvalidResultError, "files were compiled in the window"),
     ("cold", InvalidResultError, "the caches were cold: it compiled 1 files")],
)  # fmt: skip
def test_failed_start_is_not_repeated_unasked(
    fault: str, error: type[Exception], text: str, planned: Callable[..., Path]
) -> None:
    folder = planned(a=fault, starts=1)
    with pytest.raises(error, match=text):
        run(folder)
    output = folder.parent / "output"
    assert not list(output.glob("*-c*"))
    with pytest.raises(StartFailedError, match=f"start 0 of arm a failed before: {error.__name__}"):
        run(folder)
    assert attempts(output) == [(0, "a", "failed")]
    if fault == "cold":  # now it is warm
        run(folder, retry=True)
        assert attempts(output) == [(0, "a", "failed"), (0, "a", "done"), (1, "b", "done")]
        (start,) = read_arm(record_path(output, "a", 1)).result.starts
        assert (start.cached, start.compiled) == (1, 0)


def test_fault_names_the_start_by_its_order(planned: Callable[..., Path]) -> None:
    with pytest.raises(InvalidResultError, match="start 1: the caches were cold"):
        run(planned(b="jit", starts=1))


def test_servers_port_must_be_free(planned: Callable[..., Path], free_port: int) -> None:
    folder = planned()
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        with pytest.raises(ServerStartError, match=f"port {free_port} is in use"):
            run(folder)


def test_sessions_do_not_share_a_port(planned: Callable[..., Path], free_port: int) -> None:
    """The other one's server does not listen yet."""
    folder = planned()
    refused = pytest.raises(ServerStartError, match=f"port {free_port} is in use")
    with turns._port(read_plan(folder)), refused:
        run(folder)
    assert attempts(run(folder, retry=True))[-1] == (3, "a", "done")


def test_answers_of_another_server_are_refused(
    planned: Callable[..., Path], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It listens on the same port, as vLLM's servers can, before the window has ended."""
    folder, calls = planned(), []

    def join(*args: Any, **options: Any) -> Any:
        measured = measure.measure(*args, **options)
        calls.append(measured)
        if len(calls) == len(read_plan(folder).conditions):
            other.bind(("127.0.0.1", free_port))
            other.listen()
        return measured

    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        monkeypatch.setattr(turns, "measure", join)
        with pytest.raises(ServerStartError, match="several servers listen on port"):
            run(folder)
    assert not list((folder.parent / "output").glob("*-c*.json"))


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="needs a kernel with IPv6")
def test_another_server_in_ipv4_is_found(planned: Callable[..., Path], free_port: int) -> None:
    """It takes the requests of one that listens in both, as vLLM's do with --host ::."""
    plan = read_plan(planned())
    with socket.socket(socket.AF_INET6) as own, socket.socket() as other:
        for place, address in ((own, "::"), (other, "127.0.0.1")):
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            place.bind((address, free_port))
            place.listen()
        turns._require_alone(plan, proxied=True)
        with pytest.raises(ServerStartError, match="several servers listen on port"):
            turns._require_alone(plan, proxied=False)


def test_server_that_never_answers_is_ended(
    planned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that it started: each holds the other end of a pipe."""
    folder = planned(starts=1)
    fifo = folder / "held"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    plan = json.loads((folder / PLAN).read_text())
    script = "exec 3> $0; echo up >&3; trap '' TERM; sleep 600 & wait"
    plan["arms"]["a"]["argv"] = ["sh", "-c", script, str(fifo)]
    write_json(folder / PLAN, {**plan, "ready_s": 0.0})
    monkeypatch.setattr(turns, "is_healthy", lambda _: select.select([held], [], [], 10) and False)
    monkeypatch.setattr(run_module, "GRACE_S", 0.1)
    with pytest.raises(ServerStartError, match="no answer in 0 s"):
        run(folder)
    assert os.read(held, 9) == b"up\n"
    select.select([held], [], [], 10)
    assert os.read(held, 9) == b""
    os.close(held)


def test_plan_is_run_as_a_program_until_it_is_ended(
    planned: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGTERM ends the server, and is written down; what runs has what an image has."""
    folder = planned(starts=1)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{GPU.strip()}'\n")
    (tools / "nvidia-smi").chmod(0o755)
    plan = json.loads((folder / PLAN).read_text())
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    held = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = "exec 3> $0; echo up >&3; exec sleep 600"
    plan["arms"]["a"]["argv"] = ["sh", "-c", script, str(fifo)]
    write_json(folder / PLAN, plan)
    command = [sys.executable, "-m", "vllm_forge.bench.turns", str(tmp_path),
               str(tmp_path / "out"), folder.name]  # fmt: skip
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}",
           "PYTHONPATH": os.pathsep.join(sys.path)}  # fmt: skip
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        select.select([held], [], [], 60)
        assert os.read(held, 9) == b"up\n"
        process.send_signal(signal.SIGTERM)
    assert process.returncode
    select.select([held], [], [], 60)
    assert os.read(held, 9) == b""
    os.close(held)
    assert attempts(tmp_path / "out" / folder.name) == [(0, "a", "interrupted")]


def test_host_without_gpu_is_refused(planned: Callable[..., Path]) -> None:
    with pytest.raises(ArmUnknownError, match="no GPU is listed: nothing"):
        run_plan(planned(), planned().parent / "output", probe=StubProbe("nothing"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda folder: (folder / "texts.jsonl").write_text('{"item": "a", "prompt": "b"}'),
      "not those of the plan"),
     (lambda folder: (folder / PLAN).write_text("{}"), "invalid plan"),
     (lambda folder: (folder / PLAN).unlink(), "missing plan"),
     (lambda folder: edit(folder, turns=["a", "c"]), "no arm c"),
     (lambda folder: edit(folder, warm=3), "6 prompts are too few")],
)  # fmt: skip
def test_damaged_plan_is_refused(
    damage: Callable[[Path], object], message: str, planned: Callable[..., Path]
) -> None:
    folder = planned()
    damage(folder)
    with pytest.raises(SessionFileError, match=message):
        run(folder)


def edit(folder: Path, **fields: object) -> None:
    write_json(folder / PLAN, {**json.loads((folder / PLAN).read_text()), **fields})


def test_results_of_another_plan_are_not_continued(planned: Callable[..., Path]) -> None:
    folder = planned(starts=1)
    run(folder)
    edit(folder, session="other")
    with pytest.raises(SessionFileError, match="another plan"):
        run(folder)


@pytest.fixture
def host(root: Path, planned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with docker and an image; the folder of a workload."""
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr(arms, "built_digest", lambda path: "sha256:" + "3" * 64)
    monkeypatch.setattr(arms, "running_engine", lambda *_: "docker")
    monkeypatch.setattr(arms, "choose_gpus", lambda *_: ())
    monkeypatch.setattr("vllm_forge.host.HostProbe", StubProbe)
    monkeypatch.setattr(turns, "HostProbe", StubProbe)
    folder = planned()
    (folder / PLAN).unlink()
    return folder


def session_file(folder: Path, *rows: str, port: int = 8000) -> Path:
    path = folder / "session.toml"
    path.write_text("\n".join([
        'session = "s"', "starts = 1", 'workload = "texts.jsonl"', 'checkpoint = "."', "warm = 1",
        "concurrency = [2]", "max_tokens = 4", "ignore_eos = true", f"port = {port}", *rows,
    ]))  # fmt: skip
    return path


def test_presets_are_started_as_serve_does(host: Path, root: Path, tmp_path: Path) -> None:
    project, caches = Project(root), tmp_path / "caches"
    path = session_file(host, '[arm.plain]\npreset = "plain"', '[arm.mtp]\npreset = "mtp"',
                        'env = {VLLM_X = "1"}')  # fmt: skip
    plan, _ = arms.plan_of(project, StubProbe(), project.cell("b300"), path, caches=caches,
                           engine=None)  # fmt: skip
    assert plan.turns == ("plain", "mtp")
    launch = plan.arms["mtp"]
    name = "vllm-forge-bench-mtp"
    assert {f"--name={name}", f"--volume={caches}:/cache", "--publish=8000:8000",
            "--env=VLLM_X=1"} < {*launch.argv}  # fmt: skip
    assert any(word.endswith("@sha256:" + "3" * 64) for word in launch.argv)
    assert launch.remove == ("docker", "rm", "--force", name)
    assert launch.server.image == "sha256:" + "3" * 64
    assert launch.server.env_sha256 == hashlib.sha256(b'{"VLLM_X": "1"}').hexdigest()
    assert "env_sha256" not in plan.arms["plain"].server.model_dump()
    assert any("num_speculative_tokens" in word for word in launch.server.argv)
    assert launch.server.gpus == 4


def test_commands_are_started_with_watched_caches(
    host: Path, tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [sys.executable, "-m", "tests.support.bench_server", str(free_port)]
    path = json.dumps(os.pathsep.join(sys.path))
    row = f'command = {json.dumps(argv)}\nmodel = "m"\nenv = {{PYTHONPATH = {path}}}'
    session = session_file(host, f"[arm.a]\n{row}", f"[arm.b]\n{row}", port=free_port)
    output = tmp_path / "out"
    command = ["bench", "run", "b300", str(session), f"--caches={tmp_path}", f"--output={output}"]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(output / "a-c2.json"), str(output / "b-c2.json")]
    plan = json.loads((output / PLAN).read_text())
    assert plan["arms"]["a"]["env"]["TRITON_CACHE_DIR"] == f"{tmp_path}/triton"
    assert main(command) == 0  # nothing is left to do
    session.write_text(session.read_text().replace("starts = 1", "starts = 2"))
    assert main(command) == SessionFileError.exit_code
    assert "another plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [("", "expected a preset, or a command and its model"),
     ('command = ["x"]', "expected a preset, or a command and its model"),
     ('command = ["x"]\nmodel = "m"\nenv = {TRITON_CACHE_DIR = "/x"}', "TRITON_CACHE_DIR is set"),
     ('command = ["x"]\nmodel = "m"\nenv = {"A B" = "/x"}', "invalid session"),
     ("colour = 1", "colour"),
     ('preset = "mtp"\n[crosscheck]\narm = "b"\ncommand = ["x"]', "crosscheck: no arm b")],
)  # fmt: skip
def test_invalid_session_is_refused(
    row: str, message: str, host: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_file(host, f"[arm.a]\n{row}")
    command = ["bench", "run", "b300", str(session), f"--caches={tmp_path}", f"--output={tmp_path}"]
    assert main(command) == SessionFileError.exit_code
    assert message in capsys.readouterr().err


def test_start_that_is_done_without_a_record_is_refused(planned: Callable[..., Path]) -> None:
    """A list of starts that was edited, or a record that was deleted, measures nothing."""
    folder = planned()
    output, plan = folder.parent / "output", read_plan(folder)
    rows = [
        {"order": order, "arm": arm, "state": "done", "began": "2026-11-30T10:00:00+00:00"}
        for order, arm in enumerate(plan.turns)
    ]
    write_json(output / JOURNAL, {"plan_sha256": plan.digest, "attempts": rows})
    with pytest.raises(SessionFileError, match="start 0 is done, but its record does not have it"):
        run(folder)
