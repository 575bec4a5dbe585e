"""The checkout: matrix.toml, what is asked of it, and committed records."""

from vllm_forge.errors import ForgeError

REFUSED = 10


class MatrixFileError(ForgeError, exit_code=REFUSED):
    """matrix.toml is missing or is not TOML."""


class UnknownKeyError(ForgeError, exit_code=REFUSED):
    """matrix.toml has a key that the model does not know."""


class MatrixValueError(ForgeError, exit_code=REFUSED):
    """A value in matrix.toml has the wrong type, or contradicts another row."""


class UnknownSkuError(ForgeError, exit_code=REFUSED):
    """No SKU (or arch) of that name has a row in matrix.toml."""


class UnknownLineError(ForgeError, exit_code=REFUSED):
    """No line of that name has a row in matrix.toml."""


class UnsupportedCellError(ForgeError, exit_code=REFUSED):
    """The line cannot serve this SKU; the row says why."""


class RecordFileError(ForgeError, exit_code=REFUSED):
    """A committed record is not JSON."""


class UnsupportedSkuError(ForgeError, exit_code=REFUSED):
    """A product that no line serves; its row says why."""
