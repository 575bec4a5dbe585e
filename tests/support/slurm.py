"""A Slurm of this test's own: a controller and four nodes with GPUs that are not there."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "runc", "mksquashfs", "unsquashfs", "busybox")
GPUS = 4  # of each node
NODES = {"b300-1": "b300", "b300-2": "b300", "rtx-1": "rtxpro6000", "rtx-2": "rtxpro6000"}
CONF = """
ClusterName=forge
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
KillWait=2
MessageTimeout=10
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
"""


def missing_tools() -> list[str]:
    """What is not installed of what these tests need."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return [tool for tool in TOOLS if shutil.which(tool, path=path) is None]


def until(what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
    """Wait for a condition of a program that says nothing by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A running Slurm; its programs need ``SLURM_CONF``."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self, name: str, argv: Sequence[str]) -> None:
        """Start a daemon in the foreground, as a child of this process."""
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        with (self.folder / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                argv, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def kill(self, name: str) -> None:
        """End a daemon as a crash does."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def lose_node(self, name: str) -> None:
        """End a node's daemon and all that it started, as a power cut does."""
        self._kill({self.processes[name].pid}, f"SLURMD_NODENAME={name}")
        self.processes.pop(name).wait()

    def _kill(self, also: set[int], *variables: str) -> None:
        """Kill ``also``, this cluster's processes with these variables, and all below them."""
        marks = {f"\0{text}\0".encode() for text in (*variables, f"SLURM_CONF={self.conf}")}
        parents, jobs = dict[int, int](), set[int]()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                environment = b"\0" + (folder / "environ").read_bytes()
                if all(text in environment for text in marks):
                    jobs.add(int(folder.name))
        # What Slurm runs a job under is no child of the daemon, which may be started again.
        above = {parents[pid] for pid in jobs}
        steps = {pid for pid in above if _comm(pid).startswith("slurmstepd")}
        lost = also | jobs | steps
        while more := {pid for pid, parent in parents.items() if parent in lost} - lost:
            lost |= more
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none sees another end
            for pid in lost:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def end(self) -> None:
        """End the daemons, and jobs that a failed test left."""
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        self._kill({process.pid for process in self.processes.values() if process.poll() is None})

    def start_controller(self) -> None:
        self.start("slurmctld", ["/usr/sbin/slurmctld", "-D"])

    def run(self, *argv: str) -> str:
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def answers(self, *argv: str) -> bool:
        """Whether scontrol succeeds, by default in reaching the controller."""
        env = os.environ | {"SLURM_CONF": str(self.conf)}
        command = ["scontrol", *(argv or ["ping"])]
        return not subprocess.run(command, env=env, capture_output=True, check=False).returncode

    def restart_node(self, node: str) -> None:
        """Start a node's daemon again, which registers it, and give it work."""
        self.start(node, ["/usr/sbin/slurmd", "-D", "-N", node])
        change = ("update", f"nodename={node}", "state=resume")
        until(f"{node} can be resumed", lambda: self.answers(*change))
        until(f"{node} is back", lambda: self.states(node) <= {"idle", "mix", "alloc"})

    def save(self, job: str) -> None:
        """Have the controller write all that it knows; it does so some seconds after a change."""
        self.run("scontrol", "update", "nodename=rtx-2", "weight=2")
        self.run("scontrol", "update", f"jobid={job}", "comment=changed")
        now = time.time_ns()
        paths = [self.folder / "state" / name for name in ("job_state", "node_state")]
        until("the state is saved", lambda: all(p.stat().st_mtime_ns > now for p in paths))

    def states(self, nodes: str = ",".join(NODES)) -> set[str]:
        """Slurm's words for the states of nodes."""
        return set(self.run("sinfo", "-h", "-N", "-o", "%t", f"--nodes={nodes}").split())

    def logs(self) -> str:
        paths = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in paths)


def _write_conf(cluster: Cluster) -> None:
    folder, host = cluster.folder, socket.gethostname().partition(".")[0]
    lines = [CONF.format(host=host, port=_free_port(), folder=folder)]
    gres = []
    for name, kind in NODES.items():
        # Slurm sets CUDA_VISIBLE_DEVICES only for character devices.
        for number in range(GPUS):
            os.mknod(folder / f"{name}-gpu{number}", 0o20600, os.makedev(1, 3))
        gres.append(
            f"NodeName={name} Name=gpu Type={kind} Flags=nvidia_gpu_env "
            f"File={folder}/{name}-gpu[0-{GPUS - 1}]"
        )
        lines.append(
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={_free_port()} CPUs=8 "
            f"RealMemory=1000 Gres=gpu:{kind}:{GPUS} State=UNKNOWN"
        )
    for kind in dict.fromkeys(NODES.values()):
        own = ",".join(name for name in NODES if NODES[name] == kind)
        lines.append(f"PartitionName={kind} Nodes={own} MaxTime=60 State=UP")
    cluster.conf.write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text("\n".join(gres) + "\n")


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """A cluster whose daemons are children of this process, and end with the block."""
    cluster = Cluster(folder)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    _write_conf(cluster)
    with ExitStack() as stack:
        stack.callback(cluster.end)
        options = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        options += [f"--socket={folder}/munge.socket"]
        cluster.start("munged", ["/usr/sbin/munged", "--foreground", "--force", *options])
        until("munge", (folder / "munge.socket").exists)
        cluster.start_controller()
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            cluster.start(name, ["/usr/sbin/slurmd", "-D", "-N", name])
        until("the controller answers", cluster.answers)
        until("all nodes are idle", lambda: cluster.states() == {"idle"})
        yield cluster
