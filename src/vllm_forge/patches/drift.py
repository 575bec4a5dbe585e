"""What vLLM's releases do to the patches: they fit, moved, are upstream, conflict, or are gone."""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import chain, takewhile
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.utils import InvalidSdistFilename, parse_sdist_filename
from packaging.version import InvalidVersion, Version
from rich.progress import track
from unidiff.patch import Hunk, PatchSet

from vllm_forge.errors import UsageError
from vllm_forge.host import cache_root, console, report, worker_pool, write_json
from vllm_forge.patches.apply import ABSENT, FAILED, MOVED, TreeIndex
from vllm_forge.patches.header import Patch, read_patch
from vllm_forge.patches.series import check_line, read_series
from vllm_forge.patches.variants import before
from vllm_forge.patches.wheel import python_blobs
from vllm_forge.project import Project
from vllm_forge.sources import Download, Index, IndexFile, SourceRepo, download_all, verified
from vllm_forge.sources.errors import DistributionNotFoundError

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
    """A final release: version, day of its upload, hash and path of its source archive."""

    version: str
    date: str
    sha256: str
    archive: Path


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A line's series: the patches, and the tree that each of them was made for."""

    paths: tuple[Path, ...]
    befores: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Surveyed:
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

    files: int = 0
    lines: dict[str, dict[bytes, list[int]]] = field(default_factory=dict)
    count: dict[bytes, int] = field(default_factory=lambda: defaultdict(int))

    def weight(self, word: bytes) -> float:
        """Weight of a word: none when many files have it."""
        files = self.count.get(word, 0)
        if self.files == 0 or files > max(2, COMMON * self.files):
            return 0.0
        return math.log((self.files + 1) / max(files, 1))


def releases_between(index: Index, first: str, last: str | None) -> list[tuple[Release, IndexFile]]:
    """Final releases on the index that were not yanked, oldest first, both ends included.

    ``last`` is None for the newest on the index. DistributionNotFoundError if one of the two has no
    source archive there.
    """
    try:
        low = Version(first)
        high = None if last is None else Version(last)
    except InvalidVersion as error:
        raise UsageError(
            f"not a version: {error}", remedy="e.g. --from 0.22.1 --to 0.33.0"
        ) from None
    if high is not None and low > high:
        raise UsageError(f"{first} is newer than {last}", remedy="--from OLDER --to NEWER")
    found: dict[Version, tuple[Release, IndexFile]] = {}
    for file in index.files("vllm"):
        try:
            _, version = parse_sdist_filename(file.filename)
        except InvalidSdistFilename:
            continue
        if file.yanked or version.is_prerelease or version < low or (high and version > high):
            continue
        if file.sha256 is None or file.size is None:
            raise DistributionNotFoundError(
                f"the index gives no sha256 or no size for {file.filename}",
                where=index.url,
                remedy="use an index with the JSON simple API (PEP 691, PEP 700)",
            )
        release = Release(
            version=str(version),
            date=file.uploaded or "unknown",
            sha256=file.sha256,
            archive=cache_root() / "sdists" / file.sha256 / file.filename,
        )
        found[version] = (release, file)
    for end in (low, high):
        if end is not None and end not in found:
            raise DistributionNotFoundError(
                f"the index offers no source archive of a final release {end}",
                where=index.url,
                remedy="choose a release that is there and was not yanked",
            )
    return [found[version] for version in sorted(found)]


def fetch_releases(index: Index, wanted: list[tuple[Release, IndexFile]], repo: SourceRepo) -> None:
    """Download the archives that are neither imported nor in the cache, side by side."""
    missing = [
        Download(url=file.url, sha256=release.sha256, size=file.size or 0, target=release.archive)
        for release, file in wanted
        if repo.tree(release.version) is None and not release.archive.exists()
    ]
    if missing:
        download_all(index.session, missing)


