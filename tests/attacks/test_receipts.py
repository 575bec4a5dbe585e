"""Receipts: anyone who may write a file below records/receipts, or run the suite, is not believed.

What they say is compared with the repository. Where keys are trusted, only their signatures count;
without keys a receipt is as trustworthy as the commit that added it, and is shown as unsigned.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gpu.harness import run
from tests.gpu.harness.errors import InputError
from tests.gpu.harness.identity import identity
from tests.support.keys import key_pair, trust
from tests.support.layouts import layout_config
from tests.support.receipts import (
    FILE,
    IDENTITY,
    IMAGE,
    NOW,
    SERVED,
    body,
    edit,
    green_run,
    small_project,
)
from vllm_forge.checkpoints.fixtures.full import make_recipe, write_full
from vllm_forge.checkpoints.fixtures.sparse import MARK, SIGN
from vllm_forge.errors import ForgeError
from vllm_forge.pages.status import status
from vllm_forge.project import Project
from vllm_forge.receipts import FOLDER
from vllm_forge.receipts.receipt import DIGEST, VALID, make_statement, write_receipt
from vllm_forge.receipts.verification import preset_state, read_receipts, verify_all
from vllm_forge.serve.plan import make_plan
from vllm_forge.signing import FOLDER as KEYS
from vllm_forge.signing import load_private

if TYPE_CHECKING:
    from pathlib import Path


PLACE = f"{FOLDER}/{IMAGE}/h200--0.26--soak.json"


@pytest.fixture
def project(root: Path, tmp_path: Path) -> Project:
    return small_project(root, tmp_path / "project")


def commit(project: Project, result: dict[str, Any], key: Path | None = None) -> Path:
    return write_receipt(
        project.root / FOLDER, make_statement(result), load_private(key) if key else None
    )


def state(project: Project, *, sku: str = "h200", line: str = "0.26", image: str = IMAGE) -> str:
    """What serve and plan show for the preset and artifact of ``SERVED``."""
    receipts = read_receipts(project, NOW, image=f"sha256:{image}")
    preset, artifact = SERVED["preset"], SERVED["artifact"]
    return preset_state(project, receipts, project.cell(sku, line), preset, artifact)


def test_preset_that_a_soak_run_served_is_shown_with_its_receipt(project: Project) -> None:
    commit(project, green_run(project, "soak", **SERVED))
    assert state(project) == f"receipts: {PLACE}, unsigned"
    assert read_receipts(project, NOW).lines(project.root) == [f"{PLACE}, unsigned"]
    assert "image, unsigned" in status(project)


@pytest.mark.parametrize(
    ("tier", "facts", "where"),
    [
        ("server", SERVED, {}),
        ("soak", {}, {}),
        ("soak", SERVED | {"preset": "h200-plain"}, {}),
        ("soak", SERVED | {"artifact": "flash-w4a16-fp8-mtp"}, {}),
        ("soak", SERVED | {"identity": "2e" * 32}, {}),
        ("soak", {name: SERVED[name] for name in ("preset", "artifact")}, {}),
        ("soak", SERVED, {"sku": "b200"}),
        ("soak", SERVED, {"line": "0.33"}),
        ("soak", SERVED, {"image": "e" * 64}),
    ],
    ids=["tier", "no facts", "preset", "artifact", "other bytes", "no identity", "sku", "line",
         "image"],
)  # fmt: skip
def test_preset_is_green_only_by_its_own_proof(
    project: Project, tier: str, facts: dict[str, str], where: dict[str, str]
) -> None:
    commit(project, green_run(project, tier, **facts))
    assert len(read_receipts(project, NOW).valid) == 1
    assert state(project, **where) == "not run"


def test_rehearsal_that_a_soak_run_served_is_not_the_artifact(
    project: Project, tmp_path: Path
) -> None:
    """Nothing can pin it as the artifact by mistake; without its sign its config.json differs."""
    folder = tmp_path / SERVED["artifact"]
    write_full(make_recipe(SERVED["artifact"], layout_config("card"), 2), folder)
    with pytest.raises(InputError, match="this-is-a-rehearsal"):
        identity(folder)
    (folder / SIGN).rmdir()
    rehearsed = identity(folder)
    config = json.loads((folder / "config.json").read_text())
    del config[MARK]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    matrix = project.root / "matrix.toml"
    matrix.write_text(matrix.read_text().replace(IDENTITY, identity(folder)))
    pinned = Project(project.root)
    commit(pinned, green_run(pinned, "soak", **SERVED | {"identity": rehearsed}))
    assert len(read_receipts(pinned, NOW).valid) == 1
    assert state(pinned) == "not run"
    commit(pinned, green_run(pinned, "soak", **SERVED | {"identity": identity(folder)}))
    assert state(pinned) == f"receipts: {PLACE}, unsigned"


def test_artifact_whose_bytes_nobody_pinned_is_never_green(project: Project) -> None:
    path = project.root / "matrix.toml"
    path.write_text(path.read_text().replace(f'identity = "{IDENTITY}"\n', ""))
    unpinned = Project(project.root)
    commit(unpinned, green_run(unpinned, "soak", **SERVED))
    assert state(unpinned) == "not run"


def test_tensor_parallel_preset_needs_as_many_gpus(project: Project) -> None:
    assert project.matrix.preset[SERVED["preset"]].tensor_parallel == 2
    result = green_run(project, "soak", **SERVED)
    del result["gpus"][1]
    path = commit(project, result)
    assert state(project) == "not run"
    gpus = body_of(path)["gpus"]
    edit(path, lambda data: body(data).update(gpus=gpus * 2), consistent=True)
    with pytest.raises(ForgeError, match="two GPUs of one UUID"):
        verify_all(project, NOW)


def test_tier_for_two_gpus_is_not_proven_on_one(project: Project) -> None:
    result = green_run(project, "tp2")
    del result["gpus"][1]
    commit(project, result)
    with pytest.raises(ForgeError, match="tier tp2 is for 2 GPUs, the receipt is of 1"):
        verify_all(project, NOW)


def body_of(path: Path) -> dict[str, Any]:
    return body(json.loads(base64.b64decode(json.loads(path.read_text())["payload"])))


def test_test_for_another_gpu_served_nothing(project: Project) -> None:
    result = green_run(project, "soak")
    result["tests"][f"{FILE}::test_elsewhere"]["facts"] = SERVED
    commit(project, result)
    assert state(project) == "not run"


def test_refused_receipt_is_reported_and_proves_nothing(project: Project) -> None:
    path = commit(project, green_run(project, "soak", **SERVED))
    for now in (NOW + VALID, NOW):
        receipts = read_receipts(project, now, image=IMAGE)
        assert receipts.valid == ()
        assert receipts.lines(project.root)[0].startswith(f"{PLACE} is refused: ")
        edit(path, lambda data: data["predicate"].update(result="FAILED"), consistent=False)
    assert "Refused:" in status(project)


def test_signature_that_was_removed_is_missed(project: Project, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    trust(project.root, public)
    path = commit(project, green_run(project, "soak", **SERVED), private)
    assert state(project) == f"receipts: {PLACE}"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"signatures": []}))
    assert state(project) == "not run"
    with pytest.raises(ForgeError, match="the receipt is unsigned"):
        verify_all(project, NOW)


@pytest.mark.parametrize("what", ["file", "image", "receipts", "records"])
def test_link_out_of_the_repository_is_refused(project: Project, tmp_path: Path, what: str) -> None:
    path = commit(project, green_run(project, "soak", **SERVED))
    link = {"file": 0, "image": 1, "receipts": 2, "records": 3}[what]
    target = (path, *path.parents)[link]
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    receipts = read_receipts(project, NOW, image=IMAGE)
    assert receipts.valid == ()
    assert receipts.lines(project.root)[0].endswith(("it is a link", "not a plain file"))
    assert state(project) == "not run"


@pytest.mark.parametrize("place", [PLACE, f"{KEYS}/release.pem", f"{KEYS}/keyring.toml"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "huge", "link"])
def test_special_file_is_refused_without_waiting(
    project: Project, tmp_path: Path, place: str, kind: str
) -> None:
    _, public = key_pair(tmp_path)
    trust(project.root, public)
    path = project.root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(public)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(ForgeError, match=r"not a plain file|larger than"):
        verify_all(project, NOW)


@pytest.mark.parametrize("content", ["", "not a key", None])
def test_broken_key_proves_nothing_and_stops_nothing(project: Project, content: str | None) -> None:
    """It concerns receipts only: serve, plan and the status page show none as valid."""
    commit(project, green_run(project, "soak", **SERVED))
    trusted = trust(project.root, (content or "").encode())
    if content is None:
        trusted.unlink()
        trusted.mkdir()
    receipts = read_receipts(project, NOW, image=IMAGE)
    assert receipts.valid == ()
    lines = receipts.lines(project.root)
    assert [line.partition(" is refused: ")[0] for line in lines] == [KEYS, PLACE]
    assert all("not a public key" in line for line in lines)
    assert state(project) == "not run"
    assert status(project).count("not a public key") == 2
    plan = make_plan(project, project.cell("h200", "0.26"))
    assert {row["state"] for row in plan["presets"]} == {"not run"}
    with pytest.raises(ForgeError, match="not a public key"):
        verify_all(project, NOW)


@pytest.mark.parametrize("name", ["release.pub", "README.md", ".release.pem.swp"])
def test_unknown_file_among_the_keys_is_reported(
    project: Project, tmp_path: Path, name: str
) -> None:
    trust(project.root, key_pair(tmp_path)[1])
    (project.root / KEYS / name).write_text("")
    with pytest.raises(ForgeError, match="unknown file") as caught:
        verify_all(project, NOW)
    assert caught.value.where.endswith(name)


Envelopes = tuple[dict[str, Any], dict[str, Any]]  # of a trusted signer, and of a stranger
SIGNATURES: dict[str, tuple[Callable[[Envelopes], dict[str, Any]], str]] = {
    "a stranger's too": (
        lambda two: two[0] | {"signatures": two[0]["signatures"] + two[1]["signatures"]},
        "not among the trusted",
    ),
    "a stranger's under the trusted id": (lambda two: renamed(two[1], two[0]), "invalid signature"),
    "the trusted one under a stranger's id": (
        lambda two: renamed(two[0], two[1]),
        "not among the trusted",
    ),
    "twice": (lambda two: two[0] | {"signatures": two[0]["signatures"] * 2}, "Multiple signatures"),
    "of another type": (
        lambda two: two[0] | {"payloadType": "application/json"},
        "unknown payload type",
    ),
    "of another payload": (
        lambda two: two[0] | {name: two[1][name] for name in ("payload", DIGEST)},
        "invalid signature",
    ),
}


def renamed(envelope: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """With the id of the other one's key."""
    keyid = other["signatures"][0]["keyid"]
    return envelope | {"signatures": [envelope["signatures"][0] | {"keyid": keyid}]}


