"""Rows of nvidia-smi, with the fields that were asked."""

from __future__ import annotations

import pytest

from vllm_forge.host.probe import GPU_QUERY, parse_gpus

ROW = "3, NVIDIA H200, 9.0, 580.159.04, 143771"
REST = "Disabled, N/A, N/A"


def test_row_is_read_in_the_order_of_the_query() -> None:
    (gpu,) = parse_gpus(f"{ROW}, {REST}\n\n")
    assert (gpu.index, gpu.name, gpu.capability, gpu.driver) == (
        3, "NVIDIA H200", "9.0", "580.159.04",
    )  # fmt: skip
    assert gpu.memory == 143771 << 20
    assert GPU_QUERY[1].startswith("--query-gpu=index,name,compute_cap,driver_version,memory.total")


@pytest.mark.parametrize(
    ("state", "fabric"),
    [
        ("N/A, N/A", None),
        ("Completed, Success", "ready"),
        ("Completed, Insufficient Resources", "Completed, Insufficient Resources"),
    ],
)
def test_fabric_is_ready_only_after_success(state: str, fabric: str | None) -> None:
    (gpu,) = parse_gpus(f"{ROW}, Enabled, {state}")
    assert (gpu.mig, gpu.fabric) == (True, fabric)


@pytest.mark.parametrize(
    "row", ["No devices were found", f"{ROW}, {REST}, more", f"{ROW} MiB, {REST}"]
)
def test_unknown_row_is_rejected(row: str) -> None:
    with pytest.raises(ValueError, match=r"unpack|int"):
        parse_gpus(row)
