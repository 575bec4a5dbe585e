"""Rules of the presets: each is seen to find its fault, and to keep quiet without it."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_forge.cli import main
from vllm_forge.kernels.errors import SelectionStaleError
from vllm_forge.kernels.selection.questions import (
    Answer,
    Chat,
    Choice,
    CudaGraphs,
    Draft,
    Engine,
    KvCache,
    Moe,
    Refusal,
    artifact_config,
    grid_question,
)
from vllm_forge.kernels.selection.record import read_selection, selection_inputs, write_selection
from vllm_forge.matrix import image_cell, load
from vllm_forge.matrix.model import Unserved
from vllm_forge.project import Project
from vllm_forge.serve import rules as rules_module
from vllm_forge.serve.deployment import find_deployment
from vllm_forge.serve.errors import PresetLintError
from vllm_forge.serve.rules import (
    RULES,
    LintCase,
    LintFinding,
    cases,
    divisible,
    experts_are_built_as_stored,
    graphs_cover_decode,
    judge,
    known_variables,
    lint_line,
    notes,
    retired_variables,
)
from vllm_forge.serve.variables import doubt, places

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[3]
CONFIG = {
    "num_attention_heads": 64,
    "o_groups": 8,
    "moe_intermediate_size": 2048,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "config_groups": {
            "group_0": {"targets": ["re:.*attn.wq$"], "weights": {"group_size": None}},
            "group_1": {"targets": [r"re:.*experts\.\d+\.w1$"], "weights": {"group_size": 16}},
        }
    },
}
DP = ("--data-parallel-size=3", "--max-num-seqs=128")
MARLIN = "VLLM_TEST_FORCE_FP8_MARLIN"
UNQUANTIZED, NVFP4 = "UnquantizedFusedMoEMethod", "CompressedTensorsW4A4Nvfp4MoEMethod"
EXPERTS, DRAFT_EXPERTS = "layers.*.ffn.experts", "mtp.*.ffn.experts"


def answer(**changed: Any) -> Answer:
    """What a line says of a preset without a fault: k = 2, 128 sequences."""
    fields: dict[str, Any] = {
        "name": "preset/b300-mtp/flash-nvfp4-fp8-mtp",
        "engine": engine(),
        "cuda_graphs": graphs(3, 384, 512 - 2),
        "attention": Choice(chosen="FLASHMLA_SPARSE"),
        "moe": Moe(chosen="FLASHINFER_TRTLLM", clamp="reaches", limit=10.0),
        "draft": drafting(2),
        "modules": {EXPERTS: NVFP4},
        "chat": Chat(tokenizer_mode="deepseek_v4", thinking=False),
    }
    return Answer(**(fields | changed))


def drafting(tokens: int) -> Draft:
    return Draft(
        architecture="DeepSeekV4MTPModel",
        speculative_tokens=tokens,
        modules={DRAFT_EXPERTS: UNQUANTIZED},
    )


def engine(**changed: Any) -> Engine:
    fields: dict[str, Any] = {
        "tensor_parallel": 4,
        "expert_parallel": False,
        "max_model_len": 1048576,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "fp8_ds_mla",
        "block_size": 256,
        "quantization": "compressed-tensors",
        "dtype": "bfloat16",
        "prefix_caching": True,
        "model_runner": "v2",
    }
    return Engine(**(fields | changed))


def graphs(*sizes: int) -> CudaGraphs:
    return CudaGraphs(
        mode="FULL_AND_PIECEWISE", sizes=sizes, capture_sizes=sizes, needed=384, covers=True
    )


def changed_preset(line: str, **row: Any) -> dict[str, Any]:
    """The fields of b300-mtp's deployment on a line, with some of the preset's row changed."""
    matrix = load(ROOT)
    preset = matrix.preset["b300-mtp"].model_copy(update=row)
    changed = matrix.model_copy(update={"preset": {**matrix.preset, "b300-mtp": preset}})
    cell = image_cell(changed, "b300", line)
    return vars(find_deployment(changed, cell, "b300-mtp", "flash-nvfp4-fp8-mtp"))


@pytest.fixture
def case(root: Path) -> Callable[..., LintCase]:
    """b300-mtp on the default line, with some of the preset's row and of the facts changed."""

    def make(
        said: Answer | None = None,
        *,
        published: dict[str, Answer] | None = None,
        config: dict[str, Any] | None = None,
        line: str = "0.26",
        **row: Any,
    ) -> LintCase:
        return LintCase(
            **changed_preset(line, **row),
            answer=said or answer(),
            published=published or {},
            config=CONFIG if config is None else config,
        )

    return make


