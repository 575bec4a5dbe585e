"""Boundary: the cache. Its user writes it; disks and other programs damage it. Nothing is believed.

One byte of every kind of file in it is changed. Either the next build gives the reference's digest,
or it refuses and the one after that gives it: nothing damaged ships, nothing stays damaged.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fast_build import (
    FastEngine,
    FastRunner,
    fast_build,
    lock_packages,
    need_kernels,
    tiny_deb,
)
from tests.support.fast_build import use as use_project
from tests.support.flashinfer import flashinfer, serve_archive
from tests.support.index_server import serve_folder
from tests.support.project import Project, make_project
from vllm_forge import images
from vllm_forge.errors import ForgeError
from vllm_forge.host import exclusive
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.host.files import read_sealed, write_sealed
from vllm_forge.images import checks, wheel_layers
from vllm_forge.images.checks import line_coverage
from vllm_forge.images.errors import ImageCheckError, LayoutError
from vllm_forge.images.layout import read_image, verify, write_image
from vllm_forge.images.system import SYSTEM_NAME
from vllm_forge.kernels.coverage.library import library_code
from vllm_forge.project import Project as ForgeProject
from vllm_forge.proofs import environment
from vllm_forge.proofs import prove as proving
from vllm_forge.proofs.environment import ask_line, dry_load, ready
from vllm_forge.proofs.prove import compare_upstream, prove
from vllm_forge.release.sbom import wheel_contents

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_forge.host import Runner
    from vllm_forge.images.engines import ContainerRun

pytestmark = pytest.mark.xdist_group("cache")  # one worker builds what its fixtures have

build = functools.partial(fast_build, kernels=True)  # all kinds of files
SKUS = ("beta", "alpha")  # the next SKU first: it is cut from what alpha has left
FLIPS = 14
LAYERS = ("layers/*/code/**/libtiny_cuda.so", "layers/*/files/**/sixlike.py")
EMPTY_LAYER = 18  # bytes of a frame without files, which is left out of images


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Files of the cache that have one answer.

    Attributes:
        pattern: of the path, where ``*`` is a hash or a name.
        absent: what else is deleted, so that a build reads the file.
        mended: afterwards the changed bytes are not there any more.
    """

    pattern: str
    absent: tuple[str, ...] = ()
    mended: bool = True


KINDS = (
    Kind(pattern=r"layers/\w+/(layer|checked)\.json"),
    Kind(pattern=r"layers/\w+/layer\.tar\.(gz|zst)"),
    Kind(pattern=r"layers/\w+/code/.+"),
    Kind(pattern=r"layers/\w+/files/.+torch[^/]+\.dist-info/RECORD"),
    Kind(pattern=r"layers/\w+/files/.+"),
    Kind(pattern=r"systems/\w+/(index\.json|oci-layout|checked\.json|blobs/.+)"),
    Kind(pattern=r"systems/\w+/root/.+"),
    Kind(pattern=r"bytecode/.+"),
    Kind(pattern=r"facts/\w+\.json"),
    Kind(pattern=r"rootfs/.+", absent=("systems",)),
    Kind(pattern=r"debs/\w+/.+\.deb", absent=("rootfs", "systems")),
    Kind(pattern=r"wheels/\w+/.+\.whl", absent=("layers",)),
    Kind(pattern=r"cubins/\w+/.+", absent=("layers",)),
    Kind(pattern=r"sdists/\w+/.+\.tar\.gz", absent=("sources.git",)),
    Kind(pattern=r"sources\.git/(config|refs/.+)"),
    Kind(pattern=r"sources\.git/(HEAD|objects/.+)", mended=False),  # of those that are read
    Kind(pattern=r"patched/.+\.(whl|json)"),
    Kind(pattern=r"images/\w+\.json"),
    Kind(pattern=r"work/.+", mended=False),
    Kind(pattern=r"locks/.+\.lock", mended=False),
    Kind(pattern=r"uv/.+", mended=False),  # uv's own, for locks only
    Kind(pattern=r"layers/\w+/hashed\.json", mended=False),  # of an empty layer: is not read
)


