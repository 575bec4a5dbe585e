"""From a deployment to a server's container, and to a command line or its start."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from pydantic import Field, model_validator

from vllm_forge.errors import UsageError
from vllm_forge.host import Probe, gpu_container, hash_of, read_plain, which
from vllm_forge.host.errors import ToolMissingError
from vllm_forge.host.probe import GPU_QUERY, Gpu
from vllm_forge.matrix import FrozenModel, ImageCell, Matrix, flags, serve_arguments
from vllm_forge.matrix.model import Container
from vllm_forge.serve.deployment import KEY, Deployment
from vllm_forge.serve.doctor import listed_gpus, whole_gpus
from vllm_forge.serve.errors import NoGpuError

Engine = Literal["docker", "podman"]
ENGINES: tuple[Engine, ...] = ("docker", "podman")
DOWNLOADS = "vllm-forge-downloads"  # the hub's, shared by all images: weights, no code
MODEL = "/model"  # where a local folder is mounted
MOST_KEY = 4096  # bytes
MOST_PORT = 65535
VISIBLE = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*(=[^\x00-\x1f\x7f]*)?$"
# Of docker/Dockerfile: podman ignores the health check of an OCI image
# (https://github.com/containers/podman/issues/18904).
HEALTH = ("--health-cmd=python -I /opt/vllm-forge/health.py", "--health-interval=30s",
          "--health-timeout=5s", "--health-start-period=30m")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program with its arguments, and what is set in its environment.

    ``secrets``: variable -> file with its value, which no command line shows.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    secrets: Mapping[str, Path] = field(default_factory=dict)

    def text(self) -> str:
        """The command for a POSIX shell, one option a line."""
        start = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        argv = self.argv
        first = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
        head = " ".join([*start, shlex.join(argv[:first])])
        for name, path in self.secrets.items():
            head = f"{secret(name, shlex.quote(str(path)))} && {head}"
        return " \\\n    ".join([head, *map(shlex.quote, argv[first:])])


def secret(name: str, path: str) -> str:
    """Shell that exports a file's content, and fails without it.

    vLLM serves everybody if its key is empty (0.26.0, entrypoints/openai/api_server.py:307).
    """
    return f'{name}="$(cat {path})" && export {name}="${{{name}:?empty}}"'


class ServeOptions(FrozenModel):
    """What a user says of the container; None: see `service_of`."""

    # Of the first replica, on the host.
    port: int | None = Field(default=None, ge=1, le=MOST_PORT, description=f"1 to {MOST_PORT}")
    image: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_./:@-]*$")] | None = Field(
        default=None, description="HOST/NAME:TAG or HOST/NAME@sha256:DIGEST"
    )
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$")] | None = Field(
        default=None, description="letters, digits, '_', '.' and '-', at most 63"
    )
    key: Path | None = None  # file with the API key
    detach: bool = False
    replica: int = Field(default=1, ge=1, le=64, description="1 to 64")
    gpu_ids: tuple[Annotated[str, Field(pattern=r"^([0-9]{1,3}|GPU-[0-9a-f-]{36})$")], ...] = Field(
        default=(), description="numbers, or UUIDs as nvidia-smi -L prints them"
    )
    env: tuple[Annotated[str, Field(pattern=VARIABLE)], ...] = Field(
        default=(), description="NAME or NAME=VALUE, without control characters"
    )

    @model_validator(mode="after")
    def _gpus_are_chosen_once(self) -> Self:
        if len(set(self.gpu_ids)) < len(self.gpu_ids):
            raise ValueError("gpu-ids: a GPU is given twice")
        # In the container the chosen GPUs are numbered from 0.
        if names := {text.partition("=")[0] for text in self.env} & set(VISIBLE):
            raise ValueError(f"env {min(names)}: choose GPUs by --gpu-ids")
        if not str(self.key or "").isprintable():  # it is printed
            raise ValueError("api-key-file: expected a path without control characters")
        return self


class Service(ServeOptions):
    """A server's container, in the words of no engine. Without ``gpu_ids``, the engine chooses."""

    title: str
    device: str  # the GPU's product
    command: tuple[str, ...]
    gpus: int
    settings: Container
    volumes: tuple[str, ...]  # source:target[:ro]

    @property
    def secrets(self) -> dict[str, Path]:
        return {} if self.key is None else {KEY: self.key}


