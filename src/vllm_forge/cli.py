"""Arguments to calls, nothing else."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.errors import ForgeError, ToolMissingError, UsageError
from vllm_forge.host import (
    RecordingRunner,
    SubprocessRunner,
    atomic_path,
    cache_root,
    console,
    report,
    which,
)
from vllm_forge.matrix import find_root, image_cell, load, schema_text
from vllm_forge.matrix.cells import find_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_forge.images import Image
    from vllm_forge.images.engine import Engine


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped option, and our exit code."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if "unrecognized arguments: " in message:
            word = message.rpartition(": ")[2].split()[0].partition("=")[0]
            known = [option for action in self._actions for option in action.option_strings]
            for group in self._subparsers._group_actions if self._subparsers else []:
                for parser in (group.choices or {}).values():  # type: ignore[union-attr]
                    known += [o for a in parser._actions for o in a.option_strings]
            near = difflib.get_close_matches(word, known, n=1)
            hint = f" Perhaps you meant {near[0]!r}?" if near else ""
        raise UsageError(f"{message}.{hint}", where=self.prog, remedy=f"{self.prog} --help")


def build(args: argparse.Namespace) -> None:
    """Build one image."""
    from vllm_forge.images import Build, BuildOptions, choose_engine, provision  # noqa: PLC0415

    root = find_root()
    cell = image_cell(load(root), root, args.sku, args.line)
    runner = RecordingRunner() if args.dry_run else SubprocessRunner()
    if args.provision:
        provision(runner)
    engine = choose_engine(args.engine, dry_run=args.dry_run)
    if engine.name == "buildah" and os.geteuid() != 0 and not args.dry_run:
        _as_namespace_root()
    options = BuildOptions(
        output=args.output or root / "dist",
        base_image=None if args.base == "rootfs" else args.base,
        refresh_base=args.refresh_base,
    )
    made = Build(cell, options, engine, runner).run(dry_run=args.dry_run)
    target = options.output / cell.name
    tag = f"localhost/{cell.name}:{cell.line_name}"
    if args.load:
        engine.load(runner, target, tag)
    if args.push:
        _push(runner, engine, target, args.push)
    if made is not None:
        _announce(made.image, fresh=made.fresh)


def _as_namespace_root() -> NoReturn:
    """Go on as root of a user namespace; buildah maps the user's subordinate ids."""
    buildah = which("buildah")
    if buildah is None:
        raise ToolMissingError("buildah is not installed")
    argv = [buildah, "unshare", "--", sys.executable, "-m", "vllm_forge", *sys.argv[1:]]
    os.execv(buildah, argv)  # noqa: S606


def _push(
    runner: RecordingRunner | SubprocessRunner, engine: Engine, target: Path, reference: str
) -> None:
    """Copy the very bytes of the layout to a registry; skopeo checks the digests."""
    del engine  # any engine's layout is pushed alike
    plain = ["--dest-tls-verify=false"] if reference.startswith(("127.0.0.1", "localhost")) else []
    runner.run(
        [
            "skopeo", "copy", "--quiet", "--all", *plain,
            f"--digestfile={target.with_suffix('.pushed')}", f"oci:{target}", f"docker://{reference}",
        ]
    )  # fmt: skip


def _announce(image: Image, *, fresh: bool) -> None:
    console.print(
        f"[bold green]{'built' if fresh else 'up to date'}[/] {image.path}\n"
        f"  sha256:{image.digest}  {image.size / 1e6:.0f} MB"
    )
    print(
        json.dumps({"image": str(image.path), "digest": f"sha256:{image.digest}", "built": fresh})
    )


def lock(args: argparse.Namespace) -> None:
    """Resolve a line and write its lock."""
    from vllm_forge.sources import Index, make_lock  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    name, line = find_line(matrix, args.line)
    with report(f"lock line {name}"):
        made = make_lock(root, name, line, matrix.base, Index())
    total = sum(wheel.size for wheel in made.wheels)
    console.print(f"{made.path}: {len(made.wheels)} wheels, {total / 1e9:.2f} GB")