def kind_of(path: str) -> Kind:
    for kind in KINDS:
        if re.fullmatch(kind.pattern, path):
            return kind
    pytest.fail(f"a new kind of file in the cache: say in KINDS what finds a changed byte: {path}")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A project with alpha built, and the digest of each SKU's image."""

    project: Project
    digests: dict[str, str]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    project = make_project(tmp_path_factory.mktemp("cache"), flashinfer=flashinfer())
    serve_archive(project.index)
    archive = tmp_path_factory.mktemp("archive")
    package = tiny_deb(archive)
    with serve_folder(archive) as snapshot, pytest.MonkeyPatch.context() as patch:
        lock_packages(project, package, snapshot)
        use(project, patch)
        digests = {"alpha": build(project, "alpha")[0].digest}
        other = project.copy(tmp_path_factory.mktemp("other"))
        use(other, patch)
        digests["beta"] = build(other, "beta")[0].digest
        patch.undo()
        yield Reference(project=project, digests=digests)
    project.index.close()


def use(project: Project, patch: pytest.MonkeyPatch) -> None:
    use_project(project, patch)
    need_kernels(project, patch)


def files(project: Project) -> list[str]:
    """Not empty ones, smallest first."""
    paths = [path for path in project.cache.rglob("*") if path.is_file() and not path.is_symlink()]
    sized = sorted((path.stat().st_size, str(path.relative_to(project.cache))) for path in paths)
    return [name for size, name in sized if size]


