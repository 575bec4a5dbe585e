"""FlashInfer's own wheels: which archives they pin, and that real archives are what they pin.

The wheel flashinfer-cubin 0.6.13 has some archives of 0.6.14 as FlashInfer's server has them, with
their lists. The one that presets need, of batched GEMM, is of no wheel on the package index.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from tests.support.index_server import serve_folder
from vllm_forge.kernels.coverage.families import catalogue
from vllm_forge.matrix import load
from vllm_forge.sources import LockedWheel, Wheelhouse, read_lock
from vllm_forge.sources.cubins import LIST, MIRROR, Archive, read_archives
from vllm_forge.sources.errors import HashMismatchError

ROOT = Path(__file__).parents[2]
CUBINS = LockedWheel(
    name="flashinfer-cubin",
    version="0.6.13",
    filename="flashinfer_cubin-0.6.13-py3-none-any.whl",
    size=457984995,
    sha256="41e4848c2d09d220e8394489b2fb6cfec6b6ad09f897b5ab8b39fc23055f6c24",
)
LINES = {"0.26": "0.6.14", "0.33": "0.7.2.post1"}
# Archives of 0.6.14 in that wheel, with a whole list -> number of files.
SAME = {"TRTLLM_GEN_GEMM": 108, "DEEPGEMM": 317}


def archives(line: str) -> dict[str, Archive]:
    """Those of the locked FlashInfer, by name."""
    matrix = load(ROOT)
    lock = read_lock(ROOT, line, matrix.line[line], matrix.base)
    wheel = lock.find("flashinfer-python")
    assert wheel.version == LINES[line], "read its artifacts.py: it may have another form"
    if Wheelhouse().missing([wheel]):
        pytest.skip(f"{wheel.filename} is not in the cache: nox -s forge -- wheels fetch does that")
    return {row.name: row for row in read_archives(wheel)}


@pytest.mark.parametrize("line", LINES)
def test_locked_wheels_pin_the_archives_of_families(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MIRROR, raising=False)
    rows = archives(line)
    assert all(row.url.startswith("https://edge.urm.nvidia.com/") for row in rows.values())
    assert {name for name, row in rows.items() if not row.sha256} == {"CUDNN_SDPA", "DSL_FMHA"}
    for family in catalogue().family.values():
        for part in family.cubins:
            folder = str(PurePosixPath(part.files).parent)
            found = [
                name
                for name, row in rows.items()
                if PurePosixPath("flashinfer_cubin/cubins", row.path).match(folder)
            ]
            assert found in (["TRTLLM_GEN_BMM"], ["TRTLLM_GEN_FMHA"])
            assert re.fullmatch("[0-9a-f]{64}", rows[found[0]].sha256)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FlashInfer's server has it, of the wheel's files."""
    if Wheelhouse().missing([CUBINS]):
        place = Wheelhouse().path(CUBINS).parent
        pytest.skip(
            f"{CUBINS.filename} (458 MB) is not in the cache: "
            f"pip download --no-deps flashinfer-cubin=={CUBINS.version} --dest {place}"
        )
    folder = tmp_path_factory.mktemp("server")
    with zipfile.ZipFile(Wheelhouse().verify(CUBINS)) as wheel:
        for name in SAME:
            inside = f"flashinfer_cubin/cubins/{archives('0.26')[name].path}/"
            names = [member for member in wheel.namelist() if member.startswith(inside)]
            wheel.extractall(folder, names)
    return folder / "flashinfer_cubin/cubins"


@pytest.mark.parametrize("name", SAME)
def test_real_archive_is_fetched_and_verified_from_the_lock_down(
    name: str, server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve_folder(server) as url:
        monkeypatch.setenv(MIRROR, url)
        archive = replace(archives("0.26")[name], folder=tmp_path / "archive")
        monkeypatch.setenv("VLLM_FORGE_CACHE", str(tmp_path))
        hashes = archive.fetch()
        assert len(hashes) == SAME[name] + 1
        files = {path for path in archive.folder.rglob("*") if path.is_file()}
        assert {str(path.relative_to(archive.folder)) for path in files} == hashes.keys()
        damaged = server / archive.path / sorted(hashes.keys() - {LIST})[0]
        content = damaged.read_bytes()
        (archive.folder / damaged.name).unlink()
        damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(HashMismatchError, match=re.escape(damaged.name)):
            archive.fetch()
        damaged.write_bytes(content)
