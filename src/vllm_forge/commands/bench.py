"""Benchmarks: published figures, results of servers, the time of a build."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vllm_forge.commands import parsers
from vllm_forge.commands.parsers import JSON, LINE, SKU, Commands, Parser, command, count, option
from vllm_forge.host import atomic_path, console, show, suggestion, write_json, write_whole
from vllm_forge.project import Project

if TYPE_CHECKING:
    from vllm_forge.bench.results import Setup
    from vllm_forge.bench.workloads import Loaded
    from vllm_forge.serve.deployment import Deployment

HELP = "measure servers, score answers, compare images; judge published figures; time a build"
LIBRARIES = ("scipy", "matplotlib", "aiohttp")  # of the extra
URL = option("--url", required=True, help="http://HOST:PORT")
OUTPUT = option("--output", type=Path, required=True, help="the record")
RECORD = option("result", type=Path, metavar="RECORD", help="of one arm")
Call: TypeAlias = Callable[[Project, argparse.Namespace], None]
CARD_HEAD = ["figure", "arms", "needs", "minutes", "state"]
PLAN_HEAD = ["gate", "margin", "of", "needs", "minutes", "decides"]


def register(choices: Commands) -> None:
    bench = parsers.group(choices, "bench", help=HELP)
    one = _command(bench, "claims", claims, JSON, packaged=True)
    text = "figures of another card, whose verdicts are printed only"
    one.add_argument("card", type=Path, nargs="?", metavar="CLAIMS.toml", help=text)
    one = _command(bench, "plan", plan, JSON, packaged=True)
    one.add_argument("--card", action="store_true", help="what the card's undecided figures need")
    for name, text in (("start", "a server's start"), ("run", "one measured window")):
        one.add_argument(
            f"--{name}-seconds", type=parsers.positive, help=f"of {text}, for the minutes"
        )
    text = "by which a start varies, e.g. 0.03; repeatable"
    one.add_argument("--noise", type=parsers.positive, action="append", metavar="SHARE", help=text)
    _register_servers(bench)
    one = _command(bench, "quality", quality, SKU, LINE, URL, OUTPUT)
    _record_options(one)
    one.add_argument("--order", type=count, default=0, help="among all arms' starts (0)")
    _workload_options(one)
    one = _command(bench, "score", score, OUTPUT, packaged=True)
    one.add_argument("answers", type=Path, metavar="ANSWERS", help="of one start of a session")
    _workload_options(one)
    one = _command(bench, "workload", workload, packaged=True)
    _workload_options(one)
    one.add_argument("--output", type=Path, required=True, help="prompts, for `bench serve`")
    one = _command(bench, "import", import_answers, SKU, LINE, OUTPUT)
    _arm_options(one)
    one.add_argument("--answers", type=Path, required=True, help="JSONL, see docs/operate/bench.md")
    one = _command(bench, "gate", gate, JSON, packaged=True)
    one.add_argument("reference", type=Path, help="record of the arm to compare with")
    one.add_argument("candidate", type=Path, help="record of the arm to judge")
    one.add_argument("--repeat", type=Path, help="the reference, measured again: the noise floor")
    one.add_argument("--signed", action="store_true", help="refuse results without a signature")
    one.add_argument("--gate", action="append", help="of matrix.toml, repeatable (default: all)")
    one = _command(bench, "report", report_results, packaged=True)
    one.add_argument("results", type=Path, nargs="+", metavar="RECORD", help="of one or more arms")
    one.add_argument("--output", type=Path, required=True, help="folder that is written")
    one = _command(bench, "keep", keep)
    one.add_argument("sessions", type=Path, nargs="+", metavar="FOLDER", help="output of a session")
    _register_exchange(bench)
    one = command(bench, "build", build, LINE)
    one.add_argument("--scratch", type=Path, help="parent of its folder (default: /var/tmp)")
    one.add_argument("--rounds", type=parsers.positive_count, help="of builds and their floor (3)")
    one.add_argument("--baseline", metavar="COMMIT", help="whose code writes the floor's layers")


def _register_servers(bench: Commands) -> None:
    one = _command(bench, "serve", serve, SKU, LINE, URL, OUTPUT)
    _arm_options(one)
    one.add_argument("--caches", type=Path, action="append", required=True, metavar="DIR",
                     help="the server's /cache, to see what it compiles; repeatable")  # fmt: skip
    one.add_argument("--order", type=count, required=True, help="among all arms' starts: 0, 1, ...")
    one.add_argument("--warm", type=count, default=8, help="prompts that only warm up (8)")
    one = _command(bench, "run", run, SKU, LINE)
    text = "TOML, see docs/operate/bench-sessions.md"
    one.add_argument("session", type=Path, metavar="SESSION", help=text)
    text = "where servers keep what they compile, /cache of containers"
    one.add_argument("--caches", type=Path, required=True, metavar="DIR", help=text)
    one.add_argument("--output", type=Path, required=True, help="folder of records, old or new")
    one.add_argument("--engine", choices=["docker", "podman"], help="default: the one that answers")
    one.add_argument("--retry", action="store_true", help="repeat starts that failed before")


def _register_exchange(bench: Commands) -> None:
    one = _command(bench, "sign", sign, RECORD, packaged=True)
    one.add_argument("--key", type=Path, required=True, help="private key (PEM) that signs")
    one = _command(bench, "export", export, RECORD, packaged=True)
    one.add_argument("--format", choices=["vllm", "pytorch"], required=True,
                     help="of `vllm bench serve`, or PyTorch's benchmark records")  # fmt: skip
    one.add_argument("--start", type=count, default=0, help="of the record, for vllm: 0, 1, ...")
    one = _command(bench, "crosscheck", crosscheck, JSON, RECORD, packaged=True)
    text = "JSON of `vllm bench serve` or `guidellm run`: of each start in order, or one"
    one.add_argument("others", type=Path, nargs="+", metavar="OTHER", help=text)
    one.add_argument("--output", type=Path, help="file for the rows")


def _workload_options(one: Parser) -> None:
    text = "chat-code, aime, ...: docs/operate/bench-quality.md"
    one.add_argument("--workload", required=True, help=text)
    one.add_argument("--workloads", type=Path, metavar="TOML", help="rows of your own")
    one.add_argument("--data", type=Path, help="JSONL that the workload ships without")
    one.add_argument("--sha256", metavar="HASH", help="that --data must have")
    one.add_argument("--license", help="of --data, kept with the answers")


def _record_options(one: Parser) -> None:
    for name, text in (
        ("preset", "that the server was started with"),
        ("arm", "name of what is measured"),
        ("session", "one name for all arms that are run in turns"),
    ):
        one.add_argument(f"--{name}", required=True, help=text)
    one.add_argument("--artifact", help="default: the preset's first")
    text = "what the session's arms differ in on purpose; the same in all"
    one.add_argument("--differs", choices=["gpus", "kernels"], action="append", help=text)
    text = "folder of the served model: its tokenizer and template are hashed"
    one.add_argument("--checkpoint", type=Path, required=True, help=text)
    one.add_argument(
        "--concurrency", type=parsers.positive_count, default=8, help="requests at a time (8)"
    )


def _arm_options(one: Parser) -> None:
    _record_options(one)
    text = "prompts: JSONL with item, and prompt or messages"
    one.add_argument("--workload", type=Path, required=True, help=text)
    one.add_argument(
        "--max-tokens", type=parsers.positive_count, default=512, help="of an answer (512)"
    )
    for name, text in (
        ("ignore-eos", "each answer has --max-tokens"),
        ("thinking", "ask for reasoning"),
        ("prefix-cache", "hits of the prefix cache are wanted"),
    ):
        one.add_argument(f"--{name}", action="store_true", help=text)


def require_libraries(*libraries: str) -> None:
    from vllm_forge.bench.errors import EXTRA, LibraryMissingError

    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        what = f"missing {', '.join(missing)}, which only benchmarks need"
        raise LibraryMissingError(what, where=sys.prefix, remedy=EXTRA)


def _command(bench: Commands, name: str, call: Call, *parents: Parser, **settings: bool) -> Parser:
    """A command that needs the libraries of benchmarks."""

    @wraps(call)
    def checked(project: Project, args: argparse.Namespace) -> None:
        require_libraries(*LIBRARIES)
        call(project, args)

    return command(bench, name, checked, *parents, **settings)


def claims(project: Project, args: argparse.Namespace) -> None:
    """Judge the figures of a model card; of the project's, write record, chart and page."""
    from vllm_forge.bench import plots, verdicts
    from vllm_forge.bench.claims import CLAIMS
    from vllm_forge.pages.claims import CHART, HEAD, PAGE, RECORD, summary, terminal_rows
    from vllm_forge.pages.registry import write_pages

    if args.card is None:
        project.require_checkout(args.parser.prog)
    record = verdicts.judge(args.card or project.root / CLAIMS)
    if args.card is None:
        write_json(project.root / RECORD, record)
        write_whole(project.root / CHART, plots.forest(record))
        _draw_published(project)
        write_pages(project, PAGE)
    parsers.print_table(args, record, HEAD, terminal_rows(record))
    if not args.json:
        show(f"{summary(record)}: {args.card or PAGE}")


