"""From a BF16 DeepSeek-V4 to an artifact that vLLM serves, one file at a time.

Every tensor that the recipe does not name keeps its bytes: it never becomes a number here. What
``mtp.*`` is to transformers (nothing, it drops them) therefore does not matter. Tensors that the
recipe names go through llm-compressor, a layer at a time: see calibrate.py.

``<output>.partial/plan.json`` says which run this is; ``artifact/`` becomes the output by one
rename; ``notes/`` holds, per finished file, the digests for the manifest; ``hidden-*.bin`` the
hidden states between two layers. A file is there only when it is complete and on the disk, so what
exists need not be made again.
"""

import errno
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_forge import host
from vllm_forge.checkpoints import tensors as files
from vllm_forge.checkpoints.architecture import layer_tensors, shared_tensors
from vllm_forge.checkpoints.checkpoint import Checkpoint, Folder
from vllm_forge.checkpoints.codecs.small_floats import e4m3_decode
from vllm_forge.checkpoints.errors import ModelInputError, QuantizedOutputError, ResumeError
from vllm_forge.checkpoints.inspect.profile import Format, stored_as
from vllm_forge.checkpoints.quantize.inputs import Calibration, Recipe, alias_names
from vllm_forge.checkpoints.tensors import CONFIG, INDEX, StoredTensor, TensorSpec, TensorToWrite
from vllm_forge.errors import UsageError
from vllm_forge.host import atomic_path, console, hash_of, remove, require_disk, write_json
from vllm_forge.host.console import progress_line
from vllm_forge.host.errors import DiskSpaceError

if TYPE_CHECKING:
    from vllm_forge.checkpoints.quantize.calibrate import LayerQuantizer

PLAN, MANIFEST, RECIPE = "plan.json", "manifest.json", "recipe.yaml"
AGAIN = "delete that folder to start again"
FORMATS = {  # by compressed-tensors' names
    "float-quantized": Format.FP8_BLOCK,
    "nvfp4-pack-quantized": Format.NVFP4,
    "pack-quantized": Format.W4A16,
}
SCALES = ("weight_scale", "weight_global_scale", "input_global_scale")
# vLLM takes w1's for both, with a warning at most (0.26.0, compressed_tensors_moe_w4a4_nvfp4.py).
SHARED = (".weight_global_scale", ".input_global_scale")
# Not part of a quantized artifact: other weights, and what describes the source as a repository.
LEFT_OUT = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md"}
MAX_PASSED = 5_000_000_000  # bytes of passed-through tensors per file
GB = 10**9
SHOWN = 200  # characters of a path


@dataclass(frozen=True, kw_only=True)
class Job:
    source: Checkpoint
    recipe: Recipe
    calibration: Calibration
    engine: "LayerQuantizer"  # tests have a stand-in without torch


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    tensors: tuple[str, ...]
    aliases: dict[str, str]  # further names -> whose bytes
    layer: int | None  # the decoder layer that it holds; None where all passes through
    size: int  # bytes of `tensors` in the model


class Work:
    """Paths of one run: where the finished checkpoint goes, and the work folder."""

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name; links stay links
        self.folder = self.output.with_name(f"{self.output.name}.partial")
        self.artifact = self.folder / "artifact"

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
        plan, path = json.loads(text), self.folder / PLAN
        refused = partial(ResumeError, where=self.folder)
        if self.output.exists():
            self.check()
            if self._earlier() == plan:
                remove(self.folder)  # the last run was ended just before it would have
                return False
            raise self._refused("the output exists, made by a run that differs from this one")
        if path.exists():
            earlier = self._earlier()
            if differing := ", ".join(sorted(k for k in plan if earlier.get(k) != plan[k])):
                remedy = f"{AGAIN}, or repeat the earlier command"
                raise refused(f"an earlier run differs in {differing}", remedy=remedy)
        else:
            if any(self.folder.glob("[!.]*")):  # a plan that was being written is not a leftover
                remedy = "look at it, then delete it or choose another --output"
                raise refused("the work folder holds something else", remedy=remedy)
            host.write_whole(path, text)
        self.artifact.mkdir(exist_ok=True)
        return True

    def _earlier(self) -> dict[str, Any]:
        with suppress(ValueError):
            if isinstance(plan := host.parse_json(host.read_plain(self.folder / PLAN)), dict):
                return plan
        what = f"{PLAN} of an earlier run cannot be read"
        raise ResumeError(what, where=self.folder, remedy=AGAIN)

    def done(self, name: str) -> bool:
        return (self.artifact / name).exists() and self._note(name).exists()

    def write(self, name: str, items: Iterable[TensorToWrite]) -> dict[str, str]:
        """Write a file of the artifact; note and return the SHA-256 of its tensors by name."""
        sums = files.write_shard(self.artifact / name, items)
        write_json(self._note(name), sums)
        return sums

    def sums(self, name: str, tensors: Iterable[TensorSpec]) -> dict[str, str]:
        """The same of a finished file, which has these tensors."""
        return host.read_data(
            self._note(name),
            lambda sums: {tensor.name: str(sums[tensor.name]) for tensor in tensors},
            ResumeError,
            what="note of a finished file",
            remedy=f"delete {self.folder} to start again",
        )

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


