"""What takes hours: the full artifact, ten million launches, a million known tokens.

One thing at a time has the GPU: the artifact's server takes nearly all of its memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import TOGETHER
from tests.gpu.harness.device import NAMED, visible
from tests.gpu.harness.identity import identity
from tests.gpu.harness.server import Server
from tests.gpu.race.conftest import Bench, op, tools
from tests.gpu.soak import artifact as full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from tests.gpu.race.repeat import Tools

__all__ = ["op", "tools"]
ROOT = Path(__file__).parents[3]
ANSWER_S = 3600
LAUNCHES = 10_000_000


@pytest.fixture(scope="module")
def artifact(pytestconfig: pytest.Config) -> Iterator[full.Artifact]:
    """The server of the largest preset that this host can serve; it ends with the module."""
    gpus = visible()
    chosen = full.choose(full.presets(), len(gpus), ROOT / "checkpoints")
    if isinstance(chosen, str):
        pytest.skip(chosen)
    preset, folder = chosen
    digest = identity(folder)
    together = pytestconfig.stash[TOGETHER]
    server = Server(
        model=folder,
        arguments=preset.arguments,
        log=together.logs / f"soak-{preset.name}.log",
        variables={**preset.env, NAMED: ",".join(gpus)},
        kind="artifact",
        answer_s=ANSWER_S,
    )
    with server:
        yield full.Artifact(
            server=server,
            preset=preset,
            workloads=ROOT / "workloads",
            vocabulary=full.vocabulary(folder),
            identity=digest,
        )


@pytest.fixture
def bench(request: pytest.FixtureRequest, op: Callable[..., torch.Tensor], tools: Tools) -> Bench:
    """All cells together launch so often that one in a million is seen."""
    from tests.gpu.race.repeat import Budget

    cells = sum("bench" in getattr(item, "fixturenames", ()) for item in request.session.items)
    return Bench(op=op, tools=tools, budget=Budget(seconds=0, launches=-(-LAUNCHES // cells)))
