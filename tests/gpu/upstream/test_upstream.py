"""What vLLM's own tests say of the image: nothing that passes as published is lost by a patch."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.conftest import TOGETHER, Record, why_not
from tests.gpu.together import FOLDER
from tests.gpu.upstream.compare import ROWS, TREES, judge, lay_published, run

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("upstream")]


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest) -> Any:
    """What a run said; the first that is asked for begins all, side by side."""
    together = request.config.stash[TOGETHER]
    logs = Path(os.environ.get(FOLDER) or together.work)
    trees = lay_published(together.work)
    for item in request.session.items:
        if isinstance(item, pytest.Function) and "said" in item.fixturenames and not why_not(item):
            about = str(item.callspec.params["about"])
            for tree, path in trees.items():
                call = partial(run, about, path, logs / f"{about}-{tree}.log")
                together.add(f"{about}, {tree}", 1, call, "upstream")
    return together.result


@pytest.mark.parametrize(
    "about",
    [
        pytest.param(name, marks=[getattr(pytest.mark, gpu) for gpu in row.get("gpus", ())])
        for name, row in ROWS.items()
    ],
)
def test_nothing_is_lost(about: str, said: Any, record: Record) -> None:
    record(**judge(*(said(f"{about}, {tree}") for tree in TREES)))
