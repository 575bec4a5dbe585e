"""The image: what a wheel, a Debian package or an engine could bring that does not belong there."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.wheels import Member, record_row, write_wheel
from vllm_forge.checkpoints.inspect.dry_load import PROGRAM
from vllm_forge.images import image_checks, layer_checks
from vllm_forge.images.content import group_entries
from vllm_forge.images.layer import overlay
from vllm_forge.images.layer_checks import (
    ImageFiles,
    hygiene,
    packages,
    system_files,
    system_problems,
    tree,
    wheel_files,
)
from vllm_forge.images.layout import ImageLayer
from vllm_forge.images.rootfs import SCRUB, compress
from vllm_forge.images.store import write_layer
from vllm_forge.images.system import write_plain
from vllm_forge.matrix.model import WheelFile
from vllm_forge.project import Project
from vllm_forge.proofs.environment import LOAD_ARGV, PYTHON
from vllm_forge.serve.command import ServeOptions, container_command, service_of
from vllm_forge.serve.deployment import find_deployment

if TYPE_CHECKING:
    from pathlib import Path


EPOCH = 1735689600


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path / "cache"))


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(
    name: str, mode: int = 0o644, kind: bytes = tarfile.REGTYPE, **pax: str
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.type = mode, kind
    info.pax_headers = {
        f"SCHILY.xattr.{key.replace('_', '.')}": value for key, value in pax.items()
    }
    return info


def layer(folder: Path, name: str, *members: tarfile.TarInfo) -> ImageLayer:
    tar = tar_of(folder / f"{name}.tar", *members)
    return ImageLayer(blob=compress(tar, tar.with_suffix(".gz")), name=name)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (member("./usr/bin/su", 0o4755), "setuid or setgid program: /usr/bin/su"),
        (member("usr/bin/chage", 0o2755), "setuid or setgid program: /usr/bin/chage"),
        (member("usr/bin/link", 0o4755, tarfile.LNKTYPE), "setuid or setgid program"),
        (member("etc", 0o755, tarfile.DIRTYPE, user_overlay_origin=""), "attribute user.overlay"),
        (member("etc/x", user_overlay_impure="y"), "attribute user.overlay.impure: /etc/x"),
        (member("etc/x", trusted_overlay_opaque="y"), "attribute trusted.overlay.opaque"),
        (member("usr/bin/ping", 0o755, security_capability="x"), "attribute security.capability"),
        (member("usr/lib/python3.13/__pycache__", 0o755, tarfile.DIRTYPE), "bytecode"),
        (member("usr/lib/python3.13/os.pyc"), "bytecode: /usr/lib/python3.13/os.pyc"),
        (member("dev/sda", 0o600, tarfile.BLKTYPE), "device or FIFO: /dev/sda"),
        (member("run/pipe", 0o600, tarfile.FIFOTYPE), "device or FIFO: /run/pipe"),
        (member("opt", 0o777, tarfile.DIRTYPE), "writable by every user: /opt"),
        (member("opt/x", 0o666), "writable by every user: /opt/x"),
    ],
)
def test_system_layer_is_rejected(tmp_path: Path, bad: tarfile.TarInfo, words: str) -> None:
    (problem,) = system_problems(system_files([layer(tmp_path, "rootfs", bad)]))
    assert words in problem


def test_plain_system_layers_are_accepted(tmp_path: Path) -> None:
    """Folders that are setgid are not programs; a sticky folder is not for others' files."""
    lower = layer(
        tmp_path, "rootfs",
        member("./", 0o755, tarfile.DIRTYPE), member("./usr/bin/sh", 0o755),
        member("./var/mail", 0o2775, tarfile.DIRTYPE), member("./tmp", 0o1777, tarfile.DIRTYPE),
        member("./bin", 0o777, tarfile.SYMTYPE),
    )  # fmt: skip
    assert system_problems(system_files([lower])) == []


def test_an_upper_layer_may_cure_a_lower_one(tmp_path: Path) -> None:
    """A registry base has setuid programs; docker/Dockerfile removes the bits in its own layer."""
    lower = layer(
        tmp_path, "base", member("usr/bin/su", 0o4755), member("usr/bin/mount", 0o4755),
        member("usr/lib/a", 0o755, tarfile.DIRTYPE), member("usr/lib/a/x.pyc"),
        member("usr/lib/b/y.pyc"),
    )  # fmt: skip
    upper = layer(
        tmp_path, "Dockerfile", member("usr/bin/su", 0o755), member("usr/bin/.wh.mount"),
        member("usr/lib/.wh.a"), member("usr/lib/b/.wh..wh..opq"),
    )  # fmt: skip
    files = system_files([lower, upper])
    assert files.keys() == {"usr/bin/su"}
    assert system_problems(files) == []
    assert len(system_problems(system_files([lower]))) == 4


