"""What device code was compiled for, and on which GPUs it runs.

Source: CUDA Programming Guide, "Compute Capabilities", sections on binary compatibility and on
architecture- and family-specific features; nvcc's manual, "GPU Feature List".
"""

import re
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias, cast

from vllm_forge.kernels.errors import UnknownTargetError

Kind: TypeAlias = Literal["cubin", "ptx", "lto"]
Suffix: TypeAlias = Literal["", "a", "f"]
Capability: TypeAlias = tuple[int, int]

_NAME = re.compile(r"(?:(?:sm|compute|lto)_)?(\d+)\.?(\d)([af]?)")

# The capabilities that code for family target ``XYf`` runs on. A GPU that NVIDIA has not put into
# a family is not in it, however near its number: 10.1 was never one of 100f.
FAMILIES: dict[Capability, frozenset[Capability]] = {
    (10, 0): frozenset({(10, 0), (10, 3)}),
    (10, 1): frozenset({(10, 1)}),
    (10, 3): frozenset({(10, 3)}),
    (11, 0): frozenset({(11, 0)}),
    (12, 0): frozenset({(12, 0), (12, 1)}),
    (12, 1): frozenset({(12, 1)}),
}


@dataclass(frozen=True, order=True)
class Target:
    """``major.minor`` and the suffix: none, ``a`` (this GPU only) or ``f`` (its family)."""

    major: int
    minor: int
    suffix: Suffix = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read e.g. ``sm_100a``, ``compute_80``, ``120f`` or ``10.3a``."""
        match = _NAME.fullmatch(text)
        if match is None:
            raise UnknownTargetError(
                f"invalid CUDA target {text!r}", remedy="use e.g. sm_100a, 120f or 9.0a"
            )
        return cls(int(match[1]), int(match[2]), cast("Suffix", match[3]))

    def __str__(self) -> str:
        return f"{self.major}{self.minor}{self.suffix}"

    @property
    def capability(self) -> Capability:
        return self.major, self.minor


def parse_capability(text: str) -> Capability:
    target = Target.parse(text)
    if target.suffix or "." not in text:
        raise UnknownTargetError(f"invalid compute capability {text!r}", remedy="use e.g. 10.3")
    return target.capability


def runs_on(target: Target, kind: Kind, capability: Capability) -> bool:
    """Whether code of this target and kind can be loaded on a GPU of that capability.

    Machine code (cubin) runs within its major version, from its minor version on. PTX and LTO
    intermediate code is compiled by the driver (or nvJitLink) for any later GPU. With suffix
    ``a`` both run on exactly the GPU they name, with ``f`` on its family.

    Raises:
        UnknownTargetError: a family target without a row in FAMILIES.
    """
    if target.suffix == "a":
        return target.capability == capability
    if target.suffix == "f":
        if target.capability not in FAMILIES:
            raise UnknownTargetError(
                f"unknown family target {target}",
                where="kernels/coverage/target.py, FAMILIES",
                remedy="add the family's members from the CUDA Programming Guide",
            )
        return capability in FAMILIES[target.capability]
    if kind == "cubin" and target.major != capability[0]:
        return False
    return capability >= target.capability
