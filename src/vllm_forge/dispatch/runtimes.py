"""What starts an image on a node: a row for each program.

Names in braces are of the job. Names between two ``@`` only the node knows (``node``): WORK, a
folder on its local disk for this job alone; SCRATCH, one for all jobs of the user; OUTPUT; IMAGE,
where the image is there; ATTEMPT; CUDA and GPUS, the job's GPUs as its processes number them and
as the host does. A word with GPU is repeated for each of GPUS. Words about GPUs are left out
where the scheduler names none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_forge.dispatch.errors import SITE, SiteFileError
from vllm_forge.dispatch.jobs import OUTPUT, JobSpec, Volume
from vllm_forge.dispatch.site import Site
from vllm_forge.errors import suggestion

Argv = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A program that runs a command in an image.

    Attributes:
        source: how the image comes to the node: as the squashfs that `build --archive` writes, by
            its digest from the site's registry, or as a kit of `gpu kit`.
        head: its words before volumes.
        image: its words after them, before the command.
        volume: words for one volume.
        read_only: at the end of these, for one that may not be written to.
        joined: option that takes all volumes in one word instead.
        prepare: commands before; ``cleanup``: after, whatever the result was.
        files: name in WORK -> content; config.json is written for ``bundle``, an OCI bundle.
    """

    source: Literal["archive", "registry", "kit"]
    head: Argv
    image: Argv
    volume: Argv = ()
    read_only: str = ":ro"
    joined: str = ""
    prepare: tuple[Argv, ...] = ()
    cleanup: tuple[Argv, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    bundle: bool = False


_OPTIONS = (
    "--rm", "--name=forge-@ATTEMPT@", "--network=none", "--ipc=private", "--shm-size={shm}g",
    "--user=0", "--workdir={workdir}", "--entrypoint=",
)  # fmt: skip
POD = "(pod)"  # not for a site file
_RUNC = ("runc", "--root", "@WORK@/state")
RUNTIMES: dict[str, Runtime] = {
    "docker": Runtime(
        source="registry",
        head=("docker", "run", '--gpus="device=@GPUS@"', *_OPTIONS),
        volume=("--volume={source}:{target}",),
        image=("{reference}",),
        cleanup=(("docker", "rm", "--force", "forge-@ATTEMPT@"),),
    ),
    "podman": Runtime(
        source="registry",
        head=("podman", "run", "--device=nvidia.com/gpu=@GPU@", "--security-opt=label=disable",
              *_OPTIONS),
        volume=("--volume={source}:{target}",),
        image=("{reference}",),
        cleanup=(("podman", "rm", "--force", "--ignore", "forge-@ATTEMPT@"),),
    ),
    # https://github.com/NVIDIA/enroot: doc/cmd/start.md; conf/hooks/98-nvidia.sh reads the variable
    "enroot": Runtime(
        source="archive",
        prepare=(("enroot", "create", "--force", "--name", "forge-@ATTEMPT@", "@IMAGE@"),),
        files={"rc": 'cd {workdir} && exec "$@"\n'},
        head=("env", "NVIDIA_VISIBLE_DEVICES=@CUDA@", "enroot", "start", "--root", "--rw",
              "--rc", "@WORK@/rc"),
        volume=("--mount", "{source}:{target}:none:x-create=dir,bind"),
        read_only=",ro",
        image=("forge-@ATTEMPT@",),
        cleanup=(("enroot", "remove", "--force", "forge-@ATTEMPT@"),),
    ),
    # https://github.com/NVIDIA/pyxis, README.md: enroot, in a step of the job
    "pyxis": Runtime(
        source="archive",
        head=("srun", "--ntasks=1", "--container-image=@IMAGE@", "--no-container-entrypoint",
              "--no-container-mount-home", "--container-remap-root", "--container-writable",
              "--container-workdir={workdir}"),
        volume=("{source}:{target}",),
        joined="--container-mounts=",
        image=(),
    ),
    "apptainer": Runtime(
        source="archive",
        head=("apptainer", "exec", "--nv", "--cleanenv", "--no-home", "--writable-tmpfs",
              "--env=CUDA_VISIBLE_DEVICES=@CUDA@", "--pwd={workdir}"),
        volume=("--bind", "{source}:{target}"),
        image=("@IMAGE@",),
    ),
    "runc": Runtime(
        source="archive",
        prepare=(("unsquashfs", "-quiet", "-no-progress", "-dest", "@WORK@/rootfs", "@IMAGE@"),),
        head=(*_RUNC, "run", "--bundle", "@WORK@", "forge-@ATTEMPT@"),
        image=(),
        cleanup=((*_RUNC, "delete", "--force", "forge-@ATTEMPT@"),),
        bundle=True,
    ),
    # The node's program runs in a pod of the image, which has the volumes already.
    POD: Runtime(
        source="registry", prepare=(("ln", "--symbolic", "@OUTPUT@", OUTPUT),), head=(), image=(),
    ),
    "kit": Runtime(
        source="kit",
        prepare=(("env", "FORGE_KIT_WORK=@SCRATCH@/kit", "python3", "@IMAGE@/kit.py", "unpack"),),
        head=("env", "FORGE_KIT_WORK=@SCRATCH@/kit", "python3", "@IMAGE@/kit.py", "exec",
              "--uid", "0"),
        volume=("--bind", "{source}:{target}"),
        read_only="",
        image=("--",),
    ),
}  # fmt: skip
# Of a container that may do what docker's may by default.
_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE",
        "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
    )
]  # fmt: skip


