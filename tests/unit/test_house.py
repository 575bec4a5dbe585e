"""The house rules: imports point one way, SKUs are data, sessions come from rows."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from vllm_forge.matrix import load
from vllm_forge.patches import read_series, read_tree_lock

REPO = Path(__file__).parents[2]
SOURCE = REPO / "src" / "vllm_forge"
# A room may import those before it.
ROOMS = [
    "errors", "host", "matrix", "sources", "project", "patches", "kernels", "images", "checkpoints",
    "signing", "receipts", "serve", "bench", "proofs", "gputest", "dispatch", "release", "pages",
    "commands", "cli", "__main__",
]  # fmt: skip


def rooms_of(path: Path) -> tuple[str, set[str]]:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "vllm_forge":
                names = [f"vllm_forge.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        imported |= {n.split(".")[1] for n in names if n.startswith("vllm_forge.")}
    return room, imported - {room}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path: Path) -> None:
    if path == SOURCE / "__init__.py":
        return
    room, imported = rooms_of(path)
    allowed = set(ROOMS[: ROOMS.index(room)])
    assert imported <= allowed, f"{room} must not import {sorted(imported - allowed)}"


def test_rooms_are_documented_in_their_order() -> None:
    page = (REPO / "docs/develop/architecture.md").read_text()
    heads = re.findall(r"^\| (`.*?) \|", page.partition("## Rooms")[2], re.MULTILINE)
    documented = [name for head in heads for name in re.findall(r"`(\w+)`", head)]
    assert documented == [room for room in ROOMS if room not in {"errors", "__main__"}]


def test_only_tests_need_pytest() -> None:
    """The project is installed without it."""
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"(?m)^(import|from) pytest\b", path.read_text()), path


def test_no_code_names_a_sku() -> None:
    matrix = load(REPO)
    names = {*matrix.sku, *(row.arch for row in matrix.sku.values())}
    word = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    for path in [*SOURCE.rglob("*.py"), REPO / "noxfile.py", REPO / "docker" / "Dockerfile"]:
        code = "\n".join(
            line
            for line in path.read_text().splitlines()
            if "e.g." not in line and "``" not in line
        )
        assert not word.search(code), f"{path}: {word.search(code)}"


def test_only_project_finds_and_parses_the_matrix() -> None:
    """Everything else takes the Project that ``cli.main`` makes, or what it needs of it."""
    calls = {"find_root", "load", "image_cell"}
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "project.py" or path.parent == SOURCE / "matrix":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "vllm_forge.matrix"
            ):
                assert not calls & {alias.name for alias in node.names}, path


@pytest.mark.parametrize("name", list(tomllib.loads((REPO / "matrix.toml").read_text())["line"]))
def test_series_names_real_skus_and_real_tests(name: str) -> None:
    matrix = load(REPO)
    folder = REPO / matrix.line[name].series
    assert read_tree_lock(folder, name).sdist == f"vllm-{matrix.line[name].vllm}.tar.gz"
    for patch in read_series(folder):
        skus = patch.fields["Skus"]
        assert skus == "all" or {item.strip() for item in skus.split(",")} <= set(matrix.sku)
        file, _, test = patch.proves.partition("::")
        tree = ast.parse((REPO / file).read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_schema_is_current() -> None:
    from vllm_forge.matrix.cells import schema_text

    assert (REPO / "matrix.schema.json").read_text() == schema_text(), "run: nox -s docs"


def test_modules_are_short() -> None:
    long = {
        str(path.relative_to(REPO)): count
        for path in SOURCE.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"split by idea: {long}"


def test_ci_finds_its_checkout_where_cdpath_is_set(tmp_path: Path) -> None:
    head, _, _ = (REPO / ".ci" / "run").read_text().partition("\nexport")
    for name in ("checkout", "other"):
        (tmp_path / name / ".ci").mkdir(parents=True)
    (script := tmp_path / "checkout" / ".ci" / "run").write_text(f"{head}\npwd\n")
    done = subprocess.run(
        ["bash", script.relative_to(tmp_path / "checkout")], cwd=tmp_path / "checkout",
        env={**os.environ, "CDPATH": str(tmp_path / "other")}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == f"{tmp_path / 'checkout'}\n"


def test_unpacked_layers_are_opened_by_the_store_alone() -> None:
    """``StoredLayer`` compares its files before it names them; nothing goes around that."""

    def using(pattern: str) -> set[str]:
        paths = SOURCE.rglob("*.py")
        return {str(p.relative_to(SOURCE)) for p in paths if re.search(pattern, p.read_text())}

    # The plan names what the checks of a build will mount, after that build has opened it.
    makers = r"\bStoredLayer\(|\blayer_folder\(|cache_root\(\) / \"layers\""
    assert using(makers) == {"images/store.py", "images/wheel_layers.py", "images/plan.py"}
    # After write_layers, which has compared them.
    written = {"images/store.py", "images/build.py", "proofs/environment.py"}
    assert using(r"\bchecked=True") == written


def test_no_index_host_is_named() -> None:
    """Packages come from the index that a host is set up for."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split()
    host = re.compile("py" + r"pi\.org|python" + r"hosted|deb\.deb" + r"ian|registry\.npm")
    for name in tracked:
        path = REPO / name
        if path.is_file() and (found := host.search(path.read_text(errors="replace"))):
            pytest.fail(f"{name}: {found[0]}")


def test_tests_do_not_import_tests() -> None:
    """What several need is in tests/support."""
    pattern = re.compile(r"^\s*(?:from|import) +tests\.[\w.]*\btest_\w+", re.M)
    for path in (REPO / "tests").rglob("*.py"):
        match = pattern.search(path.read_text())
        assert match is None, f"{path.relative_to(REPO)}: {match[0]}"


@pytest.mark.parametrize("path", sorted((REPO / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_programs_in_texts_import_what_exists(path: Path) -> None:
    """Of benchmarks: mypy does not look into strings."""
    for module, names in re.findall(
        r"^from (vllm_forge[\w.]*) import (.+)$", path.read_text(), re.M
    ):
        place = Path("src", *module.split("."))
        source = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        defined: set[str] = set()
        for node in ast.parse(source.read_text()).body:
            defined.add(getattr(node, "name", ""))
            defined |= {alias.asname or alias.name for alias in getattr(node, "names", ())}
            defined |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        assert {name.strip() for name in names.split(",")} <= defined, f"{path}: {module}"
