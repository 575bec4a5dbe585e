"""Quantization without torch: recipes, resuming, checks of what the tools made, the artifact."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.checkpoint_engine import (
    CALIBRATION,
    FakeEngine,
    Killed,
    make_job,
    tree_of,
)
from vllm_forge.checkpoints import tensors
from vllm_forge.checkpoints.architecture import all_tensors
from vllm_forge.checkpoints.checkpoint import Checkpoint
from vllm_forge.checkpoints.errors import (
    ModelInputError,
    QuantizedOutputError,
    RecipeError,
    ResumeError,
)
from vllm_forge.checkpoints.fixtures.tiny import TinySpec
from vllm_forge.checkpoints.quantize import inputs
from vllm_forge.checkpoints.quantize import quantizer as module
from vllm_forge.checkpoints.quantize.inputs import (
    RECIPES,
    SHIPPED,
    Recipe,
    load_recipe,
    read_conversations,
)
from vllm_forge.checkpoints.quantize.quantizer import check_layer, disk_needed, plan_parts, quantize
from vllm_forge.checkpoints.tensors import in_memory, write_shard
from vllm_forge.host import exclusive, hash_of
from vllm_forge.host.errors import BusyError, DiskSpaceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_forge.checkpoints.quantize.quantizer import Job
    from vllm_forge.checkpoints.tensors import TensorToWrite


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bf16"
    make_job(folder)
    return folder


@pytest.fixture
def job(model: Path) -> Job:
    return make_job(model)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_FORGE_CACHE", str(output.parent / "cache"))
        assert quantize(make_job(model), output)
    return output


class TestRecipes:
    @pytest.mark.parametrize("name", ["nvfp4-fp8-mtp", "nvfp4-fp8-mtp-v0.2", "w4a16-fp8-mtp"])
    def test_all_experts_and_attention_and_nothing_else(self, name: str) -> None:
        recipe, config = load_recipe(name), TinySpec().config()
        taken = [t.name for t in all_tensors(config) if recipe.group_of(t.name) is not None]
        layers, experts = config["num_hidden_layers"], config["n_routed_experts"]
        assert len(taken) == layers * (5 + 3 * experts)
        assert not any(re.search(r"mtp|shared|compressor|indexer|gate|norm", n) for n in taken)

    @pytest.mark.parametrize("number", [0, 1])
    def test_the_three_views_of_a_group_mean_the_same_modules(self, number: int) -> None:
        """vLLM's names are upstream's, but fused or as gate_proj, with ``model.`` before."""
        recipe = load_recipe("nvfp4-fp8-mtp")
        group = recipe.group[number]
        (serve,) = group.serve
        pattern = re.compile(serve.removeprefix("re:"))
        for tensor in all_tensors(TinySpec().config()):
            module_name = tensor.name.removesuffix(".weight")
            expected = recipe.group_of(tensor.name) is group
            if module_name.startswith("layers."):
                assert bool(pattern.match(f"model.{module_name}")) == expected, module_name
        fused = {0: "attn.fused_wqa_wkv", 1: "ffn.experts.0.gate_proj"}[number]
        assert pattern.match(f"model.layers.0.{fused}")

    def test_draft_layers_are_ignored_by_number(self) -> None:
        recipe = load_recipe("nvfp4-fp8-mtp")
        ignored = recipe.ignored({"num_hidden_layers": 43, "num_nextn_predict_layers": 2})
        assert r"re:.*\.layers\.43\..*" in ignored
        assert r"re:.*\.layers\.44\..*" in ignored
        pattern = re.compile(r".*\.layers\.4\..*")
        assert pattern.match("model.layers.4.attn.wq_b")
        assert not pattern.match("model.layers.43.attn.wq_b")
        assert not any("{" in row for row in ignored)

    def test_no_ignore_row_hides_what_is_quantized(self) -> None:
        recipe, config = load_recipe("nvfp4-fp8-mtp"), TinySpec().config()
        rows = [row.removeprefix("re:") for row in recipe.ignored(config) if row != "lm_head"]
        for tensor in all_tensors(config):
            if recipe.group_of(tensor.name):
                name = f"model.{tensor.name.removesuffix('.weight')}"
                assert not any(re.match(row, name) for row in rows), name

    def test_the_second_version_differs_in_samples_only(self) -> None:
        one, two = (load_recipe(f"nvfp4-fp8-mtp{v}") for v in ("", "-v0.2"))
        assert (one.samples, two.samples) == (64, 768)
        changed = {"name": one.name, "samples": one.samples, "about": one.about}
        assert Recipe(**{**two.model_dump(), **changed}) == one

    def test_an_unknown_one_gets_a_suggestion(self) -> None:
        with pytest.raises(RecipeError, match="did you mean 'nvfp4-fp8-mtp'"):
            load_recipe("nvfp4-fp8-mpt")

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ("samples = 768", "samples = 0", "samples"),
            ("samples = 64", "sample = 64", "sample"),
            ("seed = 42", "seed = ", "invalid recipe"),
            ('extends = "nvfp4-fp8-mtp"', 'extends = "none"', "'none'"),
        ],
    )
    def test_a_wrong_row_is_refused(self, tmp_path: Path, old: str, new: str, said: str) -> None:
        path = tmp_path / "recipes.toml"
        path.write_text(RECIPES.read_text().replace(old, new))
        with pytest.raises(RecipeError, match=said):
            load_recipe("nvfp4-fp8-mtp-v0.2", path)


class TestConversations:
    def test_the_shipped_ones_are_enough_for_the_card(self) -> None:
        rows = read_conversations(SHIPPED, load_recipe("nvfp4-fp8-mtp").samples)
        assert len({json.dumps(row) for row in rows}) == 64
        for row in rows:
            assert [m["role"] for m in row] == ["user", "assistant"] * (len(row) // 2)

    def test_a_template_is_shipped_for_models_without_one(self) -> None:
        assert "Assistant" in vars(inputs)["TEMPLATE"].read_text(encoding="utf-8")

    def test_too_few_are_refused(self) -> None:
        with pytest.raises(RecipeError, match="asks for 768 conversations, here are 64"):
            read_conversations(SHIPPED, 768)

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "[]",
            '{"messages": [{"role": "user"}]}',
            '{"messages": [1]}',
            '{"messages": []}',
            '{"messages": [{"role": "user", "content": " "}]}',
            '{"messages": [{"role": "alien", "content": "x"}]}',
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "[" * 100_000,
        ],
        ids=range(9),
    )
    def test_another_form_is_refused(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "x.jsonl").write_text(line + "\n")
        with pytest.raises(RecipeError, match="not a file of conversations"):
            read_conversations(tmp_path / "x.jsonl", 1)

    def test_a_line_ends_where_json_lines_end(self, tmp_path: Path) -> None:
        row = '{"messages": [{"role": "user", "content": "a\u2028b"}]}'
        (tmp_path / "x.jsonl").write_text(row + "\n", encoding="utf-8")
        assert read_conversations(tmp_path / "x.jsonl", 1)[0][0]["content"] == "a\u2028b"

    @pytest.mark.parametrize("name", [".", "x" * 300])
    def test_missing_file_is_reported(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(RecipeError, match=r"cannot be read|not a plain file"):
            read_conversations(tmp_path / name, 1)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="conversations does not exist"):
            read_conversations(tmp_path / "x.jsonl", 1)


class TestArtifact:
    def test_what_the_recipe_does_not_name_keeps_its_bytes(self, whole: Path, job: Job) -> None:
        made = Checkpoint.open(whole)
        for name, tensor in job.source.tensors.items():
            if job.recipe.group_of(name) is None:
                assert made.tensors[name].read() == tensor.read(), name

    def test_the_drafter_gets_embedding_and_head(self, whole: Path, job: Job) -> None:
        made = Checkpoint.open(whole).tensors
        assert made["mtp.0.emb.tok_emb.weight"].read() == job.source.tensors["embed.weight"].read()
        assert made["mtp.0.head.weight"].read() == job.source.tensors["head.weight"].read()

    def test_the_manifest_is_what_is_there(self, whole: Path) -> None:
        manifest = json.loads((whole / "manifest.json").read_text())
        made = Checkpoint.open(whole)
        assert set(manifest["tensors"]) == set(made.tensors)
        for name, row in manifest["tensors"].items():
            tensor = made.tensors[name]
            assert row == {
                "file": tensor.shard,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(tensor.read()).hexdigest(),
            }
        assert manifest["recipe"]["name"] == "nvfp4-fp8-mtp"
        assert manifest["calibration"]["samples"] == len(CALIBRATION.tokens)

    def test_the_index_counts_every_byte(self, whole: Path) -> None:
        index = json.loads((whole / "model.safetensors.index.json").read_text())
        sizes = [tensor.size for tensor in Checkpoint.open(whole).tensors.values()]
        assert index["metadata"]["total_size"] == sum(sizes)

    def test_files_of_the_model_come_along(self, whole: Path, model: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (whole / name).read_bytes() == (model / name).read_bytes()
        assert (whole / "recipe.yaml").read_text() == "recipe\n"
        config = json.loads((whole / "config.json").read_text())
        assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
        assert config == json.loads((model / "config.json").read_text())

    def test_no_work_folder_is_left(self, whole: Path) -> None:
        assert not whole.with_name("out.partial").exists()


class TestResume:
    def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(
        self, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The process dies at each rename in turn: before it, and after it."""
        moments = 0
        for when in ("before", "after"):
            for number in range(100):
                output = tmp_path / f"{when}-{number}" / "out"
                with monkeypatch.context() as patch:
                    fuse = _Fuse(number, when, patch)
                    died = _run(model, output)
                if not died:
                    assert fuse.count <= number
                    break
                moments += 1
                died = _run(model, output)
                assert not died
                assert tree_of(output) == tree_of(whole), f"{when} rename {number}"
                assert list(output.parent.iterdir()) == [output]
        assert moments > 20

    def test_finished_layers_are_not_made_again(self, model: Path, tmp_path: Path) -> None:
        class Dies(FakeEngine):
            def layer(self, index: int, *rest: Any) -> list[TensorToWrite]:
                if index == 1:
                    raise Killed
                return super().layer(index, *rest)

        first = make_job(model)
        with pytest.raises(Killed):
            quantize(replace(first, engine=Dies(first.recipe)), tmp_path / "out")
        second = make_job(model)
        quantize(second, tmp_path / "out")
        assert isinstance(second.engine, FakeEngine)
        assert second.engine.layers == [1]

    def test_hidden_states_do_not_pile_up(self, job: Job, tmp_path: Path) -> None:
        """Disk is asked for two sets of them."""
        seen = []

        class Counts(FakeEngine):
            def layer(self, *arguments: Any) -> list[TensorToWrite]:
                made = super().layer(*arguments)
                seen.append(len(list((tmp_path / "out.partial").glob("hidden-*"))))
                return made

        quantize(replace(job, engine=Counts(job.recipe)), tmp_path / "out")
        assert seen == [2, 2]

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda job: replace(job, recipe=load_recipe("w4a16-fp8-mtp")), "recipe"),
            (lambda job: replace(job, calibration=replace(CALIBRATION, tokens=((1,),))), "calib"),
            (lambda job: _with_versions(job, {"tools": "2"}), "tools"),
        ],
    )
    def test_leftovers_of_another_run_are_not_used(
        self, job: Job, tmp_path: Path, change: Callable[[Job], Job], said: str
    ) -> None:
        _die_in_layer_1(job, tmp_path / "out")
        with pytest.raises(ResumeError, match=said) as caught:
            quantize(change(job), tmp_path / "out")
        assert "delete that folder" in caught.value.remedy

    def test_a_changed_model_is_noticed(self, tmp_path: Path) -> None:
        job = make_job(tmp_path / "bf16")
        _die_in_layer_1(job, tmp_path / "out")
        path = tmp_path / "bf16" / "model-00002-of-00004.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ResumeError, match="model files"):
            quantize(make_job(tmp_path / "bf16"), tmp_path / "out")

    def test_model_that_changes_during_the_run_is_refused(self, tmp_path: Path) -> None:
        job = make_job(tmp_path / "bf16")
        path = tmp_path / "bf16" / "model-00002-of-00004.safetensors"  # of the layer made before

        class Fetches(FakeEngine):
            def layer(self, index: int, *rest: Any) -> list[TensorToWrite]:
                if index == 1:
                    path.write_bytes(path.read_bytes()[:-1] + b"x")
                return super().layer(index, *rest)

        with pytest.raises(ModelInputError, match="the model changed meanwhile") as caught:
            quantize(replace(job, engine=Fetches(job.recipe)), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert caught.value.where == str(tmp_path / "out.partial")
        assert "delete that folder" in caught.value.remedy
        with pytest.raises(ResumeError, match="model files"):
            quantize(make_job(tmp_path / "bf16"), tmp_path / "out")

    def test_an_existing_output_is_not_touched(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ResumeError, match="the output exists"):
            quantize(job, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_a_foreign_work_folder_is_not_touched(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "thesis.txt").write_text("draft")
        with pytest.raises(ResumeError, match="holds something else"):
            quantize(job, tmp_path / "out")
        assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]

    def test_two_runs_do_not_write_one_output(self, job: Job, tmp_path: Path) -> None:
        digest = hash_of(str((tmp_path / "out").resolve()))[:16]
        with exclusive(f"quantize-{digest}", wait=False), pytest.raises(BusyError):
            quantize(job, tmp_path / "out")

    def test_the_disk_is_asked_first(
        self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vllm_forge.host.files.free_bytes", lambda path: 1000)
        with pytest.raises(DiskSpaceError):
            quantize(job, tmp_path / "out")
        assert list(tmp_path.iterdir()) == [tmp_path / "cache"]

    def test_the_disk_suffices_then(self, job: Job, whole: Path) -> None:
        tokens = sum(map(len, job.calibration.tokens))
        recipe = job.recipe
        needed = disk_needed(job.source, recipe, plan_parts(job.source), tokens)
        weights = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
        # The fake engine's tensors are as large as the weights that they stand for.
        quantized = sum(
            math.prod(t.shape) for n, t in job.source.tensors.items()
            if job.recipe.group_of(n)
        )  # fmt: skip
        assert needed > 0.9 * (weights - 4 * quantized)


class TestChecks:
    """Each planted fault of the tools stops the run; nothing is published."""

    @pytest.mark.parametrize(
        ("name", "fault", "said"),
        [
            ("experts.1.w2.weight_packed", None, "1 tensors are not as the recipe says"),
            ("attn.wo_a.weight", ("BF16", 2), "BF16 instead of F8_E4M3"),
            ("experts.0.w3.weight_global_scale", b"\0\0\0\x40", "is not"),
            ("experts.0.w1.input_global_scale", b"\0\0\0\0", "zero, negative or not finite"),
            ("experts.0.w2.weight_global_scale", b"\0\0\xc0\x7f", "zero, negative or not finite"),
            ("experts.2.w2.weight_scale", b"\0", "zero, negative or not finite"),
            ("experts.2.w2.weight_scale", b"\x7f", "zero, negative or not finite"),
            ("experts.2.w2.weight_scale", b"\x81", "zero, negative or not finite"),
            ("attn.wkv.weight_scale", b"\0\0\x80\xff", "zero, negative or not finite"),
        ],
    )
    def test_a_fault_is_noticed(
        self, job: Job, tmp_path: Path, name: str, fault: Any, said: str
    ) -> None:
        class Faulty(FakeEngine):
            def layer(self, index: int, *rest: Any) -> list[TensorToWrite]:
                items = super().layer(index, *rest)
                return [broken for item in items for broken in _broken(item, name, fault)]

        with pytest.raises(QuantizedOutputError, match=said):
            quantize(replace(job, engine=Faulty(job.recipe)), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_module_too_many_is_noticed(self, job: Job) -> None:
        stored = {n: t for n, t in job.source.tensors.items() if n.startswith("layers.0.")}
        engine = FakeEngine(job.recipe)
        made = [item for n, t in stored.items() for item in engine.items(n, t, b"")]
        check_layer(made, stored, job.recipe)
        extra = in_memory("layers.0.ffn.gate.weight_packed", "U8", (1,), b"a")
        with pytest.raises(QuantizedOutputError, match="nothing"):
            check_layer([*made, extra], stored, job.recipe)

    def test_a_disk_that_forgets_is_noticed(
        self, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = write_shard

        def forgetful(path: Path, items: Any) -> Any:
            written = real(path, items)
            if path.name.startswith("model-00001"):
                content = path.read_bytes()
                path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            return written

        monkeypatch.setattr(tensors, "write_shard", forgetful)
        with pytest.raises(QuantizedOutputError, match="is not the model's"):
            quantize(job, tmp_path / "out")


def test_passed_through_files_are_split(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PASSED", 50_000)
    parts = plan_parts(job.source)
    drafts = [part for part in parts if part.layer is None][1:]
    assert len(drafts) > 2
    assert [bool(part.aliases) for part in drafts] == [False] * (len(drafts) - 1) + [True]
    names = [name for part in parts for name in part.tensors]
    assert sorted(names) == sorted(job.source.tensors)
    assert parts[-1].name == f"model-{len(parts):05}-of-{len(parts):05}.safetensors"


class _Fuse:
    """Kills the process at the n-th rename: atomic_path's, or the one that publishes."""

    def __init__(self, number: int, when: str, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = Path.rename

        def rename(path: Path, target: Path) -> Path:
            mine = self.count == number
            self.count += 1
            if mine and when == "before":
                raise Killed
            done = real(path, target)
            if mine:
                raise Killed
            return done

        patch.setattr(Path, "rename", rename)


def _run(model: Path, output: Path) -> bool:
    try:
        quantize(make_job(model), output)
    except Killed:
        return True
    return False


def _die_in_layer_1(job: Job, output: Path) -> None:
    class Dies(FakeEngine):
        def layer(self, index: int, *rest: Any) -> list[TensorToWrite]:
            if index == 1:
                raise Killed
            return super().layer(index, *rest)

    with pytest.raises(Killed):
        quantize(replace(job, engine=Dies(job.recipe)), output)


def _with_versions(job: Job, versions: dict[str, str]) -> Job:
    engine = FakeEngine(job.recipe)
    engine.versions = versions
    return replace(job, engine=engine)


def _broken(item: TensorToWrite, name: str, fault: Any) -> list[TensorToWrite]:
    if not item.name.endswith(name):
        return [item]
    match fault:
        case None:
            return []
        case (dtype, width):
            size = math.prod(item.shape) * width
            return [in_memory(item.name, dtype, item.shape, b"\0" * size)]
        case data:
            good = b"".join(item.chunks())
            return [in_memory(item.name, item.dtype, item.shape, data + good[len(data) :])]
