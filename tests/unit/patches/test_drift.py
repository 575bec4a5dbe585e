"""What releases do to patches, on small trees; and the committed pages, from the committed data."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.index_server import IndexServer, Served
from tests.support.trees import changed_tree, patch_text, write_sdist
from vllm_forge.errors import UsageError
from vllm_forge.host import exclusive
from vllm_forge.host.errors import BusyError
from vllm_forge.matrix import load
from vllm_forge.pages.records import best, first_change
from vllm_forge.patches import Patch, read_patch, read_series
from vllm_forge.patches.drift import (
    DATA,
    Answer,
    Release,
    Survey,
    Verdict,
    dense,
    fetch_releases,
    locate,
    read_words,
    releases_between,
    survey,
    verdicts,
    vocabulary,
    write_drift,
)
from vllm_forge.project import Project
from vllm_forge.sources import Download, Index, SourceRepo
from vllm_forge.sources.errors import DistributionNotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
MATRIX = load(ROOT)
OWN = "2.0.0"
# Words too short to be looked for.
FILLER = "".join(f"n{number} = {number}\n" for number in range(30))
CODE = '''
class Projection:
    """Projects what the attention puts out."""

    def forward(self, hidden_states, positions):
        rotated = self.undo_rotation(hidden_states, positions)
        quantized, activation_scale = quantize_blockwise(rotated)
        block_scale = self.output_weight.weight_scale_inv
        return grouped_einsum(quantized, activation_scale, self.output_weight, block_scale)
'''
FIXED = CODE.replace("weight_scale_inv", "find_scale()")
# The same fault in other words, and mended in other words.
RECAST = CODE.replace("rotated = self", "turned = self").replace("(rotated)", "(turned)")
MENDED = CODE.replace("self.output_weight.weight_scale_inv", "scale_of(self.output_weight)")
OTHERS = {
    f"vllm/other_{number}.py": f"def helper_{number}(argument):\n    return argument\n".encode()
    for number in range(60)
}


def source(code: str, path: str = "vllm/layers/projection.py") -> dict[str, bytes]:
    return {path: (FILLER + code + FILLER).encode()} | OTHERS


class Subjects:
    """A series of one patch, made for CODE in vllm/layers/projection.py."""

    def __init__(self, repo: SourceRepo, tmp_path: Path) -> None:
        self.repo = repo
        self.tmp_path = tmp_path
        self.base = self.tree(OWN, source(CODE))
        self.path = tmp_path / "0001-scale.patch"
        changes: dict[str, bytes | None] = {**source(FIXED)}
        self.write(patch_text(repo, self.base, changes, tmp_path / "index"))

    @property
    def subject(self) -> list[tuple[Patch, str]]:
        return [(read_patch(self.path), self.base)]

    def write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")

    def landed(self, what: str) -> None:
        old = "Applied-Upstream: no\n"
        text = self.path.read_text(encoding="utf-8")
        assert old in text
        self.write(text.replace(old, f"Applied-Upstream: {what}\n"))

    def tree(self, version: str, files: Mapping[str, bytes]) -> str:
        return self.repo.import_archive(
            version, write_sdist(self.tmp_path / f"vllm-{version}.tar.gz", files)
        )

    def verdict(self, files: Mapping[str, bytes], version: str = "3.0.0") -> Verdict:
        tree = self.tree(version, files)
        known = vocabulary(self.repo, [self.subject])
        (found,) = verdicts(self.repo, tree, version, self.subject, known)
        return found


@pytest.fixture
def subjects(repo: SourceRepo, tmp_path: Path) -> Subjects:
    return Subjects(repo, tmp_path)


# --- one tree -------------------------------------------------------------------------------------


def test_applies(subjects: Subjects) -> None:
    assert subjects.verdict(source(CODE)) == Verdict(answer=Answer.APPLIES)


def test_offset_says_by_how_much(subjects: Subjects) -> None:
    said = subjects.verdict(source("# one\n# two\n" + CODE))
    assert said == Verdict(answer=Answer.OFFSET, detail="+2 lines")


def test_the_same_change_is_upstream(subjects: Subjects) -> None:
    said = subjects.verdict(source(FIXED))
    assert said == Verdict(answer=Answer.UPSTREAM, detail="the same change")


def test_another_change_is_upstream_by_the_header(subjects: Subjects) -> None:
    subjects.landed("3.0.0, vllm/layers/projection.py:39")
    said = subjects.verdict(source(MENDED))
    assert said.answer is Answer.UPSTREAM
    assert said.detail == "since 3.0.0, vllm/layers/projection.py:39"


def test_a_header_says_nothing_of_older_releases(subjects: Subjects) -> None:
    subjects.landed("3.10.0, vllm/layers/projection.py:39")
    assert subjects.verdict(source(MENDED), "3.9.0").answer is Answer.CONFLICT


def test_a_header_does_not_hide_that_the_patch_fits(subjects: Subjects) -> None:
    subjects.landed("3.0.0, vllm/layers/projection.py:39")
    said = subjects.verdict(source(CODE))
    assert said.answer is Answer.APPLIES
    assert said.detail.startswith("though its header says: since 3.0.0")


def test_conflict_names_the_line_in_the_release(subjects: Subjects) -> None:
    said = subjects.verdict(source("\n\n\n" + RECAST))
    assert said.answer is Answer.CONFLICT
    path, _, line = said.detail.partition(":")
    assert path == "vllm/layers/projection.py"
    text = source("\n\n\n" + RECAST)[path].decode().splitlines()
    assert "weight_scale_inv" in text[int(line) - 1]


def test_moved_where_the_file_is_gone(subjects: Subjects) -> None:
    said = subjects.verdict(source(CODE, "vllm/models/ops/o_proj.py"))
    assert said.answer is Answer.MOVED
    assert said.detail.startswith("vllm/models/ops/o_proj.py:")


def test_moved_where_the_file_is_still_there_without_the_code(subjects: Subjects) -> None:
    said = subjects.verdict(source("") | source(RECAST, "vllm/layers/ops.py"))
    assert said.answer is Answer.MOVED
    assert said.detail.startswith("vllm/layers/ops.py:")


def test_moved_to_the_nearest_of_equals(subjects: Subjects) -> None:
    near, far = "vllm/layers/near.py", "vllm/v1/a/far.py"
    said = subjects.verdict(source(CODE, far) | source(CODE, near))
    assert said.detail.startswith(near)


def test_nothing_moves_to_a_copy_that_was_there_before(repo: SourceRepo, tmp_path: Path) -> None:
    copy = source(CODE, "vllm/layers/rocm.py")
    made = Subjects(repo, tmp_path)
    made.base = made.tree("2.0.1", source(CODE) | copy)
    said = made.verdict(source("") | copy)
    assert said.answer is Answer.GONE


def test_code_that_stayed_has_not_moved_to_where_more_of_it_is(subjects: Subjects) -> None:
    said = subjects.verdict(source(RECAST) | source(CODE, "vllm/layers/twin.py"))
    assert said.answer is Answer.CONFLICT


def test_of_several_files_the_worst_is_the_answer_and_all_are_named(
    repo: SourceRepo, tmp_path: Path
) -> None:
    second = "vllm/layers/zeta.py"
    made = Subjects(repo, tmp_path)
    made.base = made.tree("2.0.1", source(CODE) | {second: b"left = right_operand\n"})
    changes: dict[str, bytes | None] = {**source(FIXED), second: b"left = wrong_operand\n"}
    made.write(patch_text(repo, made.base, changes, tmp_path / "index"))
    said = made.verdict(source("") | {second: b"left = (right_operand)\n"})
    assert said.answer is Answer.GONE
    assert said.detail == f"vllm/layers/projection.py has no such code; {second}:1"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (source(""), "vllm/layers/projection.py has no such code"),
        (dict(OTHERS), "vllm/layers/projection.py is not there, nor its code elsewhere"),
    ],
)
def test_gone(subjects: Subjects, files: Mapping[str, bytes], words: str) -> None:
    assert subjects.verdict(files) == Verdict(answer=Answer.GONE, detail=words)


def test_a_patch_is_looked_at_with_those_before_it(repo: SourceRepo, tmp_path: Path) -> None:
    """The second was made after the first had added a line above it: no offset of its own."""
    made = Subjects(repo, tmp_path)
    first = {"vllm/layers/projection.py": ("# a new line\n" + FILLER + CODE + FILLER).encode()}
    then = {"vllm/layers/projection.py": ("# a new line\n" + FILLER + FIXED + FILLER).encode()}
    middle = changed_tree(repo, made.base, first, tmp_path / "index")
    texts = (
        patch_text(repo, made.base, {**first}, tmp_path / "index"),
        patch_text(repo, middle, {**then}, tmp_path / "index"),
    )
    paths = tuple(tmp_path / f"000{n}-x.patch" for n in (1, 2))
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    subject = list(zip(map(read_patch, paths), (made.base, middle), strict=True))
    said = verdicts(repo, made.base, OWN, subject, frozenset())
    assert [verdict.answer for verdict in said] == [Answer.APPLIES, Answer.APPLIES]


def test_words_that_many_files_have_say_nothing(repo: SourceRepo, tmp_path: Path) -> None:
    tree = repo.import_archive("1", write_sdist(tmp_path / "x.tar.gz", OTHERS))
    words = read_words(repo.path, tree, frozenset({b"argument", b"helper_7"}))
    assert words.weight(b"argument") == 0
    assert words.weight(b"helper_7") > 1
    assert [place.path for place in dense(words, {b"helper_7": 1, b"argument": 1})] == [
        "vllm/other_7.py"
    ]
    assert locate(words, {b"argument": 1}, "vllm/other_7.py") is None
    assert locate(words, {}, "vllm/other_7.py") is None


# --- releases -------------------------------------------------------------------------------------


def offer(server: IndexServer, *versions: str) -> None:
    for version in versions:
        name = f"vllm-{version}.tar.gz"
        server.add("vllm", name, Served(content=version.encode()))
    server.add("vllm", "vllm-2.0.0-py3-none-any.whl", Served(content=b"a wheel"))
    server.add("vllm", "not-a-name.tar.gz", Served(content=b"?"))


def between(server: IndexServer, first: str, last: str | None) -> list[str]:
    return [release.version for release in releases_between(Index(server.url), first, last)]


def test_final_releases_of_the_range_in_order(server: IndexServer) -> None:
    offer(server, "0.9.0", "1.10.0", "1.9.0", "1.11.0rc1", "1.11.0", "1.9.0.post1", "2.0.0")
    assert between(server, "1.9.0", "1.11.0") == ["1.9.0", "1.9.0.post1", "1.10.0", "1.11.0"]
    assert between(server, "1.11.0", None) == ["1.11.0", "2.0.0"]


@pytest.mark.parametrize(
    ("first", "last", "kind"),
    [
        ("2.0.0", "1.9.0", UsageError),
        ("two", None, UsageError),
        ("1.9.0", "main", UsageError),
        ("1.8.0", None, DistributionNotFoundError),
        ("1.9.0", "3.0.0", DistributionNotFoundError),
    ],
)
def test_ends_that_are_not_there(
    server: IndexServer, first: str, last: str | None, kind: type[Exception]
) -> None:
    offer(server, "1.9.0", "2.0.0")
    with pytest.raises(kind):
        between(server, first, last)


def test_yanked_releases_are_left_out(server: IndexServer, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(server, "1.9.0", "1.9.1", "2.0.0")
    index = Index(server.url)
    files = index.files("vllm")
    yanked = [
        file if "1.9.1" not in file.filename else type(file)(**{**vars_of(file), "is_yanked": True})
        for file in files
    ]
    monkeypatch.setattr(index, "files", lambda _project: yanked)
    assert [r.version for r in releases_between(index, "1.9.0", "2.0.0")] == ["1.9.0", "2.0.0"]


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_only_what_is_missing_is_fetched(
    server: IndexServer, repo: SourceRepo, tmp_path: Path
) -> None:
    offer(server, "1.9.0", "2.0.0", "2.1.0")
    repo.import_archive("1.9.0", write_sdist(tmp_path / "x.tar.gz", OTHERS))
    index = Index(server.url)
    wanted = releases_between(index, "1.9.0", "2.1.0")
    wanted[1].archive.target.parent.mkdir(parents=True)
    wanted[1].archive.target.write_bytes(b"2.0.0")
    fetch_releases(index, wanted, repo)
    assert [release.archive.target.exists() for release in wanted] == [False, True, True]
    assert [len(server.asked(f"vllm-{v}.tar.gz")) for v in ("1.9.0", "2.0.0", "2.1.0")] == [0, 0, 1]


def test_releases_are_fetched_by_one_process_at_a_time(
    repo: SourceRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build may fetch the same archive: parts that two write at once are damaged."""
    held: list[str] = []

    def locked(*_: Any) -> None:
        with pytest.raises(BusyError), exclusive("sdists", wait=False):
            pass
        held.append("sdists")

    monkeypatch.setattr("vllm_forge.patches.drift.download_all", locked)
    fetch_releases(Index("http://127.0.0.1:9"), [], repo)
    assert held == ["sdists"]