def bare_command(deployment: Deployment) -> Command:
    """``vllm serve`` as typed in the image, or where the line's patched vLLM is installed.

    The SKU's environment is part of it, which the image has set already.
    """
    kept = deployment.inherited
    own = {name: text for name, text in deployment.environment.items() if name not in kept}
    return Command(
        argv=("vllm", "serve", *_model(deployment, str(deployment.model)), *deployment.arguments),
        env={**deployment.cell.sku.env, **own},
    )


def _model(deployment: Deployment, folder: str) -> list[str]:
    """The model's argument; a folder is served under the artifact's name, as clients ask for it."""
    repo = deployment.artifact.repo
    if deployment.model is None:
        return [repo]
    named = flags.NAME in flags.values(deployment.arguments)
    return [folder, *([] if named else [f"{flags.NAME}={repo}"])]


def service_of(
    deployment: Deployment, options: ServeOptions, *, digest: str | None = None
) -> Service:
    """The container of a deployment.

    All workers are in one, so it needs a large /dev/shm of its own rather than the host's IPC
    namespace. Replica N takes the Nth share of the GPUs and the Nth port from the first one's;
    volumes are shared: one holds weights, the other code that this very image compiled.
    """
    cell, settings = deployment.cell, deployment.matrix.container
    gpus, number = deployment.spread.gpus, options.replica
    ids = options.gpu_ids
    if not ids and number > 1:
        ids = tuple(str(index) for index in range((number - 1) * gpus, number * gpus))
    if ids and len(ids) != gpus:
        what = f"{len(ids)} GPUs are given, and {deployment.preset_name} needs {gpus}"
        raise UsageError(what, remedy=f"list {gpus} GPUs in --gpu-ids: {deployment.spread.text}")
    image = f"localhost/{cell.name}" + (f"@{digest}" if digest else f":{cell.line_name}")
    image = options.image or image
    # Compiled kernels and bytecode: code that only the image that made it may run.
    volume = image.partition("@sha256:")[2][:12] or f"{cell.sku_name}-{cell.line_name}"
    if options.image and "@sha256:" not in image:
        volume = hash_of(image)[:12]
    if (port := (options.port or settings.port) + number - 1) > MOST_PORT:
        raise UsageError(f"replica {number} has no port: {port} is above {MOST_PORT}")
    name = options.name or f"vllm-{deployment.preset_name}"
    _, variables = serve_arguments(deployment.matrix, deployment.preset_name)
    preset = [f"{name}={value}" for name, value in sorted(variables.items())]
    mounts = [] if deployment.model is None else [f"{deployment.model}:{MODEL}:ro"]
    chosen = {
        "image": image,
        "name": name if number == 1 else f"{name}-{number}",
        "port": port,
        "gpu_ids": ids,
        "env": (*preset, *deployment.env),
    }
    return Service(
        **{**dict(options), **chosen},
        title=f"{deployment.preset_name}, {deployment.artifact_name}, line {cell.line_name}",
        device=cell.sku.device,
        command=(*_model(deployment, MODEL), f"--port={settings.port}", *deployment.arguments),
        gpus=gpus,
        settings=settings,
        volumes=(f"vllm-forge-{volume}:/cache", f"{DOWNLOADS}:/cache/huggingface", *mounts),
    )


