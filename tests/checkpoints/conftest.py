"""Tests with the quantization tools: llm-compressor, compressed-tensors, transformers, torch.

They need the environment of docker/locks/quantize.txt. `nox -s test -- --checkpoints` makes it
and runs them; a plain pytest run has no such tools, so it skips this directory and says so.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vllm_forge.checkpoints.quantize.environment import SETTINGS
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HOW_TO_RUN = "llmcompressor is not installed here: run `nox -s test -- --checkpoints`"
TOOLS = importlib.util.find_spec("llmcompressor") is not None
ROOT = Path(__file__).resolve().parents[2]


class _NotHere(pytest.Module):
    """A module that is not imported: there is no torch."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        raise pytest.skip.Exception(HOW_TO_RUN, allow_module_level=True)


def pytest_configure(config: pytest.Config) -> None:
    """Let the tools warn: their warnings are not ours to fail on."""
    config.addinivalue_line("filterwarnings", "default")
    for name, value in SETTINGS.items():  # before torch is imported
        os.environ.setdefault(name, value)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    return None if TOOLS else _NotHere.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def variant(root: Path) -> Callable[[str], Path]:
    """A tiny variant by name: made now if the cache has none."""
    from tests.support.native_formats import make_with_tools
    from tests.support.variants import cached_variant

    return lambda name: cached_variant(Project(root), name, make=make_with_tools)


@pytest.fixture(scope="session")
def bf16(root: Path) -> Path:
    """The tiny BF16 model."""
    from vllm_forge.checkpoints.fixtures.cached import BF16, fixture

    return fixture(Project(root), BF16)


@pytest.fixture(scope="session")
def card(variant: Callable[[str], Path]) -> Path:
    """The card's artifact, tiny."""
    return variant("card")
