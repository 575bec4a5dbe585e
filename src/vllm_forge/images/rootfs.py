"""The rootfs at the bottom of images: Debian's locked packages, unpacked by mmdebstrap.

From locked packages it is a function of the checkout. Where archives have lost one, current ones
give another rootfs, and so an image with another digest. A registry image can be the base instead.
"""

import hashlib
import os
import re
import shlex
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from vllm_forge.host import (
    READ_ONLY,
    Runner,
    atomic_path,
    cache_root,
    hash_of,
    link_or_copy,
    remove,
    which,
)
from vllm_forge.host.errors import FileAccessError
from vllm_forge.host.files import file_digest
from vllm_forge.images.errors import BaseImageError, LayoutError
from vllm_forge.images.layer import TAR, LayerBlob, read_blocks
from vllm_forge.images.layout import (
    ImageLayer,
    has_name,
    read_image,
    verify,
    write_image,
)
from vllm_forge.matrix import Base
from vllm_forge.project import Project
from vllm_forge.sources import debian
from vllm_forge.sources.lock import replace_lock

PINNED = re.compile(r"\w[\w.:/-]*@sha256:[0-9a-f]{64}")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BASE_NAME = "localhost/vllm-forge-base:rootfs"
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
    # mmdebstrap copies both with their modes from the host that builds. Engines mount others over
    # them. These are the bytes that receipts are of; empty files need the next digest.
    "&& rm -f etc/hostname etc/resolv.conf && echo vm > etc/hostname "
    "&& echo nameserver 10.255.255.53 > etc/resolv.conf && chmod 755 etc/hostname etc/resolv.conf "
    # Bytecode differs from run to run; nobody in a container needs to become another user.
    "&& find . -xdev -name __pycache__ -prune -exec rm -rf {} + "
    "&& find . -xdev -type f -perm /6000 -exec chmod ug-s {} +"
)
# Base of a build: locked packages, or current ones where those are gone; the same without
# a way out; the archive's current packages; else an image of a registry.
ROOTFS, LOCKED, CURRENT = "rootfs", "locked", "current"
# Of what mmdebstrap installed, the rows of the archive's signed lists.
LIST_HOOK = (
    """chroot "$1" dpkg-query -W -f '${Package} ${Version}\\n' > INSTALLED"""
    """ && chroot "$1" sh -c 'dpkg-query -W -f "\\${Package}=\\${Version} "'"""
    """ | xargs chroot "$1" apt-cache show --no-all-versions > INDEX"""
)


@dataclass(frozen=True, kw_only=True)
class BaseRef:
    """What FROM names: an OCI layout with the rootfs, or an image of a registry, by digest."""

    key: str  # hash of what it is a function of
    label: str  # says in the image what it is
    layout: Path | None = None
    lock: debian.BaseLock | None = None
    image: str | None = None


def rootfs_key(base: Base, lock: debian.BaseLock | None) -> str:
    """Hash of everything that a rootfs is a function of, but the mirror's state without a lock."""
    packages = sorted(base.packages)
    fields = [base.suite, packages, base.source_date_epoch, EXCLUDES, SCRUB, GZIP_LEVEL]
    if lock is not None:
        fields.append([package.sha256 for package in lock.packages])
    return hash_of(fields)


def base_of(root: Path, base: Base, choice: str) -> BaseRef:
    """Our own rootfs (ROOTFS, LOCKED, CURRENT), or an image of a registry.

    Raises BaseImageError: the image has no digest, and a tag may be another one tomorrow; or
    LOCKED, and matrix.toml names no lock. LockFileError: the lock cannot be read.
    """
    if choice in {ROOTFS, LOCKED, CURRENT}:
        lock = None if choice == CURRENT else debian.read_base_lock(root, base)
        if choice == LOCKED and lock is None:
            what = "base.lock of matrix.toml names no lock of Debian packages"
            raise BaseImageError(what, remedy="name a file there, then run: nox -s lock -- --base")
        key = rootfs_key(base, lock)
        return BaseRef(
            key=key,
            label=CURRENT if lock is None else f"sha256:{lock.digest}",
            lock=lock,
            layout=cache_root() / "rootfs" / key,
        )
    if not PINNED.fullmatch(choice):
        remedy = "give it as NAME@sha256:<64 hex>; `skopeo inspect docker://NAME` prints it"
        raise BaseImageError(f"{choice!r} is not pinned by digest", remedy=remedy)
    return BaseRef(key=hashlib.sha256(choice.encode()).hexdigest(), label=choice, image=choice)


