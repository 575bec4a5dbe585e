"""What came back from a run: each job's result is relied on only if its marker says all of it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from vllm_forge.dispatch.errors import JobsFaultError, JobsRedError, JobsUndecidedError
from vllm_forge.dispatch.jobs import JobSpec
from vllm_forge.errors import first_problem
from vllm_forge.host import atomic_path, parse_json, read_plain
from vllm_forge.matrix import FrozenModel
from vllm_forge.receipts.receipt import Sha256

GREEN, RED, UNDECIDED, REFUSED, FAULT, WAITING = (
    "green", "red", "undecided", "refused", "fault", "waiting"
)  # fmt: skip
# By the last digit of an exit code of this project.
MEANINGS = {0: REFUSED, 1: RED, 2: UNDECIDED, 3: FAULT}
CODES = range(10, 124)
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class Marker(FrozenModel):
    """``ATTEMPT.done``, which the node writes last (``node.seal``)."""

    job: str
    image: str
    attempt: str
    restarts: int
    node: str
    exit: int | None
    fault: str
    files: dict[FileName, Sha256]


class Outcome(FrozenModel):
    """The verdict on a job, and why."""

    name: str
    verdict: str
    why: str = ""


def judge(spec: JobSpec, attempt: str, results: Path, state: str | None, local: Path) -> Outcome:
    """The verdict on one attempt of a job; its files are copied to ``local``, if they match.

    ``results``: folder of the job on storage, which others can write to. ``state``: the scheduler's
    word, where the job has not ended.
    """
    names = _listing(results)
    if f"{attempt}.done" not in names:
        verdict, why = UNDECIDED, "no result: the job ended without one"
        if restarted := sorted(name for name in names if name.startswith(f"{attempt}-r")):
            verdict, why = REFUSED, f"it was requeued while it ran: {restarted[0]}"
        elif state is not None:
            verdict, why = WAITING, state
        elif attempt in names:
            why = "half a result: the job ended before it was complete"
        return Outcome(name=spec.name, verdict=verdict, why=why)
    try:
        marker = _read_marker(spec, attempt, results)
        _copy(marker.files, results / attempt, local)
        verdict, why = _verdict(spec, marker)
        if verdict == GREEN:
            _require_subject(spec, local / f"{spec.work}.json")
    except (OSError, ValueError) as error:
        verdict, why = (
            REFUSED,
            first_problem(error) if isinstance(error, ValueError) else str(error),
        )
    return Outcome(name=spec.name, verdict=verdict, why=why)


def _read_marker(spec: JobSpec, attempt: str, results: Path) -> Marker:
    marker = Marker.model_validate(parse_json(read_plain(results / f"{attempt}.done")))
    expected = {"job": spec.name, "image": spec.image, "attempt": attempt, "restarts": 0}
    for field, value in expected.items():
        if (actual := getattr(marker, field)) != value:
            raise ValueError(f"the marker is of {field} {actual}, expected {value}")
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


def _require_subject(spec: JobSpec, path: Path) -> None:
    """Raise ValueError unless the result of a tier is of the job's image and cell."""
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
    """Copy files that have these hashes, all or none; ValueError names one that has not."""
    with atomic_path(target) as aside:
        aside.mkdir()
        for name, digest in files.items():
            content = read_plain(source / name)
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} was changed after the job ended")
            (aside / name).write_bytes(content)


def require_green(run: str, rows: Sequence[Outcome]) -> None:
    """Raise the error of the worst verdict: red before those without one, faults last."""
    again = "see the job's log in the run's folder of storage, and dispatch again"
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
