"""A start is measured through a fake server; each fault of it is refused, and nothing is kept."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import bench_server
from tests.support.bench import CONDITIONS, SERVER
from tests.support.bench_server import BenchServer
from tests.support.keys import key_pair
from vllm_forge import host
from vllm_forge.bench import arms
from vllm_forge.bench.client import Prompt, read_counters
from vllm_forge.bench.errors import (
    ArmUnknownError,
    GateUndecidedError,
    InvalidResultError,
    ResultSignatureError,
    ServerUnreachableError,
    WorkloadFileError,
)
from vllm_forge.bench.measure import (
    _predicted,
    add_start,
    client_rate,
    count_compiled,
    measure,
    read_workload,
)
from vllm_forge.bench.results import Drafts, Setup, read_arm, summarize
from vllm_forge.cli import main
from vllm_forge.errors import UsageError
from vllm_forge.host import Reply
from vllm_forge.project import Project
from vllm_forge.serve.deployment import find_deployment

if TYPE_CHECKING:
    from collections.abc import Sequence

GPUS = "0, NVIDIA B300, 10.3, 580.1, 288000, Disabled, Completed, Success\n"
TOKENS = 8
PROMPTS = [Prompt(f"q{number}", f"text {number}") for number in range(6)]
PREDICTED = Drafts(drafts=4, per_position=(4, 0))  # by the fake server, of one answer
WARM = 2
FAULTS = {
    "failed": r"2 failed requests \(q2, q5\): ValueError: the server answered with status 500 full",
    "cut": "failed requests .*: ClientPayloadError: ",
    "usage": "failed requests .*: ValueError: half an answer",
    "short": "4 answers below 8 tokens",
    "prefix": "4 prefix-cache hits",
    "reset": "counters went backwards: drafts, draft_tokens, accepted, prefix_hits",
    "jit": "4 files were compiled in the window",
    "merged": "accepted drafts, counted are",
    "positions": "at position 0, counted are|positions add up to",
    "others": "32 tokens were answered, 36 counted: other requests",
}


class StubProbe:
    """Answers each question with one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        return Reply(code=0, text=self.text)


def arm(**conditions: object) -> Setup:
    values = {
        **CONDITIONS,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "concurrency": 2,
        **conditions,
    }
    argv = ["vllm", "serve", '--speculative-config={"num_speculative_tokens": 2}']
    server = {**SERVER, "image": "sha256:" + "2" * 64, "argv": argv}
    fields = {"arm": "a", "session": "s", "conditions": values, "server": server}
    return Setup.model_validate(fields)


