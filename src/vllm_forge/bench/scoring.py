"""Scores of an answer: strict, the right answer in the right form; flexible, in any form.

A truncated answer is wrong by both: a number in its middle is not an answer.
"""

import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from vllm_forge.bench.sandbox import judge
from vllm_forge.bench.workloads import Item, Workload

THOUGHT = "</think>"  # what follows it is the answer, where the server parses no reasoning
OPEN = re.compile(r"^ {0,3}```([^\n`]*)\n", re.MULTILINE)
CLOSE = re.compile(r"^ {0,3}```[ \t]*$", re.MULTILINE)
MOST_REASON = 200  # characters
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
PYTHON = {"python", "py", "python3"}


@dataclass(frozen=True)
class Score:
    """``fault``: why it is not right by both."""

    strict: bool
    flexible: bool
    fault: str = ""


def score(row: Workload, item: Item, finish: str, text: str) -> Score:
    """The scores of an answer; SandboxError if it has code that cannot be isolated."""
    if finish != "stop":
        return Score(strict=False, flexible=False, fault="truncated")
    return SCORERS[row.scorer](row, item, text.rpartition(THOUGHT)[2])


def _verdict(right: bool, form: str, why: str) -> Score:
    """``form``: what is wrong with the form; ``why``: what is wrong with the answer."""
    if not right:
        return Score(strict=False, flexible=False, fault=f"answer: {why[:MOST_REASON]}")
    return Score(strict=not form, flexible=True, fault=f"form: {form}" if form else "")


def _code(_: Workload, item: Item, text: str) -> Score:
    """Strict: one closed block of Python. Flexible: the first with the function, or the text."""
    defines = re.compile(rf"^(?:async )?def {re.escape(item.entry)}\b", re.MULTILINE)
    blocks, beside = _blocks(text)
    program = next((code for _, code in blocks if defines.search(code)), None)
    form = ""
    if program is None:
        form = "no closed block with the function"
        # A text that has the function, or goes on where the prompt ends.
        program = text if defines.search(text) else f"{item.prompt}{text}"
    elif len(blocks) > 1:
        form = f"{len(blocks)} blocks"
    elif blocks[0][0] not in PYTHON:
        form = "a block that does not say Python"
    elif beside.strip():
        form = "text beside the block"
    found = judge(item, program)
    return _verdict(found.right, form, found.why)


def _blocks(text: str) -> tuple[list[tuple[str, str]], str]:
    """Closed blocks, each its language and content; and the text beside them."""
    blocks, beside, at = [], [], 0
    while (begin := OPEN.search(text, at)) and (end := CLOSE.search(text, begin.end())):
        blocks.append((begin[1].strip().lower(), text[begin.end() : end.start()]))
        beside.append(text[at : begin.start()])
        at = end.end()
    return blocks, "".join([*beside, text[at:]])


def _number(row: Workload, item: Item, text: str) -> Score:
    """Strict: the last match of the form. Flexible: the last boxed number, or the last number."""
    form = re.compile(row.form)
    references = form.findall(item.answer) or [item.answer]
    expected = _value(references[-1])
    strict = [_value(match) for match in form.findall(text)]
    boxed = [number for content in BOXED.findall(text) for number in NUMBER.findall(content)]
    numbers = strict[-1:] or [_value(number) for number in (boxed or NUMBER.findall(text))[-1:]]
    problem = "" if strict else "the number is not in the form asked for"
    return _verdict(numbers == [expected], problem, f"{numbers[0] if numbers else 'no number'}")


def _value(number: str) -> str:
    """A number without separators, leading zeros and an empty fraction."""
    whole, _, fraction = number.replace(",", "").strip().partition(".")
    sign = "-" if whole.startswith("-") else ""
    fraction = fraction.rstrip("0")
    return f"{sign}{whole.lstrip('-').lstrip('0') or '0'}{'.' if fraction else ''}{fraction}"


def _exact(_: Workload, item: Item, text: str) -> Score:
    """Strict: the text. Flexible: its words, whatever the case, spaces and punctuation around."""
    right = _words(text) == _words(item.answer)
    return _verdict(
        right, "" if text.strip() == item.answer.strip() else "other characters", "other text"
    )


def _words(text: str) -> list[str]:
    stripped = (word.strip(string.punctuation) for word in text.casefold().split())
    return [word for word in stripped if word]


SCORERS: dict[str, Callable[[Workload, Item, str], Score]] = {
    "code": _code, "number": _number, "exact": _exact,
}  # fmt: skip
