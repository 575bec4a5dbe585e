"""Prompts of 2K, 8K and 32K tokens: in chunks, among others or from the cache, they stay the same.

The weights are random, so nobody knows the answer. What it must not depend on is compared with what
it does depend on: log probabilities after a prompt in one piece, after it in chunks, and after
other prompts that end in the same token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.mtp.conftest import DEEPSEEK, MARKS
from tests.gpu.mtp.engines import EACH, LENGTHS, RanOf, distances

if TYPE_CHECKING:
    from tests.gpu.conftest import Margin, Record

pytestmark = [*MARKS, *DEEPSEEK, pytest.mark.engines("dsv4-whole", "dsv4-chunked")]
NEAR = 0.5  # of the distance to another prompt


@pytest.mark.parametrize("length", LENGTHS)
def test_every_long_prompt_is_answered(length: int, ran: RanOf) -> None:
    for name in ("dsv4-whole", "dsv4-chunked"):
        found = ran(name).require_answers()
        prompts = found.engine.prompts
        lengths = [len(tokens) for tokens in found.tokens]
        due = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        assert [lengths[place] for place in due] == [found.engine.count] * EACH * found.engine.asked


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_change_less_than_another_prompt(
    length: int, ran: RanOf, margin: Margin, record: Record
) -> None:
    start, count = LENGTHS.index(length) * EACH, len(LENGTHS) * EACH
    whole = ran("dsv4-whole").require_answers().logprobs[start : start + EACH]
    chunked = ran("dsv4-chunked").require_answers()
    for what, first in (("in chunks", start), ("asked again", start + count)):
        itself, other = distances(whole, chunked.logprobs[first : first + EACH])
        record(**{what: itself, "another prompt": other})
        record(**{f"{what}, from the cache": chunked.cached[first : first + EACH]})
        assert other > 0
        margin(f"{what} / another prompt", itself / other, NEAR)
