"""docs/generated/checks.md, from the inspector's checks.toml; verdicts.md, from its record."""

from __future__ import annotations

from vllm_forge.checkpoints.inspect.findings import ALIASES, FAULTS, label
from vllm_forge.checkpoints.inspect.inspection import DATA, Outcome, Verdicts
from vllm_forge.pages.markdown import table
from vllm_forge.project import Project

OUTCOMES = {
    Outcome.WITH_MTP: "with MTP",
    Outcome.WITH_DSPARK: "with DSpark",
    Outcome.WITHOUT: "without MTP",
    Outcome.NOT: "**no**",
    Outcome.UNKNOWN: "unknown",
}


def checks(_: Project) -> str:
    """The checks, sorted by name."""
    cells = []
    for row in sorted(FAULTS.values(), key=lambda row: row["check"]):
        check, effect = row["check"], row["effect"]
        on = [f"{key} {row[key]}" for key in ("since", "before") if key in row]
        on += [f"without {row['handled_by']}"] if "handled_by" in row else []
        on += ["the first forward pass"] if row.get("in_forward") else []
        cells.append(
            [
                f"`{check}`",
                ALIASES.get(check, ""),
                row["title"],
                f"{effect}, draft" if row.get("scope") == "draft" else effect,
                ", ".join(on),
                row.get("remedy", ""),
            ]
        )
    head = ["check", "number", "fault", "effect", "on", "remedy"]
    return table(head, cells)


def verdicts(project: Project) -> str:
    """Which line serves which tiny checkpoint, and why not."""
    record: Verdicts = project.read_json(str(DATA), Verdicts.model_validate)
    rows, reasons = [], []
    for name, variant in record.variants.items():
        outcomes = [OUTCOMES[variant.lines[line].outcome] for line in record.vllm]
        checks = [row.check if row.counts_on else f"({row.check})" for row in variant.findings]
        listed = ", ".join(dict.fromkeys(checks)) or "-"
        rows.append([name, *outcomes, listed, variant.error or "-"])

        reasons += ["", f"**{name}**: {variant.about}.", ""]
        reasons += [f"* {label(row.check)}, {row.effect}: {row.title}" for row in variant.findings]
        messages: dict[str, list[str]] = {}
        for line, row in variant.lines.items():
            for message in row.why:
                if message.startswith("vLLM"):
                    messages.setdefault(message.replace("`", "'"), []).append(line)
        reasons += [f"* on {', '.join(lines)}: `{text}`" for text, lines in messages.items()]
        if not variant.findings and not any(row.why for row in variant.lines.values()):
            reasons.append("* no findings")
    heads = [f"{name} (vLLM {version})" for name, version in record.vllm.items()]
    grid = table(["variant", *heads, "checks", "error"], rows)
    device = f"Device: {record.device}, declared; no GPU was involved.\n"
    return "\n".join([device, grid, "", "## Why", *reasons])
