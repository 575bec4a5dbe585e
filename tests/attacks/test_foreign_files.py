"""JSON that others may have written: records, recordings, leftovers of runs, image layouts.

Whatever such a file is, its reader ends at once with the error of its room, and names the file.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_forge.errors import ForgeError
from vllm_forge.gputest.errors import JitCacheError
from vllm_forge.gputest.launch import KEY, require_key
from vllm_forge.host import RecordedProbe, read_plain
from vllm_forge.host.errors import RecordingError
from vllm_forge.images.errors import BuildRecordError, LayoutError
from vllm_forge.images.layout import read_image
from vllm_forge.images.record import built_digest, read_record
from vllm_forge.kernels.errors import ArtifactConfigError, SelectionFileError
from vllm_forge.kernels.selection.questions import artifact_config
from vllm_forge.kernels.selection.record import read_selection
from vllm_forge.matrix.errors import RecordFileError
from vllm_forge.pages.registry import PAGES
from vllm_forge.patches import read_dispositions, read_tree_lock
from vllm_forge.patches.errors import DispositionError
from vllm_forge.project import Project
from vllm_forge.serve.doctor import ask_host
from vllm_forge.sources import read_wheels
from vllm_forge.sources.errors import LockFileError


def link(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 27)


def of(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


NOT_JSON: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "link": link,
    "folder": Path.mkdir,
    "large": large,
    "not UTF-8": of(b'{"a": "\xff"}'),
    "deep": of(b"[" * 200_000),
    "cut": of(b'{"a": '),
    "empty": of(b""),
}
OTHER_JSON = {name: of(name.encode()) for name in ("{}", "[]", "null", "7", '"x"', "[[]]")}


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """A reader that blocks is interrupted, which is no ForgeError."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def cell(root: Path) -> Any:
    return Project(root).cell("b300")


# Name of the file below a folder, its reader, and the error.
READERS: dict[str, tuple[str, Callable[[Path, Path], Any], type[ForgeError]]] = {
    "selection": (
        "selection/0.26.json",
        lambda folder, _: read_selection(folder, "0.26"),
        SelectionFileError,
    ),
    "artifact": ("one.json", lambda folder, _: artifact_config("one", folder), ArtifactConfigError),
    "build record": ("r.json", lambda folder, _: read_record(folder / "r.json"), BuildRecordError),
    "digest": (
        "dist/vllm-0.26.0-b300.json",
        lambda folder, _: built_digest(folder / "dist" / "vllm-0.26.0-b300.json"),
        BuildRecordError,
    ),
    "tree lock": (
        "lock.toml",
        lambda folder, _: read_tree_lock(folder, "0.26"),
        LockFileError,
    ),
    "wheel lock": (
        "lock.txt",
        lambda folder, _: read_wheels(folder / "lock.txt", "lock again"),
        LockFileError,
    ),
    "dispositions": (
        "dispositions.toml",
        lambda folder, _: read_dispositions(folder),
        DispositionError,
    ),
    "layout": ("index.json", lambda folder, _: read_image(folder), LayoutError),
    "caches": (KEY, lambda folder, _: require_key(folder, {"arch": "x"}), JitCacheError),
}


@pytest.mark.parametrize("kind", [*NOT_JSON, *OTHER_JSON])
@pytest.mark.parametrize("reader", READERS)
def test_record_of_any_kind_is_an_error_of_its_room(
    root: Path, tmp_path: Path, reader: str, kind: str
) -> None:
    name, read, error = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (NOT_JSON | OTHER_JSON)[kind](path)
    if (reader, kind) == ("wheel lock", "empty"):
        return  # of no wheels
    with pytest.raises(error) as refused:
        read(tmp_path, root)
    assert str(tmp_path) in refused.value.where
    assert refused.value.remedy


RECORDS = {
    "docs/generated/drift.md": "records/drift.json",
    "docs/generated/race.md": "records/race.json",
    "docs/generated/seed-installer.md": "records/seed-installer.json",
    "docs/generated/coverage.md": "records/coverage/0.26.json",
    "docs/generated/selection.md": "records/selection/0.26.json",
    "docs/generated/verdicts.md": "records/verdicts.json",
    "docs/generated/sizes.md": "benchmarks/results/sizes.json",
}


# Tables without rows.
EMPTY = {
    ("records/seed-installer.json", "[]"),
    ("records/seed-installer.json", "{}"),
    ("benchmarks/results/sizes.json", "{}"),
}


@pytest.mark.parametrize("kind", [*NOT_JSON, *OTHER_JSON])
def test_record_of_a_page_is_an_error_that_names_it(root: Path, tmp_path: Path, kind: str) -> None:
    for name in ("records", "benchmarks/results", "patches", "docker"):
        shutil.copytree(root / name, tmp_path / name)
    shutil.copy(root / "matrix.toml", tmp_path)
    project = Project(tmp_path)
    for page, name in RECORDS.items():
        path = tmp_path / name
        kept = path.read_bytes()
        path.unlink()
        (NOT_JSON | OTHER_JSON)[kind](path)
        if (name, kind) in EMPTY:
            continue
        with pytest.raises((RecordFileError, SelectionFileError)) as refused:
            _ = [make(project) for make in PAGES[page].values()]
        assert refused.value.where == str(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "large", "not UTF-8"])
@pytest.mark.parametrize("name", ["docker.txt", "nvidia-smi.txt", "df.code"])
def test_reply_of_any_kind_is_an_error(root: Path, tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "host"
    shutil.copytree(root / "tests" / "fixtures" / "doctor" / "b300", folder)
    (folder / name).unlink(missing_ok=True)
    NOT_JSON[kind](folder / name)
    with pytest.raises(RecordingError) as refused:
        ask_host(RecordedProbe(folder))
    assert refused.value.where == str(folder / name)


@pytest.mark.parametrize("kind", ["deep", "cut", "empty", *OTHER_JSON])
@pytest.mark.parametrize("name", ["docker.txt", "nvidia-smi.txt", "df.txt", "meminfo.txt"])
def test_reply_of_any_text_is_an_answer(root: Path, tmp_path: Path, kind: str, name: str) -> None:
    folder = tmp_path / "host"
    shutil.copytree(root / "tests" / "fixtures" / "doctor" / "b300", folder)
    (NOT_JSON | OTHER_JSON)[kind](folder / name)
    ask_host(RecordedProbe(folder))


def test_exit_code_that_is_not_a_number_is_an_error(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "host"
    shutil.copytree(root / "tests" / "fixtures" / "doctor" / "b300", folder)
    (folder / "df.code").write_text("one\n")
    with pytest.raises(RecordingError, match="invalid literal"):
        ask_host(RecordedProbe(folder))


def test_device_is_not_read() -> None:
    with pytest.raises(ValueError, match="not a plain file"):
        read_plain(Path("/dev/zero"))
