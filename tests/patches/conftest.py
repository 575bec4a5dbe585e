"""Contract tests: the pinned vLLM's own code, on a CPU, red without a patch and green with it.

They need an interpreter whose `vllm` is the pinned release of one line, patched or not, first on
PYTHONPATH. `nox -s prove` builds both trees and runs every proof against each; on its own a plain
pytest run has no such tree, so it skips this directory and says so.

No stub libcuda is needed: nothing here loads a compiled extension, and vLLM imports without them.
Tests of native code read the release's own source, which no wheel has; `nox -s prove` lays it out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LINE_VARIABLE = "VLLM_FORGE_CONTRACT_LINE"
SOURCE_VARIABLE = "VLLM_FORGE_CONTRACT_SOURCE"
HOW_TO_RUN = (
    f"{LINE_VARIABLE} is not set: contract tests run against the pinned vLLM of one line, "
    "e.g. `nox -s prove -- --line 0.26`"
)


class _NotHere(pytest.Module):
    """A module that is not imported: without a line there may be neither torch nor vLLM."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        raise pytest.skip.Exception(HOW_TO_RUN, allow_module_level=True)


def _line() -> str | None:
    return os.environ.get(LINE_VARIABLE) or None


def pytest_configure(config: pytest.Config) -> None:
    """Let vLLM and its dependencies warn: their warnings are not ours to fail on."""
    config.addinivalue_line("markers", "lines(*names): concerns only these lines")
    if _line() is not None:
        config.addinivalue_line("filterwarnings", "default")


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if _line() is not None:
        return None
    return _NotHere.from_parent(parent, path=module_path)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose subject does not exist on this line; the reason names the lines it has."""
    marker = item.get_closest_marker("lines")
    if marker is None:
        return
    if not marker.args:
        pytest.fail(f"{item.nodeid}: the lines marker names no line", pytrace=False)
    if _line() not in marker.args:
        pytest.skip(f"concerns line {', '.join(marker.args)}, this is {_line()}")


@pytest.fixture(scope="session")
def line() -> str:
    """The line under test; the importable vLLM must be of that line."""
    name = _line()
    if name is None:
        pytest.fail(HOW_TO_RUN, pytrace=False)
    import vllm

    if not vllm.__version__.startswith(f"{name}."):
        pytest.exit(
            f"{LINE_VARIABLE} is {name} but the importable vllm is {vllm.__version__} "
            f"({vllm.__file__}); put the tree of line {name} first on PYTHONPATH",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
    return name


@pytest.fixture(scope="session")
def source(line: str) -> Path:
    """The release's CMakeLists.txt, cmake/ and csrc/, from its source archive."""
    named = os.environ.get(SOURCE_VARIABLE)
    if not named or not (Path(named) / "CMakeLists.txt").is_file():
        pytest.fail(
            f"{SOURCE_VARIABLE} names no source of line {line}: {HOW_TO_RUN}", pytrace=False
        )
    return Path(named)


@pytest.fixture(autouse=True)
def _on_cpu(line: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A vLLM config in place, tensors on the CPU, torch.compile out of the way.

    The last one matters for helpers that vLLM decorates with torch.compile: what a test compares
    must not depend on a C++ compiler being there.
    """
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "cpu")
    with set_current_vllm_config(VllmConfig()), torch.compiler.set_stance("force_eager"):
        yield