def only(findings: list[LintFinding]) -> LintFinding:
    (finding,) = findings
    assert (finding.case.preset_name, finding.case.artifact_name) == (
        "b300-mtp",
        "flash-nvfp4-fp8-mtp",
    )
    assert finding.remedy
    return finding


def test_a_preset_without_a_fault_has_no_finding(case: Callable[..., LintCase]) -> None:
    assert judge(case()) == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("arguments", "parser refuses"),
        ("config", "refuses the configuration"),
        ("device", "no kernels"),
        ("start", "stops after it has loaded the weights"),
        ("failed", "question failed"),
    ],
)
def test_what_vllm_refuses_is_a_finding(
    kind: Any, words: str, case: Callable[..., LintCase]
) -> None:
    refused = Answer(name="q", refused=Refusal(kind=kind, message="unrecognized: --kv-cash"))
    finding = only(judge(case(refused)))
    assert words in finding.what
    assert "unrecognized: --kv-cash" in finding.what
    assert "vLLM 0.26.0" in finding.what


def test_an_invented_variable_is_a_finding(case: Callable[..., LintCase]) -> None:
    said = answer(unknown_environment=("VLLM_MAKE_IT_FAST",))
    finding = only(judge(case(said, env={"VLLM_MAKE_IT_FAST": "1"})))
    assert "no variable VLLM_MAKE_IT_FAST" in finding.what


@pytest.mark.parametrize(
    "name",
    [
        "NCCL_P2P_DISABLE", "NCCL_IB_ECE_ENABLE", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS",
        "FLASHINFER_DISABLE_VERSION_CHECK", "FLASHINFER_CUBIN_DIR", "HF_HUB_OFFLINE",
        "TORCH_NCCL_NAN_CHECK", "DG_JIT_DEBUG", "CUDA_DEVICE_ORDER", "https_proxy",
        "RES_OPTIONS",
    ],
)  # fmt: skip
def test_variables_of_other_libraries_are_accepted(
    name: str, case: Callable[..., LintCase]
) -> None:
    """Case 8 of the field reports, and its siblings of case 3."""
    item = case(env={name: "1"})
    assert (judge(item), notes(item)) == ([], [])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("NCCL_P2P_DISBALE", "NCCL_P2P_DISABLE"),
        ("PYTORCH_CUDA_ALLOC_CONFIG", "PYTORCH_CUDA_ALLOC_CONF"),
        ("HF_HUB_OFLINE", "HF_HUB_OFFLINE"),
    ],
)
def test_near_miss_of_a_known_variable_is_a_note(
    name: str, near: str, case: Callable[..., LintCase]
) -> None:
    item = case(env={name: "1"})
    assert judge(item) == []
    assert notes(item) == [f"preset b300-mtp: unknown variable {name} (did you mean {near!r}?)"]


def test_misspelt_prefix_of_vllm_is_a_note(case: Callable[..., LintCase]) -> None:
    item = case(
        answer(similar={"VLMM_USE_DEEP_GEMM": "VLLM_USE_DEEP_GEMM"}),
        env={"VLMM_USE_DEEP_GEMM": "1"},
    )
    assert judge(item) == []
    (note,) = notes(item)
    assert "did you mean 'VLLM_USE_DEEP_GEMM'?" in note


def test_variable_of_nobody_is_a_note(case: Callable[..., LintCase]) -> None:
    item = case(env={"MY_OWN": "1"})
    assert judge(item) == []
    assert notes(item) == [
        "preset b300-mtp: unknown variable MY_OWN: no library of the image is known to read it"
    ]


def test_listed_variables_are_beyond_doubt() -> None:
    assert [name for name in places() if doubt(name)] == []


def test_near_miss_of_a_vllm_variable_is_a_finding_with_its_name(
    case: Callable[..., LintCase],
) -> None:
    name = "VLLM_USE_DEEPGEMM"
    said = answer(unknown_environment=(name,), similar={name: "VLLM_USE_DEEP_GEMM"})
    assert "(did you mean 'VLLM_USE_DEEP_GEMM'?)" in only(judge(case(said, env={name: "1"}))).what


def test_known_variable_has_no_finding(case: Callable[..., LintCase]) -> None:
    assert judge(case(env={"VLLM_USE_DEEP_GEMM": "1"})) == []


