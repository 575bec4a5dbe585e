"""Signed results: a Sigstore bundle beside a record, about the image that was measured.

The statement's subjects are the image and the record; the record names its rows by their hash.
"""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from vllm_forge.bench.errors import ResultSignatureError
from vllm_forge.bench.results import Arm, Result
from vllm_forge.host import parse_json, read_plain, write_whole
from vllm_forge.signing import Keyring, PrivateKey, Role, read, sign, verify
from vllm_forge.signing.bundle import LARGEST, Statement, Subject

PREDICATE_TYPE = "https://vllm-forge.dev/bench/v1"
SUFFIX = ".sigstore.json"
ROLE: Role = "receipts"  # of keys: evidence about an image


def sign_result(arm: Arm, key: PrivateKey) -> Path:
    """Write the bundle of a record; its path."""
    path = arm.path.with_suffix(SUFFIX)
    write_whole(path, sign(_statement(arm), key))
    return path


def require_signed(arm: Arm, keys: Keyring) -> str:
    """The name of the key that signed a record.

    ResultSignatureError: it is unsigned, or the signature is of another record; and what
    `signing.verify` raises.
    """
    path = arm.path.with_suffix(SUFFIX)
    try:
        bundle = read(read_plain(path, LARGEST), str(path))
    except (OSError, ValueError) as error:  # none, or not a plain file
        what = "the result is unsigned" + (f": {error}" if isinstance(error, ValueError) else "")
        remedy = "sign it: nox -s bench -- sign RECORD --key key.pem"
        raise ResultSignatureError(what, where=path, remedy=remedy) from None
    verified = verify(bundle, keys, role=ROLE, now=datetime.now(UTC))
    if verified.content != _statement(arm):
        what, remedy = "the signature is of another result", "get record and signature again"
        raise ResultSignatureError(what, where=path, remedy=remedy)
    return verified.signer


def _statement(arm: Arm) -> bytes:
    """ResultSignatureError: the record has changed since it was read, or only claims its image."""
    path, result = arm.path, arm.result
    if result.server.claimed:
        what = "the result is of a claimed image: which one answered was not seen"
        remedy = "measure a container that an engine of this host runs"
        raise ResultSignatureError(what, where=path, remedy=remedy)
    content = read_plain(path)
    if Result.model_validate(parse_json(content)) != result:
        what, remedy = "the record was changed while it was read", "run the same command again"
        raise ResultSignatureError(what, where=path, remedy=remedy)
    image = result.server.image.removeprefix("sha256:")
    return Statement(
        subject=(
            Subject(name="image", digest={"sha256": image}),
            Subject(name=path.name, digest={"sha256": hashlib.sha256(content).hexdigest()}),
        ),
        predicate_type=PREDICATE_TYPE,
        predicate={"arm": result.arm, "session": result.session, "gpu": result.server.gpu,
                   "starts": len(result.starts)},
    ).content  # fmt: skip
