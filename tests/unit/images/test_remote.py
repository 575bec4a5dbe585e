"""A remote BuildKit: what buildx is asked, by a fake that records it, and what its answer becomes.

Not run against a real BuildKit in CI: no package of Debian 12 has one with buildx's plugin.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllm_forge.errors import UsageError
from vllm_forge.host import Runner
from vllm_forge.host.errors import CommandFailedError
from vllm_forge.images import choose_engine
from vllm_forge.images.engines import BuildKit
from vllm_forge.images.errors import (
    EngineTooOldError,
    EngineUnreachableError,
    LayoutError,
    SizeBudgetError,
)
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import ImageLayer, write_image
from vllm_forge.images.plan import ImagePlan
from vllm_forge.images.remote import require_builder, unpack_layers

PLAIN = "application/vnd.oci.image.layer.v1.tar"
VERSION = "v0.13.1"
DAEMON = "Driver: remote\nStatus: running\nBuildKit version: {}\n"
DOCKER = """#!{python}
import json, os, shutil, sys, time
from pathlib import Path
words, here = sys.argv[1:], Path(__file__).parent
row = [words, os.environ.get("BUILDX_CONFIG"), os.environ.get("SOURCE_DATE_EPOCH")]
with (here / "asked").open("a") as file:
    file.write(json.dumps(row) + "\\n")
if words[:2] == ["buildx", "version"]:
    print("github.com/docker/buildx v0.13.1")
if words[:2] == ["buildx", "inspect"]:
    answer = (here / "daemon").read_text()
    print(answer)
    sys.exit("no daemon" in answer)
if words[:2] == ["buildx", "build"]:
    output = next(word for word in words if word.startswith("--output="))
    target = dict(field.split("=", 1) for field in output.removeprefix("--output=").split(","))
    assert target["tar"] == "false" and target["rewrite-timestamp"] == "true"
    shutil.copytree(here / "layout", target["dest"])
    for number in range(int((here / "more").read_text()) if (here / "more").exists() else 0):
        (Path(target["dest"]) / f"blobs/{{number}}").write_bytes(bytes(1 << 20))
    if (here / "waits").exists():
        time.sleep(10)
    (here / "ended").touch()
"""


def layer(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size, info.mode = len(entry[1]), 0o640
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name: str, kind: bytes, target: str = "", uid: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.uid = kind, target, 0o755, uid
    return info


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a docker that records, and answers with an image of two layers."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(DOCKER.format(python=sys.executable))
    (folder / "docker").chmod(0o755)
    (folder / "daemon").write_text(DAEMON.format(VERSION))
    low = layer(tmp_path / "0.tar", ("etc/keep", b"1"), ("etc/gone", b"2"), ("old/a", b"3"))
    cache = special("cache/", tarfile.DIRTYPE, uid=os.geteuid() or 10001)
    top = layer(tmp_path / "1.tar", ("etc/.wh.gone", b""), ("old/.wh..wh..opq", b""),
                ("old/b", b"4"), cache)  # fmt: skip
    layers = []
    for path in (low, top):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = LayerBlob(
            path=path, digest=digest, diff_id=digest, size=path.stat().st_size, media_type=PLAIN
        )
        layers.append(ImageLayer(blob=blob, name="x"))
    write_image(folder / "layout", layers=layers, config={"User": "1"}, epoch=0, name="a:b")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def asked(docker: Path) -> list[Any]:
    return [json.loads(line) for line in (docker / "asked").read_text().splitlines()]


def plan(tmp_path: Path, *, image: str | None = None) -> ImagePlan:
    (tmp_path / "context").mkdir()
    base = SimpleNamespace(image=image, layout=None if image else tmp_path / "rootfs")
    made = SimpleNamespace(
        base=base,
        build_arguments=lambda: {"PYTHON": "3.13"},
        dockerfile=tmp_path / "context" / "Dockerfile",
        cell=SimpleNamespace(base=SimpleNamespace(source_date_epoch=7, budget_mb=1)),
    )
    return cast("ImagePlan", made)


def test_remote_build_keeps_owners_and_whiteouts(docker: Path, tmp_path: Path) -> None:
    engine, work = BuildKit("tcp://builder:1234"), tmp_path / "work"
    work.mkdir()
    engine.check(Runner())
    engine.build_system(Runner(), plan(tmp_path), {"ca": Path("/ca")}, work)
    output = engine.system_output(work)
    assert output.config == {"User": "1"}
    assert output.root is not None
    files = {path.relative_to(output.root).as_posix() for path in output.root.rglob("*")}
    assert files == {"etc", "etc/keep", "old", "old/b", "cache"}
    assert (output.root / "cache").stat().st_uid == (os.geteuid() or 10001)
    assert (output.root / "etc/keep").stat().st_mode & 0o777 == 0o640

    version, create, inspect, again, build = asked(docker)
    name = create[0][2].removeprefix("--name=")
    assert create[0][3:] == ["--driver=remote", "tcp://builder:1234"]
    assert inspect[0] == ["buildx", "inspect", "--bootstrap", name]
    assert again[0] == create[0]
    assert {f"--builder={name}", "--network=none", "--secret=id=ca,src=/ca"} <= set(build[0])
    assert "--network=host" not in build[0]  # a right that remote daemons refuse
    assert build[2] == "7"
    # Builders of the user stay as they are, and nothing of ours is left.
    assert version[1] is None
    assert create[1] == inspect[1]
    assert again[1] == build[1]
    assert not Path(build[1]).exists()


def test_base_of_a_registry_gets_the_network_of_the_daemon(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    base = plan(tmp_path, image="debian@sha256:1")
    BuildKit("mine").build_system(Runner(), base, {}, tmp_path / "work")
    [[words, config, _]] = asked(docker)
    assert "--builder=mine" in words
    assert not any(word.startswith("--network") for word in words)
    assert config is None


@pytest.mark.parametrize("waits", [True, False], ids=["and goes on", "and ends"])
def test_daemon_that_sends_too_much_is_stopped(
    waits: bool, docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times the budget of compressed layers; nothing of it is kept."""
    monkeypatch.setattr("vllm_forge.host.run.POLL_S", 0.05)
    work = tmp_path / "work"
    work.mkdir()
    (docker / "more").write_text("6")
    if waits:
        (docker / "waits").touch()
    with pytest.raises(SizeBudgetError, match="sent more than 5000000 bytes") as caught:
        BuildKit("mine").build_system(Runner(), plan(tmp_path), {}, work)
    assert "base.budget_mb" in str(caught.value)
    assert (docker / "ended").exists() is not waits
    assert list(work.iterdir()) == []


