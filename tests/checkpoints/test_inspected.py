"""What the quantizer made: the inspector finds nothing, and every weight is within its bound."""

from __future__ import annotations

from pathlib import Path

from vllm_forge.checkpoints.inspect.formats import Format
from vllm_forge.checkpoints.inspect.inspection import find_all
from vllm_forge.checkpoints.inspect.manifest import nearest
from vllm_forge.checkpoints.inspect.parts import Part
from vllm_forge.checkpoints.inspect.places import Folder
from vllm_forge.checkpoints.inspect.profile import Profile
from vllm_forge.checkpoints.inspect.seen import look
from vllm_forge.checkpoints.inspect.values import compare


def _profile(folder: Path) -> Profile:
    return Profile(look(Folder(folder)))


def test_the_card_is_what_its_manifest_says(card: Path) -> None:
    profile = _profile(card)
    assert nearest(profile) == "flash-nvfp4-fp8-mtp"
    found = find_all(profile, "flash-nvfp4-fp8-mtp", source=None)
    assert [f.title for f in found if not f.handled_by] == []


def test_its_weights_are_the_models_within_derived_bounds(card: Path, bf16: Path) -> None:
    """Bounds from the BF16 weights alone; unquantized tensors and all of mtp.* byte for byte."""
    rows, found = compare(_profile(card), _profile(bf16))
    assert found == []
    quantized = {row.part: row for row in rows if row.worst is not None}
    assert {part: row.format for part, row in quantized.items()} == {
        Part.EXPERTS: Format.NVFP4,
        Part.ATTENTION: Format.FP8_BLOCK,
    }
    for row in quantized.values():
        assert row.worst is not None
        assert 0.8 < row.worst <= 1
    draft = [row for row in rows if row.draft]
    assert draft
    assert all(row.format is Format.PLAIN for row in draft)
