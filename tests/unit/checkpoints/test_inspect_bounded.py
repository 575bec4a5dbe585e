"""A stranger's pattern that would take for ever is refused, by name, before anything asks it."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.layouts import layout
from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.checkpoints.inspect import matching
from vllm_forge.checkpoints.inspect.matching import require_termination
from vllm_forge.cli import main

if TYPE_CHECKING:
    from pathlib import Path

NAME = "model.layers.0.ffn.shared_experts.gate_up_proj"
ENDLESS = r"re:(\w+\.?)+!"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "LIMIT_S", 0.25)


def _ask(targets: list[str], ignore: list[str], rest: list[str]) -> None:
    require_termination(targets, ignore, [NAME], rest, "here")


@pytest.mark.parametrize("harmless", ["lm_head", r"re:.*\.attn\..*", "re:(", "re:(a+)+!"])
@pytest.mark.parametrize("as_target", [True, False])
def test_an_endless_one_is_named_among_others(harmless: str, as_target: bool) -> None:
    rules = [harmless, ENDLESS]
    with pytest.raises(CheckpointUnreadableError, match=re.escape(ENDLESS)):
        _ask(rules if as_target else [], [] if as_target else rules, [])
    _ask([harmless], [harmless], [])


def test_a_target_is_tried_on_what_it_is_asked_with() -> None:
    """Stored names, but only if it means no module of vLLM's; an ignore rule never."""
    stored, slow_on_stored = "a" * 60, r"re:(a+)+!"
    _ask([], [slow_on_stored], [stored])
    _ask([slow_on_stored + f"|{NAME}"], [], [stored])
    with pytest.raises(CheckpointUnreadableError, match=r"more than 0\.25 s"):
        _ask([slow_on_stored], [], [stored])


def test_a_pattern_beyond_the_limit_is_not_compiled() -> None:
    with pytest.raises(CheckpointUnreadableError, match="longer than"):
        _ask([], ["re:" + "a" * matching.MAX_LENGTH], [])


@pytest.mark.parametrize(
    "change",
    [{"ignore": [ENDLESS]}, {"config_groups": {"group_0": {"targets": [ENDLESS], "weights": {}}}}],
    ids=["ignore", "targets"],
)
def test_the_command_ends(
    change: dict[str, Any],
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr(matching, "LIMIT_S", 1)  # also for the rules of the artifact
    folder = shutil.copytree(layout(tmp_path, "card"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config))
    code = main(["checkpoint", "inspect", str(folder), "--resolve=rules"])
    assert code == CheckpointUnreadableError.exit_code
    assert ENDLESS in capsys.readouterr().err