def run(
    server: BenchServer, path: Path, *, order: int = 0, rate: float = 1e12,
    prompts: Sequence[Prompt] = PROMPTS,
) -> None:  # fmt: skip
    """Measure a start and add it; ``rate``: what the client does against a null server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_forge.bench.measure.client_rate", lambda *_: rate)
        start, rows = measure(
            server.url, "model", arm(), prompts, warm=WARM, order=order,
            caches=[path.parent / "cache"], probe=StubProbe(GPUS),
        )  # fmt: skip
    add_start(path, arm(), start, rows)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "a.json"


def test_start_is_measured_with_its_counters(output: Path) -> None:
    with BenchServer() as server:
        run(server, output)
    found = read_arm(output)
    assert sorted(row.item for row in found.rows) == ["q2", "q3", "q4", "q5"]
    assert {(row.output_tokens, row.finish, row.drafted, row.accepted) for row in found.rows} == {
        (TOKENS, "length", 8, 3)
    }
    (start,) = found.result.starts
    assert start.window is not None
    assert start.window.before.drafts == 4 * WARM
    assert start.window.after.drafts == 4 * len(PROMPTS)
    assert start.window.seconds > 0
    assert all(row.ttft is not None and 0 < row.ttft <= row.seconds for row in found.rows)


def test_request_asks_for_token_ids_and_usage(output: Path) -> None:
    with BenchServer() as server:
        run(server, output)
    body = server.seen[0]
    assert body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"]) == (TOKENS, True, 0.0)


def test_starts_are_added_to_the_record(output: Path) -> None:
    with BenchServer() as server:
        run(server, output, order=0)
        run(server, output, order=3)
    found = read_arm(output)
    assert [start.order for start in found.result.starts] == [0, 3]
    assert [len(found.of_start(index)) for index in (0, 1)] == [4, 4]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_server_is_refused(fault: str, output: Path) -> None:
    with (
        BenchServer(fault, cache=output.parent / "cache") as server,
        pytest.raises(InvalidResultError, match=FAULTS[fault]),
    ):
        run(server, output)
    assert not output.exists()
    assert not output.with_suffix(".jsonl.gz").exists()


@pytest.mark.parametrize("off", [0, 1])
def test_counters_are_compared_with_the_prediction(off: int, output: Path) -> None:
    """To the last draft: the workload knows what the model accepts."""
    predicted = [PREDICTED] * 5 + [PREDICTED.model_copy(update={"drafts": 4 + off})]
    prompts = [replace(p, predicted={2: row}) for p, row in zip(PROMPTS, predicted, strict=True)]
    with BenchServer() as server:
        if off:
            with pytest.raises(InvalidResultError, match=r"\(16, 32, 16, 0\) counted, \(17, 34,"):
                run(server, output, prompts=prompts)
            return
        run(server, output, prompts=prompts)
    (start,) = read_arm(output).result.starts
    assert start.window is not None
    assert start.window.predicted == Drafts(drafts=16, per_position=(16, 0))
    assert start.window.change["per_position"] == (16, 0)


@pytest.mark.parametrize(
    ("argument", "known"),
    [('{"num_speculative_tokens": 2}', True), (".num-speculative-tokens=2", True),
     ('{"num-speculative-tokens": 2}', True), ('{"method": "mtp"}', False)],
)  # fmt: skip
def test_prediction_is_for_the_drafted_tokens(argument: str, known: bool) -> None:
    """In every form that vLLM takes; without a number, its own default is not known."""
    equals = "" if argument.startswith(".") else "="
    prompts = [replace(prompt, predicted={2: PREDICTED}) for prompt in PROMPTS]
    found = _predicted(prompts, [f"--speculative-config{equals}{argument}"])
    assert (found is not None) == known


@pytest.fixture
def command(root: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`bench serve` of a cell that is built, on a host with its GPUs; without --url."""
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    monkeypatch.setattr(arms, "built_digest", lambda path: "sha256:" + "3" * 64)
    monkeypatch.setattr(host, "HostProbe", lambda: StubProbe(GPUS))
    monkeypatch.setattr("vllm_forge.bench.measure.client_rate", lambda *_: 1e12)
    workload = output.parent / "texts.jsonl"
    workload.write_text(
        "\n".join(json.dumps({"item": p.item, "prompt": p.content}) for p in PROMPTS)
    )
    (output.parent / "tokenizer.json").write_text("{}")
    return ["bench", "serve", "b300", "--preset=mtp", "--arm=mtp", "--session=s", "--order=0",
            f"--workload={workload}", f"--checkpoint={output.parent}", f"--output={output}",
            f"--caches={output.parent / 'cache'}", "--concurrency=2", f"--max-tokens={TOKENS}",
            "--ignore-eos"]  # fmt: skip