def test_survey_imports_and_keeps_the_order(subjects: Subjects, tmp_path: Path) -> None:
    releases = []
    for version, code in (("2.1.0", CODE), ("2.2.0", "# new\n" + CODE), ("2.3.0", FIXED)):
        archive = write_sdist(tmp_path / f"r-{version}.tar.gz", source(code))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        file = Download(url="", sha256=digest, size=archive.stat().st_size, target=archive)
        releases.append(Release(version=version, date="2026-01-02", archive=file))
    found = list(survey(subjects.repo, releases, [subjects.subject]))
    assert [row.release.version for row in found] == ["2.1.0", "2.2.0", "2.3.0"]
    assert [row.verdicts[0].answer for row in found] == ["applies", "offset", "upstream"]
    assert found[0].tree == subjects.repo.tree("2.1.0")


# --- the page -------------------------------------------------------------------------------------


def patch_row(line: str, made_for: str, **answers: str) -> dict[str, Any]:
    verdict_list = [
        {"release": name.replace("_", ".").strip("r"), "answer": answer, "detail": ""}
        for name, answer in answers.items()
    ]
    return {"line": line, "patch": "0001-x.patch", "made for": made_for, "verdicts": verdict_list}


def test_best_is_what_fits_best_and_of_equals_the_newest() -> None:
    change = {
        "patches": [
            patch_row("1", "1.0", r1_0="applies", r2_0="moved", r3_0="offset"),
            patch_row("2", "2.0", r1_0="conflict", r2_0="applies", r3_0="offset"),
        ]
    }
    lines = [best(change, release)["line"] for release in ("1.0", "2.0", "3.0")]
    assert lines == ["1", "2", "2"]


