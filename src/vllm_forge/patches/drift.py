"""What vLLM's releases do to the patches: they fit, moved, are upstream, conflict, or are gone."""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cache
from itertools import chain, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import InvalidVersion, Version
from rich.progress import track
from unidiff.patch import PatchSet

from vllm_forge.errors import UsageError
from vllm_forge.host import cache_root, console, exclusive, report, worker_pool, write_json
from vllm_forge.patches.apply import ABSENT, FAILED, MOVED, Patch, tree_index
from vllm_forge.patches.series import check_line, read_series
from vllm_forge.patches.wheel import python_blobs
from vllm_forge.project import Project
from vllm_forge.sources import Download, Index, SourceRepo, download_all, verified
from vllm_forge.sources.errors import DistributionNotFoundError
from vllm_forge.sources.index import pins

DATA = Path("records/drift.json")
NUMBER = re.compile(r"^\d+-")
# "0.27.1, vllm/models/deepseek_v4/nvidia/ops/o_proj.py:63"
LANDED = re.compile(r"^(?P<version>\d+(?:\.\d+)+), (?P<where>\S+)$")
WORD = re.compile(rb"[A-Za-z_]\w{4,}")
AROUND = 12  # lines before and after a hunk, beyond its own context
WINDOW = 60  # lines; code that was moved may have been spread a little
FOUND = 0.4  # of the weight of a hunk's words; below that it is other code
REMOVED_COUNTS = 3  # a word of a removed line says more than one of the lines around it
NEAR = 0.1  # of the weight, that a shared folder counts for
EPSILON = 1e-9
COMMON = 0.05  # of the files; a word in more of them says nothing


