"""The daemonless engine: buildah builds, runc runs, skopeo copies (Debian 12 and newer)."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import cache_root, remove, which
from vllm_forge.images.engine import BYTECODE, build_options, read_output, require_version
from vllm_forge.images.layout import read_image

if TYPE_CHECKING:
    from vllm_forge.host import Runner
    from vllm_forge.images.engine import ContainerRun, SystemBuild, SystemOutput

OLDEST = (1, 28)
NAME = "localhost/vllm-forge-system"


class Buildah:
    """See engine.Engine."""

    name = "buildah"
    tools: tuple[str, ...] = ("buildah", "runc", "skopeo", "unshare")

    def __init__(self, state: Path | None = None) -> None:
        self._state = state or cache_root() / "buildah"

    def present(self) -> bool:
        """All tools are installed."""
        return all(which(tool) is not None for tool in self.tools)

    def check(self, runner: Runner) -> None:
        """Debian 12's is the oldest that was tried."""
        if version := runner.run(["buildah", "--version"]):
            require_version(version, OLDEST, "buildah")

    def build_system(self, runner: Runner, build: SystemBuild) -> None:
        """``buildah bud`` with a storage of its own, exported as plain tars and as a folder.

        docker format keeps HEALTHCHECK, which OCI's config lacks; ``dir:`` with
        --disable-compression keeps the tars as they are.
        """
        env = self._environment(runner)
        store = self._state.resolve() / "store"
        # Nothing in it outlives a build; what a killed one left may be half there.
        runner.act(f"empty {store}", lambda: remove(store))
        base = build.base.image or "oci:base:rootfs"
        if (layout := build.base.layout) is not None:
            # buildah makes an image name of the path: it must be short, without dots.
            link = build.work / "base"
            runner.act(f"link {link} to {layout}", lambda: link.symlink_to(layout))
        runner.run(
            [
                "buildah", "bud", "--quiet", "--format=docker", "--runtime=runc", "--network=host",
                "--no-cache", f"--timestamp={build.epoch}", f"--file={build.dockerfile}",
                *build_options(build, ("BASE", base)),
                f"--output=type=local,dest={build.work / 'root'}", f"--tag={NAME}",
                str(build.dockerfile.parent),
            ],
            env=env,
            cwd=build.work,
        )  # fmt: skip
        target = f"dir:{build.work / 'image'}"
        runner.run(["buildah", "push", "--quiet", "--disable-compression", NAME, target], env=env)
        runner.run(["buildah", "rmi", "--all", "--force"], env=env)

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Parse the ``dir:`` output (docker schema 2)."""
        folder = build.work / "image"
        manifest = json.loads((folder / "manifest.json").read_text())
        return read_output(folder, manifest, build.work / "root")

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        """Runc on an overlay of the unpacked layers, in a mount namespace of its own.

        Copying 8 GB into a container store only to look at them would take longer than the
        build. The overlay lives and dies with the command.
        """
        bundle = run.work / "bundle"
        runner.act(f"write a runc bundle to {bundle}", lambda: _write_bundle(bundle, run))
        # The container's name is also its cgroup's: runs may be concurrent.
        name = f"vllm-forge-{hashlib.sha256(str(bundle).encode()).hexdigest()[:12]}"
        lowers = ":".join(f"lower/{number}" for number in range(len(run.lower_dirs)))
        return runner.run(
            [
                "unshare", "--mount", "--propagation=private", "sh", "-ec",
                f"mount -t overlay overlay -o ro,lowerdir={lowers} rootfs; "
                f"exec runc --root=state run --bundle=. {name}",
            ],
            cwd=bundle,
        )  # fmt: skip

    def load(self, runner: Runner, layout: Path, name: str) -> None:
        """Into containers-storage, where podman finds it."""
        runner.run(["skopeo", "copy", "--quiet", f"oci:{layout}", f"containers-storage:{name}"])

    def _environment(self, runner: Runner) -> dict[str, str]:
        """Storage and limits of our own.

        buildah and podman set limits that a host without CAP_SYS_RESOURCE refuses, and crun
        does not run on hybrid cgroups; so the host's own limits and runc are named.
        """
        files = self._state.resolve()
        runner.act(
            f"write containers.conf and storage.conf to {files}", lambda: _write_config(files)
        )
        return {
            "CONTAINERS_CONF": str(files / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(files / "storage.conf"),
            "BUILDAH_HISTORY": "false",
        }


def _write_config(folder: Path) -> None:
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
        (bundle / "lower" / str(number)).symlink_to(lower.resolve(strict=True))
    (bundle / "config.json").write_text(json.dumps(_runtime_config(run), indent=1))


def _runtime_config(run: ContainerRun) -> dict[str, Any]:
    """An OCI runtime config with as few rights as there are."""
    image = run.config or read_image(run.layout).config["config"]
    owner, _, group = image["User"].partition(":")
    uid, _, gid = (run.user or image["User"]).partition(":")
    bytecode = (run.bytecode or cache_root() / "bytecode").resolve()
    bytecode.mkdir(parents=True, exist_ok=True)
    os.chown(bytecode, int(owner), int(group or owner))

    def mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
        return {
            "destination": target, "type": kind, "source": source or kind, "options": list(options),
        }  # fmt: skip

    return {
        "ociVersion": "1.0.2",
        "hostname": "vllm-forge",
        "process": {
            "args": list(run.argv),
            "env": [
                *(row for row in image["Env"] if row.split("=")[0] != BYTECODE),
                f"{BYTECODE}=/srv",
            ],
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
            # Bytecode of an earlier run: the image has none, and compiling it takes longer
            # than the checks. Python takes a file only if the source's size and time agree.
            mount("/srv", "none", "rbind", "rw", source=str(bytecode)),
            mount("/mnt", "none", "rbind", "ro", source=str(run.inputs.resolve())),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }
