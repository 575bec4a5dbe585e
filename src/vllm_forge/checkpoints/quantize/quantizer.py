"""From a BF16 DeepSeek-V4 to an artifact that vLLM serves, one file at a time.

Every tensor that the recipe does not name keeps its bytes: it never becomes a number here. What
``mtp.*`` is to transformers (nothing, it drops them) therefore does not matter. Tensors that the
recipe names go through llm-compressor, a layer at a time: see calibrate.py.
"""

import errno
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_forge.checkpoints.architecture import layer_tensors, shared_tensors
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import ModelInputError
from vllm_forge.checkpoints.quantize.inputs import Recipe, alias_names
from vllm_forge.checkpoints.quantize.work import (
    Job,
    Work,
    check_layer,
    check_passed,
    finish_artifact,
    token_bytes,
)
from vllm_forge.checkpoints.tensors import copy_of
from vllm_forge.errors import UsageError
from vllm_forge.host import console, exclusive, hash_of, remove, require_disk
from vllm_forge.host.console import progress_line
from vllm_forge.host.errors import DiskSpaceError

MAX_PASSED = 5_000_000_000  # bytes of passed-through tensors per file
GB = 10**9
SHOWN = 200  # characters of a path


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    tensors: tuple[str, ...]
    aliases: dict[str, str]  # further names -> whose bytes
    layer: int | None  # the decoder layer that it holds; None where all passes through
    size: int  # bytes of `tensors` in the model


def quantize(job: Job, output: Path) -> bool:
    """Quantize the job's model into the folder ``output``.

    Ended at any moment and started again, it goes on after the last finished file, and the
    output has the same bytes. False when an earlier run has finished, and only its work folder
    was left.
    """
    check_output(job.source.local.path, output)
    work = Work.beside(output)
    parts = plan_parts(job.source)
    lock = hash_of(str(output.resolve()))[:16]
    with exclusive(f"quantize-{lock}", wait=False), _disk_errors(work.folder):
        if not work.folder.exists():
            tokens = sum(len(row) for row in job.calibration.tokens)
            require_disk(output.parent, disk_needed(job.source, job.recipe, parts, tokens))
        if not work.begin(_plan(job)):
            return False
        start, made = time.monotonic(), 0
        total = sum(part.size for part in parts if not work.done(part.name))
        for part in parts:
            kind = "passed through" if part.layer is None else f"layer {part.layer}"
            line = f"  {part.name}: {kind}, made before"
            if not work.done(part.name):
                _make(work, part, job)
                made += part.size
                seconds = time.monotonic() - start
                line = progress_line(f"{part.name}: {kind}", made, total, seconds)
            console.print(line, style="dim", markup=False)
        finish_artifact(work, [part.name for part in parts], job)
        work.finish()
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
    drafts: list[list[str]] = []
    size = MAX_PASSED
    for name in (name for name in source.tensors if name not in taken):
        size += (more := source.tensors[name].size)
        if size > MAX_PASSED:
            drafts.append([])
            size = more
        drafts[-1].append(name)
    groups += [(names, None) for names in drafts]
    last = len(groups) if drafts else 0
    return [
        Part(
            name=f"model-{number:05}-of-{len(groups):05}.safetensors",
            tensors=tuple(names),
            aliases=alias_names(source) if number == last else {},
            layer=layer,
            size=sum(source.tensors[name].size for name in names),
        )
        for number, (names, layer) in enumerate(groups, 1)
    ]


def disk_needed(source: Checkpoint, recipe: Recipe, parts: Sequence[Part], tokens: int) -> int:
    """Bytes on disk at the most: the artifact, and the states of so many tokens around a layer.

    A quantized weight is counted as one byte, its scales included.
    """
    names = [name for part in parts for name in (*part.tensors, *part.aliases.values())]
    artifact = sum(
        tensor.size if recipe.group_of(name) is None else math.prod(tensor.shape)
        for name, tensor in ((name, source.tensors[name]) for name in names)
    )
    return artifact + 2 * token_bytes(source.config) * tokens


def forecast(source: Checkpoint, recipe: Recipe) -> str:
    """What a run would do, in words; nothing is written and no tool is needed."""
    parts = plan_parts(source)
    names = [name for part in parts for name in part.tensors]
    groups = map(recipe.group_of, names)
    schemes = Counter(group.scheme if group else "as it is" for group in groups)
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
    Work.beside(output).check()


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
    items = [copy_of(tensor) for name, tensor in stored.items() if recipe.group_of(name) is None]
    items += [copy_of(source.tensors[of], name) for name, of in part.aliases.items()]
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
