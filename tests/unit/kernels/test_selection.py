"""Questions, answers and their comparison; and the committed rows of each line.

The answers themselves need the layers of an image: `nox -s forge -- kernels select` is that test.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vllm_forge.kernels.errors import (
    ArtifactConfigError,
    SelectionChangedError,
    SelectionFailedError,
    SelectionFileError,
    SelectionStaleError,
)
from vllm_forge.kernels.selection import record as record_module
from vllm_forge.kernels.selection.questions import (
    ARTIFACTS,
    INSIDE,
    QUESTIONS,
    Answer,
    Device,
    Question,
    artifact_config,
    config_hash,
    grid_question,
    grid_questions,
    inside_hash,
    line_questions,
    preset_question,
    read_answers,
    write_inputs,
)
from vllm_forge.kernels.selection.record import (
    SelectionRecord,
    read_selection,
    require_fresh,
    require_same,
    write_selection,
)
from vllm_forge.matrix import Matrix, load
from vllm_forge.pages.kernels import render_selection, selection_table
from vllm_forge.project import Project

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parents[3]
RECORDS = ROOT / "records"
MATRIX = load(ROOT)
LINES = list(MATRIX.line)
VARIABLE = "VLLM_TEST_FORCE_FP8_MARLIN"


def question(name: str = "grid/chip/model", **changes: Any) -> Question:
    device = Device(name="Chip", compute_capability="7.7", memory_bytes=1, count=8)
    fields = {"name": name, "device": device, "artifact": "flash-nvfp4-fp8-mtp"}
    return Question(**{**fields, **changes})


def answer(name: str = "grid/chip/model", backend: str = "FAST", **changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "name": name,
        "moe": {"chosen": backend, "clamp": "reaches", "limit": 10.0},
        "modules": {"model.layers.*.ffn.experts": "SchemeA"},
    }
    return Answer.model_validate({**fields, **changes})


def recorded(*answers: Answer, published: tuple[Answer, ...] = ()) -> SelectionRecord:
    return SelectionRecord(
        line_name="9.9",
        vllm="9.9.1",
        made="2026-01-31",
        inputs={"series": "abc"},
        rows=tuple((question(a.name), a) for a in answers),
        published=tuple((question(a.name), a) for a in published),
    )


class TestQuestions:
    @pytest.mark.parametrize("line", LINES)
    def test_every_preset_of_the_line_with_every_artifact(self, line: str) -> None:
        names = [item.name for item in line_questions(MATRIX, line)]
        assert len(names) == len(set(names))
        wanted = {
            preset_question(name, artifact)
            for name, preset in MATRIX.preset.items()
            if preset.sku in MATRIX.line[line].skus
            for artifact in preset.artifacts
        }
        assert {name for name in names if name.startswith("preset/")} == wanted

    def test_grid_has_every_sku_even_unsupported_ones(self) -> None:
        names = {item.name for item in line_questions(MATRIX, LINES[0])}
        for sku in MATRIX.sku:
            for artifact, row in MATRIX.artifact.items():
                for name in ("", *MATRIX.retired):
                    asked = row.unasked is None
                    assert (grid_question(sku, artifact, name) in names) is asked

    def test_a_question_has_the_images_environment_and_the_presets(self) -> None:
        changed = MATRIX.model_dump()
        name = next(iter(MATRIX.preset))
        changed["preset"][name]["env"] = {"VLLM_SOMETHING": "2"}
        matrix = Matrix.model_validate(changed)
        preset = matrix.preset[name]
        found = {item.name: item for item in line_questions(matrix, matrix.default_line)}
        asked = found[preset_question(name, preset.artifacts[0])]
        assert asked.environment == {**matrix.sku[preset.sku].env, "VLLM_SOMETHING": "2"}
        assert set(preset.flags) < set(asked.arguments)
        assert asked.device.compute_capability == matrix.sku[preset.sku].compute_capability

    def test_the_published_release_is_asked_with_each_retired_variable(self) -> None:
        with_variable = [q for q in grid_questions(MATRIX) if VARIABLE in q.environment]
        asked = [name for name, row in MATRIX.artifact.items() if row.unasked is None]
        assert len(with_variable) == len(MATRIX.sku) * len(asked)


# Layers, layers of each compression, experts: as published.
DIMENSIONS = {"pro-nvfp4-fp8-mtp": (61, 30, 31, 384)}
KNOWN = [path.stem for path in ARTIFACTS.glob("*.json")]


class TestArtifacts:
    @pytest.mark.parametrize("name", KNOWN)
    def test_config_has_the_published_dimensions(self, name: str) -> None:
        config = artifact_config(name)
        layers = config["num_hidden_layers"]
        ratios = config["compress_ratios"][:layers]
        found = (layers, ratios.count(4), ratios.count(128), config["n_routed_experts"])
        assert found == DIMENSIONS.get(name, (43, 21, 20, 256))
        assert config["swiglu_limit"] == 10.0

    def test_every_artifact_has_a_config_or_says_why_not(self) -> None:
        without = MATRIX.artifact.keys() - set(KNOWN)
        assert all(MATRIX.artifact[name].unasked for name in without)

    @pytest.mark.parametrize("name", [name for name in KNOWN if name in MATRIX.artifact])
    def test_a_bf16_mtp_block_is_ignored_by_its_index(self, name: str) -> None:
        ignored = artifact_config(name)["quantization_config"].get("ignore", [])
        patterns = [entry[3:] for entry in ignored if entry.startswith("re:")]
        matches = [item for item in patterns if re.match(item, "model.layers.43.attn.wo_a")]
        assert bool(matches) == (MATRIX.artifact[name].mtp == "bf16")

    def test_a_base_is_added_to(self, tmp_path: Path) -> None:
        (tmp_path / "base.json").write_text('{"sources": ["a"], "config": {"x": 1, "y": 1}}')
        (tmp_path / "one.json").write_text(
            '{"base": "base", "sources": ["b"], "config": {"y": 2, "z": 3}}'
        )
        assert artifact_config("one", tmp_path) == {"x": 1, "y": 2, "z": 3}
        before = config_hash("one", tmp_path)
        other = shutil.copytree(tmp_path, tmp_path / "other")
        (other / "base.json").write_text('{"sources": ["a"], "config": {"x": 9, "y": 1}}')
        assert config_hash("one", other) != before

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "missing config.json of artifact one"),
            ("{", "invalid config.json of artifact"),
            ('{"config": {}}', "sources: Field required"),
            ('{"sources": ["a"]}', "config: Field required"),
            ('{"sources": [], "config": {}}', "sources: Tuple should have at least 1 item"),
            (
                '{"sources": ["a"], "config": {}, "confg": {}}',
                "unknown key confg (did you mean 'config'?)",
            ),
        ],
    )
    def test_invalid_file_is_named(self, tmp_path: Path, text: str | None, words: str) -> None:
        if text is not None:
            (tmp_path / "one.json").write_text(text)
        with pytest.raises(ArtifactConfigError, match=re.escape(words)) as caught:
            artifact_config("one", tmp_path)
        assert str(tmp_path / "one.json") in str(caught.value)


class TestMount:
    def test_inputs_are_readable_by_any_user(self, tmp_path: Path) -> None:
        folder = tmp_path / "inputs"
        write_inputs(folder, [question()])
        content = json.loads((folder / QUESTIONS).read_text(encoding="utf-8"))
        assert [item["name"] for item in content["questions"]] == ["grid/chip/model"]
        files = content["artifacts"]["flash-nvfp4-fp8-mtp"]
        assert files["config.json"] == artifact_config("flash-nvfp4-fp8-mtp")
        assert {"tokenizer.json", "tokenizer_config.json"} < set(files)
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o005 == 0o005
        assert (folder / "inside" / "main.py").read_bytes() == (INSIDE / "main.py").read_bytes()

    def test_inside_imports_nothing_else_of_the_project(self) -> None:
        """Nothing of vllm_forge but its own modules; torch and vLLM only where they are asked."""
        allowed = {"__future__", "torch", "vllm"}
        for path in INSIDE.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert not str(node.module).startswith("vllm_forge"), path
                names = [alias.name for alias in getattr(node, "names", [])]
                if isinstance(node, ast.Import):
                    assert not allowed & set(names), f"{path}: {names} when it is imported"

    def test_the_hash_is_of_every_module(self, tmp_path: Path, monkeypatch: Any) -> None:
        (tmp_path / "a.py").write_text("1")
        monkeypatch.setattr("vllm_forge.kernels.selection.questions.INSIDE", tmp_path)
        first = inside_hash()
        (tmp_path / "b.py").write_text("")
        assert inside_hash() != first

    def test_answers_are_read(self) -> None:
        rows = [{"name": "a", "seconds": 1.5, "imported": ["x"]}, {"name": "b"}]
        output = f"noise\n{json.dumps(rows)}\n"
        found = read_answers(output, [question("a"), question("b")], "there")
        assert [item.name for item in found] == ["a", "b"]

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            ("", "printed no answers"),
            ("Traceback ...\nImportError: no", "printed no answers"),
            ('[{"name": "a", "moe": 3}]', "printed no answers"),
            ('[{"name": "a", "unknown_field": 3}]', "printed no answers"),
            ('{"a": 1}', "printed no answers"),
            ('[{"name": "b"}]', "1 answers to 1 questions, or in another order"),
            ("[]", "0 answers to 1 questions"),
            (
                '[{"name": "a", "refused": {"kind": "failed", "message": "it died"}}]',
                "a: it died",
            ),
        ],
    )
    def test_invalid_answers_are_rejected(self, output: str, words: str) -> None:
        with pytest.raises(SelectionFailedError, match=re.escape(words)):
            read_answers(output, [question("a")], "there")

    def test_a_refusal_of_vllm_is_an_answer(self) -> None:
        output = '[{"name": "a", "refused": {"kind": "device", "message": "no kernel"}}]'
        (found,) = read_answers(output, [question("a")], "there")
        assert found.refused is not None
        assert found.refused.message == "no kernel"


class TestRecorded:
    def test_record_round_trips_and_equal_rows_give_equal_bytes(self, tmp_path: Path) -> None:
        one = recorded(answer("a"), answer("b"), answer("c", "SLOW"), published=(answer("a"),))
        path = write_selection(tmp_path, one)
        first = path.read_bytes()
        assert read_selection(tmp_path, "9.9") == one
        assert write_selection(tmp_path, one).read_bytes() == first
        assert first.count(b"SchemeA") == 1  # said once, though three rows have it

    def test_committed_files_are_canonical(self, tmp_path: Path) -> None:
        for line in LINES:
            written = write_selection(tmp_path, read_selection(RECORDS, line))
            assert written.read_bytes() == record_module.selection_path(RECORDS, line).read_bytes()

    @pytest.mark.parametrize("text", [None, "{", "[]", '{"line": "9.9"}', '{"line": 3'])
    def test_missing_or_invalid_file_is_named(self, tmp_path: Path, text: str | None) -> None:
        path = record_module.selection_path(tmp_path, "9.9")
        if text is not None:
            path.parent.mkdir(parents=True)
            path.write_text(text)
        with pytest.raises(SelectionFileError) as caught:
            read_selection(tmp_path, "9.9")
        assert "nox -s forge -- kernels select --record --line 9.9" in str(caught.value)
        assert str(path) in str(caught.value)

    def test_dangling_index_is_rejected(self, tmp_path: Path) -> None:
        path = write_selection(tmp_path, recorded(answer("a")))
        data = json.loads(path.read_text())
        data["rows"][0]["answer"]["modules"] = 7
        path.write_text(json.dumps(data))
        with pytest.raises(SelectionFileError):
            read_selection(tmp_path, "9.9")

    def test_one_devices_rows(self) -> None:
        other = Device(name="Other", compute_capability="8.8", memory_bytes=1, count=8)
        both = SelectionRecord(
            line_name="9.9",
            vllm="9.9.1",
            made="2026-01-31",
            inputs={},
            rows=((question("a"), answer("a")), (question("b", device=other), answer("b"))),
        )
        assert list(both.of_device("Other").answers) == ["b"]


class TestChanged:
    def test_equal_answers_pass(self) -> None:
        require_same(recorded(answer("a"), answer("b")), recorded(answer("a"), answer("b")))

    def test_subset_of_answers_passes(self) -> None:
        require_same(recorded(answer("a"), answer("b")), recorded(answer("b")))

    def test_a_changed_answer_shows_both_values_and_the_day(self) -> None:
        with pytest.raises(SelectionChangedError) as caught:
            require_same(recorded(answer("a", "FAST")), recorded(answer("a", "SLOW")))
        text = str(caught.value)
        assert "a: moe.chosen" in text
        assert '2026-01-31: "FAST"' in text
        assert 'now:        "SLOW"' in text
        assert "nox -s forge -- kernels select --record --line 9.9" in text
        assert "clamp" not in text  # only what differs

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"refused": {"kind": "device", "message": "no"}}, 'now:        {"kind": "device"'),
            ({"moe": None}, "a: moe"),
            ({"modules": {}}, "a: modules.model.layers.*.ffn.experts"),
            (
                {"modules": {"model.layers.*.ffn.experts": "SchemeA", "more": "SchemeB"}},
                "a: modules.more",
            ),
            ({"unknown_environment": ["VLLM_X"]}, 'now:        ["VLLM_X"]'),
        ],
    )
    def test_every_changed_part_is_reported(self, change: Mapping[str, Any], words: str) -> None:
        with pytest.raises(SelectionChangedError, match=re.escape(words)):
            require_same(recorded(answer("a")), recorded(answer("a", **change)))

    def test_the_published_release_is_compared_with_its_own_rows(self) -> None:
        both = recorded(answer("a", "FAST"), published=(answer("a", "SLOW"),))
        require_same(both, recorded(answer("a", "FAST"), published=(answer("a", "SLOW"),)))
        with pytest.raises(SelectionChangedError, match=r"a, as published: moe\.chosen"):
            require_same(both, recorded(published=(answer("a", "FAST"),)))

    def test_unrecorded_answer_is_reported(self) -> None:
        with pytest.raises(SelectionChangedError, match=r'b: .*\n.*"not recorded"'):
            require_same(recorded(answer("a")), recorded(answer("b")))


class TestStale:
    """Of a copy of the default line's committed answers."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        line = MATRIX.default_line
        found = read_selection(RECORDS, line)
        write_selection(tmp_path / "records", found)
        (tmp_path / "matrix.toml").write_bytes((ROOT / "matrix.toml").read_bytes())
        monkeypatch.setattr(record_module, "selection_inputs", lambda *_: found.inputs)
        monkeypatch.setattr(record_module, "line_questions", lambda *_: [q for q, _ in found.rows])
        monkeypatch.setattr(
            record_module, "grid_questions", lambda *_: [q for q, _ in found.published]
        )
        return tmp_path

    def fails(self, root: Path) -> str:
        with pytest.raises(SelectionStaleError) as caught:
            require_fresh(Project(root), MATRIX.default_line)
        command = f"nox -s forge -- kernels select --record --line {MATRIX.default_line}"
        assert command in str(caught.value)
        return str(caught.value)

    def test_fresh_rows_are_returned(self, root: Path) -> None:
        assert require_fresh(Project(root), MATRIX.default_line).rows

    @pytest.mark.parametrize("key", ["lock", "release", "series", "questions"])
    def test_changed_input_is_stale(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        now = {**read_selection(root / "records", MATRIX.default_line).inputs, key: "another"}
        monkeypatch.setattr(record_module, "selection_inputs", lambda *_: now)
        assert f"input {key}" in self.fails(root)

    def test_only_some_of_many_changes_are_named(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(record_module, "grid_questions", lambda *_: [])
        rows = read_selection(root / "records", MATRIX.default_line).published
        message = self.fails(root)
        assert message.count(", question") == 4
        assert f"and {len(rows) - 5} more" in message

    def test_changed_artifact_config_is_stale(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = json.loads(json.dumps(read_selection(root / "records", MATRIX.default_line).inputs))
        name = next(iter(now["artifacts"]))
        now["artifacts"][name] = "another"
        monkeypatch.setattr(record_module, "selection_inputs", lambda *_: now)
        assert f"input artifacts.{name}" in self.fails(root)

    def test_changed_question_is_stale(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = read_selection(root / "records", MATRIX.default_line).rows
        asked = [item for item, _ in rows]
        first = asked[0].model_copy(update={"arguments": ("--other",)})
        monkeypatch.setattr(record_module, "line_questions", lambda *_: [first, *asked[1:]])
        assert f"question {first.name}" in self.fails(root)

    def test_added_or_removed_question_is_stale(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = [
            item for item, _ in read_selection(root / "records", MATRIX.default_line).published
        ]
        monkeypatch.setattr(record_module, "grid_questions", lambda *_: asked[1:])
        assert f"question {asked[0].name} as published" in self.fails(root)
        more = [*asked, question("grid/one/more")]
        monkeypatch.setattr(record_module, "grid_questions", lambda *_: more)
        assert "question grid/one/more as published" in self.fails(root)


@pytest.mark.parametrize("line", LINES)
class TestCommitted:
    def test_rows_are_of_these_presets_series_locks_and_questions(self, line: str) -> None:
        require_fresh(Project(ROOT), line)

    def test_no_row_is_an_internal_failure(self, line: str) -> None:
        found = read_selection(RECORDS, line)
        for item in (*found.answers.values(), *found.published_answers.values()):
            assert item.refused is None or item.refused.kind != "failed"

    def test_a_served_sku_is_served_and_its_clamp_arrives(self, line: str) -> None:
        for name, item in read_selection(RECORDS, line).answers.items():
            if name.startswith("preset/"):
                _, preset, artifact = name.split("/")
                row = MATRIX.preset[preset]
                drafting = row.speculative_tokens > 0
                if item.refused is not None:
                    found = MATRIX.artifact[artifact]
                    assert found.why_not(line, row.sku, drafting=drafting) is not None, name
                    continue
                assert item.moe is not None
                assert (item.moe.clamp, item.moe.limit) == ("reaches", 10.0), name
                assert item.cuda_graphs is not None

    def test_graph_sizes_agree_with_covers(self, line: str) -> None:
        for name, item in read_selection(RECORDS, line).answers.items():
            if (graphs := item.cuda_graphs) is not None:
                assert graphs.covers == (max(graphs.sizes, default=0) >= graphs.needed), name


def test_the_page_follows_the_rows() -> None:
    one = recorded(
        answer("grid/chip/model", "FAST"),
        answer(f"grid/chip/model/{VARIABLE}", "SLOW"),
        answer("preset/chip-one/model", "FAST"),
        published=(answer("grid/chip/model", "OLD"),),
    )
    text = render_selection([one])
    assert "| chip | model | FAST (SchemeA) | reaches | SLOW, clamp reaches |" in text
    assert "| chip | model | OLD (SchemeA) |" in text
    assert "| chip-one | model | FAST (SchemeA) |" in text
    assert selection_table(one).row_count == 1


class TestFacts:
    """What is known from elsewhere, of rows of the matrix that these names are for."""

    @pytest.mark.parametrize(
        ("line", "sku", "backend"),
        [
            ("0.22", "b200", "FLASHINFER_TRTLLM"),
            ("0.22", "b300", "FLASHINFER_TRTLLM"),
            ("0.26", "b200", "FLASHINFER_TRTLLM"),
            ("0.26", "b300", "FLASHINFER_TRTLLM"),
            ("0.26", "rtxpro6000", "FLASHINFER_CUTLASS"),
            ("0.26", "h200", "MARLIN"),
            ("0.33", "b200", "FLASHINFER_TRTLLM"),
            ("0.33", "b300", "FLASHINFER_TRTLLM"),
            ("0.33", "rtxpro6000", "FLASHINFER_CUTLASS"),
            ("0.33", "h200", "HUMMING"),
        ],
    )
    def test_experts(self, line: str, sku: str, backend: str) -> None:
        moe = read_selection(RECORDS, line).answers[grid_question(sku, "flash-nvfp4-fp8-mtp")].moe
        assert moe is not None
        assert (moe.chosen, moe.clamp) == (backend, "reaches")

    def test_the_forced_marlin_keeps_the_clamp_only_with_the_series(self) -> None:
        found = read_selection(RECORDS, "0.22")
        name = grid_question("b300", "flash-nvfp4-fp8-mtp", VARIABLE)
        ours, theirs = found.answers[name].moe, found.published_answers[name].moe
        assert ours is not None
        assert theirs is not None
        assert (ours.chosen, ours.clamp) == ("MARLIN", "reaches")
        assert (theirs.chosen, theirs.clamp) == ("MARLIN", "lost")

    def test_sm120_is_refused_by_0_22_with_the_reason(self) -> None:
        found = read_selection(RECORDS, "0.22").answers
        refused = found[grid_question("rtxpro6000", "flash-nvfp4-fp8-mtp")].refused
        assert refused is not None
        assert "does not support compute capability 12.0" in refused.message

    def test_the_limit_and_not_the_device_leaves_0_22_without_a_backend_elsewhere(self) -> None:
        found = read_selection(RECORDS, "0.22").published_answers
        for sku, instead in (("rtxpro6000", "FLASHINFER_CUTLASS"), ("h200", "MARLIN")):
            moe = found[grid_question(sku, "flash-nvfp4-fp8-mtp")].moe
            assert moe is not None
            assert (moe.chosen, moe.without_limit) == (None, instead)

    def test_the_variable_is_gone_in_0_33(self) -> None:
        name = grid_question("b300", "flash-nvfp4-fp8-mtp", VARIABLE)
        assert read_selection(RECORDS, "0.33").answers[name].unknown_environment == (VARIABLE,)
        assert read_selection(RECORDS, "0.26").answers[name].unknown_environment == ()