def test_force_marlin_where_it_is_gone_names_the_replacement(case: Callable[..., LintCase]) -> None:
    said = answer(
        unknown_environment=(MARLIN,), chat=Chat(tokenizer_mode="deepseek_v4", thinking=True)
    )
    finding = only(judge(case(said, line="0.33", env={MARLIN: "1"})))
    assert "vLLM 0.33.0 has no variable" in finding.what
    assert "52182" in finding.what
    assert "--moe-backend=marlin" in finding.remedy


def test_force_marlin_where_the_release_loses_the_clamp(case: Callable[..., LintCase]) -> None:
    """Our series mends it; whoever copies the command to the published release has no series."""
    forced = answer(moe=Moe(chosen="MARLIN", clamp="reaches", limit=10.0))
    lost = {MARLIN: answer(moe=Moe(chosen="MARLIN", clamp="lost"))}
    finding = only(judge(case(forced, line="0.22", env={MARLIN: "1"}, published=lost)))
    assert "vLLM 0.22.1 as published" in finding.what
    assert "the clamp is lost" in finding.what
    assert "--moe-backend=marlin" in finding.remedy


def test_force_marlin_where_it_is_harmless(case: Callable[..., LintCase]) -> None:
    kept = {MARLIN: answer(moe=Moe(chosen="MARLIN", clamp="reaches", limit=10.0))}
    assert judge(case(env={MARLIN: "1"}, published=kept)) == []


def test_a_lost_clamp_is_a_finding_without_any_variable(case: Callable[..., LintCase]) -> None:
    finding = only(judge(case(answer(moe=Moe(chosen="MARLIN", clamp="lost")))))
    assert "without swiglu_limit" in finding.what


def test_no_backend_for_the_experts(case: Callable[..., LintCase]) -> None:
    said = answer(moe=Moe(chosen=None, error="NotImplementedError: none"))
    assert "no backend for the experts: NotImplementedError" in only(judge(case(said))).what


def test_the_pcie_collapse(case: Callable[..., LintCase]) -> None:
    """Captured up to max_num_seqs, k = 1: a batch of 8 sequences has 16 tokens and runs eager."""
    said = answer(
        engine=engine(max_num_seqs=8),
        cuda_graphs=graphs(2, 4, 8),
        draft=drafting(1),
    )
    finding = only(judge(case(said, speculative_tokens=1)))
    assert "up to 8 tokens" in finding.what
    assert "8 x 2 = 16: it runs eager" in finding.what
    assert "--max-num-seqs=4" in finding.remedy


EAGER = CudaGraphs(mode="NONE", sizes=(), capture_sizes=(), needed=384, covers=False)


def test_enforce_eager_has_its_own_remedy(case: Callable[..., LintCase]) -> None:
    """Case 6."""
    flags = ("--kv-cache-dtype=fp8", "--enforce-eager")
    finding = only(judge(case(answer(cuda_graphs=EAGER), flags=flags)))
    assert "every batch runs eager" in finding.what
    assert finding.remedy == "take --enforce-eager out of preset.b300-mtp"


def test_graphs_that_something_else_turns_off_are_a_finding(case: Callable[..., LintCase]) -> None:
    assert "turns them off" in only(judge(case(answer(cuda_graphs=EAGER)))).remedy


@pytest.mark.parametrize("mode", ["FULL_AND_PIECEWISE", "FULL_DECODE_ONLY"])
def test_breakable_graphs_off_are_a_finding(mode: str, case: Callable[..., LintCase]) -> None:
    """Case 7: model runner v1 keeps the mode, v2 overrides it; prefill runs eager with both."""
    off = graphs(3, 384).model_copy(
        update={"asked": "FULL_AND_PIECEWISE", "mode": mode, "piecewise": False}
    )
    variable = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}
    finding = only(judge(case(answer(cuda_graphs=off), env=variable)))
    assert "no piecewise CUDA graph is captured" in finding.what
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" in finding.remedy


def test_mode_that_attention_does_not_take_is_a_finding(case: Callable[..., LintCase]) -> None:
    """--compilation-config={"cudagraph_mode":"FULL"} on any line."""
    full = graphs(3, 384).model_copy(
        update={"asked": "FULL", "mode": "FULL_DECODE_ONLY", "piecewise": False}
    )
    assert "mode FULL, and vLLM 0.26.0 runs FULL_DECODE_ONLY" in (
        only(judge(case(answer(cuda_graphs=full)))).what
    )


