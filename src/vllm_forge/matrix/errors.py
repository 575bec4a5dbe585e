"""The checkout: matrix.toml, what is asked of it, and committed records."""

from vllm_forge.errors import ForgeError

REFUSED = 10


class MatrixFileError(ForgeError, exit_code=REFUSED):
    """matrix.toml is missing or is not TOML."""


class CheckoutMissingError(ForgeError, exit_code=REFUSED):
    """The command needs a checkout, and an installed wheel has only its data."""


class MatrixValueError(ForgeError, exit_code=REFUSED):
    """matrix.toml has an unknown key, or a value of the wrong type or against another row."""


class UnknownSkuError(ForgeError, exit_code=REFUSED):
    """No SKU (or arch) of that name has a row in matrix.toml."""


class UnknownLineError(ForgeError, exit_code=REFUSED):
    """No line of that name has a row in matrix.toml."""


class UnsupportedCellError(ForgeError, exit_code=REFUSED):
    """The line, or no line at all, can serve this SKU; the row says why."""


class MultiNodeError(ForgeError, exit_code=REFUSED):
    """Flags of vLLM that spread one server over several hosts or process groups."""


class RecordFileError(ForgeError, exit_code=REFUSED):
    """A committed record is not JSON."""
