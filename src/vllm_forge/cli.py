"""Arguments to calls, nothing else."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.errors import ForgeError, NotPatchedError, ToolMissingError, UsageError
from vllm_forge.host import (
    RecordingRunner,
    SubprocessRunner,
    atomic_path,
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
    from vllm_forge.matrix import Line


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped option, and our exit code."""

    def error(self, message: str) -> NoReturn:
        _, found, words = message.partition("unrecognized arguments: ")
        hint = ""
        if found:
            near = difflib.get_close_matches(words.split()[0].partition("=")[0], OPTIONS, n=1)
            hint = f" Perhaps you meant {near[0]!r}?" if near else ""
        raise UsageError(f"{message}.{hint}", where=self.prog, remedy=f"{self.prog} --help")


# Every option of every command, for suggestions; filled by _parser().
OPTIONS: set[str] = set()


def build(args: argparse.Namespace) -> None:
    """Build one image."""
    from vllm_forge.images import (  # noqa: PLC0415
        Build,
        BuildOptions,
        build_image,
        choose_engine,
        provision,
        resolve,
    )

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
    plan = resolve(cell, options, engine)
    made = None
    if args.dry_run:
        Build(plan, runner).steps()
    else:
        made = build_image(plan, runner)
    target = plan.target
    if args.load:
        engine.load(runner, target, plan.name)
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
            f"--digestfile={target}.pushed", f"oci:{target}", f"docker://{reference}",
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


def install_tools(args: argparse.Namespace) -> None:
    """Install the build tools on this host."""
    from vllm_forge.images import provision  # noqa: PLC0415

    provision(SubprocessRunner(), registry=args.registry)


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


def install(args: argparse.Namespace) -> None:
    """Patch the vLLM of a virtual environment, or put it back."""
    from vllm_forge.patches import check_line  # noqa: PLC0415
    from vllm_forge.patches.install import Installer, find_python, probe  # noqa: PLC0415
    from vllm_forge.sources import SourceRepo  # noqa: PLC0415

    root = find_root()
    name, line = find_line(load(root), args.line)
    python = find_python(args.python)
    target = probe(python)
    if target.site is None and args.revert:
        raise NotPatchedError("no vLLM is installed there", where=str(python))
    repo = SourceRepo()
    applied = check_line(root, name, line, repo)
    if target.site is None:
        _install_release(root / line.lock, line, target.python_version, python)
        target = probe(python)
    installer = Installer(target, repo, applied, line.vllm)
    if args.revert:
        installer.revert()
        print(f"vLLM {installer.release} as published: {installer.site}")
    else:
        installer.patch()
        print(f"vLLM {installer.version}: {installer.site}")


def _install_release(lock_path: Path, line: Line, python_version: str, python: Path) -> None:
    """The line's pinned vLLM: all of the lock where the Python is the lock's."""
    from uv import find_uv_bin  # noqa: PLC0415

    argv = [find_uv_bin(), "pip", "install", f"--python={python}"]
    if python_version == line.python:
        argv += ["--require-hashes", "--no-deps", f"--requirements={lock_path}"]
    else:
        console.print(
            f"[yellow]the lock is for Python {line.python}, this is {python_version}:[/] only vLLM "
            "itself is pinned, its dependencies are what the index offers today"
        )
        argv += [f"vllm=={line.vllm}", f"torch=={line.torch}"]
    SubprocessRunner().run(argv)


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

    one = commands.add_parser("provision", help="install the build tools (apt, as root)")
    one.add_argument("--registry", action="store_true", help="also docker-registry, for the tests")
    one.set_defaults(call=install_tools)

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

    one = commands.add_parser("install", help="patch the vLLM of a virtual environment")
    one.add_argument("--python", type=Path, help="its interpreter (default: the active one's)")
    one.add_argument("--line")
    one.add_argument("--revert", action="store_true", help="put every file back as published")
    one.set_defaults(call=install)

    one = commands.add_parser("schema", help="write matrix.schema.json")
    one.set_defaults(call=schema)
    for command in commands.choices.values():
        OPTIONS.update(command._option_string_actions)
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
