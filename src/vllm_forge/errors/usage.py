"""What was asked for: the command line and matrix.toml. Exit codes 10-19."""

from __future__ import annotations

from vllm_forge.errors.base import ForgeError


class UsageError(ForgeError):
    """The command line asks for something that does not exist."""

    exit_code = 2


class MatrixFileError(ForgeError):
    """matrix.toml is missing or is not TOML."""

    exit_code = 10


class UnknownKeyError(ForgeError):
    """matrix.toml has a key that the model does not know."""

    exit_code = 11


class MatrixValueError(ForgeError):
    """A value in matrix.toml has the wrong type, or contradicts another row."""

    exit_code = 12


class UnknownSkuError(ForgeError):
    """No SKU (or arch) of that name has a row in matrix.toml."""

    exit_code = 13


class UnknownLineError(ForgeError):
    """No line of that name has a row in matrix.toml."""

    exit_code = 14


class UnsupportedCellError(ForgeError):
    """The line cannot serve this SKU; the row says why."""

    exit_code = 15
