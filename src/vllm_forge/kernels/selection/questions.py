"""Questions to a line's vLLM and its answers: the keys of records/selection/<line>.json.

A question is a declared device, an artifact's config.json and the arguments of ``vllm serve``. The
answer is what that vLLM's own code selects for them, as far as it can be known without a GPU. A
question that vLLM refuses has an answer too: ``Answer.refused``.

Every preset is asked with each of its artifacts. A grid without presets has every SKU with every
artifact, also SKUs that the line does not serve, whose answers give the reason. It is asked again
with each retired variable set.
"""

import hashlib
import json
import re
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vllm_forge.host import hash_of, parse_json, read_data, remove
from vllm_forge.kernels.errors import ArtifactConfigError, SelectionFailedError
from vllm_forge.matrix import Artifact, FrozenModel, Matrix, Sku, serve_arguments

# ffn.experts up to 0.22.1, ffn.experts.routed_experts later.
EXPERTS = re.compile(r"\.ffn\.experts(\.routed_experts)?$")
# A node of eight GPUs: doctor checks whether a host has as many as a preset needs.
GPUS = 8
# Fits every SKU and divides every artifact: the grid is about kernels, not about memory.
GRID_ARGUMENTS = ("--tensor-parallel-size=4", "--kv-cache-dtype=fp8")
PROBE_ARGUMENTS = (*GRID_ARGUMENTS, "--max-num-seqs=128")
DRAFTER = '--speculative-config={{"method":"{0}","num_speculative_tokens":{1}}}'
ARTIFACTS = Path(__file__).with_name("artifacts")
INSIDE = Path(__file__).with_name("inside")
PROBES = Path(__file__).with_name("probes.toml")
# The stub driver, also used by an image's checks; it imports only the standard library.
DRIVER = INSIDE / "driver.py"
QUESTIONS = "questions.json"
# The package is mounted at /mnt/inside; the image's own Python runs it.
ARGV = (
    "/opt/venv/bin/python",
    "-c",
    "import sys; sys.path.insert(0, '/mnt'); from inside.main import main; main()",
)
TAIL = 2000
# A tokenizer with only the tokens that DeepSeek's parsers look up: some flags make vLLM open one,
# none selects by it.
TOKENIZER = Path(__file__).with_name("tokenizer")


class Device(FrozenModel):
    """A SKU's GPUs, as the stub driver declares them."""

    name: str
    compute_capability: str  # e.g. 10.3
    memory_bytes: int  # per GPU
    count: int = Field(ge=1)  # GPUs that the process sees


class Question(FrozenModel):
    name: str  # preset/<preset>/<artifact>, or grid/<sku>/<artifact>[/<variable>]
    device: Device
    artifact: str  # name of a file in kernels/selection/artifacts
    arguments: tuple[str, ...] = ()  # of `vllm serve`, without the model; as serve/ writes them
    environment: dict[str, str] = Field(default_factory=dict)


class RejectedCandidate(FrozenModel):
    """A candidate that vLLM passed over."""

    candidate: str  # backend or kernel class
    reason: str  # as vLLM logs it; one line


class Choice(FrozenModel):
    """What one of vLLM's selections chose, and what it passed over."""

    chosen: str | None  # backend or class; None if nothing fits
    kernel: str | None = None  # class that does the work
    rejected: tuple[RejectedCandidate, ...] = ()
    error: str | None = None  # what vLLM raised if nothing fits


class Moe(Choice):
    """The routed experts. ``clamp`` is about swiglu_limit, which bounds both halves of SwiGLU.

    ``reaches``: the limit arrives at the kernel; ``lost``: the model has one and the kernel gets
    none, so results are wrong beyond it; ``none``: no backend, or a model without a limit.
    """

    clamp: Literal["reaches", "lost", "none"] = "none"
    limit: float | None = None  # what the kernel gets
    without_limit: str | None = None  # what would be chosen for a model that sets no limit


class Layers(FrozenModel):
    """Layers of the target or of the draft model."""

    # Module name, * for the layer -> quantization scheme class.
    modules: dict[str, str] = Field(default_factory=dict)
    moe: Moe | None = None

    @property
    def experts_scheme(self) -> str | None:
        names = self.modules.items()
        return next((scheme for name, scheme in names if EXPERTS.search(name)), None)


class Draft(Layers):
    """The MTP draft layer, where speculative decoding is on."""

    architecture: str
    speculative_tokens: int  # k, as vLLM took it


