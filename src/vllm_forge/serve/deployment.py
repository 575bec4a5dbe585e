"""A preset with an artifact on a cell: found by their names, and what a host needs to serve it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from vllm_forge.host import suggestion
from vllm_forge.host.files import GIB
from vllm_forge.kernels.selection.questions import Answer, grid_question, preset_question
from vllm_forge.kernels.selection.record import Rows, read_selection, selection_path
from vllm_forge.matrix import Artifact, ImageCell, Matrix, Preset, flags, serve_arguments
from vllm_forge.matrix.errors import UnsupportedCellError
from vllm_forge.matrix.flags import Drafter, Parallel
from vllm_forge.project import Project
from vllm_forge.serve.errors import UnknownArtifactError, UnknownPresetError
from vllm_forge.serve.memory import Memory, memory_of, stored_sizes
from vllm_forge.sources import Lock
from vllm_forge.sources.lock import UNPACK_RATIO

KEY = "VLLM_API_KEY"  # 0.22.1, 0.26.0 and 0.33.0, vllm/envs.py


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A point of the matrix to serve: an image's cell, a preset and an artifact."""

    matrix: Matrix
    cell: ImageCell
    preset_name: str
    preset: Preset
    artifact_name: str
    artifact: Artifact
    flags: tuple[str, ...] = ()  # of vLLM, after those of the preset
    env: tuple[str, ...] = ()  # NAME=VALUE, or NAME for the value of the caller
    model: Path | None = None  # folder with the artifact; None: vLLM downloads it

    @property
    def arguments(self) -> list[str]:
        """Of ``vllm serve``, after the model."""
        preset, _ = serve_arguments(self.matrix, self.preset_name, self.cell.line_name)
        return [*preset, *self.flags]

    @property
    def own_environment(self) -> dict[str, str]:
        """The variables of vLLM among those that the user sets; "" for a value of the caller."""
        pairs = (text.partition("=")[::2] for text in self.env)
        return {name: value for name, value in pairs if name.startswith("VLLM_") and name != KEY}

    @property
    def inherited(self) -> set[str]:
        """The names among the user's variables that have the value of the caller, if any."""
        return {text for text in self.env if "=" not in text}

    @property
    def environment(self) -> dict[str, str]:
        """What vLLM's choices may depend on."""
        return {**serve_arguments(self.matrix, self.preset_name)[1], **self.own_environment}

    @property
    def spread(self) -> Parallel:
        """How it is spread over GPUs; MultiNodeError if one host is not enough."""
        return flags.parallel(self.arguments)

    def recorded(self, rows: Rows) -> Answer | None:
        """The recorded answer; None if the preset was not asked as it is now, without own flags.

        Lint checks whether the record belongs to the current series and lock.
        """
        name = preset_question(self.preset_name, self.artifact_name)
        environment = {**self.cell.sku.env, **self.environment}
        asked = (name, tuple(self.arguments), environment)
        return next((a for q, a in rows if (q.name, q.arguments, q.environment) == asked), None)

    def nearest_answer(self, rows: Rows) -> Answer | None:
        """The recorded answer, or one with other flags and the same KV cache, on the same SKU."""

        def cache(words: Sequence[str]) -> list[str | None]:
            return [flags.values(words).get(name) for name in flags.KV_CACHE]

        if (answer := self.recorded(rows)) is not None:
            return answer
        wanted = cache(self.arguments)
        near = {q.name: answer for q, answer in rows if cache(q.arguments) == wanted}
        other = near.get(grid_question(self.cell.sku_name, self.artifact_name))
        return near.get(preset_question(self.preset_name, self.artifact_name), other)

    def memory(self, rows: Rows, answer: Answer | None = None) -> Memory | None:
        """Memory of one of its GPUs, by vLLM's answer or the nearest recorded one.

        None if nothing says how large the artifact is.
        """
        return memory_of(
            artifact=self.artifact_name, words=self.arguments, release=self.cell.line.vllm,
            total=self.matrix.memory_of(self.cell.sku_name),
            answer=answer or self.nearest_answer(rows),
        )  # fmt: skip

    @property
    def drafter(self) -> Drafter | None:
        """What the arguments switch on, a user's last."""
        return flags.drafter(self.arguments)

    @property
    def other_drafter(self) -> str:
        """Why the artifact does not draft as the arguments say; "" if it does."""
        asked = self.drafter
        return "" if asked is None else self.artifact.why_not_drafted(asked.method, asked.tokens)

    def why_not(self, line: str) -> str | None:
        """Why a line does not serve this; None if it does."""
        drafting = self.drafter is not None
        return self.artifact.why_not(line, self.cell.sku_name, drafting=drafting)

    def require_served(self) -> None:
        """Raise UnsupportedCellError if the cell's line does not serve this."""
        if (reason := self.why_not(self.cell.line_name)) is not None:
            what = f"line {self.cell.line_name} does not serve {self.artifact_name} with preset "
            what, row = f"{what}{self.preset_name}: {reason}", f"artifact.{self.artifact_name}"
            remedy = "choose another --line, --artifact or --preset"
            raise UnsupportedCellError(what, where=f"matrix.toml, {row}.unserved", remedy=remedy)
        if self.other_drafter:
            what = f"{self.artifact_name} {self.other_drafter}"
            remedy = f"correct {flags.SPECULATION}, or choose another --artifact"
            raise UnsupportedCellError(what, where=" ".join(self.arguments), remedy=remedy)


