"""Tier soak without a GPU: which preset and prompts, and the tests themselves on a fake server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.harness import plugin
from tests.gpu.harness.errors import InputError
from tests.gpu.harness.gate import load_bands
from tests.gpu.harness.workloads import CHAT, RANDOM, ask_all, load_workloads, read_prompts
from tests.gpu.soak.artifact import Preset, bands, choose
from vllm_forge.gputest.launch import copy_code
from vllm_forge.matrix import load
from vllm_forge.receipts.suite import MATRIX_ROWS

FAKE = Path(__file__).parents[2] / "support" / "fake_serve.py"
WORKLOADS = load_workloads()
CHATS = [one for one in WORKLOADS.values() if one.endpoint == CHAT]
PRESET = Preset(
    name="small", artifacts=("a", "b"), tensor_parallel=2, speculative_tokens=1, arguments=(),
    env={},
)  # fmt: skip


def test_every_band_has_a_workload() -> None:
    assert {band.workload for band in load_bands()} <= set(WORKLOADS)


def test_a_chat_that_does_not_say_if_it_thinks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "workloads.toml"
    path.write_text('[x]\nendpoint = "chat"\ntokens = 1\ntogether = [1]\nprompts = ""\n')
    with pytest.raises(InputError, match="says whether it thinks"):
        load_workloads(path)


def test_a_sku_without_figures_is_recorded_and_not_judged_by_anothers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = load(root)
    rows = {"sku": MATRIX_ROWS["sku"](matrix, "")}
    monkeypatch.setenv("VLLM_FORGE_GPU_MATRIX", json.dumps(rows))
    found = bands()
    assert {band.sku for band in found} == set(matrix.sku)
    assert set(found.values()) == {row.arch.removesuffix("a") for row in matrix.sku.values()}
    published = load_bands()
    unpublished = [band for band in found if band not in published]
    assert unpublished
    assert {(band.low, band.high, band.k) for band in unpublished} == {(0, 1, 0)}
    assert not {band.sku for band in unpublished} & {band.sku for band in published}


def test_the_largest_preset_that_fits(tmp_path: Path) -> None:
    large = replace(PRESET, name="large", tensor_parallel=4)
    plain = replace(PRESET, name="plain", tensor_parallel=8, speculative_tokens=0)
    every = [plain, PRESET, large]
    assert choose(every, 8, tmp_path) == (
        "no artifact is there: --checkpoint NAME=DIR brings one of a, b"
    )
    (tmp_path / "b").mkdir()
    assert choose(every, 8, tmp_path) == (large, tmp_path / "b")
    assert choose(every, 3, tmp_path) == (PRESET, tmp_path / "b")
    assert choose(every, 1, tmp_path) == "the presets of this SKU need 2 GPUs, here are 1"
    assert "no preset with speculation" in choose([plain], 8, tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[]", '"text"', '{"prompt": "of another endpoint"}', ""], ids=str
)
def test_invalid_prompt_line(line: str, tmp_path: Path) -> None:
    (tmp_path / f"{CHATS[0].name}.jsonl").write_text(f'{{"messages": []}}\n{line}\n')
    with pytest.raises(InputError, match="line 2 is not a prompt"):
        read_prompts(CHATS[0], tmp_path, 100_000)


def test_workload_without_prompts_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_prompts(CHATS[0], tmp_path, 100_000)
    (tmp_path / f"{CHATS[0].name}.jsonl").touch()
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(CHATS[0], tmp_path, 100_000)


def test_random_prompts_repeat_and_are_ids_of_the_model(tmp_path: Path) -> None:
    (one, *_) = (row for row in WORKLOADS.values() if row.endpoint == RANDOM)
    bodies, digest = read_prompts(one, tmp_path, 2000)
    assert (bodies, digest) == read_prompts(one, tmp_path, 2000)
    assert len(bodies) == one.count
    assert all(len(body["prompt"]) == one.input for body in bodies)
    assert {token for body in bodies for token in body["prompt"]} == set(range(1000, 2000))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda one: one.name)
def test_what_is_asked(workload: Any, tmp_path: Path) -> None:
    key = "messages" if workload.endpoint == CHAT else "prompt"
    (tmp_path / f"{workload.name}.jsonl").write_text(f'{{"{key}": ["x"], "id": 7}}\n' * 3)
    sent = []

    def post(path: str, body: dict[str, Any]) -> Any:
        sent.append((path, body))
        choice = {"token_ids": [5], "prompt_token_ids": [4], "text": "a"}
        return {"choices": [choice | {"message": {"content": "b"}}], "prompt_token_ids": [3]}

    bodies, _ = read_prompts(workload, tmp_path, 2000)
    replies = ask_all(post, workload, bodies, 2)
    assert len(replies) == len(sent) == len(bodies)
    assert {(reply.prompt, reply.text) for reply in replies} == {
        ((3,), "b") if workload.endpoint == CHAT else ((4,), "a")
    }
    for path, body in sent:
        assert path.endswith("chat/completions") == (workload.endpoint == CHAT)
        assert body["temperature"] == 0
        assert body.get("chat_template_kwargs", {}).get("thinking") is workload.thinking
        assert "id" not in body


PLUGIN = """
import tests.gpu.conftest as suite
suite.device = lambda: ({device!r}, {capability})
"""


@pytest.fixture
def bundle(root: Path, tmp_path: Path) -> Path:
    """What the suite runs from, with a vLLM that has no model."""
    copy_code(root, tmp_path)
    cli = tmp_path / "fake/vllm/entrypoints/cli"
    cli.mkdir(parents=True)
    shutil.copyfile(FAKE, cli / "main.py")
    return tmp_path


def run(bundle: Path, root: Path, brought: str = "a", **config: Any) -> dict[str, Any]:
    """Run the artifact's tests for a SKU that has figures for k = 1; test -> its row."""
    matrix = load(root)
    ours = [band for band in load_bands() if band.k == 1]
    sku = ours[0].sku
    row = matrix.sku[sku]
    capability = tuple(int(part) for part in row.compute_capability.split("."))
    (bundle / "fake/fake_gpu.py").write_text(
        PLUGIN.format(device=row.device, capability=capability)
    )
    rates = {}
    (bundle / "workloads").mkdir()
    for band in ours:
        chat = WORKLOADS[band.workload].endpoint == CHAT
        rates[f"/v1/{'chat/' if chat else ''}completions"] = (band.low + band.high) / 2
        if chat:
            lines = '{"messages": [{"role": "user", "content": "?"}]}\n' * 2
            (bundle / "workloads" / f"{band.workload}.jsonl").write_text(lines)
    (bundle / "checkpoints" / brought).mkdir(parents=True)
    (bundle / "checkpoints" / brought / "config.json").write_text(
        json.dumps({"vocab_size": 5000, "rates": rates, **config})
    )
    shard = (2).to_bytes(8, "little") + b"{}"
    (bundle / "checkpoints" / brought / "model.safetensors").write_bytes(shard)
    preset = {
        "name": "small", "artifacts": ["a"], "tensor_parallel": 2, "speculative_tokens": 1,
        "arguments": [], "env": {},
    }  # fmt: skip
    results = bundle / "results.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "tests.gpu.harness.plugin",
            "-p", "fake_gpu",
            "-p", "no:cacheprovider", f"--rootdir={bundle}", "tests/gpu/soak/test_artifact.py",
        ],
        cwd=bundle,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (bundle, bundle / "src", bundle / "fake"))),
            "CUDA_VISIBLE_DEVICES": "0,1",
            plugin.RESULTS: str(results),
            "VLLM_FORGE_GPU_FOLDER": str(bundle),
            "VLLM_FORGE_GPU_MATRIX": json.dumps(
                {"sku": MATRIX_ROWS["sku"](matrix, sku), "preset": [preset]}
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert results.is_file(), done.stdout + done.stderr
    tests = json.loads(results.read_text())["tests"]
    assert {row["outcome"] for name, row in tests.items() if sku not in name} == {"other GPU"}
    return {name.rpartition("::")[2]: row for name, row in tests.items() if sku in name}


def test_an_artifact_that_drafts_as_published_is_green(bundle: Path, root: Path) -> None:
    found = run(bundle, root)
    assert {row["outcome"] for row in found.values()} == {"passed"}, found
    rates = [row["facts"] for name, row in found.items() if "acceptance" in name]
    assert all(row["preset"] == "small" and row["published"] for row in rates)
    assert all(row["interval"][0] < row["acceptance"] < row["interval"][1] for row in rates)


def test_a_server_without_counters_is_red(bundle: Path, root: Path) -> None:
    found = run(bundle, root, silent=True)
    reds = {name for name, row in found.items() if row["outcome"] == "failed"}
    assert reds == {name for name in found if "acceptance" in name}
    assert all("speculation is off" in found[name]["why"] for name in reds)


def test_a_burst_of_impossible_tokens_is_red(bundle: Path, root: Path) -> None:
    found = run(bundle, root, impossible=[3, 9])
    reds = {name for name, row in found.items() if row["outcome"] == "failed"}
    assert reds == {name for name in found if "impossible" in name}


def test_without_the_artifact_nothing_is_green_and_a_reason_says_what_brings_it(
    bundle: Path, root: Path
) -> None:
    found = run(bundle, root, brought="another")
    assert {row["outcome"] for row in found.values()} == {"not run"}
    assert all("--checkpoint NAME=DIR brings one of a" in row["why"] for row in found.values())
