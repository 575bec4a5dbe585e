"""Signatures: keys, the keyring in ``records/keys``, and Sigstore bundles. Knows no images."""

from vllm_forge.signing.bundle import (
    PAYLOAD_TYPE,
    Bundle,
    Verified,
    pae,
    read,
    sign,
    verify,
    wrap,
)
from vllm_forge.signing.keys import (
    FOLDER,
    Keyring,
    PrivateKey,
    Role,
    TrustedKey,
    load_private,
    read_keyring,
    read_public,
)
