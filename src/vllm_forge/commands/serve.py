"""Serve a preset, or print how; judge all presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import HostProbe, console
from vllm_forge.matrix import find_root, image_cell, load

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.matrix import ImageCell, Matrix
    from vllm_forge.serve import BuiltImage, Engine, Serving


def register(choices: Commands) -> None:
    """Add this module's commands."""
    one = choices.add_parser(
        "serve", help="serve a preset in its image, or print how", allow_abbrev=False
    )
    one.add_argument("--sku", required=True, help="a SKU or an arch of matrix.toml")
    one.add_argument("--preset", required=True, help="e.g. mtp, plain, tp2-mtp")
    one.add_argument("--artifact", help="default: the preset's first")
    one.add_argument("--line", help="vLLM line (default: the matrix's)")
    one.add_argument("--engine", choices=["docker", "podman"], help="default: the one that is here")
    one.add_argument("--print", dest="print_only", action="store_true", help="only print it")
    one.set_defaults(call=serve)

    one = choices.add_parser(
        "lint-presets", help="judge every preset by what each line's vLLM says", allow_abbrev=False
    )
    one.add_argument("--line", help="vLLM line (default: all)")
    one.set_defaults(call=lint_presets)


def serve(args: argparse.Namespace) -> None:
    """Print a preset's command, or become it."""
    from vllm_forge.serve import (
        become,
        built_image,
        container_command,
        require_gpus,
        running_engine,
        serving,
    )

    root = find_root()
    matrix = load(root)
    cell = image_cell(matrix, root, args.sku, args.line)
    item = serving(matrix, cell, args.preset, args.artifact)
    item.require_served()
    image = built_image(cell)
    digest = None if image is None else image.digest
    _say(matrix, item, image)
    if args.print_only:
        engine: Engine = args.engine or "docker"
        print(container_command(matrix, item, engine=engine, digest=digest).text())
        return
    probe = HostProbe()
    require_gpus(probe, item)
    become(
        container_command(matrix, item, engine=running_engine(probe, args.engine), digest=digest)
    )


def lint_presets(args: argparse.Namespace) -> None:
    """Judge the presets; a finding is an error."""
    from vllm_forge.matrix.cells import find_lines
    from vllm_forge.serve.lint import lint_line, require_clean

    root = find_root()
    matrix = load(root)
    names = find_lines(matrix, args.line)
    require_clean([finding for name in names for finding in lint_line(root, matrix, name)])
    print(f"{len(matrix.preset)} presets, lines {', '.join(names)}: no findings")


def _say(matrix: Matrix, item: Serving, image: BuiltImage | None) -> None:
    """What a reader should know of the command; on stderr, so that stdout can be piped."""
    from rich.markup import escape

    from vllm_forge.receipts.lookup import image_receipts, preset_state
    from vllm_forge.serve import bare_command

    root = item.cell.root
    found = image_receipts(root, matrix, None if image is None else image.digest)
    state = preset_state(root, found.held, item.preset_name, item.artifact_name)
    for words in found.refused:
        console.print(words, markup=False)
    console.print(
        f"[bold]{item.preset_name}[/], {item.artifact_name}, line {item.cell.line_name}: "
        f"[bold]{state}[/]\n  {escape(item.preset.note)}\n  {_image_words(item.cell, image)}\n"
        "  without a container, in an environment with the line's patched vLLM:",
    )
    console.print(f"{bare_command(matrix, item).text()}\n", style="dim", markup=False)


def _image_words(cell: ImageCell, image: BuiltImage | None) -> str:
    from vllm_forge.serve import build_command

    if image is None:
        return f"its image is not built here: {build_command(cell)}"
    return f"image {image.digest}; if the engine lacks it: {build_command(cell)}"
