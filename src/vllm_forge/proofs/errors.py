"""Proofs of patches."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

RED = 41
UNDECIDED = 42


class UselessPatchError(ForgeError):
    """A patch whose proof is green without it: it proves nothing, drop it."""

    exit_code = RED


class ProofRedError(ForgeError):
    """A contract test is red although the whole series is applied."""

    exit_code = RED


class ProofNotRunError(ForgeError):
    """A proof was not run, was skipped or could not be collected, so it says nothing."""

    exit_code = UNDECIDED