def test_mode_without_pieces_that_was_asked_for_is_accepted(case: Callable[..., LintCase]) -> None:
    mode = "FULL_DECODE_ONLY"
    decode = graphs(3, 384).model_copy(update={"asked": mode, "mode": mode, "piecewise": False})
    assert judge(case(answer(cuda_graphs=decode))) == []


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("moe", "its experts are unknown"),
        ("attention", "its attention are unknown"),
        ("cuda_graphs", "its CUDA graphs are unknown"),
        ("engine", "its settings are unknown"),
    ],
)
def test_answer_without_a_part_is_a_finding(
    part: str, words: str, case: Callable[..., LintCase]
) -> None:
    """Case 5: silence is no consent."""
    assert words in only(judge(case(answer(**{part: None})))).what


def test_mega_moe_does_not_take_nvfp4(case: Callable[..., LintCase]) -> None:
    """Case 5: its parameters are those of MXFP4 (0.26.0, nvidia/model.py:195)."""
    said = answer(
        modules={EXPERTS: "DeepseekV4MegaMoEExperts"},
        moe=Moe(chosen="DEEP_GEMM_MEGA_MOE", clamp="reaches", limit=10.0),
    )
    finding = only(judge(case(said)))
    assert "stored as nvfp4 and built as DeepseekV4MegaMoEExperts" in finding.what
    assert of_artifact(case(said), experts="mxfp4") == []


def test_backend_that_is_passed_over_is_a_finding(case: Callable[..., LintCase]) -> None:
    flags = ("--kv-cache-dtype=fp8", "--moe-backend=flashinfer_cutlass")
    finding = only(judge(case(flags=flags)))
    assert "asks for --moe-backend=flashinfer_cutlass, and vLLM 0.26.0 takes FLASHINFER_TRTLLM" in (
        finding.what
    )
    for taken in ("--moe-backend=flashinfer_trtllm", "--moe-backend=auto"):
        assert judge(case(flags=("--kv-cache-dtype=fp8", taken))) == []


def test_other_word_for_fp8_is_accepted(case: Callable[..., LintCase]) -> None:
    """vLLM's config/cache.py: fp8 is fp8_e4m3."""
    assert judge(case(flags=("--kv-cache-dtype=fp8_e4m3",))) == []
    finding = only(judge(case(flags=("--kv-cache-dtype=fp8_e5m2",))))
    assert "asks for a KV cache in fp8_e5m2, and vLLM 0.26.0 stores fp8" in finding.what


def test_attention_that_is_passed_over_is_a_finding(case: Callable[..., LintCase]) -> None:
    said = answer(attention=Choice(chosen="FLASHMLA_SPARSE_DSV4"))
    flags = ("--kv-cache-dtype=fp8", "--attention-backend=triton_mla")
    words = "asks for --attention-backend=triton_mla, and vLLM 0.26.0 takes FLASHMLA_SPARSE_DSV4"
    assert words in only(judge(case(said, flags=flags))).what
    flags = ("--kv-cache-dtype=fp8", "--attention-config.backend=TRITON_MLA")
    assert "takes FLASHMLA_SPARSE_DSV4" in only(judge(case(said, flags=flags))).what
    for taken in ("auto", "FLASHMLA_SPARSE", "flashmla_sparse_dsv4"):
        flags = ("--kv-cache-dtype=fp8", f"--attention-backend={taken}")
        assert judge(case(said, flags=flags)) == []


def test_limit_that_nobody_followed_is_a_finding(case: Callable[..., LintCase]) -> None:
    said = answer(moe=Moe(chosen="NEW_BACKEND", clamp="none"))
    limited = CONFIG | {"swiglu_limit": 10.0}
    assert "gets swiglu_limit is unknown" in only(judge(case(said, config=limited))).what
    assert judge(case(said)) == []


@pytest.mark.parametrize("flag", ["--tool-call-parser=hermes", "--reasoning_parser=deepseek_r1"])
def test_parser_of_another_model_is_a_note(flag: str, case: Callable[..., LintCase]) -> None:
    """Case 19: vLLM takes any name that it knows, and the user may have a reason."""
    item = case(flags=("--kv-cache-dtype=fp8", flag))
    assert judge(item) == []
    (note,) = notes(item)
    assert f"{flag.replace('_parser', '-parser')} replaces deepseek_v4, " in note