def _draw_published(project: Project) -> None:
    """Chart what kept sessions measured of what was published."""
    from vllm_forge.bench import arms, plots, results
    from vllm_forge.pages.sessions import CHART, SESSIONS

    paths = sorted((project.root / SESSIONS).glob("*/*-c*[0-9].json"))
    rows = list(arms.published(project, [results.read_arm(path) for path in paths]))
    write_whole(project.root / CHART, plots.published(rows))


def plan(project: Project, args: argparse.Namespace) -> None:
    """Say how many items, prompts and server starts the gates need, and what they cannot decide."""
    from vllm_forge.bench import plan as plans
    from vllm_forge.bench.claims import CLAIMS, read_claims
    from vllm_forge.pages.claims import RECORD

    timing = plans.Timing(args.start_seconds, args.run_seconds)
    suites = plans.read_suites()
    if args.card:
        head = CARD_HEAD
        words = project.read_json(
            RECORD, lambda record: {row["id"]: row["word"] for row in record["verdicts"]}
        )
        figures = read_claims(project.root / CLAIMS)
        rows = list(plans.card_plan(figures, words, project.matrix, suites, timing))
    else:
        head, noises = PLAN_HEAD, args.noise or plans.NOISES
        rows = [
            row
            for name, one in project.matrix.gate.items()
            for row in plans.gate_plan(name, one, suites, timing, noises)
        ]
    parsers.print_table(args, [dict(zip(head, row, strict=True)) for row in rows], head, rows)