def fetch_packages(base: Base, lock: debian.BaseLock) -> None:
    """Download locked packages from this host's mirrors, then from the row's snapshots."""
    mirrors = dict.fromkeys(line.split()[1] for line in host_sources(base.suite).splitlines())
    debian.fetch_debs(lock, [*mirrors, *(url.format(date=lock.date) for url in base.snapshots)])


def bootstrap_argv(base: Base, hook: str, target: Path) -> list[str]:
    """Command with the packages of matrix.toml; their sources may follow."""
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--skip=output/dev"]
    if KEYRING.exists():
        argv.append(f"--keyring={KEYRING}")
    argv += [f"--dpkgopt={rule}" for rule in EXCLUDES]
    argv += [f"--include={','.join(base.packages)}", f"--customize-hook={hook}"]
    return [*argv, base.suite, str(target)]


def make_rootfs(runner: Runner, base: Base, ref: BaseRef, work: Path) -> Path:
    """Make the rootfs with mmdebstrap; return a layout with it that is not compressed.

    Raises CommandFailedError: e.g. no mirror answers; DistributionNotFoundError: a package is gone;
    FileAccessError: it cannot run programs where it works.
    """
    tar, plain, lock = work / "rootfs.tar", work / "rootfs", ref.lock
    scratch = os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - where mmdebstrap works
    if os.statvfs(scratch).f_flag & os.ST_NOEXEC:
        what = "mmdebstrap runs programs there, and it is mounted noexec"
        raise FileAccessError(what, where=scratch, remedy="set TMPDIR to a folder of another disk")
    argv = bootstrap_argv(base, SCRUB, tar)
    if lock is None:
        argv += write_host_sources(runner, base.suite, work / "sources.list")
    else:
        archive = work / "debs"
        runner.act(
            f"fetch {len(lock.packages)} packages of {base.lock}, write an archive of them to "
            f"{archive}",
            lambda: _write_archive(base, lock, archive),
        )
        # apt compares each package with the archive's list, which is made of the lock.
        argv.append(f"deb [trusted=yes] copy://{quote(str(archive))} ./")
    environment = {
        "SOURCE_DATE_EPOCH": str(base.source_date_epoch),
        "DPKG_FORCE": "unsafe-io",  # no fsync for each file: half of it is waiting otherwise
        # It starts a Python of the PATH for each of 59 packages; a user's may be a slow wrapper.
        "PATH": f"/usr/sbin:/usr/bin:/sbin:/bin:{os.environ.get('PATH', os.defpath)}",
    }
    runner.run(argv, env=environment)
    runner.act(
        f"write the rootfs as an OCI layout to {plain}",
        lambda: _write_plain(tar, plain, base.source_date_epoch),
    )
    return plain


def _write_archive(base: Base, lock: debian.BaseLock, folder: Path) -> None:
    """An apt archive of one folder, of exactly the packages of a lock."""
    fetch_packages(base, lock)
    remove(folder)
    folder.mkdir(parents=True)
    stanzas = []
    for package, file in zip(lock.packages, debian.verified_debs(lock), strict=True):
        link_or_copy(file, folder / file.name)
        rows = f"Filename: ./{file.name}\nSize: {package.size}\nSHA256: {package.sha256}\n"
        stanzas.append(f"{debian.control(file)}{rows}")
    packages = "\n".join(stanzas)
    (folder / "Packages").write_text(packages)
    digest = hashlib.sha256(packages.encode()).hexdigest()
    date = datetime.fromtimestamp(base.source_date_epoch, UTC)
    (folder / "Release").write_text(
        f"Suite: {base.suite}\nCodename: {base.suite}\n"
        f"Date: {date:%a, %d %b %Y %H:%M:%S} UTC\n"
        f"SHA256:\n {digest} {len(packages.encode())} Packages\n"
    )