def test_layers_of_a_failed_build_are_removed(docker: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (docker / "more").write_text("a fault")
    with pytest.raises(CommandFailedError, match="a fault"):
        BuildKit("mine").build_system(Runner(), plan(tmp_path), {}, work)
    assert list(work.iterdir()) == []


def test_daemon_that_does_not_answer_is_named_before_the_build(docker: Path) -> None:
    (docker / "daemon").write_text("no daemon: connection refused")
    with pytest.raises(EngineUnreachableError, match="connection refused"):
        BuildKit("tcp://builder:1").check(Runner())


@pytest.mark.parametrize("version", ["v0.12.5", "0.9"])
def test_old_daemon_is_refused(docker: Path, version: str) -> None:
    """It would ignore rewrite-timestamp, and each build give another digest."""
    (docker / "daemon").write_text(DAEMON.format(version))
    with pytest.raises(EngineTooOldError, match=r"at least 0\.13"):
        BuildKit("mine").check(Runner())


@pytest.mark.parametrize(
    "builder", ["tcp://h:1", "kube-pod://pod?namespace=ci", "unix:///run/b.sock", "my-builder_2"]
)
def test_builder_is_an_address_or_a_name(builder: str) -> None:
    require_builder(builder)
    engine = choose_engine(None, dry_run=True, builder=builder)
    assert engine.name == "buildkit"


@pytest.mark.parametrize("builder", ["tpc://h:1", "tcp://", "-x", "a b", "tcp://h\n", "--help"])
def test_invalid_builder_is_refused(builder: str) -> None:
    with pytest.raises(UsageError, match="invalid --builder"):
        require_builder(builder)


def test_password_of_a_builder_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError, match="has a password") as caught:
        require_builder("ssh://me:hunter2@host")
    assert "hunter2" not in str(caught.value)
    require_builder("ssh://me@host:22")


@pytest.mark.parametrize(
    ("builder", "warned"),
    [("tcp://builder:1", True), ("tcp://127.0.0.1.evil:1", True), ("tcp://127.0.0.1:1", False),
     ("tcp://[::1]:1", False), ("ssh://h", False), ("mine", False)],
)  # fmt: skip
def test_address_without_tls_is_warned_of(
    docker: Path, capsys: pytest.CaptureFixture[str], builder: str, warned: bool
) -> None:
    assert docker
    BuildKit(builder).check(Runner())
    assert ("has no TLS" in " ".join(capsys.readouterr().err.split())) is warned


HOSTILE: dict[str, list[Any]] = {
    "whiteout through a link": [
        special("out", tarfile.SYMTYPE, "{outside}"), None, ("out/.wh.kept", b""),
    ],
    "file through a link of a lower layer": [
        special("out", tarfile.SYMTYPE, "{outside}"), None, ("out/kept", b"theirs"),
    ],
    "folder through a link of a lower layer": [
        special("out", tarfile.SYMTYPE, "../outside"), None, special("out/new/", tarfile.DIRTYPE),
    ],
    "hard link through a link of a lower layer": [
        special("out", tarfile.SYMTYPE, "{outside}"), None,
        special("stolen", tarfile.LNKTYPE, "out/kept"),
    ],
    "file behind links in a circle": [
        special("a", tarfile.SYMTYPE, "b"), special("b", tarfile.SYMTYPE, "a"), None, ("a/x", b""),
    ],
    "opaque folder above": [("../outside/.wh..wh..opq", b"")],
    "hard link to a file outside": [special("stolen", tarfile.LNKTYPE, "../outside/kept")],
    "not a tar": [],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_layers_of_a_hostile_daemon_reach_nothing_outside(case: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    groups: list[list[Any]] = [[]]
    for entry in HOSTILE[case]:
        if entry is None:
            groups.append([])
            continue
        if isinstance(entry, tarfile.TarInfo):
            entry.linkname = entry.linkname.format(outside=outside)
        groups[-1].append(entry)
    tars = [layer(tmp_path / f"{number}.tar", *group) for number, group in enumerate(groups)]
    if not HOSTILE[case]:
        tars[0].write_bytes(b"x" * 2000)
    with pytest.raises(LayoutError):
        unpack_layers(tars, tmp_path / "root")
    assert (outside / "kept").read_text() == "mine"
    assert (outside / "kept").stat().st_nlink == 1
    assert len(list(outside.iterdir())) == 1


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_blob_that_is_not_a_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    """buildx writes what the daemon sends, with its kind."""
    tar = layer(tmp_path / "outside.tar", ("a", b"1"))
    blob = tmp_path / "blob"
    blob.symlink_to(tar) if kind == "link" else os.mkfifo(blob)
    with pytest.raises(LayoutError, match="not a plain"):
        unpack_layers([blob], tmp_path / "root")
