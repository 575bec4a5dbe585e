"""What lint says of public reports, by what each line's own vLLM said of them.

The rows are kernels/selection/probes.toml; their answers are in records/selection.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from vllm_forge.kernels.selection.questions import artifact_config, probe_questions
from vllm_forge.kernels.selection.record import SelectionRecord, read_selection
from vllm_forge.matrix import image_cell, load
from vllm_forge.matrix.model import Preset
from vllm_forge.serve.deployment import find_deployment
from vllm_forge.serve.rules import LintCase, judge, notes

ROOT = Path(__file__).parents[3]
MATRIX = load(ROOT)
EVERY = tuple(MATRIX.line)
# Probe -> line -> a line of words for each finding. One text for all lines where it is one.
RIGHT: dict[str, str | dict[str, str]] = {
    # Case 4: refused, except by the line that takes auto as FP8.
    "auto-kv-cache": {"0.26": "only supports fp8 kv-cache, got auto", "0.33": ""},
    # Case 5, on the SKU that has the kernels, and on the one that has not.
    "mega-moe": "experts are stored as nvfp4 and built as De",
    "mega-moe-sm120": "DeepGEMM MegaMoE requires SM100 GPUs",
    # Its sibling: a backend for other experts is refused, or passed over without a word.
    "backend-of-other-experts": {
        "0.22": "asks for --moe-backend=flashinfer_trtllm, and vLLM 0.22.1 takes MARLIN",
        "0.26": "WNA16 MoE backend 'FLASHINFER_TRTLLM' does not support the deployment",
        "0.33": "WNA16 MoE backend 'FLASHINFER_TRTLLM' does not support the deployment",
    },
    # Case 6.
    "eager": "CUDA graphs are off: every batch runs eager",
    # Case 7: 0.22 compiles the model, so that it has pieces without breakable graphs.
    "breakable-graphs-off": {
        "0.22": "",
        "0.26": "no piecewise CUDA graph is captured",
        "0.33": "no piecewise CUDA graph is captured",
    },
    # Its sibling: a mode that attention does not take.
    "full-graphs": {
        "0.22": "mode FULL, and vLLM 0.22.1 runs FULL_AND_PIECEWISE",
        "0.26": "mode FULL, and vLLM 0.26.0 runs FULL_DECODE_ONLY",
        "0.33": "",
    },
    # Stops after loading.
    "small-blocks": {
        "0.22": "kv_cache_utils.py:1549: assert max(sm_page_sizes) <= max(all_page_sizes)",
        "0.26": "kv_cache_utils.py:1659: assert max(sm_page_sizes) <= max(all_page_sizes)",
        "0.33": "No common block size for 128",
    },
    "decode-context-parallel": "DCP not support sliding window",
    # Case 11: nothing to find, and the GPUs are counted (tests/unit/matrix/test_flags.py).
    "data-parallel": "",
    "pipeline-parallel": "",
    # What published commands set for datacenter GPUs; 0.33 has another name for it.
    "fp4-indexer-cache": {"0.22": "", "0.26": "", "0.33": "Unexpected keyword argument"},
    "fp4-indexer-cache-sm120": {
        "0.26": "use_fp4_indexer_cache requires Blackwell datacenter GPUs",
        "0.33": "Unexpected keyword argument",
    },
    # Case 18: nothing is judged where vLLM chooses the length, or keeps weights elsewhere.
    "as-long-as-fits": "",
    "offloaded-weights": "",
    # Case 17.
    "longer-than-the-block": {
        "0.22": "",  # refused, as the artifact's row says
        "0.26": "128 x 8 = 1024: it runs eager\ndrafts blocks of 5 tokens, not 7",
        "0.33": "drafts blocks of 5 tokens, not 7",
    },
    "mtp-of-another-drafter": "has a drafter for method dspark, not mtp",
    # A workaround of many reports: the server stops in its first forward pass.
    "no-deep-gemm": "wo_a needs the layout of DeepGemmFp8BlockScaledMMKernel, and vLLM takes",
    "no-deep-gemm-sm120": "wo_a needs the layout of DeepGemmFp8BlockScaledMMKernel, and vLLM takes",
    "attention-of-other-models": "TRITON_MLA is not for this model's attention",
    "other-word-for-fp8": "",
    # Case 19.
    "unknown-parser": "deepseek-v4",
    "template-of-the-checkpoint": "does not render chats with its own code",
    # Case 8: one of vLLM's names is a finding, one of NCCL's a note.
    "typing-mistake": "no variable VLLM_USE_DEEPGEMM (did you mean 'VLLM_USE_DEEP_GEMM'?)",
}
CASES = [
    (question.name.removeprefix("probe/"), line)
    for line in EVERY
    for question in probe_questions(MATRIX, line)
]


@cache
def record(line: str) -> SelectionRecord:
    return read_selection(ROOT / "records", line)


def case(probe: str, line: str) -> LintCase:
    """The probe as a preset."""
    recorded = record(line)
    (question,) = (q for q, _ in recorded.probes if q.name == f"probe/{probe}")
    (sku,) = (name for name, row in MATRIX.sku.items() if row.device == question.device.name)
    own = question.environment.items() - MATRIX.sku[sku].env.items()
    preset = Preset(
        sku=sku,
        artifacts=(question.artifact,),
        tensor_parallel=4,
        flags=tuple(a for a in question.arguments if not a.startswith("--tensor-parallel-size")),
        env=dict(own),
        note="a deployment of a public report",
    )
    matrix = MATRIX.model_copy(update={"preset": {"probe": preset}})
    cell = image_cell(matrix, sku, line)
    return LintCase(
        **vars(find_deployment(matrix, cell, "probe", question.artifact)),
        answer=recorded.answers[question.name],
        published={},
        config=artifact_config(question.artifact),
    )


@pytest.mark.parametrize(("probe", "line"), CASES)
def test_lint_has_the_right_answer(probe: str, line: str) -> None:
    right = RIGHT[probe]
    words = right if isinstance(right, str) else right[line]
    found = [finding.what for finding in judge(case(probe, line))]
    for text, finding in zip(words.splitlines(), found, strict=True):
        assert text in finding


def test_every_probe_has_an_answer() -> None:
    assert {probe for probe, _ in CASES} == RIGHT.keys()


@pytest.mark.parametrize("line", EVERY)
def test_typing_mistake_in_another_librarys_variable_is_a_note(line: str) -> None:
    (note,) = notes(case("typing-mistake", line))
    assert note.endswith("unknown variable NCCL_P2P_DISBALE (did you mean 'NCCL_P2P_DISABLE'?)")


@pytest.mark.parametrize("line", EVERY)
def test_default_of_chats_is_what_vllm_renders(line: str) -> None:
    """Case 20."""
    chat = MATRIX.line[line].chat
    assert chat is not None
    said = {answer.chat.thinking for _, answer in record(line).rows if answer.chat is not None}
    assert said == {chat.thinking}
