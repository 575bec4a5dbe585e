"""A rehearsal of an artifact, loaded without its data by the default line's own vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.layouts import layout_config
from vllm_forge.checkpoints.fixtures.full import make_recipe, write_full
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.host import Runner
from vllm_forge.project import Project
from vllm_forge.proofs.environment import NAME, dry_load, ready

ROOT = Path(__file__).parents[2]
ARTIFACT = "flash-nvfp4-fp8-mtp"
ASKED = "VLLM_FORGE_DRY_LOAD"
HOW = (
    f"run it as root with {ASKED}=1, or at full size: nox -s forge -- checkpoint fixtures full "
    f"--artifact {ARTIFACT} DIR; nox -s forge -- checkpoint inspect --resolve vllm DIR"
)


def test_rehearsal_is_what_the_loader_of_vllm_expects(tmp_path: Path) -> None:
    project = Project(ROOT)
    line = project.matrix.default_line
    why = ready(project, line) if ASKED in os.environ else "a dry load takes a minute"
    if why:
        pytest.skip(f"{why}: {HOW}")
    write_full(make_recipe(ARTIFACT, layout_config("card"), 2), tmp_path / "made")
    profile = Profile.open(tmp_path / "made")
    answer = dry_load(project, line, {NAME: profile}, Runner())[NAME]
    for load in (answer.target, *answer.drafts.values()):
        assert load.error is None
        assert load.read > 0
    assert set(answer.drafts) == {"mtp"}
