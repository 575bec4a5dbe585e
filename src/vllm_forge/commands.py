"""What each command does: a few calls, and what is printed.

Imports are lazy: a command pays for its own libraries only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_forge.errors import NotPatchedError, ToolMissingError
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
    import argparse

    from vllm_forge.images import Image
    from vllm_forge.matrix import Line


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
        _push(runner, target, args.push)
    if made is not None:
        _announce(made.image, fresh=made.fresh)


def _as_namespace_root() -> NoReturn:
    """Go on as root of a user namespace; buildah maps the user's subordinate ids."""
    buildah = which("buildah")
    if buildah is None:
        raise ToolMissingError("buildah is not installed")
    argv = [buildah, "unshare", "--", sys.executable, "-m", "vllm_forge", *sys.argv[1:]]
    os.execv(buildah, argv)  # noqa: S606


def _push(runner: RecordingRunner | SubprocessRunner, target: Path, reference: str) -> None:
    """Copy the very bytes of the layout to a registry; skopeo checks the digests."""
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
    from vllm_forge.patches.treelock import export_line, fetch_base, read_tree_lock  # noqa: PLC0415
    from vllm_forge.patches.variants import trees_of_moved  # noqa: PLC0415
    from vllm_forge.sources import Index, SourceRepo  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    names = [find_line(matrix, args.line)[0]] if args.line else list(matrix.line)
    repo = SourceRepo()
    for name in names:
        line = matrix.line[name]
        if args.export:
            base = fetch_base(read_tree_lock(root / line.series, name), line.vllm, repo)
            series = read_series(root / line.series)
            export_line(root, line, repo, trees_of_moved(repo, base, series))
        if args.update:
            applied = update_line(root, name, line, repo, Index())
        else:
            applied = check_line(root, name, line, repo)
        series = read_series(root / line.series)
        print(f"line {name}: {len(series)} patches, tree {applied.result}")
        for patch in series:
            print(f"  {patch.name}: {patch.summary}")


def prove(args: argparse.Namespace) -> None:
    """Run each patch's proof without it and with it, in the images' own environment."""
    from vllm_forge.proof import prove as prove_lines  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    names = [find_line(matrix, args.line)[0]] if args.line else list(matrix.line)
    prove_lines(root, matrix, names, SubprocessRunner())


def drift(args: argparse.Namespace) -> None:
    """Say what each release does to each patch."""
    from datetime import UTC, datetime  # noqa: PLC0415

    from vllm_forge.patches.drift_data import survey_lines, write_drift  # noqa: PLC0415
    from vllm_forge.patches.drift_page import summary  # noqa: PLC0415
    from vllm_forge.sources import Index, SourceRepo  # noqa: PLC0415

    root = find_root()
    matrix = load(root)
    found = survey_lines(root, matrix, SourceRepo(), Index(), first=args.first, last=args.last)
    day = datetime.now(UTC).date().isoformat()
    console.print(summary(write_drift(root, matrix, found, day)))


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


def clean(args: argparse.Namespace) -> None:
    """Delete what the cache holds and no line needs."""
    from vllm_forge.images.clean import clean as clean_cache  # noqa: PLC0415

    if os.geteuid() != 0 and which("buildah") is not None:
        _as_namespace_root()  # system images hold files of mapped users
    root = find_root()
    freed = clean_cache(root, load(root), everything=args.all)
    console.print(f"{freed / 1e9:.1f} GB freed")
