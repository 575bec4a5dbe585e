"""From what a line's vLLM answered to the selections that a contract is made of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vllm_forge.kernels.coverage.contract import Selected

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_forge.kernels.selection.model import Answer, Choice

COUNTED = re.compile(r" in \d+$")  # "SchemeA in 3, SchemeB in 40", where layers differ


PRESET = "preset/"


def selections_of(answers: Mapping[str, Answer]) -> tuple[Selected, ...]:
    """What vLLM selects for each preset and artifact.

    Args:
        answers: of one SKU's device, by the question's name. What presets do not ask, and what
            vLLM refuses to serve, needs no kernels.
    """
    asked = [selected(answer) for name, answer in answers.items() if name.startswith(PRESET)]
    return tuple(found for found in asked if found is not None)


def selected(answer: Answer) -> Selected | None:
    """The selections in an answer of the oracle; None where vLLM refuses the question."""
    if answer.refused is not None:
        return None
    experts = [(answer.experts_scheme, _chosen(answer.moe))]
    schemes = set(_schemes(answer.modules))
    if answer.draft is not None:
        experts.append((answer.draft.experts_scheme, _chosen(answer.draft.moe)))
        schemes.update(_schemes(answer.draft.modules))
    return Selected(
        by=answer.name,
        attention=_chosen(answer.attention),
        linear=_chosen(answer.linear),
        schemes=tuple(sorted(schemes - {scheme for scheme, _ in experts if scheme})),
        # Experts without a backend are an unknown backend, not nothing to look for.
        experts=tuple((scheme, backend or "none") for scheme, backend in experts if scheme),
    )


def _schemes(modules: dict[str, str]) -> Iterator[str]:
    for schemes in modules.values():
        for scheme in schemes.split(", "):
            yield COUNTED.sub("", scheme)


def _chosen(choice: Choice | None) -> str | None:
    return None if choice is None else choice.chosen
