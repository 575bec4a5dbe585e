"""Tier rehearsal without a GPU: what it reads of a log, and its tests on a fake server."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.gpu.harness.limits import NotStartedError
from tests.gpu.rehearsal import checkpoint, measured
from tests.gpu.rehearsal.expected import ROWS, Expected
from tests.support.gpu_tier import Rows, run_tier
from tests.support.layouts import layout_config
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import RehearsalError
from vllm_forge.checkpoints.fixtures import full
from vllm_forge.cli import main
from vllm_forge.gputest import launch
from vllm_forge.gputest.launch import copy_code
from vllm_forge.matrix import load
from vllm_forge.receipts import verification
from vllm_forge.receipts.suite import MATRIX_ROWS

SUPPORT = Path(__file__).parents[2] / "support"
SKU = "h200"
PRESETS = MATRIX_ROWS["preset"](load(SUPPORT.parents[1]), SKU)
ARTIFACT = PRESETS[0]["artifacts"][0]
PLUGIN = """
import tests.gpu.conftest as suite
from tests.gpu.rehearsal import measured
suite.device = lambda: ({device!r}, {capability})
measured.FREED_S, measured.ENDED_S = 0.3, 0.3
"""


def test_start_of_a_real_server_is_read() -> None:
    log = (Path(__file__).parents[2] / "fixtures/bootlogs/dsv4-mtp-h200.txt").read_text()
    assert measured.start_facts(log) == {
        "load_s": [0.05, 0.03], "weights_gib": [0.14], "init_s": [25.15],
        "kv_cache_tokens": [113290], "max_model_len": [1024], "concurrency": [110.64],
    }  # fmt: skip


def test_declared_rates_are_those_of_whole_drafts() -> None:
    preset = ["--max-num-seqs=8", '--speculative-config={"num_speculative_tokens": 2}']
    first, second = measured.synthetic(preset, 0.5)
    assert first == preset[0]
    assert json.loads(second.partition("=")[2]) == {
        "num_speculative_tokens": 2, "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [0.5, 0.25],
    }  # fmt: skip
    assert measured.synthetic(preset[:1], 0.5) == preset[:1]


def test_expected_answers_are_those_of_a_plain_computation(tmp_path: Path) -> None:
    assert ROWS == full.ROWS
    checkpoint.make(write_recipe(tmp_path / "recipe"), tmp_path / "made")
    expected = Expected(tmp_path / "made")
    tensors = Checkpoint.open(tmp_path / "made").tensors
    rows = {}
    for name in ("embed", "norm", "head"):
        data = np.frombuffer(tensors[f"{name}.weight"].read(), "<u2").astype("<u4") << np.uint32(16)
        rows[name] = data.view("<f4").reshape(tensors[f"{name}.weight"].shape).astype(float)
    hidden = rows["embed"][1234]
    logits = rows["head"] @ (hidden / np.sqrt((hidden**2).mean()) * rows["norm"])
    assert len(logits) == ROWS + 64
    likely = logits - np.log(np.exp(logits).sum())
    assert np.allclose(expected.log_probabilities(1234), likely[:ROWS], atol=1e-5)
    # What is tested of a server can be told apart: the second is less likely by more than that.
    best = [np.sort(expected.log_probabilities(token))[-2:] for token in range(1000, 1040)]
    assert np.median([second - first for first, second in best]) > 0.1


def test_compiled_files_are_counted_by_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(measured.CACHES, raising=False)
    assert measured.compiled_files() == {}
    for name in ("vllm/a/b", "triton/c"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "caches.json").touch()
    monkeypatch.setenv(measured.CACHES, str(tmp_path / "vllm"))
    assert measured.compiled_files() == {"triton": 1, "vllm": 1}


def test_speed_is_that_of_an_attempt_that_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not counted; a file that comes later makes another one not count."""
    asked: list[tuple[int, ...]] = []

    def complete(prompt: list[int], tokens: int) -> list[int]:
        if len(asked) < files:
            (tmp_path / "tilelang" / str(len(asked))).touch()
        asked.append(tuple(prompt))
        return [1] * tokens

    (tmp_path / "tilelang").mkdir()
    monkeypatch.setenv(measured.CACHES, str(tmp_path / "vllm"))
    server: Any = SimpleNamespace(complete=complete)
    files = 2 * measured.ROUNDS + 1
    assert measured.speed(server, 1)["not_counted"] == 3
    assert len(asked) == len(set(asked)) == 4 * measured.ROUNDS
    files = 10_000
    with pytest.raises(AssertionError, match="compiled in 8 attempts of 1 clients"):
        measured.speed(server, 1)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the suite runs from, with a vLLM that has no model and a driver without a GPU."""
    folder = tmp_path_factory.mktemp("bundle")
    copy_code(SUPPORT.parents[1], folder)
    cli = folder / "fake/vllm/entrypoints/cli"
    cli.mkdir(parents=True)
    shutil.copyfile(SUPPORT / "fake_rehearsal.py", cli / "main.py")
    smi = folder / "fake/nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '91000\\n91001\\n'\n")
    smi.chmod(0o755)
    row = load(SUPPORT.parents[1]).sku[SKU]
    capability = tuple(map(int, row.compute_capability.split(".")))
    text = PLUGIN.format(device=row.device, capability=capability)
    (folder / "fake/fake_gpu.py").write_text(text)
    return folder


def write_recipe(folder: Path, *faults: str) -> Path:
    """Of a small model with as many tokens as a prompt may have, and some more."""
    config = layout_config("card") | {"vocab_size": ROWS + 64, "faults": faults}
    full.write_recipe(full.make_recipe(ARTIFACT, config, 1), folder)
    return folder


def run(code: Path, output: Path, *faults: str) -> Rows:
    """Run the tier's tests; name -> its row."""
    shutil.rmtree(code / "checkpoints", ignore_errors=True)
    (code / "checkpoints").mkdir()
    write_recipe(code / "checkpoints" / ARTIFACT, *faults)
    return run_tier("rehearsal", code, output, PRESETS)