def serve(project: Project, args: argparse.Namespace) -> None:
    """Measure one start of a server that is up, and add it to a record."""
    from vllm_forge.bench import arms, measure
    from vllm_forge.host import HostProbe

    prompts, digest = measure.read_workload(args.workload)
    asked = arms.asked_by(args)
    deployment, setup = arms.arm_of(project, HostProbe(), args, digest, asked)
    if not args.warm < len(prompts):
        args.parser.error(f"invalid --warm {args.warm}: the workload has {len(prompts)} prompts")
    for folder in args.caches:  # in none, nothing would be compiled
        if not folder.is_dir():
            args.parser.error(f"invalid --caches: {folder} is not a directory")
    start, rows = measure.measure(
        args.url.rstrip("/"), deployment.artifact.repo, setup, prompts, warm=args.warm,
        order=args.order, caches=args.caches, probe=HostProbe(),
    )  # fmt: skip
    measure.add_start(args.output, setup, start, rows)
    tokens = sum(row.output_tokens for row in rows)
    seconds = start.window.seconds if start.window else 0
    show(f"{args.output}: start {args.order}, {tokens} tokens in {seconds:.1f} s")


def run(project: Project, args: argparse.Namespace) -> None:
    """Start the servers of a session in turns, and measure each; go on after the last start."""
    from vllm_forge.bench import arms, session, turns
    from vllm_forge.host import HostProbe

    cell, caches = project.cell(args.sku, args.line), args.caches.resolve()
    plan, workload = arms.plan_of(
        project, HostProbe(), cell, args.session, caches=caches, engine=args.engine
    )
    session.write_plan(plan, args.output, workload)
    turns.run_plan(args.output, args.output, retry=args.retry)
    levels = [conditions.concurrency for conditions in plan.conditions]
    for path in turns.result_paths(args.output, plan.turns, levels, quality=bool(plan.quality)):
        show(path)


