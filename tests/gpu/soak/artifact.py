"""The full artifact as a preset serves it, and what it answers to the workloads of its bands."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.gpu.harness.gate import Band, Traffic, Verdict, judge, load_bands
from tests.gpu.harness.workloads import Reply, Workload, ask_all, read_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.gpu.harness.server import Server
    from tests.gpu.harness.spec_metrics import Reading

FIRST = "chat-code"  # asked where nothing is published for a SKU


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A row of matrix.toml; ``arguments`` and ``env`` are of ``vllm serve``."""

    name: str
    artifacts: Sequence[str]
    tensor_parallel: int
    speculative_tokens: int
    arguments: Sequence[str]
    env: Mapping[str, str]


def choose(presets: Sequence[Preset], gpus: int, checkpoints: Path) -> tuple[Preset, Path] | str:
    """The largest preset with speculation that this host can serve, and the artifact's folder.

    Returns:
        Words, where there is none: what is missing.
    """
    drafting = [one for one in presets if one.speculative_tokens]
    if not drafting:
        return "matrix.toml has no preset with speculation for this SKU"
    fitting = [one for one in drafting if one.tensor_parallel <= gpus]
    if not fitting:
        least = min(one.tensor_parallel for one in drafting)
        return f"the presets of this SKU need {least} GPUs, here are {gpus}"
    for one in sorted(fitting, key=lambda one: -one.tensor_parallel):
        for artifact in one.artifacts:
            if (folder := checkpoints / artifact).is_dir():
                return one, folder
    names = ", ".join(dict.fromkeys(name for one in fitting for name in one.artifacts))
    return f"no artifact is there: --checkpoint NAME=DIR brings one of {names}"


def bands() -> dict[Band, str]:
    """What is published for each SKU of matrix.toml, and the marker of its GPU.

    For a SKU without, the rate is recorded and the rest is judged: k is then any.
    """
    found: dict[Band, str] = {}
    for name, capability in matrix_rows("sku").items():
        published = [band for band in load_bands() if band.sku == name]
        none = Band(sku=name, workload=FIRST, k=0, low=0, high=1, source="nothing is published")
        found |= dict.fromkeys(published or [none], f"sm_{capability.replace('.', '')}")
    return found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of a workload at a concurrency.

    Attributes:
        replies: in the order of the prompts.
        change: counters of speculation; None where the server exports none.
        facts: for the receipt.
    """

    replies: list[Reply]
    change: Reading | None
    facts: dict[str, Any]

    def verdict(self, band: Band) -> Verdict:
        """The gate's."""
        tokens = sum(len(reply.came) for reply in self.replies)
        return judge(self.change, Traffic(requests=len(self.replies), tokens=tokens), band)


@dataclass(kw_only=True)
class Artifact:
    """A server that is up; what it was asked is kept, so that tests ask once.

    Attributes:
        server: of the artifact.
        preset: as which it serves.
        workloads: folder with the prompts.
        vocabulary: size of the model's.
        identity: of its files, see harness.identity.
    """

    server: Server
    preset: Preset
    workloads: Path
    vocabulary: int
    identity: str
    _asked: dict[tuple[str, int], Asked] = field(default_factory=dict)
    _generated: int = 0

    def ask(self, workload: Workload, together: int) -> Asked:
        """Ask a workload at a concurrency, unless it was.

        Raises:
            FileNotFoundError: nobody brought its prompts.
        """
        key = (workload.name, together)
        if key not in self._asked:
            bodies, digest = read_prompts(workload, self.workloads, self.vocabulary)
            before = self.server.reading(self._generated)
            replies = ask_all(self.server.post, workload, bodies, together)
            self._generated += sum(len(reply.came) for reply in replies)
            after = self.server.reading(self._generated)
            facts = {
                "prompts": len(bodies), "prompts_sha256": digest, "preset": self.preset.name,
                "artifact": self.server.model.name, "identity": self.identity,
            }  # fmt: skip
            change = None if before is None or after is None else after.since(before)
            self._asked[key] = Asked(replies=replies, change=change, facts=facts)
        return self._asked[key]


def matrix_rows(name: str) -> Any:
    """Rows of matrix.toml that suite.toml lists for this tier; none where pytest runs alone."""
    return json.loads(os.environ.get("VLLM_FORGE_GPU_MATRIX") or "{}").get(name, {})


def presets() -> list[Preset]:
    """Those of the SKU."""
    return [Preset(**row) for row in matrix_rows("preset")]


def vocabulary(folder: Path) -> int:
    """``vocab_size`` of a checkpoint's config.json."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
