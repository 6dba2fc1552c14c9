"""What the kernel says on /dev/cachefiles, taken apart: the documented examples, and what no kernel should say."""

from __future__ import annotations

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nydusd.errors import FormatError
from nydusd.frontends.fscache import messages
from nydusd.frontends.fscache.messages import Close, Open, Read


def message(code: int, body: bytes, number: int = 3, object_id: int = 9) -> bytes:
    return struct.pack("=IIII", number, code, 16 + len(body), object_id) + body


def opening(volume: bytes, key: bytes, fd: int = 5) -> bytes:
    return message(0, struct.pack("=IIII", len(volume), len(key), fd, 0) + volume + key)


def test_each_kind_of_message_is_understood() -> None:
    assert messages.parse(opening(b"erofs,img1\0", b"img1")) == Open(3, 9, "img1", "img1", 5)
    assert len(opening(b"erofs,img1\0", b"img1")) == 47, "as a real kernel's"
    assert messages.parse(opening(b"erofs,dom1\0", b"a" * 64)) == Open(3, 9, "dom1", "a" * 64, 5)
    assert messages.parse(message(1, b"")) == Close(3, 9)
    assert messages.parse(message(2, struct.pack("=QQ", 4096, 131072))) == Read(3, 9, 4096, 131072)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "0 bytes"),
        (message(1, b"")[:15], "15 bytes"),
        (message(1, b"") + b"x", "16, but 17 bytes were read"),
        (message(7, b""), "opcode: 7"),
        (message(2, bytes(8)), "8 bytes, 16 expected"),
        (message(0, bytes(8)), "8 bytes, 16 at least"),
        (message(0, struct.pack("=IIII", 100, 100, 5, 0) + b"erofs,x\0"), "keys of 100 and 100 bytes in 8"),
        (message(0, struct.pack("=IIII", 0xFFFFFFFF, 1, 5, 0)), "keys of 4294967295"),
        (opening(b"nfs,x\0", b"y"), "is not of EROFS"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(raw: bytes, why: str) -> None:
    with pytest.raises(FormatError, match=why):
        messages.parse(raw)


def test_the_descriptor_of_an_open_that_is_not_understood_is_known_for_its_refusal() -> None:
    assert messages.refused(opening(b"nfs,x\0", b"y", fd=77)) == (3, 77)
    assert messages.refused(message(2, struct.pack("=QQ", 0, 1))) is None
    assert messages.refused(b"short") is None


@given(st.binary(max_size=200))
@example(message(0, bytes(16)))
def test_nothing_but_a_format_error_comes_of_any_bytes(raw: bytes) -> None:
    try:
        messages.parse(raw)
    except FormatError:
        messages.refused(raw)


def test_commands_are_what_the_kernel_takes_and_names_that_it_would_cut_are_refused() -> None:
    assert messages.setup("/cache", None) == [b"dir /cache", b"bind ondemand"]
    assert messages.setup("/cache", "t") == [b"dir /cache", b"tag t", b"bind ondemand"]
    assert (messages.copen(7, 4096), messages.copen(7, -2)) == (b"copen 7,4096", b"copen 7,-2")
    for folder, tag in (("/a\nb", None), ("/a", "x\ny"), ("/" + "a" * 5000, None)):
        with pytest.raises(FormatError, match="cannot be told to the kernel"):
            messages.setup(folder, tag)