def test_own_words_for_the_lines_parsers_are_accepted(case: Callable[..., LintCase]) -> None:
    own = ("--tool-call-parser=deepseek_v4", "--no-enable-auto-tool-choice")
    item = case(flags=("--kv-cache-dtype=fp8", *own))
    assert (judge(item), notes(item)) == ([], [])


def test_other_thinking_than_the_row_says_is_a_finding(case: Callable[..., LintCase]) -> None:
    """Case 20: 0.33 thinks by default, earlier lines do not."""
    thinks = answer(chat=Chat(tokenizer_mode="deepseek_v4", thinking=True))
    assert judge(case(thinks, line="0.33")) == []
    assert "line.0.26.chat says that a chat does not think" in only(judge(case(thinks))).what


def test_chat_without_this_models_renderer_is_a_finding(case: Callable[..., LintCase]) -> None:
    flags = ("--kv-cache-dtype=fp8", "--tokenizer-mode=hf")
    finding = only(judge(case(answer(chat=None), flags=flags)))
    assert "does not render chats with its own code" in finding.what


@given(st.integers(1, 64), st.integers(0, 3), st.lists(st.integers(1, 80), max_size=6, unique=True))
def test_coverage_is_arithmetic(seqs: int, k: int, counts: list[int]) -> None:
    """Multiples of k + 1 cover a batch exactly when the largest is max_num_seqs x (k + 1)."""
    said = answer(
        engine=engine(max_num_seqs=seqs),
        cuda_graphs=graphs(*sorted(count * (k + 1) for count in counts)),
    )
    item = LintCase(
        **changed_preset("0.26", speculative_tokens=k),
        answer=said,
        published={},
        config=CONFIG,
    )
    findings = list(graphs_cover_decode(item))
    assert bool(findings) == (max(counts, default=0) < seqs)


def test_missing_draft_layer_is_a_finding(case: Callable[..., LintCase]) -> None:
    assert "drafts 2 tokens, and vLLM 0.26.0 0" in only(judge(case(answer(draft=None)))).what


def test_k_that_the_drafter_does_not_take(case: Callable[..., LintCase]) -> None:
    two = CONFIG | {"num_nextn_predict_layers": 2}
    said = answer(
        cuda_graphs=graphs(4, 512),
        draft=drafting(3),
    )
    assert "must be a multiple" in only(judge(case(said, config=two, speculative_tokens=3))).what
    none = CONFIG | {"num_nextn_predict_layers": 0}
    assert "the drafter has 0 layers" in only(judge(case(config=none))).what


@pytest.mark.parametrize("block", [5, 3, None])
def test_dspark_drafts_whole_blocks(case: Callable[..., LintCase], block: int | None) -> None:
    draft = drafting(5).model_copy(update={"architecture": "DSparkDraftModel"})
    said = answer(cuda_graphs=graphs(6, 768), draft=draft)
    item = case(said, speculative_tokens=5, speculative_method="dspark")
    findings = judge(with_artifact(item, drafter="dspark", block=block))
    expected = (
        [] if block == 5 else [f"{item.artifact_name} drafts blocks of {block} tokens, not 5"]
    )
    assert [finding.what.partition(":")[0] for finding in findings] == expected


def test_method_of_another_drafter_is_a_finding(case: Callable[..., LintCase]) -> None:
    """vLLM builds MTP of any config, and loads a part of what DSpark has under the same names."""
    finding = only(judge(with_artifact(case(answer()), drafter="dspark", block=5)))
    assert "has a drafter for method dspark, not mtp" in finding.what


def test_refusal_that_a_row_explains_passes(case: Callable[..., LintCase]) -> None:
    refused = answer(refused=Refusal(kind="config", message="unknown method"), draft=None)
    assert "unknown method" in only(judge(case(refused))).what
    row = Unserved(lines=("0.26",), drafting=True, reason="this line has no such method")
    item = case(refused)
    artifact = item.artifact.model_copy(update={"unserved": (row,)})
    assert judge(replace(item, artifact=artifact)) == []


def test_other_kv_cache_dtype_is_a_finding(case: Callable[..., LintCase]) -> None:
    said = answer(engine=engine(kv_cache_dtype="bfloat16"))
    assert (
        "asks for a KV cache in fp8, and vLLM 0.26.0 stores bfloat16"
        in only(judge(case(said))).what
    )


def test_other_block_size_is_a_finding(case: Callable[..., LintCase]) -> None:
    flags = ("--kv-cache-dtype=fp8", "--block-size=16")
    assert "blocks of 16 tokens, and vLLM 0.26.0 takes 256" in only(judge(case(flags=flags))).what
    assert judge(case(flags=("--block-size=16", "--block-size=256"))) == []


