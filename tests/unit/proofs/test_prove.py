"""Variants of a series, what a run of its proofs says, and the records that are committed.

The runs themselves need the layers of an image: `nox -s prove` is that test.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.support.trees import changed_tree, patch_text, write_sdist
from tests.support.wheels import Member, write_wheel
from vllm_forge.errors import ForgeError
from vllm_forge.host import RecordingRunner
from vllm_forge.images.errors import EngineSetupError
from vllm_forge.matrix import load
from vllm_forge.patches import (
    Applied,
    Patch,
    apply_series,
    decisions,
    read_dispositions,
    read_patch,
    read_series,
    read_tree_lock,
)
from vllm_forge.patches.errors import InseparablePatchError, SeriesOrderError, WrongContextError
from vllm_forge.patches.series import (
    OTHERS,
    TAKEN_OUT,
    Variant,
    pairs,
    require_idempotent,
    trees_of_moved,
    without,
)
from vllm_forge.project import Project
from vllm_forge.proofs import prove as prove_module
from vllm_forge.proofs.environment import LineEnvironment
from vllm_forge.proofs.errors import ProofNotRunError, ProofRedError, UselessPatchError
from vllm_forge.proofs.prove import (
    ALL_TESTS,
    SCRIPT,
    judge_whole,
    judge_without,
    parse,
    prove,
)
from vllm_forge.proofs.record import CHECKOUT, TestRun, digest_of_tests, fresh_record
from vllm_forge.sources import Wheelhouse, read_lock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_forge.host import Runner
    from vllm_forge.images.engines import ContainerRun
    from vllm_forge.sources import SourceRepo

ROOT = Path(__file__).resolve().parents[3]
MATRIX = load(ROOT)
LINES = [f"line {number}\n" for number in range(60)]
RELEASE = "9.9.1"


def text(**changes: str) -> bytes:
    """Sixty numbered lines, some of them others: ``_7="seven"``; lines may be added to one."""
    lines = list(LINES)
    for name, value in changes.items():
        lines[int(name[1:])] = value
    return "".join(lines).encode()


@pytest.fixture
def base(repo: SourceRepo, tmp_path: Path) -> str:
    files = {"vllm/a.py": text(), "vllm/b.py": text(), "vllm/_version.py": b""}
    return repo.import_archive(RELEASE, write_sdist(tmp_path / "s.tar.gz", files))


class Series:
    """Patches that are made one after the other."""

    def __init__(self, repo: SourceRepo, base: str, folder: Path) -> None:
        self.repo = repo
        self.base = self.tree = base
        self.folder = folder
        self.patches: list[Patch] = []

    def add(self, **files: bytes) -> None:
        number = len(self.patches) + 1
        path = self.folder / f"{number:04}-patch.patch"
        changes = {f"vllm/{name}.py": content for name, content in files.items()}
        index = self.folder / "index"
        path.write_text(patch_text(self.repo, self.tree, changes, index), encoding="utf-8")
        self.tree = changed_tree(self.repo, self.tree, changes, index)
        self.patches.append(read_patch(path))

    def applied(self) -> Applied:
        return apply_series(self.repo, self.base, self.patches)

    def blob(self, tree: str, name: str) -> bytes:
        return self.repo.git("cat-file", "blob", f"{tree}:vllm/{name}.py").stdout


@pytest.fixture
def series(repo: SourceRepo, base: str, tmp_path: Path) -> Series:
    return Series(repo, base, tmp_path)


# --- trees ----------------------------------------------------------------------------------------


class TestWithout:
    def test_the_others_applied(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        series.add(b=text(_5="FIVE\n"))
        found = without(repo, series.applied(), series.patches, 0)
        assert (found.way, found.left_out) == (OTHERS, series.patches[0])
        assert series.blob(found.tree, "a") == text()
        assert series.blob(found.tree, "b") == text(_5="FIVE\n")

    def test_the_last_one_is_the_tree_before_it(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        series.add(a=text(_5="five\n", _40="forty\n"))
        applied = series.applied()
        assert without(repo, applied, series.patches, 1).tree == applied.trees[0]

    def test_taken_out_where_a_later_one_would_move(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\nand a half\n"))
        series.add(a=text(_5="five\nand a half\n", _40="forty\n"))
        found = without(repo, series.applied(), series.patches, 0)
        assert found.way == TAKEN_OUT
        assert series.blob(found.tree, "a") == text(_40="forty\n")

    def test_taken_out_at_its_own_place(self, repo: SourceRepo, series: Series) -> None:
        """Another patch makes the same lines elsewhere, nearer to where the first one was."""
        series.add(a=text(_40="forty\nand a half\n"))
        same = "".join(LINES[37:40]) + "forty\nand a half\n" + "".join(LINES[41:44])
        later = {"_5": same * 2, "_20": "x\n" * 20, "_55": "end\n"}
        series.add(a=text(_40="forty\nand a half\n", **later))
        found = without(repo, series.applied(), series.patches, 0)
        assert found.way == TAKEN_OUT
        assert series.blob(found.tree, "a") == text(**later)

    def test_a_file_that_it_adds_cannot_be_taken_out(
        self, repo: SourceRepo, series: Series
    ) -> None:
        series.add(new=text(), a=text(_5="five\nmore\n"))
        series.add(a=text(_5="five\nmore\n", _40="forty\n"))
        with pytest.raises(InseparablePatchError):
            without(repo, series.applied(), series.patches, 0)

    def test_inseparable_patch_is_an_error(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        series.add(a=text(_5="five at last\n"))
        with pytest.raises(InseparablePatchError, match="0001"):
            without(repo, series.applied(), series.patches, 0)


class TestOrder:
    def test_hunks_apart_commute(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\nmore\n"))
        series.add(a=text(_5="five\nmore\n", _40="forty\n"))
        (pair,) = pairs(repo, series.applied(), series.patches)
        assert tuple(pair.values()) == (
            "0001-patch.patch",
            "0002-patch.patch",
            True,
        )

    def test_dependent_hunks_do_not_commute(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        series.add(a=text(_5="five at last\n"))
        assert [pair["commutes"] for pair in pairs(repo, series.applied(), series.patches)] == [
            False
        ]

    def test_insertions_at_one_place_do_not_commute(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="line 5\nx\n"))
        series.add(a=text(_5="line 5\nx\ny\n"))
        assert [pair["commutes"] for pair in pairs(repo, series.applied(), series.patches)] == [
            False
        ]

    def test_hunks_apart_that_do_not_apply_in_the_other_order(
        self, repo: SourceRepo, series: Series
    ) -> None:
        series.add(a=text(_5="five\n"))
        series.add(a=text(_5="five\n", _40="forty\n"))
        good = series.applied()
        index = series.folder / "index"
        other = changed_tree(repo, good.base, {"vllm/a.py": text(_40="another\n")}, index)
        with pytest.raises(SeriesOrderError, match="do not apply in the other order"):
            pairs(repo, Applied(base=other, trees=good.trees), series.patches)

    def test_a_patch_that_goes_onto_its_own_result_is_an_error(
        self, repo: SourceRepo, series: Series, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        series.add(a=text(_5="five\n"))
        applied = series.applied()
        monkeypatch.setattr("vllm_forge.patches.apply.apply_series", lambda *_arguments: applied)
        with pytest.raises(SeriesOrderError, match="applied again on its own result"):
            require_idempotent(repo, applied, series.patches)

    def test_trees_that_are_not_the_patches_are_found(
        self, repo: SourceRepo, series: Series
    ) -> None:
        series.add(a=text(_5="five\n"))
        series.add(b=text(_5="five\n"))
        good = series.applied()
        wrong = Applied(base=good.base, trees=(good.trees[0], good.base))
        with pytest.raises(SeriesOrderError, match="another tree in the other order"):
            pairs(repo, wrong, series.patches)
        with pytest.raises(SeriesOrderError, match="applied twice"):
            require_idempotent(repo, wrong, series.patches)

    def test_a_second_time_is_refused(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        require_idempotent(repo, series.applied(), series.patches)

    def test_a_patch_that_fits_again_is_an_error(self, repo: SourceRepo, tmp_path: Path) -> None:
        """Repeated code: after the first of two places the hunk finds the other one."""
        block = "".join(f"same {n}\n" for n in range(12))
        before = (block + block).encode()
        once = (block.replace("same 6\n", "other\n") + block).encode()
        base = repo.import_archive("1", write_sdist(tmp_path / "r.tar.gz", {"vllm/a.py": before}))
        twice = Series(repo, base, tmp_path)
        twice.add(a=once)
        with pytest.raises(SeriesOrderError, match="on its own result"):
            require_idempotent(repo, twice.applied(), twice.patches)


class TestExport:
    def test_trees_of_hunks_that_moved(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        series.add(a=text(_5="five\n", _40="forty\n"))
        index = series.folder / "index"
        other = changed_tree(repo, series.base, {"vllm/a.py": text(_20="twenty\nx\n")}, index)
        trees = trees_of_moved(repo, other, series.patches)
        assert trees[0] == other
        assert series.blob(trees[2], "a") == text(_5="five\n", _20="twenty\nx\n", _40="forty\n")

    def test_patch_that_fits_nowhere_is_rejected(self, repo: SourceRepo, series: Series) -> None:
        series.add(a=text(_5="five\n"))
        index = series.folder / "index"
        other = changed_tree(repo, series.base, {"vllm/a.py": text(_5="V\n")}, index)
        with pytest.raises(WrongContextError):
            trees_of_moved(repo, other, series.patches)


# --- verdicts -------------------------------------------------------------------------------------

PROOF = "tests/unit/test_nothing.py::test_nothing"  # what the kit's patches name


def run(code: int, why: str = "", **tests: str) -> TestRun:
    names = {PROOF if name == "it" else f"{PROOF}[{name}]": said for name, said in tests.items()}
    return TestRun(exit=code, tests=names, why=why, tail="the tail")


@pytest.fixture
def variant(series: Series) -> Variant:
    series.add(a=text(_5="five\n"))
    return Variant(left_out=series.patches[0], tree=series.base, way=OTHERS)


class TestVerdictWithout:
    def test_red_proof_is_accepted(self, variant: Variant) -> None:
        assert (
            judge_without("9.9", variant, run(1, "KeyError: 'x'", a="failed", b="passed")) is None
        )

    @pytest.mark.parametrize("why", ["'Module' object", "module 'cutlass.cute.arch'"])
    def test_what_vllm_does_not_find_is_red(self, variant: Variant, why: str) -> None:
        said = run(1, f"AttributeError: {why} has no attribute 'x'", it="failed")
        assert judge_without("9.9", variant, said) is None

    def test_green_proves_nothing(self, variant: Variant) -> None:
        error = judge_without("9.9", variant, run(0, it="passed"))
        assert type(error) is UselessPatchError
        assert "proves nothing: drop it" in str(error)
        assert "0001-patch.patch" in str(error)

    @pytest.mark.parametrize(
        "said",
        [
            run(0),
            run(5),
            run(4),
            run(2, "ImportError", it="failed"),
            run(2, "interrupted", it="failed"),
            run(1),
            run(1, it="passed"),
            run(0, it="skipped"),
            run(1, a="failed", b="skipped"),
            run(1, a="failed", b="xfailed"),
            run(1, "ImportError: no x", it="failed"),
            run(1, "ModuleNotFoundError: no x", it="failed"),
            run(1, "SyntaxError: bad", it="failed"),
            run(1, "MemoryError", it="failed"),
            run(1, "OSError: [Errno 28] No space left on device", it="failed"),
            run(
                1,
                "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you",
                it="failed",
            ),
            run(
                1,
                "subprocess.TimeoutExpired: Command '['c++']' timed out after 9 seconds",
                it="failed",
            ),
            run(1, "AttributeError: module 'vllm.utils' has no attribute 'added'", it="failed"),
            run(1, "AttributeError: <module 'vllm.x' from '...'> has no attribute", it="failed"),
        ],
        ids=lambda said: f"{said.exit} {said.why} {list(said.tests.values())}",
    )
    def test_other_outcomes_are_undecided(self, variant: Variant, said: TestRun) -> None:
        assert type(judge_without("9.9", variant, said)) is ProofNotRunError


class TestVerdictWhole:
    def kinds(self, series: Series, said: TestRun) -> list[type[ForgeError]]:
        return [type(error) for error in judge_whole("9.9", series.patches, said)]

    @pytest.fixture(autouse=True)
    def _one_patch(self, series: Series) -> None:
        series.add(a=text(_5="five\n"))

    def test_green(self, series: Series) -> None:
        assert self.kinds(series, run(0, a="passed", b="passed")) == []

    def test_red(self, series: Series) -> None:
        assert self.kinds(series, run(1, "assert 1", a="passed", b="failed")) == [ProofRedError]

    def test_red_elsewhere(self, series: Series) -> None:
        tests = {PROOF: "passed", "tests/patches/test_dispositions.py::x": "failed"}
        (error,) = judge_whole("9.9", series.patches, TestRun(exit=1, tests=tests, why="", tail=""))
        assert type(error) is ProofRedError
        assert "test_dispositions" in str(error)

    @pytest.mark.parametrize(
        "said",
        [
            run(0),
            run(5),
            run(2, it="passed"),
            run(0, it="skipped"),
            run(0, a="passed", b="skipped"),
        ],
        ids=lambda said: f"{said.exit} {list(said.tests.values())}",
    )
    def test_not_run(self, series: Series, said: TestRun) -> None:
        assert self.kinds(series, said) == [ProofNotRunError]

    def test_test_with_a_common_prefix_is_not_the_proof(self, series: Series) -> None:
        said = TestRun(exit=0, tests={f"{PROOF}_more": "passed"}, why="", tail="")
        assert self.kinds(series, said) == [ProofNotRunError]


@pytest.mark.parametrize("output", ["", "noise", '{"exit": 0}', "[1]", "7"])
def test_no_verdict_is_an_error(output: str) -> None:
    with pytest.raises(ProofNotRunError):
        parse(output, "there")


def test_what_changes_between_runs_is_not_recorded() -> None:
    why = "TypeError: <x object at 0x7f3a> in /tmp/pytest-1/y"
    said = parse(json.dumps({"exit": 1, "tests": {}, "why": why, "tail": ""}), "there")
    assert said.why == "TypeError: <x object at ...> in ..."


# --- the script that runs inside ------------------------------------------------------------------

MIXED = """
import pytest
def test_good(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_half(n): assert n == 1, f"{n} is too many"
def test_skipped(): pytest.skip("not here")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken(): raise KeyError("no such thing")
def test_setup(broken): pass
@pytest.fixture
def late():
    yield
    raise ValueError("too late")
def test_teardown(late): print("noise on stdout")
"""


def run_inside(folder: Path, content: str) -> TestRun:
    (folder / SCRIPT.name).write_bytes((ROOT / SCRIPT).read_bytes())
    (folder / "test_it.py").write_text(content)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, SCRIPT.name, str(folder), "9.9", "1", "test_it.py"],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return parse(done.stdout, "here")


def test_script_reports_every_outcome(tmp_path: Path) -> None:
    said = run_inside(tmp_path, MIXED)
    assert said.exit == 1
    assert {name.partition("::")[2]: outcome for name, outcome in said.tests.items()} == {
        "test_good": "passed",
        "test_half[1]": "passed",
        "test_half[2]": "failed",
        "test_skipped": "skipped",
        "test_expected": "xfailed",
        "test_setup": "failed",
        "test_teardown": "failed",
    }
    assert said.why == "AssertionError: 2 is too many"
    assert said.outcomes("test_it.py::test_half") == Counter(passed=1, failed=1)


@pytest.mark.parametrize(
    ("content", "code"), [("import nothing_of_that_name\n", 2), ("", 5), ("def test_x(: pass\n", 2)]
)
def test_script_reports_what_cannot_be_collected(tmp_path: Path, content: str, code: int) -> None:
    said = run_inside(tmp_path, content)
    assert (said.exit, said.tests) == (code, {})


def test_script_sets_the_line_and_threads(tmp_path: Path) -> None:
    content = (
        "import os\ndef test_it():\n"
        "    assert os.environ['VLLM_FORGE_CONTRACT_LINE'] == '9.9'\n"
        "    assert os.environ['OMP_NUM_THREADS'] == '1'\n"
        "    assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
    )
    assert run_inside(tmp_path, content).exit == 0


# --- the environment and the whole ----------------------------------------------------------------


def test_proofs_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EngineSetupError, match="only root"):
        prove(Project(ROOT), list(MATRIX.line), RecordingRunner())


HARM = "tests/patches/test_harm.py::test_harm"
DECIDED = f"""
schema_version = 1
[[disposition]]
about = "#1"
title = "a change"
upstream = "open"
[disposition.on.all]
status = "refused"
reason = "It does harm."
proof = "{HARM}"
"""


class FakeEngine:
    """Answers a run by the content of the file that its tree changes; ``alone``: a proof's."""

    def __init__(self, answers: Mapping[bytes, TestRun]) -> None:
        self.answers = answers
        self.alone: TestRun | None = None
        self.runs: list[ContainerRun] = []

    def run_in_image(self, runner: Runner, run: ContainerRun) -> str:
        del runner
        self.runs.append(run)
        path = next(run.lower_dirs[0].rglob("a.py"), None)
        said = self.answers[path.read_bytes() if path else b""]
        if path and self.alone is not None and run.argv[-1] != ALL_TESTS:
            said = self.alone
        return json.dumps({"exit": said.exit, "tests": said.tests, "why": said.why, "tail": ""})


@pytest.fixture
def one_line(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Project, FakeEngine]:
    """A line of one patch, whose layers and engine are made up."""
    series.add(a=text(_5="five\n"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "dispositions.toml").write_text(DECIDED, encoding="utf-8")
    line = MATRIX.line["0.26"].model_copy(update={"vllm": RELEASE, "series": "patches"})
    engine = FakeEngine({})
    plan = SimpleNamespace(
        engine=engine,
        cell=SimpleNamespace(line=line, line_name="9.9"),
        lock=SimpleNamespace(digest="0" * 64),
    )
    work = tmp_path / "work"
    line_environment = LineEnvironment(
        plan=cast("Any", plan),
        repo=series.repo,
        applied=series.applied(),
        lower_dirs=(),
        config={},
        work=work,
        runner=RecordingRunner(),
    )
    replacements: dict[str, Any] = {
        "open_line": lambda *_: nullcontext(line_environment),
        "write_inputs": lambda *_: tmp_path / "in",
        "read_series": lambda _folder: tuple(series.patches),
    }
    for name, function in replacements.items():
        monkeypatch.setattr(prove_module, name, function)
    project = Project(root)
    vars(project)["matrix"] = MATRIX.model_copy(update={"line": {"9.9": line}})
    return project, engine


WITH, WITHOUT = text(_5="five\n"), b""


def prove_it(
    one_line: tuple[Project, FakeEngine],
    whole: TestRun,
    without: TestRun,
    harm: str = "passed",
) -> Path:
    project, engine = one_line
    tests = whole.tests if harm == "not there" else whole.tests | {HARM: harm}
    engine.answers = {WITH: whole.model_copy(update={"tests": tests}), WITHOUT: without}
    prove(project, ["9.9"], RecordingRunner())
    return project.records / "proofs/9.9.json"


def test_proven_line_is_recorded_reproducibly(
    one_line: tuple[Project, FakeEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    path = prove_it(one_line, run(0, it="passed"), run(1, "KeyError: 'x'", it="failed"))
    first = path.read_bytes()
    assert "proven" in capsys.readouterr().out
    data = json.loads(first)
    (patch,) = data["patches"]
    assert patch["with"] == {"passed": 1}
    assert patch["without"]["exit"] == 1
    assert patch["without"]["why"] == "KeyError: 'x'"
    assert data["not carried"] == [
        {"about": "#1", "status": "refused", "shown by": HARM, "passed": 1}
    ]
    assert (
        prove_it(one_line, run(0, it="passed"), run(1, "KeyError: 'x'", it="failed")).read_bytes()
        == first
    )


def test_whole_runs_all_tests_and_a_proof_runs_alone_with_its_patch_and_without(
    one_line: tuple[Project, FakeEngine],
) -> None:
    prove_it(one_line, run(0, it="passed"), run(1, it="failed"))
    runs = sorted(one_line[1].runs, key=lambda item: item.name)
    threads = runs[0].argv[6]
    assert {item.argv[:2] for item in runs} == {("/usr/bin/env", "PYTHONHASHSEED=0")}
    assert [(item.name, item.argv[4:]) for item in runs] == [
        ("whole", ("/mnt", "9.9", threads, ALL_TESTS)),
        ("with-0001-patch", ("/mnt", "9.9", threads, PROOF)),
        ("without-0001-patch", ("/mnt", "9.9", threads, PROOF)),
    ]
    assert [bool(list(item.lower_dirs[0].rglob("a.py"))) for item in runs] == [True, True, False]
    assert len({item.work for item in runs}) == 3


@pytest.mark.parametrize(
    ("alone", "kind"),
    [
        (run(1, "KeyError: 'left by another test'", it="failed"), ProofRedError),
        (run(0, it="skipped"), ProofNotRunError),
        (run(0), ProofNotRunError),
        (run(2, "interrupted"), ProofNotRunError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else f"{value.exit} {value.tests}",
)
def test_proof_that_needs_other_tests_proves_nothing(
    one_line: tuple[Project, FakeEngine], alone: TestRun, kind: type[ForgeError]
) -> None:
    """Red without its patch only because it runs alone there."""
    one_line[1].alone = alone
    with pytest.raises(kind, match="0001-patch"):
        prove_it(one_line, run(0, it="passed"), run(1, "KeyError: 'x'", it="failed"))
    assert not one_line[0].records.exists()


@pytest.mark.parametrize(
    ("whole", "without_it", "kind"),
    [
        (run(0, it="passed"), run(0, it="passed"), UselessPatchError),
        (run(1, it="failed"), run(0, it="passed"), UselessPatchError),
        (run(1, it="failed"), run(1, it="failed"), ProofRedError),
        (run(0, it="skipped"), run(1, it="failed"), ProofNotRunError),
        (run(0, it="passed"), run(5), ProofNotRunError),
    ],
)
def test_unproven_line_is_not_recorded(
    one_line: tuple[Project, FakeEngine],
    whole: TestRun,
    without_it: TestRun,
    kind: type[ForgeError],
) -> None:
    with pytest.raises(kind):
        prove_it(one_line, whole, without_it)
    assert not one_line[0].records.exists()


@pytest.mark.parametrize("harm", ["skipped", "xfailed", "not there"])
def test_a_refusal_whose_test_was_not_run_is_not_recorded(
    one_line: tuple[Project, FakeEngine], harm: str
) -> None:
    with pytest.raises(ProofNotRunError, match="#1 is refused for what a test shows") as error:
        prove_it(one_line, run(0, it="passed"), run(1, "KeyError: 'x'", it="failed"), harm)
    assert HARM in str(error.value)
    assert not one_line[0].records.exists()


def test_container_run_gets_sources_models_and_tools(
    repo: SourceRepo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Native sources of the release, our models, and wheels whose programs can be run."""
    native = {"CMakeLists.txt": b"c", "cmake/u.cmake": b"u", "csrc/moe/ops.cu": b"o"}
    pipeline = {".buildkite/release-pipeline.yaml": b"p"}
    files = native | pipeline | {"vllm/a.py": b"a"}
    tree = repo.import_archive(RELEASE, write_sdist(tmp_path / "s.tar.gz", files))
    members = [Member(path="tool/run", mode=0o755), Member(path="tool/data")]
    wheel = write_wheel(tmp_path / "tool.whl", "tool", "1", members)
    monkeypatch.setattr(Wheelhouse, "fetch", lambda *_: None)
    monkeypatch.setattr(Wheelhouse, "verify", lambda *_: wheel)
    folder = prove_module.write_inputs(ROOT, tmp_path / "inputs", repo, tree)
    source = {
        str(path.relative_to(folder / "source")): path.read_bytes()
        for path in (folder / "source").rglob("*")
        if path.is_file()
    }
    assert source == native | pipeline
    assert (folder / "tests/gpu/reference/marlin_schedule.py").is_file()
    assert (folder / "tests/patches/conftest.py").is_file()
    assert digest_of_tests(folder) == digest_of_tests(ROOT)
    assert not list(folder.rglob("__pycache__"))
    assert os.access(folder / "tools/tool/run", os.X_OK)
    assert (folder / "tools/tool/data").stat().st_mode & 0o111 == 0
    assert not own_imports_that_are_missing(folder)


def own_imports_that_are_missing(folder: Path) -> list[str]:
    """Modules of this project that the contract tests and their helpers import, and lack."""

    def has(root: Path, name: str) -> bool:
        places = [root / name.replace(".", "/"), root / "src" / name.replace(".", "/")]
        return any(at.is_dir() or at.with_suffix(".py").is_file() for at in places)

    names = set()
    for path in [*folder.glob("tests/patches/*.py"), *folder.glob("tests/support/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
    return sorted(name for name in names if has(ROOT, name) and not has(folder, name))


def test_file_time_encodes_its_content(
    one_line: tuple[Project, FakeEngine], series: Series
) -> None:
    """Compiled code is kept by path, size and time: equal only where the content is."""
    series.add(a=text(_5="FIVE\n"))
    times = []
    with cast("Any", prove_module).open_line(*[None] * 4) as line_environment:
        for tree in (*series.applied().trees, series.applied().trees[0]):
            folder = line_environment.write_tree(tree, "one")
            times.append(next(folder.rglob("a.py")).stat().st_mtime)
    assert times[0] == times[2] != times[1]


# --- what is committed ----------------------------------------------------------------------------


def proofs() -> Sequence[str]:
    return list(MATRIX.line)


@pytest.mark.parametrize("line", proofs())
def test_committed_proof_matches_series_and_lock(line: str) -> None:
    """Stale? `nox -s prove -- --line LINE`."""
    row = MATRIX.line[line]
    data = json.loads((ROOT / "records" / "proofs" / f"{line}.json").read_text(encoding="utf-8"))
    series = read_series(ROOT / row.series)
    lock = read_tree_lock(ROOT / row.series, line)
    assert (data["line"], data["vllm"]) == (line, row.vllm)
    assert data["trees"] == {"base": lock.base, "result": lock.result}
    assert data["tests"] == digest_of_tests(ROOT), "tests/patches or what they use was changed"
    assert fresh_record(Project(ROOT), line) is not None
    assert data["environment"]["lock_sha256"] == read_lock(ROOT, line, row, MATRIX.base).digest
    assert [(p["name"], p["proves"], p["bug"]) for p in data["patches"]] == [
        (patch.name, patch.proves, patch.fields["Bug"]) for patch in series
    ]
    shown = [
        {"about": about, "status": decision.status, "shown by": decision.proof}
        for about, decision in decisions(read_dispositions(ROOT / "patches/vllm"), line)
        if decision.proof is not None
    ]
    assert [{key: row[key] for key in shown[0]} for row in data["not carried"]] == shown
    assert all(set(row) - set(shown[0]) == {"passed"} for row in data["not carried"])
    for patch in data["patches"]:
        assert patch["without"]["exit"] == 1
        assert patch["without"]["failed"] >= 1
        assert set(patch["with"]) == {"passed"}
    assert len(data["order"]) == max(0, len(series) - 1)


@pytest.mark.parametrize("name", CHECKOUT)
def test_record_of_other_tests_is_stale(name: str, tmp_path: Path) -> None:
    """A change of a test, of a helper or of a decision; compiled code is none."""
    for path in CHECKOUT:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile)(
            ROOT / path, tmp_path / path
        )
    before = digest_of_tests(tmp_path)
    folder = tmp_path / "tests/patches/__pycache__"
    folder.mkdir(exist_ok=True)
    (folder / "x.pyc").touch()
    assert digest_of_tests(tmp_path) == before
    changed = tmp_path / name
    if changed.is_dir():
        changed = next(changed.rglob("*.py"))
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert digest_of_tests(tmp_path) != before


def test_requirements_of_the_proofs_are_pinned_and_not_in_the_images() -> None:
    text_ = (ROOT / "tests/patches/requirements.txt").read_text(encoding="utf-8")
    names = {row.partition("==")[0] for row in text_.splitlines() if not row.startswith("#")}
    assert names == {"cmake", "iniconfig", "pluggy", "pytest"}
    for line in MATRIX.line.values():
        locked = (ROOT / line.lock).read_text(encoding="utf-8")
        assert not [name for name in names if f"\n{name}==" in locked]
        assert "\npackaging==" in locked
        assert "\npygments==" in locked
