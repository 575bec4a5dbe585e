"""The contract of a cell: its image has code for every family that vLLM selects for it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_forge.host import suggestion
from vllm_forge.kernels.coverage.families import FINE, Exemption, Need, needed
from vllm_forge.kernels.coverage.site_packages import Coverage, SitePackages
from vllm_forge.kernels.coverage.target import Capability, parse_capability
from vllm_forge.kernels.errors import ContractError, StaleExceptionError, UnknownFamilyError
from vllm_forge.kernels.selection.model import Answer, Choice, Draft

PRESET = "preset/"
COUNTED = re.compile(r" in \d+$")  # "SchemeA in 3, SchemeB in 40", where layers differ
NOT_MADE = Coverage(verdict="missing", codes=(), detail="it is not made for such a GPU")


@dataclass(frozen=True, kw_only=True)
class KernelSelection:
    """What vLLM selects for one question; None if it selects nothing of that kind.

    Attributes:
        by: name of the question, e.g. of a preset and its artifact.
        schemes: classes of the quantization schemes of layers other than routed experts.
        experts: scheme class and MoE backend of the routed experts, the draft layer's too, e.g.
            ``("ModelOptNvFp4FusedMoE", "MARLIN")``.
    """

    by: str
    attention: str | None = None
    linear: str | None = None
    schemes: tuple[str, ...] = ()
    experts: tuple[tuple[str, str], ...] = ()

    def families(self, need: Need) -> dict[str, str]:
        """Family -> which selection needs it."""
        backends = [
            (need.attention, self.attention, "attention"),
            (need.linear, self.linear, "linear"),
            *((need.modules, scheme, "layers with") for scheme in self.schemes),
        ]
        families = {
            name: f"{kind} {backend}"
            for table, backend, kind in backends
            if backend is not None
            for name in needed(table, backend, kind)
        }
        for scheme, backend in self.experts:
            if scheme not in need.experts:
                raise UnknownFamilyError(
                    f"unknown scheme {scheme!r} of experts{suggestion(scheme, need.experts)}",
                    where="src/vllm_forge/kernels/coverage/families.toml, [need.experts]",
                    remedy="add a table for that scheme, with its backends",
                )
            for name in needed(need.experts[scheme], backend, f"experts with {scheme}"):
                families[name] = f"experts {backend}, {scheme}"
        return families


def selections_of(answers: Mapping[str, Answer]) -> tuple[KernelSelection, ...]:
    """What vLLM selects for each preset and artifact that it serves, on one SKU's device."""
    return tuple(
        _selection(answer)
        for name, answer in answers.items()
        if name.startswith(PRESET) and answer.refused is None
    )


def _selection(answer: Answer) -> KernelSelection:
    parts: list[Answer | Draft] = [answer] if answer.draft is None else [answer, answer.draft]
    experts = [(part.experts_scheme, _chosen(part.moe)) for part in parts]
    modules = [text for part in parts for text in part.modules.values()]
    schemes = {COUNTED.sub("", scheme) for text in modules for scheme in text.split(", ")}
    return KernelSelection(
        by=answer.name,
        attention=_chosen(answer.attention),
        linear=_chosen(answer.linear),
        schemes=tuple(sorted(schemes - {scheme for scheme, _ in experts if scheme})),
        # Experts without a backend are an unknown backend, not an empty need.
        experts=tuple((scheme, backend or "none") for scheme, backend in experts if scheme),
    )


def _chosen(choice: Choice | None) -> str | None:
    return None if choice is None else choice.chosen