def presets_of(matrix: Matrix, sku: str) -> dict[str, str]:
    """Short name -> name of each preset of a SKU, in the matrix's order."""
    return {
        name.removeprefix(f"{sku}-"): name
        for name, preset in matrix.preset.items()
        if preset.sku == sku
    }


def find_preset(matrix: Matrix, sku: str, name: str) -> str:
    """The name of a SKU's preset, given by its name or its short name."""
    known = presets_of(matrix, sku)
    if name in known:
        return known[name]
    if name in known.values():
        return name
    what = f"unknown preset {name!r} of {sku}{suggestion(name, known)}"
    raise UnknownPresetError(what, remedy=f"presets of {sku}: {', '.join(known) or 'none'}")


def find_deployment(
    matrix: Matrix, cell: ImageCell, preset: str, artifact: str | None = None
) -> Deployment:
    """The rows of a cell, a preset's name and an artifact's name (default: its first)."""
    preset_name = find_preset(matrix, cell.sku_name, preset)
    served = matrix.preset[preset_name].artifacts
    name = served[0] if artifact is None else artifact
    if name not in served:
        what = f"unknown artifact {name!r}{suggestion(name, served, listed=False)}"
        if name in matrix.artifact:
            others = [key for key, row in matrix.preset.items() if name in row.artifacts]
            what = f"preset {preset_name} does not serve artifact {name}. Those that do: "
            what += ", ".join(others) or "none"
        raise UnknownArtifactError(what, remedy=f"{preset_name} serves: {', '.join(served)}")
    preset_row, row = matrix.preset[preset_name], matrix.artifact[name]
    return Deployment(
        matrix=matrix, cell=cell, preset_name=preset_name, preset=preset_row, artifact_name=name,
        artifact=row,
    )  # fmt: skip


def recorded_rows(project: Project, line_name: str) -> Rows:
    """The recorded answers of a line; none where there is no record."""
    if not selection_path(project.records, line_name).is_file():
        return ()
    return read_selection(project.records, line_name).rows


@dataclass(frozen=True, kw_only=True)
class Needs:
    """A host's requirements. Sizes in bytes; None if nothing says how large the artifact is."""

    gpus: int
    image_bytes: int  # in the engine's store, packed and unpacked
    weights_bytes: int | None = None  # the checkpoint's files
    disk_bytes: int | None = None
    memory: Memory | None = None  # of a GPU of the SKU
    ram_bytes: int | None = None  # one shard file, which the workers map while they read it
    page_cache_bytes: int | None = None  # for all files: the disk is read once, not once per worker
    shm_bytes: int  # /dev/shm of the container
    driver: str  # oldest one of the line's CUDA

    def as_json(self) -> dict[str, int | str]:
        """The fields, those of the memory among them, "unknown" for None."""
        memory = self.memory
        rows: dict[str, int | str | None] = {
            row.name: getattr(self, row.name) for row in fields(self) if row.name != "memory"
        }
        for name in ("total", "requested", "weights", "kv_cache"):
            rows[f"{name}_per_gpu_bytes"] = getattr(memory, name, None)
        rows["longest_context"] = None if memory is None else memory.longest
        rows["memory"] = None if memory is None else memory.text
        return {name: "unknown" if value is None else value for name, value in rows.items()}


def needs_of(lock: Lock, deployment: Deployment, rows: Rows = ()) -> Needs:
    """The requirements of a deployment, from matrix, lock, manifest and recorded answers."""
    matrix, cell, artifact = deployment.matrix, deployment.cell, deployment.artifact
    packed = sum(wheel.size for wheel in lock.wheels) + matrix.base.budget_mb * 10**6
    image = int(packed * (1 + UNPACK_RATIO))
    stored = stored_sizes(deployment.artifact_name)
    weights = None if artifact.size_gb is None else artifact.size_gb * 10**9
    if stored is not None:
        weights = sum(stored.values())
    return Needs(
        gpus=deployment.spread.gpus,
        image_bytes=image,
        weights_bytes=weights,
        disk_bytes=None if weights is None else image + weights,
        memory=deployment.memory(rows),
        ram_bytes=weights // artifact.shards if weights and artifact.shards else None,
        page_cache_bytes=weights,
        shm_bytes=matrix.container.shm_gb * GIB,
        driver=matrix.cuda[cell.line.cuda].driver,
    )
