"""Arguments to calls, nothing else."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_forge import commands
from vllm_forge.errors import ForgeError, UsageError
from vllm_forge.host import console

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
# The first release whose DeepSeek V4 the patches' targets are known in.
OLDEST = "0.20.2"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-forge", description="Build and prove patched vLLM images.", allow_abbrev=False
    )
    choices = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    one = choices.add_parser("build", help="build one image", allow_abbrev=False)
    one.add_argument("sku", help="a SKU or an arch of matrix.toml, e.g. b300 or sm120")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--engine", help="docker or buildah (default: the one that is here)")
    one.add_argument("--base", default="rootfs", help="rootfs, or NAME@sha256:... of a registry")
    one.add_argument("--refresh-base", action="store_true", help="make rootfs and system again")
    one.add_argument("--output", type=Path, help="folder for the OCI layout (default: dist/)")
    one.add_argument("--load", action="store_true", help="also load it into the engine's store")
    one.add_argument("--push", metavar="REF", help="also push it, e.g. registry/name:tag")
    one.add_argument("--provision", action="store_true", help="install missing build tools (apt)")
    one.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    one.set_defaults(call=commands.build)

    one = choices.add_parser("provision", help="install the build tools (apt, as root)")
    one.add_argument("--registry", action="store_true", help="also docker-registry, for the tests")
    one.set_defaults(call=commands.install_tools)

    one = choices.add_parser("lock", help="resolve a line, write its lock")
    one.add_argument("--line")
    one.set_defaults(call=commands.lock)

    one = choices.add_parser("fetch", help="download a line's wheels")
    one.add_argument("--line")
    one.set_defaults(call=commands.fetch)

    one = choices.add_parser("patches", help="prove that every series applies exactly")
    one.add_argument("--line")
    one.add_argument("--update", action="store_true", help="write lock.toml anew")
    one.add_argument("--export", action="store_true", help="write each diff anew for this tree")
    one.set_defaults(call=commands.patches)

    one = choices.add_parser(
        "prove", help="run each patch's proof without it and with it", allow_abbrev=False
    )
    one.add_argument("--line", help="vLLM line (default: all)")
    one.set_defaults(call=commands.prove)

    one = choices.add_parser(
        "drift", help="what each vLLM release does to each patch", allow_abbrev=False
    )
    one.add_argument("--from", dest="first", default=OLDEST, help=f"oldest release ({OLDEST})")
    one.add_argument("--to", dest="last", help="newest release (default: the index's)")
    one.set_defaults(call=commands.drift)

    one = choices.add_parser("wheel", help="write a line's patched wheel")
    one.add_argument("--line")
    one.add_argument("--output", type=Path)
    one.set_defaults(call=commands.wheel)

    one = choices.add_parser("install", help="patch the vLLM of a virtual environment")
    one.add_argument("--python", type=Path, help="its interpreter (default: the active one's)")
    one.add_argument("--line")
    one.add_argument("--revert", action="store_true", help="put every file back as published")
    one.set_defaults(call=commands.install)

    one = choices.add_parser("clean", help="delete what the cache holds and no line needs")
    one.add_argument("--all", action="store_true", help="everything, downloads included")
    one.set_defaults(call=commands.clean)

    one = choices.add_parser("schema", help="write matrix.schema.json")
    one.set_defaults(call=commands.schema)
    for command in choices.choices.values():
        OPTIONS.update(command._option_string_actions)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the error class, 0 without one."""
    try:
        args = _parser().parse_args(argv)
        args.call(args)
    except ForgeError as error:
        console.print(f"[bold red]{type(error).__name__}[/] (exit {error.exit_code})")
        console.print(str(error), markup=False)
        return error.exit_code
    except BrokenPipeError:  # e.g. `| head`: who read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept")
        return 130
    return 0