def test_block_without_compressed_tokens_is_a_finding(case: Callable[..., LintCase]) -> None:
    """As vLLM 0.26.0 makes of --block-size=16: a layer that keeps one token of 128 gets none."""
    rows = [(21, 2880), (20, 0)]
    cache = tuple(
        KvCache(layers=n, kind="MLAAttentionSpec", block_size=16, page_bytes=size, window=None)
        for n, size in rows
    )
    finding = only(judge(case(answer(engine=engine(block_size=16), kv_cache=cache))))
    assert "a block of 16 tokens is too small: 20 layers" in finding.what


def test_unsupported_block_size_is_a_finding(case: Callable[..., LintCase]) -> None:
    said = answer(attention=Choice(chosen=None, error="block_size 16 not supported"))
    assert "block_size 16 not supported" in only(judge(case(said))).what


NOT_ON_026 = Unserved(lines=("0.26",), reason="this line builds its experts as something else")


def built(experts: str, draft_experts: str | None) -> Answer:
    """What a line says that builds the experts so; without a draft layer for None."""
    draft = None
    if draft_experts is not None:
        draft = Draft(
            architecture="DeepSeekV4MTPModel",
            speculative_tokens=2,
            modules={DRAFT_EXPERTS: draft_experts},
        )
    return answer(modules={EXPERTS: experts}, draft=draft)


def with_artifact(case: LintCase, **row: Any) -> LintCase:
    """The case with some of the artifact's row changed."""
    return replace(case, artifact=case.artifact.model_copy(update=row))


def of_artifact(case: LintCase, **row: Any) -> list[LintFinding]:
    """The rule's findings, with some of the artifact's row changed."""
    changed = with_artifact(case, **row)
    return [LintFinding(changed, *row) for row in experts_are_built_as_stored(changed)]


@pytest.mark.parametrize(
    ("stored", "scheme"),
    [
        ("nvfp4", NVFP4),
        ("nvfp4", "ModelOptNvFp4FusedMoE"),
        ("w4a16", "CompressedTensorsWNA16MarlinMoEMethod"),
        ("mxfp4", "Mxfp4MoEMethod"),
    ],
)
def test_experts_built_as_they_are_stored(
    stored: str, scheme: str, case: Callable[..., LintCase]
) -> None:
    assert of_artifact(case(built(scheme, UNQUANTIZED)), experts=stored) == []


def test_other_experts_scheme_is_a_finding(case: Callable[..., LintCase]) -> None:
    finding = only(judge(case(built(UNQUANTIZED, UNQUANTIZED))))
    assert f"experts are stored as nvfp4 and built as {UNQUANTIZED}" in finding.what
    assert "artifact.flash-nvfp4-fp8-mtp.unserved" in finding.remedy


def test_other_draft_experts_scheme_is_a_finding(case: Callable[..., LintCase]) -> None:
    finding = only(judge(case(built(NVFP4, NVFP4))))
    assert f"draft experts are stored as bf16 and built as {NVFP4}" in finding.what
    assert judge(case(built(NVFP4, UNQUANTIZED))) == []


def test_a_draft_layer_that_the_artifact_lacks(case: Callable[..., LintCase]) -> None:
    """Nothing to compare it with; another rule finds the layer."""
    assert of_artifact(case(built(NVFP4, NVFP4)), mtp="none") == []


def test_unserved_row_accepts_another_scheme(case: Callable[..., LintCase]) -> None:
    item = case(built(UNQUANTIZED, UNQUANTIZED))
    assert of_artifact(item, unserved=(NOT_ON_026,)) == []
    elsewhere = NOT_ON_026.model_copy(update={"lines": ("0.33",)})
    assert "built as" in only(of_artifact(item, unserved=(elsewhere,))).what


def test_a_row_about_drafting_does_not_accept_the_target(case: Callable[..., LintCase]) -> None:
    row = NOT_ON_026.model_copy(update={"drafting": True})
    assert of_artifact(case(built(NVFP4, NVFP4)), unserved=(row,)) == []
    plain = case(built(UNQUANTIZED, None), speculative_tokens=0)
    assert "built as" in only(of_artifact(plain, unserved=(row,))).what


def test_stale_unserved_row_is_a_finding(case: Callable[..., LintCase]) -> None:
    finding = only(of_artifact(case(built(NVFP4, UNQUANTIZED)), unserved=(NOT_ON_026,)))
    assert "says that it is not served, but it is" in finding.what
    assert "delete the row" in finding.remedy


