"""A dry load's request and its answer; the part inside a line's environment is meta_load.py."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.inspect.profile import Drafter, Profile
from vllm_forge.host import atomic_path, parse_json
from vllm_forge.kernels.selection.questions import INSIDE, declared_device
from vllm_forge.matrix import FrozenModel, Sku

SCRIPT = Path(__file__).with_name("meta_load.py")
PROGRAM = "dry_load.py"  # its name where it is mounted
# What serves a drafter, else MTP; which is tried on DSpark's too, to say what it does with one.
METHODS = {Drafter.NONE: (), Drafter.DSPARK: ("mtp", "dspark")}


class Stop(FrozenModel):
    tensor: str | None
    message: str


class Short(FrozenModel):
    """A parameter that was not written in whole, and how many like it."""

    parameter: str
    count: int
    filled: int = Field(description="elements")
    of: int = Field(description="elements")


class Cast(FrozenModel):
    """Copies that converted from one dtype to another; torch's names."""

    source: str = Field(alias="from")
    to: str
    count: int
    example: str


class Unread(FrozenModel):
    """A tensor that the model took nothing from, and how many like it."""

    tensor: str
    count: int


class Resolved(FrozenModel):
    module: str = Field(description="numbers are N")
    method: str
    scheme: str
    count: int


class Load(FrozenModel):
    error: Stop | None
    read: int = 0
    short: tuple[Short, ...] = ()
    casts: tuple[Cast, ...] = ()
    unread: tuple[Unread, ...] = ()
    modules: tuple[Resolved, ...] = ()


class Answer(FrozenModel):
    """What one vLLM does with one checkpoint."""

    target: Load
    drafts: dict[str, Load]


def write_request(folder: Path, profiles: Mapping[str, Profile], sku: Sku) -> None:
    """Write all that meta_load.py needs into a folder, which then appears, for any user to read.

    ``profiles``: name -> checkpoint, with headers; ``sku``: the GPU that is declared.
    """
    with atomic_path(folder) as aside:
        aside.mkdir()
        shutil.copyfile(SCRIPT, aside / PROGRAM)
        shutil.copytree(INSIDE, aside / "inside", ignore=shutil.ignore_patterns("__pycache__"))
        cases = []
        for number, (name, profile) in enumerate(profiles.items()):
            rows = [[entry.name, entry.dtype, entry.shape] for entry in profile.tensors.values()]
            tensors = aside / f"tensors-{number}.json"
            tensors.write_text(json.dumps(rows))
            methods = METHODS.get(profile.drafter, ("mtp",)) if profile.draft_layers else ()
            case = {"name": name, "config": dict(profile.served), "methods": methods}
            cases.append({**case, "tensors": tensors.name})
        device = declared_device(sku, count=1).model_dump(mode="json")
        (aside / "request.json").write_text(json.dumps({"device": device, "cases": cases}))
        for path in (aside, *aside.rglob("*")):
            path.chmod(0o755)


def read_answers(output: str, where: str, names: Sequence[str]) -> dict[str, Answer]:
    """Parse what meta_load.py printed last; DryLoadError unless it answers every case."""
    lines = output.strip().splitlines()
    try:
        rows = parse_json(lines[-1])
        for name, row in rows.items():
            if "fault" in row:
                raise DryLoadError(f"the dry load of {name} failed:\n{row['fault']}", where=where)
        answers = {name: Answer.model_validate(row) for name, row in rows.items()}
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        what = f"vLLM gave no answer: {type(error).__name__}"
        raise DryLoadError(what, where=where, remedy=output[-2000:]) from None
    if missing := sorted(set(names) - answers.keys()):
        raise DryLoadError(f"vLLM gave no answer for {', '.join(missing)}", where=where)
    return answers
