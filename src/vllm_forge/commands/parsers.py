"""The parser of the command line, and the options that mean the same in every command."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import vllm_forge
from vllm_forge.errors import UsageError
from vllm_forge.host import PlainConsole, head_commit, suggestion
from vllm_forge.matrix.cells import PACKAGED
from vllm_forge.pages.markdown import terminal_table
from vllm_forge.project import Project

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
# Least similarity of a suggestion: "--print" is not meant by "--port".
NEAR = 0.7


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors have suggestions; ``remedy``: without one."""

    remedy = "repeat the command with --help, which lists its options"

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, where=self.prog, remedy=Parser.remedy)

    def reject(self, arguments: Sequence[str]) -> NoReturn:
        """Raise for arguments that the command does not take."""
        options = [item for item in arguments if item.startswith("-") and item != "--"]
        name = options[0].partition("=")[0] if options else ""
        what = f"unknown option {name}" if name else f"unexpected argument {arguments[0]!r}"
        hint = suggestion(name, self._option_string_actions, least=NEAR, listed=False)
        remedy = Parser.remedy if hint else self.remedy
        raise UsageError(what + hint, where=self.prog, remedy=remedy)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = (
                suggestion(str(value), known, least=NEAR, listed=False)
                or f": expected one of {', '.join(known)}"
            )
            raise argparse.ArgumentError(action, f"invalid choice {value!r}{hint}")


class Version(argparse.Action):
    """Print the version and the commit: a wheel has it in its data, a checkout in git."""

    def __call__(self, *_: Any) -> NoReturn:
        if PACKAGED.is_dir():
            commit = (PACKAGED / "COMMIT").read_text(encoding="utf-8").strip()
        else:
            head, changed = head_commit(Path(vllm_forge.__file__).parents[2])
            commit = (head or "unknown") + (" with changes" if changed else "")
        print(f"vllm-forge {vllm_forge.__version__}, commit {commit}")
        raise SystemExit


class _Sku(argparse.Action):
    """Two places for one value; another one is kept as ``surplus``, for ``parse`` to reject."""

    def __call__(self, parser: Any, namespace: Any, values: Any, *_: Any, **__: Any) -> None:
        name = "sku" if getattr(namespace, "sku", None) in (None, values) else "surplus"
        setattr(namespace, name, values)


def option(*names: str, **settings: Any) -> Parser:
    """An option that several commands share, as their parent."""
    parent = Parser(add_help=False)
    parent.add_argument(*names, **settings)
    return parent


SKU = option("--sku", action=_Sku, help="SKU or arch of matrix.toml, e.g. b300 or sm120")
SKU.add_argument(
    "sku", nargs="?", action=_Sku, default=argparse.SUPPRESS, metavar="SKU", help="same as --sku"
)
LINE = option("--line", help="vLLM line (default: default_line of matrix.toml)")
EVERY_LINE = option("--line", help="only this vLLM line (default: all)")
JSON = option("--json", action="store_true", help="print one JSON document, also for an error")


def command(
    choices: Commands,
    name: str,
    call: Callable[[Project, argparse.Namespace], None],
    *parents: Parser,
    packaged: bool = False,
) -> Parser:
    """Add a command, described by the docstring of the function that runs it.

    ``packaged``: it needs no checkout, the data of a wheel do.
    """
    text = " ".join((call.__doc__ or "").split())
    parser = choices.add_parser(
        name, help=text[:1].lower() + text[1:].rstrip("."), description=text, parents=parents
    )
    parser.set_defaults(call=call, parser=parser, answered=False, packaged=packaged)
    return parser


def group(choices: Commands, name: str, *, help: str) -> Commands:
    """Add a group of commands; without one of them, they are listed."""
    parser = choices.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    commands = parser.add_subparsers(dest=f"{name}_command", metavar="COMMAND")

    def missing(_: Project, args: argparse.Namespace) -> None:
        args.parser.error(f"missing COMMAND: expected one of {', '.join(commands.choices)}")

    parser.set_defaults(call=missing, parser=parser, answered=False, packaged=True)
    return commands


def positive(text: str) -> float:
    """A number for an option; nan would be none, and 0 the default."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected a number greater than 0")


def count(text: str, least: int = 0) -> int:
    """A whole number for an option."""
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        what = f"invalid value {text!r}: expected a whole number from {least}"
        raise argparse.ArgumentTypeError(what)
    return int(text)


positive_count = partial(count, least=1)


def print_json(args: argparse.Namespace, document: object) -> None:
    """Print the one JSON document of a command; text is printed as it is."""
    text = document if isinstance(document, str) else json.dumps(document, indent=1, sort_keys=True)
    print(text)
    args.answered = True


def print_table(
    args: argparse.Namespace, document: object, head: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """Print rows for a terminal, or with --json the document."""
    if args.json:
        print_json(args, document)
    else:
        PlainConsole().print(terminal_table(head, rows))


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; UsageError, with a suggestion, of the command that was named.

    What stands after ``--`` is vLLM's, for commands that have ``vllm_flags``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, extra = parser.parse_known_args(words[:end])
    if "vllm_flags" in args:
        args.vllm_flags = tuple(words[end + 1 :])
    else:
        extra += words[end:]
    surplus = [args.surplus] if "surplus" in args else []
    if extra or any(item.startswith("-") for item in surplus):
        args.parser.reject([*surplus, *extra])
    if surplus:
        args.parser.error(f"two SKUs: {args.sku} and {args.surplus}")
    if getattr(args, "json", False) and getattr(args, "dry_run", False):
        args.parser.error("--json and --dry-run exclude each other: a dry run prints commands")
    if "sku" in args and args.sku is None:
        args.parser.error("missing SKU: give it as an argument or by --sku")
    return args
