"""Both programs of a sandboxed test, in a process and namespaces each: candidate and checker.

The candidate's program has no test, no expected value, and no verdict: it gets arguments and gives
results, as JSON. The checker decodes results to plain built-in values, so it compares by its own
``==``. Run by Python as text (``-c``), without a library.
"""

import builtins
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

MOST = 1 << 20  # characters of a message
SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
}  # fmt: skip


class EndedError(BaseException):
    """The candidate has ended. A test that catches exceptions does not catch this."""


class RaisedError(Exception):
    """The candidate's function raised another error than a built-in one."""


class UnsupportedError(BaseException):
    """The test calls the function with what JSON cannot carry."""


def encode(value: Any) -> Any:
    """JSON of built-in values; of their subclasses, as Counter, too. TypeError for others."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):  # type: ignore[arg-type]
            return {name: [encode(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__}")


def decode(value: Any) -> Any:
    """Invert ``encode``."""
    if not isinstance(value, dict):
        return value
    [(name, content)] = value.items()
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    return SEQUENCES[name](decode(item) for item in content)


def send(target: TextIO, message: Any) -> None:
    target.write(json.dumps(message) + "\n")
    target.flush()


def candidate(task: dict[str, str], calls: TextIO, replies: TextIO) -> None:
    """Define the function, then call it as often as asked."""
    names: dict[str, Any] = {"__name__": "candidate"}
    try:
        exec(task["prompt"], names)  # noqa: S102 - in a sandbox
        exec(task["program"], names)  # noqa: S102
        function = names[task["entry"]]
    except Exception as error:  # noqa: BLE001
        send(replies, {"error": type(error).__name__})
        return
    send(replies, {})
    for line in calls:
        try:
            arguments, named = decode(json.loads(line))
            reply = {"value": encode(function(*arguments, **named))}
        except Exception as error:  # noqa: BLE001
            reply = {"error": type(error).__name__}
        send(replies, reply)


def checker(task: dict[str, str], calls: TextIO, replies: TextIO) -> dict[str, Any]:
    """The verdict: ``right`` and ``why``; or ``fault``, if the test itself is wrong."""
    called = 0

    def receive() -> Any:
        line = replies.readline(MOST)
        if not line.endswith("\n"):
            raise EndedError("it ended early, or its result was too large")
        reply = json.loads(line)
        if "error" in reply:
            kind = getattr(builtins, reply["error"], None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind.__new__(kind)  # which the test may expect
            raise RaisedError(reply["error"])
        return decode(reply["value"]) if "value" in reply else None

    def function(*arguments: Any, **named: Any) -> Any:
        nonlocal called
        called += 1
        try:
            send(calls, encode((arguments, named)))
        except BrokenPipeError:
            raise EndedError("it ended early") from None
        except TypeError as error:
            raise UnsupportedError(f"its test calls the function with {error}") from None
        return receive()

    names: dict[str, Any] = {"__name__": "checker"}
    try:
        exec("import random; random.seed(0)", names)  # noqa: S102 - tests draw their arguments
        exec(task["prompt"], names)  # noqa: S102
        names[task["entry"]] = function  # HumanEval/33 compares a function with itself
        exec(task["test"], names)  # noqa: S102
        check = names["check"]
    except Exception as error:  # noqa: BLE001
        return {"fault": f"its test raises {error!r}"}
    try:
        receive()
        check(function)
    except UnsupportedError as error:
        return {"fault": str(error)}
    except (Exception, EndedError) as error:  # noqa: BLE001
        why = str(error) if isinstance(error, RaisedError | EndedError) else type(error).__name__
        return {"right": False, "why": why}
    return {"right": True} if called else {"fault": "its test does not call the function"}


def main(role: str, calls: str, replies: str) -> None:
    """Read the task from standard input; of the checker, write the verdict to standard output."""
    sys.set_int_max_str_digits(0)
    task = json.load(sys.stdin)
    sys.stdin.close()
    if role == "candidate":
        with os.fdopen(int(calls)) as reader, os.fdopen(int(replies), "w") as writer:
            candidate(task, reader, writer)
        return
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a test that prints does not write into the verdict
    with os.fdopen(int(calls), "w") as writer, os.fdopen(int(replies)) as reader:
        send(verdict, checker(task, writer, reader))
        os._exit(0)  # a candidate that reads no calls would hold the writer's end


if __name__ == "__main__":
    main(*sys.argv[1:])
