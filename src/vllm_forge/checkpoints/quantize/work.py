"""A quantization: its inputs, the folder that makes it resumable, and what its output must be.

``<output>.partial/plan.json`` says which run this is; ``artifact/`` becomes the output by one
rename; ``notes/`` holds, per finished file, the digests for the manifest; ``hidden-*.bin`` the
hidden states between two layers. A file is there only when it is complete and on the disk, so what
exists need not be made again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from vllm_forge import host
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.codecs.small_floats import e4m3_decode
from vllm_forge.checkpoints.errors import QuantizedOutputError, ResumeError
from vllm_forge.checkpoints.inspect.profile import Format, stored_as
from vllm_forge.checkpoints.quantize.inputs import Calibration, Recipe, alias_names
from vllm_forge.checkpoints.tensors import (
    CONFIG,
    INDEX,
    StoredTensor,
    TensorSpec,
    TensorToWrite,
    read_header,
    write_index,
    write_shard,
)
from vllm_forge.host import atomic_path, parse_json, read_data, read_plain, remove, write_json

if TYPE_CHECKING:
    from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer

PLAN, MANIFEST, RECIPE = "plan.json", "manifest.json", "recipe.yaml"
# By compressed-tensors' names.
FORMATS = {
    "float-quantized": Format.FP8_BLOCK,
    "nvfp4-pack-quantized": Format.NVFP4,
    "pack-quantized": Format.W4A16,
}
SCALES = ("weight_scale", "weight_global_scale", "input_global_scale")
# vLLM takes w1's for both, with a warning at most (0.26.0, compressed_tensors_moe_w4a4_nvfp4.py).
SHARED = ("weight_global_scale", "input_global_scale")
# Not part of a quantized artifact: other weights, and what describes the source as a repository.
LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md"}


@dataclass(frozen=True, kw_only=True)
class Job:
    source: Checkpoint
    recipe: Recipe
    calibration: Calibration
    engine: "LayerQuantizer"  # tests have a stand-in without torch


@dataclass(frozen=True, kw_only=True)
class Work:
    """Paths of one run: where the finished checkpoint goes, and the work folder."""

    output: Path
    folder: Path

    @classmethod
    def beside(cls, output: Path) -> Self:
        output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name; links stay links
        return cls(output=output, folder=output.with_name(f"{output.name}.partial"))

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    def hidden(self, layer: int, job: Job) -> "Hidden":
        """The states that a layer takes."""
        return Hidden(
            path=self.folder / f"hidden-{layer:05}.bin",
            tokens=job.calibration.tokens,
            token_bytes=token_bytes(job.source.config),
        )

    def check(self) -> None:
        """Refuse an output that is there already, as far as that can be told without a plan."""
        if self.output.is_symlink() and not self.output.exists():
            remedy = "name the folder itself, or delete the link"
            raise self._refused("the output is a link to what is not there", remedy)
        if self.output.exists() and (self.artifact.exists() or not (self.folder / PLAN).exists()):
            raise self._refused("the output exists")

    def _refused(
        self, what: str, remedy: str = "choose another --output, or delete that one"
    ) -> ResumeError:
        return ResumeError(what, where=self.output, remedy=remedy)

    def begin(self, plan: dict[str, Any]) -> bool:
        """Start, or go on with what an earlier run of the same plan has left.

        False when the output is finished already. ResumeError if the output exists, or if the
        leftovers are of another plan.
        """
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        plan = json.loads(text)
        path = self.folder / PLAN
        refused = partial(ResumeError, where=self.folder)
        if self.output.exists():
            self.check()
            if path.read_text(encoding="utf-8") == text:
                remove(self.folder)  # the last run was ended just before it would have
                return False
            raise self._refused("the output exists, made by a run that differs from this one")
        if path.exists():
            again = "delete that folder to start again"
            try:
                earlier = parse_json(read_plain(path))
            except ValueError:
                earlier = None
            if not isinstance(earlier, dict):
                raise refused(f"{PLAN} of an earlier run cannot be read", remedy=again)
            if differing := sorted(key for key in plan if earlier.get(key) != plan[key]):
                what = f"an earlier run differs in {', '.join(differing)}"
                raise refused(what, remedy=f"{again}, or repeat the earlier command")
        else:
            if any(self.folder.glob("[!.]*")):  # a plan that was being written is not a leftover
                remedy = "look at it, then delete it or choose another --output"
                raise refused("the work folder holds something else", remedy=remedy)
            host.write_whole(path, text)
        self.artifact.mkdir(exist_ok=True)
        return True

    def done(self, name: str) -> bool:
        return (self.artifact / name).exists() and self._note(name).exists()

    def write(self, name: str, items: Iterable[TensorToWrite]) -> dict[str, str]:
        """Write a file of the artifact; note and return the SHA-256 of its tensors by name."""
        sums = write_shard(self.artifact / name, items)
        write_json(self._note(name), sums)
        return sums

    def sums(self, name: str, tensors: Iterable[TensorSpec]) -> dict[str, str]:
        """The same of a finished file, which has these tensors."""
        return read_data(
            self._note(name),
            lambda sums: {tensor.name: str(sums[tensor.name]) for tensor in tensors},
            ResumeError,
            what="note of a finished file",
            remedy=f"delete {self.folder} to start again",
        )

    def finish(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.artifact.rename(self.output)
        remove(self.folder)

    def _note(self, name: str) -> Path:
        return self.folder / "notes" / f"{name}.json"


def token_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a token's hidden states: streams x hidden size x 2 (BF16)."""
    return int(config["hc_mult"] * config["hidden_size"] * 2)


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A file of hidden states.

    ``tokens`` are the ids of each sample: their numbers say where a sample begins.
    """

    path: Path
    tokens: Sequence[Sequence[int]]
    token_bytes: int

    def read(self, sample: int) -> bytearray:
        """The states of one sample; ResumeError if the file ends before."""
        start = sum(len(row) for row in self.tokens[:sample]) * self.token_bytes
        data = bytearray(len(self.tokens[sample]) * self.token_bytes)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise ResumeError(f"sample {sample} is cut off", where=self.path)
        return data

    @contextmanager
    def write(self) -> Iterator[Callable[[bytes], object]]:
        """Yield what takes the states of each sample in turn; the file appears when all are in."""
        with atomic_path(self.path) as aside, aside.open("wb") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != sum(len(row) for row in self.tokens) * self.token_bytes:
                raise ValueError(f"{self.path.name}: {file.tell()} bytes of hidden states")


def check_layer(
    made: Sequence[TensorToWrite], stored: Mapping[str, StoredTensor], recipe: Recipe
) -> None:
    """Compare the tensors that the tools made of a layer's with what the recipe says.

    QuantizedOutputError: a tensor is missing, or unknown, or of another dtype; a scale is zero or
    not finite; w1 and w3 of an expert have different global scales.
    """
    expected = {
        required.name: required.dtype
        for name, tensor in stored.items()
        if (group := recipe.group_of(name)) is not None
        for required in stored_as(tensor, FORMATS[group.format])
    }
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
            values = e4m3_decode(np.frombuffer(item.data(), np.uint8))
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


def check_passed(path: Path, sums: Mapping[str, str], source: Checkpoint) -> None:
    """Read a file of passed-through tensors back and compare with the model, byte for byte."""
    aliases = alias_names(source)
    stored = {tensor.name: tensor for tensor in read_header(Folder(path.parent), path.name)}
    for name, sha256 in sums.items():
        origin = source.tensors[aliases.get(name, name)]
        if name not in stored or not stored[name].sha256() == sha256 == origin.sha256():
            remedy = "disk or memory are at fault, or the model was changed meanwhile"
            raise QuantizedOutputError(f"{name} is not the model's", where=path, remedy=remedy)


def finish_artifact(work: Work, names: Sequence[str], job: Job) -> None:
    """Write index, config.json, recipe.yaml and manifest.json; copy tokenizer and other files."""
    folder, source, recipe = work.artifact, job.source, job.recipe
    shards = {name: read_header(Folder(folder), name) for name in names}
    write_index(folder, shards)
    ignore = recipe.ignored(source.config)
    config = {**source.config, "quantization_config": job.engine.quantization_config(ignore)}
    write_json(folder / CONFIG, config, ensure_ascii=False)
    host.write_whole(folder / RECIPE, job.engine.recipe_yaml())
    for name, path in sorted(source.local.files.items()):
        kept = Path(name).suffix not in LEFT_OUT and name not in {CONFIG, INDEX, MANIFEST, RECIPE}
        if kept and not name.startswith("."):
            with atomic_path(folder / name) as aside:
                shutil.copyfile(path, aside)
    manifest = {
        "made_by": "vllm-forge quantize",
        "recipe": recipe.model_dump(mode="json"),
        "calibration": job.calibration.record(),
        "tools": job.engine.versions,
        "tensors": {
            t.name: {"file": name, "dtype": t.dtype, "shape": t.shape, "sha256": sums[t.name]}
            for name, tensors in shards.items()
            for sums in [work.sums(name, tensors)]
            for t in tensors
        },
    }
    write_json(folder / MANIFEST, manifest, ensure_ascii=False)
