"""Locks: what is refused, what the committed ones say, and how a new one is made."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.utils import canonicalize_name, parse_wheel_filename
from pypi_simple import DistributionPackage

from tests.support.index_server import IndexServer, Served, refusing_port
from vllm_forge.matrix import Base, Line, load
from vllm_forge.sources import Index, lock, make_lock, read_lock
from vllm_forge.sources.errors import (
    DistributionNotFoundError,
    IndexUnreachableError,
    LockFileError,
    ResolutionError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]
LINES = list(load(ROOT).line)
HEX = "ab" * 32


@pytest.fixture
def line(root: Path) -> Line:
    return load(root).line["0.33"]


@pytest.fixture
def base(root: Path) -> Base:
    return load(root).base


Edit = "Callable[[str], str]"


@pytest.fixture
def edited(root: Path, tmp_path: Path, line: Line, base: Base) -> Callable[[bytes], lock.Lock]:
    """Read a changed copy of a committed lock."""

    def read(content: bytes) -> lock.Lock:
        path = tmp_path / line.lock
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        return read_lock(tmp_path, "0.33", line, base)

    return read


@pytest.fixture
def text(root: Path, line: Line) -> str:
    return (root / line.lock).read_text()


def swap_two_entries(text: str) -> str:
    rows = text.splitlines()
    at = next(n for n, row in enumerate(rows) if not row.startswith("#"))
    rows[at], rows[at + 1] = rows[at + 1], rows[at]
    return "\n".join(rows) + "\n"


def double_an_entry(text: str) -> str:
    return text + text.splitlines()[-1] + "\n"


def drop(name: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"^{name}==.*\n", "", text, flags=re.M)


def sub(pattern: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed, times = re.subn(pattern, new, text, count=1, flags=re.M)
        assert times == 1
        return changed

    return change


def recounted(change: Callable[[str], str]) -> Callable[[str], str]:
    """The change, with a header that agrees with it."""

    def apply(text: str) -> str:
        changed = change(text)
        rows = [row for row in changed.splitlines() if row and not row.startswith("#")]
        size = sum(int(row.rpartition(" ")[2]) for row in rows)
        return re.sub(r"# total: .*", f"# total: {len(rows)} wheels, {size} bytes", changed)

    return apply


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "no-hash": (sub(r"^(certifi==\S+) --hash=\S+", r"\1"), "not a lock entry: certifi"),
    "short-hash": (sub(r"(certifi.*sha256:[0-9a-f]{60})\w{4}", r"\1"), "not a lock entry: certifi"),
    "capital-hash": (sub(r"(certifi.*sha256:)\w{64}", r"\1" + "AB" * 32), "not a lock entry"),
    "no-size": (sub(r"^(certifi.*\.whl) \d+$", r"\1"), "not a lock entry: certifi"),
    "no-file": (sub(r"^(certifi\S+ \S+).*$", r"\1"), "not a lock entry: certifi"),
    "an-sdist": (sub(r"^(certifi.*)-py3-none-any\.whl", r"\1.tar.gz"), "not a lock entry"),
    "a-url": (sub(r"^certifi==\S+", "certifi @ https://example.org/c.whl"), "not a lock entry"),
    "a-path": (sub(r"^(certifi.*#) (\S+\.whl)", r"\1 ../../\2"), "not a lock entry: certifi"),
    "trailing-text": (sub(r"^(certifi.*)$", r"\1 # mine"), "not a lock entry"),
    "indented": (sub(r"^certifi", " certifi"), "not a lock entry"),
    "an-option": (sub(r"^certifi", "--pre\ncertifi"), "not a lock entry: --pre"),
    "merge-conflict": (sub(r"^certifi", "<<<<<<< ours\ncertifi"), "not a lock entry: <<<"),
    "capital-name": (sub(r"^certifi", "Certifi"), "not a lock entry"),
    "unsorted": (swap_two_entries, "sorted"),
    "doubled": (double_an_entry, "unique"),
    "other-input": (sub(r"^# input: \w+", f"# input: {HEX}"), "not made for what matrix.toml"),
    "no-input": (sub(r"^# input: \w+\n", ""), "not made for what matrix.toml"),
    "no-vllm": (recounted(drop("vllm")), "no vllm"),
    "no-torch": (recounted(drop("torch")), "no torch"),
    "dropped": (drop("numpy"), "edited by hand"),
    "no-total": (sub(r"^# total: .*\n", ""), "edited by hand"),
    "other-vllm": (sub(r"^vllm==\S+", "vllm==0.33.1"), "vllm 0.33.1, the row says 0.33.0"),
    "other-torch": (sub(r"^torch==\S+", "torch==2.14.1"), "torch 2.14.1, the row says 2.14.0"),
    "empty": (lambda _: "", "not made for what matrix.toml"),
    "windows-line-ends": (lambda text: text.replace("\n", "\r\n"), "line ends"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lock_is_refused(name: str, text: str, edited: Callable[[bytes], lock.Lock]) -> None:
    change, words = BROKEN[name]
    with pytest.raises(LockFileError) as refused:
        edited(change(text).encode())
    assert words in str(refused.value)
    assert str(Path("docker/locks/0.33.txt")) in refused.value.where


def test_unchanged_lock_is_taken(text: str, edited: Callable[[bytes], lock.Lock]) -> None:
    made = edited(text.encode())
    assert made.digest == hashlib.sha256(text.encode()).hexdigest()


def test_malformed_line_is_named_with_its_number(
    text: str, edited: Callable[[bytes], lock.Lock]
) -> None:
    number = len(text.splitlines())
    with pytest.raises(LockFileError) as refused:
        edited((text.rstrip("\n") + " oops\n").encode())
    assert refused.value.where.endswith(f"0.33.txt:{number}")
    assert "nox -s lock -- --line 0.33" in refused.value.remedy


def test_lock_that_is_not_text(edited: Callable[[bytes], lock.Lock]) -> None:
    with pytest.raises(LockFileError):
        edited(b"# \xff\xfe\n")


def test_missing_lock(tmp_path: Path, line: Line, base: Base) -> None:
    with pytest.raises(LockFileError, match="has no lock"):
        read_lock(tmp_path, "0.33", line, base)


@pytest.mark.parametrize(
    "change",
    [
        {"vllm": "0.33.1"},
        {"torch": "2.14.1"},
        {"python": "3.12"},
        {"constraints": ()},
        {"overrides": ()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_lock_of_an_older_row_is_refused(
    change: dict[str, object], root: Path, line: Line, base: Base
) -> None:
    with pytest.raises(LockFileError, match="not made for what matrix"):
        read_lock(root, "0.33", line.model_copy(update=change), base)


def test_lock_of_another_platform_is_refused(root: Path, line: Line, base: Base) -> None:
    other = base.model_copy(update={"platform": "x86_64-manylinux_2_28"})
    with pytest.raises(LockFileError, match="not made for what matrix"):
        read_lock(root, "0.33", line, other)


def test_a_reason_may_be_worded_better_without_a_new_lock(
    root: Path, line: Line, base: Base
) -> None:
    pins = tuple(
        pin.model_copy(update={"reason": pin.reason + " (so it is)"}) for pin in line.constraints
    )
    assert read_lock(root, "0.33", line.model_copy(update={"constraints": pins}), base).wheels


def test_find_says_what_is_missing(root: Path, line: Line, base: Base) -> None:
    made = read_lock(root, "0.33", line, base)
    assert made.find("vllm").version == line.vllm
    with pytest.raises(LockFileError, match="no numpy-quaddtype"):
        made.find("numpy-quaddtype")


# --- the committed ones --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINES)
class TestCommittedLocks:
    def read(self, name: str) -> lock.Lock:
        matrix = load(ROOT)
        return read_lock(ROOT, name, matrix.line[name], matrix.base)

    def test_belongs_to_its_row(self, name: str) -> None:
        row = load(ROOT).line[name]
        made = self.read(name)
        assert made.find("vllm").version == row.vllm
        assert made.find("torch").version == row.torch
        pins = {pin.requirement for pin in (*row.constraints, *row.overrides)}
        locked = {f"{wheel.name}=={wheel.version}" for wheel in made.wheels}
        assert {pin for pin in pins if pin.partition("==")[0] in {w.name for w in made.wheels}} <= (
            locked
        )

    def test_compilers_are_of_the_lines_cuda(self, name: str) -> None:
        cuda = load(ROOT).line[name].cuda
        made = self.read(name)
        for compiler in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"):
            assert made.find(compiler).version.startswith(f"{cuda}.")

    def test_entry_and_file_name_agree(self, name: str) -> None:
        for wheel in self.read(name).wheels:
            distribution, version, _, _ = parse_wheel_filename(wheel.filename)
            assert (canonicalize_name(distribution), str(version)) == (wheel.name, wheel.version)

    def test_files_are_for_the_images_python_and_platform(self, name: str) -> None:
        matrix = load(ROOT)
        tags = lock.wheel_tags(matrix.line[name], matrix.base)
        for wheel in self.read(name).wheels:
            assert parse_wheel_filename(wheel.filename)[3] & set(tags)

    def test_names_no_host(self, name: str) -> None:
        text = (ROOT / load(ROOT).line[name].lock).read_text()
        assert "://" not in text
        assert not re.search(r"\b(?:\d{1,3}\.){3}\d{1,3}:\d+", text)
        # Nothing that looks like host.tld except file names; reasons are prose.
        hosts = re.findall(r"[\w-]+\.(?:org|com|net|io|dev|local|internal)\b", text)
        assert hosts == []

    def test_header_counts_what_follows(self, name: str) -> None:
        made = self.read(name)
        total = sum(wheel.size for wheel in made.wheels)
        assert f"# total: {len(made.wheels)} wheels, {total} bytes\n" in made.path.read_text()

    def test_reasons_are_in_the_header(self, name: str) -> None:
        row = load(ROOT).line[name]
        text = (ROOT / row.lock).read_text()
        for pin in row.constraints:
            assert f"# constraint {pin.requirement}: " in text
        for pin in row.overrides:
            assert f"# override {pin.requirement}: " in text


# --- which wheel of several ----------------------------------------------------------------------

CP = "cp313-cp313"
CHOICES: dict[str, tuple[list[str], str | None]] = {
    "newest-glibc-that-fits": (
        [
            f"{CP}-manylinux_2_17_x86_64",
            f"{CP}-manylinux_2_35_x86_64",
            f"{CP}-manylinux_2_36_x86_64",
        ],
        f"{CP}-manylinux_2_35_x86_64",
    ),
    "too-new-glibc": ([f"{CP}-manylinux_2_36_x86_64"], None),
    "legacy-name": ([f"{CP}-manylinux2014_x86_64"], f"{CP}-manylinux2014_x86_64"),
    "compressed-tags": (
        [f"{CP}-manylinux2014_x86_64.manylinux_2_17_x86_64", "py3-none-any"],
        f"{CP}-manylinux2014_x86_64.manylinux_2_17_x86_64",
    ),
    "own-abi-before-abi3": (
        ["cp313-abi3-manylinux_2_28_x86_64", f"{CP}-manylinux_2_28_x86_64"],
        f"{CP}-manylinux_2_28_x86_64",
    ),
    "abi3-of-an-older-python": (
        ["cp38-abi3-manylinux_2_28_x86_64", "py3-none-any"],
        "cp38-abi3-manylinux_2_28_x86_64",
    ),
    "abi3-of-a-newer-python": (["cp314-abi3-manylinux_2_28_x86_64"], None),
    "pure": (["py3-none-any"], "py3-none-any"),
    "pure-of-both": (["py2.py3-none-any"], "py2.py3-none-any"),
    "pure-of-python-2": (["py2-none-any"], None),
    "native-without-abi": (
        ["py3-none-manylinux_2_17_x86_64", "py3-none-any"],
        "py3-none-manylinux_2_17_x86_64",
    ),
    "other-python": (["cp312-cp312-manylinux_2_28_x86_64"], None),
    "free-threaded": (["cp313-cp313t-manylinux_2_28_x86_64"], None),
    "other-machine": ([f"{CP}-manylinux_2_28_aarch64"], None),
    "musl": ([f"{CP}-musllinux_1_2_x86_64"], None),
    "windows": ([f"{CP}-win_amd64"], None),
    "tag-that-no-installer-takes": (["py36+-none-any", "py3-none-any"], "py3-none-any"),
    "nothing": ([], None),
}


def offer(*names: str, sha256: str | None = HEX, size: int | None = 9) -> list[DistributionPackage]:
    digests = {} if sha256 is None else {"sha256": sha256}
    return [
        DistributionPackage(
            filename=name, url="", project=None, version=None, package_type=None, digests=digests,
            requires_python=None, has_sig=None, size=size,
        )
        for name in names
    ]  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("order", [1, -1], ids=["", "reversed"])
def test_choice(name: str, order: int, line: Line, base: Base) -> None:
    offered, expected = CHOICES[name]
    files = offer(*(f"pkg-1.0-{tags}.whl" for tags in offered[::order]), "pkg-1.0.tar.gz")
    tags = lock.wheel_tags(line, base)
    if expected is None:
        with pytest.raises(DistributionNotFoundError, match=r"pkg 1\.0 has no wheel"):
            lock.choose_wheel("pkg", "1.0", files, tags)
    else:
        chosen = lock.choose_wheel("pkg", "1.0", files, tags)
        assert chosen.filename == f"pkg-1.0-{expected}.whl"


def test_choice_is_of_the_version(line: Line, base: Base) -> None:
    files = offer("pkg-1.0.1-py3-none-any.whl", "pkg-1.0-py3-none-any.whl")
    tags = lock.wheel_tags(line, base)
    assert lock.choose_wheel("pkg", "1.0", files, tags).filename == "pkg-1.0-py3-none-any.whl"


def test_wheel_of_another_name_is_not_chosen(line: Line, base: Base) -> None:
    """A page that lists files of other projects, too."""
    files = offer("other-1.0-py3-none-any.whl", "pkg-1.0-py3-none-any.whl")
    tags = lock.wheel_tags(line, base)
    assert lock.choose_wheel("pkg", "1.0", files, tags).filename == "pkg-1.0-py3-none-any.whl"


@pytest.mark.parametrize("missing", [{"sha256": None}, {"size": None}])
def test_index_without_hash_or_size(missing: dict[str, None], line: Line, base: Base) -> None:
    files = offer("pkg-1.0-py3-none-any.whl", **missing)
    with pytest.raises(DistributionNotFoundError, match="no sha256 or no size"):
        lock.choose_wheel("pkg", "1.0", files, lock.wheel_tags(line, base))


def test_yanked_wheel_is_named(line: Line, base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = offer("pkg-1.0-py3-none-any.whl")
    yanked = replace(file, is_yanked=True, yanked_reason="wrong\x1b[31m kernels")
    lock.choose_wheel("pkg", "1.0", [yanked], lock.wheel_tags(line, base))
    err = capsys.readouterr().err
    assert err == "yanked pkg-1.0-py3-none-any.whl: wrong\\x1b[31m kernels\n"


# --- making one ----------------------------------------------------------------------------------


@pytest.fixture
def packages(server: IndexServer, line: Line) -> IndexServer:
    for name, version in (("vllm", line.vllm), ("torch", line.torch), ("zlib-ng", "0.5")):
        filename = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        server.add(name, filename, Served(content=name.encode()))
    return server


def resolved(line: Line) -> list[tuple[str, str]]:
    return [("torch", line.torch), ("vllm", line.vllm), ("zlib-ng", "0.5")]


def test_make_lock(  # noqa: PLR0917
    packages: IndexServer, line: Line, base: Base, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(lock, "_resolve", lambda *_: resolved(line))
    made = make_lock(tmp_path, "0.33", line, base, Index(packages.url))
    assert [wheel.name for wheel in made.wheels] == ["torch", "vllm", "zlib-ng"]
    text = made.path.read_text()
    printed = " ".join(capsys.readouterr().err.split())
    assert line.constraints
    assert line.overrides
    for kind, pins in (("constraint", line.constraints), ("override", line.overrides)):
        for pin in pins:
            assert f"# {kind} {pin.requirement}: {pin.reason}\n" in text
            assert f"{kind} {pin.requirement}: {' '.join(pin.reason.split())}" in printed
    assert "127.0.0.1" not in text
    assert "# total: 3 wheels, 16 bytes\n" in text
    again = make_lock(tmp_path, "0.33", line, base, Index(packages.url))
    assert again == made
    assert again.path.read_text() == text


def test_extras_of_an_override_are_printed(  # noqa: PLR0917
    packages: IndexServer, line: Line, base: Base, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Brackets are colours to the console, unless it is told otherwise."""
    monkeypatch.setattr(lock, "_resolve", lambda *_: resolved(line))
    pin = line.overrides[0].model_copy(update={"requirement": "uvicorn[standard]==1.0"})
    row = line.model_copy(update={"overrides": (pin,)})
    make_lock(tmp_path, "0.33", row, base, Index(packages.url))
    assert "override uvicorn[standard]==1.0: " in capsys.readouterr().err