def forge(path: Path, good: dict[str, Any], seal: str) -> None:
    """Let a recorded result be that of another layer."""
    record = json.loads(path.read_text())
    record["result"] = good["result"]
    if seal == "of another record":
        record = good
    elif seal != "kept":
        record["seal"] = seal
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("seal", ["kept", "", "0" * 64, "of another record"])
def test_forged_result_of_a_check_is_not_taken(tmp_path: Path, seal: str) -> None:
    system_files([layer(tmp_path, "good", member("usr/bin/su", 0o755))])
    (good,) = (tmp_path / "cache" / "facts").iterdir()
    bad = layer(tmp_path, "bad", member("usr/bin/su", 0o4755))
    system_files([bad])
    (forged,) = set(good.parent.iterdir()) - {good}
    before = forged.read_text()
    forge(forged, json.loads(good.read_text()), seal)
    assert len(system_problems(system_files([bad]))) == 1
    assert forged.read_text() == before, "it is written again"


@pytest.mark.parametrize("same", ["layers and program", "layers", "program"])
def test_layers_are_read_again_by_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str
) -> None:
    first = layer(tmp_path, "rootfs", member("etc/x"))
    other = layer(tmp_path, "other", member("etc/x", 0o600))
    before = system_files([first])
    read = []

    def noted(*arguments: Any) -> Any:
        read.append(arguments)
        return overlay(*arguments)

    monkeypatch.setattr(layer_checks, "overlay", noted)
    if same == "layers":
        monkeypatch.setattr(layer_checks, "_program", lambda: "another one")
    after = system_files([other if same == "program" else first])
    assert len(read) == (same != "layers and program")
    modes = [{path: file.info.mode for path, file in files.items()} for files in (before, after)]
    assert (modes[0] == modes[1]) == (same != "program")


def test_system_layer_does_not_depend_on_who_built_it(tmp_path: Path) -> None:
    plain, private = member("etc/passwd"), member("etc/passwd", user_overlay_origin="x")
    private.uname = "joe"
    tars = [tmp_path / "root.tar", tmp_path / "rootless.tar"]
    for path, info in zip(tars, (plain, private), strict=True):
        write_plain(tar_of(tmp_path / "engine.tar", info, member("etc/y")), path)
    assert tars[0].read_bytes() == tars[1].read_bytes()


def test_scrubbed_rootfs_has_no_setuid_programs_and_no_bytecode(tmp_path: Path) -> None:
    for name, mode in (("usr/bin/su", 0o4755), ("usr/bin/chage", 0o2755), ("usr/bin/ls", 0o755)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(mode)
    (tmp_path / "usr/lib/__pycache__").mkdir(parents=True)
    (tmp_path / "usr/lib/__pycache__/x.pyc").touch()
    (tmp_path / "etc").mkdir()
    subprocess.run(["sh", "-c", SCRUB, "sh", str(tmp_path)], check=True)
    assert not (tmp_path / "usr/lib/__pycache__").exists()
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "usr/bin").iterdir()}
    assert modes == {"su": 0o755, "chage": 0o755, "ls": 0o755}


def test_scrubbed_rootfs_has_nothing_of_the_host_that_built_it(tmp_path: Path) -> None:
    """mmdebstrap copies /etc/hostname and /etc/resolv.conf with their modes."""
    found = []
    for host, mode in (("one", 0o644), ("two", 0o600)):
        (etc := tmp_path / host / "etc").mkdir(parents=True)
        (etc / "machine-id").touch()
        for name in ("hostname", "resolv.conf"):
            (etc / name).write_text(host)
            (etc / name).chmod(mode)
        before = os.umask(0o077 if host == "two" else 0o022)
        try:
            subprocess.run(["sh", "-c", SCRUB, "sh", str(tmp_path / host)], check=True)
        finally:
            os.umask(before)
        found.append({p.name: (p.read_bytes(), p.stat().st_mode) for p in etc.iterdir()})
    assert found[0] == found[1]