def test_sound_server_is_green_and_measured(code: Path, tmp_path: Path) -> None:
    rows = run(code, tmp_path)
    assert {row["outcome"] for row in rows.values()} == {"passed"}, rows
    assert {row["facts"]["preset"] for row in rows.values()} == {f"{SKU}-mtp", f"{SKU}-plain"}
    start = rows["test_start_is_measured[plain]"]["facts"]
    assert (start["weights_gib"], start["graphs_gib"]) == ([84.21], [1.35])
    assert start["used_mib"] == [91000, 91001]
    for together in (1, 4, 16):
        facts = rows[f"test_speed_is_measured[mtp-{together}]"]["facts"]
        assert (facts["together"], facts["tokens_per_s"] > 0) == (together, True)
    drafts = rows["test_drafts_are_accepted_at_the_declared_rate[mtp]"]["facts"]
    assert drafts["declared"] == 0.8
    # The marks of the artifact that a preset counts as run with are nowhere.
    assert not [name for name, row in rows.items() if row["facts"].keys() & {"identity"}]


def test_faults_are_red_where_they_belong(code: Path, tmp_path: Path) -> None:
    rows = run(code, tmp_path, "silent", "context", "leak", "immortal", "rejects", "unlikely")
    found = {name for name, row in rows.items() if row["outcome"] == "failed"}
    assert found == {
        "test_drafts_are_accepted_at_the_declared_rate[mtp]",
        *(
            f"test_{name}[{kind}]"
            for kind in ("plain", "mtp")
            for name in (
                "start_is_measured", "answers_are_those_of_embedding_and_head",
                "next_token_follows_from_the_last_one_alone",
                "client_that_vanishes_frees_its_place",
                "killed_worker_ends_the_server_with_its_reason",
            )
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "values", [[math.nan] * 3, [-1.0, -1.5, -1.0]], ids=["not finite", "not twice"]
)
def test_answers_that_change_are_red(values: list[float]) -> None:
    def post(_: str, body: dict[str, Any]) -> dict[str, Any]:
        choice = {"token_ids": [body["prompt"][0]], "logprobs": {"token_logprobs": [values.pop()]}}
        return {"choices": [choice]}

    server: Any = SimpleNamespace(post=post)
    with pytest.raises(AssertionError):
        measured.require_same_twice(server, [7, 8])
    assert values == []


def test_missing_recipe_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_FORGE_GPU_MATRIX", json.dumps({"preset": PRESETS}))
    with pytest.raises(pytest.skip.Exception, match=f"one of {ARTIFACT}"):
        checkpoint.find_recipe()


def test_checkpoint_that_cannot_be_made_is_undecided(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe")
    checkpoint.make(recipe, tmp_path / "made")
    assert len(list((tmp_path / "made").glob("model-*"))) == 1
    with pytest.raises(NotStartedError, match=r"was not made: .* exists already"):
        checkpoint.make(recipe, tmp_path / "made")


def test_command_brings_the_recipe_of_the_first_artifact(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def run_in_image(*_: object, args: list[str], inputs: dict[str, Path], **rest: Any) -> None:
        files = {place: sorted(path.name for path in at.iterdir()) for place, at in inputs.items()}
        seen.update(args=args, files=files, output=rest["output"].name)

    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr(full, "artifact_config", lambda _: layout_config("card"))
    monkeypatch.setattr(launch, "run_in_image", run_in_image)
    monkeypatch.setattr(verification, "make_receipt", lambda _, result, key: (result.name, key))
    assert main(["gpu", "rehearse", SKU, "--minutes=30", "--output=x"]) == 0
    assert seen == {
        "args": ["--tier=rehearsal", "--minutes=30.0"], "output": "x",
        "files": {f"checkpoints/{ARTIFACT}": [checkpoint.RECIPE, checkpoint.PROGRAM]},
    }  # fmt: skip
    assert capsys.readouterr().out == "('rehearsal.json', None)\n"
    assert main(["gpu", "rehearse", SKU, "--artifact=flash"]) == RehearsalError.exit_code
