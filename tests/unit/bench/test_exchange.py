"""Results in the forms of other tools, and other tools' figures of the same cell."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bench import condition, rows_of, write_result
from tests.support.bench_server import BenchServer
from tests.support.sessions import write_exact
from vllm_forge.bench.errors import (
    CrossCheckFailedError,
    GateUndecidedError,
    InvalidResultError,
    ResultFileError,
)
from vllm_forge.bench.exchange import crosscheck, read_run, vllm_document
from vllm_forge.bench.results import Row, read_arm
from vllm_forge.cli import main
from vllm_forge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# What `vllm bench serve` 0.26.0 wrote of the model that is known exactly, without its lists.
VLLM = {
    "max_concurrency": 4, "completed": 32, "failed": 0, "total_output_tokens": 2048,
    "output_throughput": 129.27959131182263, "mean_ttft_ms": 277.04529537498956,
    "mean_tpot_ms": 26.637762204365632, "spec_decode_acceptance_rate": 51.38476755687438,
    "spec_decode_per_position_acceptance_rates": [0.516320474777448, 0.5113748763600395],
}  # fmt: skip
# What guidellm 0.8.1 writes, as far as it is read.
ANSWER = {"output_tokens": 64, "inter_token_latency_ms": 26.0}
GUIDELLM = {
    "metadata": {"guidellm_version": "0.8.1"},
    "benchmarks": [{
        "config": {"strategy": {"type_": "concurrent", "streams": 4}},
        "metrics": {
            "request_totals": {"successful": 32, "errored": 0, "incomplete": 0, "total": 32},
            "output_tokens_per_second": {"successful": {"mean": 129.3}},
            "time_to_first_token_ms": {"successful": {"mean": 277.0}},
        },
        "requests": {"successful": [ANSWER] * 32},
    }],
}  # fmt: skip


@pytest.fixture
def exact(tmp_path: Path) -> Path:
    """Two starts of the same run, at slightly other rates."""
    starts = []
    for start, pace in enumerate((1.0, 1.01)):
        for item in range(32):
            # 1011 drafts in all, 1039 accepted: 522 at the first position, 517 at the second.
            first, second = 16 + (item < 10), 16 + (item < 5)
            starts.append(Row(
                start=start, item=f"q{item}", finish="length", output_tokens=64, ttft=0.277 * pace,
                seconds=(0.277 + 63 * 0.0266) * pace, drafted=2 * (31 + (item < 19)),
                accepted=first + second, positions=(first, second),
            ))  # fmt: skip

    def edit(record: dict[str, Any]) -> None:
        condition(concurrency=4, max_tokens=64, ignore_eos=True)(record)
        for row, seconds in zip(record["starts"], (15.8, 15.9), strict=True):
            row["window"]["seconds"] = seconds

    return write_result(tmp_path / "exact.json", starts, orders=(0, 1), edit=edit)


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def crosscheck_one(record: Path, other: Path) -> dict[str, Any]:
    return crosscheck(read_arm(record), [other])


@pytest.fixture
def pairs(exact: Path, tmp_path: Path) -> Callable[[float], list[Path]]:
    """A result for each start of ``exact``, that much slower."""

    def write_pairs(slower: float) -> list[Path]:
        paths = [tmp_path / f"{index:02}" / "v.json" for index in range(2)]
        for index, path in enumerate(paths):
            path.parent.mkdir(exist_ok=True)
            document = vllm_document(read_arm(exact), index)
            times = {name: document[name] * slower for name in ("duration", "mean_tpot_ms")}
            rate = document["output_throughput"] / slower
            write(path, {**document, **times, "output_throughput": rate})
        return paths

    return write_pairs


def agrees(record: Mapping[str, Any]) -> dict[str, bool]:
    return {row["figure"]: row["agrees"] for row in record["rows"]}


def test_results_of_each_start_are_compared_in_pairs(
    exact: Path, pairs: Callable[[float], list[Path]]
) -> None:
    same = crosscheck(read_arm(exact), pairs(1))
    assert set(agrees(same).values()) == {True}
    assert {"00/v.json", "01/v.json"} < same["files"].keys()
    paths = pairs(1.01)
    found = agrees(crosscheck(read_arm(exact), paths))
    assert not found["output_throughput"] | found["mean_tpot_ms"]
    assert found["mean_ttft_ms"]
    assert agrees(crosscheck_one(exact, paths[0]))["output_throughput"]  # a single one says less


@pytest.mark.parametrize(
    ("others", "message"),
    [(lambda paths, _: [*paths, paths[0]], "3 results for 2 starts"),
     (lambda paths, _: [paths[0], paths[0]], "one result twice"),
     (lambda paths, guidellm: [paths[0], guidellm], "results of two tools")],
)  # fmt: skip
def test_other_results_than_one_of_each_start_are_refused(
    others: Callable[[list[Path], Path], list[Path]], message: str, exact: Path,
    pairs: Callable[[float], list[Path]], tmp_path: Path,
) -> None:  # fmt: skip
    paths = others(pairs(1), write(tmp_path / "g.json", GUIDELLM))
    with pytest.raises(InvalidResultError, match=message):
        crosscheck(read_arm(exact), paths)


def test_acceptance_agrees_to_the_last_digit(exact: Path, tmp_path: Path) -> None:
    record = crosscheck_one(exact, write(tmp_path / "v.json", VLLM))
    rows = {row["figure"]: row for row in record["rows"]}
    assert record["tool"] == "vllm bench serve"
    assert rows.keys() == {
        "mean_output_tokens", "output_throughput", "mean_ttft_ms", "mean_tpot_ms",
        "spec_decode_acceptance_rate", "acceptance_at_position_0", "acceptance_at_position_1",
    }  # fmt: skip
    for name in ("spec_decode_acceptance_rate", "acceptance_at_position_1", "mean_output_tokens"):
        assert (rows[name]["difference"], rows[name]["bound"]) == (0, 0), name
    assert all(row["agrees"] for row in rows.values())
    off = {**VLLM, "spec_decode_acceptance_rate": 51.3847}
    rows = {
        row["figure"]: row["agrees"]
        for row in crosscheck_one(exact, write(tmp_path / "o.json", off))["rows"]
    }
    assert [name for name, agrees in rows.items() if not agrees] == ["spec_decode_acceptance_rate"]


def test_guidellms_figures_are_read_by_what_they_mean(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "g.json", GUIDELLM))
    assert (run.tool, run.concurrency, run.answers, run.failed) == ("guidellm 0.8.1", 4, 32, 0)
    assert run.figures == {"mean_output_tokens": 64, "output_throughput": 129.3,
                           "mean_ttft_ms": 277.0, "mean_tpot_ms": 26.0}  # fmt: skip


def test_rows_are_recorded_and_a_difference_is_red(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    command = ["bench", "crosscheck", str(exact), f"--output={output}"]
    assert main([*command, str(write(tmp_path / "g.json", GUIDELLM))]) == 0
    assert "output_throughput" in capsys.readouterr().out
    assert {row["agrees"] for row in json.loads(output.read_text())["rows"]} == {True}
    slower = write(tmp_path / "s.json", {**VLLM, "output_throughput": 80.0})
    assert main([*command, "--json", str(slower)]) == CrossCheckFailedError.exit_code
    (row,) = [row for row in json.loads(output.read_text())["rows"] if not row["agrees"]]
    assert row["figure"] == "output_throughput"
    assert 0 < row["bound"] < abs(row["difference"])


@pytest.mark.parametrize(
    ("document", "error", "message"),
    [({**VLLM, "failed": 1}, InvalidResultError, "1 requests of vllm bench serve failed"),
     ({**VLLM, "max_concurrency": 8}, InvalidResultError, "concurrency 8 against 4"),
     ({**VLLM, "completed": 31}, InvalidResultError, "31 answers against 32"),
     ({"completed": 1}, ResultFileError, "total_output_tokens"),
     ({**VLLM, "completed": "32"}, ResultFileError, "completed is not a count"),
     ({**VLLM, "failed": True}, ResultFileError, "failed is not a count"),
     ({**VLLM, "output_throughput": "129"}, ResultFileError, "throughput is not a number"),
     ({**VLLM, "mean_ttft_ms": math.nan}, ResultFileError, "mean_ttft_ms is not a number"),
     ({**VLLM, "spec_decode_per_position_acceptance_rates": "ab"}, ResultFileError,
      "acceptance_rates is not a number"),
     ({**VLLM, "duration": 15841.5}, ResultFileError, "not 2048 tokens in 15841.5 s"),
     ({"benchmarks": []}, ResultFileError, "expected one benchmark, not 0"),
     ({"results": {"gsm8k": {"exact_match,strict-match": 0.9}}}, ResultFileError,
      "missing key 'completed'"),
     ([], ResultFileError, "expected an object")],
)  # fmt: skip
def test_other_conditions_are_refused(
    document: object, error: type[Exception], message: str, exact: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        crosscheck_one(exact, write(tmp_path / "o.json", document))


@pytest.mark.parametrize("index", [0, 1])
def test_exported_start_is_read_back(
    index: int, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "export", str(exact), "--format=vllm", f"--start={index}"]) == 0
    text = capsys.readouterr().out
    document = json.loads(text)
    assert document["duration"] == (15.8, 15.9)[index]
    assert document["spec_decode_num_drafts"] == 1011
    assert document["spec_decode_acceptance_rate"] == VLLM["spec_decode_acceptance_rate"]
    run = read_run(write(tmp_path / "v.json", document))
    assert run.figures["output_throughput"] == 2048 / (15.8, 15.9)[index]
    assert run.figures["mean_tpot_ms"] == pytest.approx(26.6 * (1, 1.01)[index])


def test_pytorch_records_have_a_value_for_each_start(
    exact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "export", str(exact), "--format=pytorch"]) == 0
    records = {row["metric"]["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert records["output_throughput"]["metric"]["benchmark_values"] == [2048 / 15.8, 2048 / 15.9]
    assert records["mean_ttft_ms"].keys() == {"benchmark", "model", "metric"}
    assert records["mean_ttft_ms"]["benchmark"]["extra_info"]["image"].startswith("sha256:")


def test_figure_that_one_start_lacks_is_not_compared(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was drafted in one of them."""
    none = {"drafted": 0, "accepted": 0, "positions": ()}
    rows = [row.model_copy(update=none if row.start else {}) for row in read_arm(exact).rows]
    edit = condition(concurrency=4, max_tokens=64, ignore_eos=True)
    path = write_result(tmp_path / "part.json", rows, orders=(0, 1), edit=edit)
    record = crosscheck_one(path, write(tmp_path / "v.json", VLLM))
    assert "spec_decode_acceptance_rate" not in {row["figure"] for row in record["rows"]}
    assert main(["bench", "export", str(path), "--format=pytorch"]) == 0
    names = {row["metric"]["name"] for row in json.loads(capsys.readouterr().out)}
    assert "mean_ttft_ms" in names
    assert "spec_decode_acceptance_rate" not in names