def quantize(job: Job, output: Path) -> bool:
    """Quantize the job's model into the folder ``output``.

    Ended at any moment and started again, it goes on after the last finished file, and the
    output has the same bytes. False when an earlier run has finished, and only its work folder
    was left.
    """
    check_output(job.source.local.path, output)
    work = Work(output)
    parts = plan_parts(job.source)
    lock = hash_of(str(output.resolve()))[:16]
    with host.exclusive(f"quantize-{lock}", wait=False), _disk_errors(work.folder):
        if not work.folder.exists():
            tokens = sum(len(row) for row in job.calibration.tokens)
            require_disk(output.parent, disk_needed(job.source, job.recipe, parts, tokens))
        plan = _plan(job)
        if not work.begin(plan):
            return False
        start, made = time.monotonic(), 0
        total = sum(part.size for part in parts if not work.done(part.name))
        for part in parts:
            kind = "passed through" if part.layer is None else f"layer {part.layer}"
            line = f"  {part.name}: {kind}, made before"
            if not work.done(part.name):
                _make(work, part, job)
                made += part.size
                line = progress_line(f"{part.name}: {kind}", made, total, time.monotonic() - start)
            console.print(line, style="dim", markup=False)
        if _plan(job) != plan:
            raise ModelInputError("the model changed meanwhile", where=work.folder, remedy=AGAIN)
        finish_artifact(work, [part.name for part in parts], job)
        output.parent.mkdir(parents=True, exist_ok=True)
        work.artifact.rename(work.output)
        remove(work.folder)
    return True


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into errors with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            what = f"{error.strerror}: the run was ended"
            remedy = "free some space and give the same command again: finished files are kept"
            raise DiskSpaceError(what, where=folder, remedy=remedy) from None
        what = f"cannot write: {error.strerror}"
        remedy = "choose an --output that can be written"
        raise UsageError(what, where=error.filename or folder, remedy=remedy) from None


def plan_parts(source: Checkpoint) -> list[Part]:
    """The files of the artifact: what layers share, each layer, the MTP blocks."""
    config = source.config
    groups: list[tuple[list[str], int | None]] = [([t.name for t in shared_tensors(config)], None)]
    for index in range(config["num_hidden_layers"]):
        groups.append(([t.name for t in layer_tensors(config, index)], index))
    taken = {name for names, _ in groups for name in names}
    drafts, size = list[list[str]](), MAX_PASSED
    for name in (name for name in source.tensors if name not in taken):
        size += (more := source.tensors[name].size)
        if size > MAX_PASSED:
            drafts.append([])
            size = more
        drafts[-1].append(name)
    groups += [(names, None) for names in drafts]
    return [
        Part(
            name=f"model-{number:05}-of-{len(groups):05}.safetensors",
            tensors=tuple(names),
            aliases=alias_names(source) if drafts and number == len(groups) else {},
            layer=layer,
            size=sum(source.tensors[name].size for name in names),
        )
        for number, (names, layer) in enumerate(groups, 1)
    ]


def disk_needed(source: Checkpoint, recipe: Recipe, parts: Sequence[Part], tokens: int) -> int:
    """Bytes on disk at the most: the artifact, and the states of so many tokens around a layer.

    A quantized weight is counted as one byte, its scales included.
    """
    names = (name for part in parts for name in (*part.tensors, *part.aliases.values()))
    artifact = sum(
        tensor.size if recipe.group_of(name) is None else math.prod(tensor.shape)
        for name, tensor in ((name, source.tensors[name]) for name in names)
    )
    return artifact + 2 * token_bytes(source.config) * tokens


def forecast(source: Checkpoint, recipe: Recipe) -> str:
    """What a run would do, in words; nothing is written and no tool is needed."""
    parts = plan_parts(source)
    names = [name for part in parts for name in part.tensors]
    schemes = Counter(g.scheme if g else "as it is" for g in map(recipe.group_of, names))
    counts = ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
    drafts = sum(name.startswith("mtp.") for name in names)
    disk = disk_needed(source, recipe, parts, recipe.samples * recipe.tokens)
    largest = max(part.size for part in parts if part.layer is not None)
    return (
        f"recipe {recipe.name}: {recipe.about}\n"
        f"tensors: {counts}; {drafts} of mtp.* among the last\n"
        f"model: {sum(part.size for part in parts) / GB:.2f} GB; the largest layer, which is "
        f"what memory holds beside the tools, {largest / GB:.2f} GB\n"
        f"files: {len(parts)} shards; disk, at the most: {disk / GB:.2f} GB"
    )


