"""Whether a config's patterns come to an end on the names that they are asked with.

A regular expression of a stranger's may take longer than anyone waits ("re:(a+)+$"), and neither
``re`` nor vLLM, which asks with the same ones, has a limit. So a child process with a limit on its
CPU time goes first; CPU time, so that a busy machine condemns nobody.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from vllm_forge.checkpoints.errors import CheckpointUnreadableError
from vllm_forge.host.errors import CommandFailedError

if TYPE_CHECKING:
    from collections.abc import Iterable

# A hundred times what the rules of a real artifact take on all of its names. The compiler unrolls
# what repeats, so memory has a limit too.
LIMIT_S, MEMORY = 10, 2 << 30
PATTERN = "re:"
# Standard library alone. Says which pattern is next, so that the last one said is the slow one.
CHILD = """
import json, re, resource, sys
seconds, memory, patterns, names, rest = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
for number, (pattern, target) in enumerate(patterns):
    print(number, flush=True)
    try:
        match = re.compile(pattern).match
    except (re.error, OverflowError, RecursionError):
        continue
    hits = [name for name in names if match(name)]
    if target and not hits:
        for name in rest:
            match(name)
print("all", flush=True)
"""


def require_an_end(
    targets: Iterable[str],
    ignore: Iterable[str],
    names: Iterable[str],
    rest: Iterable[str],
    where: str,
) -> None:
    """Refuse a config of which some pattern does not come to an end.

    Args:
        targets: rules of the groups; those that are no patterns take no time.
        ignore: rules of the ignore list.
        names: that all of them are asked with.
        rest: that a target is asked with which means none of these.
        where: the config, for messages.

    Raises:
        CheckpointUnreadableError: one takes more than LIMIT_S of CPU time, or MEMORY; or all of
            them together do.
    """
    rules = dict.fromkeys(ignore, False) | dict.fromkeys(targets, True)
    patterns = tuple((rule, flag) for rule, flag in rules.items() if rule.startswith(PATTERN))
    if patterns and (rule := _endless(patterns, tuple(names), tuple(rest))) is not None:
        raise CheckpointUnreadableError(
            f"quantization_config has a pattern that takes more than {LIMIT_S} s on the model's "
            f"names: {rule}",
            where=where,
            remedy="write it without a repetition of repetitions",
        )


@lru_cache(maxsize=64)
def _endless(
    patterns: tuple[tuple[str, bool], ...], names: tuple[str, ...], rest: tuple[str, ...]
) -> str | None:
    asked = [[rule.removeprefix(PATTERN), target] for rule, target in patterns]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD],
        input=json.dumps([LIMIT_S, MEMORY, asked, names, rest]),
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = done.stdout.split() or [""]
    if done.returncode == 0 and last == "all":
        return None
    if not last:
        raise CommandFailedError(
            f"the child that tries patterns did not begin: {done.stderr.strip()[-500:]}",
            where=sys.executable,
            remedy="see what this Python lacks: python -I -S -c 'import re, resource'",
        )
    return patterns[int(last)][0]
