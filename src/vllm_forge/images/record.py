"""Records of builds: ``dist/<cell>.json``, and the digest of each image in the cache.

Who may write ``dist/`` could swap an image together with its record. So the cache has the digest
under the hash of the cell's name and inputs, and an image counts as built only where both agree.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter

from vllm_forge.host import cache_root, console, hash_of, parse_json, read_plain
from vllm_forge.host.files import read_sealed, write_sealed
from vllm_forge.images.errors import BuildRecordError
from vllm_forge.matrix.model import FrozenModel
from vllm_forge.project import Project

T = TypeVar("T")
SHORT = 12
HEX = set("0123456789abcdef")
LAYERS = "records/layers/{line}.json"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Inputs = dict[str, dict[str, Any]]  # input -> its parts, each a value or a hash


def read_record(path: Path) -> dict[str, Any] | None:
    """The record that a build left, None where there is none; BuildRecordError if it is not one."""
    try:
        record = parse_json(read_plain(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        record, problem = None, str(error)
    else:
        problem = "it has no table of inputs"
    inputs = record.get("inputs") if isinstance(record, dict) else None
    tables = isinstance(inputs, dict) and all(isinstance(row, dict) for row in inputs.values())
    if tables and {"digest", "blobs", "engine"} <= record.keys():
        return dict(record)
    remedy = "delete it; the next build writes it again"
    raise BuildRecordError(f"not the record of a build: {problem}", where=path, remedy=remedy)


def _kept(path: Path, inputs: Inputs) -> Path:
    """Where the cache has the digest for the record ``path``, which is named after the cell."""
    return cache_root() / "images" / f"{hash_of([path.stem, inputs])}.json"


def keep_digest(path: Path, inputs: Inputs, digest: str) -> None:
    """Write the digest, ``sha256:<hex>``, of the image that was built from these inputs."""
    write_sealed(_kept(path, inputs), {"digest": digest})


def kept_digest(path: Path, inputs: Inputs) -> str | None:
    """``sha256:<hex>`` of what was last built from these inputs; None if the cache lost it."""
    try:
        return str(read_sealed(_kept(path, inputs))["digest"])
    except (OSError, ValueError, LookupError):
        return None


def built_digest(path: Path) -> str | None:
    """``sha256:<hex>`` of a cell's image by its record; None if it was not built here.

    Raises BuildRecordError: it is not the digest that the build of these inputs gave.
    """
    if (record := read_record(path)) is None:
        return None
    digest, kept = str(record["digest"]), kept_digest(path, record["inputs"])
    if kept is None:
        console.print(
            f"{path} is not used: the cache has no build of these inputs (it was cleaned, or the "
            "image was built elsewhere); build again to use its digest",
            markup=False,
        )
    elif kept != digest:
        what = f"the record has {digest}, the build gave {kept}"
        remedy = "the record was changed after the build: delete it and build again"
        raise BuildRecordError(what, where=path, remedy=remedy)
    return kept


def recall(inputs: list[Any], make: Callable[[], T]) -> T:
    """What ``make`` gives for ``inputs``, from the cache where it was made of them before.

    Both are JSON values, and ``inputs`` has everything that the result is a function of: hashes of
    files that were hashed just now, and of the code that reads them. What is empty is not kept.
    """
    path = cache_root() / "facts" / f"{hash_of(inputs)}.json"
    with suppress(OSError, ValueError, LookupError):
        record = read_sealed(path)
        if record["inputs"] == inputs:
            known: T = record["result"]
            return known
    if result := make():
        write_sealed(path, {"inputs": inputs, "result": result})
    return result


class RecordedLayer(FrozenModel):
    """Hashes of a layer that was written before, of the inputs that its key names."""

    digest: Sha256  # of the blob, which proves the others
    diff_id: Sha256
    libraries: dict[str, str]  # of a slim layer: path -> hash, as RECORD has it


def recorded_layers(project: Project, line_name: str) -> dict[str, RecordedLayer]:
    """Committed records of a line's layers by their keys; RecordFileError."""
    path = LAYERS.format(line=line_name)
    if not (project.root / path).is_file():
        return {}
    parse = TypeAdapter(dict[str, RecordedLayer]).validate_python
    rows: dict[str, RecordedLayer] = project.read_json(path, parse)
    return rows


def carries_kernels(path: Path) -> bool:
    """Whether the image of a record was built here, with the kernel archives that it needs."""
    record = read_record(path) or {"inputs": {}}
    return "kernels" in record["inputs"] and built_digest(path) is not None


def compare(old: Inputs, new: Inputs) -> dict[str, tuple[str, ...]]:
    """Inputs that changed, in the order of a build, with a sentence per part; order counts."""
    return {
        name: differences(old.get(name, {}), new.get(name, {}))
        for name in dict.fromkeys([*new, *old])
        if hash_of(old.get(name)) != hash_of(new.get(name))
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, ...]:
    """A sentence per part that was added, removed or changed."""
    added = [f"added {name}: {_show(new[name])}" for name in new if name not in old]
    removed = [f"removed {name}: {_show(old[name])}" for name in old if name not in new]
    changed = [
        f"changed {name}: {_show(old[name])} -> {_show(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    return (*added, *removed, *changed) or ("order or form only",)


def _show(value: Any) -> str:
    """A value with its hashes cut to 12 digits."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return " ".join(
        word[:SHORT] if len(word) > SHORT and set(word) <= HEX else word for word in text.split(" ")
    )
