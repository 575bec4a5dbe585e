"""From a preset's row to the arguments and the environment of ``vllm serve``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_forge.matrix.model import Matrix


def serve_arguments(matrix: Matrix, preset_name: str) -> tuple[list[str], dict[str, str]]:
    """What a preset adds to ``vllm serve MODEL``.

    Args:
        matrix: the rows.
        preset_name: a key of ``matrix.preset``.

    Returns:
        The arguments after the model, each option with its value in one word
        (``--name=value``), and the environment of the server.
    """
    preset = matrix.preset[preset_name]
    args = [f"--tensor-parallel-size={preset.tensor_parallel}", *preset.flags]
    if preset.speculative_tokens:
        drafter = {"method": "mtp", "num_speculative_tokens": preset.speculative_tokens}
        args.append(f"--speculative-config={_json(drafter)}")
    return args, dict(preset.env)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
