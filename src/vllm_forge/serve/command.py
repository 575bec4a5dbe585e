"""From a deployment to one command line, for a container engine or a plain shell, and its start."""

import os
import shlex
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from vllm_forge.host import Probe, gpu_container, which
from vllm_forge.host.errors import ToolMissingError
from vllm_forge.matrix import ImageCell, serve_arguments
from vllm_forge.serve.deployment import Deployment
from vllm_forge.serve.errors import NoGpuError

Engine = Literal["docker", "podman"]
ENGINES: tuple[Engine, ...] = ("docker", "podman")
DOWNLOADS = "vllm-forge-downloads"  # the hub's, shared by all images: weights, no code


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program with its arguments, and what is set in its environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The command for a POSIX shell, one option a line."""
        start = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        argv = self.argv
        first = next((i for i, word in enumerate(argv) if word.startswith("--")), len(argv))
        head = " ".join([*start, shlex.join(argv[:first])])
        return " \\\n    ".join([head, *map(shlex.quote, argv[first:])])


def bare_command(deployment: Deployment) -> Command:
    """``vllm serve`` as typed in the image, or where the line's patched vLLM is installed.

    The SKU's environment is part of it, which the image has set already.
    """
    args, env = serve_arguments(deployment.matrix, deployment.preset_name)
    return Command(
        argv=("vllm", "serve", deployment.artifact.repo, *args),
        env={**deployment.cell.sku.env, **env},
    )


def container_command(
    deployment: Deployment, *, engine: Engine = "docker", digest: str | None = None
) -> Command:
    """The run of the SKU's image; its entrypoint is ``vllm serve``.

    All workers are in one container, so it needs a large /dev/shm of its own rather than the
    host's IPC namespace.
    """
    args, env = serve_arguments(deployment.matrix, deployment.preset_name)
    cell, settings = deployment.cell, deployment.matrix.container
    # Compiled kernels and bytecode: code that only the image that made it may run.
    volume = digest.partition(":")[2][:12] if digest else f"{cell.sku_name}-{cell.line_name}"
    options = [
        "--ipc=private", f"--shm-size={settings.shm_gb}g",
        *(f"--ulimit={limit}" for limit in settings.ulimits),
        f"--publish={settings.port}:{settings.port}",
        f"--volume=vllm-forge-{volume}:/cache",
        f"--volume={DOWNLOADS}:/cache/huggingface",
        *(f"--env={name}={value}" for name, value in sorted(env.items())),
    ]  # fmt: skip
    command = [deployment.artifact.repo, f"--port={settings.port}", *args]
    image = f"localhost/{cell.name}" + (f"@{digest}" if digest else f":{cell.line_name}")
    gpus = deployment.preset.tensor_parallel
    return Command(argv=tuple(gpu_container(engine, gpus, options, image, command)))


def running_engine(probe: Probe, engine: Engine | None) -> Engine:
    """The given engine, or the first one that answers; if none does, NoGpuError."""
    engines = ENGINES if engine is None else (engine,)
    for name in engines:
        if probe.ask(name, [name, "info"]).code == 0:
            return name
    what = f"no container engine answers: asked {' and '.join(engines)}"
    raise NoGpuError(what, remedy="start one; or take the command of --print elsewhere")


def require_gpus(probe: Probe, deployment: Deployment) -> None:
    """Raise NoGpuError if the host has fewer GPUs than a replica of the preset needs."""
    reply = probe.ask("nvidia-smi-list", ["nvidia-smi", "-L"])
    count = 0 if reply.code else sum(line.startswith("GPU ") for line in reply.text.splitlines())
    need = deployment.preset.tensor_parallel
    if count < need:
        what = f"preset {deployment.preset_name} needs {need} GPUs, this host has {count or 'none'}"
        remedy = (
            f"nox -s doctor -- --sku {deployment.cell.sku_name} says what is missing; "
            "--print prints the command for another host"
        )
        raise NoGpuError(what, where="nvidia-smi -L", remedy=remedy)


def become(command: Command) -> NoReturn:
    """Replace this process with the command, which then gets its signals and exit code."""
    program = which(command.argv[0])
    if program is None:
        raise ToolMissingError(f"{command.argv[0]} is not installed", where=command.text())
    os.execve(program, list(command.argv), {**os.environ, **command.env})  # noqa: S606


def build_command(cell: ImageCell) -> str:
    """The command that builds the cell's image and loads it into the engine."""
    line = f" --line {cell.line_name}"
    return f"nox -s build-{cell.sku.arch.replace('_', '')} --{line} --load"
