"""The checks inside an image need their scripts and a declared GPU only."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from vllm_forge.images.checks import CHECK_ARGV, any_user, check_names, judge, write_inputs
from vllm_forge.images.errors import ImageCheckError
from vllm_forge.kernels.selection.questions import declared_device
from vllm_forge.matrix import load

# As image_checks.py does it: the process that declares the GPU and those it starts see it.
DECLARE = """
import json, subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import image_checks
expect = json.loads((image_checks.INPUTS / "expect.json").read_text())
image_checks.declare_device(expect, Path(sys.argv[2]))
exec(sys.argv[3])
subprocess.run([sys.executable, "-c", sys.argv[3]], check=True)
"""
ASK = """
import ctypes
nvml, cuda = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.CDLL("libcuda.so.1")
major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_uint()
name, memory = ctypes.create_string_buffer(96), (ctypes.c_ulonglong * 3)()
nvml.nvmlDeviceGetCudaComputeCapability(None, ctypes.byref(major), ctypes.byref(minor))
nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
nvml.nvmlDeviceGetName(None, name, 96)
nvml.nvmlDeviceGetMemoryInfo(None, memory)
print(major.value, minor.value, count.value, memory[0], cuda.cuInit(0), name.value.decode(),
      flush=True)
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc: apt-get install gcc libc6-dev")
@pytest.mark.parametrize("name", ["b300", "rtxpro6000"])
def test_scripts_declare_the_gpu_of_the_sku(name: str, root: Path, tmp_path: Path) -> None:
    sku = load(root).sku[name]
    write_inputs(tmp_path / "mnt", {"device": declared_device(sku, count=1).model_dump()})
    (tmp_path / "stubs").mkdir()
    argv = ["-I", "-c", DECLARE, str(tmp_path / "mnt"), str(tmp_path / "stubs"), ASK]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=True)
    capability = sku.compute_capability.replace(".", " ")
    seen = f"{capability} 1 {sku.memory_gb * 10**9} 100 {sku.device}"
    assert done.stdout.splitlines() == [seen, seen]


def test_inputs_are_readable_and_older_ones_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    (folder / "of-before").touch()
    write_inputs(folder, {"a": 1})
    assert {path.name for path in folder.iterdir()} == {
        "image_checks.py",
        "driver.py",
        "expect.json",
    }
    assert json.loads((folder / "expect.json").read_text()) == {"a": 1}
    assert all(path.stat().st_mode & 0o555 == 0o555 for path in (folder, *folder.iterdir()))
    assert CHECK_ARGV[-1] == "/mnt/image_checks.py"


def verdicts(*names: str, **changes: object) -> str:
    row = {"passed": True, "detail": "", "seconds": 0.1} | changes
    return "noise\n" + json.dumps(dict.fromkeys(names, row)) + "\n"


ALL = check_names(compiler=True)
USER = sorted(name for name in ALL if name.startswith("any-user"))
IMAGE = sorted(ALL - set(USER))


def test_every_verdict_once_is_accepted() -> None:
    assert judge([verdicts(*IMAGE), verdicts(*USER)], ALL).keys() == ALL


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (["{}", "{}"], "missing or unknown verdicts: any-user-imports"),
        ([verdicts(*IMAGE), "{}"], "missing or unknown verdicts: any-user-imports, any-user"),
        ([verdicts(*IMAGE[1:]), verdicts(*USER)], f"missing or unknown verdicts: {IMAGE[0]}"),
        ([verdicts(*IMAGE, "more"), verdicts(*USER)], "missing or unknown verdicts: more"),
        ([verdicts(*IMAGE), verdicts(*USER, IMAGE[0])], f"duplicate verdicts: {IMAGE[0]}"),
        ([verdicts(*IMAGE, passed=1), verdicts(*USER)], "checks failed"),
        ([verdicts(*IMAGE, passed=False), verdicts(*USER)], f"{IMAGE[0]}: "),
        ([verdicts(*IMAGE, passed=False, detail="[/x]"), verdicts(*USER)], ": [/x]"),
        ([verdicts(*IMAGE), ""], "printed no verdicts"),
        ([verdicts(*IMAGE), "[]"], "printed no verdicts"),
        ([verdicts(*IMAGE), '{"any-user imports": {"passed": true}}'], "printed no verdicts"),
        ([verdicts(*IMAGE), '{"any-user imports": true}'], "printed no verdicts"),
    ],
)
def test_verdicts_that_prove_nothing_are_rejected(outputs: list[str], words: str) -> None:
    """As printed by a wheel's .pth file, which ends the checks before they run."""
    with pytest.raises(ImageCheckError, match=re.escape(words)):
        judge(outputs, ALL)


@pytest.mark.parametrize(
    ("rows", "user"),
    [
        ("0 0 4294967295\n", "1000770000:0"),
        ("0 1000 1\n1 200000 65536\n", "65536:0"),
    ],
)
def test_any_user_is_mapped_in_a_rootless_namespace(tmp_path: Path, rows: str, user: str) -> None:
    (tmp_path / "uid_map").write_text(rows)
    assert any_user(tmp_path / "uid_map") == user


def test_bench_that_counts_failed_requests_is_red(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`vllm bench serve` exits with 0 also if every request failed."""
    script = importlib.import_module("vllm_forge.images.image_checks")
    asked = {"max_tokens": script.BENCH_TOKENS}
    counts = {"completed": script.BENCH_PROMPTS}

    def bench(*argv: str) -> str:
        options = dict(word[2:].split("=", 1) for word in argv if "=" in word)
        url = f"{options['base-url']}/v1/completions"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        tokens = 0
        for _ in range(script.BENCH_PROMPTS):
            with opener.open(url, json.dumps(asked).encode()) as answer:
                tokens += answer.read().count(b"w1")
        result = counts | {"total_output_tokens": tokens}
        Path(options["result-dir"], "result.json").write_text(json.dumps(result))
        return ""

    monkeypatch.setattr(script, "run_vllm", bench)
    assert script.bench_serve({}) == "2 answers, 8 tokens"
    counts["completed"] = 0
    with pytest.raises(AssertionError, match="counted 0 answers"):
        script.bench_serve({})


def test_the_names_of_verdicts_are_those_of_the_script() -> None:
    script = importlib.import_module("vllm_forge.images.image_checks")
    assert {"vllm-help", "vllm-bench-serve", *script.COMMANDS} == {
        name for name in ALL if name.startswith("vllm-")
    }


def test_imports_start_no_compilers_in_the_background(tmp_path: Path) -> None:
    expect = {"vllm": "1", "torch": "1.0", "compiler": False}
    write_inputs(tmp_path / "mnt", expect)
    (tmp_path / "torch.py").write_text("__version__ = '1.0+cpu'")
    vllm = "import os\n__version__ = os.environ['HUMMING_DISABLE_PARALLEL_BUILD']"
    (tmp_path / "vllm.py").write_text(vllm)
    argv = [sys.executable, str(tmp_path / "mnt" / "image_checks.py"), "imports", str(tmp_path)]
    env = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=env)
    verdict = json.loads(done.stdout.splitlines()[-1])["any-user-imports"]
    assert (verdict["passed"], verdict["detail"]) == (True, "torch 1.0+cpu, vllm 1")