class Answer(StrEnum):
    """In the order of how much is to be done, least first."""

    APPLIES = "applies"
    OFFSET = "offset"
    UPSTREAM = "upstream"
    CONFLICT = "conflict"
    MOVED = "moved"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """An answer, and what is to be known with it: lines, a place, who made the change."""

    answer: Answer
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A final release, the day of its upload, and its source archive in the cache."""

    version: str
    date: str
    archive: Download


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A release, its tree, and its verdicts in the order of all patches."""

    release: Release
    tree: str
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A line of a tree, and how much of what was looked for is around it (0 to 1)."""

    path: str
    line: int
    share: float


@dataclass
class Words:
    """Where the wanted words stand in the Python files below ``vllm/`` of a tree."""

    files: int
    lines: dict[str, dict[bytes, list[int]]] = field(default_factory=dict)

    def weight(self, word: bytes) -> float:
        """Weight of a word: none when many files have it."""
        files = sum(word in lines for lines in self.lines.values())
        common = files > max(2, COMMON * self.files)
        return 0.0 if common else math.log((self.files + 1) / max(files, 1))


# A line's series: each patch, and the tree that it was made for.
Subject: TypeAlias = Sequence[tuple[Patch, str]]
# The words of each hunk, and how often each counts, by file and line.
Hunks: TypeAlias = dict[tuple[str, int], dict[bytes, int]]


def releases_between(index: Index, first: str, last: str | None) -> list[Release]:
    """Final releases that were not yanked, oldest first, both ends included; None: the newest."""
    try:
        low = Version(first)
        high = None if last is None else Version(last)
    except InvalidVersion as error:
        what = f"not a version: {error}"
        raise UsageError(what, remedy="e.g. --from 0.22.1 --to 0.33.0") from None
    if high is not None and low > high:
        raise UsageError(f"{first} is newer than {last}", remedy="--from OLDER --to NEWER")
    releases: dict[Version, Release] = {}
    for file in index.files("vllm"):
        try:
            _, version = parse_sdist_filename(file.filename)
        except InvalidSdistFilename:
            continue
        if file.is_yanked or version.is_prerelease or version < low or (high and version > high):
            continue
        sha256, size = pins(file)
        target = cache_root() / "sdists" / sha256 / file.filename
        archive = Download(url=file.url, sha256=sha256, size=size, target=target)
        date = str(file.upload_time.date()) if file.upload_time else "unknown"
        releases[version] = Release(version=str(version), date=date, archive=archive)
    for end in (low, high):
        if end is not None and end not in releases:
            what = f"the index offers no source archive of a final release {end}"
            remedy = "choose a release that is there and was not yanked"
            raise DistributionNotFoundError(what, where=index.url, remedy=remedy)
    return [releases[version] for version in sorted(releases)]


def fetch_releases(index: Index, releases: Sequence[Release], repo: SourceRepo) -> None:
    """Download the archives that are neither imported nor in the cache, side by side."""
    absent = [release.archive for release in releases if repo.tree(release.version) is None]
    with exclusive("sdists", wait=True):  # a build may fetch one of them, too
        download_all(index.session, absent)


def survey_lines(
    project: Project, repo: SourceRepo, *, first: str, last: str | None
) -> list[Survey]:
    """Survey all patches of all lines in the releases of ``releases_between``."""
    subjects = []
    for name, line in project.matrix.line.items():
        applied = check_line(project, name, repo)
        trees = (applied.base, *applied.trees)
        subjects.append(list(zip(read_series(project.root / line.series), trees, strict=False)))
    releases = releases_between(project.index, first, last)
    with report(f"source archives of {len(releases)} releases"):
        fetch_releases(project.index, releases, repo)
    steps, quiet = survey(repo, releases, subjects), not console.is_terminal
    return list(track(steps, "releases", len(releases), console=console, disable=quiet))


def write_drift(project: Project, surveys: Sequence[Survey], day: str) -> dict[str, Any]:
    """Write and return the data of records/drift.json; ``day`` is today, YYYY-MM-DD."""
    # By what they are about: the same Bug in several lines is one change.
    changes: dict[str, dict[str, Any]] = {}
    every = [
        (name, line.vllm, patch)
        for name, line in project.matrix.line.items()
        for patch in read_series(project.root / line.series)
    ]
    for number, (line_name, release, patch) in enumerate(every):
        verdicts = [
            {"release": item.release.version, **asdict(item.verdicts[number])} for item in surveys
        ]
        change = {
            "name": NUMBER.sub("", patch.name).removesuffix(".patch"),
            "bug": patch.fields["Bug"],
            "summary": patch.summary,
            "patches": [],
        }
        changes.setdefault(patch.fields["Bug"], change)["patches"].append(
            {"line": line_name, "patch": patch.name, "made for": release, "verdicts": verdicts}
        )
    first, last = surveys[0].release.version, surveys[-1].release.version
    data = {
        "made": day,
        "command": f"nox -s forge -- patch drift --from {first} --to {last}",
        "releases": [
            {"version": item.release.version, "date": item.release.date, "tree": item.tree}
            for item in surveys
        ],
        "changes": list(changes.values()),
    }
    write_json(project.root / DATA, data)
    return data


def survey(
    repo: SourceRepo, releases: Sequence[Release], subjects: Sequence[Subject]
) -> Iterator[Survey]:
    """Survey several releases side by side, in their order."""
    words = vocabulary(repo, subjects)
    with worker_pool() as pool:
        jobs = [pool.submit(_look_at, repo.path, release, subjects, words) for release in releases]
        for job in jobs:
            yield job.result()


def vocabulary(repo: SourceRepo, subjects: Sequence[Subject]) -> frozenset[bytes]:
    """All words that may have to be looked for, so that a tree is read once for all of them."""
    return frozenset(
        word
        for subject in subjects
        for patch, before in subject
        for words in _hunks(repo, patch, before).values()
        for word in words
    )


def _look_at(
    repo_path: Path, release: Release, subjects: Sequence[Subject], known: frozenset[bytes]
) -> Survey:
    """Worker process: import the archive if need be, then look at each series."""
    repo = SourceRepo(repo_path)
    tree = repo.tree(release.version) or repo.import_archive(
        release.version, verified(release.archive.target, release.archive.sha256)
    )
    rows = (verdicts(repo, tree, release.version, subject, known) for subject in subjects)
    return Survey(release=release, tree=tree, verdicts=tuple(chain.from_iterable(rows)))


def verdicts(
    repo: SourceRepo, tree: str, version: str, subject: Subject, known: frozenset[bytes]
) -> list[Verdict]:
    """What one release's tree says of each patch; those that apply are applied for the next."""
    rows: list[Verdict | str] = []
    with tree_index(repo, tree) as index:
        for patch, _ in subject:
            applied, stderr = index.apply(patch)
            landed = _landed(patch, version)
            if applied:
                rows.append(_applies(stderr, landed))
            elif index.reverses(patch):
                rows.append(Verdict(answer=Answer.UPSTREAM, detail="the same change"))
            else:
                rows.append(Verdict(answer=Answer.UPSTREAM, detail=landed) if landed else stderr)
        present = set(index.git("ls-files").splitlines())

    def follow(patch: Patch, before: str, stderr: str) -> Verdict:
        words, earlier = (read_words(repo.path, each, known) for each in (tree, subject[0][1]))
        return _follow(_hunks(repo, patch, before), stderr, words, earlier, present)

    return [
        row if isinstance(row, Verdict) else follow(*pair, row)
        for row, pair in zip(rows, subject, strict=True)
    ]


def _applies(stderr: str, landed: str) -> Verdict:
    offsets = sorted({int(moved[3]) for moved in MOVED.finditer(stderr)})
    # Landed: then the header is wrong, or the change went upstream in another place.
    notes = [f"though its header says: {landed}"] if landed else []
    if not offsets:
        return Verdict(answer=Answer.APPLIES, detail="".join(notes))
    span = " to ".join(f"{offset:+d}" for offset in sorted({offsets[0], offsets[-1]}))
    return Verdict(answer=Answer.OFFSET, detail=", ".join([f"{span} lines", *notes]))


