"""Kits: the image arrives whole and verified, its commands run in it, and damage is refused."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.checkpoints.fixtures.sparse import SIGN
from vllm_forge.gputest import kit_host
from vllm_forge.gputest.errors import KitError
from vllm_forge.gputest.kit import (
    HOST,
    RUN,
    make_kit,
    write_layers,
    write_parts,
)
from vllm_forge.gputest.launch import require_key
from vllm_forge.images.layer import ZstdLayerWriter
from vllm_forge.images.layout import Image, ImageLayer, write_image
from vllm_forge.images.store import write_layer
from vllm_forge.images.wheels import Entry
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EPOCH = 1735689600
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and enters an image: run as root")
CONFIG = {"Env": ["PATH=/bin:/usr/bin", "GREETING=hello"], "User": "10001:0", "WorkingDir": "/work"}
SUITE = 'echo suite "$@" "$GREETING" "$MORE"; ls /forge; echo result > /output/result; id -u'


def programs() -> dict[str, Path]:
    """A shell and a few tools of this host with their libraries: path in the image -> file."""
    files = {}
    for name in ("sh", "ls", "id", "sleep", "touch"):
        program = Path(str(shutil.which(name))).resolve()
        files[f"bin/{name}"] = program
        linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True)
        for word in linked.stdout.split():
            if word.startswith("/"):
                files[word.lstrip("/")] = Path(word).resolve()
    return files


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """An image of two layers, one of each compression."""
    work = tmp_path_factory.mktemp("image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_FORGE_CACHE", str(work / "cache"))
        tools = [
            Entry(path=path, content=file.read_bytes(), mode=0o755)
            for path, file in sorted(programs().items())
        ]
        lower = write_layer("tools", tools, EPOCH).blob
    (work / "files" / "work").mkdir(parents=True)
    with ZstdLayerWriter(work, EPOCH) as writer:
        writer.directory("work")
        writer.data("work/data", b"data" * 1000)
        upper = writer.close()
    layers = [ImageLayer(blob=blob, name="test") for blob in (lower, upper)]
    yield write_image(
        work / "layout", layers=layers, config=CONFIG, epoch=EPOCH, name="localhost/test:1"
    )


@pytest.fixture
def folder(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kit of the image with a suite that is a shell script."""
    content = tmp_path / "content"
    (content / "bundle").mkdir(parents=True)
    (content / "bundle" / "plan.json").write_text("{}")
    (content / "jit" / "abc").mkdir(parents=True)
    (content / "jit" / "abc" / "kernel").write_text("compiled")
    write_layers(image, content / "image")
    target = tmp_path / "kit"
    target.mkdir()
    manifest = {
        "schema": 2,
        "digest": f"sha256:{image.digest}",
        "suite": {
            "argv": ["/bin/sh", "-c", SUITE, "sh"],
            "last": ["--caches=/cache/jit/abc"],
            "env": {"MORE": "more"},
        },
        "bench": {"argv": ["/bin/sh", "-c", 'echo turns "$@"', "sh"], "last": [], "env": {}},
        "parts": write_parts(content, target, 1 << 20),
    }
    (target / "manifest.json").write_text(json.dumps(manifest))
    (target / "run.sh").write_text(RUN)
    shutil.copyfile(HOST, target / "kit.py")
    monkeypatch.setenv("FORGE_KIT_WORK", str(tmp_path / "kit-work"))
    return target


