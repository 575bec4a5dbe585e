"""Which receipts an image has, and whether one is of a preset that serves an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from vllm_forge.errors import ForgeError
from vllm_forge.receipts import FOLDER, KEYS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm_forge.project import Project
    from vllm_forge.receipts.envelope import Receipt

NOT_RUN = "not run"


@dataclass(frozen=True, kw_only=True)
class ImageReceipts:
    """Receipts in the folder of an image's digest.

    Attributes:
        held: the valid ones.
        refused: path of each invalid one, and why.
    """

    held: tuple[Receipt, ...] = ()
    refused: tuple[str, ...] = ()

    def words(self, root: Path) -> list[str]:
        """One line each."""
        return [*(str(receipt.path.relative_to(root)) for receipt in self.held), *self.refused]


def image_receipts(
    project: Project, digest: str | None, now: datetime | None = None
) -> ImageReceipts:
    """Read and verify the receipts of an image; an invalid one is listed, not raised.

    Args:
        project: the repository.
        digest: ``sha256:<hex>`` of the image's manifest; None without an image.
        now: time of the check; default: the clock.
    """
    if digest is None:
        return ImageReceipts()
    root = project.root
    paths = sorted((root / FOLDER / digest.removeprefix("sha256:")).glob("*.json"))
    if not paths:
        return ImageReceipts()
    # They import in-toto's libraries, which a plan without receipts does not wait for.
    from vllm_forge.receipts.envelope import read_keys, read_receipt  # noqa: PLC0415
    from vllm_forge.receipts.verification import verify  # noqa: PLC0415

    held, refused = [], []
    for path in paths:
        try:
            receipt = read_receipt(path, read_keys(root / FOLDER / KEYS))
            verify(project, receipt, now or datetime.now(UTC))
        except ForgeError as error:
            refused.append(f"{path.relative_to(root)} is refused: {error.what}")
        else:
            held.append(receipt)
    return ImageReceipts(held=tuple(held), refused=tuple(refused))


def preset_state(root: Path, receipts: Sequence[Receipt], preset: str, artifact: str) -> str:
    """``not run``, or the receipts with a test that served this artifact as this preset.

    Tests of the full artifact (``tests/gpu/soak``) record both.
    """
    named = [
        str(receipt.path.relative_to(root))
        for receipt in receipts
        if any(
            (test.facts.get("preset"), test.facts.get("artifact")) == (preset, artifact)
            for test in receipt.statement.detail.tests.values()
            if test.outcome == "passed"
        )
    ]
    return f"receipts: {', '.join(named)}" if named else NOT_RUN
