"""Renders and tokenizes conversations, in a process of its own: see ``inputs.tokenize``.

A chat template is a program of strangers. transformers' sandbox bounds neither its time nor its
memory, so the kernel does. Reads one JSON object, prints one as its last line.
"""

import json
import resource
import sys
from typing import Any

SHOWN = 200  # characters of another's error


def main() -> None:
    question = json.load(sys.stdin)
    for limit, most in question["limits"].items():
        resource.setrlimit(getattr(resource, limit), (most, most))
    answer: dict[str, Any] = {}
    try:
        answer["tokens"] = _tokens(question)
    except Exception as error:  # noqa: BLE001 - tokenizers raises no narrower one, templates any
        answer["error"] = f"{type(error).__name__}: {str(error)[:SHOWN]}"
    print("\n" + json.dumps(answer))


def _tokens(question: dict[str, Any]) -> list[list[int]]:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(question["model"])
    template = tokenizer.chat_template or question["template"]
    tokens = []
    for row in question["rows"]:
        text = tokenizer.apply_chat_template(row, chat_template=template, tokenize=False)
        tokens.append(tokenizer.encode(text, add_special_tokens=False)[: question["most"]])
    return tokens


if __name__ == "__main__":
    main()
