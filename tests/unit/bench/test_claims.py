"""Verdicts on published figures: sound ones are not called wrong, planted faults are found."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_forge.bench import statistics
from vllm_forge.bench.claims import (
    CLAIMS,
    Answer,
    Derived,
    Raw,
    RawRun,
    Share,
    parse_claims,
    read_claims,
    read_run,
)
from vllm_forge.bench.errors import ClaimsFileError, ClaimsStaleError, LibraryMissingError
from vllm_forge.bench.plots import forest
from vllm_forge.bench.verdicts import Word, judge, verdicts
from vllm_forge.checkpoints.architecture import mtp_tensors
from vllm_forge.cli import main
from vllm_forge.kernels.selection.questions import artifact_config
from vllm_forge.pages.claims import CHART, PAGE, RECORD
from vllm_forge.pages.registry import check_pages
from vllm_forge.pages.sessions import CHART as PUBLISHED
from vllm_forge.project import Project

if TYPE_CHECKING:
    from pathlib import Path

ARMS = {"a": {"weights": "x", "tp": "4"}, "b": {"weights": "y", "tp": "4"}, "c": {"tp": "8"}}
BATCH = {"tokens": 1000, "requests": 8, "seconds": 10, "rate": 100, "slots": 8}
# What arithmetic alone refutes (one figure each is wrong), and the one difference that is shown.
CONTRADICTED = {
    "gsm8k-strict-bf16", "gsm8k-strict-bf16-mtp", "aime-scored", "aime-inflated", "tp8-slower",
    "peak", "sweep-c1-right", "sweep-c4-right", "sweep-c4-speed", "sweep-c8-minute",
    "sweep-c8-collapse", "acceptance-random", "smaller", "size", "mtp-bf16",
    "decode-range",
}  # fmt: skip
DETAILS = {
    "gsm8k-strict-bf16": "McNemar p 2e-12 to 0.0032 over all pairings, Fisher 0.0023",
    "ifeval-strict-redhat": "at most 28 opposite flips",
    "ifeval-loose-redhat": "not significant after Holm's correction",
    "ifeval-rtx": "the arms also differ in speculation",
    "humaneval-redhat-answers": "flips 9 v 6",
    "aime-wall": "tokens/s 3.29, per request 1.84; slots are busy 0.75 v 0.42",
    "tp8-slower": "17.76; 21.6 is what another rule gives: second more than first, %",
    "rtx-tp2-1": "104.8 tok/s with each TTFT at the median",
    "sweep-c1-right": "scored as right: at least 2",
    "sweep-c2-speed": "tokens/s 1.78",
    "sweep-c4-speed": "tokens/s 3.08; caps differ: 13000 v 10000 tokens; right and stopped within "
    "10000 tokens: 20 v 20",
    "sweep-c8-collapse": "23.68",
    "acceptance-bf16": "mean difference 1.10 [0.42, 1.79], paired t p 0.015",
    "acceptance-rtx": "spread 3.45 x binomial (p 0.004)",
}


def rows(*claims: dict[str, Any]) -> dict[str, Any]:
    base = {"says": "", "at": "", "group": "quality"}
    listed = [{**base, "id": f"c{place}", **claim} for place, claim in enumerate(claims)]
    return {"card": "x", "revision": "1", "license": "MIT", "arm": ARMS, "raw": {}, "claim": listed}


def word(claim: dict[str, Any]) -> Word:
    (verdict,) = verdicts(parse_claims(rows(claim)), {})
    return verdict.word


def comparison(first: int, second: int, of: int, claims: str, **settings: Any) -> dict[str, Any]:
    shares = {"first": {"arm": "a", "right": first, "of": of},
              "second": {"arm": "b", "right": second, "of": of}}  # fmt: skip
    return {"kind": "comparison", "claims": claims, "varies": ["weights"], **shares, **settings}


def derived(value: str, rule: str, *of: str, **settings: Any) -> dict[str, Any]:
    return {"kind": "derived", "value": value, "rule": rule, "of": of, **settings}


def batches(value: str, seconds: float, rate: float) -> dict[str, Any]:
    return {"kind": "makespan", "value": value, "first": BATCH,
            "second": {**BATCH, "seconds": seconds, "rate": rate}}  # fmt: skip


def printed(of: int, first: str, second: str, claims: str, **share: Any) -> dict[str, Any]:
    shares = {"first": {"arm": "a", "value": first, "of": of, **share},
              "second": {"arm": "b", "value": second, "of": of, **share}}  # fmt: skip
    return {"kind": "comparison", "claims": claims, "varies": ["weights"], **shares}


SOUND = [
    (comparison(950, 900, 1000, "higher"), Word.HOLDS),
    (comparison(900, 950, 1000, "lower"), Word.HOLDS),
    (comparison(950, 949, 1000, "equal"), Word.UNDECIDED),
    (comparison(95, 90, 100, "higher"), Word.UNDECIDED),
    (comparison(950, 900, 1000, "higher", flips=[60, 10]), Word.HOLDS),
    (derived("2.13", "ratio", "278.68", "131.06"), Word.CONSISTENT),
    (derived("1.56", "ratio", "1577.20", "1007.78"), Word.CONSISTENT),  # 1.565, cut
    (derived("17.8", "less-by", "1297.03", "1577.20"), Word.CONSISTENT),
    (derived("2.0", "ratio", "2", "1", starts=5), Word.CONSISTENT),
    (derived("2.0", "ratio", "2", "1", starts=1), Word.UNDECIDED),
    ({"kind": "range", "values": ["1/2", "0.4"], "low": 0.4, "high": 50}, Word.CONSISTENT),
    ({"kind": "range", "values": ["66.6", "75.9"], "low": 67, "high": 75}, Word.CONSISTENT),
    ({"kind": "order", "larger": "3", "smaller": "2"}, Word.CONSISTENT),
    (
        {"kind": "scored", "share": {"arm": "a", "of": 30, "right": 20}, "stopped": 20},
        Word.CONSISTENT,
    ),
    (batches("1.00", 10, 100), Word.CONSISTENT),
    (batches("1.05", 10.4, 100), Word.CONSISTENT),  # 10.44 and 9.96 s
    # Two digits leave open which counts they are: 1247 v 1253 of 1319, or 7232 v 7020 of 14042.
    (printed(1319, "0.95", "0.90", "equal"), Word.CONTRADICTED),
    (printed(1319, "0.95", "0.94", "equal"), Word.UNDECIDED),
    (printed(14042, "0.52", "0.49", "higher"), Word.UNDECIDED),
    (printed(1319, "0.90", "0.90", "higher"), Word.UNDECIDED),
    (printed(30, "0.792", "0.754", "higher", answers=16), Word.UNDECIDED),
    (
        {"kind": "single", "share": {"arm": "a", "of": 30, "answers": 16, "value": "0.792"}},
        Word.CONSISTENT,
    ),
    ({"kind": "single", "share": {"arm": "a", "of": 164, "value": "1.0"}}, Word.CONSISTENT),
    (derived("4.1", "ratio", "4.7", "1.2"), Word.CONSISTENT),  # 4.749 and 1.151, cut
    (derived("2.37", "ratio", "1210", "512", starts=1), Word.UNDECIDED),
    (derived("58.5", "percent", "118", "202", rounded=True), Word.CONSISTENT),
    (derived("58.5", "percent", "118", "202"), Word.UNDECIDED),  # 118.2 of 202.0 may be meant
    (derived("168.2", "gib", "181"), Word.UNDECIDED),
    (derived("0.26", "difference", "6.24", "5.98"), Word.CONSISTENT),  # perplexity
    (derived("-3.0", "difference", "91.8", "94.8"), Word.CONSISTENT),
    (derived("-2.1", "points", "0.931", "0.951"), Word.CONSISTENT),
    (derived("74.5", "mean", "71.2", "80.1", "72.3"), Word.CONSISTENT),
    (derived("74.5", "mean", *["74.5"] * 57), Word.CONSISTENT),
    (derived("2.79", "length", "0.81", "0.60", "0.38"), Word.CONSISTENT),
    (derived("38.7", "gib", "41.6"), Word.CONSISTENT),
    (derived("0.0076", "stderr", "0.9181", "1319"), Word.CONSISTENT),
    ({"kind": "range", "values": ["30/30", "30/30"], "low": 99, "high": 100}, Word.CONSISTENT),
    ({"kind": "range", "values": ["450/4", "38/8"], "low": 4, "high": 12000}, Word.CONSISTENT),
    (
        {"kind": "series", "first": ["2", "3"], "second": ["1", "2"], "confounded": "x"},
        Word.UNDECIDED,
    ),
    ({"kind": "bare", "value": "81.60"}, Word.UNDECIDED),
    (derived("0.0503", "stderr", "0.5", "100"), Word.CONSISTENT),  # at 0.45 and 0.59 it is less
    (derived("0.0000", "stderr", "1.0000", "164"), Word.CONSISTENT),
    # A table of fewer digits than the sentence about it.
    ({"kind": "range", "values": ["11.3", "15.4"], "low": 11.34, "high": 15.35}, Word.CONSISTENT),
    ({"kind": "range", "values": ["61", "91"], "low": 60.89, "high": 90.98}, Word.CONSISTENT),
    ({"kind": "order", "larger": "12", "smaller": "12"}, Word.UNDECIDED),
    ({"kind": "order", "larger": "85.1", "smaller": "85.14"}, Word.UNDECIDED),
    ({"kind": "order", "larger": "85.2", "smaller": "85.2"}, Word.UNDECIDED),
]
UNSOUND = [
    comparison(900, 950, 1000, "equal"),
    comparison(900, 950, 1000, "higher"),  # the wrong direction
    comparison(950, 900, 1000, "equal", flips=[60, 10]),
    {"kind": "single", "share": {"arm": "a", "of": 30, "value": "0.85"}},  # 25/30 and 26/30 miss it
    derived("2.23", "ratio", "278.68", "131.06"),
    derived("21.6", "less-by", "1297.03", "1577.20"),
    derived("12", "ratio", "450/4", "38/8"),
    {"kind": "range", "values": ["0.5", "0.7"], "low": 0.4, "high": 0.6},
    {"kind": "range", "values": ["66.4"], "low": 67, "high": 75},
    {"kind": "range", "values": ["76.0"], "low": 67, "high": 75},
    {"kind": "order", "larger": "2", "smaller": "3"},
    {"kind": "order", "larger": "85.1", "smaller": "85.2"},  # both rounded, or both cut
    {"kind": "order", "larger": "85.1", "smaller": "85.25"},
    {"kind": "order", "larger": "24/30", "smaller": "24/30"},
    {"kind": "range", "values": ["75.5"], "low": 67.2, "high": 75.4},
    printed(30, "0.7000", "0.7500", "higher", answers=16),
    {"kind": "scored", "share": {"arm": "a", "of": 30, "right": 24}, "stopped": 22},
    batches("1.20", 10, 100),
    {"kind": "single", "share": {"arm": "a", "of": 30, "value": "0.84"}},  # 25/30, rounded up
    comparison(88, 89, 100, "higher"),  # whatever p is
    comparison(88, 88, 100, "lower"),
    printed(1319, "0.90", "0.92", "higher"),
    comparison(149, 146, 164, "higher", flips=[9, 7]),
    comparison(150, 0, 164, "higher", flips=[160, 10]),
    derived("86.7", "percent", "25", "30", rounded=False),
    derived("96.7", "percent", "25", "30"),
    derived("0.31", "difference", "6.24", "5.98"),
    derived("75.1", "mean", "71.2", "80.1", "72.3"),
    derived("2.55", "length", "0.81", "0.60", "0.38"),
    derived("480", "ratio", "12000", "30.0", starts=1),
    derived("41.6", "gib", "41.6"),
    derived("0.0071", "stderr", "0.9181", "1319"),
    {"kind": "cold-start", "value": "90.0", "tokens": 1000, "seconds": 10, "requests": 4,
     "mean_ttft": 0.2, "median_ttft": 0.2},
]  # fmt: skip


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = judge(request.config.rootpath / CLAIMS)
    return found


@pytest.fixture
def checkout(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `bench claims` reads, and the page that it writes into."""
    shutil.copytree(root / "records/bench", tmp_path / "records/bench")
    for name in ("matrix.toml", PAGE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("claim", "expected"), SOUND)
