"""Workloads are rows and data; data has the hash that was named, and items their parts."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from vllm_forge.bench import workloads
from vllm_forge.bench.client import Prompt
from vllm_forge.bench.errors import LibraryMissingError, WorkloadFileError
from vllm_forge.bench.measure import read_workload
from vllm_forge.bench.workloads import Source, lines, load
from vllm_forge.cli import main
from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

OWN = '{"item": "a", "prompt": "Capital of {France}?", "answer": "Paris"}\n'


def data(path: Path, text: str = OWN) -> Source:
    path.write_text(text)
    return Source(path, hashlib.sha256(text.encode()).hexdigest(), "CC0")


def test_packaged_data_needs_nothing_of_the_user() -> None:
    found = load("chat-code")
    assert (len(found.items), found.license) == (164, "MIT")
    prompt = next(found.prompts())
    assert prompt.item == "HumanEval/0"
    assert "```python\nfrom typing import List" in prompt.content[0]["content"]  # type: ignore[index]


def test_data_of_the_user_becomes_prompts(tmp_path: Path) -> None:
    found = load("own", data(tmp_path / "own.jsonl"))
    assert list(found.prompts()) == [
        Prompt("a", [{"role": "user", "content": "Capital of {France}?"}])
    ]
    assert found.items[0].answer == "Paris"
    assert found.license == "CC0"


def test_items_are_repeated_and_numbered(tmp_path: Path) -> None:
    found = load("aime", data(tmp_path / "a.jsonl", '{"id": 7, "problem": "x", "answer": 204}\n'))
    assert [(prompt.item, prompt.repeat) for prompt in found.prompts()] == [
        ("7", repeat) for repeat in range(16)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines(found, repeats=True))
    assert read_workload(path)[0] == list(found.prompts())
    path.write_bytes(lines(found))
    assert read_workload(path)[0] == list(found.prompts())[:1]
    found = load("gsm8k", data(tmp_path / "g.jsonl", '{"question": "x", "answer": "#### 1"}\n'))
    assert found.items[0].name == "1"


def test_digest_is_of_the_row_and_the_data(tmp_path: Path) -> None:
    rows = workloads.ROWS.read_text()
    mine = tmp_path / "rows.toml"
    source = data(tmp_path / "own.jsonl")
    digests = {load("own", source).digest, load("own", data(tmp_path / "b", OWN * 1 + "\n")).digest}
    mine.write_text(rows.replace("max_tokens = 2048", "max_tokens = 2047"))
    digests.add(load("own", source, mine).digest)
    assert len(digests) == 3
    mine.write_text(rows)
    assert load("own", source, mine).digest in digests


def test_python_is_part_of_a_digest_with_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = load("chat-code").digest
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert load("chat-code").digest != before


def test_random_prompts_predict_their_drafts(tmp_path: Path) -> None:
    path = tmp_path / "random.jsonl"
    path.write_bytes(lines(load("random")))
    prompts, _ = read_workload(path)
    assert len(prompts) == 128
    assert all(len(prompt.content) == 1024 for prompt in prompts)
    predicted = prompts[0].predicted
    assert (predicted[2].drafts, predicted[2].per_position) == (256, (256, 0))
    assert set(predicted) == set(range(1, 9))
    assert lines(load("random")) == path.read_bytes()


def test_wrong_hash_is_refused(tmp_path: Path) -> None:
    source = data(tmp_path / "own.jsonl")
    source.path.write_text(OWN.replace("Paris", "Lyon"))
    with pytest.raises(WorkloadFileError, match="expected " + source.sha256):
        load("own", source)


def test_data_that_is_not_the_pinned_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadFileError, match="--sha256 is not that of workload chat-code"):
        load("chat-code", data(tmp_path / "own.jsonl"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = workloads.read_workloads()
    absent = rows["chat-code"].package.model_copy(update={"name": "absent-data"})  # type: ignore[union-attr]
    row = rows["chat-code"].model_copy(update={"package": absent})
    monkeypatch.setattr(workloads, "read_workloads", lambda _: {"chat-code": row})
    with pytest.raises(LibraryMissingError, match="missing absent-data"):
        load("chat-code")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        (OWN + OWN, "two items have one name"),
        ('{"item": "a", "prompt": "x"}', "line 1: KeyError\\('answer'\\)"),
        (OWN + '{"item": "b", "prompt": ["x"], "answer": "y"}', "line 2: .*prompt is not a text"),
        (OWN + "[1]", "line 2"),
        (OWN.replace('"a"', r'"a\nb"'), "line 1: item is not one line"),
        (OWN + "[" * 100_000, "line 2: .*nested too deeply"),
    ],
)
def test_invalid_data_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkloadFileError, match=message):
        load("own", data(tmp_path / "own.jsonl", text))


@pytest.mark.parametrize("answer", [r"\\\\frac{3}{4}", "18 dollars", "", "1e999999999", "1/0"])
def test_answer_that_is_not_a_number_is_refused(answer: str, tmp_path: Path) -> None:
    """All answers to it would be wrong, of both arms alike."""
    row = f'{{"id": 7, "problem": "x", "answer": "{answer}"}}\n'
    with pytest.raises(WorkloadFileError, match="line 1: the answer is not a number"):
        load("aime", data(tmp_path / "a.jsonl", row))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('scorer = "exact"', 'scorer = "code"', "scorer code needs keys.test"),
        ('answer = "answer" }\ntemplate = "{prompt}"', "}", "needs keys.answer|Invalid"),
        ('template = "{prompt}"', 'template = "{prompts}"', "prompts"),
        ('template = "{prompt}"', 'form = "x"', "expected a form"),
        ('template = "{prompt}"', 'templates = "x"', "own.template"),
        ('thinking = false\ntemperature = 0.0\ntop_p = 1.0\nmax_tokens = 2048\nrepeats = 1\n\n# Pr',
         "temperature = 0.0\n# Pr", "Field required"),
        ("repeats = 16", "repeats = 16\nmax_tokens = 1", "Cannot overwrite"),
        ("(?m)", "(", "invalid form"),
    ],
)  # fmt: skip
def test_invalid_row_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    rows = workloads.ROWS.read_text()
    assert old in rows
    mine = tmp_path / "rows.toml"
    mine.write_text(rows.replace(old, new))
    with pytest.raises(WorkloadFileError, match=message):
        load("own", None, mine)


def test_command_writes_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data(tmp_path / "own.jsonl")
    output = tmp_path / "prompts.jsonl"
    command = ["bench", "workload", "--workload=own", f"--data={source.path}",
               f"--sha256={source.sha256}", f"--output={output}"]  # fmt: skip
    assert main(command) == UsageError.exit_code
    assert "--data needs --sha256 and --license" in capsys.readouterr().err
    assert main([*command, "--license=CC0"]) == 0
    assert json.loads(output.read_text())["messages"][0]["content"] == "Capital of {France}?"
    assert main(["bench", "workload", "--workload=randon", f"--output={output}"]) == 2
    assert "unknown workload 'randon' (did you mean 'random'?)" in capsys.readouterr().err
    assert main(["bench", "workload", "--workload=random", f"--output={output}"]) == 0
    assert '"synthetic_acceptance_length": 2' in capsys.readouterr().out
