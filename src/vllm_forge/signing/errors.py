"""Keys, the keyring, bundles and signatures."""

from vllm_forge.errors import ForgeError

REFUSED = 100
RED = 101
UNDECIDED = 102
FAULT = 103


class KeyFileError(ForgeError, exit_code=REFUSED):
    """A file is not a usable key: wrong kind, encrypted, unreadable, or readable by others."""


class KeyringError(ForgeError, exit_code=REFUSED):
    """The keyring's table is invalid, or does not match the files beside it."""


class BundleError(ForgeError, exit_code=REFUSED):
    """A file is not a Sigstore bundle with one signed in-toto statement."""


class UnknownSignerError(ForgeError, exit_code=RED):
    """A statement is signed by a key or an identity that is not trusted."""


class SignatureInvalidError(ForgeError, exit_code=RED):
    """A signature does not match what it is said to sign."""


class KeyRoleError(ForgeError, exit_code=RED):
    """A trusted key signed what its roles do not cover."""


class KeyRevokedError(ForgeError, exit_code=RED):
    """A statement is signed by a key that was revoked."""


class KeyExpiredError(ForgeError, exit_code=UNDECIDED):
    """A key is past its last day, or before its first."""


class IdentityError(ForgeError, exit_code=REFUSED):
    """An identity or issuer is not given exactly."""


class KeylessError(ForgeError, exit_code=FAULT):
    """The host offers no identity to sign with, or Sigstore's services do not answer."""
