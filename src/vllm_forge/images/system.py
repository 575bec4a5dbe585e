"""The system image: a base, and docker/Dockerfile on it, built by an engine, kept by its inputs.

The base is a Debian rootfs made here, or a registry image pinned by digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from vllm_forge.host import READ_ONLY, Runner, atomic_path, cache_root, remove, which
from vllm_forge.host.errors import CacheError
from vllm_forge.images.engines import SystemOutput
from vllm_forge.images.errors import BaseImageError, ImageCheckError, LayoutError
from vllm_forge.images.layer import LayerBlob, plain_digest
from vllm_forge.images.layout import (
    ImageLayer,
    file_digest,
    has_name,
    read_image,
    verify,
    write_image,
)
from vllm_forge.images.prewarm import tree_digest
from vllm_forge.matrix import Base

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

PINNED = re.compile(r"\w[\w.:/-]*@sha256:[0-9a-f]{64}")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CHUNK = 1 << 20
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
    # Bytecode differs from run to run; nobody in a container needs to become another user.
    "&& find . -xdev -name __pycache__ -prune -exec rm -rf {} + "
    "&& find . -xdev -type f -perm /6000 -exec chmod ug-s {} +"
)
# Raise when the kept result changes for equal inputs.
SYSTEM_FORMAT = 3
# Not kept: docker's defaults of a container that never ran, and a host name that it made up.
CONFIG_KEYS = frozenset(
    {"Env", "User", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "Healthcheck"}
)
NANOSECONDS = {"s": 10**9, "m": 60 * 10**9}  # engines count times in them
SYSTEM_NAME = "localhost/vllm-forge-system:kept"
NOTES = "io.vllm-forge.system"  # a label; not of images
CA_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))


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


def base_of(base: Base, image: str | None) -> BaseRef:
    """Our own rootfs, or an image of a registry.

    Raises BaseImageError: the image has no digest; a tag may be another one tomorrow.
    """
    if image is None:
        key = rootfs_key(base)
        return BaseRef(key=key, layout=cache_root() / "rootfs" / key)
    if not PINNED.fullmatch(image):
        raise BaseImageError(
            f"{image!r} is not pinned by digest",
            remedy="give it as NAME@sha256:<64 hex>; `skopeo inspect docker://NAME` prints it",
        )
    return BaseRef(key=hashlib.sha256(image.encode()).hexdigest(), image=image)


def make_rootfs(runner: Runner, base: Base, work: Path, layout: Path) -> None:
    """Make the rootfs with mmdebstrap. Raises CommandFailedError, e.g. if no mirror answers."""
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


def _whole(layout: Path) -> bool:
    """Whether a kept rootfs is there, with the bytes that were written."""
    try:
        image = read_image(layout)
        verify(image)
    except LayoutError:
        return False
    return has_name(image, BASE_NAME)


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
        name=BASE_NAME,
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


@dataclass(frozen=True, kw_only=True)
class System:
    """A finished system image: layers (lowest first), config, and Debian's package -> version.

    ``root`` has its files unpacked, with that ``tree_digest``; None when the engine runs images
    itself.
    """

    layers: tuple[ImageLayer, ...]
    config: dict[str, Any]
    debian: dict[str, str]
    root: Path | None
    root_digest: str

    @property
    def digest(self) -> str:
        """SHA-256 over the layers and the config, hex."""
        parts = [layer.blob.digest for layer in self.layers]
        return hashlib.sha256(json.dumps([parts, self.config], sort_keys=True).encode()).hexdigest()


def system_folder(key: str) -> Path:
    """Where the system image of that key is kept."""
    return cache_root() / "systems" / key


def build_system(plan: ImagePlan, runner: Runner) -> str:
    """Build rootfs and docker/Dockerfile by the engine, unless that is kept; return its key.

    One process at a time: engines keep one store, and lines share the system image.
    """
    refresh, key, work = plan.options.refresh_base, plan.system_key, plan.work / "system"
    bundle = next((path for path in CA_BUNDLES if path.exists()), None)
    # What of this host the Dockerfile's RUN may read.
    secrets = {} if bundle is None else {"ca": bundle}
    with runner.exclusive("system"):
        if not refresh and _is_kept(plan):
            return key
        if (layout := plan.base.layout) is not None:
            if refresh or not _whole(layout):
                make_rootfs(runner, plan.cell.base, plan.work, layout)
        else:
            # A registry image may lack packages: apt in it uses this host's mirrors.
            secrets["apt-sources"] = plan.work / "sources.list"
            write_host_sources(runner, plan.cell.base.suite, secrets["apt-sources"])
        runner.act(f"clear {work}", lambda: _clear(work))
        plan.engine.build_system(runner, plan, secrets, work)
        runner.act(
            f"keep the system image in {system_folder(key)}",
            lambda: _keep(plan, plan.engine.system_output(work)),
        )
    return key


def _is_kept(plan: ImagePlan) -> bool:
    """Whether the system image is there; one that is damaged or was changed is made again."""
    try:
        system = load_system(plan.system_key)
        require_described(plan, system.config)
    except (CacheError, ImageCheckError):
        return False
    return all(plain_digest(layer.blob) == layer.blob.diff_id for layer in system.layers)


def require_described(plan: ImagePlan, config: Mapping[str, Any]) -> None:
    """Compare a system's configuration with docker/Dockerfile. Raises ImageCheckError.

    A registry's base may bring variables, volumes and ports of its own.
    """
    described = dockerfile_config(plan.dockerfile.read_text(), plan.build_arguments())
    for key in sorted(described.keys() | config.keys()):
        actual, expected = config.get(key), described.get(key)
        if key in {"Env", "Volumes", "ExposedPorts"}:
            actual, expected = sorted(actual or ()), sorted(expected or ())
            if plan.base.layout is None:
                actual = [row for row in actual if row in expected]
        if actual != expected:
            raise ImageCheckError(
                f"{key} of the system image is {actual}, the Dockerfile says {expected}",
                where=str(plan.dockerfile),
                remedy="build again with --refresh-base; if it stays, the engine changes it",
            )


def dockerfile_config(text: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """The ``config`` object that our Dockerfile describes, in the form that engines write."""
    config: dict[str, Any] = {}
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    for row in text.splitlines():
        word, _, rest = row.strip().partition(" ")
        match word:
            case "ENV":
                config["Env"] = Template(rest).substitute(arguments).split()
            case "USER":
                config["User"] = rest
            case "WORKDIR":
                config["WorkingDir"] = rest
            case "VOLUME":
                config["Volumes"] = {rest: {}}
            case "EXPOSE":
                config["ExposedPorts"] = {f"{rest}/tcp": {}}
            case "ENTRYPOINT":
                config["Entrypoint"] = json.loads(rest)
            case "HEALTHCHECK":
                options, _, command = rest.partition(" CMD ")
                health = dict(option[2:].split("=") for option in options.split())
                config["Healthcheck"] = {
                    "Test": ["CMD", *json.loads(command)], "Retries": int(health.pop("retries"))
                } | {
                    name.title().replace("-", ""): int(time[:-1]) * NANOSECONDS[time[-1]]
                    for name, time in health.items()
                }  # fmt: skip
            case "FROM" | "ARG" | "RUN" | "":
                pass
            case _:
                raise BaseImageError(
                    f"docker/Dockerfile has {word}, whose effect on the image is not compared",
                    remedy="compare it in images/system.py, dockerfile_config",
                )
    return config


def load_system(key: str) -> System:
    """Read a kept system image. Raises CacheError: it is missing or damaged."""
    folder = system_folder(key)
    try:
        image = read_image(folder)
        config = dict(image.config["config"])
        notes = json.loads(config.pop("Labels")[NOTES])
        if not has_name(image, SYSTEM_NAME):
            raise ValueError("the files around its blobs were changed")  # noqa: TRY301
    except (LayoutError, LookupError, ValueError, TypeError) as error:
        raise CacheError(
            f"not a kept system image: {error}",
            where=str(folder),
            remedy="delete that folder and build again",
        ) from error
    root = folder / "root" if (folder / "root").exists() else None
    return System(layers=image.layers, config=config, root=root, **notes)


def _clear(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _keep(plan: ImagePlan, output: SystemOutput) -> None:
    """Compress the engine's layers; those of our own rootfs are taken as they are."""
    config = {key: value for key, value in output.config.items() if key in CONFIG_KEYS}
    require_described(plan, config)
    layout = plan.base.layout
    rootfs = None if layout is None else read_image(layout).layers[0]
    layers = []
    for number, (tar, diff_id) in enumerate(zip(output.tars, output.diff_ids, strict=True)):
        if rootfs is not None and rootfs.blob.diff_id == diff_id:
            layers.append(rootfs)  # linked: refreshing the rootfs leaves this system image whole
            continue
        # buildx rewrites the times in our rootfs too
        source = "rootfs" if rootfs is not None and number == 0 else "docker/Dockerfile"
        plain = tar.with_name(f"{number}.plain.tar")
        write_plain(tar, plain)
        blob = compress(plain, plain.with_suffix(".tar.gz"))
        plain.unlink()
        layers.append(ImageLayer(blob=blob, created_by=f"vllm-forge: {source}"))
    notes = {
        "debian": _debian_packages(output.tars),
        "root_digest": "" if output.root is None else tree_digest(output.root),
    }
    config["Labels"] = {NOTES: json.dumps(notes)}
    with atomic_path(system_folder(plan.system_key)) as aside:
        write_image(aside, layers=layers, config=config, epoch=0, name=SYSTEM_NAME)
        if output.root is not None:
            output.root.rename(aside / "root")


