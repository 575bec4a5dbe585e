"""Running a preset: only where an engine and enough GPUs are; then the engine takes over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.host import which
from vllm_forge.host.errors import ToolMissingError
from vllm_forge.serve.command import ENGINES, Command, Engine
from vllm_forge.serve.errors import NoGpuError

if TYPE_CHECKING:
    from vllm_forge.host import Probe
    from vllm_forge.serve.presets import Serving


def running_engine(probe: Probe, wanted: Engine | None) -> Engine:
    """The engine that was asked for, else the first one that answers.

    Raises:
        NoGpuError: none does.
    """
    engines = ENGINES if wanted is None else (wanted,)
    for engine in engines:
        if probe.ask(engine, [engine, "info"]).code == 0:
            return engine
    raise NoGpuError(
        f"no container engine answers: asked {' and '.join(engines)}",
        remedy="start one; or take the command of --print elsewhere",
    )


def require_gpus(probe: Probe, item: Serving) -> None:
    """Are there as many GPUs as the preset spreads a replica over?

    Raises:
        NoGpuError: there are fewer, or none.
    """
    reply = probe.ask("nvidia-smi-list", ["nvidia-smi", "-L"])
    found = 0 if reply.code else sum(line.startswith("GPU ") for line in reply.text.splitlines())
    need = item.preset.tensor_parallel
    if found < need:
        raise NoGpuError(
            f"preset {item.preset_name} needs {need} GPUs, and this host has {found or 'none'}",
            where="nvidia-smi -L",
            remedy=(
                f"nox -s doctor -- --sku {item.cell.sku_name} says what is missing; "
                "--print prints the command for another host"
            ),
        )


def become(command: Command) -> NoReturn:
    """Replace this process by the command, so that signals and its exit code are its own.

    Raises:
        ToolMissingError: the program is not installed.
    """
    program = which(command.argv[0])
    if program is None:
        raise ToolMissingError(f"{command.argv[0]} is not installed", where=command.text())
    os.execve(program, list(command.argv), {**os.environ, **command.env})  # noqa: S606
