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


@pytest.mark.parametrize("row", ["No devices were found", f"{ROW}, {REST}, more"])
def test_row_of_other_columns_is_rejected(row: str) -> None:
    with pytest.raises(ValueError, match="unpack"):
        parse_gpus(row)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (f"{ROW}, {REST}".replace("143771", "[N/A]"), ""),  # unified memory
        (f"{ROW}, {REST}".replace("143771", "143771 MiB"), ""),
        (f"{ROW}, {REST}".replace("143771", "[Unknown Error]"), "memory.total is [Unknown Error]"),
        (f"{ROW}, [GPU is lost], {REST[10:]}", "mig.mode.current is [GPU is lost]"),
    ],
)
def test_text_in_place_of_a_value_is_kept_as_a_fault(row: str, fault: str) -> None:
    (gpu,) = parse_gpus(row)
    assert gpu.fault == fault
    assert gpu.memory in (None, 143771 << 20)
