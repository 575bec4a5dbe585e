"""A quantization: its inputs, and the folder beside its output that makes it resumable.

``<output>.partial/plan.json`` says which run this is; ``artifact/`` becomes the output by one
rename; ``notes/`` holds, per finished file, the digests for the manifest; ``hidden-*.bin`` the
hidden states between two layers. A file is there only when it is complete and on the disk, so what
exists need not be made again.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_forge.checkpoints.errors import ResumeError
from vllm_forge.checkpoints.tensors import WrittenTensor, write_shard
from vllm_forge.host import atomic_path, parse_json, read_json, read_plain, remove

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from vllm_forge.checkpoints.checkpoint import Checkpoint
    from vllm_forge.checkpoints.quantize.calibration import Calibration
    from vllm_forge.checkpoints.quantize.recipe import NamedRecipe
    from vllm_forge.checkpoints.tensors import StoredTensor, TensorToWrite
PLAN = "plan.json"


class Engine(Protocol):
    """What quantizes: calibrate.LayerQuantizer, or a stand-in without torch."""

    @property
    def versions(self) -> dict[str, str]:
        """What the result depends on beside the inputs."""

    @property
    def needs_data(self) -> bool:
        """Whether a scale is calibrated; without one, no forward pass is needed."""

    def recipe_yaml(self) -> str:
        """The recipe as llm-compressor writes it."""

    def quantization_config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """What config.json says of the quantization."""

    def embed(self, weight: StoredTensor, tokens: Sequence[Sequence[int]], path: Path) -> None:
        """Write the input of the first layer."""

    def layer(
        self,
        index: int,
        weights: Mapping[str, StoredTensor],
        tokens: Sequence[Sequence[int]],
        source: Path,
        target: Path,
    ) -> list[TensorToWrite]:
        """Quantize a layer: input states at ``source``, its output states to ``target``."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All inputs of a quantization."""

    source: Checkpoint
    recipe: NamedRecipe
    calibration: Calibration
    engine: Engine


@dataclass(frozen=True, kw_only=True)
class Work:
    """Paths of one run: where the finished checkpoint goes, and the work folder."""

    output: Path
    folder: Path

    @classmethod
    def beside(cls, output: Path) -> Work:
        """The work folder of an output."""
        output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name; links stay links
        return cls(output=output, folder=output.with_name(f"{output.name}.partial"))

    @property
    def artifact(self) -> Path:
        """What will be the output."""
        return self.folder / "artifact"

    def hidden(self, layer: int) -> Path:
        """Input of a layer."""
        return self.folder / f"hidden-{layer:05}.bin"

    def check(self) -> None:
        """Refuse an output that is there already, as far as that can be told without a plan.

        Raises:
            ResumeError: it exists, and its run had more to do than to tidy up.
        """
        if self.output.is_symlink() and not self.output.exists():
            raise ResumeError(
                "the output is a link to what is not there",
                where=str(self.output),
                remedy="name the folder itself, or delete the link",
            )
        if self.output.exists() and (self.artifact.exists() or not (self.folder / PLAN).exists()):
            raise ResumeError(
                "the output exists",
                where=str(self.output),
                remedy="choose another --output, or delete that one",
            )

    def begin(self, plan: dict[str, Any]) -> bool:
        """Start, or go on with what an earlier run of the same plan has left.

        Returns:
            False when the output is finished already.

        Raises:
            ResumeError: the output exists, or the leftovers are of another plan.
        """
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        plan = json.loads(text)
        path = self.folder / PLAN
        if self.output.exists():
            self.check()
            if path.read_text(encoding="utf-8") == text:
                remove(self.folder)  # the last run was ended just before it would have
                return False
            raise ResumeError(
                "the output exists, made by a run that differs from this one",
                where=str(self.output),
                remedy="choose another --output, or delete that one",
            )
        if path.exists():
            try:
                earlier = parse_json(read_plain(path))
            except ValueError:
                earlier = None
            if not isinstance(earlier, dict):
                raise ResumeError(
                    f"{PLAN} of an earlier run cannot be read",
                    where=str(self.folder),
                    remedy="delete that folder to start again",
                )
            if differing := sorted(key for key in plan if earlier.get(key) != plan[key]):
                raise ResumeError(
                    f"an earlier run differs in {', '.join(differing)}",
                    where=str(self.folder),
                    remedy="delete that folder to start again, or repeat the earlier command",
                )
        else:
            if any(self.folder.glob("[!.]*")):  # a plan that was being written is not a leftover
                raise ResumeError(
                    "the work folder holds something else",
                    where=str(self.folder),
                    remedy="look at it, then delete it or choose another --output",
                )
            with atomic_path(path) as aside:
                aside.write_text(text, encoding="utf-8")
        self.artifact.mkdir(exist_ok=True)
        return True

    def done(self, name: str) -> bool:
        """Whether a file of the artifact is finished."""
        return (self.artifact / name).exists() and self._note(name).exists()

    def write(self, name: str, items: Iterable[TensorToWrite]) -> list[WrittenTensor]:
        """Write a file of the artifact, and note its digests."""
        written = write_shard(self.artifact / name, items)
        with atomic_path(self._note(name)) as aside:
            aside.write_text(json.dumps([asdict(row) for row in written]), encoding="utf-8")
        return written

    def written(self, name: str) -> list[WrittenTensor]:
        """What a finished file holds."""
        return read_json(
            self._note(name),
            lambda rows: [WrittenTensor(**{**row, "shape": tuple(row["shape"])}) for row in rows],
            ResumeError,
            what="note of a finished file",
            remedy=f"delete {self.folder} to start again",
        )

    def finish(self) -> None:
        """Make the artifact the output."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.artifact.rename(self.output)
        remove(self.folder)

    def _note(self, name: str) -> Path:
        return self.folder / "notes" / f"{name}.json"


@dataclass(frozen=True)
class Hidden:
    """A file of hidden states.

    Attributes:
        path: the file.
        tokens: ids of each sample; their numbers say where a sample begins.
        token_bytes: what one token takes: streams x hidden size x 2 (BF16).
    """

    path: Path
    tokens: Sequence[Sequence[int]]
    token_bytes: int

    def read(self, sample: int) -> bytearray:
        """The states of one sample.

        Raises:
            ResumeError: the file is shorter than the tokens need.
        """
        start = sum(len(row) for row in self.tokens[:sample]) * self.token_bytes
        data = bytearray(len(self.tokens[sample]) * self.token_bytes)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(data) != len(data):
                raise ResumeError(f"sample {sample} is cut off", where=str(self.path))
        return data

    @classmethod
    @contextmanager
    def write(
        cls, path: Path, tokens: Sequence[Sequence[int]], token_bytes: int
    ) -> Iterator[Callable[[bytes], None]]:
        """Yield what takes the states of each sample in turn; the file appears when all are in.

        Raises:
            ValueError: more or fewer bytes than the tokens say.
        """
        with atomic_path(path) as aside, aside.open("wb") as file:
            yield lambda data: (file.write(data), None)[1]
            file.flush()
            os.fsync(file.fileno())
            if file.tell() != sum(len(row) for row in tokens) * token_bytes:
                raise ValueError(f"{path.name}: {file.tell()} bytes of hidden states")
