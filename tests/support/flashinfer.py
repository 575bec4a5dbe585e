"""A small FlashInfer: archives with hashes of their own, and the wheel that pins them.

Its modules have the form and the interfaces of 0.6.14 and 0.7.2 that a build reads and an image's
check calls; what they do is as little as that needs.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from tests.support.index_server import Served

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.index_server import IndexServer

TOP = "4" * 40
PATH = f"{TOP}/batched_gemm-1-2"
GLOB = "flashinfer_cubin/cubins/*/batched_gemm-*/Bmm_*.cubin"
HEADER = "include/export/Enums.h"
FILES = {
    "Bmm_a_sm100f.cubin": b"\x7fELF kernel a" * 50,
    "Bmm_b_sm100f.cubin": b"\x7fELF kernel b" * 70,
    "include/flashinferMetaInfo.h": b"// list of kernels\n",
    HEADER: b"enum class Enums {};\n",
}
ARTIFACTS = """\
@dataclass(frozen=True)
class ArtifactPath:
    TRTLLM_GEN_FMHA: str = "{other}/fmha/trtllm-gen/"
    TRTLLM_GEN_BMM: str = (
        "{path}/"
    )
    CUDNN_SDPA: str = "{other}/fmha/cudnn/"
    ARCHS: tuple[str, ...] = ("sm_100a",)


class CheckSumHash:
    TRTLLM_GEN_FMHA: str = (
        "{other_pin}"
    )
    TRTLLM_GEN_BMM: str = "{pin}"
    map_checksums: dict[str, str] = {{}}
"""
LOADER = """\
import hashlib, os, pathlib

FLASHINFER_CUBINS_REPOSITORY = os.environ.get(
    "FLASHINFER_CUBINS_REPOSITORY",
    "https://kernels.example/archives/",
)
FLASHINFER_CUBIN_DIR = pathlib.Path(os.environ.get("FLASHINFER_CUBIN_DIR", "/cache/cubins"))


def download_file(source, target):
    return False


def get_artifact(name, sha256):
    path = FLASHINFER_CUBIN_DIR / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() == sha256:
        return data
    download_file(f"{FLASHINFER_CUBINS_REPOSITORY}{name}", str(path))
    return b""
"""
# As FlashInfer's: a link for the compiler beside the archives, then the archive's header by it.
MODULE = """\
from .artifacts_of import ArtifactPath
from .cubin_loader import FLASHINFER_CUBIN_DIR


def gen_fused_moe_module():
    link = FLASHINFER_CUBIN_DIR / "flashinfer" / "trtllm" / "export"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.with_name("export.lock").touch()
    link.symlink_to(FLASHINFER_CUBIN_DIR / ArtifactPath.TRTLLM_GEN_BMM / "include/export")
    return (link / "Enums.h").read_text()
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def checksums(files: Mapping[str, bytes] = FILES) -> bytes:
    """The list of an archive, as FlashInfer's server has it."""
    return "".join(f"{sha256(content)}  {path}\n" for path, content in files.items()).encode()


def flashinfer(pinned: bytes | None = None) -> dict[str, bytes]:
    """Files of a wheel that pins a list."""
    pin = sha256(checksums() if pinned is None else pinned)
    artifacts = ARTIFACTS.format(path=PATH, pin=pin, other="5" * 40, other_pin="6" * 64)
    files = {
        "__init__.py": "",
        "artifacts.py": "from dataclasses import dataclass\n\n\n" + artifacts,
        "jit/__init__.py": "from .fused_moe import gen_fused_moe_module\n",
        "jit/artifacts_of.py": "from ..artifacts import ArtifactPath\n",
        "jit/core.py": "class Context:\n    pass\n\n\ncurrent_compilation_context = Context()\n",
        "jit/cubin_loader.py": LOADER,
        "jit/fused_moe.py": MODULE,
    }
    return {f"flashinfer/{path}": text.encode() for path, text in files.items()}


def serve_archive(
    index: IndexServer, files: Mapping[str, bytes] = FILES, listed: bytes | None = None
) -> dict[str, Served]:
    """Serve an archive below ``INDEX/files``; the files by path, to let them fail."""
    content = {"checksums.txt": checksums(files) if listed is None else listed, **files}
    return {
        path: index.add("cubins", f"{PATH}/{path}", Served(content=data))
        for path, data in content.items()
    }