def test_first_change_is_after_the_release_it_was_made_for() -> None:
    row = patch_row("1", "1.10", r1_9="moved", r1_10="applies", r1_11="applies", r1_12="gone")
    changed = first_change(row)
    assert changed is not None
    assert (changed["release"], changed["answer"]) == ("1.12", "gone")
    assert first_change(patch_row("1", "1.0", r1_0="applies", r1_1="applies")) is None


def test_data_and_page_agree_with_what_was_found(root: Path, tmp_path: Path) -> None:
    count = sum(len(read_series(root / line.series)) for line in MATRIX.line.values())
    rows = tuple(Verdict(answer=Answer.OFFSET, detail=f"+{n} lines") for n in range(count))
    archive = Download(url="", sha256="", size=0, target=tmp_path)
    release = Release(version="0.26.0", date="2026-07-25", archive=archive)
    found = [Survey(release=release, tree="0" * 40, verdicts=rows)]
    for line in MATRIX.line.values():
        (tmp_path / line.series).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(root / line.series, tmp_path / line.series)
    shutil.copy(root / "matrix.toml", tmp_path)
    data = write_drift(Project(tmp_path), found, "2026-11-24")
    assert json.loads((tmp_path / DATA).read_text(encoding="utf-8")) == data
    details = [
        verdict["detail"]
        for change in data["changes"]
        for patch in change["patches"]
        for verdict in patch["verdicts"]
    ]
    assert sorted(details) == sorted(verdict.detail for verdict in rows)
    assert data["command"] == "nox -s forge -- patch drift --from 0.26.0 --to 0.26.0"


