"""From ``vllm serve`` arguments to a VllmConfig, by vLLM's own parser and EngineArgs."""

from __future__ import annotations

import contextlib
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
MOST_CHARS = 600
# What is another one in every run, or on every machine.
CHANGING = re.compile(r"\b0x[0-9a-f]+\b|/tmp/[\w./-]+|\bpid=\d+")


class Refusal(Exception):
    """VLLM says no. ``kind`` is one of the model's Refused."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Log(logging.Handler):
    """Keeps vLLM's log lines."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        with contextlib.suppress(TypeError, ValueError):  # a format string with wrong arguments
            self.lines.append((record.levelno, clean(record.getMessage())))

    @contextlib.contextmanager
    def listen(self) -> Iterator[list[tuple[int, str]]]:
        """The lines that are logged meanwhile."""
        start = len(self.lines)
        heard: list[tuple[int, str]] = []
        yield heard
        heard += self.lines[start:]


def clean(text: str) -> str:
    """One line, without what changes from run to run."""
    return " ".join(CHANGING.sub("...", text).split())[:MOST_CHARS]


def attach_log() -> Log:
    """Hear what vLLM says, also twice and at DEBUG; print none of it."""
    log = Log()
    logger = logging.getLogger("vllm")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.handlers = [log]
    return log


def forget_once() -> None:
    """Let ``info_once`` and its like say again what they said before."""
    module = importlib.import_module("vllm.logger")
    for name in ("_print_debug_once", "_print_info_once", "_print_warning_once"):
        getattr(module, name).cache_clear()


def explain(error: BaseException) -> str:
    """An exception as one line. Of a pydantic error, what its validators said."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        text = "; ".join(str(item["msg"]) for item in errors(include_url=False))
        return clean(text)
    return clean(f"{type(error).__name__}: {error}")


def raised_in_vllm(error: BaseException) -> bool:
    """Whether vLLM or a library raised, rather than our own code, or torch for want of a GPU."""
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename if frames else ""
    return "/site-packages/" in where and "/site-packages/torch/" not in where


def unknown_environment(environment: dict[str, str]) -> list[str]:
    """VLLM_* variables that this release does not read."""
    known = importlib.import_module("vllm.envs").environment_variables
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def make_config(model: str, arguments: Sequence[str]) -> Any:
    """The VllmConfig of ``vllm serve MODEL ARGUMENTS``.

    Raises:
        Refusal: the parser, a validator or the configuration refuses.
    """
    serve = importlib.import_module("vllm.entrypoints.cli.serve")
    engine = importlib.import_module("vllm.engine.arg_utils")
    usage = importlib.import_module("vllm.usage.usage_lib")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = _parser(serve).parse_args(["serve", model, *arguments])
            parsed.model = model  # as `vllm serve` does with its positional argument
            serve.cmd_init()[0].validate(parsed)
            _validate_server(serve, parsed)
            made = engine.AsyncEngineArgs.from_cli_args(parsed)
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        raise Refusal("arguments", clean(lines[-1] if lines else "no message")) from None
    except Exception as error:
        if not raised_in_vllm(error):
            raise
        raise Refusal("arguments", explain(error)) from error
    try:
        return made.create_engine_config(usage.UsageContext.OPENAI_API_SERVER)
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


def engine_facts(config: Any) -> dict[str, Any]:
    """The fields of the model's Engine, after the model was built: it sets some of them."""
    parallel, scheduler, cache = (
        config.parallel_config, config.scheduler_config, config.cache_config,
    )  # fmt: skip
    return {
        "tensor_parallel": parallel.tensor_parallel_size,
        "expert_parallel": bool(parallel.enable_expert_parallel),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "kv_cache_dtype": str(cache.cache_dtype),
        "block_size": cache.block_size,
        "quantization": config.model_config.quantization,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "prefix_caching": bool(cache.enable_prefix_caching),
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
    }
