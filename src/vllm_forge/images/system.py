"""The system image: a base, and docker/Dockerfile on it, built by an engine, kept by its inputs.

The base is our own rootfs, or a registry image pinned by digest.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from vllm_forge.host import Runner, atomic_path, cache_root, hash_of, remove
from vllm_forge.host.errors import CacheError
from vllm_forge.host.files import file_digest, folder_stamp, holds, write_sealed
from vllm_forge.images.engines import SystemOutput
from vllm_forge.images.errors import BaseImageError, ImageCheckError, LayoutError
from vllm_forge.images.layer import LayerBlob, plain_digest
from vllm_forge.images.layout import ImageLayer, has_name, read_image, write_image
from vllm_forge.images.prewarm import tree_digest
from vllm_forge.images.record import recall
from vllm_forge.images.rootfs import (
    compress,
    is_whole,
    keep_rootfs,
    make_rootfs,
    write_host_sources,
)
from vllm_forge.sources.debian import installed_packages

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

# Raise when the kept result changes for equal inputs.
SYSTEM_FORMAT = 3
# Not kept: docker's defaults of a container that never ran, and a host name that it made up.
CONFIG_KEYS = frozenset(
    {"Env", "User", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "Healthcheck"}
)
NANOSECONDS = {"s": 10**9, "m": 60 * 10**9}  # engines count times in them
SYSTEM_NAME = "localhost/vllm-forge-system:kept"
CHECKED = "checked.json"  # see ``System.root_is_whole``
NOTES = "io.vllm-forge.system"  # a label; not of images
CA_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))


@dataclass(frozen=True, kw_only=True)
class System:
    layers: tuple[ImageLayer, ...]  # lowest first
    config: dict[str, Any]
    debian: dict[str, str]  # Debian's package -> version
    root: Path | None  # its files, unpacked; None when the engine runs images itself
    root_digest: str  # see ``tree_digest``

    @property
    def digest(self) -> str:
        """SHA-256 over the layers and the config, hex."""
        parts = [layer.blob.digest for layer in self.layers]
        return hash_of([parts, self.config], sort_keys=True)

    @property
    def root_intact(self) -> bool:
        """Whether its unpacked files, if it has some, are as the engine gave them."""
        return self.root is None or tree_digest(self.root) == self.root_digest

    @property
    def root_is_whole(self) -> bool:
        """``root_intact``; read only when the file system says that a file was touched since."""
        if (root := self.root) is None:
            return True
        with suppress(OSError, ValueError):  # of a damaged one
            now = {"digest": self.root_digest, "files": folder_stamp(root)}
            return holds(root.with_name(CHECKED), now, lambda: self.root_intact)
        return False


def system_folder(key: str) -> Path:
    return cache_root() / "systems" / key


def build_system(plan: ImagePlan, runner: Runner) -> str:
    """Build rootfs and docker/Dockerfile by the engine, unless that is kept; return its key.

    One process at a time: engines keep one store, and lines share the system image.
    """
    key, work = plan.system_key, plan.work / "system"
    bundle = next((path for path in CA_BUNDLES if path.exists()), None)
    # What of this host the Dockerfile's RUN may read.
    secrets = {} if bundle is None else {"ca": bundle}
    with runner.exclusive("system"):
        if is_kept(plan):
            return key
        with _with_rootfs(plan, runner) as base:
            if base.base.layout is None:
                # A registry image may lack packages: apt in it uses this host's mirrors.
                secrets["apt-sources"] = plan.work / "sources.list"
                write_host_sources(runner, plan.cell.base.suite, secrets["apt-sources"])
            runner.act(f"clear {work}", lambda: _clear(work))
            plan.engine.build_system(runner, base, secrets, work)
        runner.act(
            f"keep the system image in {system_folder(key)}",
            lambda: _keep(plan, plan.engine.system_output(work)),
        )
    return key


@contextmanager
def _with_rootfs(plan: ImagePlan, runner: Runner) -> Iterator[ImagePlan]:
    """The plan for the engine, whose base is there; it is kept, compressed, after the block.

    Unpacking it again takes an engine seconds, and compressing it as many: these go on meanwhile.
    """
    layout, epoch = plan.base.layout, plan.cell.base.source_date_epoch
    if layout is None or is_whole(layout):
        yield plan
        return
    plain = make_rootfs(runner, plan.cell.base, plan.base, plan.work)
    with ThreadPoolExecutor(1) as pool:
        job = runner.act(
            f"compress the rootfs to {layout}",
            lambda: pool.submit(keep_rootfs, plain, layout, epoch),
        )
        if plan.engine.reads_plain_layers:
            yield replace(plan, base=replace(plan.base, layout=plain))
        runner.act("wait until it is compressed", lambda: job().result())
    if not plan.engine.reads_plain_layers:
        yield plan
    runner.act(f"delete {plain}", lambda: remove(plain))


def is_kept(plan: ImagePlan) -> bool:
    """Whether the system image is there; one that is damaged or was changed is made again."""
    try:
        system = load_system(plan.system_key)
        require_described(plan, system.config)
    except (CacheError, ImageCheckError):
        return False
    blobs = (layer.blob for layer in system.layers)
    return system.root_is_whole and all(_diff_id(blob) == blob.diff_id for blob in blobs)


def _diff_id(blob: LayerBlob) -> str:
    """See ``plain_digest``; empty also if the blob is not what its digest says."""
    with suppress(OSError, ValueError):
        if file_digest(blob.path) == blob.digest:
            return recall(["diff_id", blob.digest], lambda: plain_digest(blob))
    return ""


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
            what = f"{key} of the system image is {actual}, the Dockerfile says {expected}"
            remedy = "build with another --engine: this one changes it"
            raise ImageCheckError(what, where=plan.dockerfile, remedy=remedy)


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
                what = f"docker/Dockerfile has {word}, whose effect on the image is not compared"
                remedy = "compare it in images/system.py, dockerfile_config"
                raise BaseImageError(what, remedy=remedy)
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
        what = f"not a kept system image: {error}"
        raise CacheError(what, where=folder, remedy="delete that folder and build again") from error
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
        layers.append(ImageLayer(blob=blob, name=source))
    files, root_digest = "", ""
    if output.root is not None:
        with suppress(ValueError):  # of a device, which the checks refuse
            files = folder_stamp(output.root)
        root_digest = tree_digest(output.root)
    notes = {"debian": _debian_packages(output.tars), "root_digest": root_digest}
    config["Labels"] = {NOTES: json.dumps(notes)}
    with atomic_path(system_folder(plan.system_key)) as aside:
        write_image(aside, layers=layers, config=config, epoch=0, name=SYSTEM_NAME)
        if output.root is not None:
            output.root.rename(aside / "root")
            write_sealed(aside / CHECKED, {"digest": root_digest, "files": files})


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
                    return installed_packages(file.read().decode())
    what = "the base is not a Debian system: it has no dpkg status file"
    raise BaseImageError(what, remedy="use --base rootfs, or a Debian image")
