"""Rows of nvidia-smi, with the fields that were asked."""

from __future__ import annotations

import pytest

from vllm_forge.host.gpus import BASIC, DETAILED, gpu_query, parse_gpus

ROW = "3, NVIDIA H200, 9.0, 580.159.04, 143771"


def test_fields_not_asked_have_their_defaults() -> None:
    (gpu,) = parse_gpus(f"{ROW}\n\n", BASIC)
    assert (gpu.index, gpu.name, gpu.capability, gpu.driver) == (
        3, "NVIDIA H200", "9.0", "580.159.04",
    )  # fmt: skip
    assert gpu.memory == 143771 << 20
    assert (gpu.uuid, gpu.mig, gpu.fabric) == ("", False, None)


@pytest.mark.parametrize(
    ("state", "fabric"),
    [
        ("N/A, N/A", None),
        ("Completed, Success", "ready"),
        ("Completed, Insufficient Resources", "Completed, Insufficient Resources"),
    ],
)
def test_fabric_is_ready_only_after_success(state: str, fabric: str | None) -> None:
    (gpu,) = parse_gpus(f"{ROW}, Enabled, {state}", DETAILED)
    assert (gpu.mig, gpu.fabric) == (True, fabric)


@pytest.mark.parametrize("row", ["No devices were found", f"{ROW}, more", ROW + " MiB"])
def test_unknown_row_is_rejected(row: str) -> None:
    with pytest.raises(ValueError, match=r"zip|int"):
        parse_gpus(row, BASIC)


def test_query_names_the_fields_in_order() -> None:
    assert gpu_query(("uuid", "name"))[1] == "--query-gpu=uuid,name"
