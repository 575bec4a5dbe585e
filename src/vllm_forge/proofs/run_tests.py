"""Run contract tests inside the image, by its own Python, without network or GPU.

Imports the standard library and the inputs next to it, and nothing else of vllm_forge. Prints one
JSON object with the outcome of every test as its last line, and exits 0 if it could run at all:
the host decides what red means.

    python run_tests.py LINE THREADS TEST...
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

INPUTS = Path(__file__).parent
LINE_VARIABLE = "VLLM_FORGE_CONTRACT_LINE"
SOURCE_VARIABLE = "VLLM_FORGE_CONTRACT_SOURCE"
TAIL = 4000


class Outcomes:
    """A pytest plugin: the outcome of each test, and the message of the first red one."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.why = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown each report; the worst one counts."""
        if report.failed:
            self.tests[report.nodeid] = "failed"
            self.why = self.why or _message(report)
        elif hasattr(report, "wasxfail"):  # passed or skipped, but not as a proof
            self.tests[report.nodeid] = "xpassed" if report.passed else "xfailed"
        elif report.skipped:
            self.tests[report.nodeid] = "skipped"
        elif report.when == "call":
            self.tests.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: Any) -> None:
        """A module that does not import has no tests."""
        if report.failed:
            self.why = self.why or _message(report)


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[0].strip() if lines else ""


def main(line: str, threads: str, *tests: str) -> None:
    """Run the tests of one line."""
    # After the image's own packages, which must not be shadowed.
    sys.path += [str(INPUTS / "tools"), str(INPUTS / "src"), str(INPUTS)]
    os.chdir(INPUTS)
    os.environ |= {
        LINE_VARIABLE: line,
        SOURCE_VARIABLE: str(INPUTS / "source"),
        "HF_HUB_OFFLINE": "1",
        "HOME": "/tmp",  # noqa: S108 - the container's own
        "OMP_NUM_THREADS": threads,
        "VLLM_NO_USAGE_STATS": "1",
    }
    import pytest  # noqa: PLC0415 - on sys.path only now

    outcomes = Outcomes()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", f"--rootdir={INPUTS}", *tests], plugins=[outcomes]
        )
    print(text.getvalue(), file=sys.stderr)
    verdict = {
        "exit": int(code),
        "tests": outcomes.tests,
        "why": outcomes.why,
        "tail": text.getvalue()[-TAIL:],
    }
    print("\n" + json.dumps(verdict), flush=True)
    os._exit(0)  # vLLM's threads may hold the interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
