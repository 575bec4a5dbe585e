"""What a build prints at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_forge.cli import _parser
from vllm_forge.commands.build import _next_command
from vllm_forge.commands.parsers import parse
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "nox -s build-sm103a -- --line 0.26 --load"),
        (
            ["--kernels", "--base=locked", "--output=a b"],
            "nox -s build-sm103a -- --line 0.26 --load --base=locked '--output=a b' --kernels",
        ),
        (["--load"], "nox -s serve -- --sku b300 --line 0.26 --preset b300-mtp"),
        (["--push=r/n:t"], "nox -s serve -- --sku b300 --line 0.26 --preset b300-mtp"),
    ],
)
def test_next_command_follows_from_what_was_done(
    root: Path, options: list[str], expected: str
) -> None:
    project = Project(root)
    args = parse(_parser(), ["build", "b300", *options])
    command = _next_command(project, project.cell("b300"), args)
    assert command == expected
    if command.startswith("nox -s serve"):
        parse(_parser(), command.removeprefix("nox -s ").replace(" -- ", " ").split())
