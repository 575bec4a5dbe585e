"""Tier edges without a GPU: what is foretold, and its tests on a fake server."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu.edges import rows
from tests.gpu.edges.load import batches, errors
from tests.gpu.rehearsal.expected import ROWS as TOKENS
from tests.support.fake_torch import UNLIMITED
from tests.support.gpu_tier import Rows, run_tier
from tests.support.layouts import layout_config
from vllm_forge.checkpoints.fixtures import full
from vllm_forge.errors import UsageError
from vllm_forge.gputest.launch import copy_code
from vllm_forge.host.files import GIB
from vllm_forge.kernels.selection.questions import artifact_config
from vllm_forge.matrix import flags, load
from vllm_forge.project import Project
from vllm_forge.receipts.suite import MATRIX_ROWS
from vllm_forge.serve.deployment import Deployment, find_deployment, recorded_rows
from vllm_forge.serve.memory import memory_of
from vllm_forge.serve.rules import (
    LintCase,
    drafter_takes_k,
    graphs_cover_decode,
    tensor_parallel_divides,
)

SUPPORT = Path(__file__).parents[2] / "support"
SKU, LINE, CARD_SKU = "h200", "0.26", "rtxpro6000"
PLUGIN = """
import tests.gpu.conftest as suite
from tests.gpu.edges.rows import SOAK
from tests.gpu.rehearsal import measured
suite.device = lambda: ({device!r}, {capability})
SOAK |= {{"seconds": 0.7, "clients": 8, "pending": 4, "growth": {{"gpu": 1024, "host": 64}}}}
measured.FREED_S, measured.ENDED_S = {wait}, {wait}
"""


@pytest.fixture(scope="module")
def card() -> Deployment:
    project = Project(SUPPORT.parents[1])
    cell = project.cell(CARD_SKU, LINE)
    return find_deployment(project.matrix, cell, rows.CARD["preset"], rows.CARD["artifact"])


@pytest.fixture(scope="module")
def case(card: Deployment) -> LintCase:
    answer = card.recorded(recorded_rows(Project(SUPPORT.parents[1]), LINE))
    assert answer is not None
    config = artifact_config(card.artifact_name)
    return LintCase(**vars(card), answer=answer, published={}, config=config)


def test_card_is_that_of_the_preset(card: Deployment, case: LintCase) -> None:
    found, utilization = flags.values(card.arguments), f"{flags.UTILIZATION}="
    assert [w for w in card.arguments if not w.startswith(utilization)] == rows.CARD["arguments"]
    assert float(found[flags.UTILIZATION]) == rows.SERVED.utilization
    assert card.matrix.memory_of(CARD_SKU) == rows.CARD["mib"] << 20
    graphs, engine, draft = case.answer.cuda_graphs, case.answer.engine, case.answer.draft
    assert graphs is not None
    assert engine is not None
    assert draft is not None
    assert list(graphs.capture_sizes) == rows.GRAPHS["sizes"]
    assert 3 * engine.max_num_seqs == rows.GRAPHS["sequences"]
    assert draft.speculative_tokens + 1 == rows.GRAPHS["tokens_per_sequence"]


@pytest.mark.parametrize("start", [rows.REFUSED, rows.SERVED], ids=lambda row: row.verdict)
def test_memory_is_foretold_by_doctor(start: rows.Start, card: Deployment, case: LintCase) -> None:
    memory = memory_of(
        artifact=card.artifact_name, release=card.cell.line.vllm, answer=case.answer,
        words=[*rows.CARD["arguments"], f"{flags.UTILIZATION}={start.utilization}"],
        total=rows.CARD["mib"] << 20,
    )  # fmt: skip
    assert memory is not None
    assert memory.kv_cache is not None
    assert memory.verdict == start.verdict
    assert (memory.verdict == "red") == bool(start.says)
    for size, said in (
        (memory.requested, start.requested_gib),
        (memory.weights, rows.CARD["weights_gib"]),
        (memory.kv_cache, rows.CARD["kv_cache_gib"]),
    ):
        assert round(size / GIB, 2) == said


def test_eager_batches_are_foretold_by_lint(case: LintCase) -> None:
    assert case.answer.engine is not None
    assert case.answer.cuda_graphs is not None
    assert list(graphs_cover_decode(case)) == []
    engine = case.answer.engine.model_copy(update={"max_num_seqs": rows.GRAPHS["sequences"]})
    graphs = case.answer.cuda_graphs.model_copy(update={"sizes": tuple(rows.GRAPHS["sizes"])})
    answer = case.answer.model_copy(update={"engine": engine, "cuda_graphs": graphs})
    ((what, _),) = graphs_cover_decode(replace(case, answer=answer))
    assert f"up to {max(rows.GRAPHS['sizes'])} tokens" in what
    assert f"= {rows.FULL_BATCH}: it runs eager" in what


@pytest.mark.parametrize("row", rows.REFUSALS, ids=lambda row: row.name)
def test_refusals_are_foretold(row: rows.Refusal, case: LintCase) -> None:
    if flags.UTILIZATION in row.arguments[0]:
        with pytest.raises(UsageError) as caught:
            flags.share(flags.values(row.arguments), 0.9)
        assert row.foretold in str(caught.value)
        return
    tokens = next((d.tokens for d in [flags.drafter(row.arguments)] if d), None)
    answer = case.answer
    if tokens:
        assert answer.draft is not None
        draft = answer.draft.model_copy(update={"speculative_tokens": tokens})
        answer = answer.model_copy(update={"draft": draft})
    changed = replace(
        case, answer=answer, flags=tuple(row.arguments), config={**case.config, **row.config}
    )
    found = [what for what, _ in (*tensor_parallel_divides(changed), *drafter_takes_k(changed))]
    if row.foretold:
        assert any(what.startswith(row.foretold) for what in found), found


def test_batches_and_errors_of_a_log_are_read() -> None:
    log = """(APIServer pid=1) INFO 11-30 15:00:00 [cuda_graph.py:116] **CUDAGraph Stats:**
