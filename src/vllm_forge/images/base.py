"""The base of an image: a Debian rootfs made here, or a registry image pinned by digest."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vllm_forge.host import READ_ONLY, Runner, atomic_path, cache_root, which
from vllm_forge.images.errors import BaseImageError, LayoutError
from vllm_forge.images.layer import LayerBlob
from vllm_forge.images.layout import (
    ImageLayer,
    file_digest,
    has_name,
    read_image,
    verify,
    write_image,
)
from vllm_forge.matrix import Base

PINNED = re.compile(r"\w[\w.:/-]*@sha256:[0-9a-f]{64}")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CHUNK = 1 << 20
NAME = "localhost/vllm-forge-base:rootfs"
GZIP_LEVEL = 1  # 6 makes the rootfs 10 % smaller, the image 0.4 %, and takes three times as long
# Documentation and translations: 50 MB that nobody reads in a container; licenses stay.
EXCLUDES = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)
SCRUB = (
    'cd "$1" && rm -rf etc/apt/sources.list etc/apt/sources.list.d var/cache/ldconfig/aux-cache '
    "var/cache/apt/*.bin var/log/apt var/log/dpkg.log var/log/alternatives.log "
    "var/log/bootstrap.log && : > etc/machine-id "
    # Bytecode differs from run to run; nobody in a container needs to become another user.
    "&& find . -xdev -name __pycache__ -prune -exec rm -rf {} + "
    "&& find . -xdev -type f -perm /6000 -exec chmod ug-s {} +"
)


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """What FROM names: an OCI layout with the rootfs, or an image of a registry, by digest.

    ``key`` is the hash of what it is a function of.
    """

    key: str
    layout: Path | None = None
    image: str | None = None


def rootfs_key(base: Base) -> str:
    """Hash of everything that a rootfs is a function of, but the mirror's state."""
    packages = sorted(base.packages)
    fields = [base.suite, packages, base.source_date_epoch, EXCLUDES, SCRUB, GZIP_LEVEL]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()


def pinned_image(reference: str) -> BaseRef:
    """A registry image as base.

    Raises BaseImageError: the reference has no digest; a tag may be another image tomorrow.
    """
    if not PINNED.fullmatch(reference):
        raise BaseImageError(
            f"{reference!r} is not pinned by digest",
            remedy="give it as NAME@sha256:<64 hex>; `skopeo inspect docker://NAME` prints it",
        )
    return BaseRef(key=hashlib.sha256(reference.encode()).hexdigest(), image=reference)


def make_rootfs(runner: Runner, base: Base, work: Path, *, refresh: bool = False) -> BaseRef:
    """Make the rootfs with mmdebstrap, or take the one in the cache.

    ``refresh`` makes it again, to get the distribution's updates.

    Raises CommandFailedError: mmdebstrap failed, e.g. no mirror answers.
    """
    key = rootfs_key(base)
    layout = cache_root() / "rootfs" / key
    ref = BaseRef(key=key, layout=layout)
    if not refresh and _whole(layout):
        return ref
    tar = work / "rootfs.tar"
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=output/dev"]
    if KEYRING.exists():
        argv.append(f"--keyring={KEYRING}")
    argv += [f"--dpkgopt={rule}" for rule in EXCLUDES]
    argv += [f"--include={','.join(base.packages)}", f"--customize-hook={SCRUB}"]
    argv += [base.suite, str(tar)]
    sources = work / "sources.list"
    if write_host_sources(runner, base.suite, sources):
        argv.append(str(sources))
    runner.run(argv, env={"SOURCE_DATE_EPOCH": str(base.source_date_epoch)})
    runner.act(
        f"write the rootfs as an OCI layout to {layout}",
        lambda: _write_layout(tar, layout, base.source_date_epoch),
    )
    return ref


def _whole(layout: Path) -> bool:
    """Whether a kept rootfs is there, with the bytes that were written."""
    try:
        image = read_image(layout)
        verify(image)
    except LayoutError:
        return False
    return has_name(image, NAME)


def write_host_sources(runner: Runner, suite: str, path: Path) -> bool:
    """Write this host's Debian mirrors for ``suite`` to ``path``; False where it has none.

    docker/Dockerfile then finds an empty file.
    """
    text = host_sources(suite)
    runner.act(
        f"write the host's Debian mirrors, for {suite}, to {path}", lambda: _write(path, text)
    )
    return bool(text)


def host_sources(suite: str) -> str:
    """One-line apt sources of this host for another suite; empty where it is not Debian.

    Without them mmdebstrap takes its own default mirrors.
    """
    if which("apt-get") is None or not KEYRING.exists():
        return ""
    rows = subprocess.run(
        [
            "apt-get", "indextargets", "--format", "$(ORIGIN)\t$(REPO_URI)\t$(CODENAME)",
            "Created-By: Packages",
        ],
        capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    lines = set()
    for row in rows:
        origin, url, codename = row.split("\t")
        if origin.startswith("Debian") and not codename.endswith("-backports"):
            host_suite, _, part = codename.partition("-")
            if host_suite and part in {"", "updates", "security"}:
                lines.add(f"deb {url} {suite}{'-' + part if part else ''} main\n")
    return "".join(sorted(lines))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_layout(tar: Path, layout: Path, epoch: int) -> None:
    blob = compress(tar, tar.with_suffix(".tar.gz"))
    write_image(
        layout,
        layers=[ImageLayer(blob=blob, created_by="vllm-forge: rootfs")],
        config={"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        epoch=epoch,
        name=NAME,
    )
    tar.unlink()


def compress(tar: Path, target: Path) -> LayerBlob:
    """Compress a plain tar into a layer blob, without a name or a time in it.

    The blob is a new, read-only file: an existing ``target`` may be linked into published images.
    """
    plain = file_digest(tar)
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    blob = hashlib.sha256()
    with atomic_path(target) as aside:
        with tar.open("rb") as source, aside.open("xb") as out:
            blocks = iter(lambda: source.read(CHUNK), b"")
            for piece in chain(map(packer.compress, blocks), (packer.flush() for _ in range(1))):
                blob.update(piece)
                out.write(piece)
        aside.chmod(READ_ONLY)
    return LayerBlob(
        path=target,
        digest=blob.hexdigest(),
        diff_id=plain,
        size=target.stat().st_size,
    )
