"""Proofs of patches."""

from vllm_forge.errors import ForgeError

REFUSED = 40
RED = 41
UNDECIDED = 42


class UselessPatchError(ForgeError, exit_code=RED):
    """A patch whose proof is green without it: it proves nothing, drop it."""


class ProofRedError(ForgeError, exit_code=RED):
    """A contract test is red although the whole series is applied."""


class UpstreamRowsError(ForgeError, exit_code=REFUSED):
    """tests/patches/upstream.toml is invalid, or has no row for a line."""


class RegressionError(ForgeError, exit_code=RED):
    """A test of vLLM's own passes as published, and not as patched."""


class ProofNotRunError(ForgeError, exit_code=UNDECIDED):
    """A proof was not run, was skipped or could not be collected, so it says nothing."""
