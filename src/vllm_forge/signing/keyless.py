"""Keyless signatures: an identity's certificate and an entry in Sigstore's log, by sigstore-python.

Verified offline, with the roots that sigstore-python carries; signed only where the host has an
ambient identity, as jobs of hosted CI have.
"""

import logging
import re

from vllm_forge.host import printable
from vllm_forge.signing import errors
from vllm_forge.signing.bundle import PAYLOAD_TYPE, Bundle, Verified, parse_statement

# What sigstore-python 4.5's parsers let through of damaged certificates and log entries.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
# As Fulcio's certificates call GitHub's own runners; others are "self-hosted"
# (github.com/sigstore/fulcio, docs/oid-info.md, 1.3.6.1.4.1.57264.1.11).
HOSTED = "github-hosted"
PATTERN = re.compile(r"[*^$|\\()\[\]{}\s]")


def verify_keyless(bundle: Bundle, *, identity: str, issuer: str) -> Verified:
    """The statement of a bundle that exactly this identity of this issuer signed.

    Raises:
        IdentityError: identity or issuer is empty, or a pattern.
        UnknownSignerError: signed with a key.
        SignatureInvalidError: signature, certificate, log entry or identity do not hold.
    """
    # Loading these takes most of a second.
    from sigstore.errors import Error  # noqa: PLC0415
    from sigstore.models import Bundle as SigstoreBundle  # noqa: PLC0415
    from sigstore.verify import Verifier, policy  # noqa: PLC0415

    for name, value in (("identity", identity), ("issuer", issuer)):
        if not value or PATTERN.search(value):
            what = f"invalid --{name} {printable(value)!r}: expected the exact {name}"
            remedy = "give it as the certificate has it; patterns are not supported"
            raise errors.IdentityError(what, where=bundle.where, remedy=remedy)
    if bundle.hint is not None:
        what = f"signed by the key with hint {bundle.hint}, not by an identity"
        raise errors.UnknownSignerError(what, where=bundle.where, remedy="give its --key")
    # It would warn that it is offline, which is what we asked for.
    logging.getLogger("sigstore").setLevel(logging.ERROR)
    exact = policy.Identity(identity=identity, issuer=issuer)
    try:
        parsed = SigstoreBundle.from_json(bundle.content)
        kind, payload = Verifier.production(offline=True).verify_dsse(parsed, exact)
    except (Error, *MALFORMED) as error:
        raise _invalid(bundle, str(error)) from None
    if kind != PAYLOAD_TYPE or payload != bundle.statement:
        raise _invalid(bundle, f"another payload was signed, of type {kind}")
    statement = parse_statement(bundle)
    try:
        policy.OIDCRunnerEnvironment(HOSTED).verify(parsed.signing_certificate)
        hosted = True
    except (Error, *MALFORMED):
        hosted = False
    signer = f"{identity} ({issuer})"
    return Verified(statement=statement, content=payload, signer=signer, hosted=hosted)


def sign_keyless(statement: bytes) -> bytes:
    """A bundle signed as the ambient identity of this host; KeylessError where it has none."""
    # Of a service that answers 500; sigstore-python 4.5 has no public name for these.
    from sigstore._internal.fulcio.client import FulcioClientError  # noqa: PLC0415
    from sigstore._internal.rekor import RekorClientError  # noqa: PLC0415
    from sigstore.dsse import Statement  # noqa: PLC0415
    from sigstore.errors import Error  # noqa: PLC0415
    from sigstore.models import ClientTrustConfig  # noqa: PLC0415
    from sigstore.oidc import ExpiredIdentity, IdentityToken, detect_credential  # noqa: PLC0415
    from sigstore.sign import SigningContext  # noqa: PLC0415

    try:
        if (token := detect_credential()) is None:
            what = "this host has no identity to sign with"
            remedy = "sign with --key, or in a CI job that may request an identity token"
            raise errors.KeylessError(what, remedy=remedy)
        context = SigningContext.from_trust_config(ClientTrustConfig.production())
        with context.signer(IdentityToken(token)) as signer:
            return signer.sign_dsse(Statement(statement)).to_json().encode()
    except (
        Error, FulcioClientError, RekorClientError, ExpiredIdentity, OSError, *MALFORMED,
    ) as error:  # fmt: skip
        why = printable(str(error)) or type(error).__name__
        what = f"cannot sign as this host's identity: {why}"
        remedy = "see whether Sigstore's services answer, and sign again; or sign with --key"
        raise errors.KeylessError(what, remedy=remedy) from None


def _invalid(bundle: Bundle, why: str) -> errors.SignatureInvalidError:
    what = f"the keyless signature does not hold: {printable(why)}"
    remedy = "check --identity and --issuer; if they are right, get the file again"
    return errors.SignatureInvalidError(what, where=bundle.where, remedy=remedy)
