"""The gate's decision on an image, as a SLSA verification summary (VSA).

It names the policy by digest, the statements that it relied on, the tags that the image gets, and
the tiers that were waived. Source: https://slsa.dev/spec/v1.2/verification_summary.
"""

import hashlib
from datetime import datetime
from typing import Any, Literal

from pydantic import AwareDatetime, ConfigDict, Field

import vllm_forge
from vllm_forge.host import canonical
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import ReleasePolicy, Stage
from vllm_forge.release.evidence import DECISION, Evidence, content_of, slsa_level
from vllm_forge.release.gate import Gate, Waiver

VERIFIER = "https://vllm-forge.dev/gate"
SLSA_VERSION = "1.2"
LEVEL = "SLSA_BUILD_LEVEL_"


class Resource(FrozenModel):
    """A statement by its kind, or a policy, with the hash of its bytes."""

    uri: str
    digest: dict[Literal["sha256"], str] = Field(min_length=1)

    @property
    def sha256(self) -> str:
        return self.digest["sha256"]


class Verifier(FrozenModel):
    id: str
    version: dict[str, str]


class Detail(FrozenModel):
    """What a VSA has no field for."""

    stage: Stage
    tags: tuple[str, ...] = Field(min_length=1)
    waivers: tuple[Waiver, ...] = ()


class Decision(FrozenModel):
    """The predicate; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    verifier: Verifier
    time: AwareDatetime = Field(alias="timeVerified")
    resource: str = Field(alias="resourceUri")
    policy: Resource
    inputs: tuple[Resource, ...] = Field(alias="inputAttestations")
    result: Literal["PASSED"] = Field(alias="verificationResult")
    levels: tuple[str, ...] = Field(alias="verifiedLevels")
    slsa_version: str = Field(alias="slsaVersion")
    detail: Detail = Field(alias="vllmForge")

    @property
    def statements(self) -> set[str]:
        """Hashes of the statements that it relies on."""
        return {row.sha256 for row in self.inputs}


def make_decision(
    gate: Gate, tags: tuple[str, ...], time: datetime, evidence: Evidence, stack: dict[str, Any]
) -> Decision:
    """The decision on an image that passed: on all statements that count, but earlier decisions."""
    return Decision(
        verifier=Verifier(id=VERIFIER, version={"vllm-forge": vllm_forge.__version__}),
        time=time,
        resource=resource(stack, str(gate.digest)),
        policy=policy_of_stage(gate.stage, gate.policy),
        inputs=tuple(
            Resource(uri=name, digest={"sha256": content_of(row)})
            for name in sorted(evidence.named.keys() - {DECISION})
            for row in evidence.signed(name)
        ),
        result="PASSED",
        levels=(f"{LEVEL}{slsa_level(evidence.signers('provenance'))}",),
        slsa_version=SLSA_VERSION,
        detail=Detail(stage=gate.stage, tags=tags, waivers=gate.waivers),
    )


def resource(stack: dict[str, Any], digest: str) -> str:
    """Package URL of an image, as its SBOM has it: whatever registry it is in."""
    return f"pkg:oci/vllm-{stack['vllm_release']}-{stack['sku']}@{digest}?arch=amd64"


def policy_of_stage(stage: Stage, policy: ReleasePolicy) -> Resource:
    """A stage's row of matrix.toml, by its hash."""
    row = {stage: policy.model_dump(mode="json")}
    digest = hashlib.sha256(canonical(row)).hexdigest()
    return Resource(uri=f"matrix.toml#release.{stage}", digest={"sha256": digest})