def write_plain(source: Path, target: Path) -> None:
    """Write a layer's tar again, without what depends on who built it.

    A rootless engine adds the attributes of its overlay (``user.overlay.*``), which other hosts
    refuse to set; user and group count by number.
    """
    with (
        tarfile.open(source) as layer,
        tarfile.open(target, "w", format=tarfile.PAX_FORMAT, encoding="utf-8") as plain,
    ):
        for member in layer:
            member.pax_headers = {}
            member.uname = member.gname = ""
            member.mtime = int(member.mtime)
            plain.addfile(member, layer.extractfile(member) if member.isreg() else None)


def _debian_packages(tars: Sequence[Path]) -> dict[str, str]:
    """Package -> version, from the dpkg status file of the highest layer that has one."""
    for path in reversed(tars):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.removeprefix("./") == "var/lib/dpkg/status":
                    file = tar.extractfile(member)
                    assert file is not None  # noqa: S101 - it is a regular file
                    return _parse_status(file.read().decode())
    raise BaseImageError(
        "the base is not a Debian system: it has no dpkg status file",
        remedy="use --base rootfs, or a Debian image",
    )


def _parse_status(text: str) -> dict[str, str]:
    packages = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line[:40])
        if fields.get("Status", "").endswith(" installed"):
            packages[fields["Package"]] = fields["Version"]
    return packages
