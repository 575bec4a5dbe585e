"""A report as tables."""

from collections.abc import Iterator

from rich.markup import escape as markup_escape
from rich.table import Table

from vllm_forge.checkpoints.inspect.findings import Scope, label
from vllm_forge.checkpoints.inspect.inspection import WRONG, LineVerdict, Outcome, Report
from vllm_forge.host import PlainConsole, printable

GB = 10**9
WIDTH = 160  # where nobody says how wide it is
# What is judged of every checkpoint, whoever made it.
CHECKED = "files, config.json, the names, dtypes and shapes that it implies, scales, each line"
OUTCOMES = {
    Outcome.WITH_MTP: "bold green",
    Outcome.WITH_DSPARK: "green",
    Outcome.WITHOUT: "yellow",
    Outcome.NOT: "bold red",
    Outcome.UNKNOWN: "yellow",
}


def escape(text: str) -> str:
    """Untrusted names and messages, without markup and without commands to a terminal."""
    return markup_escape(printable(text))


def show(report: Report, *, modules: bool = False) -> None:
    """Print to stdout; ``modules`` adds what each module resolves to."""
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=WIDTH)
    console.print(_head(report), soft_wrap=True)
    tables = [_parts(report)]
    tables += [_values(report)] if report.values else []
    tables += [_findings(report)] if report.findings else []
    tables += _modules(report) if modules else []
    for table in tables:
        console.print(table)
    for verdict in report.lines:
        console.print(_sentence(verdict), soft_wrap=True)


def _head(report: Report) -> str:
    size = "" if report.bytes is None else f", {report.bytes / GB:.2f} GB (10^9 bytes)"
    artifact = f"not one of matrix.toml's artifacts; compared with none; checked: {CHECKED}"
    if report.artifact is not None:
        how = "asked for" if report.asked else "all of it fits"
        artifact = f"compared with the manifest of {report.artifact} ({how})"
    elif report.resembles is not None:
        artifact += f"; most like {report.resembles}: --manifest {report.resembles} compares"
    return (
        f"[bold]{escape(report.place)}[/]: {report.tensors} tensors in {report.shards} shards{size}"
        f"\ndrafter: {report.drafter}, {report.draft_tensors} tensors under mtp.; "
        f"read: {report.read}\n{artifact}"
    )


def _parts(report: Report) -> Table:
    table = Table("part", "tensors", "dtypes", "weights stored as", title="what is stored how")
    for row in report.parts:
        table.add_row(
            f"{'draft: ' if row.draft else ''}{row.part}",
            str(row.tensors),
            ", ".join(f"{dtype} {count}" for dtype, count in row.dtypes.items()),
            ", ".join(f"{kind} {count}" for kind, count in row.formats.items()),
        )
    return table


def _values(report: Report) -> Table:
    table = Table("part", "stored as", "compared", "worst error / bound", "not the source's")
    table.title = "weights against the source"
    for row in report.values:
        table.add_row(
            f"{'draft: ' if row.draft else ''}{row.part}",
            row.format,
            str(row.weights),
            "bytes" if row.worst is None else f"{row.worst:.3f}",
            str(len(row.different)),
        )
    return table


def _findings(report: Report) -> Table:
    table = Table("check", "effect", "lines", "what", "remedy", title="findings")
    for index, finding in enumerate(report.findings):
        style = "yellow" if finding.effect in WRONG else "dim"
        style = "bold red" if finding.effect.breaks else style
        lines = [verdict.line for verdict in report.lines if index in verdict.findings]
        bounds = [f"vLLM >= {finding.since}"] if finding.since else []
        bounds += [f"vLLM < {finding.before}"] if finding.before else []
        draft = "draft: " if finding.scope is Scope.DRAFT else ""
        where = f" ({', '.join(bounds)})" if bounds else ""
        table.add_row(
            escape(label(finding.check)),
            f"[{style if lines else 'dim'}]{finding.effect}[/]",
            ", ".join(lines) or "none",
            escape(f"{draft}{finding.title}{where}: {finding.what}"),
            escape(finding.remedy),
            style=None if lines else "dim",
        )
    return table


def _modules(report: Report) -> Iterator[Table]:
    for verdict in filter(lambda verdict: verdict.modules, report.lines):
        table = Table("module", "resolves to", title=f"line {verdict.line}, by {verdict.by}")
        for name, kind in verdict.modules.items():
            table.add_row(escape(name), escape(kind))
        yield table


def _sentence(verdict: LineVerdict) -> str:
    why = "".join(f"\n    {escape(reason)}" for reason in verdict.why)
    handled = f"\n    copes with {escape('; '.join(verdict.handled))}" if verdict.handled else ""
    return (
        f"[bold]{verdict.line}[/] (vLLM {verdict.vllm}): "
        f"[{OUTCOMES[verdict.outcome]}]{verdict.outcome}[/], told by {verdict.by}{why}{handled}"
    )
