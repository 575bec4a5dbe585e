"""The two container engines, docker buildx and buildah: what a build asks of them, no more."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.errors import UsageError
from vllm_forge.host import (
    Runner,
    cache_root,
    link_or_copy,
    parse_json,
    read_plain,
    remove,
    suggestion,
    which,
)
from vllm_forge.host.errors import CacheError, CommandFailedError
from vllm_forge.host.files import walk_plain
from vllm_forge.host.run import UNLABELLED
from vllm_forge.images.docker_api import OLDEST_BUILDX, answers, check_daemon, require_version
from vllm_forge.images.errors import EngineMissingError, LayoutError
from vllm_forge.images.layout import hex_digest, read_image
from vllm_forge.images.remote import (
    bounded,
    check_builder,
    remote_builder,
    require_builder,
    unpack_layers,
    warn_of_plain_tcp,
)
from vllm_forge.images.tools import INSTALL

if TYPE_CHECKING:
    from vllm_forge.images.plan import ImagePlan

OLDEST_BUILDAH = (1, 28)
SYSTEM_NAME = "localhost/vllm-forge-system"
INSPECTED = "inspect.json"  # what buildah says of it
# Where Python keeps what it compiles.
BYTECODE = "PYTHONPYCACHEPREFIX"


@dataclass(frozen=True, kw_only=True)
class SystemOutput:
    """What an engine built: tars, lowest first, compressed or not, and the config of the image."""

    tars: tuple[Path, ...]
    diff_ids: tuple[str, ...]
    config: dict[str, Any]
    root: Path | None  # the image's files in a folder; None for engines that run images themselves


def _read_output(blobs: Path, manifest: dict[str, Any], root: Path | None) -> SystemOutput:
    """The output of a build from its manifest and a folder of blobs, named by hex digests."""
    config = parse_json(read_plain(blobs / hex_digest(manifest["config"]["digest"])))
    return SystemOutput(
        tars=tuple(blobs / hex_digest(layer["digest"]) for layer in manifest["layers"]),
        diff_ids=tuple(hex_digest(item) for item in config["rootfs"]["diff_ids"]),
        config=config["config"],
        root=root,
    )


@dataclass(frozen=True, kw_only=True)
class ContainerRun:
    """A command to run in an image: no network, read-only root, no capabilities, image's user."""

    layout: Path
    name: str  # that the layout is loaded as, by engines that do so
    # For engines that mount: unpacked layers, highest first; the image's ``config`` object, None
    # for the layout's.
    lower_dirs: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    inputs: Path  # folder that is mounted at /mnt
    argv: tuple[str, ...]
    user: str = ""  # ``uid:gid``; empty: the image's
    seconds: int = 3600  # after which it is ended: code of the image may run for ever
    work: Path  # for the engine's own files; no two runs at a time share it
    # For engines that mount: keeps compiled Python between runs. Code of the image writes it, so
    # images of other packages have another one. None: the image has its own.
    bytecode: Path | None
    output: Path | None = None  # folder that is mounted at /media; every user may write there
    volume: str = ""  # docker's, which keeps /cache between runs; empty: nothing is kept
    client: str = "docker"  # or podman, which takes the same options

    @property
    def container(self) -> str:
        """Its name, which is also its cgroup's: no two that run at a time share one."""
        return f"vllm-forge-{hashlib.sha256(str(self.work).encode()).hexdigest()[:12]}"


def _build_options(plan: ImagePlan, secrets: Mapping[str, Path]) -> list[str]:
    """Options of a build of docker/Dockerfile, whose folder is the context, for both engines."""
    return [
        *(f"--build-arg={name}={value}" for name, value in plan.build_arguments().items()),
        *(f"--secret=id={name},src={path}" for name, path in secrets.items()),
    ]