@pytest.mark.parametrize("name", SIGNATURES)
def test_foreign_signature_is_refused(project: Project, tmp_path: Path, name: str) -> None:
    envelopes = []
    for signer in ("trusted", "stranger"):
        private, public = key_pair(tmp_path / signer)
        if signer == "trusted":
            trust(project.root, public)
        result = green_run(project, "soak", **SERVED)
        result["tests"][f"{FILE}::test_one"]["why"] = signer
        path = commit(project, result, private)
        envelopes.append(json.loads(path.read_text()))
    path.write_text(json.dumps(envelopes[0]))
    assert len(verify_all(project, NOW)) == 1
    change, message = SIGNATURES[name]
    path.write_text(json.dumps(change((envelopes[0], envelopes[1]))))
    with pytest.raises(ForgeError, match=message):
        verify_all(project, NOW)


def test_key_of_another_kind_is_not_trusted(project: Project, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    commit(project, green_run(project, "soak", **SERVED), private)
    trusted = trust(project.root, public)
    pems = [private.read_bytes()]
    pems += [key_pair(tmp_path / kind, kind)[1].read_bytes() for kind in ("rsa", "p384")]
    for pem in pems:
        trusted.write_bytes(pem)
        with pytest.raises(ForgeError, match=r"not a public key|not an Ed25519 or P-256 key"):
            verify_all(project, NOW)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"PASSED"', b'"\\u0050ASSED"'),
        (b'"measured":1.0', b'"measured":1'),
        (b'"measured":1.0', b'"measured":1e0'),
        (b'"seconds":1.5', b'"seconds":NaN'),
        (b'"tier":"soak"', b'"tier":"server","tier":"soak"'),
        (b'Z"', b'+00:00"'),
        (b"{", b" {"),
        (b"{", b"\xef\xbb\xbf{"),
    ],
)
def test_payload_has_one_form(project: Project, old: bytes, new: bytes) -> None:
    """Readers differ in what they make of another one, and its digest is another."""
    path = commit(project, green_run(project, "soak", **SERVED))
    envelope = json.loads(path.read_text())
    payload = base64.b64decode(envelope["payload"])
    assert old in payload
    changed = payload.replace(old, new, 1)
    envelope["payload"] = base64.b64encode(changed).decode()
    path.write_text(json.dumps(envelope | {DIGEST: hashlib.sha256(changed).hexdigest()}))
    with pytest.raises(ForgeError, match=r"canonical form|not a receipt"):
        verify_all(project, NOW)