def test_sound_figure_is_not_contradicted(claim: dict[str, Any], expected: Word) -> None:
    assert word(claim) is expected


@pytest.mark.parametrize("claim", UNSOUND)
def test_unsound_figure_is_contradicted(claim: dict[str, Any]) -> None:
    assert word(claim) is Word.CONTRADICTED


@pytest.mark.parametrize(("starts", "words"), [(1, "; 1 start of each"), (3, "; 3 starts of each")])
def test_few_starts_are_counted(starts: int, words: str) -> None:
    row = derived("2.0", "ratio", "2", "1", starts=starts)
    (verdict,) = verdicts(parse_claims(rows(row)), {})
    assert words in verdict.detail


def test_a_difference_of_incomparable_arms_does_not_hold() -> None:
    claim = comparison(950, 900, 1000, "higher")
    claim["second"]["arm"] = "c"
    assert word(claim) is Word.UNDECIDED


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(3, 5), st.booleans())
def test_a_share_printed_rounded_or_cut_has_a_count(
    of: int, part: float, digits: int, cut: bool
) -> None:
    right = round(part * of)
    scale = 10**digits
    printed = (math.floor if cut else round)(right / of * scale)
    value = f"{printed // scale}.{printed % scale:0{digits}}"
    found = Share(arm="a", of=of, value=value).count()
    assert found is not None
    assert abs(found - right) <= of / scale + 1


