"""An image that carries FlashInfer's kernel archives, by a real engine: what finds them inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.fast_build import need_kernels
from tests.support.flashinfer import FILES, flashinfer, serve_archive
from tests.support.project import Project, make_project
from vllm_forge.host import Runner
from vllm_forge.images import BuildOptions, build_image, choose_engine, cubins, resolve
from vllm_forge.images.errors import ImageCheckError
from vllm_forge.images.layer import ZstdLayerWriter
from vllm_forge.project import Project as ForgeProject

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def mini(built: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = make_project(tmp_path_factory.mktemp("mini"), flashinfer=flashinfer(), base=built)
    serve_archive(made.index)
    yield made
    made.index.close()


def build(mini: Project, monkeypatch: pytest.MonkeyPatch) -> str:
    """Build alpha with the archives; what the check inside says of them."""
    for name in ("VLLM_FORGE_CACHE", "VLLM_FORGE_ROOT", "UV_DEFAULT_INDEX", "no_proxy"):
        monkeypatch.setenv(name, mini.environment[name])
    need_kernels(mini, monkeypatch)
    project = ForgeProject(mini.root)
    options = BuildOptions(output=mini.root / "dist", kernels=True)
    build_image(resolve(project, project.cell("alpha"), options, choose_engine(None)), Runner())
    detail: str = mini.record("vllm-0.1.0-alpha")["checks"]["kernels"]["detail"]
    return detail


def test_flashinfer_finds_its_archives_without_network(
    mini: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the image's user, on a read-only root; its compilers' link is made on the volume."""
    assert build(mini, monkeypatch) == f"{len(FILES)} files; gen_fused_moe_module"


def test_archives_at_another_place_are_red(mini: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "ENVIRONMENT", {"FLASHINFER_CUBIN_DIR": "/cache/cubins"})
    monkeypatch.setattr(cubins, "FORMAT", 2)
    with pytest.raises(ImageCheckError, match="kernels: AssertionError: FlashInfer downloads"):
        build(mini, monkeypatch)


def test_folder_that_flashinfer_cannot_write_is_red(
    mini: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the links to the volume its compilers do not get the headers."""
    monkeypatch.setattr(ZstdLayerWriter, "symlink", lambda *_: None)
    monkeypatch.setattr(cubins, "FORMAT", 3)
    with pytest.raises(ImageCheckError, match=r"kernels: (Permission|OS)Error"):
        build(mini, monkeypatch)