def call(folder: Path, *arguments: str, code: int = 0) -> str:
    """Both outputs of ``run.sh``."""
    done = subprocess.run(
        ["sh", str(folder / "run.sh"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@ROOT_ONLY
def test_suite_runs_in_the_image(folder: Path, tmp_path: Path) -> None:
    output = call(folder, "go", str(tmp_path / "out"), "--tier=kernel")
    assert "suite --tier=kernel --caches=/cache/jit/abc hello more\nplan.json\n0\n" in output
    assert (tmp_path / "out" / "result").read_text() == "result\n"
    assert (tmp_path / "kit-work" / "cache-0" / "jit" / "abc" / "kernel").exists()
    shutil.move(tmp_path / "kit-work/cache-0/jit/abc", tmp_path / "kit-work/cache-0/jit/other")
    again = call(folder, "go", str(tmp_path / "again"), "x")
    assert (tmp_path / "kit-work/cache-0/jit/abc/kernel").exists()  # beside those of another stack
    assert "suite x" in again
    assert (tmp_path / "again" / "result").exists()


def test_compiled_kernels_are_packed_in_parts_for_the_next_kit(
    folder: Path, tmp_path: Path
) -> None:
    """The folder that comes out is one for ``gpu kit --caches``."""
    key, out, back = {"tree": "7c43"}, tmp_path / "parts", tmp_path / "back"
    assert "run `go` first" in call(folder, "caches", str(out), code=1)
    stack = tmp_path / "kit-work" / "cache-0" / "jit" / "abc"
    (stack / "triton" / "deep").mkdir(parents=True)
    (stack / "caches.json").write_text(json.dumps(key))
    kernel = os.urandom(100_000)
    (stack / "triton" / "deep" / "kernel").write_bytes(kernel)
    out.mkdir()
    (out / "caches.tar.gz.009").write_text("of an earlier call")
    output = call(folder, "caches", str(out), "--max-part", "0.03")
    parts = sorted(out.iterdir())
    assert f"{len(parts)} parts" in output
    assert [part.name[-3:] for part in parts] == ["000", "001", "002", "003"]
    assert [part.stat().st_size for part in parts[:-1]] == [30_000] * 3
    assert 0 < parts[-1].stat().st_size <= 30_000
    back.mkdir()
    join = f"cat {out}/caches.tar.gz.* | tar -xz -C {back}"
    subprocess.run(["sh", "-c", join], check=True)
    require_key(back / "jit" / "abc", key)
    assert (back / "jit" / "abc" / "triton" / "deep" / "kernel").read_bytes() == kernel


def test_failed_packing_keeps_the_earlier_parts(folder: Path, tmp_path: Path) -> None:
    stack, out = tmp_path / "kit-work" / "cache-0" / "jit" / "abc", tmp_path / "parts"
    stack.mkdir(parents=True)
    (stack / "kernel").write_bytes(os.urandom(100_000))
    call(folder, "caches", str(out))
    before = {part.name: part.read_bytes() for part in out.iterdir()}
    output = call(folder, "caches", str(out), "--max-part", "0.00001", code=1)
    assert "split exited with 1" in output  # it has three digits for the parts
    assert {part.name: part.read_bytes() for part in out.iterdir()} == before


@pytest.mark.parametrize("command", ["take", "caches"])
def test_folder_that_cannot_be_made_is_an_error(
    folder: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    if command == "take":
        monkeypatch.setenv("FORGE_KIT_WORK", str(tmp_path / "file"))
    else:
        (tmp_path / "kit-work" / "cache-0" / "jit").mkdir(parents=True)
    arguments = [str(tmp_path / "file")] if command == "caches" else []
    assert call(folder, command, *arguments, code=1).startswith("kit.py: FileExistsError")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "x"])
def test_a_part_of_caches_has_a_size(folder: Path, tmp_path: Path, size: str) -> None:
    code = 2 if size == "x" else 1
    assert "--max-part" in call(folder, "caches", str(tmp_path), f"--max-part={size}", code=code)


@ROOT_ONLY
@pytest.mark.parametrize("sessions", [True, False])
def test_sessions_of_benchmarks_run_in_the_image(
    sessions: bool, folder: Path, tmp_path: Path
) -> None:
    content = tmp_path / "content"
    if sessions:
        (content / "bundle" / "bench").mkdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"] = write_parts(content, folder, 1 << 20)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    output = call(folder, "bench", str(tmp_path / "out"), "tiny", "--retry", code=not sessions)
    assert ("turns tiny --retry" if sessions else "make it with --session") in output


@ROOT_ONLY
def test_runs_go_side_by_side(folder: Path, tmp_path: Path) -> None:
    """So that a host with two GPUs runs two tiers at once."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["suite"]["argv"][2] = "echo ready; read word; echo $word"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = ["sh", str(folder / "run.sh"), "go", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        assert call(folder, "exec", "--", "sh", "-c", "echo beside").endswith("beside\n")
        assert process.communicate("end\n")[0] == "end\n"
    assert process.returncode == 0


@ROOT_ONLY
def test_parts_may_arrive_one_by_one(folder: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    parts = sorted(folder.glob("part-*"))
    assert len(parts) > 2
    for part in parts[1:]:
        shutil.move(part, away)
    assert "1 of " in call(folder, "take")
    for part in parts[1:]:
        (folder / parts[0].name).unlink(missing_ok=True)
        shutil.move(away / part.name, folder)
        output = call(folder, "take")
        (folder / part.name).unlink()
    assert f"{len(parts)} of {len(parts)}" in output
    assert "image sha256:" in call(folder, "unpack")


@ROOT_ONLY
def test_commands_run_as_the_images_user(folder: Path, tmp_path: Path) -> None:
    call(folder, "unpack")
    script = "id -u; ls; touch /cache/mine; touch /work/mine || echo read-only"
    output = call(folder, "exec", "--", "sh", "-c", script)
    assert output.startswith("10001\ndata\n"), "its output has other lines before"
    assert output.endswith("read-only\n")
    assert (tmp_path / "kit-work" / "cache-10001" / "mine").exists()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "weights").touch()
    bind = ["--bind", f"{tmp_path / 'models'}:/output", "--env", "GREETING=bye", "--uid", "7"]
    output = call(folder, "exec", *bind, "--", "sh", "-c", "ls /output; echo $GREETING; id -u")
    assert output.endswith("weights\nbye\n7\n")
    assert "exit" not in call(folder, "exec", "--", "sh", "-c", "exit 7", code=7)


@ROOT_ONLY
def test_own_names_are_found_without_a_name_server(folder: Path) -> None:
    """An image may have those of the host that built it; a question without answer takes 10 s."""
    call(folder, "unpack")
    script = "while read address names; do echo $address: $names; done < /etc/hosts"
    output, name = call(folder, "exec", "--", "sh", "-c", script), socket.gethostname()
    assert "\n127.0.0.1: localhost\n" in output
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))
        address = one.getsockname()[0]
    assert f"\n{address}: {name}\n::ffff:{address}: {name}\n" in output
    known = Path("/etc/resolv.conf").read_text().split()[-1]
    assert known in call(
        folder, "exec", "--", "sh", "-c", "while read x; do echo $x; done < /etc/resolv.conf"
    )


@ROOT_ONLY
def test_images_user_reaches_the_driver_whatever_the_umask(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root's umask is 077 on hardened hosts. Of two drivers, the loader takes the first."""
    names = ("libcuda.so.1", "libnvidia-gpucomp.so.580.65.06")
    files = [tmp_path / place / name for name in names for place in ("first", "second")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{file.parent.name} driver")
    rows = [f"{file.name} (libc6,x86-64) => {file}" for file in files]
    ldconfig = tmp_path / "bin" / "ldconfig"
    ldconfig.parent.mkdir()
    ldconfig.write_text("\n".join(["#!/bin/sh", *(f"echo '{row}'" for row in rows)]))
    ldconfig.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ldconfig.parent}:{os.environ['PATH']}")
    before = os.umask(0o077)
    script = "id -u; cd /usr/local/nvidia/lib64; ls; read word < libcuda.so.1; echo $word"
    try:
        call(folder, "unpack")
        output = call(folder, "exec", "--", "sh", "-c", script)
    finally:
        os.umask(before)
    assert output.split("\n") == ["10001", *names, "first driver", ""]


@ROOT_ONLY
def test_path_without_programs_of_administrators_is_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `su` of Debian leaves it."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert call(folder, "exec", "--", "sh", "-c", "echo run").endswith("\nrun\n")


@ROOT_ONLY
@pytest.mark.parametrize(
    ("name", "passed"),
    [
        ("NCCL_NVLS_ENABLE", True),
        ("CUDA_VISIBLE_DEVICES", True),
        *(
            (name, False)
            for name in ("LD_PRELOAD_X", "PYTEST_ADDOPTS", "PYTHONPATH", "VLLM_FORGE_RACE_SECONDS")
        ),
    ],
)
def test_only_variables_of_the_hosts_links_and_gpus_are_passed_on(
    folder: Path, name: str, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(folder, "unpack")
    monkeypatch.setenv(name, "0")
    output = call(folder, "exec", "--", "sh", "-c", f'echo "=${name}="')
    assert output.endswith("=0=\n" if passed else "==\n")


@ROOT_ONLY
def test_ending_the_kit_ends_its_commands(folder: Path) -> None:
    call(folder, "unpack")
    script = "trap 'echo stopped; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    command = ["sh", str(folder / "run.sh"), "exec", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 3


def test_layer_that_deletes_files_is_refused(tmp_path: Path) -> None:
    """As a whiteout does, which tar would unpack as a file, and keep what it deletes."""
    (folder := tmp_path / "image").mkdir()
    with tarfile.open(tmp_path / "layer.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("etc/.wh.passwd"))
    layer = (tmp_path / "layer.tar").read_bytes()
    (folder / "0.tar.gz").write_bytes(gzip.compress(layer))
    config = json.dumps({"rootfs": {"diff_ids": [f"sha256:{digest(layer)}"]}, "config": {}})
    (folder / "config.json").write_text(config)
    manifest = json.dumps({"config": {"digest": f"sha256:{digest(config.encode())}"}})
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(SystemExit, match=r"a layer deletes files \(\.wh\.passwd\)"):
        kit_host.unpack_image(tmp_path, f"sha256:{digest(manifest.encode())}", tmp_path)
    assert not list(tmp_path.glob("root-*"))


@ROOT_ONLY
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_without_a_handler_is_ended(folder: Path, number: signal.Signals) -> None:
    """The first process of a PID namespace would ignore what it does not handle."""
    call(folder, "unpack")
    argv = ["sh", str(folder / "run.sh"), "exec", "--", "sh", "-c", "echo ready; exec sleep 60"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        process.send_signal(number)
    assert process.returncode == 128 + number


@ROOT_ONLY
def test_ctrl_c_reaches_the_command_once(folder: Path) -> None:
    """A second one would interrupt pytest while it ends its servers and writes its results."""
    call(folder, "unpack")
    script = "trap 'echo got' INT; echo ready; read word; read word; exit 3"
    ours, terminal = pty.openpty()
    argv = ["setsid", "--ctty", "sh", str(folder / "run.sh"), "exec", "--", "sh", "-c", script]
    process = subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    with os.fdopen(ours, "r+b", buffering=0) as keyboard:
        output = b""
        while b"ready" not in output:
            output += keyboard.read(4096)
        keyboard.write(b"\x03")
        while b"got" not in output:
            output += keyboard.read(4096)
        keyboard.write(b"\n\n")
        assert process.wait() == 3
        assert output.count(b"got") + keyboard.read(4096).count(b"got") == 1


@ROOT_ONLY
def test_processes_that_a_command_leaves_end_with_it(folder: Path) -> None:
    call(folder, "unpack")
    assert "left" in call(folder, "exec", "--", "sh", "-c", "sleep 1000 & echo left")


@ROOT_ONLY
@pytest.mark.parametrize("uid", ["0", "10001"])
def test_killing_the_kit_ends_its_commands(folder: Path, uid: str) -> None:
    """Also those of another user: a change of the user clears the signal of a parent's death."""
    call(folder, "unpack")
    script = "echo ready; exec sleep 1000"
    command = ["sh", str(folder / "run.sh"), "exec", "--uid", uid, "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        child, _ = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        ended, _, _ = select.select([process.stdout], [], [], 10)  # the command had it open, too
        if not ended:
            os.kill(int(child), signal.SIGKILL)
        assert ended


@ROOT_ONLY
def test_signal_that_ends_the_command_is_the_exit_code(folder: Path) -> None:
    call(folder, "unpack")
    command = [
        "sh",
        str(folder / "run.sh"),
        "exec",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "ready\n" for line in process.stdout)
        _, child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
    assert process.returncode == 137


def test_parts_of_another_kit_are_not_counted(folder: Path, tmp_path: Path) -> None:
    """Kits have parts of the same names; a part of this kit may be that of no other."""
    call(folder, "take")
    manifest = json.loads((folder / "manifest.json").read_text())
    number = len(manifest["parts"])
    for part in folder.glob("part-*"):
        part.unlink()
    (tmp_path / "content" / "bundle" / "more").write_text("another bundle")
    manifest["parts"] = write_parts(tmp_path / "content", folder, 1 << 20)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for part in sorted(folder.glob("part-*"))[1:]:
        part.unlink()
    assert f"1 of {number} parts taken" in call(folder, "take")


def test_damaged_part_is_named_and_replaces_no_good_one(folder: Path, tmp_path: Path) -> None:
    call(folder, "take")
    flip(folder / "part-001")
    assert "part-001 does not match manifest.json: copy it again" in call(folder, "take", code=1)
    (taken,) = (tmp_path / "kit-work").glob("parts-*/part-001")
    (part,) = [
        part
        for part in json.loads((folder / "manifest.json").read_text())["parts"]
        if part["name"] == taken.name
    ]
    assert hashlib.sha256(taken.read_bytes()).hexdigest() == part["sha256"]


@ROOT_ONLY
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_part_that_was_taken_is_verified_again(folder: Path, tmp_path: Path, damage: str) -> None:
    call(folder, "take")
    (taken,) = (tmp_path / "kit-work").glob("parts-*/part-002")
    (folder / "part-002").unlink()
    if damage == "missing":
        taken.unlink()
        assert "missing part-002" in call(folder, "unpack", code=1)
    else:
        flip(taken)
        assert "part-002 does not match" in call(folder, "unpack", code=1)


@ROOT_ONLY
@pytest.mark.parametrize(
    ("name", "words"),
    [("manifest.json", "does not have sha256:"), ("config.json", "does not have sha256:"),
     ("0.tar.gz", "0.tar.gz"), ("1.tar.gz", "layer 1.tar.gz does not have sha256:")],
)  # fmt: skip
def test_image_is_verified_from_its_digest_down(
    folder: Path, image: Image, tmp_path: Path, name: str, words: str
) -> None:
    """Also where the parts are as the manifest of the kit says."""
    content = tmp_path / "content"
    if name.endswith(".gz"):
        other = tmp_path / "other"
        other.mkdir()
        (other / "file").write_text(name)
        (content / "image" / name).unlink()
        subprocess.run(["tar", "-C", other, "-czf", content / "image" / name, "."], check=True)
    else:
        flip(content / "image" / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in folder.glob("part-*"):
        part.unlink()
    manifest["parts"] = write_parts(content, folder, 1 << 20)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert words in call(folder, "unpack", code=1)
    assert "kit.py" in call(folder, "exec", "--", "sh", "-c", "echo run", code=1)
    assert not list((tmp_path / "kit-work").glob("root-*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.pop("digest"), "KeyError"),
        (lambda manifest: manifest["parts"].append({"name": "../x"}), "invalid part"),
        (lambda manifest: manifest["parts"].append({"name": "x"}), "invalid part"),
        (
            lambda manifest: manifest["parts"].append({"name": ".lock", "size": 0, "sha256": ""}),
            "invalid part",
        ),
        (lambda manifest: manifest.update(digest=5), "AttributeError"),
        (lambda manifest: manifest["suite"].pop("argv"), "KeyError"),
    ],
)
def test_invalid_manifest_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    output = call(folder, "take", code=1)
    assert "invalid manifest.json" in output
    assert words in output


def test_manifest_of_many_brackets_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "invalid manifest.json" in call(folder, "take", code=1)


@pytest.mark.parametrize("arguments", [["go", "--tier=kernel"], ["bench", "--retry"], ["go", ""]])
def test_option_in_place_of_the_output_is_refused(folder: Path, arguments: list[str]) -> None:
    """Else a whole run goes into a folder of that name."""
    assert "missing OUTPUT" in call(folder, *arguments, code=1)


@pytest.mark.parametrize("arguments", [[], ["go"], ["caches"], ["run"], ["--help"]])
def test_wrong_usage_shows_the_usage(folder: Path, arguments: list[str]) -> None:
    assert "kit.py take" in call(folder, *arguments, code=1)


@ROOT_ONLY
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--", "none"], "the image has no program none", 1),
        (["--"], "required: argv", 2),
        (["--user", "0", "--", "sh"], "unrecognized arguments: --user", 2),
        (["--uid", "--", "sh"], "--uid: expected one argument", 2),
        *(
            (["--uid", uid, "--", "sh"], f"invalid --uid {uid}: expected 0 to 4294967294", 2)
            for uid in ("-1", "4294967295", "99999999999")
        ),
        (["--bind", "/tmp:/none", "--", "sh"], "the image has no such folder", 1),
        *(
            (["--bind", bind, "--", "sh"], f"invalid --bind '{bind}'", 2)
            for bind in ("/tmp", "/tmp:", "/tmp:/", "/tmp:output", ":/output")
        ),
        (["--env", "NAME", "--", "sh"], "invalid --env 'NAME': expected NAME=VALUE", 2),
    ],
)
def test_wrong_options_of_exec_are_named(
    folder: Path, arguments: list[str], words: str, code: int
) -> None:
    call(folder, "unpack")
    assert words in call(folder, "exec", *arguments, code=code)


def test_image_whose_user_is_a_name_needs_a_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        kit_host.exec_run(tmp_path, {"User": "vllm"}, tmp_path, ["--", "sh"])
    assert "argument --uid: invalid int value: 'vllm'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        kit_host.exec_run(tmp_path, {"User": "vllm"}, tmp_path, ["--uid=-1", "--", "sh"])


@contextmanager
def waiting_call(folder: Path, work: Path) -> Iterator[subprocess.Popen[str]]:
    """A call of `take` that waits, for another one has the lock meanwhile."""
    work.mkdir(mode=0o700)
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = ["sh", str(folder / "run.sh"), "take"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert "waiting for another call" in process.stdout.readline()
        yield process


def test_interrupted_call_is_not_a_success(folder: Path, tmp_path: Path) -> None:
    with waiting_call(folder, tmp_path / "kit-work") as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def test_second_call_waits_for_the_first(folder: Path, tmp_path: Path) -> None:
    """Two tiers are started at once, each on a GPU of its own."""
    with waiting_call(folder, tmp_path / "kit-work") as process:
        pass
    assert "parts taken" in process.communicate()[0]
    assert process.returncode == 0


@ROOT_ONLY
@pytest.mark.parametrize("how", ["owner", "link"])
def test_work_folder_of_another_user_is_refused(folder: Path, tmp_path: Path, how: str) -> None:
    """Programs in it are run as root."""
    work = tmp_path / "kit-work"
    if how == "owner":
        work.mkdir()
        os.chown(work, 65534, 65534)
    else:
        (tmp_path / "elsewhere").mkdir()
        work.symlink_to(tmp_path / "elsewhere")
    assert "set FORGE_KIT_WORK to another folder" in call(folder, "take", code=1)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "disk", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@ROOT_ONLY
def test_work_folder_without_programs_is_refused(folder: Path, tmp_path: Path) -> None:
    """Before anything is unpacked; the image's programs could not be started there."""
    with disk(tmp_path / "kit-work", "noexec"):
        assert "is mounted noexec: set FORGE_KIT_WORK" in call(folder, "take", code=1)


@ROOT_ONLY
def test_full_disk_keeps_no_half_of_an_image(folder: Path, tmp_path: Path) -> None:
    parts = sum(part.stat().st_size for part in folder.glob("part-*"))
    with disk(tmp_path / "kit-work", f"size={parts * 5 // 2}") as work:
        output = call(folder, "unpack", code=1)
        assert "No space left on device" in output
        assert "root.new: tar exited with 2" in output
        assert {path.name.partition("-")[0] for path in work.iterdir()} == {
            ".lock", "content", "parts",
        }  # fmt: skip


def test_old_python_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As RHEL 8 has it: its own message is a syntax error in kit.py."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" != -c ] || exit 1\necho SyntaxError\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:/usr/bin:/bin")
    assert call(folder, "take", code=1).startswith("no python3 of 3.9 or newer")


def test_host_side_stands_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(HOST)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "usage" in done.stderr) == (1, True)
    assert "vllm_forge" not in HOST.read_text()


def test_no_part_is_larger_than_asked(tmp_path: Path) -> None:
    content, target = tmp_path / "content", tmp_path / "parts"
    content.mkdir()
    target.mkdir()
    (content / "file").write_bytes(os.urandom(100_000))
    parts = write_parts(content, target, 30_000)
    assert [part["size"] for part in parts[:-1]] == [30_000] * (len(parts) - 1)
    joined = b"".join((target / part["name"]).read_bytes() for part in parts)
    (tmp_path / "joined.tar").write_bytes(joined)
    subprocess.run(["tar", "-xf", tmp_path / "joined.tar", "-C", tmp_path], check=True)
    assert (tmp_path / "file").read_bytes() == (content / "file").read_bytes()


@ROOT_ONLY
def test_full_disk_of_the_parts_is_named(tmp_path: Path) -> None:
    """Which a broken pipe says else."""
    (content := tmp_path / "content").mkdir()
    (content / "file").write_bytes(os.urandom(1 << 20))
    with (
        disk(tmp_path / "parts", "size=64k") as parts,
        pytest.raises(KitError, match="split exited with 1"),
    ):
        write_parts(content, parts, 1 << 15)


def test_too_many_parts_are_refused(root: Path, image: Image, tmp_path: Path) -> None:
    project, kit = Project(root), tmp_path / "kit"
    with pytest.raises(KitError, match=r"a kit of \d+ parts"):
        make_kit(project, project.cell("h200"), image.path, kit, max_part=62, inputs={})
    assert not kit.exists()


def test_rehearsal_that_would_be_copied_is_refused(root: Path, tmp_path: Path) -> None:
    project, model = Project(root), tmp_path / "model"
    (model / SIGN).mkdir(parents=True)
    with pytest.raises(KitError, match="stores its holes"):
        make_kit(
            project, project.cell("h200"), tmp_path / "layout", tmp_path / "kit", max_part=1,
            inputs={"checkpoints/card": model},
        )  # fmt: skip
    assert not (tmp_path / "kit").exists()