def test_refusal_has_no_finding_about_experts(case: Callable[..., LintCase]) -> None:
    refused = Answer(name="q", refused=Refusal(kind="device", message="no kernels"))
    assert of_artifact(case(refused), unserved=(NOT_ON_026,)) == []


@pytest.mark.parametrize("parallel", [1, 2, 4, 8])
def test_tensor_parallel_that_divides(parallel: int, case: Callable[..., LintCase]) -> None:
    assert judge(case(tensor_parallel=parallel)) == []


def test_tensor_parallel_that_does_not(case: Callable[..., LintCase]) -> None:
    findings = judge(case(tensor_parallel=16))
    assert "o_groups = 8 is not divided" in only(findings).what
    assert {f.what.split(" = ")[0] for f in judge(case(tensor_parallel=3))} == {
        "num_attention_heads",
        "o_groups",
        "moe_intermediate_size / group_size 16",
    }


def test_experts_are_split_over_all_ranks_without_expert_parallelism(
    case: Callable[..., LintCase],
) -> None:
    """128 groups on 3 ranks of data parallelism: the heads are whole on each of them."""
    flags = (*DP, "--kv-cache-dtype=fp8")
    found = judge(case(tensor_parallel=1, flags=flags))
    assert only(found).what.startswith("moe_intermediate_size / group_size 16 = 128 is not divided")
    assert judge(case(tensor_parallel=1, flags=(*flags, "--enable-expert-parallel"))) == []


def test_weights_that_do_not_fit_are_a_finding(case: Callable[..., LintCase]) -> None:
    finding = only(judge(case(flags=("--gpu-memory-utilization=0.15", "--kv-cache-dtype=fp8"))))
    assert "42.8 GiB for the weights" in finding.what
    assert finding.remedy.startswith("--gpu-memory-utilization of at least 0.1")


def test_divisible_counts() -> None:
    assert divisible(CONFIG) == {
        "num_attention_heads": 64,
        "o_groups": 8,
        "moe_intermediate_size / group_size 16": 128,
    }


def test_every_rule_is_in_the_list() -> None:
    rules = {
        function
        for function in vars(rules_module).values()
        if inspect.isgeneratorfunction(function)
        and list(inspect.signature(function).parameters) == ["case"]
    }
    assert rules == set(RULES)


# --- the committed facts -------------------------------------------------------------------------

LINES = tuple(load(ROOT).line)


@pytest.mark.parametrize("line", LINES)
def test_committed_presets_have_no_finding(line: str, root: Path) -> None:
    assert lint_line(Project(root), line) == ([], [])


@pytest.mark.parametrize(
    ("artifact", "lines"),
    [("redhat-nvfp4-fp8", {"0.33"}), ("nvidia-nvfp4", {"0.22", "0.26"})],
)
def test_without_its_row_an_artifact_is_a_finding(
    artifact: str, lines: set[str], root: Path
) -> None:
    """The rows of the committed matrix are those that the committed facts ask for."""
    project = Project(root)
    matrix = project.matrix
    bare = matrix.artifact[artifact].model_copy(update={"unserved": ()})
    vars(project)["matrix"] = matrix.model_copy(
        update={"artifact": {**matrix.artifact, artifact: bare}}
    )
    found = {
        line: case.artifact_name
        for line in LINES
        for case in cases(project, read_selection(root / "records", line))
        if list(experts_are_built_as_stored(case))
    }
    assert found == dict.fromkeys(lines, artifact)


@pytest.mark.parametrize("line", LINES)
def test_every_preset_of_the_line_is_judged(line: str, root: Path) -> None:
    matrix = load(root)
    judged = [
        (c.preset_name, c.artifact_name)
        for c in cases(Project(root), read_selection(root / "records", line))
    ]
    assert judged == [
        (name, artifact)
        for name, preset in matrix.preset.items()
        if preset.sku in matrix.line[line].skus
        for artifact in preset.artifacts
    ]


def test_retired_variables_are_judged_by_the_published_release(root: Path) -> None:
    recorded = read_selection(root / "records", "0.22")
    for case in cases(Project(root), recorded):
        question = grid_question(case.preset.sku, case.artifact_name, MARLIN)
        assert case.published == {MARLIN: recorded.published_answers[question]}


