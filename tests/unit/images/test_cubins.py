"""Images that carry FlashInfer's kernel archives, built by an engine that only pretends."""

from __future__ import annotations

import tarfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.fast_build import fast_build, need_kernels, use
from tests.support.flashinfer import FILES, HEADER, PATH, TOP, flashinfer, serve_archive
from tests.support.project import Project, make_project
from vllm_forge.images import build, checks
from vllm_forge.images.cubins import PLACE
from vllm_forge.images.layer import plain_tar
from vllm_forge.images.layout import Image, read_image
from vllm_forge.images.plan import ImagePlan
from vllm_forge.kernels.errors import ContractError
from vllm_forge.sources.cubins import MIRROR
from vllm_forge.sources.errors import DistributionNotFoundError, HashMismatchError, WheelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.xdist_group("cubins")  # one worker builds what its fixtures have

NAME = "vllm-0.1.0-alpha"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Image]]:
    """A project whose FlashInfer pins an archive, with the image of alpha that downloads it."""
    project = make_project(tmp_path_factory.mktemp("mini"), flashinfer=flashinfer())
    with pytest.MonkeyPatch.context() as patch:
        use(project, patch)
        need_kernels(project, patch)
        image, _ = fast_build(project, "alpha")
        assert [row.path for row in project.index.requests if "batched" in row.path] == []
    yield project, image
    project.index.close()


@pytest.fixture
def project(
    reference: tuple[Project, Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Project:
    """A copy of the project with all of its cache but the archives; its server has them."""
    original = reference[0]
    copy = original.copy(tmp_path, *(path.name for path in original.cache.iterdir()))
    use(copy, monkeypatch)
    need_kernels(copy, monkeypatch)
    serve_archive(copy.index)
    return copy


def labels(image: Image) -> dict[str, str]:
    found: dict[str, str] = image.config["config"]["Labels"]
    return {key: value for key, value in found.items() if key.endswith((".kernels", ".network"))}


def archive_entries(image: Image) -> dict[str, tarfile.TarInfo]:
    (blob,) = [row.blob for row in image.layers if row.name == "kernel archives"]
    with plain_tar(blob) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        return {info.name: info for info in tar}


def test_image_without_archives_says_that_it_needs_network(
    reference: tuple[Project, Image],
) -> None:
    project, image = reference
    assert labels(image) == {"io.vllm-forge.network": "needs network at first start: generated"}
    assert "kernels" not in project.record(NAME)["stack"]
    assert not [row for row in image.config["config"]["Env"] if "CUBIN" in row]


def test_archives_are_a_layer_where_flashinfer_looks(
    project: Project, reference: tuple[Project, Image]
) -> None:
    image, fresh = fast_build(project, "alpha", kernels=True)
    assert fresh
    assert labels(image) == {"io.vllm-forge.kernels": "TRTLLM_GEN_BMM"}
    assert f"FLASHINFER_CUBIN_DIR=/{PLACE}" in image.config["config"]["Env"]
    plain = [row.name for row in reference[1].layers]
    assert [row.name for row in image.layers] == [*plain[:-1], "kernel archives", plain[-1]]
    entries = archive_entries(image)
    files = {path: info for path, info in entries.items() if info.isreg()}
    assert files.keys() == {f"{PLACE}/{PATH}/{path}" for path in ("checksums.txt", *FILES)}
    assert {(info.mode, info.uid) for info in files.values()} == {(0o644, 0)}
    record = project.record(NAME)
    assert record["stack"]["kernels"].keys() == {"TRTLLM_GEN_BMM"}
    (copy,) = project.cache.glob(f"layers/*/files/{PLACE}/{PATH}/{HEADER}")
    assert copy.read_bytes() == FILES[HEADER]


def test_what_flashinfer_writes_there_goes_to_the_volume(project: Project) -> None:
    """Its compilers' links, and archives of other models; not over what is carried."""
    image, _ = fast_build(project, "alpha", kernels=True)
    links = {path: info.linkname for path, info in archive_entries(image).items() if info.issym()}
    assert links == {f"{PLACE}/flashinfer": "/cache", f"{PLACE}/{'5' * 40}": "/cache"}
    assert f"{PLACE}/{TOP}" in archive_entries(image)


def test_second_build_asks_no_server(project: Project) -> None:
    image, _ = fast_build(project, "alpha", kernels=True)
    project.index.requests.clear()
    assert fast_build(project, "alpha", kernels=True) == (read_image(image.path), False)
    beta, _ = fast_build(project, "beta", kernels=True)
    assert archive_entries(beta).keys() == archive_entries(image).keys()
    assert project.index.requests == []


def test_both_variants_are_rebuilt_to_their_digests(
    project: Project, reference: tuple[Project, Image]
) -> None:
    carried, _ = fast_build(project, "alpha", kernels=True)
    plain, fresh = fast_build(project, "alpha")
    assert (plain.digest, fresh) == (reference[1].digest, True)
    assert fast_build(project, "alpha", kernels=True)[0].digest == carried.digest


def test_cell_that_needs_no_archive_is_the_same_image(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImagePlan, "downloads", {})
    plain, _ = fast_build(project, "alpha")
    assert labels(plain) == {}
    assert fast_build(project, "alpha", kernels=True)[0].digest == plain.digest
    assert not (project.cache / "cubins").exists()


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_build_without_whole_archives_is_refused(fault: str, project: Project) -> None:
    served = serve_archive(project.index)["Bmm_a_sm100f.cubin"]
    if fault == "missing":
        served.status = 404
    else:
        served.content += b"?"
    with pytest.raises((DistributionNotFoundError, HashMismatchError), match="Bmm_a_sm100f"):
        fast_build(project, "alpha", kernels=True)
    assert not (project.root / "dist" / NAME).exists()
    serve_archive(project.index)
    fast_build(project, "alpha", kernels=True)


def test_family_without_a_pinned_archive_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDNN_SDPA has a path, and no pin."""
    glob = "flashinfer_cubin/cubins/*/fmha/cudnn/*.cubin"
    monkeypatch.setattr(ImagePlan, "downloads", {"attention": glob})
    with pytest.raises(WheelError, match="pins no archive with the files of attention"):
        fast_build(project, "alpha", kernels=True)


def test_dry_run_says_that_archives_are_fetched(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_forge.cli import main

    monkeypatch.setenv(MIRROR, "http://127.0.0.1:1/")
    argv = ["build", "alpha", "--dry-run", "--kernels", "--engine=buildah"]
    assert main(argv) == 0
    assert "fetch FlashInfer's kernel archives: generated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recorded", "carries", "actual"),
    [({}, False, {"generated"}), ({"generated": ""}, False, set()), ({"x": ""}, True, {"y"})],
)
def test_record_that_the_contract_contradicts_is_refused(
    recorded: dict[str, str], carries: bool, actual: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an image could say that it needs no network, and need it."""
    contract = SimpleNamespace(check=lambda: None, downloads=actual)
    monkeypatch.setattr(checks, "contents_of", lambda *_: None)
    monkeypatch.setattr(checks, "image_contract", lambda *_: contract)
    monkeypatch.setattr(build, "require_described", lambda *_: None)
    cell = SimpleNamespace(line_name="mini", line=SimpleNamespace(python="3.13"))
    plan: Any = SimpleNamespace(carries=carries, downloads=recorded, cell=cell)
    candidate: Any = SimpleNamespace(system=SimpleNamespace(config={}), image=None, folders=())
    selection: Any = object()
    with pytest.raises(ContractError, match="other kernels than recorded") as refused:
        build.check_outside(plan, selection, candidate)
    assert refused.value.where == "records/coverage/mini.json"
