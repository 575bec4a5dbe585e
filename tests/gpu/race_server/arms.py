"""The servers that are asked, by name, and all that each is asked."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tests.gpu.harness import variants
from tests.gpu.harness.device import parallel_variables, ranks
from tests.gpu.harness.server import Server
from tests.gpu.models import exact_moe
from tests.gpu.models.exact_checkpoint import INT4, NVFP4, Scheme
from tests.gpu.models.known_answers import Answer, ask_together
from tests.gpu.race_server import stale_row

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.harness.spec_metrics import Reading

LEVELS = (1, 2, 4, 8, 16)
TOKENS = 1000  # per client and level
PARALLEL_TOKENS = 400  # the same of an arm on several GPUs, which takes its turn
SAMPLE = 3  # answers that are scored again
PLANTED = 150  # where a wrong token is put into one of them
WRONG_EXPERT = 4
MODEL_FILE = "vllm/model_executor/models/glm4_moe.py"
ARGUMENTS = [
    "--max-model-len=36864", "--max-num-seqs=32", "--max-num-batched-tokens=1024",
    "--kv-cache-memory-bytes=268435456", "--gpu-memory-utilization=0.05",
    "--no-enable-prefix-caching", "--attention-backend=TRITON_ATTN",
]  # fmt: skip
EAGER = "--enforce-eager"
# Without the all-reduce that is fused with a norm: it goes through NVLink multicast.
GRAPHS = (
    '--compilation-config={"cudagraph_capture_sizes":[1,2,4,8,16,24,32,48,64],'
    '"pass_config":{"fuse_allreduce_rms":false}}'
)
AskedOf: TypeAlias = "Callable[[str], Asked]"
Scores: TypeAlias = tuple[list[float], list[float]]
# The draft model takes no attention backend from the target's arguments.
SPECULATION = (
    '--speculative-config={"method":"mtp","num_speculative_tokens":1,'
    '"attention_backend":"TRITON_ATTN"}'
)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One server.

    Attributes:
        graphs: decode by CUDA graphs, or eager.
        parallel: tensor parallel, over all GPUs of the tier.
        levels: concurrencies.
        wrong_expert: a fault of the checkpoint.
        stale_row: a fault of the layer's code that only concurrency has.
    """

    scheme: Scheme = NVFP4
    graphs: bool = False
    speculate: bool = False
    parallel: bool = False
    levels: tuple[int, ...] = LEVELS
    wrong_expert: int | None = None
    stale_row: bool = False

    @property
    def arguments(self) -> list[str]:
        """Of ``vllm serve``."""
        more = [SPECULATION] if self.speculate else []
        more += [f"--tensor-parallel-size={ranks()}"] if self.parallel else []
        return [*ARGUMENTS, GRAPHS if self.graphs else EAGER, *more]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.wrong_expert is None and not self.stale_row

    @property
    def scored(self) -> bool:
        """Whether answers are scored again: by prefill alone, without a draft."""
        return self.clean and not self.speculate