def forced(root: Path, line: str) -> LintCase:
    """The default preset with the variable of the published commands, by the committed facts."""
    recorded = read_selection(root / "records", line)
    question = grid_question("b300", "flash-nvfp4-fp8-mtp", MARLIN)
    return LintCase(
        **changed_preset(line, env={MARLIN: "1"}),
        answer=recorded.answers[question],
        published={MARLIN: recorded.published_answers[question]},
        config=artifact_config("flash-nvfp4-fp8-mtp"),
    )


def of_variables(case: LintCase) -> list[LintFinding]:
    rows = [*known_variables(case), *retired_variables(case)]
    return [LintFinding(case, *row) for row in rows]


def test_forced_marlin_on_the_line_that_loses_the_clamp(root: Path) -> None:
    case = forced(root, "0.22")
    finding = only(of_variables(case))
    assert "vLLM 0.22.1 as published does not hand it swiglu_limit: the clamp is lost" in (
        finding.what
    )
    assert case.answer.moe is not None
    assert case.answer.moe.clamp == "reaches"  # the series of this line mends it


def test_forced_marlin_where_vllm_clamps(root: Path) -> None:
    case = forced(root, "0.26")
    assert of_variables(case) == []
    assert case.answer.moe is not None
    assert (case.answer.moe.chosen, case.answer.moe.clamp) == ("MARLIN", "reaches")


def test_forced_marlin_unknown_to_vllm(root: Path) -> None:
    finding = only(of_variables(forced(root, "0.33")))
    assert "has no variable VLLM_TEST_FORCE_FP8_MARLIN any more" in finding.what
    assert "--moe-backend=marlin" in finding.remedy


@pytest.fixture
def checkout(checkout: Path, root: Path) -> Path:
    """Also with the recorded kernel selection."""
    shutil.copytree(root / "records/selection", checkout / "records/selection")
    return checkout


def test_lint_of_the_committed_rows(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint"]) == 0
    assert capsys.readouterr().out.endswith(": no findings\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"--max-num-seqs=128"', '"--max-num-seqs=128", "--go-faster"'),
        ("[preset.b300-mtp]\n", '[preset.b300-mtp]\nenv = { VLLM_GO_FASTER = "1" }\n'),
        ("speculative_tokens = 2", "speculative_tokens = 3"),
    ],
)
def test_a_changed_preset_fails_until_its_line_was_asked(
    old: str, new: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "matrix.toml"
    path.write_text(path.read_text().replace(old, new))
    assert main(["lint", "--line=0.26"]) == SelectionStaleError.exit_code
    err = capsys.readouterr().err
    assert "question preset/b" in err
    assert "nox -s forge -- kernels select --record --line 0.26" in err


def answered(checkout: Path, environment: dict[str, str], **changed: Any) -> None:
    """Let the line have been asked of b300-mtp today, and have given another answer."""
    recorded = read_selection(checkout / "records", "0.26")
    rows = tuple(
        (
            question.model_copy(update={"environment": {**question.environment, **environment}}),
            answer.model_copy(update=changed),
        )
        if question.name.startswith("preset/b300-mtp/")
        else (question, answer)
        for question, answer in recorded.rows
    )
    inputs = selection_inputs(Project(checkout), "0.26")
    write_selection(checkout / "records", replace(recorded, rows=rows, inputs=inputs))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"refused": Refusal(kind="arguments", message="unrecognized arguments: --go-faster")},
            "unrecognized arguments: --go-faster",
        ),
        ({"cuda_graphs": graphs(3, 96)}, "captured up to 96 tokens"),
        ({"moe": Moe(chosen="MARLIN", clamp="lost")}, "without swiglu_limit"),
    ],
)
def test_a_finding_fails_the_command(
    changed: Any, words: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(checkout, {}, **changed)
    assert main(["lint", "--line=0.26"]) == PresetLintError.exit_code
    assert words in capsys.readouterr().err


def test_an_invented_variable_fails_the_command(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row is edited, the line is asked again and says that it has no such variable."""
    path = checkout / "matrix.toml"
    text = path.read_text()
    path.write_text(
        text.replace("[preset.b300-mtp]\n", '[preset.b300-mtp]\nenv = { VLLM_FASTER = "1" }\n')
    )
    answered(checkout, {"VLLM_FASTER": "1"}, unknown_environment=("VLLM_FASTER",))
    assert main(["lint", "--line=0.26"]) == PresetLintError.exit_code
    assert "vLLM 0.26.0 has no variable VLLM_FASTER" in capsys.readouterr().err
