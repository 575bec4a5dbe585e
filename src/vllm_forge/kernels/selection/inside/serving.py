"""From ``vllm serve`` arguments to a VllmConfig, by vLLM's own parser and EngineArgs."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PREFIX = "VLLM_"
MORE = "For further information"  # pydantic's last line
SIMILAR = 0.85  # of difflib's 1.0
MOST_CHARS = 600
# Differs from run to run, or from machine to machine.
CHANGING = re.compile(r"\b0x[0-9a-f]+\b|/tmp/[\w./-]+|\bpid=\d+")


class Refusal(Exception):
    """vLLM does not serve this. ``kind`` is one of the model's Refusal."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Log(logging.Handler):
    """vLLM's log lines, as (level, text)."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record's line."""
        with contextlib.suppress(TypeError, ValueError):  # a format string with wrong arguments
            self.lines.append((record.levelno, clean(record.getMessage())))

    @contextlib.contextmanager
    def listen(self) -> Iterator[list[tuple[int, str]]]:
        """The lines that are logged in the block; the list is filled at its end."""
        start = len(self.lines)
        lines: list[tuple[int, str]] = []
        yield lines
        lines += self.lines[start:]


def clean(text: str) -> str:
    """One line, without what changes from run to run."""
    return " ".join(CHANGING.sub("...", text).split())[:MOST_CHARS]


def attach_log() -> Log:
    """Collect vLLM's log from DEBUG on, and print nothing of it."""
    log = Log()
    logger = logging.getLogger("vllm")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [log]
    return log


def forget_once() -> None:
    """Let ``info_once`` and its like repeat lines that they logged before."""
    module = importlib.import_module("vllm.logger")
    for name in ("_print_debug_once", "_print_info_once", "_print_warning_once"):
        getattr(module, name).cache_clear()


def explain(error: BaseException) -> str:
    """An exception as one line; a pydantic error as the messages of its validators."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return clean("; ".join(str(item["msg"]) for item in errors(include_url=False)))
    return clean(f"{type(error).__name__}: {error}")


def raised_in_vllm(error: BaseException) -> bool:
    """Whether vLLM or a library raised, rather than our own code, or torch for want of a GPU."""
    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    return "/site-packages/" in file and "/site-packages/torch/" not in file


def unknown_environment(environment: dict[str, str]) -> list[str]:
    """VLLM_* variables that this release does not read."""
    known = importlib.import_module("vllm.envs").environment_variables
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def similar_names(environment: dict[str, str]) -> dict[str, str]:
    """Variable that is unknown to this release -> its variable with the nearest name."""
    known = importlib.import_module("vllm.envs").environment_variables
    nearest = {
        name: difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
        for name in sorted(environment)
        if name not in known
    }
    return {name: names[0] for name, names in nearest.items() if names}


def make_config(model: str, arguments: Sequence[str]) -> Any:
    """The VllmConfig of ``vllm serve MODEL ARGUMENTS``.

    Raises:
        Refusal: the parser, a validator or the configuration refuses.
    """
    serve = importlib.import_module("vllm.entrypoints.cli.serve")
    engine = importlib.import_module("vllm.engine.arg_utils")
    usage = importlib.import_module("vllm.usage.usage_lib")
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed = _parser(serve).parse_args(["serve", model, *arguments])
            parsed.model = model  # as `vllm serve` does with its positional argument
            serve.cmd_init()[0].validate(parsed)
            _validate_server(serve, parsed)
            engine_args = engine.AsyncEngineArgs.from_cli_args(parsed)
    except SystemExit:
        lines = [line for line in stderr.getvalue().splitlines() if line.strip(". ")]
        lines = [line for line in lines if not line.lstrip().startswith(MORE)] or lines
        raise Refusal("arguments", clean(lines[-1] if lines else "no message")) from None
    except Exception as error:
        if not raised_in_vllm(error):
            raise
        raise Refusal("arguments", explain(error)) from error
    try:
        return engine_args.create_engine_config(usage.UsageContext.OPENAI_API_SERVER)
    except Exception as error:
        if not raised_in_vllm(error):
            raise
        raise Refusal("config", explain(error)) from error


def _validate_server(serve: Any, parsed: Any) -> None:
    """What the server checks before it makes an engine: names of parsers."""
    for module in (serve, sys.modules[serve.setup_server.__module__]):
        validate = getattr(module, "validate_api_server_args", None)
        if validate is not None:
            validate(parsed)
            return
    raise AssertionError("vLLM has no validate_api_server_args any more")


def _parser(serve: Any) -> Any:
    utils = importlib.import_module("vllm.utils.argparse_utils")
    parser = utils.FlexibleArgumentParser(prog="vllm")
    serve.cmd_init()[0].subparser_init(parser.add_subparsers(dest="subparser"))
    return parser
