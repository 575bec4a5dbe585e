"""The folder that a quantization works in, beside its output, and what makes it resumable.

``<output>.partial/plan.json`` says which run this is; ``artifact/`` becomes the output by one
rename; ``notes/`` holds, per finished file, the digests for the manifest. A file is there only
when it is complete and on the disk, so what exists need not be made again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.checkpoints.errors import ResumeError
from vllm_forge.checkpoints.tensors import WrittenTensor, write_shard
from vllm_forge.host import atomic_path, remove

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_forge.checkpoints.tensors import TensorToWrite

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Paths of one run.

    Attributes:
        output: where the finished checkpoint goes.
        folder: the work folder.
    """

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
            ResumeError: it exists, and nothing says that a run of ours was about to tidy up.
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
            earlier = self._earlier(path)
            if differing := sorted(key for key in plan if earlier.get(key) != plan[key]):
                raise ResumeError(
                    f"an earlier run differs in {', '.join(differing)}",
                    where=str(self.folder),
                    remedy="delete that folder to start again, or repeat the earlier command",
                )
        else:
            if any(self.folder.glob("[!.]*")):  # a plan that was being written is no leftover
                raise ResumeError(
                    "the work folder holds something else",
                    where=str(self.folder),
                    remedy="look at it, then delete it or choose another --output",
                )
            with atomic_path(path) as aside:
                aside.write_text(text, encoding="utf-8")
        self.artifact.mkdir(exist_ok=True)
        return True

    def _earlier(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        raise ResumeError(
            f"{PLAN} of an earlier run cannot be read",
            where=str(self.folder),
            remedy="delete that folder to start again",
        )

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
        rows = json.loads(self._note(name).read_text(encoding="utf-8"))
        return [WrittenTensor(**{**row, "shape": tuple(row["shape"])}) for row in rows]

    def finish(self) -> None:
        """Make the artifact the output."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.artifact.rename(self.output)
        remove(self.folder)

    def _note(self, name: str) -> Path:
        return self.folder / "notes" / f"{name}.json"
