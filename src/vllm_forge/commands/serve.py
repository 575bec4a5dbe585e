"""Serve a preset, or print how; judge all presets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_forge.host import HostProbe, console

if TYPE_CHECKING:
    import argparse

    from vllm_forge.commands.register import Commands
    from vllm_forge.matrix import ImageCell
    from vllm_forge.project import Project
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


def serve(project: Project, args: argparse.Namespace) -> None:
    """Print a preset's command, or become it."""
    from vllm_forge.serve import (
        become,
        built_image,
        container_command,
        require_gpus,
        running_engine,
        serving,
    )

    cell = project.cell(args.sku, args.line)
    item = serving(project.matrix, cell, args.preset, args.artifact)
    item.require_served()
    image = built_image(cell)
    digest = None if image is None else image.digest
    _say(project, item, image)
    if args.print_only:
        engine: Engine = args.engine or "docker"
        print(container_command(project.matrix, item, engine=engine, digest=digest).text())
        return
    probe = HostProbe()
    require_gpus(probe, item)
    become(
        container_command(
            project.matrix, item, engine=running_engine(probe, args.engine), digest=digest
        )
    )


def lint_presets(project: Project, args: argparse.Namespace) -> None:
    """Judge the presets; a finding is an error."""
    from vllm_forge.serve.lint import lint_line, require_clean

    names = project.lines(args.line)
    require_clean(
        [finding for name in names for finding in lint_line(project.root, project.matrix, name)]
    )
    print(f"{len(project.matrix.preset)} presets, lines {', '.join(names)}: no findings")


def _say(project: Project, item: Serving, image: BuiltImage | None) -> None:
    """What a reader should know of the command; on stderr, so that stdout can be piped."""
    from rich.markup import escape

    from vllm_forge.receipts.lookup import image_receipts, preset_state
    from vllm_forge.serve import bare_command

    found = image_receipts(project.root, project.matrix, None if image is None else image.digest)
    state = preset_state(project.root, found.held, item.preset_name, item.artifact_name)
    for words in found.refused:
        console.print(words, markup=False)
    console.print(
        f"[bold]{item.preset_name}[/], {item.artifact_name}, line {item.cell.line_name}: "
        f"[bold]{state}[/]\n  {escape(item.preset.note)}\n  {_image_words(item.cell, image)}\n"
        "  without a container, in an environment with the line's patched vLLM:",
    )
    console.print(f"{bare_command(project.matrix, item).text()}\n", style="dim", markup=False)


def _image_words(cell: ImageCell, image: BuiltImage | None) -> str:
    from vllm_forge.serve import build_command

    if image is None:
        return f"its image is not built here: {build_command(cell)}"
    return f"image {image.digest}; if the engine lacks it: {build_command(cell)}"
