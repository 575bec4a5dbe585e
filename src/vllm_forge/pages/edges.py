"""What tier edges found, beside what was foretold: claims that shape alone decides."""

from vllm_forge.pages.markdown import escape, table
from vllm_forge.project import Project
from vllm_forge.receipts.suite import read_cases
from vllm_forge.receipts.verification import NOT_RUN, read_receipts, seal

TIER = "edges"  # of the GPU suite
# Facts of a test; what is foretold is in tests/gpu/edges/rows.toml, which a unit test compares with
# what plan, doctor and lint compute.
FACTS = ("edge", "foretold", "measured")


def edges(project: Project) -> str:
    """Each claim with both sides, of every valid receipt; or how many tests nobody ran."""
    receipts = [row for row in read_receipts(project).valid if row.statement.detail.tier == TIER]
    if not receipts:
        return f"{NOT_RUN}: {len(read_cases(project.root, TIER))} tests of tier `{TIER}`"
    rows = [
        [detail.sku, detail.line, *(escape(str(test.facts.get(name, ""))) for name in FACTS)]
        for detail in (receipt.statement.detail for receipt in receipts)
        for test in detail.tests.values()
        if FACTS[0] in test.facts
    ]
    vouched = table(["receipt", "vouched for"], [[row.path.name, seal(row)] for row in receipts])
    return "\n\n".join([table(["SKU", "line", *FACTS], rows), vouched])