# --- what is committed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    data = json.loads((ROOT / DATA).read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def test_committed_data_is_of_these_patches(committed: dict[str, Any]) -> None:
    said = {
        (patch["line"], patch["patch"], change["bug"])
        for change in committed["changes"]
        for patch in change["patches"]
    }
    assert said == {
        (name, patch.name, patch.fields["Bug"])
        for name, line in MATRIX.line.items()
        for patch in read_series(ROOT / line.series)
    }


def test_committed_data_covers_the_lines_and_ten_releases(committed: dict[str, Any]) -> None:
    releases = [release["version"] for release in committed["releases"]]
    assert len(releases) >= 10
    assert {line.vllm for line in MATRIX.line.values()} <= set(releases)
    for change in committed["changes"]:
        for patch in change["patches"]:
            assert [verdict["release"] for verdict in patch["verdicts"]] == releases


def test_committed_patches_apply_to_the_release_they_were_made_for(
    committed: dict[str, Any],
) -> None:
    for change in committed["changes"]:
        for patch in change["patches"]:
            own = next(v for v in patch["verdicts"] if v["release"] == patch["made for"])
            assert (own["answer"], own["detail"]) == ("applies", ""), patch["patch"]


def test_committed_headers_and_verdicts_agree_on_what_is_upstream(
    committed: dict[str, Any],
) -> None:
    """No patch fits a release of which its header says that it has the change."""
    for change in committed["changes"]:
        for patch in change["patches"]:
            doubts = [v for v in patch["verdicts"] if "though its header says" in v["detail"]]
            assert doubts == [], patch["patch"]
            path = ROOT / MATRIX.line[patch["line"]].series / patch["patch"]
            landed = read_patch(path).fields["Applied-Upstream"].partition(",")[0]
            upstream = [v["release"] for v in patch["verdicts"] if v["answer"] == "upstream"]
            assert (landed == "no") == (upstream == []), patch["patch"]
            if upstream:
                assert upstream[0] == landed, patch["patch"]