def test_missing_start_is_a_usage_error(exact: Path) -> None:
    command = ["bench", "export", str(exact), "--format=vllm", "--start=2"]
    assert main(command) == UsageError.exit_code


def test_single_start_bounds_nothing(tmp_path: Path) -> None:
    rows = rows_of(1, items=5)
    path = write_result(tmp_path / "a.json", rows)
    document = {**VLLM, "max_concurrency": 8, "completed": 5}
    command = ["bench", "crosscheck", str(path), str(write(tmp_path / "v.json", document))]
    assert main(command) == GateUndecidedError.exit_code


def test_guidellm_measures_the_fake_server(tmp_path: Path) -> None:
    if (program := shutil.which("guidellm")) is None:
        pytest.skip("guidellm is not installed: `pip install guidellm==0.8.1` (it needs torch), "
                    "and its folder on the PATH, run this")  # fmt: skip
    lines = [{"prompt": f"text {n}", "output_tokens_count": 8} for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with BenchServer() as server:
        backend = f"target={server.url},model=m,request_format=/v1/completions"
        command = [
            program, "run", f"--backend=kind=openai_http,{backend},validate_backend=false",
            "--profile=kind=concurrent,streams=2", "--constraint=kind=max_requests,count=8",
            f"--data=kind=json_file,path={tmp_path / 'prompts.jsonl'}",
            f"--tokenizer=kind=hf_auto,model={write_exact(tmp_path / 'exact')}",
            f"--output=kind=json,path={tmp_path / 'g.json'}", "--disable-console",
        ]  # fmt: skip
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    run = read_run(tmp_path / "g.json")
    assert (run.concurrency, run.answers, run.failed) == (2, 8, 0)
    assert run.figures["mean_output_tokens"] == 8
    assert min(run.figures.values()) > 0


def test_vllm_bench_measures_the_fake_server(tmp_path: Path) -> None:
    if (program := shutil.which("vllm")) is None:
        pytest.skip("vllm is not installed: in an image, or with its folder on the PATH, run this")
    with BenchServer() as server:
        command = [
            program, "bench", "serve", f"--base-url={server.url}", "--model=m",
            f"--tokenizer={write_exact(tmp_path / 'exact')}", "--dataset-name=random",
            "--random-input-len=4", "--random-output-len=8", "--num-prompts=8",
            "--max-concurrency=2", "--ignore-eos", "--save-result", f"--result-dir={tmp_path}",
            "--result-filename=v.json",
        ]  # fmt: skip
        subprocess.run(command, check=True)
    run = read_run(tmp_path / "v.json")
    assert (run.concurrency, run.answers, run.failed) == (2, 8, 0)
    assert run.figures["acceptance_at_position_0"] == 1
