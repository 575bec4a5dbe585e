"""A session: arms whose servers are started in turns, and the plan that it becomes on a host.

A user writes the session as TOML. The plan is JSON, complete and literal: every start in its
order, every command; what runs it needs neither matrix.toml nor a container engine.
"""

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vllm_forge.bench.errors import SessionFileError
from vllm_forge.bench.results import (
    MOST_STARTS,
    Conditions,
    Count,
    Differences,
    FileName,
    Hash,
    Seconds,
    Server,
)
from vllm_forge.host import read_data, write_json
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Name, Text

PLAN = "plan.json"
UNKNOWN = "unknown"  # of the GPU, until the plan is run
Words = tuple[Text, ...]
Variables = dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Text]


class ArmRow(FrozenModel):
    """What is started: a preset's container as `serve` does it, or a command."""

    preset: Name | None = None
    artifact: Name | None = Field(default=None, description="default: the preset's first")
    command: Words = Field(default=(), description="a server on the session's port")
    model: Text = Field(default="", description="with command: name that requests ask for")
    env: Variables = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.preset is None) == (not self.command) or bool(self.command) != bool(self.model):
            raise ValueError("expected a preset, or a command and its model")
        return self


class Crosscheck(FrozenModel):
    """Another tool, which measures each start of an arm, too, for `bench crosscheck`."""

    arm: Name
    command: Words = Field(min_length=1, description="{output}: folder for its result")


class Questions(FrozenModel):
    """A workload of `bench quality`; its answers are kept, for `bench score`."""

    workload: Name
    data: FileName | None = Field(default=None, description="beside this file")
    sha256: Hash | None = None
    license: Text | None = None

    @model_validator(mode="after")
    def _data_are_whole(self) -> Self:
        if len({value is None for value in (self.data, self.sha256, self.license)}) > 1:
            raise ValueError("data, sha256 and license belong together")
        return self


class Session(FrozenModel):
    """What a user writes."""

    session: Name
    starts: int = Field(ge=1, le=MOST_STARTS, description="of each arm")
    workload: FileName | None = Field(default=None, description="prompts, beside this file")
    quality: Questions | None = Field(default=None, description="asked in place of workload")
    checkpoint: Text = Field(description="folder; its tokenizer and chat template are hashed")
    warm: Count = Field(default=8, description="prompts of each concurrency that only warm up")
    concurrency: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, gt=0, description="quality: its row has them")
    ignore_eos: bool = False
    thinking: bool = False
    prefix_cache: bool = False
    port: int = Field(default=8000, ge=1, le=65535)
    ready_minutes: float = Field(default=30, gt=0, description="that a start may take")
    arm: dict[Name, ArmRow] = Field(min_length=1)
    differs: Differences = ()
    crosscheck: Crosscheck | None = None

    @property
    def turns(self) -> tuple[Name, ...]:
        """The arm of each start: ABBA; drift then affects all alike."""
        names = list(self.arm)
        return tuple(
            name for block in range(self.starts) for name in names[:: -1 if block % 2 else 1]
        )

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if {bool(self.workload), self.max_tokens is not None} != {self.quality is None}:
            raise ValueError("expected workload and max_tokens, or [quality] in their place")
        if self.crosscheck is not None and self.crosscheck.arm not in self.arm:
            raise ValueError(f"crosscheck: no arm {self.crosscheck.arm}")
        if self.crosscheck is not None and self.quality is not None:
            raise ValueError("crosscheck: expected none beside [quality], which measures no speed")
        return self


class Launch(FrozenModel):
    """How an arm's server is started, and ended where its process is only an engine's client."""

    argv: Words = Field(min_length=1)
    env: Variables = Field(default_factory=dict)
    remove: Words = ()
    model: Text
    server: Server


class Kept(FrozenModel):
    """What a plan says of ``Session.quality``."""

    license: Text
    prompts_sha256: Hash = Field(description="of the file with the questions")


class Plan(FrozenModel):
    """A session as it is run; ``turns`` has the arm of each start."""

    format: Literal["bench-plan/1"] = "bench-plan/1"
    session: Name
    turns: tuple[Name, ...]
    arms: dict[Name, Launch]
    conditions: tuple[Conditions, ...] = Field(min_length=1)
    workload: FileName
    warm: Count
    port: int
    ready_s: Seconds
    caches: Words = Field(description="where the servers keep what they compile")
    crosscheck: Crosscheck | None = None
    differs: Differences = ()
    quality: Kept | None = None

    @model_validator(mode="after")
    def _turns_are_of_arms(self) -> Self:
        if unknown := set(self.turns) - self.arms.keys():
            raise ValueError(f"no arm {sorted(unknown)[0]}")
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def read_session(path: Path) -> Session:
    """A session of TOML; SessionFileError."""
    remedy = "see docs/operate/bench-sessions.md for the keys"
    return read_data(path, Session.model_validate, SessionFileError, what="session", remedy=remedy)


def read_plan(folder: Path) -> Plan:
    """The plan in a folder, with its workload beside it; SessionFileError."""
    path, remedy = folder / PLAN, "make the plan again"
    return read_data(path, Plan.model_validate, SessionFileError, what="plan", remedy=remedy)


def write_plan(plan: Plan, folder: Path, workload: bytes) -> None:
    """Write a plan and its prompts; SessionFileError if the folder has another plan."""
    if (folder / PLAN).exists() and read_plan(folder) != plan:
        what = "the folder has the results of another plan"
        remedy = "give another --output, or the session, image and options that it was begun with"
        raise SessionFileError(what, where=folder, remedy=remedy)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / plan.workload).write_bytes(workload)
    write_json(folder / PLAN, plan.model_dump(mode="json"))