class KvCache(FrozenModel):
    """Layers with a KV cache of one shape, on one GPU."""

    layers: int
    kind: str  # class of vLLM's KVCacheSpec
    block_size: int  # tokens per block
    page_bytes: int  # bytes per block and layer
    window: int | None  # tokens that are kept; None: all


class CudaGraphs(FrozenModel):
    """The sizes that vLLM resolves from flags, k and the scheduler's limits."""

    asked: str = ""  # mode before the attention backends were asked
    mode: str  # e.g. FULL_AND_PIECEWISE
    # Batches with prefill run in graphs; False also where the mode says so and nothing is captured.
    piecewise: bool = True
    sizes: tuple[int, ...]  # tokens of the graphs that decode batches run in, ascending
    # --cudagraph-capture-sizes after all of vLLM's defaults and roundings.
    capture_sizes: tuple[int, ...]
    needed: int  # max_num_seqs * (k + 1): tokens of a full decode batch
    covers: bool  # the largest of sizes holds a full decode batch


class Engine(FrozenModel):
    """Engine settings after all of vLLM's defaults."""

    tensor_parallel: int
    expert_parallel: bool
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_dtype: str  # as the attention layers store it, e.g. fp8_ds_mla
    block_size: int  # tokens per KV block
    quantization: str | None
    dtype: str
    prefix_caching: bool
    model_runner: Literal["v1", "v2"]


class Chat(FrozenModel):
    """A chat request that sets nothing."""

    tokenizer_mode: str
    thinking: bool  # the prompt opens a block of reasoning


class Refusal(FrozenModel):
    """vLLM does not serve this."""

    # config: it refuses to make a configuration or a model of them; device: no attention or
    # kernels for it; start: it stops after the weights are loaded; failed: this project's code
    # raised inside, a bug to fix.
    kind: Literal["arguments", "config", "device", "start", "failed"]
    message: str


class Answer(Layers):
    """The answer to a question. After a refusal, later fields are None or empty."""

    name: str  # of the question
    refused: Refusal | None = None
    # VLLM_* variables that this vLLM does not have: no effect.
    unknown_environment: tuple[str, ...] = ()
    similar: dict[str, str] = Field(default_factory=dict)  # unknown variable -> nearest known one
    warnings: tuple[str, ...] = ()  # what vLLM warned of while it made its configuration
    engine: Engine | None = None
    cuda_graphs: CudaGraphs | None = None
    kv_cache: tuple[KvCache, ...] = ()
    chat: Chat | None = None  # None: rendered by the checkpoint's own template
    attention: Choice | None = None
    linear: Choice | None = None  # FP8-block linear layers
    draft: Draft | None = None


class Probe(FrozenModel):
    """A row of probes.toml."""

    sku: str
    artifact: str = "flash-nvfp4-fp8-mtp"
    arguments: tuple[str, ...] = ()  # with PROBE_ARGUMENTS
    environment: dict[str, str] = Field(default_factory=dict)


class ArtifactFile(FrozenModel):
    """``config`` without the weights; ``base`` names a file whose config it adds to."""

    base: str | None = None
    sources: tuple[str, ...] = Field(min_length=1)
    unknown: tuple[str, ...] = ()
    config: dict[str, Any]


def preset_question(preset_name: str, artifact_name: str) -> str:
    return f"preset/{preset_name}/{artifact_name}"


def grid_question(sku_name: str, artifact_name: str, variable: str = "") -> str:
    """Name of a question of the grid; ``variable``: a retired one that is set."""
    return "/".join(["grid", sku_name, artifact_name, *([variable] if variable else [])])


def line_questions(matrix: Matrix, line_name: str) -> tuple[Question, ...]:
    """All questions to a line with its series: its presets, then the grid."""
    questions: list[Question] = []
    for name, preset in matrix.preset.items():
        if preset.sku not in matrix.line[line_name].skus:
            continue
        arguments, environment = serve_arguments(matrix, name, line_name)
        sku = matrix.sku[preset.sku]
        questions += [
            Question(
                name=preset_question(name, artifact),
                device=declared_device(sku, count=GPUS),
                artifact=artifact,
                arguments=tuple(arguments),
                environment={**sku.env, **environment},
            )
            for artifact in preset.artifacts
        ]
    return (*questions, *grid_questions(matrix))