def find_runtime(site: Site) -> Runtime:
    """The row of a site's runtime; SiteFileError if there is none, or the site lacks its source."""
    name = site.runtime
    if name not in RUNTIMES:
        names = [known for known in RUNTIMES if known != POD]
        what = f"runtime: unknown {name!r}{suggestion(name, names)}"
        raise SiteFileError(what, where=SITE, remedy=f"choose one of {', '.join(names)}")
    if RUNTIMES[name].source == "registry" and site.registry is None:
        what = "missing registry, from which the nodes pull images"
        remedy = 'add registry = "HOST/NAME", and push the image there'
        raise SiteFileError(what, where=SITE, remedy=remedy)
    return RUNTIMES[name]


def node_job(spec: JobSpec, site: Site, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the node needs to run a job; ``config``: the ``config`` object of its image."""
    row = find_runtime(site)
    known = {"shm": spec.shm_gb, "workdir": spec.workdir, "reference": spec.reference}
    variables = [f"{name}={value}" for name, value in spec.environment.items()]
    command = ["/usr/bin/env", *variables, *spec.command]
    volumes = (*spec.volumes, Volume(source="@OUTPUT@", target=OUTPUT, read_only=False))
    files = {name: text.format(**known) for name, text in row.files.items()}
    if row.bundle:
        files["config.json"] = json.dumps(_bundle(spec, command, volumes, config))
        words = [*row.head]
    else:
        words = [*row.head, *_volumes(row, volumes), *row.image]
        words = [word.format(**known) for word in words] + command

    def own(argv: Argv | list[str]) -> list[str]:
        return [site.program if site.program and word == site.runtime else word for word in argv]

    return {
        "name": spec.name,
        "image": spec.image,
        "source": row.source,
        "scratch": site.storage.scratch,
        "folders": [volume.source for volume in spec.volumes if not volume.read_only],
        "files": files,
        "prepare": [own(argv) for argv in row.prepare],
        "argv": own(words),
        "cleanup": [own(argv) for argv in row.cleanup],
        "artifacts": spec.artifacts,
    }


def _volumes(row: Runtime, volumes: tuple[Volume, ...]) -> list[str]:
    words = []
    for volume in volumes if row.volume else ():
        *first, last = row.volume
        last = last.format(source=volume.source, target=volume.target)
        words += [*first, last + (row.read_only if volume.read_only else "")]
    return [row.joined + ",".join(words)] if row.joined else words


def _bundle(
    spec: JobSpec, command: list[str], volumes: tuple[Volume, ...], config: Mapping[str, Any]
) -> dict[str, Any]:
    """An OCI bundle's config.json (runtime-spec v1.0, config.md, config-linux.md)."""
    mounts = [
        ("/proc", "proc", "proc", ["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755"]),
        ("/dev/pts", "devpts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666"]),
        ("/dev/shm", "tmpfs", "shm", ["nosuid", "nodev", f"size={spec.shm_gb}g"]),  # noqa: S108
        ("/sys", "sysfs", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
    ]
    for volume in volumes:
        mode = "ro" if volume.read_only else "rw"
        mounts.append((volume.target, "bind", volume.source, ["rbind", mode]))
    kinds = ("bounding", "effective", "permitted")
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {
            "args": command,
            "cwd": spec.workdir,
            "env": [*config.get("Env", ()), "NVIDIA_VISIBLE_DEVICES=@CUDA@"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(kinds, _CAPABILITIES),
        },
        "mounts": [
            {"destination": target, "type": kind, "source": source, "options": options}
            for target, kind, source, options in mounts
        ],
        "linux": {
            "namespaces": [
                {"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")
            ]
        },
    }