def test_import_from_the_working_directory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """/cache is the working directory of an image, and its volume may have anybody's files."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert image_checks.working_directory({})
    monkeypatch.delenv("PYTHONSAFEPATH")
    with pytest.raises(AssertionError, match="imported from the working directory"):
        image_checks.working_directory({})


def test_images_share_no_volume_of_code(root: Path) -> None:
    """What one image compiled another would run; the volume that all share is for weights."""
    project = Project(root)
    deployment = find_deployment(project.matrix, project.cell("b300"), "mtp")
    digests = [f"sha256:{number * 64}" for number in "12"]
    services = [service_of(deployment, ServeOptions(), digest=d) for d in digests]
    commands = [container_command(service).argv for service in services]
    first, second = ({word for word in argv if "--volume=" in word} for argv in commands)
    assert {word.rpartition(":")[2] for word in first - second} == {"/cache"}
    assert {word.rpartition(":")[2] for word in first & second} == {"/cache/huggingface"}


def test_dry_load_finds_its_modules_where_they_are_mounted(tmp_path: Path) -> None:
    """PYTHONSAFEPATH also hides a script's own folder."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "main.py").touch()
    (tmp_path / PROGRAM).write_text("import inside.main")
    argv = [word.replace("/mnt", str(tmp_path)) for word in LOAD_ARGV]
    argv[argv.index(PYTHON)] = sys.executable
    subprocess.run(argv, env={"PYTHONSAFEPATH": "1"}, check=True)