def grid_questions(matrix: Matrix) -> tuple[Question, ...]:
    """The questions without presets; those to a line's release as it was published."""
    return tuple(
        Question(
            name=grid_question(sku_name, artifact_name, variable),
            device=declared_device(sku, count=GPUS),
            artifact=artifact_name,
            arguments=(*GRID_ARGUMENTS, *_drafter(artifact)),
            environment={**sku.env, **({variable: "1"} if variable else {})},
        )
        for sku_name, sku in matrix.sku.items()
        for artifact_name, artifact in matrix.artifact.items()
        if artifact.unasked is None
        for variable in ("", *matrix.retired)
    )


def _drafter(artifact: Artifact) -> list[str]:
    return [] if artifact.mtp == "none" else [DRAFTER.format(artifact.drafter, artifact.block or 1)]


def probe_questions(matrix: Matrix, line_name: str) -> tuple[Question, ...]:
    """Deployments of public reports, on SKUs that the line serves."""
    rows = tomllib.loads(PROBES.read_text(encoding="utf-8"))["probe"]
    probes = {name: Probe.model_validate(row) for name, row in rows.items()}
    return tuple(
        Question(
            name=f"probe/{name}",
            device=declared_device(matrix.sku[probe.sku], count=GPUS),
            artifact=probe.artifact,
            arguments=(*PROBE_ARGUMENTS, *probe.arguments),
            environment={**matrix.sku[probe.sku].env, **probe.environment},
        )
        for name, probe in probes.items()
        if probe.sku in matrix.line[line_name].skus
    )


def declared_device(sku: Sku, *, count: int) -> Device:
    """A number of GPUs of a SKU, as the stub driver declares them."""
    return Device(
        name=sku.device,
        compute_capability=sku.compute_capability,
        memory_bytes=sku.memory_gb * 10**9,
        count=count,
    )


@cache
def _artifact_file(path: Path) -> ArtifactFile:
    return read_data(
        path,
        ArtifactFile.model_validate,
        ArtifactConfigError,
        what=f"config.json of artifact {path.stem}",
        remedy="write the artifact's config.json and its sources",
    )


def artifact_config(name: str, folder: Path = ARTIFACTS) -> dict[str, Any]:
    """The config.json of an artifact of the matrix; ArtifactConfigError if missing or malformed."""
    file = _artifact_file(folder / f"{name}.json")
    base = {} if file.base is None else artifact_config(file.base, folder)
    return base | file.config


def config_hash(name: str, folder: Path = ARTIFACTS) -> str:
    return hash_of(artifact_config(name, folder), sort_keys=True)


def inside_hash() -> str:
    """SHA-256 of the modules that run inside."""
    total = hashlib.sha256()
    for path in sorted(INSIDE.glob("*.py")):
        total.update(f"{path.name}\0".encode() + path.read_bytes())
    return total.hexdigest()


def write_inputs(folder: Path, questions: Sequence[Question]) -> None:
    """Write the package and the questions to a folder that any user can read."""
    tokenizer = {path.name: parse_json(path.read_bytes()) for path in TOKENIZER.glob("*.json")}
    content = {
        "questions": [question.model_dump(mode="json") for question in questions],
        "artifacts": {
            name: {"config.json": artifact_config(name), **tokenizer}
            for name in sorted({question.artifact for question in questions})
        },
    }
    remove(folder)
    shutil.copytree(INSIDE, folder / INSIDE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / QUESTIONS).write_text(json.dumps(content), encoding="utf-8")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def read_answers(output: str, questions: Iterable[Question], where: str) -> tuple[Answer, ...]:
    """The answers on the output's last line, in the questions' order, else SelectionFailedError."""
    names = [question.name for question in questions]
    try:
        rows = parse_json(output.strip().splitlines()[-1])
        for row in rows:
            row.pop("seconds", None)
            row.pop("imported", None)
        answers = tuple(Answer.model_validate(row) for row in rows)
    except (IndexError, ValueError, TypeError, AttributeError, ValidationError) as error:
        what = f"the questions printed no answers: {str(error)[:TAIL]}"
        remedy = output[-TAIL:]
        raise SelectionFailedError(what, where=where, remedy=remedy) from None
    if [answer.name for answer in answers] != names:
        raise SelectionFailedError(
            f"{len(answers)} answers to {len(names)} questions, or in another order", where=where
        )
    failed = [
        f"\n  - {answer.name}: {answer.refused.message}"
        for answer in answers
        if answer.refused is not None and answer.refused.kind == "failed"
    ]
    if failed:
        what = f"{len(failed)} of {len(answers)} questions failed:{''.join(failed)}"
        remedy = f"fix {INSIDE}: this vLLM may have changed its interfaces"
        raise SelectionFailedError(what, where=where, remedy=remedy)
    return answers
