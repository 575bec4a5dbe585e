"""The server tier's race tests against servers that are right, and that are wrong; no GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.gpu.harness import device, processes, variants
from tests.gpu.harness.bootlog import parse
from tests.gpu.models import exact_moe
from tests.gpu.models.known_answers import LENGTHS, Answer, ask_together, mid_decode, report
from tests.gpu.race_server import arms, stale_row
from tests.gpu.race_server.verdicts import blames, finds_planted, is_clean, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

REPO = Path(__file__).parents[3]
FAKE = Path(__file__).parents[2] / "support" / "fake_vllm.py"


class TestLoad:
    def ask(self, prompt: Sequence[int], count: int) -> list[int]:
        return exact_moe.orbit(prompt[-1], count)

    def test_each_client_decodes_its_parts(self) -> None:
        answers = ask_together(self.ask, exact_moe.orbit, 4, 500, long_prompts=False)
        assert sum(len(answer.came) for answer in answers) == 4 * 500
        assert len({answer.request for answer in answers}) == len(answers)
        assert len({len(answer.came) for answer in answers}) > 4
        assert not report(answers)
        assert all(answer.checked == len(answer.came) for answer in answers)
        assert all(0 not in answer.prompt and len(answer.prompt) > 1 for answer in answers)

    def test_long_prompts_arrive_while_clients_decode(self) -> None:
        """Clients wait for the third long prompt, and it for them: both must be in flight."""
        longs, third = [0], threading.Event()

        def ask(prompt: Sequence[int], count: int) -> list[int]:
            if len(prompt) > 1000:
                longs[0] += 1
                if longs[0] >= 3:
                    third.set()
            else:
                assert third.wait(60)
            return self.ask(prompt, count)

        answers = ask_together(ask, exact_moe.orbit, 2, 100, long_prompts=True)
        assert mid_decode(answers) >= 3
        assert not report(answers)
        assert any(len(answer.prompt) > 1500 for answer in answers)

    def test_a_server_that_ends_ends_the_load(self) -> None:
        def ask(prompt: Sequence[int], count: int) -> list[int]:
            raise ConnectionError("gone")

        with pytest.raises(ConnectionError):
            ask_together(ask, exact_moe.orbit, 4, 500, long_prompts=True)


def answer(came: Sequence[int]) -> Answer:
    return Answer(
        concurrency=4, request="1.0", prompt=(1, 2), wanted=(5, 6, 7), came=tuple(came),
        began=0, ended=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("came", "place", "checked", "words"),
    [
        ([5, 6, 7], None, 3, ""),
        ([5, 9, 1], 1, 2, "position 1 of 3: token 6 was due, 9 came"),
        ([9, 6, 7], 0, 1, "position 0 of 3: token 5 was due, 9 came"),
        ([5, 6], 2, 3, "position 2 of 3: token 7 was due, nothing came"),
        ([5, 6, 7, 8], 3, 3, "position 3 of 3: token nothing was due, 8 came"),
        ([], 0, 1, "token 5 was due, nothing came"),
    ],
)
def test_the_first_wrong_token(
    came: list[int], place: int | None, checked: int, words: str
) -> None:
    found = answer(came)
    assert (found.first_wrong, found.checked) == (place, checked)
    assert words in "".join(report([found]))


def test_a_report_is_short() -> None:
    assert report([answer([9])] * 20, most=2)[-1] == "and 18 more"


class Rows(np.ndarray[Any, Any]):
    """An array with the one method of a tensor that the fault calls."""

    def clone(self) -> Rows:
        return self.copy()


def test_the_stale_row_is_the_first_and_of_the_call_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Layer:
        def forward(self, rows: Rows) -> Rows:
            return rows

    monkeypatch.setattr(stale_row, "EVERY", 3)
    stale_row.plant(Layer)
    layer = Layer()
    given: list[Any] = [np.arange(2 * size).reshape(size, 2).view(Rows) + 100 * n
             for n, size in enumerate((2, 2, 3, 1, 1, 1, 2, 2, 2))]  # fmt: skip
    outputs = [layer.forward(rows) for rows in given]
    assert [n for n, rows in enumerate(given) if (outputs[n] != rows).any()] == [2, 8]
    assert outputs[2].tolist() == [given[1][-1].tolist(), *given[2][1:].tolist()]
    assert Layer().forward(given[0]).tolist() == given[0].tolist()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed vllm, as far as it is asked for here."""
    root = tmp_path / "site" / "vllm"
    for name in ("__init__.py", "entrypoints/__init__.py", "entrypoints/cli/__init__.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    shutil.copy(FAKE, root / "entrypoints" / "cli" / "main.py")
    model = root.parent / arms.MODEL_FILE
    model.parent.mkdir(parents=True)
    model.write_text("class Glm4MoE:\n    def forward(self, rows):\n        return rows\n")
    return root


def test_the_faulty_copy_wraps_the_layer_and_leaves_the_installed_one(
    package: Path, tmp_path: Path
) -> None:
    before = (package.parent / arms.MODEL_FILE).read_text()
    over = arms.faulty_copy(package, tmp_path / "stale")
    space: dict[str, Any] = {}
    exec((over / arms.MODEL_FILE).read_text(), space)  # noqa: S102 - what was just written
    assert space["Glm4MoE"].forward.__qualname__.startswith("plant.")
    assert (package.parent / arms.MODEL_FILE).read_text() == before


@pytest.fixture
def fleet(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> arms.Fleet:
    """Arms whose ``vllm`` is the stand-in; their checkpoints are not written."""
    path = os.pathsep.join([str(package.parent), str(REPO / "src")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(variants, "installed", lambda: package)
    monkeypatch.setattr(arms, "TOKENS", 250)
    monkeypatch.setattr(exact_moe, "write", lambda folder, scheme, **_: folder)
    return arms.Fleet(tmp_path, tmp_path)


def test_a_clean_server_is_green(fleet: arms.Fleet) -> None:
    found = fleet.run("graphs")
    verdict = judge(found.answers)
    assert set(verdict.wrong) == set(arms.LEVELS)
    assert sum(verdict.wrong.values()) == 0
    assert verdict.words == []
    assert verdict.tokens[16] >= 16 * arms.TOKENS
    assert "clean launches exclude p > " in verdict.record()["exclusion"]
    assert verdict.rate == pytest.approx(6.9078 / sum(verdict.tokens.values()), rel=1e-3)
    assert is_clean(found.scored)
    assert finds_planted(found.planted)
    # What each of them would refuse.
    assert not is_clean([found.planted])
    assert not is_clean([])
    assert not finds_planted(found.scored[0])
    assert parse(found.log).captured


def test_a_wrong_token_is_red_and_named(fleet: arms.Fleet) -> None:
    found = fleet.run("eager-speculation")
    assert found.reading is not None
    assert found.reading.accepted == found.reading.draft_tokens > 0
    assert not found.scored
    at = next(n for n, a in enumerate(found.answers) if a.concurrency == 8)
    found.answers[at] = dataclasses.replace(
        found.answers[at], came=(3, *found.answers[at].came[1:])
    )
    verdict = judge(found.answers)
    assert verdict.wrong == {level: int(level == 8) for level in arms.LEVELS}
    assert "concurrency 8, request 0.0, position 0 of " in verdict.words[0]
    assert verdict.record()["exclusion"] == ""


def test_the_control_of_concurrency_bites_where_requests_meet(fleet: arms.Fleet) -> None:
    verdict = judge(fleet.run("stale-row").answers)
    assert verdict.wrong[1] == 0
    assert verdict.wrong[16] > 0


def test_an_expert_is_blamed_only_where_it_is_met() -> None:
    token = next(t for t in range(1, 99) if arms.WRONG_EXPERT in exact_moe.chosen(0, t))
    first = Answer(
        concurrency=1, request="0.0", prompt=(9, token), wanted=(exact_moe.following(token), 3),
        came=(600, 3), began=0, ended=1,
    )  # fmt: skip
    assert blames(arms.WRONG_EXPERT, [first])
    assert not blames((arms.WRONG_EXPERT + 1) % 2, [first])
    right = dataclasses.replace(first, came=first.wanted)
    assert not blames(arms.WRONG_EXPERT, [first, right])


def test_what_is_ended_starts_nothing(fleet: arms.Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_ENDED", threading.Event())
    monkeypatch.setattr(processes, "_GROUPS", set())
    processes.end_all()
    with pytest.raises(InterruptedError):
        fleet.run("eager")


def test_arms_on_several_gpus_have_all_of_the_tiers_and_take_turns(
    fleet: arms.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(device.VISIBLE, "2,5,7")
    monkeypatch.setenv(device.RANKS, "2")
    monkeypatch.setattr(arms, "PARALLEL_TOKENS", 120)
    names = ["parallel-int4-eager", "parallel-nvfp4-graphs-speculation"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(fleet.run, names))
    for asked in found:
        assert judge(asked.answers).words == []
        assert "--tensor-parallel-size=2" in asked.log
        assert "CUDA_VISIBLE_DEVICES=2,5 VLLM_ALLREDUCE_USE_SYMM_MEM=0" in asked.log
        lengths = {len(a.prompt) for a in asked.answers if a.concurrency == 2}
        assert all(any(size <= n < size + 256 for n in lengths) for size in LENGTHS)
    spans = sorted((a.answers[0].began, a.answers[-1].ended) for a in found)
    assert max(a.ended for a in min(found, key=lambda f: f.answers[0].began).answers) <= spans[1][0]


def test_arms_on_several_gpus_differ_in_weights_graphs_and_speculation() -> None:
    found = {(a.scheme.name, a.graphs, a.speculate) for a in arms.ARMS.values() if a.parallel}
    assert len(found) == 8
    assert '"fuse_allreduce_rms":false' in arms.GRAPHS
