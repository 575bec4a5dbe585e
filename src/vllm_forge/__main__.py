"""Run as ``python -m vllm_forge``."""

import sys

from vllm_forge.cli import main

if __name__ == "__main__":
    sys.exit(main())