def _landed(patch: Patch, version: str) -> str:
    landed = LANDED.match(patch.fields["Applied-Upstream"])
    if landed is None or Version(version) < Version(landed["version"]):
        return ""
    return f"since {landed['version']}, {landed['where']}"


def _follow(hunks: Hunks, stderr: str, words: Words, earlier: Words, present: set[str]) -> Verdict:
    """Where the code is now of the hunk of each file that failed first; the worst file counts."""
    failed = {}
    for match in [*FAILED.finditer(stderr), *ABSENT.finditer(stderr)]:
        named = (match["file"], int(match.groupdict().get("line") or 0))
        first = next(place for place in hunks if place[0] == named[0])
        failed[named[0]] = hunks[named if named in hunks else first]
    parts: list[tuple[Answer, str]] = []
    for path, wanted in sorted(failed.items()):
        copies = {place.path for place in dense(earlier, wanted)}
        place = locate(words, wanted, path, copies)
        if place is None:
            what = "has no such code" if path in present else "is not there, nor its code elsewhere"
            parts.append((Answer.GONE, f"{path} {what}"))
        else:
            answer = Answer.CONFLICT if place.path == path else Answer.MOVED
            parts.append((answer, f"{place.path}:{place.line}"))
    worst = max((answer for answer, _ in parts), key=list(Answer).index)
    return Verdict(answer=worst, detail="; ".join(text for _, text in parts))


def _hunks(repo: SourceRepo, patch: Patch, before: str) -> Hunks:
    """Those of a file that remove something come first."""
    found = {}
    for file in PatchSet(patch.diff):
        source = repo.git("cat-file", "blob", f"{before}:{file.path}").stdout.splitlines()
        for hunk in sorted(file, key=lambda hunk: not hunk.removed):
            first = max(0, hunk.source_start - 1 - AROUND)
            last = hunk.source_start - 1 + hunk.source_length + AROUND
            words = dict.fromkeys(WORD.findall(b"\n".join(source[first:last])), 1)
            removed = "".join(line.value for line in hunk if line.is_removed)
            words |= dict.fromkeys(WORD.findall(removed.encode()), REMOVED_COUNTS)
            found[file.path, hunk.source_start] = words
    return found


@cache
def read_words(repo_path: Path, tree: str, wanted: frozenset[bytes]) -> Words:
    """Find words in all Python files of the package, in one pass."""
    repo = SourceRepo(repo_path)
    blobs = python_blobs(repo, tree)
    names = "\n".join(blobs.values()).encode()
    stream = repo.git("cat-file", "--batch", stdin=names).stdout
    found = Words(files=len(blobs))
    at = 0
    for path in blobs:
        end = stream.index(b"\n", at)
        size = int(stream[at:end].split()[2])
        content = stream[end + 1 : end + 1 + size]
        at = end + 1 + size + 1
        if here := wanted.intersection(WORD.findall(content)):
            lines = found.lines[path] = {word: [] for word in here}
            for number, line in enumerate(content.splitlines(), 1):
                for word in here.intersection(WORD.findall(line)):
                    lines[word].append(number)
    return found


def locate(
    words: Words, wanted: dict[bytes, int], path: str, copies: Collection[str] = ()
) -> Place | None:
    """Where most words of a hunk for ``path`` are close together; None where too few are.

    That file comes first, then those nearest to it in the tree: code that moves seldom moves
    far. ``copies``: files that had much the same code before, to which nothing has moved.
    """
    places = (each for each in dense(words, wanted) if each.path not in {*copies} - {path})
    return max(places, key=lambda place: (place.path == path, _rank(place, path)), default=None)


def dense(words: Words, wanted: dict[bytes, int]) -> list[Place]:
    """In each file the stretch with most of the wanted words, where that is enough of them."""
    weights = {word: times * words.weight(word) for word, times in wanted.items()}
    weights = {word: weight for word, weight in weights.items() if weight > 0}
    found = (_densest(name, lines, weights) for name, lines in words.lines.items())
    return [place for place in found if place is not None and place.share >= FOUND]


def _densest(path: str, lines: dict[bytes, list[int]], weights: dict[bytes, float]) -> Place | None:
    """The stretch of a file with the most of the words' weight."""
    total = sum(weights.values())
    here = sorted((number, word) for word in weights for number in lines.get(word, ()))
    best: Place | None = None
    if sum(weights[word] for word in {word for _, word in here}) < FOUND * total:
        return None
    for start, (first, _) in enumerate(here):
        inside = [(number, word) for number, word in here[start:] if number < first + WINDOW]
        share = sum(weights[word] for word in {word for _, word in inside}) / total
        if best is None or share > best.share + EPSILON:
            line = max(inside, key=lambda item: (weights[item[1]], -item[0]))[0]
            best = Place(path=path, line=line, share=share)
    return best


def _rank(place: Place, path: str) -> float:
    """Share, and a bonus for each folder that the two paths have in common."""
    ours, theirs = PurePosixPath(path).parts[:-1], PurePosixPath(place.path).parts[:-1]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
    return place.share + NEAR * len(list(same))