def test_card_has_the_known_faults(record: dict[str, Any]) -> None:
    by_id = {row["id"]: row for row in record["verdicts"]}
    found = {name for name, row in by_id.items() if row["word"] == "contradicted"}
    assert found == CONTRADICTED
    assert [name for name, row in by_id.items() if row["word"] == "holds"] == ["corrupted"]
    for name, text in DETAILS.items():
        assert text in by_id[name]["detail"], name


def test_every_verdict_names_its_method_and_n(record: dict[str, Any]) -> None:
    assert all(row["method"] and row["n"] for row in record["verdicts"])


def test_sizes_are_those_of_the_measurement(root: Path) -> None:
    real = json.loads((root / "benchmarks/results/quantize.json").read_text())["DeepSeek-V4-Flash"]
    claims = {
        row.id: row.of for row in read_claims(root / CLAIMS).claim if isinstance(row, Derived)
    }
    assert claims["size"] == (f"{real['artifact_bytes'] / 1e9:.1f}",)
    assert claims["size-bf16"] == (f"{real['model_bytes'] / 1e9:.0f}",)


def test_counts_are_those_of_the_model(root: Path) -> None:
    config = artifact_config("deepseek-v4-flash")
    tensors = list(mtp_tensors(config))
    keys = len(tensors) + 2  # embedding and head
    wide = sum(tensor.dtype == "F32" for tensor in tensors)
    claims = {
        row.id: row.of for row in read_claims(root / CLAIMS).claim if isinstance(row, Derived)
    }
    assert claims["mtp-keys"] == (str(keys),)
    assert claims["mtp-bf16"] == (str(keys - wide),)
    assert claims["layers"] == (str(config["num_hidden_layers"]),)


