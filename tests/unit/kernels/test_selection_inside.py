"""The part that runs inside, with stand-ins for torch and vLLM: processes, devices, clamps.

With the real ones it is run by `nox -s forge -- kernels select`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_forge.kernels.selection.inside import experts, facts, main, serving, startup
from vllm_forge.kernels.selection.inside.building import SelectionCall
from vllm_forge.kernels.selection.inside.device import DeclaredDevice
from vllm_forge.kernels.selection.inside.driver import Device

SOURCE = Path(main.__file__).parents[3]
CHIP = {"name": "Chip", "compute_capability": "7.7", "memory_bytes": 1, "count": 8}


# --- processes ------------------------------------------------------------------------------------


def asked(name: str, device: str = "Chip", **environment: str) -> dict[str, Any]:
    return {
        "name": name,
        "device": {**CHIP, "name": device},
        "artifact": "model",
        "arguments": [],
        "environment": environment,
    }


class Worlds:
    """vLLM is a package that keeps a variable when it is imported; answers say what they saw."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        package = folder / "vllm" / "model_executor" / "models"
        package.mkdir(parents=True)
        for place in (package, package.parent, package.parent.parent):
            (place / "__init__.py").write_text("")
        (package / "registry.py").write_text("")
        (folder / "vllm" / "kept.py").write_text(
            "import os\nKEPT = os.environ.get('VLLM_KEPT')\nSEEN = []\n"
        )
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setattr(main, "MODULES", ("vllm.kept",))
        monkeypatch.setattr(main, "_fill", self._fill)
        self.device: Device | None = None

    def declare(self, device: Device) -> None:
        self.device = device

    def _fill(self, answer: dict[str, Any], question: dict[str, Any], _folder: Path) -> None:
        kept: Any = importlib.import_module("vllm.kept")
        os.environ.update(question["environment"])
        match question["artifact"]:
            case "wrong":
                raise ValueError("our own fault")
            case "refused":
                raise serving.Refusal("device", "no kernel")
            case "dies":
                os._exit(3)
        kept.SEEN.append(question["name"])
        assert self.device is not None
        answer["warnings"] = [self.device.name, kept.KEPT, len(kept.SEEN)]

    def ask(self, *questions: dict[str, Any]) -> dict[str, dict[str, Any]]:
        environment = os.environ.__class__
        reads = main._watch_environment()
        try:
            declared: Any = self
            return main._ask_worlds([*questions], self.folder, declared, reads)
        finally:
            os.environ.__class__ = environment


@pytest.fixture
def worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worlds:
    return Worlds(tmp_path, monkeypatch)


def test_each_question_is_answered_in_a_process_of_its_own(worlds: Worlds) -> None:
    found = worlds.ask(asked("a"), asked("b"), asked("c", device="Other"))
    assert found["a"]["warnings"] == ["Chip", None, 1]
    assert found["b"]["warnings"] == ["Chip", None, 1]  # nothing left of the one before it
    assert found["c"]["warnings"] == ["Other", None, 1]


def test_one_wrong_question_does_not_end_the_others(worlds: Worlds) -> None:
    questions = [asked("a"), asked("b"), asked("c"), asked("d")]
    for question, artifact in zip(questions, ("wrong", "dies", "refused", "model"), strict=True):
        question["artifact"] = artifact
    found = worlds.ask(*questions)
    assert found["a"]["refused"]["kind"] == "failed"
    assert "our own fault" in found["a"]["refused"]["message"]
    assert found["b"]["refused"] == {"kind": "failed", "message": "the process died"}
    assert found["c"]["refused"] == {"kind": "device", "message": "no kernel"}
    assert "refused" not in found["d"]


def test_a_variable_that_an_import_reads_is_set_before_it(worlds: Worlds) -> None:
    found = worlds.ask(
        asked("a"), asked("b", VLLM_KEPT="1"), asked("c", VLLM_OTHER="1"), asked("d", VLLM_KEPT="2")
    )
    assert [found[name]["warnings"][1] for name in "abcd"] == [None, "1", None, "2"]