def _run_buildx(
    runner: Runner,
    plan: ImagePlan,
    secrets: Mapping[str, Path],
    work: Path,
    *options: str,
    env: Mapping[str, str] | None = None,
    excess: Callable[[], str] = str,
) -> None:
    """One ``docker buildx build`` into an OCI layout of plain tars.

    Not pushed from here: rewrite-timestamp and unpacking exclude each other on the
    docker driver. Provenance is ours to state, and would change the digest.
    """
    base = [f"--build-arg=BASE={plan.base.image or 'base'}"]
    if plan.base.layout is not None:
        base.append(f"--build-context=base=oci-layout://{plan.base.layout}:rootfs")
    output = (
        f"type=oci,tar=false,dest={work / 'image'},rewrite-timestamp=true,"
        "compression=uncompressed,force-compression=true"
    )
    runner.run(
        [
            "docker", "buildx", "build", "--quiet", "--no-cache", *options,
            "--provenance=false", f"--file={plan.dockerfile}", *base,
            *_build_options(plan, secrets), f"--output={output}", str(plan.dockerfile.parent),
        ],
        env={"SOURCE_DATE_EPOCH": str(plan.cell.base.source_date_epoch), **(env or {})},
        excess=excess,
    )  # fmt: skip


def _buildx_output(work: Path, root: Path | None) -> SystemOutput:
    image = read_image(work / "image")
    for layer in image.manifest["layers"]:
        if not layer["mediaType"].endswith(".tar"):
            what = f"buildx left a compressed layer: {layer['mediaType']}"
            raise LayoutError(what, where=work)
    return _read_output(image.path / "blobs" / "sha256", image.manifest, root)


class Buildx:
    """The docker engine: buildx builds, the daemon runs; see docker_api.py for the SDK."""

    name = "docker"
    tools = ("docker",)
    reads_plain_layers = False  # of a base: it was not tried

    def present(self) -> bool:
        """Client, plugin and a daemon that answers: a client alone does not build."""
        if which("docker") is None or not answers():
            return False
        plugin = ["docker", "buildx", "version"]
        return subprocess.run(plugin, capture_output=True, check=False).returncode == 0

    def check(self, runner: Runner) -> None:
        """A daemon that answers, with containerd's image store, and the plugin."""
        runner.act("check the docker daemon's version and image store", check_daemon)
        self.check_plugin(runner)

    @staticmethod
    def check_plugin(runner: Runner) -> None:
        if plugin := runner.run(["docker", "buildx", "version"]):
            version = re.search(r"v?(\d+\.\d+\.\d+)", plugin)
            require_version(version[1] if version else "", OLDEST_BUILDX, "docker buildx")

    def build_system(
        self, runner: Runner, plan: ImagePlan, secrets: Mapping[str, Path], work: Path
    ) -> None:
        """Build with the daemon's BuildKit."""
        _run_buildx(runner, plan, secrets, work, "--network=host")

    def system_output(self, work: Path) -> SystemOutput:
        return _buildx_output(work, None)

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        """``docker run`` of an image that is ``loaded``, with as few rights as there are.

        A container outlives its client where that is killed. So it has a name, by which this run or
        the next one removes it, an init process that hears SIGTERM, and a time limit of its own.
        """
        client, user = run.client, [f"--user={run.user}"] if run.user else []
        user += [UNLABELLED] if client == "podman" else []
        cache = "--tmpfs=/cache:exec,uid=10001,gid=0,mode=0775"
        if run.volume:  # docker fills a new one from the image, with its owner
            cache = f"--volume={run.volume}:/cache"
        output = [] if run.output is None else [f"--volume={run.output.resolve()}:/media"]
        end = [client, "rm", "--force", run.container]
        runner.run(end)
        try:
            return runner.run(
                [
                    client, "run", "--rm", "--init", f"--name={run.container}",
                    "--network=none", "--read-only", "--cap-drop=ALL",
                    "--security-opt=no-new-privileges", "--tmpfs=/tmp:exec,mode=1777",
                    cache, *user, *output,
                    f"--volume={run.inputs.resolve()}:/mnt:ro", "--entrypoint=/usr/bin/timeout",
                    run.name, "--kill-after=10", str(run.seconds + 60), *run.argv,
                ],
                seconds=run.seconds,
            )  # fmt: skip
        except CommandFailedError:
            with suppress(CommandFailedError):  # as where this program is to end
                runner.run(end)
            raise

    @contextmanager
    def loaded(self, runner: Runner, layout: Path, name: str) -> Iterator[None]:
        """Have the image in the daemon's store meanwhile."""
        self.load(runner, layout, name)
        try:
            yield
        finally:
            runner.run(["docker", "image", "rm", "--force", name])

    def load(self, runner: Runner, layout: Path, _: str) -> None:
        """``docker load`` reads a tar, and takes the name from the layout's index."""
        script = 'tar -C "$0" -cf - . | docker load --quiet'
        runner.run(["bash", "-o", "pipefail", "-ec", script, str(layout)])


