"""Jobs on a real Slurm: each fault has its verdict, nothing is lost, nothing is counted twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.receipts.verification import read_receipts

if TYPE_CHECKING:
    from tests.dispatch.conftest import Lab


def test_a_matrix_comes_back_as_signed_receipts(lab: Lab) -> None:
    out = lab.dispatch(
        lab.site(), "--skus=b300,rtxpro6000", "--tiers=kernel,server,tp2", "--lines=0.22,0.26",
        "--wait", f"--key={lab.key}",
    )
    print(out)
    receipts = read_receipts(lab.project)
    assert not receipts.refused