def check_output(source: Path, output: Path) -> None:
    """Refuse an output that is taken, or that would lie in the model, before any tool is needed."""
    refused = partial(UsageError, where=str(output)[:SHOWN])
    try:
        here, there = source.resolve(), output.resolve()
        above = next((folder for folder in (there, *there.parents) if folder.exists()), there)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, links in a circle
        why = getattr(error, "strerror", None) or error
        raise refused(f"cannot create --output: {why}") from None
    if here == there or here in there.parents or there in here.parents:
        remedy = "choose an --output beside the model"
        raise refused("--output and --model are folders in each other", remedy=remedy)
    if above != there and not above.is_dir():
        raise refused(f"cannot create --output: {above} is not a directory")
    Work(output).check()


def _plan(job: Job) -> dict[str, Any]:
    """What must be the same for a run to go on from another's files."""
    source = job.source
    rows = [[t.name, t.dtype, list(t.shape), t.shard, t.begin] for t in source.tensors.values()]
    try:
        stats = [(name, source.local.files[name].stat()) for name in source.shards]
    except OSError as error:
        raise ModelInputError(f"cannot be read: {error.strerror}", where=error.filename) from None
    times = [[name, each.st_size, each.st_mtime_ns] for name, each in stats]
    return {
        "model": str(source.local.path.resolve()),
        "model files": hash_of([source.config, rows, times], sort_keys=True),
        "recipe": [job.recipe.name, job.recipe.model_dump(mode="json", exclude={"name"})],
        "calibration data": job.calibration.record(),
        "tools": job.engine.versions,
    }


def _make(work: Work, part: Part, job: Job) -> None:
    """One file. The states that a layer gives are on the disk before its tensors are."""
    source, recipe = job.source, job.recipe
    stored = {name: source.tensors[name] for name in part.tensors}
    kept = (tensor for name, tensor in stored.items() if recipe.group_of(name) is None)
    items = [*map(files.copy_of, kept)]
    items += [files.copy_of(source.tensors[of], name) for name, of in part.aliases.items()]
    if part.layer is None:
        written = work.write(part.name, items)
        check_passed(work.artifact / part.name, written, source)
        return
    states, after = (work.hidden(index, job) for index in (part.layer, part.layer + 1))
    if part.layer == 0:
        job.engine.embed(source.tensors["embed.weight"], states)
    made = job.engine.layer(part.layer, stored, states, after)
    check_layer(made, stored, recipe)
    work.write(part.name, [*items, *made])
    remove(states.path)


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
    scales = {item.name: item for item in made if item.name.rpartition(".")[2] in SCALES}
    for problem in _bad_scales(scales):
        raise QuantizedOutputError(problem, remedy="look at the model's weights in that place")


def _bad_scales(scales: Mapping[str, TensorToWrite]) -> Iterator[str]:
    for item in scales.values():
        if item.dtype == "F8_E4M3":
            values = e4m3_decode(np.frombuffer(item.data(), np.uint8))
        else:
            bf16 = item.dtype == "BF16"
            words = np.frombuffer(item.data(), "<u2" if bf16 else "<u4").astype("<u4")
            values = (words << 16 if bf16 else words).view("<f4")
        good = np.isfinite(values) & (values > 0)
        if not good.all():
            yield f"{item.name}: {(~good).sum()} scales are zero, negative or not finite"
    for name, item in scales.items():
        other = name.replace(".w1.", ".w3.")
        if name.endswith(SHARED) and other != name and scales[other].data() != item.data():
            yield f"{name} is not {other}"


def check_passed(path: Path, sums: Mapping[str, str], source: Checkpoint) -> None:
    """Read a file of passed-through tensors back and compare with the model, byte for byte."""
    aliases = alias_names(source)
    stored = {row.name: row for row in files.read_header(Folder(path.parent), path.name)}
    for name, sha256 in sums.items():
        origin = source.tensors[aliases.get(name, name)]
        if name not in stored or not stored[name].sha256() == sha256 == origin.sha256():
            remedy = "disk or memory are at fault, or the model was changed meanwhile"
            raise QuantizedOutputError(f"{name} is not the model's", where=path, remedy=remedy)


def finish_artifact(work: Work, names: Sequence[str], job: Job) -> None:
    """Write index, config.json, recipe.yaml and manifest.json; copy tokenizer and other files."""
    folder, source, recipe = work.artifact, job.source, job.recipe
    shards = {name: files.read_header(Folder(folder), name) for name in names}
    files.write_index(folder, shards)
    ignore = recipe.ignored(source.config)
    quantization = {"quantization_config": job.engine.quantization_config(ignore)}
    write_json(folder / CONFIG, {**source.config, **quantization}, ensure_ascii=False)
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
