"""Benchmarks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.commands.parsers import LINE, Commands, command, group

if TYPE_CHECKING:
    import argparse

    from vllm_forge.project import Project


def register(choices: Commands) -> None:
    """Add this module's commands."""
    bench = group(choices, "bench", help="measure; results go to records/bench")
    one = command(bench, "build", build, LINE, help="time a full build and its parts")
    one.add_argument("--scratch", type=Path, help="parent of its folder (default: /var/tmp)")


def build(project: Project, args: argparse.Namespace) -> None:
    """Become the benchmark."""
    argv = [sys.executable, str(project.root / "benchmarks" / "build.py")]
    argv += [f"--line={args.line}"] if args.line else []
    argv += [f"--scratch={args.scratch}"] if args.scratch else []
    os.execv(sys.executable, argv)  # noqa: S606
