"""Arguments to calls, nothing else."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.commands import MODULES
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import console, printable
from vllm_forge.host.errors import FileAccessError
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped option, and our exit code."""

    def error(self, message: str) -> NoReturn:
        _, found, words = message.partition("unrecognized arguments: ")
        hint = ""
        if found:
            near = difflib.get_close_matches(words.split()[0].partition("=")[0], OPTIONS, n=1)
            hint = f" Perhaps you meant {near[0]!r}?" if near else ""
        raise UsageError(f"{message}.{hint}", where=self.prog, remedy=f"{self.prog} --help")


# Every option of every command, for suggestions; filled by _parser().
OPTIONS: set[str] = set()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-forge", description="Build and prove patched vLLM images.", allow_abbrev=False
    )
    choices = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for module in MODULES:
        module.register(choices)
    for command in choices.choices.values():
        OPTIONS.update(command._option_string_actions)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the error class, 0 without one."""
    try:
        args = _parser().parse_args(argv)
        args.call(Project.find(), args)
    except ForgeError as error:
        return _failed(error)
    except BrokenPipeError:  # e.g. `| head`: who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept")
        return 130
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise  # not of a file: a fault of ours, whose traceback is wanted
        return _failed(
            FileAccessError(
                error.strerror or str(error),
                where=str(error.filename2 or error.filename or ""),
                remedy="give a path that can be read or written, on a disk with space left",
            )
        )
    return 0


def _failed(error: ForgeError) -> int:
    console.print(f"[bold red]{type(error).__name__}[/] (exit {error.exit_code})")
    console.print(printable(str(error)), markup=False)
    return error.exit_code
