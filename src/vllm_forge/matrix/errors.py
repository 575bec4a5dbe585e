"""matrix.toml and what is asked of it."""

from __future__ import annotations

from vllm_forge.errors import ForgeError

REFUSED = 10


class MatrixFileError(ForgeError):
    """matrix.toml is missing or is not TOML."""

    exit_code = REFUSED


class UnknownKeyError(ForgeError):
    """matrix.toml has a key that the model does not know."""

    exit_code = REFUSED


class MatrixValueError(ForgeError):
    """A value in matrix.toml has the wrong type, or contradicts another row."""

    exit_code = REFUSED


class UnknownSkuError(ForgeError):
    """No SKU (or arch) of that name has a row in matrix.toml."""

    exit_code = REFUSED


class UnknownLineError(ForgeError):
    """No line of that name has a row in matrix.toml."""

    exit_code = REFUSED


class UnsupportedCellError(ForgeError):
    """The line cannot serve this SKU; the row says why."""

    exit_code = REFUSED


class UnsupportedSkuError(ForgeError):
    """A product that no line serves; its row says why."""

    exit_code = REFUSED