def test_command_binds_the_result_to_image_model_and_gpu(
    command: list[str], output: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with BenchServer() as server:
        assert main([*command, f"--url={server.url}/", f"--warm={WARM}"]) == 0
    assert "start 0, " in capsys.readouterr().out
    assert server.seen[0]["model"] == Project(root).matrix.artifact["flash-nvfp4-fp8-mtp"].repo
    found = read_arm(output).result
    assert found.server.image == "sha256:" + "3" * 64
    assert found.server.argv[:2] == ("vllm", "serve")
    assert (found.server.gpu, found.server.gpus, found.server.driver) == ("NVIDIA B300", 4, "580.1")
    assert found.conditions.workload == "texts"
    assert found.conditions.tokenizer_sha256 == hashlib.sha256(b"{}").hexdigest()
    assert found.conditions.template_sha256 == arms.NONE


@pytest.mark.parametrize(
    ("option", "message"),
    [("--checkpoint", "checkpoint not found: "), ("--caches", "invalid --caches: ")],
)
def test_missing_folder_is_not_an_empty_one(
    option: str, message: str, command: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In which no tokenizer is, or nothing is compiled."""
    with BenchServer() as server:
        argv = [*command, f"{option}={output.parent}/none", f"--url={server.url}", "--warm=2"]
        assert main(argv) == UsageError.exit_code
    assert message in capsys.readouterr().err
    assert not output.exists()


class EngineProbe(StubProbe):
    """A host whose engine runs a container on a port."""

    def __init__(self, port: int, container: object, listed: str = "") -> None:
        super().__init__(GPUS)
        self.container = container
        default = f"f1 0.0.0.0:18000->8000/tcp\nf2 0.0.0.0:{port}->8000/tcp\n"
        self.listed = listed or default

    def ask(self, name: str, argv: Sequence[str]) -> Reply:
        answers = {
            "docker-ps": Reply(code=127, text="docker: not found"),
            "podman-ps": Reply(code=0, text=self.listed),
            "podman-inspect": Reply(code=0, text=json.dumps([self.container])),
        }  # fmt: skip
        if name == "podman-inspect":
            assert argv == ["podman", "inspect", "f2"]
        return answers.get(name) or super().ask(name, argv)


def preset_arguments() -> list[str]:
    """Of preset mtp on B300."""
    project = Project(Path(__file__).parents[3])
    cell = project.cell("b300")
    return find_deployment(project.matrix, cell, "mtp", None).arguments


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({"Image": "sha256:" + "9" * 64, "ImageDigest": "sha256:" + "3" * 64}, ""),
        ({"Image": "9" * 64, "ImageManifestDescriptor": {"digest": "sha256:" + "3" * 64}}, ""),
        ({"Image": "sha256:" + "9" * 64}, "the server's image is " + "9" * 64),
        ({"Image": "3" * 64, "Config": {"Cmd": ["model"]}}, "not started as the preset says"),
        ({"Image": "3" * 64, "Config": {"Cmd": None}}, "not started as the preset says"),
        ({"Image": "3" * 64, "more": ["--max-num-seqs=1"]}, "it also has --max-num-seqs\n"),
        ({"Image": "3" * 64, "more": ["-tp", "1"]}, "it also has -tp\n"),
        ({}, "unexpected answer"),
        ({"Image": 1}, "unexpected answer"),
    ],
    ids=["podman", "docker", "another", "arguments", "no command", "replaced", "short", "none",
         "malformed"],
)  # fmt: skip
def test_image_is_that_of_the_container_that_answers(
    container: dict[str, Any], message: str, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (output,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--output="))
    with BenchServer() as server:
        port = int(server.url.rpartition(":")[2])
        words = ["/model", "--port=8000", "--served-model-name=m", *preset_arguments()]
        served = {"Config": {"Cmd": [*words, *container.pop("more", ())]}, **container}
        monkeypatch.setattr(host, "HostProbe", lambda: EngineProbe(port, served))
        code = main([*command, f"--url={server.url}", f"--warm={WARM}"])
    if message:
        assert code == ArmUnknownError.exit_code
        assert message in capsys.readouterr().err
        assert not output.exists()
        return
    assert code == 0
    assert not read_arm(output).result.server.claimed
    assert "claimed" not in output.read_text()


def test_image_of_the_classic_store_is_known_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"digest": "sha256:" + "8" * 64}
    image = type("Image", (), {"digest": "3" * 64, "manifest": {"config": config}})
    monkeypatch.setattr(arms, "read_image", lambda _: image)
    probe, url = EngineProbe(80, {"Image": "8" * 64, "Config": {"Cmd": []}}), "http://127.0.0.1"
    assert arms.answers(probe, url, "sha256:" + "3" * 64, tmp_path)
    with pytest.raises(ArmUnknownError, match="8888"):
        arms.answers(probe, url, "sha256:" + "3" * 64, tmp_path / "none")
    with pytest.raises(ArmUnknownError, match="8888"):  # the build is of another image by now
        arms.answers(probe, url, "sha256:" + "4" * 64, tmp_path)


IPV4, BOTH = "0.0.0.0:80->8000/tcp", "0.0.0.0:80->8000/tcp, [::]:80->8000/tcp"


@pytest.mark.parametrize(
    ("ports", "url", "seen"),
    [
        (IPV4, "http://127.0.0.1", True),
        ("127.0.0.1:80->8000/tcp", "http://127.0.0.1:80", True),
        (":::80->8000/tcp", "http://[::1]", True),
        (BOTH, "http://localhost", True),
        (IPV4, "http://localhost", False),
        (IPV4, "http://[::1]", False),
        (IPV4, "https://127.0.0.1", False),
        ("0.0.0.0:80->8000/udp", "http://127.0.0.1", False),
        ("10.0.0.1:80->8000/tcp", "http://127.0.0.1", False),
        ("0.0.0.0:80-90->80-90/tcp", "http://127.0.0.1", False),
        ("10.127.0.0.1:80->8000/tcp", "http://127.0.0.1", False),
        ("80/tcp", "http://127.0.0.1", False),
        ("", "http://127.0.0.1", False),
    ],
)
def test_container_answers_only_where_its_port_is_published(
    ports: str, url: str, seen: bool, tmp_path: Path
) -> None:
    probe = EngineProbe(0, {"Image": "3" * 64, "Config": {"Cmd": []}}, f"f2 {ports}\n")
    assert arms.answers(probe, url, "sha256:" + "3" * 64, tmp_path / "none") == seen


def test_image_without_a_digest_is_refused(tmp_path: Path) -> None:
    probe = EngineProbe(80, {"Image": "sha256:", "Config": {"Cmd": []}})
    with pytest.raises(ArmUnknownError, match="the server's image"):
        arms.answers(probe, "http://127.0.0.1", "sha256:" + "3" * 64, tmp_path / "none")


@pytest.mark.parametrize("url", ["http://far.example:8000", "http://127.0.0.1:8000", ""])
def test_image_that_no_engine_runs_is_claimed(url: str, tmp_path: Path) -> None:
    assert not arms.answers(EngineProbe(9, {}), url, "sha256:" + "3" * 64, tmp_path)


def test_claimed_image_is_shown_and_not_signed(
    command: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = output.with_name("b.json")
    with BenchServer() as server:
        for other in (command, [word.replace(str(output), str(again)) for word in command]):
            assert main([*other, f"--url={server.url}", f"--warm={WARM}"]) == 0
    arm = read_arm(output)
    assert arm.result.server.claimed
    assert summarize(arm).figures()["image"] == "3" * 12 + " (claimed)"
    assert main(["bench", "gate", str(output), str(again)]) == GateUndecidedError.exit_code
    assert "(claimed)" in capsys.readouterr().err
    key, _ = key_pair(output.parent / "keys")
    assert main(["bench", "sign", str(output), f"--key={key}"]) == ResultSignatureError.exit_code
    assert "claimed image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "answer"),
    [("b300 is not built", (arms, "built_digest", lambda _: None)),
     ("no GPU is listed: nothing", (host, "HostProbe", lambda: StubProbe("nothing")))],
)  # fmt: skip
def test_unknown_image_or_gpu_is_refused(
    name: str, answer: tuple[Any, str, object], command: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(*answer)
    assert main([*command, "--url=http://127.0.0.1:9"]) == ArmUnknownError.exit_code
    assert name in capsys.readouterr().err


def answers(path: Path, **changes: object) -> Path:
    rows = [
        {"start": 0, "item": prompt.item, "finish": "stop", "output_tokens": 5, "seconds": 1.0,
         "scores": {"strict": True}, **changes}
        for prompt in PROMPTS
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def importing(command: list[str], path: Path) -> list[str]:
    options = [
        item for item in command[2:] if not item.startswith(("--order", "--caches", "--ign"))
    ]
    return ["bench", "import", *options, f"--answers={path}"]


def test_answers_of_another_harness_can_be_judged(
    command: list[str], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = answers(output.parent / "answers.jsonl"), output.with_name("b.json")
    assert main(importing(command, path)) == 0
    assert read_arm(output).result.starts[0].window is None
    answers(path, seconds=2.0)
    assert main([w.replace(str(output), str(again)) for w in importing(command, path)]) == 0
    assert main(["bench", "gate", str(output), str(again)]) == GateUndecidedError.exit_code
    assert "strict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"item": "other"}, "items that the workload lacks: ['other']"), ({"start": 1}, "start 0"),
     ({"finish": "maybe"}, "finish"), ({"accepted": 1}, "more tokens were accepted")],
)  # fmt: skip
def test_invalid_answers_are_refused(
    changes: dict[str, object], message: str, command: list[str], output: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = answers(output.parent / "answers.jsonl", **changes)
    assert main(importing(command, path)) == WorkloadFileError.exit_code
    assert message in capsys.readouterr().err


def test_truncated_answers_scored_as_right_are_not_imported(
    command: list[str], output: Path
) -> None:
    path = answers(output.parent / "answers.jsonl", finish="length")
    assert main(importing(command, path)) == InvalidResultError.exit_code
    assert not output.exists()


@pytest.mark.parametrize(
    "option",
    [
        "--url=http://localhost:x",
        "--url=http://[::1",
        "--arm=A B",
        "--concurrency=0",
        "--max-tokens=x",
        "--session=\n",
    ],
)
def test_invalid_options_are_usage_errors(option: str, command: list[str]) -> None:
    assert main([*command, "--url=http://127.0.0.1:9", option]) == UsageError.exit_code


def test_warm_up_of_all_prompts_is_a_usage_error(command: list[str]) -> None:
    assert main([*command, "--url=http://127.0.0.1:9", "--warm=6"]) == UsageError.exit_code


def test_slow_client_is_refused(output: Path) -> None:
    with BenchServer() as server, pytest.raises(InvalidResultError, match="client headroom"):
        run(server, output, rate=1.0)


def test_refused_start_leaves_the_record_as_it_was(output: Path) -> None:
    with BenchServer() as server:
        run(server, output)
        before = output.read_bytes()
        server.fault = "failed"
        with pytest.raises(InvalidResultError):
            run(server, output, order=1)
    assert output.read_bytes() == before
    assert len(read_arm(output).rows) == 4


def test_start_of_other_conditions_is_not_added(output: Path) -> None:
    with BenchServer() as server:
        run(server, output)
        start, rows = measure(server.url, "m", arm(), PROMPTS, warm=WARM, order=1, caches=[],
                              probe=StubProbe(GPUS))  # fmt: skip
    with pytest.raises(InvalidResultError, match=r"another conditions\.concurrency: 2, now 4"):
        add_start(output, arm(concurrency=4), start, rows)


def test_folder_that_disappears_hides_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers work in folders that they delete."""
    for name in ("a", "gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    scan = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        assert count_compiled([tmp_path]) == 1


def test_client_is_tested_against_a_null_server() -> None:
    assert client_rate(arm().conditions, PROMPTS) > 0


def test_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(ServerUnreachableError, match="metrics"):
        read_counters("http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["prefix_cache_hits", "spec_decode_num_accepted_tokens"])
def test_missing_counter_is_not_a_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = bench_server.METRICS.splitlines(keepends=True)
    kept = "".join(line for line in lines if name not in line)
    monkeypatch.setattr(bench_server, "METRICS", kept)
    with BenchServer() as server, pytest.raises(ServerUnreachableError, match=f"no vllm:{name}"):
        read_counters(server.url)


@pytest.mark.parametrize("after", [" 1764547200000", ' # {trace_id="x"} 1.0 1764547200.0'])
def test_value_of_a_counter_is_what_follows_its_labels(
    after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = bench_server.METRICS.replace('engine="0"', 'engine="0",model_name="a}} b 9"')
    after = after.replace("{", "{{").replace("}", "}}")
    monkeypatch.setattr(bench_server, "METRICS", lines.replace("f}\n", f"f}}{after}\n"))
    with BenchServer() as server:
        server.counts.update(tokens=7, prefix_hits=3)
        found = read_counters(server.url)
    assert (found.tokens, found.prefix_hits, found.per_position) == (7, 3, (0, 0))


def test_event_needs_no_space_after_its_name(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("chunk", "usage"):
        make = getattr(bench_server, name)
        monkeypatch.setattr(
            bench_server,
            name,
            lambda *a, make=make, **k: make(*a, **k).replace(b"data: ", b"data:"),
        )
    with BenchServer() as server:
        run(server, output)
    assert len(read_arm(output).rows) == 4


def test_workload_has_texts_and_chats(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    chat = [{"role": "user", "content": "hi"}]
    rows: list[dict[str, Any]] = [{"item": "a", "prompt": "text"}, {"item": "b", "messages": chat}]
    predicted = {"2": PREDICTED.model_dump(mode="json")}
    rows.append({"item": "c", "prompt": [7, 8], "predicted": predicted})
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, digest = read_workload(path)
    assert prompts == [Prompt("a", "text"), Prompt("b", chat), Prompt("c", [7, 8], {2: PREDICTED})]
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ('{"item": "a", "prompt": "x"}\n{"item": "a", "prompt": "y"}', "two rows have one item"),
        ('{"item": "a", "prompt": "x", "repeat": 1.5}', "line 1: repeat: "),
        ('{"item": "a", "prompt": "x", "repeat": -1}', "line 1: repeat: "),
        ('{"item": "a"}', "expected either a prompt or messages"),
        ('{"item": "a", "prompt": []}', "and not empty"),
        ('{"item": "a", "prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "either"),
        ('{"item": "a", "prompt": "x", "max_tokens": 9}', "max_tokens"),
        ('{"item": "", "prompt": "x"}', "line 1: item: "),
        ('{"item": "a", "prompt": [true, -1]}', "line 1: prompt"),
        ('{"item": "a", "messages": [{"role": "usr", "content": "x"}]}', "messages.0.role"),
        ('{"item": "a", "messages": "x"}', "line 1: messages"),
        ('{"item": "a", "prompt": [1], "predicted": {"1": {"drafts": 1}}}', "per_position"),
        (
            '{"item": "a", "messages": [{"role": "user", "content": [1]}]}',
            "0.content: Input should be",
        ),
        ("[", "Expecting value"),
    ],
)
def test_invalid_workload_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadFileError, match=message):
        read_workload(path)
