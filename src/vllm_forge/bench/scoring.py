"""Scores of an answer: strict, the right answer in the right form; flexible, in any form.

A truncated answer is wrong by both: a number in its middle is not an answer.
"""

import re
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from vllm_forge.bench.sandbox import judge
from vllm_forge.bench.workloads import Item, Workload, exact_number, expected_number

THOUGHT = "</think>"  # what follows it is the answer, where the server parses no reasoning
OPEN = re.compile(r"^([ \t]*)(`{3,}|~{3,})([^\n`]*)\n", re.MULTILINE)
MOST_REASON = 200  # characters
NUMBER = re.compile(
    r"(?:(?<![\w)])-)?"  # no difference or range
    r"(?:\d{1,3}(?:,\d{2,3}){0,6},\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+)(?:/\d+)?"
)
# Other writings of a minus, of separators of thousands, and of fractions.
WRITINGS = {
    "\u2212": "-", r"(?<=\d)(?:\{,\}|\\[,!]|[\u2009\u202f\xa0])(?=\d{3})": ",",
    r"\\[dt]?frac\s*\{(-?\d+)\}\s*\{(\d+)\}": r"\1/\2",
}  # fmt: skip
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
AROUND, AFTER = "\"'`*_()[]{}\u201c\u201d\u2018\u2019\xab\xbb", ".,;:!?\u2026"
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
    while begin := OPEN.search(text, at):
        indent, fence, language = begin.groups()
        close = re.compile(rf"^(?:{indent}| {{0,3}}){fence}{fence[0]}*[ \t\r]*$", re.MULTILINE)
        if (end := close.search(text, begin.end())) is None:
            break
        content = text[begin.end() : end.start()]
        blocks.append((language.strip().lower(), textwrap.dedent(content) if indent else content))
        beside.append(text[at : begin.start()])
        at = end.end()
    return blocks, "".join([*beside, text[at:]])


def _number(row: Workload, item: Item, text: str) -> Score:
    """Strict: the last match of the form. Flexible: the last boxed number, or the last number."""
    found = re.findall(row.form, text)[-1:]
    problem = "" if found else "the number is not in the form asked for"
    if not found:
        for pattern, usual in WRITINGS.items():
            text = re.sub(pattern, usual, text)
        boxed = [number for content in BOXED.findall(text) for number in NUMBER.findall(content)]
        found = (boxed or NUMBER.findall(text))[-1:]
    values = [exact_number(number) for number in found]
    right = values == [expected_number(row, item.answer)]
    return _verdict(right, problem, found[0] if found else "no number")


def _exact(_: Workload, item: Item, text: str) -> Score:
    """Strict: the text. Flexible: its words, whatever the case, spaces and punctuation around."""
    same, words = text.strip() == item.answer.strip(), _words(item.answer)
    right = same or (bool(words) and _words(text) == words)
    return _verdict(right, "" if same else "other characters", "other text")


def _words(text: str) -> list[str]:
    """Without punctuation; signs and operators are none."""
    words = unicodedata.normalize("NFC", text).casefold().split()
    return [word for word in (_bare(word) for word in words) if word]


def _bare(word: str) -> str:
    return word.rstrip(AROUND + AFTER).lstrip(AROUND)


SCORERS: dict[str, Callable[[Workload, Item, str], Score]] = {
    "code": _code, "number": _number, "exact": _exact,
}  # fmt: skip
