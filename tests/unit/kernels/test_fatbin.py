"""The reader of device code: on code made by hand, whole and damaged."""

from __future__ import annotations

import random
import signal
import struct
from contextlib import suppress
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.support import fatbins as made
from vllm_forge.kernels.coverage.device_code import Target, device_code, parse_capability, runs_on
from vllm_forge.kernels.coverage.library import compiled_for, kernels, without_stubs
from vllm_forge.kernels.errors import UnknownFatbinError, UnknownTargetError


def read(content: bytes) -> list[tuple[str, str]]:
    return [(code.kind, str(code.target)) for code in device_code(content, "lib.so")]


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("sm_100a", Target(10, 0, "a")),
        ("compute_80", Target(8, 0)),
        ("120f", Target(12, 0, "f")),
        ("10.3a", Target(10, 3, "a")),
        ("lto_90", Target(9, 0)),
    ],
)
def test_target_is_parsed(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize("text", ["", "sm_", "sm_100b", "100af", "sm_9", "ten", "sm_100 "])
def test_invalid_target_is_rejected(text: str) -> None:
    with pytest.raises(UnknownTargetError):
        Target.parse(text)


@pytest.mark.parametrize("text", ["10.3a", "103", "sm_103"])
def test_invalid_capability_is_rejected(text: str) -> None:
    with pytest.raises(UnknownTargetError):
        parse_capability(text)


# What NVIDIA's documents say, by (target, kind): the capabilities it runs on, of these.
GPUS = ((8, 0), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))
RUNS = {
    ("80", "cubin"): {(8, 0)},
    ("80", "ptx"): set(GPUS),
    ("90", "cubin"): {(9, 0)},
    ("90a", "cubin"): {(9, 0)},
    ("90a", "ptx"): {(9, 0)},
    ("100", "cubin"): {(10, 0), (10, 3)},
    ("100", "ptx"): {(10, 0), (10, 3), (11, 0), (12, 0), (12, 1)},
    ("100a", "cubin"): {(10, 0)},
    ("100f", "cubin"): {(10, 0), (10, 3)},
    ("100f", "ptx"): {(10, 0), (10, 3)},
    ("103", "cubin"): {(10, 3)},
    ("103f", "cubin"): {(10, 3)},
    ("103a", "cubin"): {(10, 3)},
    ("120", "cubin"): {(12, 0), (12, 1)},
    ("120f", "cubin"): {(12, 0), (12, 1)},
    ("120a", "cubin"): {(12, 0)},
    ("121a", "cubin"): {(12, 1)},
    ("120", "lto"): {(12, 0), (12, 1)},
}


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_code_runs_on_its_gpus(name: str, kind: Any) -> None:
    runs = {gpu for gpu in GPUS if runs_on(Target.parse(name), kind, gpu)}
    assert runs == RUNS[name, kind]


def test_a_family_without_a_row_is_an_error() -> None:
    with pytest.raises(UnknownTargetError, match="130f"):
        runs_on(Target(13, 0, "f"), "cubin", (13, 0))


# --- fatbins ------------------------------------------------------------------------------------

FORMS = ["90", "90a", "100", "100a", "100f", "103a", "120", "120a", "120f"]


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["cubin", "ptx", "lto"]), st.sampled_from(FORMS), st.booleans()
            ),
            max_size=4,
        ),
        max_size=4,
    ),
    st.integers(0, 3),
)
def test_every_entry_is_found(groups: list[list[tuple[str, str, bool]]], gap: int) -> None:
    """Fatbins with zeros between them; order, number and place of entries are kept."""
    parts = [
        made.fatbin(*(made.entry(k, t, b"x" * 50, compress=c) for k, t, c in group))
        + bytes(8 * gap)
        for group in groups
    ]
    content = made.library(*parts)
    codes = device_code(content)
    wanted = [(kind, target) for group in groups for kind, target, _ in group]
    assert [(code.kind, str(code.target)) for code in codes] == wanted
    for code in codes:
        assert code.unpacked == (50 if code.compression else 56)
        payload = content[code.offset : code.offset + code.stored]
        if code.compression:
            assert payload == zstandard.ZstdCompressor().compress(b"x" * 50)
        else:
            assert payload == b"x" * 50 + bytes(6)


