"""Whether a config's patterns terminate on the names that they are matched with.

An untrusted regular expression may take longer than anyone waits ("re:(a+)+$"), and neither ``re``
nor vLLM, which matches the same ones, has a limit. So they are tried first, under a limit of CPU
time, which a busy machine does not exhaust; ``re`` looks for signals while it matches.
"""

from __future__ import annotations

import re
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import CheckpointUnreadableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A hundred times what the rules of a real artifact take on all of its names.
LIMIT_S = 10.0
MAX_LENGTH = 1 << 16  # of a pattern: its compiled form takes memory
PATTERN = "re:"


class _Expired(BaseException):
    """The CPU time is spent; not an Exception, so that nothing on the way handles it."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    def expire(*_: object) -> None:
        raise _Expired

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def require_termination(
    targets: Iterable[str],
    ignore: Iterable[str],
    names: Iterable[str],
    rest: Iterable[str],
    where: str,
) -> None:
    """Refuse a config with a pattern that does not terminate. Call it from the main thread.

    Args:
        targets: rules of the groups; those that are not patterns take no time.
        ignore: rules of the ignore list.
        names: that all of them are matched with.
        rest: that a target is matched with which matches none of these.
        where: the config, for messages.

    Raises:
        CheckpointUnreadableError: one is longer than MAX_LENGTH, or takes more than LIMIT_S of CPU
            time, or all of them together do.
    """
    rules = dict.fromkeys(ignore, False) | dict.fromkeys(targets, True)
    names, rest, rule = list(names), list(rest), ""
    try:
        with _cpu_limit(LIMIT_S):
            for rule, is_target in rules.items():
                if not rule.startswith(PATTERN):
                    continue
                if len(rule) > MAX_LENGTH:
                    raise _refused(f"longer than {MAX_LENGTH} characters", rule, where)
                try:
                    match = re.compile(rule.removeprefix(PATTERN)).match
                except (re.error, OverflowError, RecursionError):
                    continue  # checks_config.rules reports it
                matched = [name for name in names if match(name)]
                if is_target and not matched:
                    for name in rest:
                        match(name)
    except _Expired:
        what = f"that takes more than {LIMIT_S:g} s on the model's names"
        raise _refused(what, rule, where) from None


def _refused(what: str, rule: str, where: str) -> CheckpointUnreadableError:
    return CheckpointUnreadableError(
        f"quantization_config has a pattern {what}: {rule[:500]}",
        where=where,
        remedy="write it without a repetition of repetitions",
    )