def test_command_writes_what_is_committed(
    checkout: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (RECORD, CHART, PUBLISHED):
        (checkout / name).unlink()
    page = (checkout / PAGE).read_text()
    (checkout / PAGE).write_text(page.replace("Fisher", "fisher"))
    assert main(["bench", "claims"]) == 0
    assert PAGE in capsys.readouterr().out
    for name in (RECORD, CHART, PUBLISHED, PAGE):
        assert (checkout / name).read_bytes() == (root / name).read_bytes(), (
            "nox -s bench -- claims"
        )


def test_chart_has_no_date(record: dict[str, Any]) -> None:
    chart = forest(record)
    assert b"dc:date" not in chart
    assert b"gsm8k-strict-bf16 " in chart


def test_changed_rows_make_the_page_stale(checkout: Path) -> None:
    with (checkout / CLAIMS).open("a") as file:
        file.write("# changed\n")
    with pytest.raises(ClaimsStaleError):
        check_pages(Project(checkout), PAGE)


def test_changed_raw_results_are_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "records/bench/card/cardb_aime30_c1_thinking.json"
    path.write_text(path.read_text().replace('"max_tokens": 13000', '"max_tokens": 10000'))
    assert main(["bench", "claims"]) == ClaimsFileError.exit_code
    assert "SHA-256 does not match" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"kind": "single", "share": {"arm": "z", "of": 1, "right": 1}}, "unknown arm z"),
        ({"kind": "speedup", "value": "1", "base": "x", "run": "y"}, "unknown raw results x, y"),
        (derived("1e3", "ratio", "1", "2"), "value: invalid number '1e3': expected digits"),
        (derived("1", "ratio", "1/0"), "c0: of.0: invalid number '1/0'"),
        (derived("1", "ratio", "1,319", "2"), "of.0: invalid number '1,319'"),
        ({**derived("1", "ratio"), "of": [4.1]}, "of.0: invalid number 4.1: expected digits"),
        (derived("1", "ratio", "1", "9" * 400), "of.1: invalid number"),
        (derived("-3.0", "points", "91.8", "94.8"), "91.8 is not a share: write 91.8 % as 0.918"),
        (derived("0.76", "stderr", "91.8", "1319"), "91.8 is not a share"),
        (derived("2.4", "length", "0.81", "60"), "60 is not a share"),
        (derived("1", "rato", "1", "1"), r"unknown rule 'rato' \(did you mean 'ratio'\?\)"),
        (
            derived("1", "ratio", "1", "1", start=3),
            r"unknown key start \(did you mean 'starts'\?\)",
        ),
        ({"kind": "deriven"}, "unknown kind 'deriven': expected single, bare, comparison"),
        ({"kind": "range", "values": ["1"], "low": math.nan, "high": 1}, "low: .*finite"),
        (derived("1", "ratio", "1"), "takes 2 numbers, not 1"),
        (derived("0", "ratio", "0", "1", arms=["a"]), "arms are of a ratio above 0"),
        (derived("95", "more-by", "1", "2", arms=["a"]), "arms are of a ratio above 0"),
        (comparison(31, 30, 30, "higher"), "31 of 30 cannot be right"),
        ({"kind": "single", "share": {"arm": "a", "of": 30, "value": "91.8"}}, "as 0.918"),
        ({"kind": "single", "share": {"arm": "a", "of": 30}}, "expected right or value"),
        (
            {"kind": "series", "first": ["1", "2"], "second": ["1", "2", "3"], "confounded": "x"},
            "2 values against 3",
        ),
    ],
)
def test_invalid_rows_are_refused(claim: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_claims(rows(claim))


@pytest.mark.parametrize("value", ["0", "0.00", "-3"])
def test_published_rate_is_above_zero(value: str) -> None:
    published = {"arm": "a", "workload": "w", "concurrency": 1, "value": value}
    served = {"a": {"preset": "p", "artifact": "q"}}
    with pytest.raises(ValueError, match=f"{value} is not a rate"):
        parse_claims({**rows(), "serve": served, "published": [published]})


OTHER = """card = "x"
revision = "1"
[arm]
a = {}
[[claim]]
id = "many"
says = "n = 30"
at = "Evaluation"
group = "quality"
kind = "single"
share = { arm = "a", of = 30, value = "0.84" }
"""


def test_another_card_is_judged_and_nothing_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    (tmp_path / "card.toml").write_text(OTHER)
    before = (root / RECORD).read_bytes()
    assert main(["bench", "claims", str(tmp_path / "card.toml"), "--json"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    assert (verdict["word"], verdict["detail"]) == ("contradicted", "no count of 30 gives 0.84")
    assert main(["bench", "claims", str(tmp_path / "card.toml")]) == 0
    assert "arithmetic: no count" in " ".join(capsys.readouterr().out.split())
    assert (root / RECORD).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["card.toml"]


def test_words_of_a_card_are_printed_as_text(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_FORGE_ROOT", str(root))
    row = derived("1", "ratio", "1", "1", says="a [/b] [red]c")
    (tmp_path / "card.json").write_text(json.dumps(rows(row)))
    assert main(["bench", "claims", str(tmp_path / "card.json")]) == 0
    assert "a [/b] [red]c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("card.md", "# A card", "card.md is not a list of claims"),
     ("card.toml", "claim = [3]", "claim.0: "), ("card.toml", 'claim = "a"', "claim: "),
     ("card.json", "[1]", "valid dictionary")],
)  # fmt: skip
def test_other_files_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ClaimsFileError, match=message):
        read_claims(tmp_path / name)


def test_row_that_cannot_be_computed_is_named() -> None:
    with pytest.raises(ClaimsFileError, match="invalid claim c0: float division by zero"):
        verdicts(parse_claims(rows(derived("1", "ratio", "1", "0"))), {})


@pytest.mark.parametrize(
    ("value", "cap", "expected"),
    [("2.0", 100, Word.UNDECIDED), ("1.5", 100, Word.UNDECIDED), ("1.5", 80, Word.UNDECIDED),
     ("2.0", 80, Word.CONTRADICTED), ("1.8", 100, Word.CONTRADICTED)],
)  # fmt: skip
def test_speedup_is_of_tokens_or_of_wall_time_at_one_cap(
    value: str, cap: int, expected: Word
) -> None:
    answers = [{"q1": Answer(right=True, stopped=True, tokens=tokens)} for tokens in (60, 45)]
    claims = rows({"kind": "speedup", "value": value, "base": "a", "run": "b"})
    raw = {"file": "a.json", "of": "x", "sha256": "0" * 64}
    runs = {"a": RawRun(100, 2.0, answers[0]), "b": RawRun(cap, 1.0, answers[1])}
    (verdict,) = verdicts(parse_claims({**claims, "raw": {"a": raw, "b": raw}}), runs)
    assert verdict.word is expected


def test_infinite_numbers_of_raw_results_are_refused(tmp_path: Path) -> None:
    row = '{"id": "a", "ok": true, "finish": "stop", "completion_tokens": 1e999}'
    text = f'{{"details": [{row}], "totals": {{"wallclock_s": 1}}, "meta": {{"max_tokens": 9}}}}'
    (tmp_path / "a.json").write_text(text)
    raw = Raw(file="a.json", of="x", sha256=hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(ClaimsFileError, match="cannot convert float infinity"):
        read_run(tmp_path, raw)


def test_raw_results_of_other_items_are_refused() -> None:
    answers = {"q1": Answer(right=True, stopped=True, tokens=10)}
    claims = rows({"kind": "speedup", "value": "1", "base": "a", "run": "b"})
    raw = {"file": "a.json", "of": "x", "sha256": "0" * 64}
    parsed = parse_claims({**claims, "raw": {"a": raw, "b": raw}})
    runs = {"a": RawRun(100, 1.0, answers), "b": RawRun(100, 1.0, {"q2": answers["q1"]})}
    with pytest.raises(ClaimsFileError, match="the runs answered different items"):
        verdicts(parsed, runs)


def test_bounds_of_many_items_are_computed_at_once() -> None:
    found = statistics.mcnemar_bounds(4900, 4700, 10**7)
    assert found.best < found.worst < 0.05
    assert found.limit == 4700


def test_duplicate_claims_are_refused() -> None:
    claim = derived("1", "ratio", "1", "1") | {"id": "same"}
    with pytest.raises(ValueError, match="duplicate claim same"):
        parse_claims(rows(claim, claim))


def test_other_commands_do_not_load_the_libraries() -> None:
    code = "import sys, vllm_forge.cli, vllm_forge.pages.registry; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True).stdout
    assert not {"scipy", "matplotlib", "aiohttp"} & set(loaded.split())


def test_missing_library_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "claims"]) == LibraryMissingError.exit_code
    message = capsys.readouterr().err
    assert "missing scipy, matplotlib" in message
    assert "pip install 'WHEEL[bench]'" in message, "no index has the project"