def test_relocatable_code_has_a_section_of_its_own() -> None:
    content = made.library(made.fatbin(made.entry("cubin", "120f")), section="__nv_relfatbin")
    assert read(content) == [("cubin", "120f")]
    with pytest.raises(UnknownFatbinError, match="belong to no fatbin"):
        device_code(made.library(made.fatbin(GOOD), b"\1" * 8, section="__nv_relfatbin"))


def test_fatbins_in_data_are_found() -> None:
    """As cuBLASLt keeps them."""
    one = made.fatbin(made.entry("cubin", "100f"))
    content = made.library(b"table\0\0\0", one, b"more....", one, section=".cask_resource")
    assert read(content) == [("cubin", "100f")] * 2


def test_constants_in_host_code_are_ignored() -> None:
    magic = struct.pack("<IHH", made.MAGIC, 1, 16)
    assert device_code(made.library(magic + b"\xc7\x84\x24" * 9, section=".text2", flags=6)) == []


def test_other_files_have_no_code() -> None:
    assert device_code(b"") == []
    assert device_code(b"#!/bin/sh\n" * 20) == []


GOOD = made.entry("cubin", "100a")
DAMAGED = {
    "bytes between fatbins": (b"\1" + bytes(7), "belong to no fatbin"),
    "fatbin version": (made.fatbin(GOOD, version=2), "version 2"),
    "fatbin longer than its section": (made.fatbin(GOOD)[:-8], "longer than its section"),
    "cut header": (made.fatbin()[:8], "cuts off"),
    "entry kind": (made.fatbin(made.entry("ptx", "80", number=64)), "kind 64"),
    "entry version": (made.fatbin(made.entry("ptx", "80", version=0x102)), "version 0x102"),
    "unknown flag": (made.fatbin(made.entry("ptx", "80", flags=1 << 30)), "flags"),
    "both suffixes": (made.fatbin(made.entry("cubin", "100a", flags=made.FAMILY)), "architecture"),
    "lto flag on ptx": (made.fatbin(made.entry("ptx", "80", flags=made.LTO)), "flags"),
    "compressed without a size": (made.fatbin(made.entry("ptx", "80", flags=made.ZSTD)), "flags"),
    "cut entry": (struct.pack("<IHHQ", made.MAGIC, 1, 16, 32) + bytes(32), "cuts off"),
    "entry longer than its fatbin": (
        struct.pack("<IHHQ", made.MAGIC, 1, 16, len(GOOD) - 8) + GOOD,
        "longer than its fatbin",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_unknown_layout_is_an_error(name: str) -> None:
    section, words = DAMAGED[name]
    with pytest.raises(UnknownFatbinError, match=words) as caught:
        device_code(made.library(made.fatbin(GOOD), section), "lib.so")
    assert "lib.so, section .nv_fatbin" in caught.value.where


def test_a_damaged_fatbin_in_data_is_an_error() -> None:
    content = made.library(made.fatbin(made.entry("ptx", "80", number=64)), section=".rodata")
    with pytest.raises(UnknownFatbinError, match="kind 64"):
        device_code(content)


# --- kernels ------------------------------------------------------------------------------------


def test_kernels_of_cubins_and_ptx_are_found() -> None:
    content = made.kernel_library(
        {"cubin 120f": {"fast": 4096, "other": 512}, "cubin 80": {"fast": 4096}, "ptx 80": ["fast"]}
    )
    found = kernels(content)
    assert {name: [f"{b.kind} {b.target}" for b in bodies] for name, bodies in found.items()} == {
        "fast": ["cubin 120f", "cubin 80", "ptx 80"],
        "other": ["cubin 120f"],
    }


def test_stub_is_dropped() -> None:
    """FlashMLA's sm_90 kernel as it is compiled for 100f: 768 bytes beside 62,848."""
    content = made.kernel_library(
        {"cubin 90a": {"sm90": 62848, "small": 512}, "cubin 100f": {"sm90": 768, "small": 384}}
    )
    found = {name: without_stubs(bodies) for name, bodies in kernels(content).items()}
    assert {name: [str(b.target) for b in bodies] for name, bodies in found.items()} == {
        "sm90": ["90a"],
        "small": ["90a", "100f"],
    }


def test_a_cubin_for_another_architecture_than_its_entry_says_is_an_error() -> None:
    lie = made.library(made.fatbin(made.entry("cubin", "120", made.cubin("100", {"k": 512}))))
    with pytest.raises(UnknownFatbinError, match="sm_100, where its entry says cubin for 120"):
        kernels(lie)


@pytest.mark.parametrize("payload", [b"not an ELF file.", b""])
def test_invalid_cubin_is_an_error(payload: bytes) -> None:
    with pytest.raises(UnknownFatbinError, match="not an ELF file"):
        kernels(made.library(made.fatbin(made.entry("cubin", "120", payload))))


def test_a_damaged_stream_is_an_error() -> None:
    whole = made.kernel_library({"cubin 120": {"k": 512}})
    code = device_code(whole)[0]
    damaged = bytearray(whole)
    damaged[code.offset : code.offset + 8] = b"\xff" * 8
    with pytest.raises(UnknownFatbinError, match="zstd cannot read"):
        kernels(bytes(damaged))


def test_lz4_payload_is_an_error() -> None:
    flags = made.LZ4 | made.ZSTD
    content = bytearray(made.kernel_library({"cubin 120": {"k": 512}}))
    at = device_code(bytes(content))[0].header + 40
    (before,) = struct.unpack_from("<Q", content, at)
    struct.pack_into("<Q", content, at, before ^ flags)
    assert device_code(bytes(content))[0].compression == "lz4"
    with pytest.raises(UnknownFatbinError, match="lz4-compressed"):
        kernels(bytes(content))


def test_ptxas_note_has_the_target() -> None:
    assert str(compiled_for(made.cubin("100f", {}))) == "100f"
    assert compiled_for(b"no cubin") is None


def test_code_is_taken_out() -> None:
    whole = made.kernel_library({"cubin 100f": {"k": 900}, "cubin 120f": {"k": 900}})
    less = made.without(whole, lambda _, arch: arch == 120)
    assert read(less) == [("cubin", "100f")]
    assert len(less) == len(whole)


def test_damaged_library_is_read_or_refused() -> None:
    """Cut off, or with some other bytes; it ends soon, too."""
    code: Any = {"cubin 100a": {"one": 2000, "two": 300}, "ptx 80": ["one"]}
    whole = (made.kernel_library(code), made.cubin("100a", {"one": 2000}))
    draw = random.Random(1)  # noqa: S311
    signal.alarm(60)  # reading a section of zeros without an end
    for number in range(3000):
        damaged = bytearray(whole[number % 2])
        for at in draw.sample(range(len(damaged)), number % 4):
            damaged[at] = draw.choice([0, 1, 127, 255])
        for at in range(40, 64):
            damaged[at] = damaged[at] if draw.random() < 0.98 else draw.randrange(256)
        cut = draw.randrange(len(damaged)) if number % 5 == 0 else len(damaged)
        for read in (kernels, compiled_for):
            with suppress(UnknownFatbinError, UnknownTargetError):
                read(bytes(damaged[:cut]))
    signal.alarm(0)


def test_section_beyond_the_file_is_refused() -> None:
    content = bytearray(made.kernel_library({"ptx 80": ["one"]}))
    (table,) = struct.unpack_from("<Q", content, 0x28)
    struct.pack_into("<QQ", content, table + 2 * 64 + 24, 1 << 40, 1 << 40)
    with pytest.raises(UnknownFatbinError, match="not in the file"):
        device_code(bytes(content))


def test_payload_of_absurd_size_is_refused() -> None:
    content = bytearray(made.kernel_library({"cubin 100a": {"one": 2000}}))
    struct.pack_into("<Q", content, device_code(bytes(content))[0].header + 56, 1 << 40)
    with pytest.raises(UnknownFatbinError, match="zstd-compressed"):
        kernels(bytes(content))
