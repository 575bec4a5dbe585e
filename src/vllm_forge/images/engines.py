"""Which engine builds: the one asked for, else the one that is here."""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Callable

from vllm_forge.errors import UsageError
from vllm_forge.host import which
from vllm_forge.images.buildah import Buildah
from vllm_forge.images.buildx import Buildx
from vllm_forge.images.engine import INSTALL, Engine, require
from vllm_forge.images.errors import EngineMissingError

ENGINES: dict[str, Callable[[], Engine]] = {"docker": Buildx, "buildah": Buildah}


def choose_engine(wanted: str | None, *, dry_run: bool = False) -> Engine:
    """An engine whose tools are installed.

    Args:
        wanted: its name, or None for the first that is here.
        dry_run: nothing need be installed.

    Raises:
        UsageError: no such engine.
        EngineMissingError: with the line that installs one.
    """
    if wanted is not None and wanted not in ENGINES:
        near = difflib.get_close_matches(wanted, ENGINES, n=1)
        hint = f"Perhaps you meant {near[0]!r}?" if near else f"Known: {', '.join(ENGINES)}."
        raise UsageError(f"no engine {wanted!r}. {hint}")
    if wanted is None:
        present = [name for name in ENGINES if _present(name)]
        if not present and not dry_run:
            raise EngineMissingError(
                "no container engine is installed: neither docker with buildx and a daemon, nor "
                "buildah",
                remedy=f"run: {INSTALL}   or build with --provision, which does that",
            )
        wanted = present[0] if present else Buildah.name
    engine = ENGINES[wanted]()
    if not dry_run:
        for tool in engine.tools:
            require(tool, engine.name)
    return engine


def _present(name: str) -> bool:
    if name == Buildx.name:  # a client alone does not build
        return which("docker") is not None and all(
            subprocess.run(argv, capture_output=True, check=False).returncode == 0
            for argv in (["docker", "buildx", "version"], ["docker", "info"])
        )
    return all(which(tool) is not None for tool in Buildah.tools)