def test_receipt_is_valid_to_the_second(project: Project) -> None:
    commit(project, green_run(project, "soak", **SERVED))
    second = timedelta(seconds=1)
    for age, count in ((-second, 0), (0 * second, 1), (VALID - second, 1), (VALID, 0)):
        assert len(read_receipts(project, NOW + age).valid) == count, age


def shorten(data: dict[str, Any]) -> None:
    body(data)["started"] = body(data)["finished"]


def without_margins(data: dict[str, Any]) -> None:
    body(data)["tests"][f"{FILE}::test_one"]["margins"] = {}


def negative(data: dict[str, Any]) -> None:
    body(data)["tests"][f"{FILE}::test_one"]["margins"]["drafts"]["measured"] = -5.0


def markup(data: dict[str, Any]) -> None:
    body(data)["gpus"][0]["name"] += " [x](https://evil.example)"


def configuration(data: dict[str, Any]) -> dict[str, Any]:
    suite: dict[str, Any] = data["predicate"]["configuration"][0]
    return suite


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, "took 1.5 s, more than the whole run"),
        (without_margins, "lacks the margins of 1"),
        (negative, "greater than or equal to 0"),
        (markup, "gpus.0.name"),
        (lambda data: body(data).update(lock_sha256="0" * 64), "lock 0+, the line now has"),
        (lambda data: body(data).update(kind="environment"), "kind"),
        (lambda data: body(data).update(finished="9999-12-31T23:59:59Z"), "finished"),
        (lambda data: body(data).update(started="0001-01-01T00:00:00Z"), "the receipt is of"),
        (lambda data: body(data).update(started="2199-01-01T00:00:00Z"), "its clock changed"),
        (lambda data: body(data).update(finished="2199-01-01T00:00:00Z"), "one clock is wrong"),
        (lambda data: body(data)["gpus"][0].update(memory_mib=-1), "memory_mib"),
        (lambda data: data["subject"][1].update(name="vllm source, line 0.33"), "line 0.33"),
        (lambda data: configuration(data).update(name="tests/gpu, tier server"), "tier server"),
        (lambda data: data["subject"][0].update(name="x\x1b[2J"), "subject.0.name"),
    ],
)
def test_implausible_receipt_is_refused(
    project: Project, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = commit(project, green_run(project, "soak", **SERVED))
    edit(path, change, consistent=True)
    with pytest.raises(ForgeError, match=message):
        verify_all(project, NOW)


def test_receipt_of_the_future_is_on_no_page(project: Project) -> None:
    """The status page judges each receipt as of its own day, which must have come."""
    result = green_run(project, "soak")
    for name in ("started", "finished"):
        result[name] = result[name].replace("20", "21", 1)
    commit(project, result)
    assert read_receipts(project).valid == ()
    assert "Refused:" in status(project)


def test_error_text_of_a_receipt_is_escaped_on_the_page(project: Project) -> None:
    path = commit(project, green_run(project, "soak"))
    data = json.loads(path.read_text()) | {"payloadType": "[x](https://evil.example)<b>"}
    path.write_text(json.dumps(data))
    page = status(project)
    assert "\\[x\\](https://evil.example)\\<b\\>" in page


@pytest.mark.parametrize("place", ["key", "field", "test", "file", "bytes"])
def test_text_of_a_receipt_is_one_printable_line(project: Project, place: str) -> None:
    """It neither moves the cursor nor looks like another line of ``serve`` and ``plan``."""
    evil = "x\x1b[2J\u202e\nreceipts: all, signed"
    path = commit(project, green_run(project, "soak", **SERVED))
    data = json.loads(path.read_text())
    if place == "key":
        path.write_text(json.dumps(data | {"signatures": [{"keyid": evil, "sig": "eA=="}]}))
    elif place == "field":
        edit(path, lambda data: data["predicate"].update({evil: 1}), consistent=True)
    elif place == "test":
        tests = body_of(path)["tests"] | {evil: body_of(path)["tests"][f"{FILE}::test_one"]}
        edit(path, lambda data: body(data).update(tests=tests), consistent=True)
    else:
        name = b"x\xff.json" if place == "bytes" else f"{evil}.json".encode()
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/" + name))
    (line,) = read_receipts(project, NOW).lines(project.root)
    assert "is refused" in line
    assert line.isprintable()
    status(project).encode()
    assert "\x1b" not in status(project)


def test_identity_is_of_the_bytes_and_not_of_the_name(tmp_path: Path) -> None:
    def checkpoint(name: str, *, config: str = "{}", header: bytes = b"{}") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        shard = len(header).to_bytes(8, "little") + header
        (folder / "model-00001-of-00001.safetensors").write_bytes(shard)
        return folder

    first = identity(checkpoint("flash-nvfp4-fp8-mtp"))
    assert identity(checkpoint("copy")) == first
    assert identity(checkpoint("config", config='{"tiny": 1}')) != first
    assert identity(checkpoint("header", header=b'{"x": 1}')) != first
    with (checkpoint("size") / "model-00001-of-00001.safetensors").open("ab") as file:
        file.write(b"more")
    assert identity(tmp_path / "size") != first
    (tmp_path / "only config").mkdir()
    (tmp_path / "only config" / "config.json").write_text("{}")
    for folder in ("only config", "nowhere"):
        with pytest.raises(InputError, match="cannot identify the checkpoint"):
            identity(tmp_path / folder)


@pytest.mark.parametrize(
    "name", ["PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTHONPATH", "PYTHONSTARTUP",
             "FORGE_KIT_WORK", "VLLM_FORGE_RACE_SECONDS"]
)  # fmt: skip
def test_host_variable_does_not_steer_the_suite(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/evil")
    recorded = {"CUDA_VISIBLE_DEVICES": "1", "NCCL_P2P_DISABLE": "1"}
    for variable, value in recorded.items():
        monkeypatch.setenv(variable, value)
    assert name not in run.host_variables()
    assert run.host_record()["variables"] == recorded


# --- randomised structural edits ----------------------------------------------------------------

EDITS = 700  # of each of three kinds of forger
OTHERS: list[Any] = [None, True, 7, -1.5, "", "x", "passed", [], {}, ["x"], {"x": 1}]
# Evidence without a fixed form, as boot logs are: no verdict depends on it, unless it names what
# was served (above) or which kernel ran (tests/unit/receipts/test_selection_match.py). Fewer
# GPUs and more logs claim nothing that was not proven; a margin's name is only in the test.
FREE = {"facts", "host", "why", "name", "driver", "uuid_sha256", "memory_mib"}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = sorted(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path] * bool(path) + [p for key, item in items for p in places(item, (*path, key))]


def change_structure(draw: Callable[[Any], Any], document: Any, path: tuple[Any, ...]) -> None:
    """Delete, rename, repeat, retype, nest or swap what is at a path."""
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    key, value = path[-1], holder[path[-1]]
    kind = draw(st.sampled_from(["delete", "rename", "repeat", "retype", "nest", "add"]))
    if kind == "delete":
        del holder[key]
    elif kind == "retype":
        holder[key] = draw(st.sampled_from([o for o in OTHERS if type(o) is not type(value)]))
    elif kind == "nest":
        holder[key] = draw(st.sampled_from([[value], {"x": value}]))
    elif isinstance(holder, list):
        holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(value))
    elif kind == "rename":
        holder[f"{key}2"] = holder.pop(key)
    else:
        holder[f"{key}2"] = copy.deepcopy(value)


@pytest.mark.parametrize("forger", ["careless", "careful", "without the key"])
def test_structural_edits_are_refused(project: Project, tmp_path: Path, forger: str) -> None:
    """A careful forger writes the payload's digest, too; a trusted key is what stops any edit."""
    private, public = key_pair(tmp_path)
    key = private if forger == "without the key" else None
    if key is not None:
        trust(project.root, public)
    path = commit(project, green_run(project, "soak", **SERVED), key)
    whole = path.read_text()
    payload = json.loads(base64.b64decode(json.loads(whole)["payload"]))
    candidates = places(payload)
    if forger == "careful":
        candidates = [
            place
            for place in candidates
            if not FREE & set(map(str, place))
            and not {"configurations", "margins"} & set(place[:-1])
            and place[-2:-1] != ("gpus",)
        ]
    accepted: list[tuple[Any, ...]] = []
    count = 0

    @settings(
        max_examples=EDITS, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        place = data.draw(st.sampled_from(candidates))
        path.write_text(whole)
        edit(
            path,
            lambda document: change_structure(data.draw, document, place),
            consistent=forger != "careless",
        )
        if read_receipts(project, NOW).valid:
            accepted.append(place)

    attack()
    assert accepted == []
    assert count >= EDITS


def test_edits_of_the_envelope_are_refused(project: Project) -> None:
    path = commit(project, green_run(project, "soak", **SERVED))
    whole = json.loads(path.read_text())
    for place in places(whole):
        for other in OTHERS:
            envelope = copy.deepcopy(whole)
            envelope[place[0]] = other
            if other == whole[place[0]]:
                continue
            path.write_text(json.dumps(envelope))
            assert read_receipts(project, NOW).valid == ()
        path.write_text(json.dumps({name: v for name, v in whole.items() if name != place[0]}))
        assert read_receipts(project, NOW).valid == ()
    row = {"keyid": "x", "sig": "eA=="}
    for rows in ([row | {"keyid": 1}], [row, row | {"keyid": 1}], [row | {"sig": 1}], [row, 1]):
        path.write_text(json.dumps(whole | {"signatures": rows}))
        assert read_receipts(project, NOW).valid == ()
    path.write_text(json.dumps(whole | {"more": 1}))
    assert read_receipts(project, NOW).valid == ()
    assert DIGEST in whole