def flip(path: Path, where: float, bit: int = 0) -> bytes:
    """Change one bit; return the changed content."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1 << bit
    path.chmod(0o644)
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return bytes(content)


def copied(reference: Reference, folder: Path) -> Project:
    return reference.project.copy(folder, *(p.name for p in reference.project.cache.iterdir()))


def survive(reference: Reference, folder: Path, name: str, where: float, bit: int = 0) -> None:
    """Flip a bit of a file and build both SKUs, each twice if the first time is refused."""
    kind = kind_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        project = reference.project.copy(
            folder, *(p.name for p in reference.project.cache.iterdir())
        )
        use(project, patch)
        for other in kind.absent:
            shutil.rmtree(project.cache / other)
        changed = flip(project.cache / name, where, bit)
        for sku in SKUS:
            try:
                image, _ = build(project, sku)
            except ForgeError:
                image, _ = build(project, sku)
            verify(image)
            assert image.digest == reference.digests[sku]
        path = project.cache / name
        if kind.mended and len(changed) > EMPTY_LAYER:
            assert not path.exists() or path.read_bytes() != changed


def test_every_kind_of_file_is_known(reference: Reference) -> None:
    kinds = {kind_of(name).pattern for name in files(reference.project)}
    assert kinds == {kind.pattern for kind in KINDS}


# Folders that the builds of this file do not use.
ELSEWHERE = {
    "buildah": "the engine's own, emptied before each use",
    "checkpoints": "tests/unit/checkpoints/test_variants.py",
    "contents": "test_damaged_record_is_made_again",
    "coverage": "test_damaged_record_is_made_again",
    "mirror": "by download_all, as wheels",
}  # those of proofs, selections and dry loads: bytecode, and what each run writes again


def test_every_folder_of_the_cache_has_an_answer(root: Path) -> None:
    """A new one: say in KINDS or ELSEWHERE what finds a changed byte."""
    named = re.compile(r'cache_root\(\) / "([\w.]+)"')
    sources = (root / "src").rglob("*.py")
    found = {name for path in sources for name in named.findall(path.read_text())}
    kinds = {kind.pattern.partition("/")[0].replace("\\", "") for kind in KINDS}
    assert found == (kinds - {"uv"}) | ELSEWHERE.keys()


@pytest.mark.parametrize("place", ["coverage/*.json", "contents/*.json"])
def test_damaged_record_is_made_again(
    place: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was read in libraries and wheels."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    (library,) = project.cache.glob(LAYERS[0])

    def ask() -> object:
        return library_code(library), wheel_contents(ForgeProject(project.root).lock("mini"))

    answer = ask()
    (path,) = project.cache.glob(place)
    changed = flip(path, 0.5)
    assert ask() == answer
    assert path.read_bytes() != changed


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.pattern)
def test_changed_byte_is_mended_or_refused(
    kind: Kind, reference: Reference, tmp_path: Path
) -> None:
    names = [name for name in files(reference.project) if kind_of(name) == kind]
    for number, name in enumerate({names[0], names[-1]}):
        survive(reference, tmp_path / str(number), name, 0.5)


def mode(path: Path, _: Path) -> None:
    path.chmod(0o666)


def empty(path: Path, _: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"")


def link(path: Path, elsewhere: Path) -> None:
    """To a changed copy."""
    shutil.move(path, elsewhere)
    flip(elsewhere, 0.5)
    path.symlink_to(elsewhere)


def second_name(path: Path, elsewhere: Path) -> None:
    os.link(path, elsewhere)


def fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, _: Path) -> None:
    path.unlink()
    (path / "x").mkdir(parents=True)


def gone(path: Path, _: Path) -> None:
    path.unlink()


UNPACKED = (KINDS[2], KINDS[3])
DOWNLOADED = (KINDS[8], KINDS[9], KINDS[10])


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *(
            (kind, change)
            for kind in UNPACKED
            for change in (mode, empty, link, fifo, folder, gone)
        ),
        *((kind, change) for kind in DOWNLOADED for change in (link, fifo, folder)),
        (KINDS[11], fifo),  # git's
        (KINDS[13], folder),
        (KINDS[14], folder),  # digests of images
    ],
    ids=lambda item: getattr(item, "pattern", None),
)
def test_file_of_another_kind_is_mended_or_refused(
    kind: Kind, change: Callable[[Path, Path], None], reference: Reference, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What slim layers are made of, and downloads: neither waited for nor shipped."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    for number, name in enumerate(files(project)):
        if kind_of(name) == kind:
            change(project.cache / name, tmp_path / f"elsewhere-{number}")
    for other in kind.absent:
        shutil.rmtree(project.cache / other)
    for sku in SKUS:
        for _ in range(3):
            try:
                image, _ = build(project, sku)
                break
            except ForgeError as error:
                refusal = error
        else:
            raise refusal
        assert image.digest == reference.digests[sku]


@pytest.mark.parametrize("change", [link, second_name, fifo, folder])
def test_foreign_part_of_a_download_is_not_written_through(
    change: Callable[[Path, Path], None], reference: Reference, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nothing is written through it."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    shutil.rmtree(project.cache / "layers")
    (wheel,) = project.cache.glob("wheels/*/vllm-*.whl")
    part, elsewhere = wheel.with_name(f"{wheel.name}.part"), tmp_path / "elsewhere"
    part.write_bytes(wheel.read_bytes()[:100])
    wheel.unlink()
    change(part, elsewhere)
    before = elsewhere.read_bytes() if elsewhere.exists() else b""
    assert build(project, "alpha")[0].digest == reference.digests["alpha"]
    assert not before or elsewhere.read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "second name", "fifo", "folder"])
def test_lock_is_written_to_no_other_file(kind: str, cache: Path, tmp_path: Path) -> None:
    path, other = cache / "locks" / "x.lock", tmp_path / "other"
    path.parent.mkdir()
    other.write_text("precious")
    if kind == "link":
        path.symlink_to(other)
    elif kind == "second name":
        os.link(other, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with exclusive("x", wait=False):
        assert path.read_text() == str(os.getpid())
    assert other.read_text() == "precious"


@settings(
    max_examples=FLIPS, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_random_bits_of_the_cache(
    data: st.DataObject, reference: Reference, tmp_path: Path
) -> None:
    known = [name for name in files(reference.project) if not name.startswith(("uv/", "locks/"))]
    name = data.draw(st.sampled_from(known))
    survive(
        reference, tmp_path / "x", name, data.draw(st.floats(0, 1)), data.draw(st.integers(0, 7))
    )


@pytest.mark.parametrize("place", ["layers", "systems"])
def test_failed_check_forgets_what_it_looked_at(
    place: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unpacked copy that is damaged during the checks may turn them red, but not for ever."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    pattern = "layers/*/files/**/sixlike.py" if place == "layers" else "systems/*/root/bin/sh"
    (path,) = project.cache.glob(pattern)
    bytecode = project.cache / "bytecode" / "module.pyc"
    bytecode.touch()

    class Damaging(FastEngine):
        def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
            if run.argv[-1] == "user":
                flip(path, 0.5)
            return super().run_in_image(runner, run)

    red = Damaging()
    red.verdict = {"passed": False, "detail": "died", "seconds": 0.0}
    with pytest.raises(ForgeError, match="checks failed"):
        build(project, "alpha", red)
    assert not path.exists()
    assert not bytecode.exists()
    kept = [folder.name for folder in (project.cache / "layers").iterdir()]
    assert len(kept) >= 4, "what is whole stays"
    assert build(project, "alpha")[0].digest == reference.digests["alpha"]


@pytest.mark.parametrize("seal", ["kept", "", None])
def test_record_with_other_values_is_not_read(
    seal: str | None, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash of itself, another one, or none."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    for path in project.cache.glob("layers/*/layer.json"):
        record = json.loads(path.read_text())
        record["diff_id"] = "0" * 64
        record["seal"] = record["seal"] if seal == "kept" else seal
        path.write_text(json.dumps(record))
    for path in project.cache.glob("systems/*/blobs/sha256/*"):
        if b"/opt/venv/bin" in path.read_bytes():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes().replace(b"/opt/venv/bin", b"/opt/evil/bin"))
    assert build(project, "alpha")[0].digest == reference.digests["alpha"]


@pytest.mark.parametrize(
    "changes",
    [
        {"User": "0:0"}, {"Entrypoint": ["/cache/evil"]}, {"Env": ["LD_PRELOAD=/cache/evil.so"]},
        {"Cmd": ["--trust-remote-code"]}, {"Healthcheck": None}, {"diff_id": "0" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_system_that_was_written_again_is_not_taken(
    changes: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its hashes agree with each other, but not with docker/Dockerfile, or the layer's tar."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    (folder,) = project.cache.glob("systems/*")
    former = folder.rename(tmp_path / "former")
    image = read_image(former)
    layers, config = list(image.layers), image.config["config"]
    if "diff_id" in changes:
        layers[0] = replace(layers[0], blob=replace(layers[0].blob, **changes))
    else:
        config |= changes
    write_image(folder, layers=layers, config=config, epoch=0, name=SYSTEM_NAME)
    (former / "root").rename(folder / "root")
    assert build(project, "alpha")[0].digest == reference.digests["alpha"]


class OpenedError(Exception):
    """A command has come to where it uses unpacked files."""


def used(*_: object) -> Any:
    raise OpenedError


def inspect_by_vllm(project: ForgeProject) -> None:
    """As ``--resolve auto`` does, where nothing has to be written for that."""
    if "layers are not in the cache" in (why := ready(project, "mini")):
        raise CacheError(why)
    used()


COMMANDS: dict[str, Callable[[ForgeProject], object]] = {
    "patch prove": lambda project: prove(project, ["mini"], FastRunner()),
    "patch upstream": lambda project: compare_upstream(project, "mini", FastRunner()),
    "kernels select": lambda project: ask_line(project, "mini", FastRunner()),
    "kernels coverage": lambda project: line_coverage(project, "mini"),
    "dry load": lambda project: dry_load(project, "mini", {}, FastRunner()),
    "checkpoint inspect": inspect_by_vllm,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_layer_is_not_used(
    command: str, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else reads unpacked files, or runs them, heals them or refuses; each time."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    monkeypatch.setattr(environment, "kept_bytecode", used)
    monkeypatch.setattr(checks, "contents_of", used)
    monkeypatch.setattr(proving, "read_upstream", lambda *_: [])
    monkeypatch.setattr(images, "choose_engine", lambda *_: FastEngine())
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(environment, "which", str)
    run = functools.partial(COMMANDS[command], ForgeProject(project.root))
    opens_system = command not in {"kernels coverage", "checkpoint inspect"}
    for pattern in (*LAYERS, "systems/*/root/bin/sh") if opens_system else LAYERS:
        with pytest.raises(OpenedError):
            run()
        (path,) = project.cache.glob(pattern)
        changed = flip(path, 0.5)
        with pytest.raises((OpenedError, CacheError)):
            run()
        assert not path.exists() or path.read_bytes() != changed
        build(project, "alpha")


def test_engine_that_changes_the_configuration_is_refused(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = reference.project.copy(tmp_path, "layers", "rootfs", "wheels")
    use(project, monkeypatch)
    with pytest.raises(ImageCheckError, match="User of the system image is 0:0, the Dockerfile"):
        build(project, "alpha", FastEngine(User="0:0"))
    assert not list(project.cache.glob("systems/*"))


def test_layer_that_no_engine_could_unpack_is_not_pushed(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record has another ``diff_id``, with the right hash of itself."""
    project = copied(reference, tmp_path)
    use(project, monkeypatch)
    for path in project.cache.glob("layers/*/layer.json"):
        write_sealed(path, read_sealed(path) | {"diff_id": "0" * 64})
    image, _ = build(project, "alpha")
    verify(image)
    with pytest.raises(LayoutError, match=f"the image says {'0' * 64}"):
        verify(image, unpacked=True)


def test_killed_worker_is_an_error_with_a_remedy(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernel, for want of memory."""

    class Killed(ThreadPoolExecutor):
        def submit(self, *_: Any, **__: Any) -> Any:
            job: Future[None] = Future()
            job.set_exception(BrokenProcessPool("a process was terminated abruptly"))
            return job

    project = reference.project.copy(tmp_path, "systems")
    use(project, monkeypatch)
    monkeypatch.setattr(wheel_layers, "worker_pool", lambda *_: Killed())
    with pytest.raises(CommandFailedError, match="a process that writes layers was killed"):
        build(project, "alpha")