ARMS = {
    "eager": Arm(),
    "eager-speculation": Arm(speculate=True),
    "graphs": Arm(graphs=True),
    "graphs-speculation": Arm(graphs=True, speculate=True),
    "int4-graphs-speculation": Arm(scheme=INT4, graphs=True, speculate=True),
    "wrong-expert": Arm(levels=(1,), wrong_expert=WRONG_EXPERT),
    "stale-row": Arm(levels=(1, 4, 16), stale_row=True),
}
ARMS |= {
    f"parallel-{name}-{way}{'-speculation' if speculate else ''}": Arm(
        scheme=scheme, graphs=way == "graphs", speculate=speculate, parallel=True
    )
    for (name, scheme), way, speculate in itertools.product(
        (("nvfp4", NVFP4), ("int4", INT4)), ("eager", "graphs"), (False, True)
    )
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of a server.

    Attributes:
        scored: log probabilities of finished sequences, and the greatest at each position.
        planted: the same of one with a wrong token at ``PLANTED``.
        reading: counters of speculation.
        seconds: until it answered, and until the last answer.
    """

    answers: list[Answer]
    scored: list[Scores]
    planted: Scores
    reading: Reading | None
    seconds: dict[str, float]
    log: str


class Fleet:
    """Runs arms, each in a thread of its own; ``tokens`` of each client at each concurrency."""

    def __init__(self, work: Path, logs: Path, tokens: int = TOKENS) -> None:
        self.work, self.logs, self.tokens = work, logs, tokens
        self._models: dict[tuple[str, int | None], Path] = {}
        self._lock = threading.Lock()
        # One at a time: an all-reduce waits for GPUs that would be at another server's.
        self._turn = threading.Lock()

    def run(self, name: str) -> Asked:
        """Start an arm's server, ask it everything, and end it; raises what ``Server`` does."""
        arm = ARMS[name]
        log = self.logs / f"race-{name}.log"
        variables = self._variables(name) if arm.stale_row else {}
        variables |= parallel_variables() if arm.parallel else {}
        server = Server(
            model=self._model(arm),
            arguments=arm.arguments,
            log=log,
            variables=variables,
        )
        begun = time.monotonic()
        tokens = min(self.tokens, PARALLEL_TOKENS) if arm.parallel else self.tokens
        with server, self._turn if arm.parallel else contextlib.nullcontext():
            ready = time.monotonic()
            answers = [
                answer
                for level in arm.levels
                for answer in ask_together(
                    server.complete, exact_moe.orbit, level, tokens, long_prompts=level > 1
                )
            ]
            asked = time.monotonic()
            scored, planted = _score(server, answers) if arm.scored else ([], ([], []))
            generated = sum(len(answer.came) for answer in answers)
            reading = server.reading(generated) if arm.speculate else None
        return Asked(
            answers=answers, scored=scored, planted=planted, reading=reading,
            seconds={"ready": round(ready - begun, 1), "asked": round(asked - ready, 1)},
            log=log.read_text(errors="replace"),
        )  # fmt: skip

    def _model(self, arm: Arm) -> Path:
        """Folder of the checkpoint; each is written once."""
        key = (arm.scheme.name, arm.wrong_expert)
        with self._lock:
            if key not in self._models:
                folder = self.work / f"model-{len(self._models)}"
                exact_moe.write(folder, arm.scheme, wrong_expert=arm.wrong_expert)
                self._models[key] = folder
            return self._models[key]

    def _variables(self, name: str) -> dict[str, str]:
        """Where a vLLM with the fault is found before the installed one."""
        over = faulty_copy(variants.installed(), self.work / name)
        path = os.environ.get("PYTHONPATH", "")
        return {"PYTHONPATH": os.pathsep.join(filter(None, [str(over), path]))}


def _score(server: Server, answers: list[Answer]) -> tuple[list[Scores], Scores]:
    """Scores of the longest answers, and of one of them with a wrong token in it."""
    longest = sorted(answers, key=lambda answer: -len(answer.came))[:SAMPLE]
    finished = [[*answer.prompt, *answer.came] for answer in longest]
    spoilt = list(finished[0])
    spoilt[PLANTED] = exact_moe.following(spoilt[PLANTED])
    return [server.scores(tokens) for tokens in finished], server.scores(spoilt)


def faulty_copy(package: Path, folder: Path) -> Path:
    """A copy of an installed vLLM whose MoE layer has ``stale_row``; what to put on the path."""
    file = folder / "files" / MODEL_FILE
    file.parent.mkdir(parents=True)
    model = (package.parent / MODEL_FILE).read_text(encoding="utf-8")
    fault = Path(stale_row.__file__).read_text(encoding="utf-8")
    fault = fault.replace("from __future__ import annotations\n", "")
    file.write_text(f"{model}\n\n{fault}\n\nplant(Glm4MoE)\n", encoding="utf-8")
    return variants.lay_over(package, folder / "files", folder / "over")
