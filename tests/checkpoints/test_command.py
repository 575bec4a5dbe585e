"""`checkpoint quantize` on the tiny model: killed and run again, bit-identical, in bounds."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.quantize.calibrate import pick_device
from vllm_forge.checkpoints.quantize.environment import SETTINGS
from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


def command(model: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-m", "vllm_forge", "checkpoint", "quantize",
        f"--model={model}", f"--output={output}",
        "--recipe=nvfp4-fp8-mtp", "--data=shipped", "--device=cpu",
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(bf16: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(bf16, output), env={**os.environ, **SETTINGS}, cwd=root, check=True)
    return output


def test_killed_in_the_middle_and_run_again(
    whole: Path, bf16: Path, root: Path, tmp_path: Path
) -> None:
    """SIGKILL when the second layer has begun; then the same command once more."""
    output = tmp_path / "out"
    env = {**os.environ, **SETTINGS}
    with subprocess.Popen(
        command(bf16, output), env=env, cwd=root, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "layer 0" in line:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    again = subprocess.run(
        command(bf16, output), env=env, cwd=root, capture_output=True, text=True, check=True
    )
    assert "layer 0, made before" in again.stderr
    assert digests(output) == digests(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_mtp_is_bit_identical(whole: Path, bf16: Path) -> None:
    ours, theirs = Checkpoint.open(whole).tensors, Checkpoint.open(bf16).tensors
    names = [name for name in theirs if name.startswith("mtp.")]
    assert len(names) == 797 - 3 * 248
    for name in names:
        assert (ours[name].dtype, ours[name].read()) == (theirs[name].dtype, theirs[name].read())


def test_scales_have_the_form_that_vllm_takes(whole: Path) -> None:
    """Global scales are scalars, one for w1 and w3; block scales of attention are FP32."""
    tensors = Checkpoint.open(whole).tensors
    globals_ = [t for name, t in tensors.items() if name.endswith("_global_scale")]
    assert len(globals_) == 3 * 24 * 2
    assert {(t.dtype, t.shape) for t in globals_} == {("F32", ())}
    for name in (n for n in tensors if ".w1." in n and n.endswith("_global_scale")):
        assert tensors[name].read() == tensors[name.replace(".w1.", ".w3.")].read()
    blocks = [t for n, t in tensors.items() if ".attn." in n and n.endswith(".weight_scale")]
    assert [t.dtype for t in blocks] == ["F32"] * 15


def test_config_is_the_cards_and_holds_on_every_line(whole: Path, bf16: Path) -> None:
    config = json.loads((whole / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((bf16 / "config.json").read_text())
    assert (quantization["format"], quantization["scale_fmt"]) == ("mixed-precision", "ue8m0")
    attention, experts = quantization["config_groups"].values()
    assert attention["format"] == "float-quantized"
    assert attention["weights"]["block_structure"] == [128, 128]
    assert attention["input_activations"]["dynamic"] is True
    assert attention["input_activations"]["group_size"] == 128
    assert "fused_wqa_wkv" in attention["targets"][0]
    assert experts["format"] == "nvfp4-pack-quantized"
    assert experts["weights"]["group_size"] == 16
    assert experts["input_activations"]["dynamic"] == "local"
    assert "w1|w2|w3|gate_proj|up_proj|down_proj" in experts["targets"][0]
    assert r"re:.*\.layers\.3\..*" in quantization["ignore"]


def test_the_cached_variant_is_the_same(whole: Path, card: Path) -> None:
    """One thread or many, another process: the same tensors; the manifest says which tools."""
    assert {n: d for n, d in digests(whole).items() if n != "manifest.json"} == {
        n: d for n, d in digests(card).items() if n != "manifest.json"
    }
    ours, theirs = (json.loads((f / "manifest.json").read_text()) for f in (whole, card))
    assert ours["tensors"] == theirs["tensors"]


def test_a_device_that_is_not_there_is_reported() -> None:
    assert pick_device("cpu") == "cpu"
    for choice in ("cuda:99", "nonsense"):
        with pytest.raises(UsageError, match=f"--device {choice}"):
            pick_device(choice)


def test_memory_stays_in_bounds(whole: Path) -> None:
    """The largest child of this process so far, the command among them."""
    del whole
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 8 * GIB
