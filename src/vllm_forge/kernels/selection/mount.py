"""What is mounted to ask a line's vLLM, how it is started, and what it prints."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_forge.host import remove
from vllm_forge.kernels.errors import OracleFailedError
from vllm_forge.kernels.selection.artifacts import artifact_config
from vllm_forge.kernels.selection.model import Answer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm_forge.kernels.selection.model import Question

INSIDE = Path(__file__).with_name("inside")
# The stub driver, for whoever else needs vLLM to see a device: it stands alone.
DRIVER = INSIDE / "driver.py"
QUESTIONS = "questions.json"
# The package is mounted at /mnt/inside; the image's own Python runs it.
ARGV = (
    "/opt/venv/bin/python",
    "-c",
    "import sys; sys.path.insert(0, '/mnt'); from inside.main import main; main()",
)
TAIL = 2000
# A tokenizer with a vocabulary of nothing but the tokens that DeepSeek's parsers look up: some
# flags make vLLM open one, none selects by it.
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


def inside_files() -> list[Path]:
    """The modules that run inside."""
    return sorted(INSIDE.glob("*.py"))


def inside_hash() -> str:
    """SHA-256 of these modules: another question is another answer."""
    total = hashlib.sha256()
    for path in inside_files():
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def write_inputs(folder: Path, questions: Sequence[Question]) -> None:
    """The package and the questions, in a folder that any user can read.

    Raises:
        ArtifactConfigError: no config is known of an artifact that is asked about.
    """
    content = {
        "questions": [question.model_dump(mode="json") for question in questions],
        "artifacts": {
            name: {"config.json": artifact_config(name), **TOKENIZER}
            for name in sorted({question.artifact for question in questions})
        },
    }
    remove(folder)
    (folder / INSIDE.name).mkdir(parents=True)
    for path in inside_files():
        shutil.copyfile(path, folder / INSIDE.name / path.name)
    (folder / QUESTIONS).write_text(json.dumps(content), encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def read_answers(output: str, questions: Iterable[Question], where: str) -> tuple[Answer, ...]:
    """The answers that were printed last, in the questions' order.

    Raises:
        OracleFailedError: there are none, or of other questions; or our own code failed.
    """
    wanted = [question.name for question in questions]
    lines = output.strip().splitlines()
    try:
        rows = json.loads(lines[-1])
        for row in rows:
            row.pop("seconds", None)
            row.pop("imported", None)
        answers = tuple(Answer.model_validate(row) for row in rows)
    except (IndexError, ValueError, TypeError, AttributeError, ValidationError) as error:
        raise OracleFailedError(
            f"what was asked printed no answers: {str(error)[:TAIL]}",
            where=where,
            remedy=output[-TAIL:],
        ) from None
    if [answer.name for answer in answers] != wanted:
        raise OracleFailedError(
            f"{len(answers)} answers to {len(wanted)} questions, or in another order", where=where
        )
    failed = [a for a in answers if a.refused is not None and a.refused.kind == "oracle"]
    if failed:
        reasons = "\n".join(f"  - {a.name}: {a.refused.message}" for a in failed if a.refused)
        raise OracleFailedError(
            f"{len(failed)} of {len(answers)} questions failed:\n{reasons}",
            where=where,
            remedy=f"a fault of {INSIDE}, or a change of vLLM's interfaces that it must follow",
        )
    return answers
