"""Proofs: contract tests in the environment that ships, and the records of them."""
