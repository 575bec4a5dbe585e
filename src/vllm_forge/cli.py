"""Arguments to calls, failures to messages and exit codes."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import NoReturn

from vllm_forge.commands import MODULES
from vllm_forge.commands.parsers import Parser, Version, parse
from vllm_forge.errors import ForgeError
from vllm_forge.host import console, printable
from vllm_forge.host.errors import FileAccessError, ToolMissingError
from vllm_forge.host.run import end_commands, stopping
from vllm_forge.project import Project

CODES = (
    "Exit codes: 0 success, 1 unexpected error (a bug), 2 wrong usage; of others the last digit "
    "is the meaning: 0 input refused, 1 red verdict, 2 undecided, 3 fault of the host or network."
)
# Of a read or a write, whose error names no file; ENOENT: the working directory was deleted.
NAMELESS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOENT,
}  # fmt: skip
STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _parser() -> Parser:
    parser = Parser(
        prog="vllm-forge", description="Build and prove patched vLLM images.", epilog=CODES
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print version and commit")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in MODULES:
        module.register(choices)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the error class, 0 without one."""
    for number, (name, mode) in enumerate(STREAMS.items()):
        if getattr(sys, name) is None:  # closed (`>&-`): a file that is opened must not get it
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
    try:
        with _signals():
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # e.g. `| head`
        return _stopped("stdout was closed: the output is incomplete", signal.SIGPIPE)
    except KeyboardInterrupt as stop:  # of `_signals`: with its number
        return _stopped("interrupted; what was finished is kept", *(stop.args or [signal.SIGINT]))
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # Python would fail to flush it, too, and exit with 120
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: Sequence[str]) -> int:
    as_json = "--json" in argv
    try:
        args = parse(_parser(), argv)
        try:
            project = Project.find()
            if not args.packaged:
                project.require_checkout(args.parser.prog)
            args.call(project, args)
            sys.stdout.flush()
        except Exception:
            as_json = as_json and not args.answered
            raise
    except ForgeError as error:
        return _failed(error, as_json=as_json)
    except BrokenPipeError:
        raise
    except OSError as error:
        refused = _access_error(error)
        if refused is None:
            raise
        return _failed(refused, as_json=as_json)
    except RuntimeError as error:  # of Path.resolve() until Python 3.13
        if "Symlink loop" not in str(error):
            raise
        loop = FileAccessError(str(error), remedy="give a path that can be read")
        return _failed(loop, as_json=as_json)
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Turn signals into an exception, after they ended the commands; what nohup ignores stays so.

    The commands have sessions of their own, so Ctrl-C does not reach them by itself.
    """

    def stop(number: int, _: FrameType | None) -> NoReturn:
        end_commands()
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stopping.clear()


def _access_error(error: OSError) -> ForgeError | None:
    """What the system refuses of a file; None for an error of no file, which is a bug."""
    what, where = error.strerror or str(error), error.filename2 or error.filename
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_name == "_execute_child" and "/" not in str(where):
        remedy = "install it, or add its folder to PATH"
        return ToolMissingError(f"{where} is not installed", remedy=remedy)
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        _, where, what = error.args[0][-1]  # of copytree: (source, target, reason) of each file
    elif error.filename is None and error.errno not in NAMELESS:
        return None
    return FileAccessError(
        what,
        where=where or "",
        remedy="give a path that can be read or written, on a disk with space left",
    )


def _failed(error: ForgeError, *, as_json: bool) -> int:
    with contextlib.suppress(OSError):  # the disk behind stderr may be full, its reader gone
        if as_json:
            print(json.dumps({"error": error.as_dict()}, indent=1))
        console.print(f"[bold red]{type(error).__name__}[/] (exit {error.exit_code})")
        console.print(printable(str(error)), markup=False)
    return error.exit_code


def _stopped(message: str, number: int) -> int:
    with contextlib.suppress(OSError):  # SIGHUP: the terminal may be gone
        console.print(f"{message} ({signal.Signals(number).name})")
    return 128 + number
