"""Proofs: contract tests in the environment that ships, and the records of them."""

from vllm_forge.proofs.prove import prove

__all__ = ["prove"]