def test_failed_lock_leaves_the_old_one(
    packages: IndexServer, line: Line, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / line.lock
    path.parent.mkdir(parents=True)
    path.write_text("the old one\n")
    monkeypatch.setattr(lock, "_resolve", lambda *_: [*resolved(line), ("gone", "1.0")])
    with pytest.raises(DistributionNotFoundError, match="'gone'"):
        make_lock(tmp_path, "0.33", line, base, Index(packages.url))
    assert path.read_text() == "the old one\n"
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_lock_that_is_refused_leaves_the_old_one(
    packages: IndexServer, line: Line, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read before it is in place: the next build would meet it."""
    path = tmp_path / line.lock
    path.parent.mkdir(parents=True)
    path.write_text("the old one\n")
    rows = [*resolved(line), ("zlib-ng", "0.5")]
    monkeypatch.setattr(lock, "_resolve", lambda *_: rows)
    with pytest.raises(ResolutionError, match="not sorted or not unique") as refused:
        make_lock(tmp_path, "0.33", line, base, Index(packages.url))
    assert refused.value.where == line.lock
    assert path.read_text() == "the old one\n"


FAKE_UV = """\
#!{python}
import json, os, pathlib, sys
here = pathlib.Path.cwd()
(pathlib.Path({record!r})).write_text(json.dumps({{
    "argv": sys.argv[1:], "index": os.environ["UV_DEFAULT_INDEX"],
    "files": {{p.name: p.read_text() for p in here.glob("*.txt")}},
}}))
print({out!r}, end="")
sys.stderr.write({err!r})
sys.exit({code})
"""


@pytest.fixture
def uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A uv that says what it is told to, and records what it was asked."""

    def fake(*, out: str = "", err: str = "", code: int = 0) -> Path:
        record = tmp_path / "asked.json"
        tool = tmp_path / "uv"
        tool.write_text(
            FAKE_UV.format(python=sys.executable, record=str(record), out=out, err=err, code=code)
        )
        tool.chmod(0o755)
        monkeypatch.setattr(lock, "find_uv_bin", lambda: str(tool))
        return record

    return fake


def test_what_uv_is_asked(
    uv: Callable[..., Path], packages: IndexServer, line: Line, base: Base, tmp_path: Path
) -> None:
    out = f"Torch=={line.torch}\nvllm=={line.vllm}\nzlib_ng==0.5 \\\n"
    record = uv(out=out)
    made = make_lock(tmp_path, "0.33", line, base, Index(packages.url))
    assert [wheel.name for wheel in made.wheels] == ["torch", "vllm", "zlib-ng"]
    asked = json.loads(record.read_text())
    assert asked["files"]["in.txt"].split() == [f"vllm=={line.vllm}", f"torch=={line.torch}"]
    assert asked["files"]["constraints.txt"].split() == [
        pin.requirement for pin in line.constraints
    ]
    assert asked["files"]["overrides.txt"].split() == [pin.requirement for pin in line.overrides]
    for option in (
        f"--python-version={line.python}",
        f"--python-platform={base.platform}",
        "--only-binary=:all:",
        "--constraints=constraints.txt",
        "--overrides=overrides.txt",
    ):
        assert option in asked["argv"]


def test_password_of_the_index_is_not_on_the_command_line(
    uv: Callable[..., Path], packages: IndexServer, line: Line, base: Base, tmp_path: Path
) -> None:
    record = uv(code=1)
    url = packages.url.replace("://", "://user:secret@")
    with pytest.raises(ResolutionError):
        make_lock(tmp_path, "0.33", line, base, Index(url))
    asked = json.loads(record.read_text())
    assert asked["index"] == url
    assert not any("secret" in argument for argument in asked["argv"])


def test_no_solution_is_reported_in_uvs_words(
    uv: Callable[..., Path], server: IndexServer, line: Line, base: Base, tmp_path: Path
) -> None:
    uv(err="Because a depends on b>2 and only b==1 is available ...", code=1)
    with pytest.raises(ResolutionError, match="Because a depends on b>2") as refused:
        make_lock(tmp_path, "0.33", line, base, Index(server.url))
    assert "override" in refused.value.remedy
    assert not (tmp_path / line.lock).exists()


def test_real_uv_and_no_index(line: Line, base: Base, tmp_path: Path, no_retries: None,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """uv itself, in front of a port that refuses: not a question of versions."""
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    with refusing_port() as port:
        index = Index(f"http://127.0.0.1:{port}/simple/")
        with pytest.raises(IndexUnreachableError):
            make_lock(tmp_path, "0.33", line, base, index)


def test_real_uv_downloads_no_python(
    packages: IndexServer, line: Line, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uv does not search for the Python of the line, which may not be installed."""
    for name in ("UV_CACHE_DIR", "UV_PYTHON_INSTALL_DIR", "PATH"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", f"{packages.base}/pythons")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    row = line.model_copy(update={"constraints": (), "overrides": ()})
    with pytest.raises(ResolutionError):  # the files are no wheels
        make_lock(tmp_path, "0.33", row, base, Index(packages.url))
    asked = {request.path.split("/")[1] for request in packages.requests}
    assert asked == {"simple", "files"}


def test_reader_and_writer_agree_on_a_fresh_interpreter(root: Path) -> None:
    """The input digest depends on nothing of this process, e.g. the seed of hashes."""
    code = (
        "import pathlib; from vllm_forge.matrix import load; from vllm_forge.sources import lock;"
        f"m = load(pathlib.Path({str(root)!r})); print(lock.input_digest(m.line['0.26'], m.base))"
    )
    matrix = load(root)
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == lock.input_digest(matrix.line["0.26"], matrix.base)