def fetch(args: argparse.Namespace) -> None:
    """Download a line's wheels into the cache."""
    from vllm_forge.sources import Wheelhouse, read_lock  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    name, line = find_line(matrix, args.line)
    made = read_lock(root, name, line, matrix.base)
    with report(f"fetch {len(made.wheels)} wheels of line {name}"):
        Wheelhouse().fetch(made.wheels)


def patches(args: argparse.Namespace) -> None:
    """Apply every series to its pinned source and compare the trees."""
    from vllm_forge.patches import check_line, read_series, update_line  # noqa: PLC0415
    from vllm_forge.sources import Index, SourceRepo  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    names = [find_line(matrix, args.line)[0]] if args.line else list(matrix.line)
    repo = SourceRepo()
    for name in names:
        line = matrix.line[name]
        if args.update:
            applied = update_line(root, name, line, repo, Index())
        else:
            applied = check_line(root, name, line, repo)
        series = read_series(root / line.series)
        print(f"line {name}: {len(series)} patches, tree {applied.result}")
        for patch in series:
            print(f"  {patch.name}: {patch.summary}")


def wheel(args: argparse.Namespace) -> None:
    """Write a line's patched wheel."""
    import shutil  # noqa: PLC0415

    from vllm_forge.images import patched_wheel  # noqa: PLC0415
    from vllm_forge.patches import check_line  # noqa: PLC0415
    from vllm_forge.sources import SourceRepo, Wheelhouse, read_lock  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    name, line = find_line(matrix, args.line)
    repo, wheelhouse = SourceRepo(), Wheelhouse()
    made = read_lock(root, name, line, matrix.base)
    applied = check_line(root, name, line, repo)
    wheelhouse.fetch([made.find("vllm")])
    cell = image_cell(matrix, root, line.skus[0], name)
    with report(f"patch the wheel of line {name}"):
        patched = patched_wheel(cell, made, applied, repo, wheelhouse)
        target = (args.output or root / "dist" / "wheels") / patched.path.name
        with atomic_path(target) as aside:
            shutil.copyfile(patched.path, aside)
    print(target)


def schema(args: argparse.Namespace) -> None:
    """Write matrix.schema.json."""
    del args
    with atomic_path(find_root() / "matrix.schema.json") as aside:
        aside.write_text(schema_text())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vllm-forge", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    one = commands.add_parser("build", help="build one image", allow_abbrev=False)
    one.add_argument("sku", help="a SKU or an arch of matrix.toml, e.g. b300 or sm120")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--engine", help="docker or buildah (default: the one that is here)")
    one.add_argument("--base", default="rootfs", help="rootfs, or NAME@sha256:... of a registry")
    one.add_argument("--refresh-base", action="store_true", help="make rootfs and system again")
    one.add_argument("--output", type=Path, help="folder for the OCI layout (default: dist/)")
    one.add_argument("--load", action="store_true", help="also load it into the engine's store")
    one.add_argument("--push", metavar="REF", help="also push it, e.g. registry/name:tag")
    one.add_argument("--provision", action="store_true", help="install missing build tools (apt)")
    one.add_argument("--dry-run", action="store_true", help="print the commands, do nothing")
    one.set_defaults(call=build)

    one = commands.add_parser("lock", help="resolve a line, write its lock")
    one.add_argument("--line")
    one.set_defaults(call=lock)

    one = commands.add_parser("fetch", help="download a line's wheels")
    one.add_argument("--line")
    one.set_defaults(call=fetch)

    one = commands.add_parser("patches", help="prove that every series applies exactly")
    one.add_argument("--line")
    one.add_argument("--update", action="store_true", help="write lock.toml anew")
    one.set_defaults(call=patches)

    one = commands.add_parser("wheel", help="write a line's patched wheel")
    one.add_argument("--line")
    one.add_argument("--output", type=Path)
    one.set_defaults(call=wheel)

    one = commands.add_parser("schema", help="write matrix.schema.json")
    one.set_defaults(call=schema)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the error class, 0 without one."""
    try:
        args = _parser().parse_args(argv)
        args.call(args)
    except ForgeError as error:
        console.print(f"[bold red]{type(error).__name__}[/] (exit {error.exit_code})")
        console.print(str(error), markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept")
        return 130
    return 0
