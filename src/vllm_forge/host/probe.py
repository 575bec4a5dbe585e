"""Questions to the machine whose failure is an answer too; from life or from a recording."""

import re
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vllm_forge.host.errors import RecordingError
from vllm_forge.host.files import read_plain, write_whole
from vllm_forge.host.run import which

TIMEOUT_S = 30
KILLED_S = 2  # from SIGKILL to the end of a process that ends
MOST_REPLY, MOST_CODE = 1 << 24, 16  # bytes; docker info has about 20 KB
# What shells say for a command that does not exist or cannot start, timeout(1) for one that hangs.
NOT_FOUND, NOT_EXECUTED, TIMED_OUT = 127, 126, 124
NOT_APPLICABLE = {"N/A", "[N/A]", "Not Supported", "[Not Supported]"}
# Names of nvidia-smi --help-query-gpu, in the order of Gpu. fabric.*: since driver 525.
FIELDS = (
    "index,name,compute_cap,driver_version,memory.total,mig.mode.current,fabric.state,fabric.status"
)
GPU_QUERY = ("nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
# A question of its own: a driver that does not know one of these refuses all of them.
HEALTH_FIELDS = (
    "index,ecc.errors.uncorrected.volatile.total,retired_pages.pending,gpu_recovery_action"
)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A command's exit code and output: stdout; after a failure also stderr."""

    code: int
    text: str

    @property
    def missing(self) -> bool:
        return self.code == NOT_FOUND


class Probe(Protocol):
    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        """Run ``argv``; ``name`` says which question it is, for recordings."""


class HostProbe:
    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        del name
        program = which(argv[0])
        if program is None:
            return Reply(code=NOT_FOUND, text=f"{argv[0]}: not found\n")
        try:
            process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:  # e.g. an empty file, where an engine would mount a program
            return Reply(code=NOT_EXECUTED, text=f"{program}: {error.strerror}\n")
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Reply(code=TIMED_OUT, text=f"{shlex.join(argv)}: no answer in {TIMEOUT_S} s\n")
        finally:
            if process.returncode is None:
                _leave(process)
        # Where a command succeeds, stderr has warnings, which are not part of its JSON.
        text = stdout + (stderr if process.returncode else "")
        return Reply(code=process.returncode, text=text)


def _leave(process: "subprocess.Popen[str]") -> None:
    """Kill a command; what hangs in a driver ends when that answers, and is not waited for."""
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILLED_S)
    for pipe in filter(None, (process.stdout, process.stderr)):
        pipe.close()


@dataclass(frozen=True)
class RecordedProbe:
    """A folder with ``<name>.txt`` per question; ``<name>.code`` where the exit code is not 0."""

    folder: Path

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        """The recorded reply; a question without a file is a program that is not installed."""
        text, code = None, 0
        path = self.folder / f"{name}.txt"
        try:
            text = read_plain(path, MOST_REPLY).decode()
            path = self.folder / f"{name}.code"
            code = int(read_plain(path, MOST_CODE))
        except FileNotFoundError:
            if text is None:
                return Reply(code=NOT_FOUND, text=f"{argv[0]}: not found\n")
        except ValueError as error:
            what = f"not a recorded reply: {error}"
            remedy = "record the host again: nox -s doctor -- SKU --save DIR"
            raise RecordingError(what, where=path, remedy=remedy) from None
        return Reply(code=code, text=text)


@dataclass(frozen=True)
class RecordingProbe:
    """Asks another probe and keeps its replies in a folder that RecordedProbe reads."""

    inner: Probe
    folder: Path

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        reply = self.inner.ask(name, argv)
        code = f"{reply.code}\n" if reply.code else None
        for suffix, text in (("txt", reply.text), ("code", code)):
            path = self.folder / f"{name}.{suffix}"
            path.unlink(missing_ok=True)
            if text is not None and not reply.missing:
                write_whole(path, text)
        return reply


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    capability: str
    driver: str
    memory: int | None  # bytes; None where the driver gives no number, as with unified memory
    mig: bool
    fabric: str | None  # state of its NVLink fabric; None where it has none
    fault: str = ""  # a field and the error that stands in its place


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The rows that GPU_QUERY printed; ValueError if they have other columns.

    A GPU that does not answer has an error in the place of a value, as ``[Unknown Error]`` or
    ``[GPU is lost]``.
    """
    gpus: list[Gpu] = []
    for row in filter(str.strip, text.splitlines()):
        columns = [column.strip() for column in row.split(",")]
        index, name, capability, driver, memory, mig, state, status = columns
        fabric = "ready" if (state, status) == ("Completed", "Success") else f"{state}, {status}"
        size = re.fullmatch(r"[0-9]{1,9}", memory)
        errors = [
            f"{field} is {value}"
            for field, value in zip(FIELDS.split(","), columns, strict=True)
            if value.startswith("[") and value not in NOT_APPLICABLE
        ]
        gpus.append(
            Gpu(
                index=int(index) if re.fullmatch(r"[0-9]{1,4}", index) else len(gpus),
                name=name,
                capability=capability,
                driver=driver,
                memory=int(memory) << 20 if size else None,
                mig=mig == "Enabled",
                fabric=None if state in NOT_APPLICABLE or state.startswith("[") else fabric,
                fault=errors[0] if errors else "",
            )
        )
    return tuple(gpus)
