"""Benchmarks: results, what they are compared by, and the verdict."""

from vllm_forge.errors import ForgeError

REFUSED = 120
RED = 121
UNDECIDED = 122
FAULT = 123

# The project is on no index: a name there would be somebody else's package.
EXTRA = "use nox -s bench, which installs them; or install the extra: pip install 'WHEEL[bench]'"


class ClaimsFileError(ForgeError, exit_code=REFUSED):
    """claims.toml, or a file with raw results that it names, cannot be used."""


class LibraryMissingError(ForgeError, exit_code=FAULT):
    """A library that only benchmarks need is not installed."""


class ClaimsStaleError(ForgeError, exit_code=UNDECIDED):
    """The verdicts on claims were computed from other rows than those of claims.toml."""


class ResultFileError(ForgeError, exit_code=REFUSED):
    """A result cannot be read, or its rows are not those that it was written with."""


class InvalidResultError(ForgeError, exit_code=REFUSED):
    """A result, or a comparison, has a fault that makes a verdict worthless."""


class GateFailedError(ForgeError, exit_code=RED):
    """A candidate is worse than the reference by more than a gate's margin."""


class GateUndecidedError(ForgeError, exit_code=UNDECIDED):
    """The results cannot decide a gate."""


class WorkloadFileError(ForgeError, exit_code=REFUSED):
    """A file of prompts cannot be read, or names an item twice."""


class ServerUnreachableError(ForgeError, exit_code=FAULT):
    """The server that is to be measured does not answer."""


class ArmUnknownError(ForgeError, exit_code=REFUSED):
    """A result cannot be bound to an image and a GPU: one of them is not known here."""


class SandboxError(ForgeError, exit_code=FAULT):
    """Code of an answer cannot be isolated on this host, so it is not executed."""


class SessionFileError(ForgeError, exit_code=REFUSED):
    """A session or its plan cannot be used, or belongs to other results."""


class ServerStartError(ForgeError, exit_code=FAULT):
    """A server that a session starts ended, or did not answer in time."""


class StartFailedError(ForgeError, exit_code=UNDECIDED):
    """A start of a session failed in an earlier run, and is not repeated unasked."""


class CrossCheckFailedError(ForgeError, exit_code=RED):
    """Another tool's figures of a cell differ by more than server starts do."""


class ResultSignatureError(ForgeError, exit_code=REFUSED):
    """A result must be signed and is not, or its signature is of another one."""
