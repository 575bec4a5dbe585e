"""The inputs, the command and the output of a run that asks a line's vLLM."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_forge.host import parse_json, remove
from vllm_forge.kernels.errors import SelectionFailedError
from vllm_forge.kernels.selection.model import Answer, Question
from vllm_forge.kernels.selection.questions import artifact_config

INSIDE = Path(__file__).with_name("inside")
# The stub driver, also used by an image's checks; it imports only the standard library.
DRIVER = INSIDE / "driver.py"
QUESTIONS = "questions.json"
# The package is mounted at /mnt/inside; the image's own Python runs it.
ARGV = (
    "/opt/venv/bin/python",
    "-c",
    "import sys; sys.path.insert(0, '/mnt'); from inside.main import main; main()",
)
TAIL = 2000
# A tokenizer with only the tokens that DeepSeek's parsers look up: some flags make vLLM open one,
# none selects by it.
BAR, SPACE = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"
TOKENS = (
    "<unk>",
    f"<{BAR}begin{SPACE}of{SPACE}sentence{BAR}>",
    f"<{BAR}end{SPACE}of{SPACE}sentence{BAR}>",
    f"<{BAR}User{BAR}>",
    f"<{BAR}Assistant{BAR}>",
    "<think>",
    "</think>",
)
TOKENIZER: dict[str, dict[str, Any]] = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [
            {
                "id": number, "content": token, "special": True, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False,
            }
            for number, token in enumerate(TOKENS)
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "unk_token": TOKENS[0],
            "vocab": {token: number for number, token in enumerate(TOKENS)},
        },
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": TOKENS[0],
        "bos_token": TOKENS[1],
        "eos_token": TOKENS[2],
    },
}  # fmt: skip


def inside_hash() -> str:
    """SHA-256 of the modules that run inside."""
    total = hashlib.sha256()
    for path in sorted(INSIDE.glob("*.py")):
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def write_inputs(folder: Path, questions: Sequence[Question]) -> None:
    """Write the package and the questions to a folder that any user can read."""
    content = {
        "questions": [question.model_dump(mode="json") for question in questions],
        "artifacts": {
            name: {"config.json": artifact_config(name), **TOKENIZER}
            for name in sorted({question.artifact for question in questions})
        },
    }
    remove(folder)
    (folder / INSIDE.name).mkdir(parents=True)
    for path in sorted(INSIDE.glob("*.py")):
        shutil.copyfile(path, folder / INSIDE.name / path.name)
    (folder / QUESTIONS).write_text(json.dumps(content), encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def read_answers(output: str, questions: Iterable[Question], where: str) -> tuple[Answer, ...]:
    """The answers on the output's last line, in the questions' order, else SelectionFailedError."""
    names = [question.name for question in questions]
    try:
        rows = parse_json(output.strip().splitlines()[-1])
        for row in rows:
            row.pop("seconds", None)
            row.pop("imported", None)
        answers = tuple(Answer.model_validate(row) for row in rows)
    except (IndexError, ValueError, TypeError, AttributeError, ValidationError) as error:
        raise SelectionFailedError(
            f"the questions printed no answers: {str(error)[:TAIL]}",
            where=where,
            remedy=output[-TAIL:],
        ) from None
    if [answer.name for answer in answers] != names:
        raise SelectionFailedError(
            f"{len(answers)} answers to {len(names)} questions, or in another order", where=where
        )
    failed = [
        f"\n  - {answer.name}: {answer.refused.message}"
        for answer in answers
        if answer.refused is not None and answer.refused.kind == "failed"
    ]
    if failed:
        raise SelectionFailedError(
            f"{len(failed)} of {len(answers)} questions failed:{''.join(failed)}",
            where=where,
            remedy=f"fix {INSIDE}: this vLLM may have changed its interfaces",
        )
    return answers
