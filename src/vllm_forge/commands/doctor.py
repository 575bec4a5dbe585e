"""Can this host serve a preset?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_forge.host import HostProbe, RecordedProbe, RecordingProbe

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from vllm_forge.commands.register import Commands
    from vllm_forge.host import Probe
    from vllm_forge.project import Project
    from vllm_forge.serve.doctor import Finding


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser("doctor", help="can this host serve a preset?", allow_abbrev=False)
    one.add_argument("--sku", required=True, help="a SKU or an arch of matrix.toml")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--preset", help="default: the SKU's first")
    one.add_argument("--artifact", help="default: the preset's first")
    one.add_argument("--json", action="store_true", help="print the findings as JSON")
    source = one.add_mutually_exclusive_group()
    source.add_argument(
        "--record", type=Path, metavar="FOLDER", help="keep what the host's tools said"
    )
    source.add_argument(
        "--recorded", type=Path, metavar="FOLDER", help="judge what another host's tools said"
    )
    one.set_defaults(call=doctor)


def doctor(project: Project, args: argparse.Namespace) -> None:
    """Ask the host, judge, print; red lines are an error."""
    from vllm_forge.serve import presets_of, serving
    from vllm_forge.serve.doctor import Wanted, ask_host, judge
    from vllm_forge.serve.errors import HostUnfitError
    from vllm_forge.serve.needs import needs_of
    from vllm_forge.sources import read_lock

    cell = project.cell(args.sku, args.line)
    preset = args.preset or next(iter(presets_of(project.matrix, cell.sku_name)), "")
    item = serving(project.matrix, cell, preset, args.artifact)
    lock = read_lock(project.root, cell.line_name, cell.line, project.matrix.base)
    wanted = Wanted(matrix=project.matrix, item=item, needs=needs_of(project.matrix, lock, item))
    findings = judge(ask_host(_probe(args)), wanted)
    _print(findings, as_json=args.json)
    red = [finding.check for finding in findings if finding.level == "red"]
    if red:
        raise HostUnfitError(
            f"this host cannot serve {item.preset_name} ({item.artifact_name}, line "
            f"{cell.line_name}): {', '.join(dict.fromkeys(red))}",
            remedy="each red line above has its own",
        )


def _probe(args: argparse.Namespace) -> Probe:
    if args.recorded:
        return RecordedProbe(args.recorded)
    host = HostProbe()
    return RecordingProbe(host, args.record) if args.record else host


def _print(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(finding) for finding in findings], indent=1, sort_keys=True))
        return
    from rich.console import Console
    from rich.text import Text

    colours = {"ok": "green", "unknown": "yellow", "red": "bold red"}
    out = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        line = Text(f"{finding.level:8}", style=colours[finding.level])
        line.append(f"{finding.check}: {finding.seen}", style="default")
        if finding.level == "ok":
            line.append(f"  (needed: {finding.needed})", style="dim")
        else:
            line.append(f"\n        needed: {finding.needed}", style="default")
        if finding.remedy:
            line.append(f"\n        remedy: {finding.remedy}", style="default")
        out.print(line)
