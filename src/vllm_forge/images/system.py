"""The system image: base plus docker/Dockerfile, built by an engine, kept by its inputs."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import Runner, atomic_path, cache_root, remove
from vllm_forge.host.errors import CacheError
from vllm_forge.images.base import BaseRef, compress
from vllm_forge.images.engines import SystemOutput
from vllm_forge.images.errors import BaseImageError, LayoutError
from vllm_forge.images.layout import ImageLayer, has_name, read_image, write_image
from vllm_forge.images.prewarm import tree_digest

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

# Raise when the kept result changes for equal inputs.
SYSTEM_FORMAT = 3
# Not kept: docker's defaults of a container that never ran, and a host name that it made up.
CONFIG_KEYS = frozenset(
    {"Env", "User", "Entrypoint", "WorkingDir", "Volumes", "ExposedPorts", "Healthcheck"}
)
NAME = "localhost/vllm-forge-system:kept"
NOTES = "io.vllm-forge.system"  # a label; not of images
CA_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))


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


def make_system(runner: Runner, plan: ImagePlan, secrets: dict[str, Path]) -> str:
    """Build the system image; return its key."""
    key, work = plan.system_key, plan.work / "system"
    runner.act(f"clear {work}", lambda: _clear(work))
    plan.engine.build_system(runner, plan, secrets, work)
    runner.act(
        f"keep the system image in {system_folder(key)}",
        lambda: _keep(plan.engine.system_output(work), plan.base, system_folder(key)),
    )
    return key


def host_secrets() -> dict[str, Path]:
    """What of this host the Dockerfile's RUN may read, as id -> file."""
    bundle = next((path for path in CA_BUNDLES if path.exists()), None)
    return {} if bundle is None else {"ca": bundle}


def system_is_kept(key: str) -> bool:
    """Whether the system image of that key is there; a damaged one is made again."""
    try:
        load_system(key)
    except CacheError:
        return False
    return True


def load_system(key: str) -> System:
    """Read a kept system image. Raises CacheError: it is missing or damaged."""
    folder = system_folder(key)
    try:
        image = read_image(folder)
        config = dict(image.config["config"])
        notes = json.loads(config.pop("Labels")[NOTES])
        if not has_name(image, NAME):
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


def _keep(output: SystemOutput, base: BaseRef, folder: Path) -> None:
    """Compress the engine's layers; those of our own rootfs are taken as they are."""
    rootfs = None if base.layout is None else read_image(base.layout).layers[0]
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
    config = {key: value for key, value in output.config.items() if key in CONFIG_KEYS}
    config["Labels"] = {NOTES: json.dumps(notes)}
    with atomic_path(folder) as aside:
        write_image(aside, layers=layers, config=config, epoch=0, name=NAME)
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