def survey_lines(
    project: Project, repo: SourceRepo, *, first: str, last: str | None
) -> list[Surveyed]:
    """Survey all patches of all lines in the releases of ``releases_between``."""
    subjects, index = [], project.index
    for name, line in project.matrix.line.items():
        applied = check_line(project, name, repo)
        paths = tuple(patch.path for patch in read_series(project.root / line.series))
        befores = tuple(before(applied, number) for number in range(len(paths)))
        subjects.append(Subject(paths=paths, befores=befores))
    wanted = releases_between(index, first, last)
    with report(f"source archives of {len(wanted)} releases"):
        fetch_releases(index, wanted, repo)
    steps = survey(repo, [release for release, _ in wanted], subjects)
    quiet = not console.is_terminal
    return [
        Surveyed(release=release, tree=tree, verdicts=tuple(chain.from_iterable(verdicts)))
        for release, tree, verdicts in track(
            steps, "releases", total=len(wanted), console=console, disable=quiet
        )
    ]


def write_drift(project: Project, found: Sequence[Surveyed], day: str) -> dict[str, Any]:
    """Write and return the data of records/drift.json; ``day`` is today, YYYY-MM-DD."""
    first, last = found[0].release.version, found[-1].release.version
    data = {
        "made": day,
        "command": f"nox -s forge -- patch drift --from {first} --to {last}",
        "releases": [
            {"version": item.release.version, "date": item.release.date, "tree": item.tree}
            for item in found
        ],
        "changes": _changes(project, found),
    }
    write_json(project.root / DATA, data)
    return data


