"""What came back from a run: each job's result is relied on only if its marker says all of it."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vllm_forge.bench.errors import InvalidResultError, ResultFileError
from vllm_forge.bench.quality import LARGEST_ANSWERS, read_answers
from vllm_forge.bench.results import read_arm
from vllm_forge.bench.validity import require_valid
from vllm_forge.dispatch.errors import JobsFaultError, JobsRedError, JobsUndecidedError
from vllm_forge.dispatch.jobs import JobSpec
from vllm_forge.errors import first_problem
from vllm_forge.host import atomic_path, exclusive, parse_json, read_plain
from vllm_forge.host.files import file_digest, walk_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.matrix.model import Integer
from vllm_forge.receipts.receipt import Sha256

GREEN, RED, UNDECIDED, REFUSED, FAULT, WAITING = (
    "green", "red", "undecided", "refused", "fault", "waiting"
)  # fmt: skip
# By the last digit of an exit code of this project.
MEANINGS = {0: REFUSED, 1: RED, 2: UNDECIDED, 3: FAULT}
CODES = range(10, 124)
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)?$")]
Short = Annotated[str, Field(max_length=300)]
LARGEST_MARKER = 1 << 20


class Marker(FrozenModel):
    """``ATTEMPT.done``, which the node writes last (``node.seal``)."""

    job: Short
    image: Short
    attempt: Short
    restarts: Integer
    node: Short
    exit: Annotated[int, Field(strict=True, ge=-255, le=255)] | None
    fault: str = Field(max_length=5000)
    files: dict[FileName, Sha256]


class State(FrozenModel):
    """What a scheduler says of a job. ``succeeded``: None where only its marker can say so."""

    text: str
    ended: bool
    succeeded: bool | None = None


class Outcome(FrozenModel):
    """The verdict on a job, and why."""

    name: str
    verdict: str
    why: str = ""


def judge(spec: JobSpec, attempt: str, results: Path, state: State, local: Path) -> Outcome:
    """The verdict on one attempt of a job; its files are copied to ``local``, if they match.

    ``results``: folder of the job on storage, which others can write to.
    """
    try:
        names = _listing(results)
        if f"{attempt}.done" in names:
            marker = _read_marker(spec, attempt, results)
            _copy(marker.files, results / attempt, local)
            verdict, why = _verdict(spec, marker)
            if verdict == GREEN:
                require = _require_image if spec.session else _require_subject
                require(spec, local)
        else:
            verdict, why = _without_marker(names, attempt, state)
        if verdict == UNDECIDED:
            why = f"{why} ({state.text})"
    except ValueError as error:
        verdict, why = REFUSED, first_problem(error)
    except OSError as error:  # a full disk here, or storage that does not answer
        verdict, why = FAULT, f"this host cannot copy the result, collect again: {error}"
    return Outcome(name=spec.name, verdict=verdict, why=why)


def _without_marker(names: set[str], attempt: str, state: State) -> tuple[str, str]:
    if restarted := sorted(name for name in names if name.startswith(f"{attempt}-r")):
        return REFUSED, f"it was requeued while it ran: {restarted[0]}"
    if not state.ended:
        return WAITING, state.text
    if attempt in names:
        return UNDECIDED, "half a result: the job ended before it was complete"
    return UNDECIDED, "no result was written"


def _read_marker(spec: JobSpec, attempt: str, results: Path) -> Marker:
    content = read_plain(results / f"{attempt}.done", LARGEST_MARKER)
    marker = Marker.model_validate(parse_json(content))
    expected = {"job": spec.name, "image": spec.image, "attempt": attempt, "restarts": 0}
    for field, value in expected.items():
        if (actual := getattr(marker, field)) != value:
            raise ValueError(f"the marker is of {field} {actual}, expected {value}")
    if unknown := sorted(marker.files.keys() - set(spec.artifacts)):
        raise ValueError(f"the marker lists {unknown[0]}, which the job does not write")
    return marker


def _verdict(spec: JobSpec, marker: Marker) -> tuple[str, str]:
    if marker.fault or marker.exit is None:
        return FAULT, f"{marker.node}: {marker.fault or 'the job did not start'}"
    if marker.exit != 0:
        meaning = MEANINGS.get(marker.exit % 10) if marker.exit in CODES else None
        return meaning or UNDECIDED, f"{marker.node}: exit code {marker.exit}"
    if missing := [name for name in spec.artifacts if name not in marker.files]:
        return REFUSED, f"{marker.node}: exit code 0 without {', '.join(missing)}"
    return GREEN, marker.node


def _require_image(spec: JobSpec, local: Path) -> None:
    """Raise ValueError unless what a session brought is valid, and of the job's image."""
    for name in spec.artifacts:
        try:
            if name.endswith(".json"):
                arm = read_arm(local / name)
                require_valid(arm)
                image = arm.result.server.image
            elif name.endswith(".jsonl"):
                image = read_answers(local / name)[0].header.arm.server.image
            else:  # rows, which the record names by their hash
                continue
        except (ResultFileError, InvalidResultError) as error:
            raise ValueError(f"{name}: {error.what}") from None
        if image != spec.image:
            raise ValueError(f"{name} is of image {image}, not of the job's")


def _require_subject(spec: JobSpec, local: Path) -> None:
    """Raise ValueError unless the result of a tier is of the job's image and cell."""
    path = local / f"{spec.work}.json"
    try:
        result = parse_json(read_plain(path))
        plan = result["plan"]
        actual = [f"sha256:{plan['subject']['sha256']}", plan["sku"], plan["line"], result["tier"]]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{path.name} is not the result of a tier: {error!r}") from None
    if actual != [spec.image, spec.sku, spec.line, spec.work]:
        raise ValueError(f"{path.name} is of {' '.join(map(str, actual))}, not of the job")


def _listing(folder: Path) -> set[str]:
    """Names in a folder; reading it makes NFS clients see what others wrote."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def _copy(files: Mapping[str, str], source: Path, target: Path) -> None:
    """Copy files that have these hashes, all or none; ValueError names one that has not.

    Those that are here already stay: another command may read them.
    """
    with exclusive(f"dispatch-{target.parent.name}", wait=True):
        with suppress(OSError, ValueError):
            if {name: file_digest(target / name) for name in walk_plain(target)} == files:
                return
        with atomic_path(target) as aside:
            aside.mkdir()
            for name, digest in files.items():
                try:
                    content = read_plain(source / name, LARGEST_ANSWERS)
                except FileNotFoundError:
                    what = f"missing {name}, which the marker lists; storage may show it later"
                    raise ValueError(f"{what}: collect again") from None
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ValueError(f"{name} was changed after the job ended")
                (aside / name).parent.mkdir(exist_ok=True)
                (aside / name).write_bytes(content)


def require_green(run: str, rows: Sequence[Outcome]) -> None:
    """Raise the error of the worst verdict: red before those without one, faults last."""
    again = "do what its row says; else see its log in the run's folder, and dispatch again"
    for kind, verdicts, remedy in (
        (JobsRedError, {RED}, "see the results in dist/dispatch, and fix what is red"),
        (JobsUndecidedError, {WAITING}, f"collect again: dispatch collect {run}"),
        (JobsUndecidedError, {UNDECIDED, REFUSED}, f"{again} what has no verdict"),
        (JobsFaultError, {FAULT}, f"{again} when the node is repaired"),
    ):
        if names := [row.name for row in rows if row.verdict in verdicts]:
            words = " or ".join(sorted(verdicts))
            what = f"{len(names)} of {len(rows)} jobs are {words}: {', '.join(names)}"
            raise kind(what, where=f"run {run}", remedy=remedy)
