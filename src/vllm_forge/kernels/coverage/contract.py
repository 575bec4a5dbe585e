"""The contract of a cell: its image has code for every family that vLLM selects for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm_forge.errors import suggestion
from vllm_forge.kernels.coverage.device_code import Capability, parse_capability
from vllm_forge.kernels.coverage.families import FINE, Coverage, Exemption, Need, SitePackages
from vllm_forge.kernels.errors import ContractError, StaleExceptionError, UnknownFamilyError
from vllm_forge.kernels.selection.questions import Answer, Layers

T = TypeVar("T")
PRESET = "preset/"
COUNTED = re.compile(r" in \d+$")  # "SchemeA in 3, SchemeB in 40", where layers differ
NOT_MADE = Coverage(verdict="missing", codes=(), detail="it is not made for such a GPU")


def needed(table: dict[str, T], chosen: str, what: str) -> T:
    """The row of what vLLM chose in a table of Need; ``what`` for the message."""
    if chosen not in table:
        raise UnknownFamilyError(
            f"missing row for {what} {chosen!r}{suggestion(chosen, table)}",
            where="src/vllm_forge/kernels/coverage/families.toml, [need]",
            remedy="add a row with the families it needs",
        )
    return table[chosen]


def families_of(answer: Answer, need: Need) -> dict[str, str]:
    """Family -> which selection of an answer, or of its draft layer, needs it."""
    parts: list[Layers] = [answer] if answer.draft is None else [answer, answer.draft]
    experts = [(part.experts_scheme, part.moe) for part in parts if part.experts_scheme]
    modules = [text for part in parts for text in part.modules.values()]
    schemes = {COUNTED.sub("", scheme) for text in modules for scheme in text.split(", ")}
    others = sorted(schemes.difference(scheme for scheme, _ in experts))
    attention, linear = answer.attention, answer.linear
    backends = [
        (need.attention, attention.chosen if attention else None, "attention"),
        (need.linear, linear.chosen if linear else None, "linear"),
        *((need.modules, scheme, "layers with") for scheme in others),
    ]
    families = {
        name: f"{kind} {backend}"
        for table, backend, kind in backends
        if backend is not None
        for name in needed(table, backend, kind)
    }
    for scheme, moe in experts:
        table = needed(need.experts, scheme, "experts with")
        # Experts without a backend are an unknown backend, not an empty need.
        backend = moe.chosen if moe and moe.chosen else "none"
        for name in needed(table, backend, f"experts with {scheme}"):
            families[name] = f"experts {backend}, {scheme}"
    return families


@dataclass(frozen=True, kw_only=True)
class FamilyFinding:
    """A family that a cell needs; ``needed_by`` is empty if every cell does."""

    family: str
    coverage: Coverage
    needed_by: tuple[str, ...]
    exemption: Exemption | None
    fix: str


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The families that the image of one SKU and line needs."""

    cell: str
    findings: tuple[FamilyFinding, ...]
    stale: tuple[Exemption, ...]

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

    @property
    def downloads(self) -> set[str]:
        """Families that the image does not have and FlashInfer downloads."""
        return {row.family for row in self.findings if row.coverage.verdict == "download"}

    def check(self) -> None:
        """Raise ContractError or StaleExceptionError if the contract does not hold."""
        findings = [row for row in self.findings if row.exemption is None]
        if broken := [row for row in findings if row.coverage.verdict not in FINE]:
            raise ContractError(
                f"{self.cell} needs kernels that its image does not have:\n"
                + "\n".join(
                    f"  - {row.family}: {row.coverage.verdict}; {row.coverage.detail}\n"
                    f"    needed by: {', '.join(row.needed_by) or 'every cell'}\n"
                    f"    would help: {row.fix}"
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
    answers: Mapping[str, Answer],
) -> Contract:
    """Compare what vLLM selects for the presets of a cell, on its SKU's device, with its image."""
    rows = contents.rows
    needs: dict[str, list[str]] = {name: [] for name in rows.need.always}
    for question, answer in answers.items():
        if question.startswith(PRESET) and answer.refused is None:
            for name, why in families_of(answer, rows.need).items():
                needs.setdefault(name, []).append(f"{question} ({why})")
    accepted = [
        row
        for row in rows.exception
        if line in row.lines
        and "{}.{}".format(*capability) in row.capabilities
        and not (contents.carried and row.verdict == "download")
    ]
    exemptions = {(row.family, str(row.verdict)): row for row in reversed(accepted)}
    coverages = {name: contents.coverage(name, capability, line) or NOT_MADE for name in needs}
    findings = tuple(
        FamilyFinding(
            family=name,
            coverage=coverages[name],
            needed_by=tuple(dict.fromkeys(reasons)),
            exemption=exemptions.get((name, coverages[name].verdict)),
            fix=rows.family[name].fix,
        )
        for name, reasons in needs.items()
    )
    used = {id(item.exemption) for item in findings}
    return Contract(
        cell=cell,
        findings=findings,
        stale=tuple(row for row in accepted if id(row) not in used),
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
        gpu = parse_capability(capability)
        coverage = finding.coverage if finding else contents.coverage(family, gpu, line)
        return {
            "verdict": coverage and coverage.verdict,
            "codes": list(coverage.codes) if coverage else [],
            "detail": coverage.detail if coverage else "",
            "needed_by": finding and (list(finding.needed_by) or ["every cell"]),
            "exception": finding and finding.exemption and finding.exemption.reason,
        }

    return {
        "skus": {sku: capability for sku, (capability, _) in contracts.items()},
        "coverage": {
            family: {sku: cell(family, *row) for sku, row in contracts.items()}
            for family in contents.rows.family
        },
        "libraries": contents.libraries(),
    }