def lock_base(project: Project) -> debian.BaseLock:
    """Install the packages of matrix.toml once, and lock what that installed."""
    base = project.matrix.base
    if base.lock is None:
        remedy = 'add e.g. lock = "docker/locks/debian-trixie.txt" to [base]'
        raise BaseImageError("base.lock of matrix.toml names no file", remedy=remedy)
    date = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    with TemporaryDirectory() as folder:
        index, installed = Path(folder, "index"), Path(folder, "names")
        hook = LIST_HOOK.replace("INSTALLED", shlex.quote(str(installed)))
        hook = hook.replace("INDEX", shlex.quote(str(index)))
        argv, runner = bootstrap_argv(base, hook, Path("/dev/null")), Runner()
        argv += write_host_sources(runner, base.suite, Path(folder, "sources"))
        runner.run(argv)
        rows = [line.split() for line in installed.read_text().splitlines()]
        packages = debian.parse_index(index.read_text(), {(name, v) for name, v in rows})
    lock = replace_lock(
        project.root, base.lock,
        write=lambda path: debian.write_base_lock(path, base, date, packages),
        read=lambda place: debian.read_base_lock(place, base),
    )  # fmt: skip
    assert lock is not None  # noqa: S101 - just written
    return lock


def is_whole(layout: Path) -> bool:
    """Whether a kept rootfs is there, with the bytes that were written."""
    try:
        image = read_image(layout)
        verify(image)
    except LayoutError:
        return False
    return has_name(image, BASE_NAME)


def write_host_sources(runner: Runner, suite: str, path: Path) -> list[str]:
    """Write this host's Debian mirrors for ``suite`` to ``path``; return mmdebstrap's argument.

    Where the host has none, the list is empty, and docker/Dockerfile finds an empty file.
    """
    text = host_sources(suite)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    runner.act(f"write the host's Debian mirrors, for {suite}, to {path}", write)
    return [str(path)] if text else []


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


def _write_plain(tar: Path, plain: Path, epoch: int) -> None:
    digest, size = file_digest(tar), tar.stat().st_size
    blob = LayerBlob(path=tar, digest=digest, diff_id=digest, size=size, media_type=TAR)
    _write_layout(blob, plain, epoch)


def keep_rootfs(plain: Path, layout: Path, epoch: int) -> None:
    """Write the layout ``layout``, compressed, of that of ``make_rootfs``."""
    target = plain.with_suffix(".tar.gz")
    _write_layout(compress(read_image(plain).layers[0].blob.path, target), layout, epoch)


def _write_layout(blob: LayerBlob, layout: Path, epoch: int) -> None:
    """A layout with one layer, whose file becomes part of it."""
    write_image(
        layout,
        layers=[ImageLayer(blob=blob, name="rootfs")],
        config={"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]},
        epoch=epoch,
        name=BASE_NAME,
    )
    blob.path.unlink()


def compress(tar: Path, target: Path) -> LayerBlob:
    """Compress a plain tar into a layer blob, without a name or a time in it.

    The blob is a new, read-only file: an existing ``target`` may be linked into published images.
    """
    packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 31)
    digest, diff_id = hashlib.sha256(), hashlib.sha256()

    def packed() -> Iterator[bytes]:
        for block in read_blocks(tar):
            diff_id.update(block)
            yield packer.compress(block)
        yield packer.flush()

    with atomic_path(target) as aside:
        with aside.open("xb") as blob:
            for piece in packed():
                digest.update(piece)
                blob.write(piece)
        aside.chmod(READ_ONLY)
    return LayerBlob(
        path=target,
        digest=digest.hexdigest(),
        diff_id=diff_id.hexdigest(),
        size=target.stat().st_size,
    )
