"""The program of a node: stages an image, runs one job in it, and seals what it wrote.

    node.py RUN NAME --attempt ID [--restarts N] [--cuda IDS] [--gpus IDS]

Stands alone on Python's standard library (3.9). RUN is the folder of a run, with jobs.json. What
the job writes goes to RUN/results/NAME/ATTEMPT. When it has ended, ATTEMPT.done appears beside that
folder by one rename: exit code, image, and the SHA-256 of each expected file. Without that file
the attempt did not end, and nothing of it counts.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

CHUNK = 1 << 22
TAIL = 2000  # characters of a failed command's output
NAME = re.compile(r"\w[\w.-]*")


class Fault(Exception):
    """The node could not run the job."""


def hash_file(path: Path, copy: Any = None) -> str:
    """SHA-256 of a file, which is copied on the way to the open file ``copy``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
            if copy is not None:
                copy.write(block)
    return digest.hexdigest()


def scratch_folder(parent: str) -> Path:
    """The user's own folder on the local disk; others must not be able to write there."""
    folder = Path(parent) / f"vllm-forge-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise Fault(f"{folder} is a link or can be written by others: delete it")
    return folder


def stage(run: Path, job: dict[str, Any], scratch: Path) -> str:
    """Where the image is on this node; a squashfs is copied here once, and compared."""
    digest = job["image"].partition(":")[2]
    images = run.parent.parent / "images"
    if job["source"] == "kit":
        kit = images / f"{digest}.kit"
        found = json.loads((kit / "manifest.json").read_text(encoding="utf-8"))["digest"]
        if found != job["image"]:
            raise Fault(f"{kit} is of {found}, expected {job['image']}")
        return str(kit)
    if job["source"] != "archive":
        return ""
    source, target = images / f"{digest}.sqsh", scratch / f"{job['archive']}.sqsh"
    with (scratch / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # jobs of one node start together
        if not target.exists():
            try:
                copy_image(source, target, job["archive"])
            except OSError as error:
                raise Fault(f"cannot copy {source} to {scratch}: {error.strerror}") from None
    return str(target)


def copy_image(source: Path, target: Path, digest: str) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent) as aside:
        found = hash_file(source, aside)
        aside.flush()
        if found != digest:
            raise Fault(f"{source} has sha256 {found}, expected {digest}")
        os.link(aside.name, target)


def fill(text: str, known: dict[str, str]) -> str:
    for name, value in known.items():
        text = text.replace(f"@{name}@", value)
    return text


def words(argv: list[str], known: dict[str, str]) -> list[str]:
    """The words of a command, those about GPUs only where there are any."""
    made = []
    for word in argv:
        if "@GPU@" in word:
            made += [word.replace("@GPU@", gpu) for gpu in known["GPUS"].split(",") if gpu]
        elif not any(f"@{name}@" in word and not known[name] for name in ("CUDA", "GPUS")):
            made.append(fill(word, known))
    return made


def call(argv: list[str]) -> None:
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise Fault(f"{argv[0]} exited with {done.returncode}: {done.stdout[-TAIL:].strip()}")


def wait_for(argv: list[str]) -> int:
    """Run a command, and pass SIGTERM on to it; its exit code."""
    asked, started = list[bool](), list["subprocess.Popen[bytes]"]()

    def pass_on(*_: object) -> None:
        asked.append(True)
        for process in started:
            process.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, pass_on)
    started.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL))
    if asked:  # while it was started
        started[0].send_signal(signal.SIGTERM)
    return started[0].wait()


def run_job(run: Path, job: dict[str, Any], known: dict[str, str]) -> int:
    """Run the job's command; SIGTERM is passed on, so that it can write what it has so far."""
    scratch = scratch_folder(job["scratch"])
    for folder in job["folders"]:
        Path(folder).mkdir(parents=True, exist_ok=True)
    known |= {"SCRATCH": str(scratch), "IMAGE": stage(run, job, scratch)}
    known["WORK"] = tempfile.mkdtemp(prefix="job-", dir=scratch)
    work = Path(known["WORK"])
    try:
        for name, text in job["files"].items():
            (work / name).write_text(fill(text, known), encoding="utf-8")
        for argv in job["prepare"]:
            call(words(argv, known))
        return wait_for(words(job["argv"], known))
    finally:
        for argv in job["cleanup"]:
            subprocess.run(words(argv, known), capture_output=True, check=False)
        shutil.rmtree(work, ignore_errors=True)


def seal(path: Path, record: dict[str, Any]) -> None:
    """Write the marker, which appears whole or not at all."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def stop(*_: object) -> NoReturn:
    raise Fault("ended by SIGTERM before the job's command started")


def main() -> int:
    parser = argparse.ArgumentParser(prog="node.py", usage=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--cuda", default="")
    parser.add_argument("--gpus", default="")
    args = parser.parse_args()
    if not NAME.fullmatch(args.attempt):
        parser.error(f"invalid --attempt {args.attempt!r}")
    signal.signal(signal.SIGTERM, stop)
    os.umask(0o022)  # no other user changes a result
    job = json.loads((args.run / "jobs.json").read_text(encoding="utf-8"))[args.name]
    # Started again: the first start may have left half a result, and is not to be replaced.
    attempt = f"{args.attempt}-r{args.restarts}" if args.restarts else args.attempt
    output = args.run / "results" / args.name / attempt
    record = {
        "job": args.name, "image": job["image"], "attempt": args.attempt,
        "restarts": args.restarts, "node": socket.gethostname(), "exit": None, "fault": "",
    }  # fmt: skip
    code = 1
    try:
        output.mkdir(parents=True)  # exists: an earlier start of the same attempt wrote there
        if args.restarts:
            record["fault"] = f"not run: the scheduler restarted it, {args.restarts} times"
        else:
            known = {"ATTEMPT": args.attempt, "CUDA": args.cuda, "GPUS": args.gpus}
            code = record["exit"] = run_job(args.run, job, known | {"OUTPUT": str(output)})
    except (OSError, ValueError, LookupError, Fault) as error:
        record["fault"] = f"{type(error).__name__}: {error}"[: 2 * TAIL]
        print(f"node.py: {record['fault']}", file=sys.stderr)
    files = {name: output / name for name in job["artifacts"]}
    record["files"] = {name: hash_file(path) for name, path in files.items() if path.is_file()}
    output.parent.mkdir(parents=True, exist_ok=True)
    seal(output.with_name(f"{attempt}.done"), record)
    return code


if __name__ == "__main__":
    sys.exit(main())
