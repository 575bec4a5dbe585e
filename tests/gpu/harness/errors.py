"""How a run ends that is not green; exit codes mean what vllm-forge's of the GPU suite mean."""

from __future__ import annotations

from typing import ClassVar


class HarnessError(Exception):
    """Base: what happened, where, and what to do."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        where, remedy = where and f"\n  where:  {where}", remedy and f"\n  remedy: {remedy}"
        super().__init__(f"{what}{where}{remedy}")


class InputError(HarnessError):
    """The plan, an option, a workload or a cache cannot be used."""

    exit_code = 90


class SuiteRedError(HarnessError):
    """A test failed."""

    exit_code = 91


class SuiteUndecidedError(HarnessError):
    """No test failed, but some have no verdict, or pytest did not run to its end."""

    exit_code = 92


class WrongGpuError(HarnessError):
    """This host has no GPU, or one of another SKU."""

    exit_code = 93
