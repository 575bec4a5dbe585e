"""Time and memory of a quantization, by the size of the model and of its layers.

    .nox/quantize/bin/python benchmarks/quantize.py [--scratch DIR]

Synthetic models, quantized with the recipe of the card but fewer conversations, one thread, each
in a process of its own whose CPU seconds and largest resident set the kernel counts (wait4). Two
are ten times the tiny model: one by more layers, one by larger ones; a fourth is a single layer of
0.8 GB, so that what a layer adds stands out from what importing the tools takes. What the real
model would need in memory and on disk is computed from these and from its config.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_forge.checkpoints.architecture import SLIDING, all_tensors, layer_tensors
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.fixtures.tiny import TinySpec, write_bf16
from vllm_forge.checkpoints.quantize.environment import SETTINGS
from vllm_forge.checkpoints.quantize.inputs import load_recipe
from vllm_forge.checkpoints.tensors import DTYPE_BYTES

ROOT = Path(__file__).resolve().parents[1]
RESULT = "benchmarks/results/quantize.json"
REAL = "DeepSeek-V4-Flash"
RECIPE, SAMPLES = "nvfp4-fp8-mtp", 8
TINY = TinySpec()
CASES = {
    "tiny": TINY,
    "10 x the layers": replace(TINY, ratios=TINY.ratios * 10),
    "layers 10 x as large": replace(TINY, experts=180),
    "one layer of 0.8 GB": replace(TINY, ratios=(SLIDING,), experts=256, expert_width=1024),
}
# deepseek-ai/DeepSeek-V4-Flash, config.json.
FLASH = {
    **TINY.config(),
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "vocab_size": 129280,
}
CHILD = f"""
import sys, torch
from pathlib import Path
from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer
from vllm_forge.checkpoints.quantize.inputs import calibrate_with, load_recipe, open_model
from vllm_forge.checkpoints.quantize.quantizer import quantize
from vllm_forge.checkpoints.quantize.quantizer import Job
torch.set_num_threads(1)
model, output = Path(sys.argv[1]), Path(sys.argv[2])
named = load_recipe({RECIPE!r})
named = named.model_copy(update={{"samples": {SAMPLES}}})
source = open_model(model)
quantize(
    Job(
        source=source,
        recipe=named,
        calibration=calibrate_with("shipped", named, model),
        engine=LayerQuantizer(source.config, named, "cpu"),
    ),
    output,
)
"""


def size_of(tensors: Any) -> int:
    """Bytes of tensors of the inventory."""
    return sum(math.prod(t.shape) * DTYPE_BYTES[t.dtype] for t in tensors)


def measure(spec: TinySpec, scratch: Path) -> dict[str, Any]:
    """Quantize one model in a process of its own."""
    model, output = scratch / "bf16", scratch / "out"
    write_bf16(model, spec)
    config = spec.config()
    start = time.monotonic()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", CHILD, str(model), str(output)],
        {**os.environ, **SETTINGS},
    )
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        sys.exit(f"the quantization ended with status {status}")
    seconds = time.monotonic() - start
    stored = Checkpoint.open(output).tensors.values()
    result = {
        "model_bytes": size_of(all_tensors(config)),
        "layers": len(spec.ratios),
        "largest_layer_bytes": max(
            size_of(layer_tensors(config, index)) for index in range(len(spec.ratios))
        ),
        "artifact_bytes": sum(tensor.size for tensor in stored),
        "wall_s": round(seconds, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    shutil.rmtree(model)
    shutil.rmtree(output)
    return result


def real_model(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What DeepSeek-V4-Flash would need: by the slope of the largest layer over the smallest."""
    small, large = cases["tiny"], cases["one layer of 0.8 GB"]
    slope = (large["peak_bytes"] - small["peak_bytes"]) / (
        large["largest_layer_bytes"] - small["largest_layer_bytes"]
    )
    layer = max(size_of(layer_tensors(FLASH, index)) for index in range(43))
    recipe = load_recipe(RECIPE)
    artifact = 0.0
    for tensor in all_tensors(FLASH):
        count = math.prod(tensor.shape)
        group = recipe.group_of(tensor.name)
        bits = {"FP8_BLOCK": 8 + 32 / 128**2, "NVFP4": 4 + 8 / 16}
        width = bits[group.scheme] / 8 if group else DTYPE_BYTES[tensor.dtype]
        artifact += count * width
    aliases = 2 * math.prod((FLASH["vocab_size"], FLASH["hidden_size"], 2))
    return {
        "model_bytes": size_of(all_tensors(FLASH)),
        "largest_layer_bytes": layer,
        "peak_bytes_per_layer_byte": round(slope, 2),
        "peak_bytes": int(small["peak_bytes"] + slope * (layer - small["largest_layer_bytes"])),
        "artifact_bytes": int(artifact + aliases),
        "how": "computed, not run",
    }


def main() -> None:
    """Parse arguments, run, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scratch", type=Path, help="default: a folder below /var/tmp")
    args = parser.parse_args()
    cases = {}
    table = Table("model", "GB", "layers", "layer MB", "CPU s", "peak GB")
    with tempfile.TemporaryDirectory(dir=args.scratch or "/var/tmp") as folder:  # noqa: S108
        for name, spec in CASES.items():
            row = cases[name] = measure(spec, Path(folder))
            table.add_row(
                name,
                f"{row['model_bytes'] / 1e9:.2f}",
                str(row["layers"]),
                f"{row['largest_layer_bytes'] / 1e6:.0f}",
                f"{row['cpu_s']:.0f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            )
    Console().print(table)
    result = {
        "command": "benchmarks/quantize.py",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "kernel": platform.release().partition("-")[0],
            "python": platform.python_version(),
        },
        "recipe": RECIPE,
        "samples": SAMPLES,
        "threads": 1,
        "cases": cases,
        REAL: real_model(cases),
    }
    (ROOT / RESULT).write_text(json.dumps(result, indent=1) + "\n")
    Console().print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
