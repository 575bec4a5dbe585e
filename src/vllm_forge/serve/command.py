"""From a preset to one command line, for a container engine or for a plain shell."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vllm_forge.host import gpu_container
from vllm_forge.matrix import serve_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.matrix import Matrix
    from vllm_forge.serve.presets import Serving

Engine = Literal["docker", "podman"]
ENGINES: tuple[Engine, ...] = ("docker", "podman")
# Holds the hub's downloads and what the JIT compilers make.
VOLUME = "vllm-forge-cache"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program with its arguments, and what is set in its environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The command as it is pasted into a POSIX shell, one option a line."""
        start = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        head, *options = _pairs(self.argv)
        return " \\\n    ".join([" ".join([*start, head]), *options])


def bare_command(matrix: Matrix, item: Serving) -> Command:
    """``vllm serve`` as typed in the image, or where the line's patched vLLM is installed.

    The SKU's environment is part of it, which the image has set already.
    """
    args, env = serve_arguments(matrix, item.preset_name)
    return Command(
        argv=("vllm", "serve", item.artifact.repo, *args), env={**item.cell.sku.env, **env}
    )


def image_name(item: Serving, digest: str | None) -> str:
    """The image by its digest; by its tag, as a build names it, where there is none yet."""
    name = f"localhost/{item.cell.name}"
    return f"{name}:{item.cell.line_name}" if digest is None else f"{name}@{digest}"


def container_command(
    matrix: Matrix, item: Serving, *, engine: Engine = "docker", digest: str | None = None
) -> Command:
    """The run of the SKU's image; its entrypoint is ``vllm serve``.

    All workers are in one container, so it needs no IPC namespace of the host's, but a
    /dev/shm of its own that is large enough.
    """
    args, env = serve_arguments(matrix, item.preset_name)
    settings = matrix.container
    options = [
        "--ipc=private", f"--shm-size={settings.shm_gb}g",
        *(f"--ulimit={limit}" for limit in settings.ulimits),
        f"--publish={settings.port}:{settings.port}",
        f"--volume={VOLUME}:/cache",
        *(f"--env={name}={value}" for name, value in sorted(env.items())),
    ]  # fmt: skip
    command = [item.artifact.repo, f"--port={settings.port}", *args]
    gpus = item.preset.tensor_parallel
    argv = gpu_container(engine, gpus, options, image_name(item, digest), command)
    return Command(argv=tuple(argv))


def _pairs(argv: Sequence[str]) -> list[str]:
    """Words up to the first option in one line, then an option or a name a line."""
    first = next((place for place, word in enumerate(argv) if word.startswith("--")), len(argv))
    return [shlex.join(argv[:first]), *(shlex.quote(word) for word in argv[first:])]
