"""The recipe that the run brought, and the checkpoint that is made of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.harness.limits import NotStartedError
from tests.gpu.soak.artifact import presets

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
# What `checkpoint fixtures full --recipe` writes.
RECIPE, PROGRAM = "recipe.json.gz", "sparse.py"


def find_recipe() -> Path:
    """The recipe of an artifact that a preset of the SKU serves; skips without one."""
    artifacts = dict.fromkeys(name for preset in presets() for name in preset.artifacts)
    folders = [CHECKPOINTS / name for name in artifacts]
    recipe = next((folder for folder in folders if (folder / RECIPE).is_file()), None)
    if recipe is None:
        pytest.skip(
            "no recipe: `checkpoint fixtures full --artifact NAME DIR --recipe` makes one of "
            f"{', '.join(artifacts)}; --checkpoint NAME=DIR brings it"
        )
    return recipe


def make(recipe: Path, target: Path) -> None:
    """Write the checkpoint of a recipe.

    Raises:
        NotStartedError: it cannot be written here, which says nothing of a server.
    """
    argv = [sys.executable, str(recipe / PROGRAM), str(recipe / RECIPE), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotStartedError(f"the checkpoint was not made: {done.stderr.strip()[-500:]}")
