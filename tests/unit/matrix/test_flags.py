"""Flags of vLLM that serve reads itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vllm_forge.errors import UsageError
from vllm_forge.matrix import gpus_of, load
from vllm_forge.matrix.errors import MultiNodeError
from vllm_forge.matrix.flags import Drafter, Parallel, drafter, parallel, refuse_ours, values

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("words", "spread", "gpus"),
    [
        ([], Parallel(), 1),
        (["--tensor-parallel-size=4"], Parallel(tensor=4), 4),
        (["--tensor-parallel-size=4", "-tp", "2"], Parallel(tensor=2), 2),
        (["-tp=1", "--data-parallel-size", "4", "-ep"], Parallel(data=4), 4),
        (
            ["--tensor_parallel_size=2", "-pp", "2", "-dp=2"],
            Parallel(tensor=2, pipeline=2, data=2),
            8,
        ),
        (["--tensor-p=2", "--prefill-context-parallel-size=2"], Parallel(tensor=2, context=2), 4),
        (["--data-parallel-size=2", "--data-parallel-size-local=2"], Parallel(data=2), 2),
        (["--nnodes=1", "--decode-context-parallel-size=2"], Parallel(), 1),  # of TP's own ranks
    ],
)
def test_all_sizes_multiply(words: list[str], spread: Parallel, gpus: int) -> None:
    assert parallel(words) == spread
    assert parallel(words).gpus == gpus


MTP, DSPARK = Drafter(method="mtp", tokens=2), Drafter(method="dspark", tokens=5)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], None),
        (['--speculative-config={"method":"mtp","num_speculative_tokens":2}'], MTP),
        (["-sc", '{"method":"deepseek_mtp","num-speculative-tokens":2}'], MTP),
        (["--spec-method=dspark", "--spec-tokens", "5"], DSPARK),
        (['--spec-method=dspark', '--speculative_config={"num_speculative_tokens":5}'], DSPARK),
        (
            ["--speculative-config.method=dspark", "--speculative_config.num_speculative_tokens=5"],
            DSPARK,
        ),
        (["--speculative-c={}", "--spec-method=mtp"], Drafter(method="mtp", tokens=0)),
        (['-sc={"method":"mtp","num_speculative_tokens":"two"}'], Drafter(method="mtp", tokens=0)),
        (['-sc={"method":"ngram","num_speculative_tokens":2}'], None),
        (
            ['-sc={"method":"dspark","num_speculative_tokens":5}',
             '-sc={"method":"mtp","num_speculative_tokens":2}'],
            MTP,
        ),
    ],
)  # fmt: skip
def test_drafter_is_found_in_every_form(words: list[str], found: Drafter | None) -> None:
    assert drafter(words) == found


@pytest.mark.parametrize("text", ["mtp", "[1]", '{"method":', "3"])
def test_invalid_speculation_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected an object in JSON"):
        drafter([f"--speculative-config={text}"])


@pytest.mark.parametrize(
    "words",
    [
        ["--nnodes=2"], ["-n", "2"], ["--headless"], ["--data-parallel-address=10.0.0.1"],
        ["--data-parallel-size=4", "--data-parallel-size-local=2"], ["-dpl=1", "-dp=2"],
        ["--data-parallel-rank=0"], ["--master-addr=10.0.0.1"], ["--data_parallel_rpc_port=1"],
        ["--data-parallel-hybrid-lb"], ["-dpa", "10.0.0.1"],
    ],
)  # fmt: skip
def test_more_than_one_host_is_refused(words: list[str]) -> None:
    with pytest.raises(MultiNodeError, match="several hosts"):
        parallel(words)


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_invalid_size_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="--tensor-parallel-size"):
        parallel([f"--tensor-parallel-size={value}"])


def test_last_value_counts() -> None:
    found = values(["--max-model-len=8", "--max-model-len", "9", "--cudagraph-capture-sizes", "1",
                    "2", "--enforce-eager"])  # fmt: skip
    assert found == {
        "--max-model-len": "9",
        "--cudagraph-capture-sizes": "1 2",
        "--enforce-eager": "",
    }


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--port=1"], "before --"), (["--api-key", "x"], "--api-key-file"),
        (["--api_key=x"], "--api-key-file"), (["--config=f.yaml"], "cannot be judged"),
        (["some/model"], "--artifact or --model"),
    ],
)  # fmt: skip
def test_what_serve_sets_itself_is_refused(words: list[str], remedy: str) -> None:
    with pytest.raises(UsageError) as refused:
        refuse_ours(words)
    assert remedy in refused.value.remedy
    refuse_ours(["--max-model-len=1", '--speculative-config={\n"method": "mtp"}'])


def test_gpus_of_a_preset_are_all_of_its_sizes(root: Path) -> None:
    matrix = load(root)
    assert gpus_of(matrix, "b300-mtp") == 4
    row = matrix.preset["b300-mtp"]
    wide = row.model_copy(update={"flags": (*row.flags, "--data-parallel-size=2")})
    rows = {**matrix.preset, "b300-mtp": wide}
    assert gpus_of(matrix.model_copy(update={"preset": rows}), "b300-mtp") == 8
