"""Work on a cluster: send it, ask for it, collect it."""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_forge.commands.parsers import (
    JSON,
    Commands,
    command,
    option,
    positive,
    positive_count,
    print_json,
    print_table,
)
from vllm_forge.errors import ForgeError, suggestion
from vllm_forge.host import HostProbe, Runner, console, printable, show, write_whole
from vllm_forge.matrix import ImageCell
from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.project import Project

if TYPE_CHECKING:
    from vllm_forge.dispatch.jobs import Work
    from vllm_forge.dispatch.results import Outcome
    from vllm_forge.dispatch.runs import RunRecord
    from vllm_forge.dispatch.site import Site

SCHEDULERS = ("slurm", "kubernetes")


def _names(text: str) -> list[str]:
    """Names with commas between them."""
    names = text.split(",")
    if not all(names) or len(set(names)) != len(names):
        what = f"invalid value {text!r}: expected different names with commas between them"
        raise argparse.ArgumentTypeError(what)
    return names


class _Actions(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Actions that refuse options before them: the defaults of their own would replace those."""

    def __call__(self, parser: Any, namespace: Any, values: Any, *rest: Any, **kinds: Any) -> None:
        for one in parser._actions:
            if getattr(namespace, one.dest, one.default) != one.default:
                parser.error(f"{one.option_strings[0]} before {values[0]}: write it after")
        super().__call__(parser, namespace, values, *rest, **kinds)


def register(choices: Commands) -> None:
    key = option("--key", type=Path, help="private key (PEM) that signs the receipts")
    wait = option(
        "--wait", action="store_true", help="wait until all jobs have ended, then collect"
    )
    text = "end --wait after that long; jobs go on, and are listed as waiting"
    timeout = option("--timeout", type=positive, metavar="MINUTES", help=text)
    site = option("--site", type=Path, help="the cluster (default: site.toml)")
    one = command(choices, "dispatch", dispatch, JSON, key, wait, timeout, site)
    one.add_argument("--to", choices=SCHEDULERS, help="scheduler of the cluster")
    one.add_argument("--skus", type=_names, help="SKUs of matrix.toml, e.g. b300,rtxpro6000")
    one.add_argument("--tiers", type=_names, help="of the GPU suite (default: kernel,server)")
    one.add_argument("--sessions", type=_names, help="files with sessions of benchmarks")
    one.add_argument("--minutes", type=positive_count, help="that each of --sessions may take")
    one.add_argument("--lines", type=_names, help="vLLM lines (default: that of matrix.toml)")
    actions = one.add_subparsers(dest="dispatch_command", metavar="COMMAND", action=_Actions)
    run = option("run", nargs="?", metavar="RUN", help="default: the latest")
    command(actions, "status", status, JSON, run)
    command(actions, "collect", collect, JSON, key, run, wait, timeout)
    one = command(actions, "build", build, JSON, site)
    one.add_argument("--skus", type=_names, help="SKUs of matrix.toml (default: all)")
    one.add_argument("--lines", type=_names, help="vLLM lines (default: all)")
    one.add_argument("--plan", action="store_true", help="only print time and bytes by nodes")


def dispatch(project: Project, args: argparse.Namespace) -> None:
    """Run tiers of the GPU suite, or benchmarks, in images on the nodes of a cluster."""
    from vllm_forge.dispatch import jobs, kubernetes, runs, runtimes, slurm

    if missing := [name for name in ("to", "skus") if getattr(args, name) is None]:
        args.parser.error(f"missing --{missing[0]}")
    if (args.key or args.timeout) and not args.wait:
        args.parser.error("--key and --timeout need --wait, or belong to collect")
    site = _site(project, args)
    if args.to == "kubernetes":
        site = site.model_copy(update={"runtime": runtimes.POD})
    runtimes.find_runtime(site)
    works = _works(project, args)
    images = {cell.name: (cell, runs.built_image(project, cell)) for cell in _cells(project, args)}
    cells = [
        jobs.cell_image(project, cell, f"sha256:{image.digest}") for cell, image in images.values()
    ]
    run = runs.new_run()
    specs = jobs.job_specs(cells, works, site, run)
    ask, sent = runs.asking(HostProbe()), f"sent {len(specs)} jobs as run {run}"
    if args.to == "kubernetes":
        texts = kubernetes.manifests(specs, site, run)
    else:
        batches = slurm.batches(specs, site, run)
        slurm.require_cluster(specs, site, ask)
    paths = [work.session for work in works if work.session]
    folder = runs.stage(project, site, specs, images, run, sessions=paths)
    record = runs.RunRecord(
        run=run, scheduler=args.to, storage=site.storage.root, specs=specs, attempts={}
    )
    runs.write_record(project, record)
    if args.to == "kubernetes":  # kubectl sends them
        for name, text in texts.items():
            write_whole(folder / "manifests" / name, text)
        sent = f"run: kubectl apply -f {folder / 'manifests'}"
        record = record.model_copy(update={"attempts": kubernetes.attempts(specs, site, run)})
    else:
        record = slurm.send(batches, folder, ask, record)
    console.print(sent, markup=False)
    runs.write_record(project, record)
    if args.wait:
        _collect(project, args, record)
    else:
        print_json(args, record.model_dump(mode="json")) if args.json else print(run)


def _site(project: Project, args: argparse.Namespace) -> "Site":
    from vllm_forge.dispatch.site import NAME, read_site

    return read_site(args.site or project.root / NAME, project.matrix)


def _works(project: Project, args: argparse.Namespace) -> list["Work"]:
    from vllm_forge.dispatch.jobs import session_work, suite_works

    if (args.sessions is None) != (args.minutes is None):
        args.parser.error("--sessions and --minutes belong together: give both, or none")
    sessions = [session_work(Path(path), args.minutes) for path in args.sessions or ()]
    known = suite_works(project)
    default = [] if sessions else [row.name for row in known.values() if not row.on_request]
    names = args.tiers or default
    for name in names:
        if name not in known:
            args.parser.error(f"unknown tier {name!r} in --tiers{suggestion(name, known)}")
    works = [*(known[name] for name in names), *sessions]
    all_names = [work.name for work in works]
    if twice := [name for name in all_names if all_names.count(name) > 1]:
        args.parser.error(f"duplicate name {twice[0]!r} of sessions, or of a session and a tier")
    return works


def _cells(project: Project, args: argparse.Namespace) -> list[ImageCell]:
    """SKUs x lines, without pairs that a line does not support; those are listed as not run."""
    cells, refused = dict[str, ImageCell](), None  # a SKU may be named by its arch, too
    for sku in args.skus:
        for line in args.lines or [None]:
            try:
                cell = project.cell(sku, line)
                cells[cell.name] = cell
            except UnsupportedCellError as error:
                refused = error
                console.print(f"not run: {error.what}", markup=False)
    if refused is not None and not cells:
        raise refused
    return list(cells.values())


def status(project: Project, args: argparse.Namespace) -> None:
    """Say of each job of a run whether it waits, runs, or ended, and how."""
    from vllm_forge.dispatch.runs import read_record

    record = read_record(project, args.run)
    _show(args, record, _outcomes(project, record), [])


def collect(project: Project, args: argparse.Namespace) -> None:
    """Verify what the jobs of a run wrote, and make receipts of what is green."""
    from vllm_forge.dispatch.runs import read_record

    if args.timeout and not args.wait:
        args.parser.error("--timeout needs --wait")
    _collect(project, args, read_record(project, args.run))


def _outcomes(project: Project, record: "RunRecord") -> list["Outcome"]:
    from vllm_forge.dispatch import kubernetes, runs, slurm

    if record.folder.exists():
        runs.require_own(record.folder)
    ask = runs.asking(HostProbe())
    if record.scheduler == "kubernetes":
        return kubernetes.outcomes(project, record, ask)
    return runs.outcomes(project, record, slurm.states(record.run, ask))


def _collect(project: Project, args: argparse.Namespace, record: "RunRecord") -> None:
    from vllm_forge.dispatch import results, runs
    from vllm_forge.receipts.verification import make_receipt

    ask = partial(_outcomes, project, record)
    rows = runs.wait(ask, args.timeout) if args.wait else ask()
    receipts = []
    specs = {spec.name: spec for spec in record.specs}
    for number, row in enumerate(rows):
        if row.verdict == results.GREEN and not specs[row.name].session:
            result = runs.local_folder(project, record, row.name) / f"{specs[row.name].work}.json"
            try:
                receipts.append(make_receipt(project, result, args.key))
            except ForgeError as error:
                why = f"{error.what}; {error.remedy}"
                rows[number] = row.model_copy(update={"verdict": results.REFUSED, "why": why})
    _show(args, record, rows, receipts)
    results.require_green(record.run, rows)


def build(project: Project, args: argparse.Namespace) -> None:
    """Build images on nodes of the cluster, a job for each line, and wait for them."""
    from vllm_forge.dispatch import builds, runs

    matrix = project.matrix
    args.skus, args.lines = args.skus or list(matrix.sku), args.lines or list(matrix.line)
    lines = builds.longest_first(builds.line_builds(project, _cells(project, args)))
    if args.plan:
        rows = builds.forecasts(project, lines)
        cells = [row.cells for row in rows]
        print_table(args, [asdict(row) for row in rows], builds.FORECAST_HEAD, cells)
        return
    site, run = _site(project, args), runs.new_run()
    text = builds.script(project, lines, site, run)
    path = builds.prepare(text, site, run, runs.asking(HostProbe()))
    builds.fill_folder(project, lines, Path(site.storage.root) / builds.SHARED)
    sent = builds.send(path, lines, Runner())
    print_json(args, sent) if args.json else print("\n".join(sent))


def _show(
    args: argparse.Namespace, record: "RunRecord", rows: list["Outcome"], receipts: list[Path]
) -> None:
    listed, jobs = [str(path) for path in receipts], [row.model_dump() for row in rows]
    document = {"run": record.run, "jobs": jobs, "receipts": listed}
    cells = ([row.name, row.verdict, printable(row.why)] for row in rows)
    print_table(args, document, ["job", "verdict", "where, or why"], cells)
    for path in [] if args.json else listed:
        show(path)
