"""Write the golden files: ``python -m tests.golden.record [KIND ...]``.

Do so for a change of behaviour that is meant, and give its reason in the commit message.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.golden.cases import DATA, KINDS, read
from tests.golden.compare import dump, summary


def main(names: list[str]) -> None:
    """Record the kinds named; all of them without a name."""
    for name in names or KINDS:
        path = DATA / f"{name}.json"
        with tempfile.TemporaryDirectory() as folder:
            now = KINDS[name](Path(folder).resolve())
        if path.exists():
            print(f"{name}:\n{summary(read(name), now) or 'unchanged'}")
        path.write_text(dump(now) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