class Buildah:
    """The daemonless engine: buildah builds, runc runs, skopeo copies (Debian 12 and newer)."""

    name = "buildah"
    tools: tuple[str, ...] = ("buildah", "runc", "skopeo", "unshare")
    reads_plain_layers = True

    def present(self) -> bool:
        return all(which(tool) is not None for tool in self.tools)

    def check(self, runner: Runner) -> None:
        """Debian 12's is the oldest that was tried."""
        if version := runner.run(["buildah", "--version"]):
            require_version(version, OLDEST_BUILDAH, "buildah")

    def build_system(
        self, runner: Runner, plan: ImagePlan, secrets: Mapping[str, Path], work: Path
    ) -> None:
        """``buildah bud`` with a storage of its own, exported as a layout and as a folder.

        docker format keeps HEALTHCHECK, which OCI's config lacks: so the config is asked for. A
        blob that the layout has already is not written again, so that of our rootfs is put there.
        """
        state = (cache_root() / "buildah").resolve()
        store = state / "store"
        runner.act(
            f"write containers.conf and storage.conf to {state}", lambda: _write_config(state)
        )
        env = {
            "CONTAINERS_CONF": str(state / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(state / "storage.conf"),
            "BUILDAH_HISTORY": "false",
        }
        # Nothing in it outlives a build; what a killed one left may be half there.
        runner.act(f"empty {store}", lambda: remove(store))
        base, image = plan.base.image or "oci:base:rootfs", work / "image"
        if (layout := plan.base.layout) is not None:
            # buildah makes an image name of the path: it must be short, without dots.
            link = work / "base"
            runner.act(f"link {link} to {layout}", lambda: link.symlink_to(layout))
            runner.act(f"link its layers to {image}", lambda: _link_layers(layout, image))
        runner.run(
            [
                "buildah", "bud", "--quiet", "--format=docker", "--runtime=runc", "--network=host",
                "--no-cache", f"--timestamp={plan.cell.base.source_date_epoch}",
                f"--file={plan.dockerfile}", f"--build-arg=BASE={base}",
                *_build_options(plan, secrets),
                f"--output=type=local,dest={work / 'root'}", f"--tag={SYSTEM_NAME}",
                str(plan.dockerfile.parent),
            ],
            env=env,
            cwd=work,
        )  # fmt: skip
        runner.run(["buildah", "push", "--quiet", SYSTEM_NAME, f"oci:{image}"], env=env)
        described = runner.run(["buildah", "inspect", "--type=image", SYSTEM_NAME], env=env)
        runner.act("write its config", lambda: (work / INSPECTED).write_text(described))
        runner.run(["buildah", "rmi", "--all", "--force"], env=env)

    def system_output(self, work: Path) -> SystemOutput:
        """Read the layout, and the config of docker's format."""
        image = read_image(work / "image")
        output = _read_output(image.path / "blobs" / "sha256", image.manifest, work / "root")
        described = parse_json(read_plain(work / INSPECTED))["Config"]
        return replace(output, config=parse_json(described)["config"])

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        """Runc on an overlay of the unpacked layers, in a mount namespace of its own.

        Copying 8 GB into a container store only to look at them would take longer than the
        build. The overlay lives and dies with the command. So does what runs in it, by a PID
        namespace around runc: process 1 of a container does not hear SIGTERM, and outlives runc.
        """
        bundle = run.work / "bundle"
        runner.act(f"write a runc bundle to {bundle}", lambda: _write_bundle(bundle, run))
        lowers = ":".join(f"lower/{number}" for number in range(len(run.lower_dirs)))
        return runner.run(
            [
                "unshare", "--mount", "--propagation=private",
                "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec",
                f"mount -t overlay overlay -o ro,lowerdir={lowers} rootfs; "
                f"exec runc --root=state run --bundle=. {run.container}",
            ],
            cwd=bundle,
            seconds=run.seconds,
        )  # fmt: skip

    def loaded(self, *_: object) -> AbstractContextManager[None]:
        """Runs mount the unpacked layers: nothing to load."""
        return nullcontext()

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """Into containers-storage, where podman finds it."""
        runner.run(["skopeo", "copy", "--quiet", f"oci:{layout}", f"containers-storage:{name}"])


class BuildKit(Buildah):
    """A BuildKit daemon elsewhere builds what needs RUN; what runs in the image is runc's, here.

    ``builder``: an address, or the name of a builder that ``docker buildx create`` made. Rootfs,
    context and secrets go there, and the system's layers come back, over buildx's one connection.
    """

    name = "buildkit"
    tools: tuple[str, ...] = ("docker", "runc", "unshare")
    reads_plain_layers = False  # the base goes over a network

    def __init__(self, builder: str = "") -> None:
        self.builder = builder

    def present(self) -> bool:
        """Never the default."""
        return False

    def check(self, runner: Runner) -> None:
        """A plugin that is new enough, and a daemon that answers."""
        Buildx.check_plugin(runner)
        warn_of_plain_tcp(self.builder)
        with remote_builder(runner, self.builder) as (name, env):
            check_builder(runner, name, env)

    def build_system(
        self, runner: Runner, plan: ImagePlan, secrets: Mapping[str, Path], work: Path
    ) -> None:
        """Build there: without network, unless a registry's base may lack packages.

        Only the daemon's own network, as that of its host is a right that it may not give. An
        exported folder would have lost its owners, so the layers are unpacked here.
        """
        network = [] if plan.base.layout is None else ["--network=none"]
        with (
            remote_builder(runner, self.builder) as (name, env),
            bounded(work / "image", plan.cell.base.budget_mb) as excess,
        ):
            options = [f"--builder={name}", *network]
            _run_buildx(runner, plan, secrets, work, *options, env=env, excess=excess)
        root = work / "root"
        runner.act(
            f"unpack the layers to {root}",
            lambda: unpack_layers(_buildx_output(work, None).tars, root),
        )

    def system_output(self, work: Path) -> SystemOutput:
        return _buildx_output(work, work / "root")


def _link_layers(layout: Path, image: Path) -> None:
    """Put the layers of a layout into a new one, which is to have more."""
    blobs = image / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for layer in read_image(layout).layers:
        link_or_copy(layer.blob.path, blobs / layer.blob.digest)


def _write_config(folder: Path) -> None:
    """Storage and limits of our own.

    buildah and podman set limits that a host without CAP_SYS_RESOURCE refuses, and crun does not
    run on hybrid cgroups; so the host's own limits and runc are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = int(Path("/proc/sys/kernel/pid_max").read_text())
    (folder / "containers.conf").write_text(
        "[containers]\n"
        f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\n'
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/store"\nrunroot = "{folder}/run"\n'
    )


def _write_bundle(bundle: Path, run: ContainerRun) -> None:
    remove(bundle)
    (bundle / "lower").mkdir(parents=True)
    (bundle / "rootfs").mkdir()
    for number, lower in enumerate(run.lower_dirs):
        try:
            deque(walk_plain(lower), 0)  # a FIFO would hold the run
        except ValueError as error:
            raise CacheError(str(error), where=lower, remedy="build again") from None
        (bundle / "lower" / str(number)).symlink_to(lower.resolve(strict=True))
    (bundle / "config.json").write_text(json.dumps(_runtime_config(run), indent=1))


def _runtime_config(run: ContainerRun) -> dict[str, Any]:
    """An OCI runtime config with as few rights as there are."""
    image = run.config or read_image(run.layout).config["config"]
    owner, _, group = image["User"].partition(":")
    uid, _, gid = (run.user or image["User"]).partition(":")
    env, writable = [row for row in image["Env"] if row.split("=")[0] != BYTECODE], {}
    if run.bytecode is not None:
        env.append(f"{BYTECODE}=/srv")
        writable["/srv"] = bytecode = run.bytecode.resolve()
        bytecode.mkdir(parents=True, exist_ok=True)
        bytecode.parent.chmod(0o700)  # no user of this host with the image's uid writes there
        os.chown(bytecode, int(owner), int(group or owner))
    if run.output is not None:
        writable["/media"] = run.output.resolve()

    def mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
        return {
            "destination": target, "type": kind, "source": source or kind, "options": list(options),
        }  # fmt: skip

    return {
        "ociVersion": "1.0.2",
        "hostname": "vllm-forge",
        "process": {
            "args": list(run.argv),
            "env": env,
            "cwd": image.get("WorkingDir") or "/",
            "user": {"uid": int(uid), "gid": int(gid or uid)},
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            mount("/proc", "proc", "nosuid", "noexec", "nodev"),
            mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755"),
            mount("/dev/shm", "tmpfs", "nosuid", "nodev", "mode=1777"),  # noqa: S108
            mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666"),
            mount("/tmp", "tmpfs", "nosuid", "nodev", "mode=1777"),  # noqa: S108
            mount("/cache", "tmpfs", "nosuid", "nodev", f"uid={owner}", "gid=0", "mode=0775"),
            # Bytecode of an earlier run: where the image has none, compiling it takes longer
            # than the checks. Python takes a file only if the source's size and time agree.
            *(mount(at, "none", "rbind", "rw", source=str(path)) for at, path in writable.items()),
            mount("/mnt", "none", "rbind", "ro", source=str(run.inputs.resolve())),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }


Engine = Buildx | Buildah
ENGINES: dict[str, type[Engine]] = {"docker": Buildx, "buildah": Buildah, "buildkit": BuildKit}


def choose_engine(name: str | None, *, dry_run: bool = False, builder: str = "") -> Engine:
    """The engine of that name, else the first that is installed; a dry run needs none.

    ``builder``: of a remote BuildKit, see there.
    """
    if builder:
        require_builder(builder)
        name = BuildKit.name
    if name is not None and name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}{suggestion(name, ENGINES)}")
    if name is None:
        name = next((name for name, make in ENGINES.items() if make().present()), None)
        if name is None and not dry_run:
            raise EngineMissingError(
                "no container engine is installed: neither docker with buildx and a daemon, nor "
                "buildah",
                remedy=f"run: {INSTALL}   or build with --provision, which does that",
            )
    engine = BuildKit(builder) if builder else ENGINES[name or Buildah.name]()
    missing = [] if dry_run else [tool for tool in engine.tools if which(tool) is None]
    if missing:
        what = f"{missing[0]} is not installed; the {engine.name} engine needs it"
        raise EngineMissingError(what, remedy=f"run: {INSTALL}   or build with --provision")
    return engine