def _load(args: argparse.Namespace) -> "Loaded":
    from vllm_forge.bench import workloads

    source = None
    if args.data is not None:
        if not args.sha256 or not args.license:
            args.parser.error("--data needs --sha256 and --license")
        source = workloads.Source(args.data, args.sha256, args.license)
    return workloads.load(args.workload, source, args.workloads or workloads.ROWS)


def quality(project: Project, args: argparse.Namespace) -> None:
    """Ask a server that is up the questions of a workload, and score the answers."""
    from vllm_forge.bench import arms, quality
    from vllm_forge.host import HostProbe

    loaded = _load(args)
    if loaded.row.scorer == "none":
        args.parser.error(f"workload {loaded.name} has no right answers: use `bench serve`")

    def arm() -> "tuple[Deployment, Setup]":
        asked = {**loaded.asked(), "ignore_eos": False}
        return arms.arm_of(project, HostProbe(), args, loaded.digest, asked)

    url, model = args.url.rstrip("/"), arm()[0].artifact.repo
    rows = quality.measure_quality(
        url, model, loaded, lambda: arm()[1], args.output, order=args.order
    )
    show(f"{args.output}: start {args.order}: {quality.summary(rows)}")


def score(_: Project, args: argparse.Namespace) -> None:
    """Score the answers that a session kept, and add their start to a record."""
    from vllm_forge.bench.quality import score_answers, summary

    rows = score_answers(args.answers, _load(args), args.output)
    show(f"{args.output}: {args.answers.name}: {summary(rows)}")


def workload(_: Project, args: argparse.Namespace) -> None:
    """Write the prompts of a workload, for `bench serve`."""
    from vllm_forge.bench.workloads import lines

    loaded = _load(args)
    write_whole(args.output, lines(loaded))
    ignore = " --ignore-eos" if loaded.row.random else ""
    show(f"{args.output}: bench serve --max-tokens={loaded.row.max_tokens}{ignore}")
    if loaded.row.random is not None:
        length = loaded.row.random.acceptance_length
        synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": length}
        print(f"add to the server's --speculative-config: {json.dumps(synthetic)}")


def import_answers(project: Project, args: argparse.Namespace) -> None:
    """Make a record of scored answers of another harness, to be judged by `bench gate`."""
    from vllm_forge.bench import arms, measure, results, validity
    from vllm_forge.host import HostProbe

    prompts, digest = measure.read_workload(args.workload)
    rows = measure.read_answers(args.answers, {prompt.item for prompt in prompts})
    _, setup = arms.arm_of(project, HostProbe(), args, digest, arms.asked_by(args))
    start = results.Start(order=0)
    results.write_arm(args.output, setup, [start], rows, check=validity.require_valid)
    show(f"{args.output}: {len(rows)} answers")


