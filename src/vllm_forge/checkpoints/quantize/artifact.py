"""What makes a folder of tensors an artifact: checks of what the tools made, config, manifest."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_forge.checkpoints.checkpoint import read_header
from vllm_forge.checkpoints.errors import QuantizedOutputError
from vllm_forge.checkpoints.quantize.model import alias_names
from vllm_forge.checkpoints.source import Folder
from vllm_forge.checkpoints.tensors import CONFIG, DTYPE_BYTES, INDEX, write_index
from vllm_forge.host import atomic_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.quantize.recipe import Recipe
    from vllm_forge.checkpoints.quantize.work import Job, Work
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite, WrittenTensor

MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
# What compressed-tensors stores of a weight, by its name of the format: suffix -> dtype.
LEAVES: dict[str, dict[str, str]] = {
    "float-quantized": {"weight": "F8_E4M3", "weight_scale": "F32"},
    "nvfp4-pack-quantized": {
        "weight_packed": "U8",
        "weight_scale": "F8_E4M3",
        "weight_global_scale": "F32",
        "input_global_scale": "F32",
    },
    "pack-quantized": {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"},
}
SCALES = ("weight_scale", "weight_global_scale", "input_global_scale")
# vLLM takes w1's for both, with a warning at most (0.26.0, compressed_tensors_moe_w4a4_nvfp4.py).
SHARED = ("weight_global_scale", "input_global_scale")
F8_NOT_A_NUMBER = 0x7F
# Not part of a quantized artifact: other weights, and what describes the source as a repository.
LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md"}


def check_layer(
    made: Sequence[TensorToWrite], stored: Mapping[str, StoredTensor], recipe: Recipe
) -> None:
    """Compare what the tools made of a layer with what the recipe says.

    Args:
        made: the quantized modules' tensors, in upstream naming.
        stored: the layer's tensors in the model.
        recipe: which of them must be quantized.

    Raises:
        QuantizedOutputError: a tensor is missing, or unknown, or of another dtype; a scale is zero
            or not finite; w1 and w3 of an expert have different global scales.
    """
    expected = {}
    for name in stored:
        if (group := recipe.group_of(name)) is not None:
            module = name.removesuffix(".weight")
            expected.update({f"{module}.{leaf}": d for leaf, d in LEAVES[group.format].items()})
    found = {item.name: item.dtype for item in made}
    if wrong := sorted(expected.items() ^ found.items()):
        name, dtype = wrong[0]
        raise QuantizedOutputError(
            f"{len(wrong)} tensors are not as the recipe says, e.g. {name}: "
            f"{found.get(name, 'nothing')} instead of {expected.get(name, f'nothing ({dtype})')}",
            remedy="the tools' versions are those of docker/locks/quantize.txt? then this is a bug",
        )
    for problem in (*_bad_scales(made), *_unshared(made)):
        raise QuantizedOutputError(problem, remedy="look at the model's weights in that place")


def _bad_scales(made: Sequence[TensorToWrite]) -> Iterator[str]:
    for item in made:
        if item.name.rpartition(".")[2] not in SCALES:
            continue
        if item.dtype == "F8_E4M3":
            codes = np.frombuffer(item.data(), np.uint8)
            good = (codes > 0) & (codes < F8_NOT_A_NUMBER)
        else:
            bf16 = item.dtype == "BF16"
            words = np.frombuffer(item.data(), "<u2" if bf16 else "<u4").astype("<u4")
            values = (words << 16 if bf16 else words).view("<f4")
            good = np.isfinite(values) & (values > 0)
        if not good.all():
            yield f"{item.name}: {(~good).sum()} scales are zero, negative or not finite"


def _unshared(made: Sequence[TensorToWrite]) -> Iterator[str]:
    scales = {i.name: i.data() for i in made if i.name.rpartition(".")[2] in SHARED}
    for name, data in scales.items():
        other = name.replace(".w1.", ".w3.")
        if other != name and scales[other] != data:
            yield f"{name} is not {other}"


def check_passed(path: Path, written: Sequence[WrittenTensor], source: Checkpoint) -> None:
    """Read a file of passed-through tensors back and compare with the model, byte for byte.

    Raises:
        QuantizedOutputError: they differ.
    """
    aliases = alias_names(source)
    stored = read_header(Folder(path.parent), path.name)
    ordered = sorted(written, key=lambda row: (-DTYPE_BYTES[row.dtype], row.name))
    for tensor, row in zip(stored, ordered, strict=True):
        origin = source.tensors[aliases.get(tensor.name, tensor.name)]
        if not (tensor.name == row.name and tensor.sha256() == row.sha256 == origin.sha256()):
            raise QuantizedOutputError(
                f"{tensor.name} is not the model's",
                where=str(path),
                remedy="disk or memory are at fault, or the model was changed meanwhile",
            )


def finish_artifact(work: Work, names: Sequence[str], job: Job) -> None:
    """Write index, config.json, recipe.yaml and manifest.json; copy tokenizer and other files."""
    folder, source, recipe = work.artifact, job.source, job.recipe
    written = {name: work.written(name) for name in names}
    write_index(folder, written)
    ignore = recipe.recipe.ignored(source.config)
    config = {**source.config, "quantization_config": job.engine.quantization_config(ignore)}
    _write(folder / CONFIG, _json(config))
    _write(folder / RECIPE, job.engine.recipe_yaml())
    for path in sorted(source.folder.iterdir()):
        kept = path.suffix not in LEFT_OUT and path.name not in {CONFIG, INDEX, MANIFEST, RECIPE}
        if kept and path.is_file() and not path.name.startswith("."):
            with atomic_path(folder / path.name) as aside:
                shutil.copyfile(path, aside)
    manifest = {
        "made_by": "vllm-forge quantize",
        "recipe": {"name": recipe.name, **recipe.recipe.model_dump(mode="json")},
        "calibration": job.calibration.record(),
        "tools": job.engine.versions,
        "tensors": {
            row.name: {"file": name, "dtype": row.dtype, "shape": row.shape, "sha256": row.sha256}
            for name, file in written.items()
            for row in file
        },
    }
    _write(folder / MANIFEST, _json(manifest))


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")
