"""The HTTP server and its Prometheus counters, with requests that come and go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.harness.gate import Band, Traffic, judge
from tests.gpu.models import exact_mtp
from tests.gpu.mtp.conftest import MARKS
from tests.gpu.mtp.engines import ALONE, CLIENTS, COUNTS, K, ServedOf, last

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record

pytestmark = [*MARKS, pytest.mark.value(9, 10)]


@pytest.mark.engines("serve-mtp")
def test_counters_of_concurrent_requests(served: ServedOf, margin: Margin, record: Record) -> None:
    found = served("serve-mtp")
    assert found.before is not None
    assert found.after is not None
    change = found.after.since(found.before)
    sums = [exact_mtp.expected("fraction", last(n), COUNTS[n], K) for n in range(CLIENTS)]
    assert found.together == [list(counts.tokens) for counts in sums]
    slack = exact_mtp.allowance(CLIENTS)
    margin("drafts", abs(change.drafts - sum(c.drafts for c in sums)), slack)
    margin("accepted", abs(change.accepted - sum(c.accepted for c in sums)), K * slack)
    rate = sum(c.accepted for c in sums) / sum(c.draft_tokens for c in sums)
    verdict = judge(
        change,
        Traffic(requests=CLIENTS, tokens=sum(COUNTS)),
        Band(sku="any", workload="exact", k=K, low=rate - 0.02, high=rate + 0.02),
    )
    record(acceptance=verdict.rate, computed=rate)
    assert verdict.passed, verdict.problems


@pytest.mark.engines("serve-plain")
def test_server_without_speculation_exports_nothing(served: ServedOf) -> None:
    found = served("serve-plain")
    assert found.alone == exact_mtp.orbit(last(0), ALONE)
    assert found.before is None