def gate(project: Project, args: argparse.Namespace) -> None:
    """Compare two results: pass (exit 0), fail (121) or undecided (122)."""
    from vllm_forge.bench import gate, results, validity

    gates = project.matrix.gate
    for name in args.gate or ():
        if name not in gates:
            args.parser.error(f"unknown gate {name!r}{suggestion(name, gates)}")
    chosen = {name: row for name, row in gates.items() if name in (args.gate or gates)}
    named = {name: getattr(args, name) for name in ("reference", "candidate", "repeat")}
    arms = {name: results.read_arm(path) for name, path in named.items() if path is not None}
    if args.signed:
        from vllm_forge.bench.signed import require_signed
        from vllm_forge.signing import read_keyring

        for arm in arms.values():
            signer = require_signed(arm, read_keyring(project.root))
            console.print(f"{arm.path}: signed by {signer}", markup=False)
    outcomes = gate.gate(chosen, **arms)
    differs = validity.intended(arms["reference"], arms["candidate"])
    images = {
        name: {key: getattr(arm.result.server, key) for key in ("image", "claimed")}
        for name, arm in arms.items()
    }
    document = {
        "arms": images, "differs": differs, "gates": [row.as_json() for row in outcomes]
    }  # fmt: skip
    if not args.json:
        for name, arm in arms.items():
            console.print(f"{name}: image {arm.result.server.seen}", markup=False)
        for text in differs:
            console.print(f"the arms differ in {text}", markup=False)
    rows = (
        [row.gate, f"{100 * row.margin:g} {row.unit}", row.word, row.reason] for row in outcomes
    )
    parsers.print_table(args, document, ["gate", "margin", "verdict", "why"], rows)
    gate.require_pass(outcomes)


def report_results(project: Project, args: argparse.Namespace) -> None:
    """Write tables and charts of results, and of the arms of each session compared."""
    from vllm_forge.bench import report, results
    from vllm_forge.pages.sessions import report_text

    report.require_replaceable(args.output)
    arms = [results.read_arm(path) for path in args.results]
    document, charts = report.report(arms, project.matrix.gate)
    with atomic_path(args.output) as folder:
        folder.mkdir()
        report.write_report(folder, document, charts)
        text = report_text({**document, "charts": list(charts)})
        (folder / report.PAGE).write_text(f"# Results\n\n{text}\n", encoding="utf-8")
    show(args.output / report.PAGE)


def keep(project: Project, args: argparse.Namespace) -> None:
    """Keep the results of sessions in the checkout, with their report; write the page of them."""
    from vllm_forge.bench import report
    from vllm_forge.pages.registry import write_pages
    from vllm_forge.pages.sessions import PAGE, SESSIONS

    for folder in args.sessions:
        show(report.keep(folder, project.root / SESSIONS, project.matrix.gate))
    _draw_published(project)
    write_pages(project, PAGE)
    show(project.root / PAGE)


def sign(_: Project, args: argparse.Namespace) -> None:
    """Sign a result; its signature is a Sigstore bundle beside it."""
    from vllm_forge.bench import signed, validity
    from vllm_forge.signing import load_private

    show(signed.sign_result(validity.read_valid(args.result), load_private(args.key)))


def export(_: Project, args: argparse.Namespace) -> None:
    """Print a result in the form of another tool, as JSON."""
    from vllm_forge.bench import exchange, validity

    arm = validity.read_valid(args.result)
    if args.start >= (starts := len(arm.result.starts)):
        args.parser.error(f"invalid --start {args.start}: the record has {starts} starts")
    vllm = args.format == "vllm"
    text = exchange.vllm_document(arm, args.start) if vllm else exchange.pytorch_records(arm)
    print(json.dumps(text, indent=1))


def crosscheck(_: Project, args: argparse.Namespace) -> None:
    """Compare a result with what another tool measured of the same server and prompts."""
    from vllm_forge.bench import exchange, validity
    from vllm_forge.pages.sessions import CHECK_HEAD, check_cells

    record = exchange.crosscheck(validity.read_valid(args.result), args.others)
    if args.output:
        write_json(args.output, record)
    parsers.print_table(args, record, CHECK_HEAD, check_cells(record))
    exchange.require_agreement(record)


def build(project: Project, args: argparse.Namespace) -> None:
    """Time a full build and its parts."""
    argv = [sys.executable, str(project.root / "benchmarks" / "build.py")]
    for name in ("line", "scratch", "rounds", "baseline"):
        value = getattr(args, name)
        argv += [f"--{name}={value}"] if value else []
    os.execv(sys.executable, argv)  # noqa: S606
