"""Which launches are made: sizes of DeepSeek-V4's experts, and the partition that each forces.

A launch with fewer tiles than thread blocks is cut along K everywhere; one with more computes whole
tiles first and cuts the rest, with or without one more round of tiles (vllm-project/vllm#24722). A
test that makes only one kind of launch says nothing of the others. One token per request, as with
one user, is the first kind; a few users are the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.gpu.reference.marlin_kernel import LARGE_BATCH, SMALL_BATCH, Kernel, ThreadConfig
from tests.gpu.reference.marlin_reference import Routing, route, spread
from tests.gpu.reference.marlin_schedule import Launch, schedule
from tests.gpu.reference.marlin_weights import WeightFormat

SMALL, LARGE = SMALL_BATCH[0], LARGE_BATCH[0]  # 128 x 128 and 64 x 256


class Regime(Enum):
    """How the tiles of a launch are cut."""

    SPLIT = "all tiles are cut along K"
    TWO_TILE = "whole tiles, then the rest and one round more in stripes"
    REST = "whole tiles, then the rest in stripes"
    WHOLE = "no tile is in two parts"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A launch.

    Attributes:
        tokens: rows of activations.
        block: ``moe_block_size``.
        router: whether the op multiplies with router weights, as the second GEMM does.
        config: the thread block's tile; None is the op's own choice.
        blocks_per_sm: with a config.
        regime: wanted; the number of experts hit is chosen for it. None is any.
        hit: experts hit, where no regime is wanted.
    """

    name: str
    size_n: int
    size_k: int
    tokens: int
    top_k: int = 1
    block: int = 8
    router: bool = False
    config: ThreadConfig | None = SMALL
    blocks_per_sm: int = 1
    regime: Regime | None = None
    hit: int = 1

    def experts(self, form: WeightFormat, sms: int) -> int:
        """Experts hit: the most for which the launch is of the regime.

        Raises:
            ValueError: for none it is.
        """
        if self.regime is None:
            return self.hit
        rows = self.tokens * self.top_k
        for hit in range(rows, self.top_k - 1, -1):
            if regime_of(self.launch(form, sms, hit)) is self.regime:
                return hit
        raise ValueError(f"{self.name}: {self.regime.value}: no number of experts up to {rows}")

    def routing(self, hit: int) -> Routing:
        """The rows' experts."""
        return route(spread(self.tokens, self.top_k, hit), hit, self.block)

    def launch(self, form: WeightFormat, sms: int, hit: int) -> Launch:
        """The launch as the model of the scheduler has it; only with a config."""
        if self.config is None:
            raise ValueError(f"{self.name}: the op chooses, so the partition is not known")
        return Launch(
            kernel=Kernel(
                config=self.config,
                block=self.block,
                group_size=form.group,
                weight_bits=form.bits,
                scale_bytes=form.scale_bytes,
            ),
            size_n=self.size_n,
            size_k=self.size_k,
            tokens=self.routing(hit).padded,
            grid=sms * self.blocks_per_sm,
        )


def regime_of(launch: Launch) -> Regime:
    """How a launch is cut."""
    if parts_of(launch) == 1:
        return Regime.WHOLE
    if launch.tiles <= launch.grid:
        return Regime.SPLIT
    return Regime.TWO_TILE if launch.tiles % launch.grid * 3 <= launch.grid else Regime.REST


def parts_of(launch: Launch) -> int:
    """The most parts that a tile has."""
    return max(part.count for block in schedule(launch) for part in block)


# Sizes at tensor parallel 4: gate and up together, and down.
GATE_UP: dict[str, Any] = {"size_n": 1024, "size_k": 4096}
DOWN: dict[str, Any] = {"size_n": 4096, "size_k": 512}

CORE = (
    Cell(name="gate_up-split", **GATE_UP, tokens=2, top_k=6, regime=Regime.SPLIT),
    Cell(name="gate_up-two_tile", **GATE_UP, tokens=8, top_k=6, regime=Regime.TWO_TILE),
    Cell(name="down-rest", **DOWN, tokens=12, router=True, regime=Regime.REST),
)
# One expert: 8 tiles in as many parts as there are blocks for.
DEEP = Cell(name="gate_up-deep", **GATE_UP, tokens=8, hit=1)
MORE = (
    DEEP,
    Cell(name="gate_up-rest", **GATE_UP, tokens=8, top_k=6, regime=Regime.REST),
    Cell(name="down-two_tile", **DOWN, tokens=24, router=True, regime=Regime.TWO_TILE),
    Cell(name="gate_up-rows16", **GATE_UP, tokens=16, top_k=6, block=16, hit=8),
    Cell(name="gate_up-rows64", **GATE_UP, tokens=64, top_k=6, block=64, hit=8, config=LARGE),
    Cell(name="gate_up-as_served", **GATE_UP, tokens=8, top_k=6, hit=48, config=None),
    Cell(name="down-as_served", **DOWN, tokens=48, router=True, hit=48, config=None),
)
# One tile in 32 parts: so few blocks that two launches are resident at a time.
ONE_TILE = Cell(name="one_tile", size_n=128, size_k=4096, tokens=8, hit=1)
# Small enough for a tool that makes each access a hundred times slower.
SANITIZED = Cell(name="sanitized", size_n=256, size_k=2048, tokens=8, top_k=2, hit=4)
