"""Which tags a stage gives, by those that the registry has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_forge.project import Project
from vllm_forge.release.errors import TagTakenError
from vllm_forge.release.tags import Names, choose_names, previous_release, require_free

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_forge.matrix.model import Stage

MINE, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64
RELEASED = {"0.26.0-forge.1-b300": OTHER, "0.26-b300": OTHER, "0.26.0-forge.1-b300-rc1": OTHER}


@pytest.mark.parametrize(
    ("stage", "tags", "expected"),
    [
        ("dev", RELEASED, Names(moving="0.26-b300-dev")),
        ("candidate", {}, Names(fixed="0.26.0-forge.1-b300-rc1")),
        ("candidate", RELEASED, Names(fixed="0.26.0-forge.2-b300-rc1")),
        (
            "candidate",
            RELEASED | {"0.26.0-forge.2-b300-rc9": OTHER, "0.26.0-forge.2-b300-rc10": OTHER},
            Names(fixed="0.26.0-forge.2-b300-rc11"),
        ),
        (
            "candidate",
            RELEASED | {"0.26.0-forge.2-b300-rc1": MINE, "0.26.0-forge.2-b300-rc2": OTHER},
            Names(fixed="0.26.0-forge.2-b300-rc1"),
        ),
        ("release", {}, Names(fixed="0.26.0-forge.1-b300", moving="0.26-b300")),
        ("release", RELEASED, Names(fixed="0.26.0-forge.2-b300", moving="0.26-b300")),
        (
            "release",
            RELEASED | {"0.26.0-forge.2-b300": MINE},
            Names(fixed="0.26.0-forge.2-b300", moving="0.26-b300"),
        ),
        (
            "release",
            {"0.26.0-forge.1-b300": MINE, "0.26.0-forge.2-b300": OTHER},
            Names(fixed="0.26.0-forge.1-b300"),
        ),
        (
            "release",
            {
                "0.26.0-forge.7-b200": OTHER, "0.33.0-forge.7-b300": OTHER, "sha256-1": OTHER,
                "0.26.0-forge.07-b300": OTHER, "0.26.0-forge.7-b300-rc0": OTHER,
                "x0.26.0-forge.7-b300": OTHER, "0.26.0-forge.7-b300-x": OTHER,
            },
            Names(fixed="0.26.0-forge.1-b300", moving="0.26-b300"),
        ),
    ],
)  # fmt: skip
def test_names_follow_from_the_tags_of_the_registry(
    root: Path, stage: Stage, tags: dict[str, str], expected: Names
) -> None:
    cell = Project(root).cell("b300", "0.26")
    assert choose_names(cell, stage, MINE, tuple(tags), tags.get) == expected


def test_tag_of_another_image_is_refused() -> None:
    with pytest.raises(TagTakenError, match=f"v1 is {OTHER} already"):
        require_free("v1", MINE, OTHER)
    require_free("v1", MINE, MINE)
    require_free("v1", MINE, None)


@pytest.mark.parametrize(
    ("tag", "before"),
    [
        ("0.26.0-forge.10-b300", "0.26.0-forge.9-b300"),
        ("0.26.0-forge.1-b300", None),
        ("0.26.0-forge.2-b300-rc1", None),
        ("0.26-b300", None),
    ],
)
def test_release_before_has_the_number_before(tag: str, before: str | None) -> None:
    assert previous_release(tag) == before
