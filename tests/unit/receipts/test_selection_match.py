"""The recorded selection and what ran: they agree on an H200, and a difference is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.receipts import green_result, row
from vllm_forge.kernels.errors import SelectionFileError
from vllm_forge.matrix import load
from vllm_forge.receipts.errors import ReceiptContradictedError
from vllm_forge.receipts.receipt import Receipt, make_statement
from vllm_forge.receipts.verification import LAYOUTS, compare_kernels, require_selection

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def receipt(root: Path, tmp_path: Path) -> Receipt:
    """Of a run whose engines included the tiny DeepSeek-V4, with what an H200 took."""
    result = green_result(load(root), {"x": row()})
    result["configurations"] = {
        "dsv4": {
            "moe": ["NvFp4: MARLIN", "Unquantized: TRITON"],
            "linear": ["Fp8LinearMethod: FlashInferFp8DeepGEMMDynamicBlockScaledKernel"],
            "kv_cache": "fp8_ds_mla",
        }
    }
    return Receipt(path=tmp_path / "x.json", statement=make_statement(result), signatures=())


@pytest.fixture
def answer(root: Path, receipt: Receipt, tmp_path: Path) -> dict[str, Any]:
    """The recorded answer that it is compared with, in a copy that ``changed`` writes back."""
    detail = receipt.statement.detail
    target = tmp_path / "records/selection" / f"{detail.line}.json"
    target.parent.mkdir(parents=True)
    shutil.copyfile(root / "records/selection" / target.name, target)
    recorded = json.loads(target.read_text())
    name = f"grid/{detail.sku}/{next(iter(LAYOUTS.values()))}"
    (row,) = [row for row in recorded["rows"] if row["question"]["name"] == name]
    return {"file": target, "all": recorded, "row": row["answer"]}


def changed(answer: dict[str, Any]) -> Path:
    path: Path = answer["file"]
    path.write_text(json.dumps(answer["all"]))
    return path.parents[2]


def test_what_ran_matches_the_recorded_selection(root: Path, receipt: Receipt) -> None:
    rows = compare_kernels(root, receipt)
    assert {part for part, _, _ in rows} >= {"experts", "draft experts", "FP8 linear layers"}
    assert [row for row in rows if row[1] != row[2]] == []
    require_selection(root, receipt)


def test_another_backend_is_refused(receipt: Receipt, answer: dict[str, Any]) -> None:
    answer["row"]["moe"]["chosen"] = "EMULATION"
    with pytest.raises(ReceiptContradictedError, match=r"for experts .* recorded is EMULATION"):
        require_selection(changed(answer), receipt)


def test_another_linear_kernel_is_refused(receipt: Receipt, answer: dict[str, Any]) -> None:
    answer["row"]["linear"] = len(answer["all"]["shared"]["linear"])
    answer["all"]["shared"]["linear"].append({"chosen": "TritonFp8"})
    with pytest.raises(ReceiptContradictedError, match="recorded is TritonFp8"):
        require_selection(changed(answer), receipt)


def test_an_engine_without_a_recorded_selection_is_refused(
    receipt: Receipt, answer: dict[str, Any], tmp_path: Path
) -> None:
    answer["all"]["rows"] = [row for row in answer["all"]["rows"] if row["answer"] != answer["row"]]
    with pytest.raises(ReceiptContradictedError, match=r"ran, and grid/\S+ is not recorded"):
        compare_kernels(changed(answer), receipt)
    shutil.rmtree(tmp_path / "records")
    with pytest.raises(SelectionFileError):
        compare_kernels(tmp_path, receipt)


def test_an_engine_recorded_as_refused_cannot_have_run(
    receipt: Receipt, answer: dict[str, Any]
) -> None:
    answer["row"].clear()
    answer["row"]["refused"] = {"kind": "device", "message": "ValueError: no such kernel"}
    with pytest.raises(ReceiptContradictedError, match="is recorded as: ValueError"):
        compare_kernels(changed(answer), receipt)
