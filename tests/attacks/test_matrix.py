"""matrix.toml: a row is data. It neither steers how programs start nor leaves the checkout."""

from __future__ import annotations

import copy
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_forge.matrix import Matrix, find_root, load
from vllm_forge.matrix.errors import MatrixFileError, MatrixValueError

Data = dict[str, Any]


@pytest.fixture
def data(root: Path) -> Data:
    return tomllib.loads((root / "matrix.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    [
        "PATH", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONPYCACHEPREFIX",
        "PYTHONSTARTUP", "PYTHONSAFEPATH", "BASH_ENV", "ENV", "IFS", "GCONV_PATH",
        "GLIBC_TUNABLES", "TMPDIR", "X Y", "X\nY", "X=Y", "", "1X", "X-Y", "BASH_FUNC_ls%%",
    ],
)  # fmt: skip
@pytest.mark.parametrize("table", ["sku", "preset"])
def test_variable_that_steers_programs_is_refused(data: Data, table: str, name: str) -> None:
    row = next(iter(data[table].values()))
    row["env"] = {**row.get("env", {}), name: "x"}
    with pytest.raises(ValidationError, match=r"how programs start|String should match"):
        Matrix.model_validate(data)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("sku.b300.env.VLLM_X", "a\nLD_PRELOAD=/x"),
        ("sku.b300.device", "NVIDIA B300\n"),
        ("line.LINE.constraints.0.requirement", "x==1\n--index-url=http://127.0.0.1"),
        ("line.LINE.constraints.0.requirement", "--index-url=http://127.0.0.1"),
        ("line.LINE.lock", "/etc/passwd"),
        ("line.LINE.series", "patches/a b"),
        ("base.suite", "--setup-hook=true"),
        ("base.suite", "trixie /"),
        ("base.packages.0", "--essential-hook=true"),
        ("base.packages.0", "gcc,?essential"),
        ("base.platform", "linux --index-url=x"),
        ("container.ulimits.0", "memlock=-1 --privileged"),
        ("container.ulimits.0", "--privileged"),
        ("artifact.ARTIFACT.repo", "../.."),
        ("artifact.ARTIFACT.repo", "--help"),
        ("preset.b300-mtp.flags.0", "--port=1\n--host=0.0.0.0"),
        ("preset.b300-mtp.flags.0", "/some/other/model"),
    ],
)
def test_value_that_is_more_than_one_word_is_refused(data: Data, place: str, value: str) -> None:
    row: Any = data
    names: dict[str | int, str] = {"LINE": "0.26", "ARTIFACT": next(iter(data["artifact"]))}
    *steps, last = (int(step) if step.isdigit() else step for step in place.split("."))
    for step in steps:
        row = row[names.get(step, step)]
    row[last] = value
    with pytest.raises(ValidationError, match="String should match"):
        Matrix.model_validate(data)


@pytest.mark.parametrize("epoch", [-1, 1 << 32, 10**18, "0", True])
def test_time_that_no_file_can_have_is_refused(data: Data, epoch: object) -> None:
    data["base"]["source_date_epoch"] = epoch
    with pytest.raises(ValidationError, match=r"base\.source_date_epoch"):
        Matrix.model_validate(data)


def test_committed_rows_are_accepted(data: Data) -> None:
    assert Matrix.model_validate(copy.deepcopy(data)).sku


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(root / "matrix.toml", checkout)
    for name in ("docker/locks", "patches/vllm"):
        shutil.copytree(root / name, checkout / name)
    assert load(checkout).line
    return checkout


@pytest.mark.parametrize("given", ["../0.26.txt", "docker/../../0.26.txt"])
def test_path_above_the_checkout_is_refused(copied: Path, given: str) -> None:
    text = (copied / "matrix.toml").read_text()
    (copied / "matrix.toml").write_text(text.replace("docker/locks/0.26.txt", given))
    with pytest.raises(MatrixValueError, match=r"line\.0\.26\.lock is outside the checkout"):
        load(copied)


@pytest.mark.parametrize("content", ["huge", b"\xff", b"x"])
def test_file_that_is_not_a_matrix_is_refused(copied: Path, content: bytes | str) -> None:
    with (copied / "matrix.toml").open("wb") as file:
        file.truncate(1 << 40) if isinstance(content, str) else file.write(content)
    with pytest.raises(MatrixFileError):
        load(copied)


def test_base_lock_above_the_checkout_is_refused(copied: Path) -> None:
    text = (copied / "matrix.toml").read_text()
    (copied / "matrix.toml").write_text(text.replace("docker/locks/debian", "../debian"))
    with pytest.raises(MatrixValueError, match=r"base\.lock is outside the checkout"):
        load(copied)


@pytest.mark.parametrize(
    "name", ["docker/locks/0.26.txt", "docker", "patches/vllm/0.26", "patches"]
)
def test_link_out_of_the_checkout_is_refused(copied: Path, name: str, tmp_path: Path) -> None:
    (copied / name).rename(tmp_path / "elsewhere")
    (copied / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MatrixValueError, match="outside the checkout"):
        load(copied)


def test_link_to_the_checkout_itself_is_followed(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    assert load(tmp_path / "link").line


@pytest.mark.parametrize("place", ["folder", "matrix.toml"])
def test_checkout_of_another_user_does_not_hide_the_data_of_a_wheel(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Such as /tmp/matrix.toml, with keys that `verify` would trust."""
    data, planted, work = tmp_path / "data", tmp_path / "tmp", tmp_path / "tmp" / "work"
    for folder in (data, planted, work):
        folder.mkdir()
    shutil.copy(root / "matrix.toml", data)
    monkeypatch.setattr("vllm_forge.matrix.cells.PACKAGED", data)
    monkeypatch.delenv("VLLM_FORGE_ROOT", raising=False)
    monkeypatch.chdir(work)
    assert find_root() == data
    shutil.copy(root / "matrix.toml", planted)
    assert find_root() == planted
    if os.geteuid() == 0:
        os.chown(planted if place == "folder" else planted / "matrix.toml", 4711, 4711)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(MatrixFileError, match="another user") as caught:
        find_root()
    assert "VLLM_FORGE_ROOT" in caught.value.remedy
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(planted))
    assert find_root() == planted
