"""Over each link the ranks' parts add up to the layer of one rank, and no fault does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.conftest import Margin, Record
from tests.gpu.harness.device import ranks
from tests.gpu.links.conftest import GROUP, TIERS
from tests.gpu.links.link import LINKS, transports
from tests.gpu.numerics.conftest import each_backend
from tests.gpu.reference.marlin_reference import margin as share
from tests.gpu.tensor_parallel.shards import CELLS, Fault, due

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.links.sums import Summed

    Read = Callable[[str, str], Summed]

pytestmark = [pytest.mark.gpu, TIERS, pytest.mark.xdist_group(GROUP), pytest.mark.value(10, 10)]


@each_backend
@pytest.mark.parametrize("link", LINKS)
def test_ranks_add_up_to_one_rank(
    link: str, backend: str, summed: Read, margin: Margin, record: Record
) -> None:
    found = summed(link, backend)
    record(transports=sorted(transports(found.log)))
    for routed in CELLS:
        over = share(found.sums[f"{routed}-NONE"], due(routed, backend, ranks()))
        margin(f"sum of ranks, {routed}", over, 1)


@each_backend
@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.NONE])
@pytest.mark.parametrize("link", LINKS)
def test_a_fault_of_a_rank_is_found(
    link: str, fault: Fault, backend: str, summed: Read, record: Record
) -> None:
    sums = summed(link, backend).sums
    over = {
        routed: share(sums[f"{routed}-{fault.name}"], due(routed, backend, ranks()))
        for routed in CELLS
    }
    record(share_of_bound=over)
    assert min(over.values()) > 1


@each_backend
@pytest.mark.parametrize("link", ["pcie"])
def test_sums_cross_the_hosts_memory_alone(link: str, backend: str, summed: Read) -> None:
    assert transports(summed(link, backend).log) == {LINKS[link].transport}