@dataclass(frozen=True, kw_only=True)
class FamilyFinding:
    """A family that a cell needs; ``needed_by`` is empty if every cell does."""

    family: str
    coverage: Coverage
    needed_by: tuple[str, ...]
    exemption: Exemption | None


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The families that the image of one SKU and line needs."""

    cell: str
    findings: tuple[FamilyFinding, ...]
    stale: tuple[Exemption, ...]
    fixes: dict[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each exception, for people who build or start the image."""
        return tuple(
            f"{row.family}: {row.coverage.verdict}. {row.exemption.reason}"
            for row in self.findings
            if row.exemption is not None
        )

    def record(self) -> dict[str, dict[str, str]]:
        """Family -> verdict, and what it runs as; for the record of a build."""
        return {
            row.family: {"verdict": row.coverage.verdict, "code": ", ".join(row.coverage.codes)}
            for row in sorted(self.findings, key=lambda row: row.family)
        }

    def check(self) -> None:
        """Raise ContractError or StaleExceptionError if the contract does not hold."""
        broken = [
            row
            for row in self.findings
            if row.coverage.verdict not in FINE and row.exemption is None
        ]
        if broken:
            raise ContractError(
                f"{self.cell} needs kernels that its image does not have:\n"
                + "\n".join(
                    f"  - {row.family}: {row.coverage.verdict}; {row.coverage.detail}\n"
                    f"    needed by: {', '.join(row.needed_by) or 'every cell'}\n"
                    f"    would help: {self.fixes[row.family]}"
                    for row in broken
                ),
                where="src/vllm_forge/kernels/coverage/families.toml",
                remedy="use packages that have them, or accept a missing kernel with an "
                "[[exception]] row and its reason",
            )
        if self.stale:
            raise StaleExceptionError(
                f"{self.cell}: exceptions that are not needed any more: "
                + ", ".join(f"{row.family} ({row.verdict})" for row in self.stale),
                where="src/vllm_forge/kernels/coverage/families.toml, [[exception]]",
                remedy="delete the row, or take the line or the capability out of it",
            )


def contract(
    contents: SitePackages,
    *,
    cell: str,
    line: str,
    capability: Capability,
    selections: Sequence[KernelSelection],
) -> Contract:
    """Compare a cell's selections, of each preset of its SKU, with its image."""
    rows = contents.rows
    needs: dict[str, list[str]] = {name: [] for name in rows.need.always}
    for selected in selections:
        for name, why in selected.families(rows.need).items():
            needs.setdefault(name, []).append(f"{selected.by} ({why})")
    accepted = [
        row
        for row in rows.exception
        if line in row.lines and "{}.{}".format(*capability) in row.capabilities
    ]
    exemptions = {(row.family, str(row.verdict)): row for row in reversed(accepted)}
    coverages = {name: contents.coverage(name, capability, line) or NOT_MADE for name in needs}
    findings = tuple(
        FamilyFinding(
            family=name,
            coverage=coverages[name],
            needed_by=tuple(dict.fromkeys(reasons)),
            exemption=exemptions.get((name, coverages[name].verdict)),
        )
        for name, reasons in needs.items()
    )
    used = {id(item.exemption) for item in findings}
    return Contract(
        cell=cell,
        findings=findings,
        stale=tuple(row for row in accepted if id(row) not in used),
        fixes={name: family.fix for name, family in rows.family.items()},
    )


def line_record(
    contents: SitePackages, line: str, contracts: Mapping[str, tuple[str, Contract | None]]
) -> dict[str, Any]:
    """The coverage of a line's packages: parts of records/coverage/<line>.json.

    ``contracts``: SKU -> compute capability, and the contract of its cell if the line serves it.
    """

    def cell(family: str, capability: str, of_cell: Contract | None) -> dict[str, Any]:
        findings = () if of_cell is None else of_cell.findings
        finding = next((row for row in findings if row.family == family), None)
        if finding is None:
            coverage = contents.coverage(family, parse_capability(capability), line)
            needed_by, exemption = None, None
        else:
            coverage, exemption = finding.coverage, finding.exemption
            needed_by = list(finding.needed_by) or ["every cell"]
        return {
            "verdict": None if coverage is None else coverage.verdict,
            "codes": [] if coverage is None else list(coverage.codes),
            "detail": "" if coverage is None else coverage.detail,
            "needed_by": needed_by,
            "exception": None if exemption is None else exemption.reason,
        }

    return {
        "skus": {sku: capability for sku, (capability, _) in contracts.items()},
        "coverage": {
            family: {sku: cell(family, *row) for sku, row in contracts.items()}
            for family in contents.rows.family
        },
        "libraries": contents.libraries(),
    }
