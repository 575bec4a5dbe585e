"""A line's verdict from findings, remedies and a dry load: what counts, who has the last word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.layouts import layout, profile_of
from vllm_forge.checkpoints.errors import DryLoadError
from vllm_forge.checkpoints.inspect.dry_load import (
    METHODS,
    PROGRAM,
    Answer,
    Load,
    read_answers,
    write_request,
)
from vllm_forge.checkpoints.inspect.findings import Effect, Finding, Scope
from vllm_forge.checkpoints.inspect.inspection import LineVerdict, Outcome, applies, inspect, judge
from vllm_forge.checkpoints.inspect.profile import Drafter
from vllm_forge.matrix import load
from vllm_forge.patches import read_dispositions
from vllm_forge.patches.dispositions import Disposition
from vllm_forge.patches.errors import DispositionError

if TYPE_CHECKING:
    from vllm_forge.checkpoints.inspect.profile import Profile

ABOUT = "vllm-project/vllm#1"
DISPOSITIONS = (
    Disposition.model_validate(
        {
            "about": ABOUT,
            "title": "a fault",
            "upstream": "merged",
            "on": {
                "0.22": {"status": "carried", "reason": "needed", "patch": "1.patch"},
                "0.26": {"status": "refused", "reason": "harms", "proof": "a test"},
                "all": {"status": "retired", "reason": "has it", "landed": "1", "where": "a.py"},
            },
        }
    ),
)


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_of(layout(tmp_path_factory.mktemp("verdict"), "card"))


@pytest.fixture(scope="session")
def dspark(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return profile_of(layout(tmp_path_factory.mktemp("verdict"), "dspark"))


def _finding(effect: Effect = Effect.REFUSES, **fields: Any) -> Finding:
    return Finding(check="files", title="a fault", effect=effect, what="there", **fields)


def _load(**fields: Any) -> Load:
    return Load.model_validate({"error": None, **fields})


CLEAN = Answer(target=_load(), drafts={"mtp": _load()})


def _judge(
    profile: Profile, *findings: Finding, answer: Answer | None = None, line: str = "0.26"
) -> LineVerdict:
    return judge(
        line, f"{line}.0", profile, findings=findings, dispositions=DISPOSITIONS, answer=answer
    )


class TestFindings:
    def test_none_means_it_serves(self, card: Profile) -> None:
        verdict = _judge(card)
        assert (verdict.outcome, verdict.why, verdict.by) == (
            Outcome.WITH_MTP, (), "the matching rules of compressed-tensors",
        )  # fmt: skip

    @pytest.mark.parametrize("effect", [Effect.REFUSES, Effect.CORRUPTS])
    def test_what_breaks_the_target_breaks_all(self, card: Profile, effect: Effect) -> None:
        assert _judge(card, _finding(effect)).outcome is Outcome.NOT

    @pytest.mark.parametrize("effect", [Effect.LOSES, Effect.DEPARTS, Effect.NOTES])
    def test_the_rest_does_not(self, card: Profile, effect: Effect) -> None:
        assert _judge(card, _finding(effect)).outcome is Outcome.WITH_MTP

    def test_what_breaks_the_draft_leaves_the_target(self, card: Profile) -> None:
        verdict = _judge(card, _finding(scope=Scope.DRAFT))
        assert (verdict.outcome, verdict.why) == (
            Outcome.WITHOUT, ("draft: files: a fault: there",),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "outcome"),
        [("0.22", Outcome.WITH_MTP), ("0.26", Outcome.NOT), ("0.33", Outcome.WITH_MTP)],
    )
    def test_a_remedy_counts_where_the_line_has_it(
        self, card: Profile, line: str, outcome: Outcome
    ) -> None:
        verdict = _judge(card, _finding(handled_by=ABOUT), line=line)
        assert verdict.outcome is outcome
        assert bool(verdict.handled) is (outcome is Outcome.WITH_MTP)
        assert verdict.findings == (() if verdict.handled else (0,))

    def test_an_undecided_remedy_is_an_error(self, card: Profile) -> None:
        with pytest.raises(DispositionError, match="missing disposition of vllm-project/vllm#2"):
            _judge(card, _finding(handled_by="vllm-project/vllm#2"))

    @pytest.mark.parametrize(
        ("since", "before", "expected"),
        [("", "", True), ("0.26.0", "", True), ("", "0.26.0", False), ("0.26.1", "", False),
         ("0.9.0", "0.100.0", True)],
    )  # fmt: skip
    def test_bounds_are_versions(self, since: str, before: str, expected: bool) -> None:
        assert applies(_finding(since=since, before=before), "0.26.0") is expected


class TestDryLoad:
    def test_its_silence_outweighs_a_prediction(self, card: Profile) -> None:
        verdict = _judge(card, _finding(), answer=CLEAN)
        assert verdict.outcome is Outcome.WITH_MTP
        assert verdict.by == "vLLM 0.26.0 itself, in a dry load"

    def test_values_and_what_comes_after_loading_are_not_for_it_to_say(self, card: Profile) -> None:
        assert _judge(card, _finding(Effect.CORRUPTS), answer=CLEAN).outcome is Outcome.NOT
        assert _judge(card, _finding(handled_by=ABOUT), answer=CLEAN).outcome is Outcome.NOT

    def test_nor_is_what_the_forward_pass_meets(self, card: Profile) -> None:
        """It says nothing against a finding that no load can show, in either model."""
        verdict = _judge(card, _finding(in_forward=True), answer=CLEAN)
        assert (verdict.outcome, verdict.why) == (Outcome.NOT, ("files: a fault: there",))
        verdict = _judge(card, _finding(in_forward=True, scope=Scope.DRAFT), answer=CLEAN)
        assert (verdict.outcome, verdict.why) == (
            Outcome.WITHOUT,
            ("draft: files: a fault: there",),
        )

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"error": {"tensor": "a.weight", "message": "KeyError: 'b'"}}, "stops at a.weight"),
            ({"error": {"tensor": None, "message": "no kernel"}}, "vLLM stops: no kernel"),
            ({"short": [{"parameter": "x.w13_weight", "count": 3, "filled": 4, "of": 8}]},
             "4 of 8 elements of x.w13_weight and 2 like it"),
            ({"casts": [{"from": "float8_e4m3fn", "to": "bfloat16", "count": 2, "example": "a"}]},
             "from float8_e4m3fn to bfloat16"),
            ({"unread": [{"tensor": "layers.0.x.weight_scale", "count": 5}]}, "nor 4 like it"),
            ({"unread": [{"tensor": "layers.0.x.scale", "count": 1}]}, "not read layers.0.x.scale"),
        ],
    )  # fmt: skip
    def test_what_it_observes_counts(
        self, card: Profile, fields: dict[str, Any], words: str
    ) -> None:
        broken = _load(**fields)
        target = _judge(card, answer=Answer(target=broken, drafts={"mtp": _load()}))
        assert target.outcome is Outcome.NOT
        assert words in target.why[0]
        draft = _judge(card, answer=Answer(target=_load(), drafts={"mtp": broken}))
        assert draft.outcome is Outcome.WITHOUT
        assert words in draft.why[0]

    @pytest.mark.parametrize(
        "fields",
        [
            {"short": [{"parameter": "x.attn.attn_sink", "count": 1, "filled": 8, "of": 64}]},
            {"short": [{"parameter": "x.w13_weight_g_idx", "count": 1, "filled": 0, "of": 64}]},
            {"casts": [{"from": "int64", "to": "int32", "count": 1, "example": "tid2eid"}]},
            {"casts": [{"from": "float16", "to": "bfloat16", "count": 1, "example": "embed"}]},
            {"casts": [{"from": "float32", "to": "float8_e8m0fnu", "count": 1, "example": "a"}]},
            {"casts": [{"from": "int64", "to": "bfloat16", "count": 1, "example": "weight_shape"}]},
            {"unread": [{"tensor": "layers.0.x.weight_shape", "count": 5}]},
        ],
    )  # fmt: skip
    def test_what_is_meant_so_does_not(self, card: Profile, fields: dict[str, Any]) -> None:
        answer = Answer(target=_load(**fields), drafts={"mtp": _load()})
        assert _judge(card, answer=answer).outcome is Outcome.WITH_MTP

    def test_sinks_that_were_not_read_at_all_count(self, card: Profile) -> None:
        row = {"parameter": "x.attn.attn_sink", "count": 1, "filled": 0, "of": 64}
        answer = Answer(target=_load(short=[row]), drafts={"mtp": _load()})
        assert _judge(card, answer=answer).outcome is Outcome.NOT

    def test_the_draft_shares_embedding_and_head_the_target_does_not(self, card: Profile) -> None:
        row = {"parameter": "model.embed_tokens.weight", "count": 1, "filled": 0, "of": 64}
        for target, draft, outcome in (
            ([], [row], Outcome.WITH_MTP),
            ([row], [], Outcome.NOT),
        ):
            answer = Answer(target=_load(short=target), drafts={"mtp": _load(short=draft)})
            assert _judge(card, answer=answer).outcome is outcome

    def test_scales_of_unquantized_inputs_need_no_values(
        self, card: Profile, tmp_path: Path
    ) -> None:
        row = {"parameter": "x.experts.w13_input_global_scale", "count": 3, "filled": 0, "of": 16}
        answer = Answer(target=_load(short=[row]), drafts={"mtp": _load()})
        assert _judge(card, answer=answer).outcome is Outcome.NOT
        weights_only = profile_of(layout(tmp_path, "nvfp4a16-no-mtp"))
        assert _judge(weights_only, answer=answer).outcome is Outcome.WITHOUT

    def test_a_dspark_drafter_serves_as_one(self, dspark: Profile) -> None:
        told = _finding(scope=Scope.DRAFT).model_copy(update={"check": "other-drafter"})
        loads = {"mtp": _load(), "dspark": _load()}
        verdict = _judge(dspark, told, answer=Answer(target=_load(), drafts=loads))
        assert verdict.outcome is Outcome.WITH_DSPARK
        assert verdict.why
        loads["dspark"] = _load(error={"tensor": None, "message": "unknown method"})
        verdict = _judge(dspark, told, answer=Answer(target=_load(), drafts=loads))
        assert verdict.outcome is Outcome.WITHOUT
        assert "as DSpark: vLLM stops: unknown method" in verdict.why[-1]

    def test_modules_are_reported(self, card: Profile) -> None:
        rows = [{"module": "layers.N.x", "method": "A", "scheme": "S", "count": 42},
                {"module": "layers.N.x", "method": "B", "scheme": "", "count": 1}]  # fmt: skip
        answer = Answer(target=_load(modules=rows), drafts={"mtp": _load()})
        assert _judge(card, answer=answer).modules == {"layers.N.x": "S x 42, B"}


class TestRequest:
    def test_holds_what_the_program_needs(self, card: Profile, tmp_path: Path, root: Path) -> None:
        sku = load(root).sku["b300"]
        write_request(tmp_path / "inputs", {"one": card}, sku)
        asked = json.loads((tmp_path / "inputs/request.json").read_text())
        assert asked["device"]["compute_capability"] == "10.3"
        (case,) = asked["cases"]
        assert case["methods"] == ["mtp"]
        rows = json.loads((tmp_path / "inputs" / case["tensors"]).read_text())
        assert len(rows) == len(card.tensors)
        assert (tmp_path / "inputs" / PROGRAM).exists()
        assert (tmp_path / "inputs/inside/device.py").exists()

    def test_only_a_drafter_has_methods(self) -> None:
        assert METHODS[Drafter.NONE] == ()
        assert METHODS[Drafter.DSPARK] == ("mtp", "dspark")


class TestAnswers:
    def _text(self, **case: Any) -> str:
        full = {"target": {"error": None}, "drafts": {}, **case}
        return "noise\n" + json.dumps({"one": full})

    def test_are_the_last_line(self) -> None:
        assert read_answers(self._text(), "here", ["one"])["one"].target == _load()

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            ("", "no answer"),
            ("Traceback", "no answer"),
            ("[]", "no answer"),
            ('{"one": {"fault": "Traceback: boom"}}', "boom"),
            ("{}", "no answer for one"),
            ('{"one": {"target": 1}}', "no answer"),
        ],
    )
    def test_anything_else_is_an_error(self, output: str, words: str) -> None:
        with pytest.raises(DryLoadError, match=words):
            read_answers(output, "here", ["one"])


def test_every_remedy_that_a_gate_names_is_decided(root: Path, tmp_path: Path) -> None:
    """On all lines, for all variants that need no tools."""
    dispositions, matrix = read_dispositions(root / "patches/vllm"), load(root)
    releases = {name: line.vllm for name, line in matrix.line.items()}
    no_kernel = [Outcome.NOT, Outcome.WITH_MTP, Outcome.WITH_MTP]
    for variant, outcomes in {
        "card": [Outcome.WITH_MTP] * 3,
        "w4a16-fp8-mtp": [Outcome.WITH_MTP] * 3,
        "card-some-weights-only": no_kernel,
        "card-no-activations": [Outcome.NOT] * 3,
        "actorder-static": [Outcome.WITH_MTP] * 3,
    }.items():
        report = inspect(profile_of(layout(tmp_path, variant)), releases, dispositions, {})
        assert [v.outcome for v in report.lines] == outcomes
        handled = {f.handled_by for f in report.findings if f.handled_by}
        assert handled <= {entry.about for entry in dispositions}
