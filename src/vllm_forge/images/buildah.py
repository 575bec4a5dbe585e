"""The daemonless engine: buildah builds, runc runs, skopeo copies (Debian 12 and newer)."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.host import cache_root, remove
from vllm_forge.images.engine import BYTECODE, SystemOutput, require_version, tagged

if TYPE_CHECKING:
    from vllm_forge.host import Runner
    from vllm_forge.images.engine import SystemBuild, Trial

OLDEST = (1, 28)
NAME = "localhost/vllm-forge-system"


class Buildah:
    """See engine.Engine."""

    name = "buildah"
    tools: tuple[str, ...] = ("buildah", "runc", "skopeo", "unshare")

    def __init__(self, state: Path | None = None) -> None:
        self._state = state or cache_root() / "buildah"

    def check(self, runner: Runner) -> None:
        """Debian 12's is the oldest that was tried."""
        version = runner.run(["buildah", "--version"])
        if version:
            require_version(version, OLDEST, "buildah")

    def build_system(self, runner: Runner, build: SystemBuild) -> None:
        """``buildah bud`` with a storage of its own, exported as plain tars and as a folder.

        docker format keeps HEALTHCHECK, which OCI's config has not; ``dir:`` with
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
                *tagged([("BASE", base), *build.args.items()], "--build-arg"),
                *(f"--secret=id={name},src={path}" for name, path in build.secrets.items()),
                f"--output=type=local,dest={build.work / 'root'}", f"--tag={NAME}",
                str(build.dockerfile.parent),
            ],
            env=env,
            cwd=build.work,
        )  # fmt: skip
        runner.run(
            [
                "buildah",
                "push",
                "--quiet",
                "--disable-compression",
                NAME,
                f"dir:{build.work / 'image'}",
            ],
            env=env,
        )
        runner.run(["buildah", "rmi", "--all", "--force"], env=env)

    def system_output(self, build: SystemBuild) -> SystemOutput:
        """Parse the ``dir:`` output (docker schema 2)."""
        folder = build.work / "image"
        manifest = json.loads((folder / "manifest.json").read_text())
        config = json.loads((folder / _hex(manifest["config"]["digest"])).read_text())
        return SystemOutput(
            tars=tuple(folder / _hex(layer["digest"]) for layer in manifest["layers"]),
            diff_ids=tuple(_hex(item) for item in config["rootfs"]["diff_ids"]),
            config=config["config"],
            root=build.work / "root",
        )

    def try_image(self, runner: Runner, trial: Trial) -> str:
        """Runc on an overlay of the unpacked layers, in a mount namespace of its own.

        Copying 8 GB into a container store only to look at them would take longer than the
        build. The overlay lives and dies with the command.
        """
        bundle = trial.work / "bundle"
        runner.act(f"write a runc bundle to {bundle}", lambda: _write_bundle(bundle, trial))
        lowers = ":".join(f"lower/{number}" for number in range(len(trial.lowers)))
        return runner.run(
            [
                "unshare", "--mount", "--propagation=private", "sh", "-ec",
                f"mount -t overlay overlay -o ro,lowerdir={lowers} rootfs; "
                f"exec runc --root=state run --bundle=. {_container(bundle)}",
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


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


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


def _container(bundle: Path) -> str:
    """Name of a container, which is also its cgroup's: trials run side by side."""
    return f"vllm-forge-{hashlib.sha256(str(bundle).encode()).hexdigest()[:12]}"


def _write_bundle(bundle: Path, trial: Trial) -> None:
    remove(bundle)
    (bundle / "lower").mkdir(parents=True)
    (bundle / "rootfs").mkdir()
    for number, lower in enumerate(trial.lowers):
        (bundle / "lower" / str(number)).symlink_to(lower.resolve())
    (bundle / "config.json").write_text(json.dumps(_runtime_config(trial), indent=1))


def _runtime_config(trial: Trial) -> dict[str, Any]:
    """An OCI runtime config with as few rights as there are."""
    image = trial.image.config["config"]
    uid, _, gid = image["User"].partition(":")
    bytecode = (trial.bytecode or cache_root() / "bytecode").resolve()
    bytecode.mkdir(parents=True, exist_ok=True)
    os.chown(bytecode, int(uid), int(gid or uid))

    def mount(target: str, kind: str, *options: str, source: str = "") -> dict[str, Any]:
        return {
            "destination": target, "type": kind, "source": source or kind, "options": list(options),
        }  # fmt: skip

    return {
        "ociVersion": "1.0.2",
        "hostname": "trial",
        "process": {
            "args": list(trial.argv),
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
            mount("/cache", "tmpfs", "nosuid", "nodev", f"uid={uid}", f"gid={gid or uid}"),
            # Bytecode of an earlier trial: the image has none, and compiling it takes longer
            # than the checks. Python takes a file only if the source's size and time agree.
            mount("/srv", "none", "rbind", "rw", source=str(bytecode)),
            mount("/mnt", "none", "rbind", "ro", source=str(trial.inputs.resolve())),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        },
    }