def test_variable_of_the_first_question_is_set_before_imports(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    found = worlds.ask(asked("a", VLLM_KEPT="1"), asked("b", VLLM_KEPT="2"))
    assert [found[name]["warnings"][1] for name in "ab"] == ["1", "2"]


def test_common_variables_are_set_before_imports(worlds: Worlds) -> None:
    found = worlds.ask(asked("a", VLLM_KEPT="1"), asked("b", VLLM_KEPT="1", VLLM_OTHER="2"))
    assert [found[name]["warnings"][1] for name in "ab"] == ["1", "1"]


def test_cores_without_a_device_of_their_own_get_a_part_of_its_questions(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    questions = [asked(name) for name in "abcde"]
    assert sorted(len(part) for part in main._split(questions, 3)) == [1, 2, 2]
    assert [q for part in main._split(questions, 1) for q in part] == questions
    assert sorted(worlds.ask(*questions)) == ["a", "b", "c", "d", "e"]


def test_failed_import_is_reported(
    worlds: Worlds, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "MODULES", ("vllm.absent",))
    found = worlds.ask(asked("a"), asked("b"))
    assert found["a"]["refused"]["kind"] == found["b"]["refused"]["kind"] == "failed"
    assert "vllm.absent" in capfd.readouterr().err


# --- the device -----------------------------------------------------------------------------------


def fake_torch() -> ModuleType:
    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace()  # type: ignore[attr-defined]
    torch.ones = lambda *_, **__: "ones"  # type: ignore[attr-defined]
    return torch


STUBS = """
import ctypes, json, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
torch = sys.modules["torch"] = ModuleType("torch")
torch.cuda = SimpleNamespace()
from vllm_forge.kernels.selection.inside.device import DeclaredDevice
from vllm_forge.kernels.selection.inside.driver import Device, build_stubs
folder = Path(sys.argv[1])
build_stubs(folder)
declared = DeclaredDevice(folder)
try:
    torch.cuda.get_device_capability()
except RuntimeError as error:
    early = str(error)
declared.declare(Device(name="Chip", compute_capability="12.1", memory_bytes=5 << 40, count=3))
nvml, cuda = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.CDLL("libcuda.so.1")
major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
name, memory = ctypes.create_string_buffer(96), (ctypes.c_ulonglong * 3)()
nvml.nvmlDeviceGetCudaComputeCapability(None, ctypes.byref(major), ctypes.byref(minor))
nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
nvml.nvmlDeviceGetName(None, name, 96)
nvml.nvmlDeviceGetMemoryInfo(None, memory)
print(json.dumps({
    "nvml": [major.value, minor.value, count.value, name.value.decode(), memory[0]],
    "torch": [*torch.cuda.get_device_capability(), torch.cuda.device_count(),
              torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory],
    "cuInit": cuda.cuInit(0), "early": early, "asked": declared.early_calls,
}))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc: apt-get install gcc libc6-dev")
def test_nvml_and_torch_see_the_declared_device_and_nothing_before(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUBS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["nvml"] == found["torch"] == [12, 1, 3, "Chip", 5 << 40]
    assert found["cuInit"] != 0
    assert "get_device_capability" in found["early"]
    assert found["asked"] == [found["early"]]


def test_undeclared_property_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    torch: Any = fake_torch()
    declared: Any = object.__new__(DeclaredDevice)
    declared._cuda, declared._nvml = torch.cuda, SimpleNamespace()
    monkeypatch.setattr(
        "vllm_forge.kernels.selection.inside.device.ctypes",
        SimpleNamespace(**dict.fromkeys(("c_int", "c_uint", "c_ulonglong"), Kind), c_char=Kind()),
    )
    declared.declare(Device(name="Chip", compute_capability="7.7", memory_bytes=1, count=8))
    with pytest.raises(AttributeError):
        _ = torch.cuda.get_device_properties(0).shared_memory_per_block


class Kind:
    """A ctypes type that takes any value."""

    def __mul__(self, _count: int) -> Kind:
        return self

    @staticmethod
    def in_dll(_library: Any, _name: str) -> SimpleNamespace:
        return SimpleNamespace()


# --- what vLLM said -------------------------------------------------------------------------------


def test_messages_are_one_line_without_what_changes() -> None:
    assert serving.clean("a\n  b at 0x7f0a in /tmp/tmpab12/model pid=31") == "a b at ... in ... ..."
    assert len(serving.clean("x" * 5000)) == serving.MOST_CHARS


def test_pydantic_error_is_reduced_to_its_messages() -> None:
    class Errors(ValueError):
        def errors(self, *, include_url: bool) -> list[dict[str, str]]:
            assert not include_url
            return [{"msg": "too many GPUs"}, {"msg": "no such dtype"}]

    assert serving.explain(Errors("1 validation error ...")) == "too many GPUs; no such dtype"
    assert serving.explain(KeyError("scale_fmt")) == "KeyError: 'scale_fmt'"


def test_own_error_is_not_attributed_to_vllm() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert not serving.raised_in_vllm(caught.value)


@pytest.mark.parametrize(
    ("package", "theirs"), [("vllm", True), ("pydantic", True), ("torch", False)]
)
def test_torch_error_is_not_attributed_to_vllm(tmp_path: Path, package: str, theirs: bool) -> None:
    """Without a GPU torch refuses what vLLM would have taken."""
    place = tmp_path / "site-packages" / package / "code.py"
    code = compile("raise RuntimeError('no driver')", str(place), "exec")
    with pytest.raises(RuntimeError) as caught:
        exec(code)  # noqa: S102 - its file name is the point
    assert serving.raised_in_vllm(caught.value) is theirs


def test_similar_names_are_those_of_this_release(monkeypatch: pytest.MonkeyPatch) -> None:
    envs = ModuleType("vllm.envs")
    envs.environment_variables = {"VLLM_USE_DEEP_GEMM": None, "VLLM_PORT": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.envs", envs)
    asked = dict.fromkeys(["VLLM_PORT", "VLLM_USE_DEEPGEMM", "VLMM_USE_DEEP_GEMM", "NCCL_NET"], "1")
    assert serving.similar_names(asked) == {
        "VLLM_USE_DEEPGEMM": "VLLM_USE_DEEP_GEMM",
        "VLMM_USE_DEEP_GEMM": "VLLM_USE_DEEP_GEMM",
    }


# --- after loading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("assert False, 'only sm_10x'", "AssertionError: only sm_10x (vllm/v1/code.py:1)"),
        (
            "assert (1, 2) == (1,)",
            "AssertionError: (vllm/v1/code.py:1: assert (1, 2) == (1,))",
        ),
    ],
)
def test_late_stop_has_vllms_words_and_its_place(
    statement: str, words: str, tmp_path: Path
) -> None:
    place = tmp_path / "site-packages" / "vllm" / "v1" / "code.py"
    place.parent.mkdir(parents=True)
    place.write_text(statement)
    with pytest.raises(serving.Refusal) as caught, startup.refused_late():
        exec(compile(statement, str(place), "exec"))  # noqa: S102 - its file name is the point
    assert (caught.value.kind, str(caught.value)) == ("start", words)


def test_own_error_is_not_a_late_stop() -> None:
    with pytest.raises(ValueError, match="invalid literal"), startup.refused_late():
        int("x")


@pytest.mark.parametrize(("breakable", "compiled", "captures"), [
    (True, None, True), (False, False, True), (False, True, False), (False, None, False),
])  # fmt: skip
def test_pieces_are_those_that_are_captured(
    breakable: bool, compiled: bool | None, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compiled``: do_not_compile of a compiled module; None: the model has none."""

    class Compiled:
        do_not_compile = compiled

    envs, wrapper = ModuleType("vllm.envs"), ModuleType("vllm.compilation.wrapper")
    envs.VLLM_USE_BREAKABLE_CUDAGRAPH = breakable  # type: ignore[attr-defined]
    wrapper.TorchCompileWithNoGuardsWrapper = Compiled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, envs.__name__, envs)
    monkeypatch.setitem(sys.modules, wrapper.__name__, wrapper)
    modules = [SimpleNamespace(), *([] if compiled is None else [Compiled()])]
    assert facts._captures_pieces(SimpleNamespace(modules=lambda: modules)) is captures


@pytest.mark.parametrize(("end", "thinking"), [("<think>", True), ("</think>", False)])
def test_chat_is_rendered_by_vllms_own_code(
    end: str, thinking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = ModuleType("vllm.tokenizers.registry")
    tokenizer = SimpleNamespace(apply_chat_template=lambda *_, **__: f"<User>1<Assistant>{end}")
    registry.cached_tokenizer_from_config = lambda _: tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    config = SimpleNamespace(model_config=SimpleNamespace(tokenizer_mode="deepseek_v4"))
    assert facts.chat_facts(config) == {"tokenizer_mode": "deepseek_v4", "thinking": thinking}
    config.model_config.tokenizer_mode = "hf"
    assert facts.chat_facts(config) is None


# --- experts --------------------------------------------------------------------------------------


@dataclasses.dataclass
class MoeConfig:
    swiglu_limit: float | None = 10.0


def select_nvfp4_moe_backend(config: MoeConfig, log: serving.Log) -> tuple[Any, Any]:
    """As vLLM's: candidates are dropped without a word where the model has a limit."""
    candidates = ["TRTLLM", "MARLIN"] if config.swiglu_limit else ["TRTLLM", "CUTLASS"]
    for name in candidates[:-1]:
        log.lines.append(
            (10, f"NvFp4 MoE backend '{name}' does not support the deployment configuration since "
             "kernel does not support current device cuda.")
        )  # fmt: skip
    return SimpleNamespace(name=candidates[-1]), MoeConfig


@pytest.fixture
def _fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = ModuleType("vllm.logger")
    for name in ("_print_debug_once", "_print_info_once", "_print_warning_once"):
        setattr(logger, name, SimpleNamespace(cache_clear=lambda: None))
    activation = ModuleType("vllm.model_executor.layers.fused_moe.activation")
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)
    monkeypatch.setitem(sys.modules, activation.__name__, activation)
    monkeypatch.setitem(sys.modules, "torch", fake_torch())


def call(log: serving.Log) -> SelectionCall:
    made = SelectionCall(
        function=select_nvfp4_moe_backend, args=(MoeConfig(),), kwargs={"log": log}
    )
    with log.listen() as made.lines:
        made.result = made.function(*made.args, **made.kwargs)
    return made


class Model:
    """One layer of experts, whose method makes a config of tensors that loading would make."""

    def __init__(self, method: Any, limit: float | None = 10.0) -> None:
        self.layer = Layer(method, limit)

    def named_modules(self) -> list[tuple[str, Any]]:
        return [("", self), ("model.layers.0.ffn.experts", self.layer)]


class Layer:
    def __init__(self, method: Any, limit: float | None) -> None:
        self.quant_method, self.swiglu_limit = method, limit


class Method:
    def __init__(self, limit: float | None) -> None:
        self.limit = limit

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        assert layer.w13_weight_scale_2
        return SimpleNamespace(gemm1_clamp_limit=self.limit)


class GatedMegaMoEExperts:
    """Experts without a quantization method."""


def test_mega_moe_is_not_silence() -> None:
    """Case 5: no selection and no quantization method, and experts all the same."""
    parts = {"model.layers.0.ffn": SimpleNamespace(swiglu_limit=10.0)}
    parts["model.layers.0.ffn.experts"] = GatedMegaMoEExperts()  # type: ignore[assignment]
    model = SimpleNamespace(named_modules=parts.items)
    moe = experts.moe_facts(model, [], serving.Log())
    assert moe is not None
    assert (moe["chosen"], moe["kernel"]) == ("DEEP_GEMM_MEGA_MOE", "GatedMegaMoEExperts")
    assert (moe["limit"], moe["clamp"]) == (10.0, "reaches")
    assert facts.module_schemes(model) == {"model.layers.*.ffn.experts": "GatedMegaMoEExperts"}


@pytest.mark.usefixtures("_fake_vllm")
class TestExperts:
    def test_rejected_and_limited_candidates_are_listed(self) -> None:
        log = serving.Log()
        facts = experts.moe_facts(None, [call(log)], log)
        assert facts is not None
        assert (facts["chosen"], facts["without_limit"]) == ("MARLIN", "CUTLASS")
        assert facts["rejected"] == [
            {"candidate": "TRTLLM", "reason": "kernel does not support current device cuda"},
            {"candidate": "CUTLASS", "reason": experts.LIMITED},
        ]

    @pytest.mark.parametrize(
        ("arrives", "clamp"), [(10.0, "reaches"), (None, "lost"), (7.0, "lost")]
    )
    def test_the_clamp_is_what_the_method_hands_on(self, arrives: float | None, clamp: str) -> None:
        log = serving.Log()
        facts = experts.moe_facts(Model(Method(arrives)), [call(log)], log)
        assert facts is not None
        assert (facts["clamp"], facts["limit"]) == (clamp, arrives)

    def test_a_model_without_a_limit_has_no_clamp(self) -> None:
        log = serving.Log()
        facts = experts.moe_facts(Model(Method(None), limit=None), [call(log)], log)
        assert facts is not None
        assert "clamp" not in facts

    @pytest.mark.parametrize(("given", "clamp"), [({"clamp_limit": 10.0}, "reaches"), ({}, "lost")])
    def test_a_method_that_calls_the_kernel_itself(
        self, monkeypatch: pytest.MonkeyPatch, given: dict[str, float], clamp: str
    ) -> None:
        module: Any = ModuleType("wna16")
        monkeypatch.setitem(sys.modules, "wna16", module)
        module.fused_marlin_moe = None

        class Direct(Method):
            kernel_backend = "Marlin"

            def apply(self, layer: Any, *_tensors: Any, **_shared: Any) -> None:
                assert layer.workspace
                module.fused_marlin_moe("x", layer.w2_g_idx_sort_indices, **given)

        Direct.__module__ = "wna16"
        facts = experts.moe_facts(Model(Direct(10.0)), [], serving.Log())
        assert facts is not None
        assert (facts["chosen"], facts["clamp"]) == ("MARLIN", clamp)

    def test_missing_attribute_raises(self) -> None:
        class Fails(Method):
            def get_fused_moe_quant_config(self, layer: Any) -> Any:
                return layer.swiglu_alpha

        log = serving.Log()
        with pytest.raises(AttributeError, match="swiglu_alpha"):
            experts.moe_facts(Model(Fails(None)), [call(log)], log)

    def test_layers_that_differ_are_an_error(self) -> None:
        log = serving.Log()
        one, other = call(log), call(log)
        other.result = (SimpleNamespace(name="OTHER"), MoeConfig)
        with pytest.raises(AssertionError, match="layers differ"):
            experts.moe_facts(None, [one, other], log)

    def test_failed_selection_keeps_its_error(self) -> None:
        log = serving.Log()
        failed = call(log)
        failed.result, failed.error = None, "NotImplementedError: none"
        facts = experts.moe_facts(None, [failed], log)
        assert facts is not None
        assert (facts["chosen"], facts["error"]) == (None, "NotImplementedError: none")


def test_schemes_are_grouped_by_module() -> None:
    class A: ...

    class B: ...

    def module(scheme: Any) -> Any:
        return SimpleNamespace(quant_method=A(), scheme=scheme)

    model = SimpleNamespace(
        named_modules=lambda: [
            ("", SimpleNamespace(quant_method=A())),
            ("model.layers.0.wo_a", module(B())),
            ("model.layers.1.wo_a", module(B())),
            ("model.layers.0.wo_b", module(B())),
            ("model.layers.1.wo_b", module(None)),
            ("lm_head", module(None)),
            ("norm", SimpleNamespace()),
        ]
    )
    assert facts.module_schemes(model) == {
        "lm_head": "A",
        "model.layers.*.wo_a": "B",
        "model.layers.*.wo_b": "A in 1, B in 1",
    }


@pytest.mark.parametrize(
    ("heads", "width", "family", "words"),
    [
        (16, 128, True, ""),
        (16, 256, True, "16 heads and 256 indices"),  # vllm-project/vllm#50720
        (32, 256, True, "32 heads and 256 indices"),
        (16, 256, False, ""),  # other attention
        (16, 0, True, ""),  # nothing drafts in blocks
    ],
)
def test_draft_without_a_sparse_kernel_stops_after_loading(
    heads: int, width: int, family: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FlashInfer 0.6.14 has them."""
    table = {(n, k) for n in (8, 16, 32, 64, 128) for k in (128, 512, 1024)}
    platform = SimpleNamespace(is_device_capability_family=lambda number: family and number == 120)
    stubs = {
        "vllm.platforms": SimpleNamespace(current_platform=platform),
        startup.SPARSE_SM120: SimpleNamespace(_DECODE_DSV4_DISPATCH=table),
    }
    for name, module in stubs.items():
        monkeypatch.setitem(sys.modules, name, module)
    builder = SimpleNamespace(noncausal_index_width=width) if width else object()
    groups = [[SimpleNamespace(metadata_builders=[builder])], []]
    layers = [SimpleNamespace(padded_heads=heads), object()]
    build: Any = SimpleNamespace(draft=SimpleNamespace(modules=lambda: layers))
    if not words:
        startup._check_sparse_kernels(groups, build)
        return
    with pytest.raises(serving.Refusal, match=words) as caught, startup.refused_late():
        startup._check_sparse_kernels(groups, build)
    assert caught.value.kind == "start"


class DeepGemm:
    """Stands for DeepGemmFp8BlockScaledMMKernel."""


class Cutlass:
    """A kernel that leaves weights as they are."""


@pytest.mark.parametrize(
    ("kernel", "stops"),
    [
        (DeepGemm(), False),
        (SimpleNamespace(base=Cutlass(), fallback=DeepGemm()), False),  # by the batch's size
        (Cutlass(), True),  # VLLM_USE_DEEP_GEMM=0
        (SimpleNamespace(base=DeepGemm(), fallback=Cutlass()), True),
        (None, False),  # BF16
    ],
    ids=["deep-gemm", "flashinfer-and-deep-gemm", "cutlass", "other-fallback", "unquantized"],
)
def test_output_projection_without_deep_gemms_layout_stops_in_the_first_forward(
    kernel: Any, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = SimpleNamespace(DeepGemmFp8BlockScaledMMKernel=DeepGemm)
    monkeypatch.setitem(sys.modules, startup.DEEP_GEMM, module)
    layers = {
        "model.layers.0.attn.wo_a": SimpleNamespace(
            is_bmm=True, scheme=SimpleNamespace(fp8_linear=kernel)
        ),
        "model.layers.0.attn.wo_b": SimpleNamespace(scheme=SimpleNamespace(fp8_linear=Cutlass())),
    }
    build: Any = SimpleNamespace(model=SimpleNamespace(named_modules=layers.items), draft=None)
    if not stops:
        startup.check_first_forward(build)
        return
    with pytest.raises(serving.Refusal, match="wo_a needs the layout of DeepGemm") as caught:
        startup.check_first_forward(build)
    assert caught.value.kind == "start"
