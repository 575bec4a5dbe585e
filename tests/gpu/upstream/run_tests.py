"""Run contract tests or vLLM's own inside the image, by its own Python, without network.

Imports the standard library and what is in FOLDER, and nothing else of this project. Prints one
JSON object with the outcome of every test as its last line, and exits 0 if it could run at all:
who reads it decides what red means.

    python run_tests.py FOLDER LINE THREADS TEST...
"""

import contextlib
import io
import json
import os
import sys
from typing import Any

LINE_VARIABLE = "VLLM_FORGE_CONTRACT_LINE"
SOURCE_VARIABLE = "VLLM_FORGE_CONTRACT_SOURCE"
TAIL = 4000


class Outcomes:
    """A pytest plugin: the outcome of each test, why it has not passed, and the first red one's."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.why = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Setup, call and teardown each report; the worst one counts."""
        self.pytest_collectreport(report)
        if report.failed:
            self.tests[report.nodeid] = "failed"
        elif hasattr(report, "wasxfail"):  # passed or skipped, but not as a proof
            self.tests[report.nodeid] = "xpassed" if report.passed else "xfailed"
        elif report.skipped:
            self.tests[report.nodeid] = "skipped"
        elif report.when == "call":
            self.tests.setdefault(report.nodeid, "passed")

    def pytest_collectreport(self, report: Any) -> None:
        """A module that does not import has no tests."""
        if report.failed or report.skipped:
            self.reasons.setdefault(report.nodeid, _message(report))
        if report.failed:
            self.why = self.why or _message(report)


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    if isinstance(report.longrepr, tuple):  # of what is skipped: file, line, reason
        text = report.longrepr[-1]
    lines = [line for line in text.strip().splitlines() if line.strip()] or [""]
    # Of a module that does not import, the first lines say no more than that.
    return next((line[1:] for line in lines if line.startswith("E  ")), lines[0]).strip()


def main(folder: str, line: str, threads: str, *tests: str) -> None:
    """Run the tests of one line."""
    # After the image's own packages, which must not be shadowed.
    sys.path += [f"{folder}/tools", f"{folder}/src", folder]
    os.chdir(folder)
    os.environ |= {
        LINE_VARIABLE: line,
        SOURCE_VARIABLE: f"{folder}/source",
        "HF_HUB_OFFLINE": "1",
        "HOME": "/tmp",  # the container's own
        "OMP_NUM_THREADS": threads,
        "VLLM_NO_USAGE_STATS": "1",
    }
    import pytest  # on sys.path only now

    outcomes = Outcomes()
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *tests], plugins=[outcomes]
        )
    print(text.getvalue(), file=sys.stderr)
    verdict = {
        "exit": int(code),
        "tests": outcomes.tests,
        "reasons": outcomes.reasons,
        "why": outcomes.why,
        "tail": text.getvalue()[-TAIL:],
    }
    print("\n" + json.dumps(verdict), flush=True)
    os._exit(0)  # vLLM's threads may hold the interpreter


if __name__ == "__main__":
    main(*sys.argv[1:])