def _changes(project: Project, found: Sequence[Surveyed]) -> list[dict[str, Any]]:
    """Patches by what they are about: the same Bug in several lines is one change."""
    changes: dict[str, dict[str, Any]] = {}
    every = [
        (name, line.vllm, patch)
        for name, line in project.matrix.line.items()
        for patch in read_series(project.root / line.series)
    ]
    for number, (line_name, release, patch) in enumerate(every):
        verdicts = [
            {
                "release": item.release.version,
                "answer": item.verdicts[number].answer.value,
                "detail": item.verdicts[number].detail,
            }
            for item in found
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
    return list(changes.values())


def survey(
    repo: SourceRepo, releases: Sequence[Release], subjects: Sequence[Subject]
) -> Iterator[tuple[Release, str, list[list[Verdict]]]]:
    """Each release's tree hash and its verdicts on each series, several releases side by side."""
    words = vocabulary(repo, subjects)
    with worker_pool() as pool:
        jobs = [pool.submit(_look_at, repo.path, release, subjects, words) for release in releases]
        for release, job in zip(releases, jobs, strict=True):
            yield (release, *job.result())


def vocabulary(repo: SourceRepo, subjects: Sequence[Subject]) -> frozenset[bytes]:
    """All words that may have to be looked for, so that a tree is read once for all of them."""
    return frozenset(
        word
        for subject in subjects
        for path, before in zip(subject.paths, subject.befores, strict=True)
        for words in _hunks(repo, read_patch(path), before).values()
        for word in words
    )


def _look_at(
    repo_path: Path, release: Release, subjects: Sequence[Subject], known: frozenset[bytes]
) -> tuple[str, list[list[Verdict]]]:
    """Worker process: import the archive if need be, then look at each series."""
    repo = SourceRepo(repo_path)
    tree = repo.tree(release.version) or repo.import_archive(
        release.version, verified(release.archive, release.sha256)
    )
    return tree, [verdicts(repo, tree, release.version, subject, known) for subject in subjects]


def verdicts(
    repo: SourceRepo, tree: str, version: str, subject: Subject, known: frozenset[bytes]
) -> list[Verdict]:
    """What one release's tree says of each patch; those that apply are applied for the next."""
    found: dict[int, Verdict] = {}
    failed: dict[int, str] = {}
    patches = [read_patch(path) for path in subject.paths]
    with TreeIndex(repo, tree) as index:
        for number, patch in enumerate(patches):
            done = index.apply(patch)
            stderr = done.stderr.decode(errors="replace")
            if done.returncode == 0:
                found[number] = _applies(patch, version, stderr)
            elif index.reverses(patch):
                found[number] = Verdict(answer=Answer.UPSTREAM, detail="the same change")
            elif (landed := _landed(patch, version)) is not None:
                found[number] = Verdict(answer=Answer.UPSTREAM, detail=landed)
            else:
                failed[number] = stderr
        present = set(index.git("ls-files").splitlines())
    for number, said in failed.items():
        hunks = _hunks(repo, patches[number], subject.befores[number])
        words = _words(repo.path, tree, known)
        earlier = _words(repo.path, subject.befores[0], known)
        found[number] = _follow(_failed(hunks, said), words, earlier, present)
    return [found[number] for number in range(len(patches))]


def _applies(patch: Patch, version: str, said: str) -> Verdict:
    offsets = sorted({int(moved[3]) for moved in MOVED.finditer(said)})
    # Then the header is wrong, or the change went upstream in another place.
    doubt = _landed(patch, version)
    notes = [f"though its header says: {doubt}"] if doubt else []
    if not offsets:
        return Verdict(answer=Answer.APPLIES, detail="".join(notes))
    span = " to ".join(f"{offset:+d}" for offset in sorted({offsets[0], offsets[-1]}))
    return Verdict(answer=Answer.OFFSET, detail=", ".join([f"{span} lines", *notes]))


def _landed(patch: Patch, version: str) -> str | None:
    landed = LANDED.match(patch.fields["Applied-Upstream"])
    if landed is None or Version(version) < Version(landed["version"]):
        return None
    return f"since {landed['version']}, {landed['where']}"


def _follow(
    failed: dict[str, dict[bytes, int]], words: Words, earlier: Words, present: set[str]
) -> Verdict:
    """Where the failed hunks' code is now; the worst file of a patch gives the answer."""
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
    order = list(Answer)
    worst = max((answer for answer, _ in parts), key=order.index)
    return Verdict(answer=worst, detail="; ".join(text for _, text in parts))


def _hunks(repo: SourceRepo, patch: Patch, before: str) -> dict[tuple[str, int], dict[bytes, int]]:
    """The words of each hunk, by file and line; those that remove something come first."""
    found = {}
    for file in PatchSet(patch.diff):
        source = repo.git("cat-file", "blob", f"{before}:{file.path}").stdout.splitlines()
        for hunk in sorted(file, key=lambda hunk: not hunk.removed):
            found[file.path, hunk.source_start] = hunk_words(hunk, source)
    return found


def _failed(
    hunks: dict[tuple[str, int], dict[bytes, int]], said: str
) -> dict[str, dict[bytes, int]]:
    """For each file that git could not patch, the words of the hunk that failed first."""
    failed = {}
    for match in [*FAILED.finditer(said), *ABSENT.finditer(said)]:
        path = match["file"]
        named = (path, int(match.groupdict().get("line") or 0))
        first = next(place for place in hunks if place[0] == path)
        failed[path] = hunks[named if named in hunks else first]
    return failed


@cache
def _words(repo_path: Path, tree: str, wanted: frozenset[bytes]) -> Words:
    return read_words(SourceRepo(repo_path), tree, wanted)


def hunk_words(hunk: Hunk, source: Sequence[bytes]) -> dict[bytes, int]:
    """Words of the lines that a hunk replaces and of those around it, and how often each counts."""
    first = max(0, hunk.source_start - 1 - AROUND)
    last = hunk.source_start - 1 + hunk.source_length + AROUND
    words = dict.fromkeys(WORD.findall(b"\n".join(source[first:last])), 1)
    for line in hunk:
        if line.is_removed:
            words |= dict.fromkeys(WORD.findall(line.value.encode()), REMOVED_COUNTS)
    return words


def read_words(repo: SourceRepo, tree: str, wanted: frozenset[bytes]) -> Words:
    """Find words in all Python files of the package, in one pass."""
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
        here = wanted.intersection(WORD.findall(content))
        for word in here:
            found.count[word] += 1
        if here:
            lines = found.lines[path] = {word: [] for word in here}
            for number, line in enumerate(content.splitlines(), 1):
                for word in here.intersection(WORD.findall(line)):
                    lines[word].append(number)
    return found


def locate(
    words: Words, wanted: dict[bytes, int], path: str, copies: Collection[str] = ()
) -> Place | None:
    """Where most of a hunk's words are close together; None where too few are.

    The file they were in comes first, then those nearest to it in the tree: code that moves
    seldom moves far. To ``copies``, which had much the same code before, nothing has moved.
    """
    places = [
        place for place in dense(words, wanted) if place.path == path or place.path not in copies
    ]
    if not places:
        return None
    return max(places, key=lambda place: (place.path == path, _rank(place, path)))


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