# A wheel's files: name of the wheel -> path below site-packages -> content.
SITE = "opt/venv/lib/python3.13/site-packages"
Wheels = dict[str, dict[str, bytes]]
GOOD: Wheels = {
    "sixlike": {"sixlike.py": b"x = 1\n", "shared/__init__.py": b""},
    "other": {"other.py": b"y = 1\n", "shared/__init__.py": b""},
    "vllm": {"vllm/__init__.py": b"", "vllm/_C.so": b"\x7fELF"},
    "nvcc": {"nvidia/cu13/bin/nvcc": b"#!/bin/sh\n"},
}
BLOBS = {"vllm/__init__.py": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"}
ROW = {"lines": ["0.26"], "reason": "needed by nobody but this test"}


def written(folder: Path, wheels: Wheels) -> tuple[ImageFiles, dict[str, Path]]:
    """The layers of these wheels, one each, on a system with an environment in it."""
    base = layer(
        folder, "rootfs", member("usr/bin/sh", 0o755), member("opt/venv/bin/python3", 0o755),
        member("opt/venv/pyvenv.cfg"), member("opt/venv/lib64", 0o777, tarfile.SYMTYPE),
    )  # fmt: skip
    paths, folders = {}, []
    for name, contents in wheels.items():
        paths[name] = write_wheel(
            folder / f"{name}-1.0-py3-none-any.whl", name, "1.0",
            [Member(path=path, content=content) for path, content in contents.items()],
        )  # fmt: skip
        folders.append(write_layer(name, group_entries("x", [paths[name]], "3.13"), EPOCH).files)
    files = ImageFiles(system=system_files([base]), folders=folders, python="3.13")
    return files, paths


@pytest.mark.parametrize(
    ("wheel", "path", "words"),
    [
        ("sixlike", "vllm/evil.py", "file in the package vllm: /{site}/vllm/evil.py of sixlike"),
        ("sixlike", "vllm/evil.so", "file in the package vllm"),
        ("vllm", "vllm/evil.py", "module that the source tree lacks: /{site}/vllm/evil.py of vllm"),
        ("sixlike", "vllm/__init__.py", "file in the package vllm: /{site}/vllm/__init__.py of"),
        ("other", "sixlike.py", "different content: /{site}/sixlike.py of sixlike and other"),
        ("sixlike", "x.pth", "file that runs when Python starts: /{site}/x.pth of sixlike"),
        ("sixlike", "sitecustomize.py", "file that runs when Python starts"),
        ("sixlike", "usercustomize/__init__.py", "file that runs when Python starts"),
        ("sixlike", "sitecustomize.abi3.so", "file that runs when Python starts"),
        ("sixlike", "x.egg-link", "file that runs when Python starts"),
        ("sixlike", "sixlike.pyc", "bytecode"),
        ("sixlike", "sixlike-1.0.data/purelib/other-1.0.dist-info/x", "metadata of another wheel"),
        ("other", "other-1.0.data/purelib/sixlike-1.0.dist-info/RECORD", "metadata of another"),
        ("sixlike", "nvidia/cu13/bin/sh", "program that hides another"),
        ("sixlike", "sixlike-1.0.data/scripts/sh", "program that hides another"),
        ("sixlike", "sixlike-1.0.data/scripts/nvcc", "program that hides another"),
        ("sixlike", "sixlike-1.0.data/scripts/nvidia-smi", "program that hides another"),
        ("sixlike", "sixlike-1.0.data/scripts/python3", "hides one of rootfs: /opt/venv/bin"),
        ("sixlike", "sixlike-1.0.data/data/pyvenv.cfg", "hides one of rootfs: /opt/venv/pyv"),
        ("sixlike", "sixlike-1.0.data/data/lib64/x.py", "replaces /opt/venv/lib64 of rootfs"),
        ("other", "sixlike.py/x.py", "file below another file, /{site}/sixlike.py"),
    ],
)  # fmt: skip
def test_file_of_a_wheel_is_rejected(tmp_path: Path, wheel: str, path: str, words: str) -> None:
    wheels = GOOD | {wheel: GOOD[wheel] | {path: b"print('evil')\n"}}
    files, paths = written(tmp_path, wheels)
    with pytest.raises(AssertionError, match=words.format(site=SITE)):
        wheel_files(files, BLOBS, [], paths.get)


def test_wheels_with_equal_files_are_accepted(tmp_path: Path) -> None:
    files, paths = written(tmp_path, GOOD)
    assert wheel_files(files, BLOBS, [], paths.get)
    expected = dict.fromkeys(GOOD, "1.0")
    assert packages(files, expected) == "4 distributions"
    assert tree(files, BLOBS, {}) == "1 files, 0 of them patched"
    with pytest.raises(AssertionError, match=r"vllm/__init__\.py differs"):
        tree(files, {"vllm/__init__.py": "0" * 40}, {})
    with pytest.raises(AssertionError, match=r"a patched file is not installed: vllm/a\.py"):
        tree(files, BLOBS | {"vllm/a.py": ""}, {"vllm/a.py": ""})
    with pytest.raises(AssertionError, match="installed and locked packages differ"):
        packages(files, expected | {"more": "1"})


def test_equal_hashes_in_a_record_are_not_believed(tmp_path: Path) -> None:
    """A wheel that replaces another's file may claim the other's hash."""
    files, paths = written(tmp_path, GOOD | {"other": {"sixlike.py": b"evil!\n"}})
    for record in files.folders[1].rglob("RECORD"):
        record.write_text(f"sixlike.py,{record_row('', GOOD['sixlike']['sixlike.py'])[1:]}")
    with pytest.raises(AssertionError, match="different content"):
        wheel_files(files, BLOBS, [], paths.get)


def test_file_that_no_record_lists_is_rejected(tmp_path: Path) -> None:
    files, paths = written(tmp_path, GOOD)
    (files.folders[0] / SITE / "late.py").touch()
    with pytest.raises(AssertionError, match=r"no RECORD lists: /.*/late.py of no wheel"):
        wheel_files(files, BLOBS, [], paths.get)


def test_exception_is_for_its_wheels_and_must_be_needed(tmp_path: Path) -> None:
    files, paths = written(
        tmp_path, GOOD | {"sixlike": {"x.pth": b"", "both.py": b"1"}, "other": {"both.py": b"2"}}
    )
    rows = [
        WheelFile(path="x.pth", wheels=["sixlike"], **ROW),
        WheelFile(path="both.*", wheels=["other", "sixlike"], **ROW),
    ]
    assert wheel_files(files, BLOBS, rows, paths.get).endswith("2 exceptions")
    for wrong in ("other", "vllm"):
        with pytest.raises(AssertionError, match=r"x.pth of sixlike\n.*no file needs the row"):
            wheel_files(
                files, BLOBS, [WheelFile(path="x.pth", wheels=[wrong], **ROW), rows[1]], paths.get
            )


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("sixlike/.git/config", b"", "forbidden name"),
        ("x.pem", b"-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("sixlike-1.0.data/data/model.safetensors", b"", "weights: /opt/venv/model.safetensors"),
    ],
)
def test_credentials_and_weights_are_found(
    tmp_path: Path, path: str, content: bytes, words: str
) -> None:
    files, _ = written(tmp_path, {"sixlike": {path: content}})
    with pytest.raises(AssertionError, match=words):
        hygiene(files)


def test_credentials_in_a_system_layer_are_found(tmp_path: Path) -> None:
    names = ("root/.ssh/id", "root/.cache/x", "cache/x", "run/secrets/ca", "srv/model.gguf")
    base = layer(tmp_path, "rootfs", *map(member, names), member("cache", 0o755, tarfile.DIRTYPE))
    files = ImageFiles(system=system_files([base]), folders=(), python="3.13")
    with pytest.raises(AssertionError) as error:
        hygiene(files)
    assert all(f"/{name}" in str(error.value) for name in names)
