"""in-toto statements of a release: what is signed about an image.

Source: github.com/in-toto/attestation, spec/v1/statement.md.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from vllm_forge.host import canonical
from vllm_forge.matrix import FrozenModel

SBOM = "https://cyclonedx.org/bom"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VEX = "https://openvex.dev/ns/v0.2.0"
VSA = "https://slsa.dev/verification_summary/v1"


class Subject(FrozenModel):
    """What a statement is about: an in-toto ResourceDescriptor."""

    name: str
    digest: dict[str, str] = Field(min_length=1)


class Statement(FrozenModel):
    """An in-toto statement v1; ``predicate`` is as its type has it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    kind: Literal["https://in-toto.io/Statement/v1"] = Field(
        alias="_type", default="https://in-toto.io/Statement/v1"
    )
    subject: tuple[Subject, ...] = Field(min_length=1)
    predicate_type: str = Field(alias="predicateType")
    predicate: dict[str, Any]

    @property
    def content(self) -> bytes:
        """Canonical bytes, to be signed."""
        return canonical(self.model_dump(mode="json", by_alias=True))

    def has_subject(self, digest: str) -> bool:
        """Whether it is about the manifest ``sha256:<hex>``."""
        algorithm, _, value = digest.partition(":")
        return any(subject.digest.get(algorithm) == value for subject in self.subject)
