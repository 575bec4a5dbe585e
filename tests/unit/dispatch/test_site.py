"""The site file: what is wrong with it is said before anything else is done, by its row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.site import make_site
from vllm_forge.dispatch.errors import SiteFileError
from vllm_forge.dispatch.site import read_site
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('partition = "b300"', 'partitoin = "b300"',
         "unknown key slurm.sku.b300.partitoin (did you mean 'partition'?)"),
        ("[slurm.sku.b300]", "[slurm.sku.b30]",
         "slurm.sku.b30: not in matrix.toml (did you mean 'b300'?)"),
        ("[storage]", "[storgae]", "unknown key storgae (did you mean 'storage'?)"),
        ("flash-nvfp4-fp8-mtp", "flash-nvfp4-fp8-mpt",
         "checkpoints.flash-nvfp4-fp8-mpt: not in matrix.toml (did you mean 'flash-nvfp4"),
        ('"/shared/forge"', '"shared"', "storage.root"),
        ('account = "lab"', 'options = ["--mem=1; rm"]', "slurm.options.0"),
        ("schema_version = 1", "schema_version = 2", "schema_version"),
        ("schema_version = 1", "schema_version =", "invalid site file"),
    ],
)  # fmt: skip
def test_wrong_row_is_named(root: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(SiteFileError) as caught:
        make_site(tmp_path, Project(root), old, new)
    assert said in str(caught.value)
    assert str(tmp_path / "site.toml") in caught.value.where
    assert "site.schema.json" in caught.value.remedy


def test_missing_site_file_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteFileError, match="missing site file"):
        read_site(tmp_path / "site.toml", Project(root).matrix)