INFO | Unpadded Tokens | Padded Tokens | Num Paddings | Runtime Mode | Count |
INFO |-----------------|---------------|--------------|--------------|-------|
INFO | 8               | 8             | 0            | FULL         | 90    |
INFO | 8               | 8             | 0            | FULL         | 6     |
INFO | 2048            | 2048          | 0            | NONE         | 3     |
(EngineCore pid=2) ERROR 11-30 15:49:14 [core.py:1332] EngineCore encountered a fatal error.
WARNING no ERRORS here
"""
    assert batches(log) == {(8, "FULL"): 96, (2048, "NONE"): 3}
    assert len(errors(log)) == 1


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the suite runs from, with a vLLM and a torch that have no GPU."""
    folder = tmp_path_factory.mktemp("bundle")
    copy_code(SUPPORT.parents[1], folder)
    cli, support = folder / "fake/vllm/entrypoints/cli", folder / "tests/support"
    for path in (cli, support):
        path.mkdir(parents=True)
    for source, target in (
        ("fake_edges", cli / "main.py"), ("fake_torch", folder / "fake/torch.py"),
        ("fake_rehearsal", support / "fake_rehearsal.py"), ("__init__", support / "__init__.py"),
    ):  # fmt: skip
        shutil.copyfile(SUPPORT / f"{source}.py", target)
    smi = folder / "fake/nvidia-smi"
    smi.write_text('#!/bin/sh\ncat "$(dirname "$0")/used"\n')
    smi.chmod(0o755)
    return folder


def run(code: Path, output: Path, *faults: str, only: str = "") -> Rows:
    """Run the tier's tests; name -> its row."""
    artifact, matrix = rows.CARD["artifact"], load(SUPPORT.parents[1])
    shutil.rmtree(code / "checkpoints", ignore_errors=True)
    config = layout_config("card") | {"vocab_size": TOKENS + 64, "faults": faults}
    full.write_recipe(full.make_recipe(artifact, config, 1), code / "checkpoints" / artifact)
    row = matrix.sku[SKU]
    capability = tuple(map(int, row.compute_capability.split(".")))
    text = PLUGIN.format(device=row.device, capability=capability, wait=1 if faults else 60)
    (code / "fake/fake_gpu.py").write_text(text)
    (code / "fake/used").write_text("91000\n")
    preset = MATRIX_ROWS["preset"](matrix, SKU)
    env = {UNLIMITED: "1"} if faults else {}
    return run_tier("edges", code, output, preset, only=only, env=env)


def test_sound_server_is_green_and_measured(code: Path, tmp_path: Path) -> None:
    found = run(code, tmp_path)
    assert {row["outcome"] for row in found.values()} == {"passed"}, found
    facts = [row["facts"] for row in found.values() if "edge" in row["facts"]]
    assert all(row["foretold"] and row["measured"] for row in facts)
    assert (
        "serves: 84.99 weights"
        in found["test_weights_within_the_utilization_are_served"]["facts"]["measured"]
    )


def test_faults_are_red_where_they_belong(code: Path, tmp_path: Path) -> None:
    found = run(
        code, tmp_path, "lenient", "fits", "lighter", "captured", "accepts", "errors", "drifts",
        "grows", "leak", "immortal",
    )  # fmt: skip
    names = {name for name, row in found.items() if row["outcome"] == "failed"}
    green = found.keys() - names
    assert green == {"test_weights_within_the_utilization_are_served"}


def test_card_without_room_is_red(code: Path, tmp_path: Path) -> None:
    found = run(code, tmp_path, "crowded", only="within_the_utilization")
    (row,) = (row for row in found.values() if row["outcome"] != "not run")
    assert row["outcome"] == "failed"
    assert rows.REFUSED.says in row["why"]