def container_command(service: Service, *, engine: Engine = "docker") -> Command:
    """The run of the container; the image's entrypoint is ``vllm serve``."""
    settings = service.settings
    options = [
        *(["--detach", "--restart=unless-stopped"] if service.detach else ["--rm"]),
        f"--name={service.name}", "--init", "--ipc=private", f"--shm-size={settings.shm_gb}g",
        *(f"--ulimit={limit}" for limit in settings.ulimits),
        f"--publish={service.port}:{settings.port}",
        *(f"--volume={volume}" for volume in service.volumes),
        *(HEALTH if engine == "podman" else ()),
        *(f"--env={variable}" for variable in (*service.env, *service.secrets)),
    ]  # fmt: skip
    gpus = service.gpu_ids or service.gpus
    argv = gpu_container(engine, gpus, options, str(service.image), service.command)
    return Command(argv=tuple(argv), secrets=service.secrets)


def plain_command(deployment: Deployment, digest: str | None) -> Command:
    """Docker's run without options of a user's own."""
    return container_command(service_of(deployment, ServeOptions(), digest=digest))


def running_engine(probe: Probe, engine: Engine | None) -> Engine:
    """The given engine, or the first one that answers; if none does, NoGpuError."""
    engines = ENGINES if engine is None else (engine,)
    for name in engines:
        if probe.ask(name, [name, "info"]).code == 0:
            return name
    what = f"no container engine answers: asked {' and '.join(engines)}"
    raise NoGpuError(what, remedy="start one; or take the command of --print elsewhere")


def choose_gpus(probe: Probe, deployment: Deployment, replica: int) -> tuple[str, ...]:
    """The GPUs of this host that a replica takes; empty where the engine's own choice is the same.

    For a number, an engine takes the first ones, whatever they are. NoGpuError if the
    host has too few for this replica and those before it.
    """
    gpus, error = listed_gpus(probe.ask("nvidia-smi", GPU_QUERY))
    fitting: Sequence[Gpu] = whole_gpus(gpus, deployment)
    need = deployment.spread.gpus
    if len(fitting) < need * replica:
        sku = deployment.cell.sku
        what = f"preset {deployment.preset_name} needs {need * replica} GPUs of compute capability "
        what += f"{sku.compute_capability} without MIG, this host has {len(fitting) or 'none'}"
        remedy = f"nox -s doctor -- --sku {deployment.cell.sku_name} says what is missing; "
        remedy += "--print prints the command for another host"
        raise NoGpuError(what, where=error or "nvidia-smi", remedy=remedy)
    chosen = tuple(str(gpu.index) for gpu in fitting[need * (replica - 1) : need * replica])
    return () if chosen == tuple(map(str, range(need))) else chosen


def become(command: Command) -> NoReturn:
    """Replace this process with the command, which then gets its signals and exit code."""
    program = which(command.argv[0])
    if program is None:
        raise ToolMissingError(f"{command.argv[0]} is not installed", where=command.text())
    secrets = {name: read_key(path) for name, path in command.secrets.items()}
    os.execve(program, list(command.argv), {**os.environ, **command.env, **secrets})  # noqa: S606


def read_key(path: Path) -> str:
    """An API key: the one line of a file."""
    try:
        key = read_plain(path, MOST_KEY).decode().strip()
    except ValueError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        what = f"invalid --api-key-file {path}: expected one line with a key"
        raise UsageError(what, remedy="write one, e.g. with: openssl rand -hex 32")
    return key


def build_session(matrix: Matrix, sku: str) -> str:
    """A SKU's session of noxfile.py: those that share an arch go by their own names."""
    arch = matrix.sku[sku].arch
    alone = [row.arch for row in matrix.sku.values()].count(arch) == 1
    return f"nox -s build-{arch.replace('_', '') if alone else sku}"


def build_command(matrix: Matrix, cell: ImageCell) -> str:
    """The command that builds the cell's image and loads it into the engine."""
    return f"{build_session(matrix, cell.sku_name)} -- --line {cell.line_name} --load"
