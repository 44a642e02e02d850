"""Wire version 1 as bytes: fed whole, split, short, wrong and hostile; no sockets, no threads."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_torch.errors import HandshakeError, ProtocolError
from echo_torch.wire.protocol import (
    ACK,
    HANDSHAKE_LIMIT,
    MAGIC,
    MAX_ARRAYS,
    MAX_DIMS,
    VERSION,
    Handshake,
    WireLeaf,
    check_acks,
    encode_handshake,
)

no_time_limit = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

U32_MAX = 2**32 - 1
GROWTH_BYTES = 16 * 1024
"""Room for what a growing bytearray takes in advance, an eighth, and for a few objects."""
GREETINGS = {
    "no arrays": ("4543484f 01 00000000", ()),
    "one scalar": ("4543484f 01 01000000  04000000 00000000", (WireLeaf(4, ()),)),
    "an image and a label": (
        "4543484f 01 02000000  01000000 03000000 03000000 54000000 00010000  08000000 00000000",
        (WireLeaf(1, (3, 84, 256)), WireLeaf(8, ())),
    ),
    "an empty leaf": ("4543484f 01 01000000  02000000 02000000 00000000 05000000", (WireLeaf(2, (0, 5)),)),
    "the largest dimension": ("4543484f 01 01000000  01000000 01000000 ffffffff", (WireLeaf(1, (U32_MAX,)),)),
}
each_greeting = pytest.mark.parametrize(
    ("data", "leaves"), [(bytes.fromhex(data), leaves) for data, leaves in GREETINGS.values()], ids=list(GREETINGS)
)

u32 = st.integers(0, U32_MAX) | st.integers(0, 9)
wire_leaves = st.lists(st.builds(WireLeaf, u32, st.lists(u32, max_size=5).map(tuple)), max_size=6)
piece_sizes = st.lists(st.integers(1, 24), min_size=1, max_size=8)


def read_handshake(stream: bytes, pieces: Iterable[int] = (1 << 20,)) -> tuple[Handshake, bytes]:
    """Feed ``stream`` in pieces of these sizes, over and over, as far as `missing` allows; also gives what is left."""
    handshake, at = Handshake(), 0
    for piece in itertools.cycle(pieces):
        if handshake.leaves is not None or at == len(stream):
            return handshake, stream[at:]
        data = stream[at : at + min(piece, handshake.missing)]
        handshake.feed(data)
        at += len(data)
        assert handshake.received == at
        assert at + handshake.missing <= HANDSHAKE_LIMIT
    raise AssertionError("unreachable: the pieces repeat for ever")


def header(num_arrays: int) -> bytes:
    return MAGIC + struct.pack("<BI", VERSION, num_arrays)


# What servers say.


@each_greeting
def test_literal_greetings_give_their_leaves_whole_and_byte_by_byte(data: bytes, leaves: tuple[WireLeaf, ...]) -> None:
    for piece in (len(data), 1):
        handshake, rest = read_handshake(data, (piece,))
        assert handshake.leaves == leaves
        assert (handshake.missing, rest, handshake.received) == (0, b"", len(data))


@each_greeting
def test_literal_greetings_are_what_is_encoded(data: bytes, leaves: tuple[WireLeaf, ...]) -> None:
    assert encode_handshake(leaves) == data


@each_greeting
def test_a_greeting_cut_short_anywhere_waits_for_more(data: bytes, leaves: tuple[WireLeaf, ...]) -> None:
    for end in range(len(data)):
        handshake, _ = read_handshake(data[:end])
        assert handshake.leaves is None
        assert 0 < handshake.missing <= len(data) - end


@no_time_limit
@given(leaves=wire_leaves, pieces=piece_sizes, acks=st.integers(0, 40))
def test_any_greeting_in_any_pieces_is_read_and_no_ack_with_it(leaves, pieces, acks) -> None:
    greeting = encode_handshake(leaves)
    handshake, rest = read_handshake(greeting + ACK * acks, pieces)
    assert handshake.leaves == tuple(leaves)
    assert handshake.received == len(greeting)
    assert rest == ACK * acks


def test_feeding_no_bytes_changes_nothing() -> None:
    handshake = Handshake()
    handshake.feed(b"")
    assert (handshake.missing, handshake.received, handshake.leaves) == (9, 0, None)


@pytest.mark.parametrize("fed", [b"", b"EC", header(1), header(0)])
def test_feeding_more_than_is_missing_raises(fed: bytes) -> None:
    handshake, _ = read_handshake(fed)
    with pytest.raises(ValueError, match="missing"):
        handshake.feed(bytes(handshake.missing + 1))
    assert handshake.received == len(fed)


@pytest.mark.parametrize(
    ("leaf", "nbytes"),
    [
        (WireLeaf(4, ()), 4),
        (WireLeaf(4, (2, 3)), 24),
        (WireLeaf(8, (5, 0)), 0),
        (WireLeaf(1, (U32_MAX,) * 2), U32_MAX**2),
    ],
)
def test_nbytes_of_a_leaf(leaf: WireLeaf, nbytes: int) -> None:
    assert leaf.nbytes == nbytes


def test_leaves_are_a_sequence_like_any_other() -> None:
    expected = (WireLeaf(1, (3, 84, 256)), WireLeaf(8, ()), WireLeaf(1, (U32_MAX,)))
    leaves = read_handshake(encode_handshake(expected))[0].leaves
    assert leaves is not None
    assert (leaves[0], leaves[-1], leaves[1:]) == (expected[0], expected[-1], expected[1:])
    assert leaves == list(expected) == leaves
    assert leaves != expected[:2]
    assert leaves != (*expected[:2], WireLeaf(1, (3,)))
    assert leaves != 3
    assert repr(leaves) == f"WireLeaves({list(expected)})"
    with pytest.raises(IndexError):
        leaves[3]


# What no server of version 1 says.


@pytest.mark.parametrize("right", range(4))
def test_wrong_magic_is_refused_at_its_first_wrong_byte(right: int) -> None:
    handshake = Handshake()
    handshake.feed(MAGIC[:right])
    with pytest.raises(HandshakeError, match="magic"):
        handshake.feed(b"?")


@pytest.mark.parametrize("answer", [b"HTTP/1.1 ", b"SSH-2.0-O", bytes(9), b"ECHo\x01\0\0\0\0", b"echo\x01\0\0\0\0"])
def test_other_protocols_are_told_from_echo_by_the_magic(answer: bytes) -> None:
    with pytest.raises(HandshakeError, match="magic") as caught:
        read_handshake(answer)
    assert repr(answer[:4]) in str(caught.value)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_versions_are_refused_by_number_before_anything_after_it(version: int) -> None:
    for rest in (b"", bytes(4)):
        with pytest.raises(HandshakeError, match=rf"wire version {version}\b"):
            read_handshake(MAGIC + bytes([version]) + rest)


@pytest.mark.parametrize("count", [MAX_ARRAYS + 1, 2**31, U32_MAX])
def test_too_many_arrays_are_refused_by_their_count_alone(count: int) -> None:
    with pytest.raises(HandshakeError, match=f"{count} num_arrays.*{MAX_ARRAYS}"):
        read_handshake(header(count))


@pytest.mark.parametrize("count", [MAX_DIMS + 1, 2**31, U32_MAX])
def test_too_many_dimensions_are_refused_by_their_count_alone(count: int) -> None:
    with pytest.raises(HandshakeError, match=f"{count} num_dims.*{MAX_DIMS}"):
        read_handshake(header(2) + encode_handshake([WireLeaf(4, (1,))])[9:] + struct.pack("<II", 1, count))


@pytest.mark.parametrize("leaves", [[WireLeaf(1, ())] * MAX_ARRAYS, [WireLeaf(1, (1,) * MAX_DIMS)]])
def test_counts_at_their_caps_are_accepted(leaves: list[WireLeaf]) -> None:
    handshake, rest = read_handshake(encode_handshake(leaves))
    assert handshake.leaves == tuple(leaves)
    assert rest == b""


# 65,533 bytes: the longest greeting under the limit, as every array takes a multiple of 4 after the 9 of the header.
LONGEST_GREETING = [WireLeaf(1, (1,) * MAX_DIMS)] * 248 + [WireLeaf(1, (1,) * 11)]


def test_the_longest_greeting_is_accepted() -> None:
    data = encode_handshake(LONGEST_GREETING)
    assert HANDSHAKE_LIMIT - 4 < len(data) <= HANDSHAKE_LIMIT
    assert read_handshake(data)[0].leaves == tuple(LONGEST_GREETING)


@pytest.mark.parametrize(
    "leaves",
    [
        [*LONGEST_GREETING[:-1], WireLeaf(1, (1,) * 12)],
        [*LONGEST_GREETING, WireLeaf(1, ())],
        [WireLeaf(1, (1,) * MAX_DIMS)] * MAX_ARRAYS,
    ],
    ids=["one dimension more", "one array more", "all arrays and dimensions at their caps"],
)
def test_more_than_the_limit_is_refused_before_it_is_held(leaves: list[WireLeaf]) -> None:
    """`read_handshake` checks at every step that what is held and what is asked for stay within the limit."""
    with pytest.raises(HandshakeError, match=f"handshake bytes.*{HANDSHAKE_LIMIT}"):
        read_handshake(encode_handshake(leaves))


@pytest.mark.parametrize(
    "leaves", [LONGEST_GREETING, [WireLeaf(U32_MAX, (U32_MAX,))] * MAX_ARRAYS], ids=["long", "many"]
)
def test_a_greeting_costs_no_more_memory_than_its_bytes(leaves: list[WireLeaf]) -> None:
    """However they are divided into leaves and dimensions; comparing them, and naming some, included."""
    data, half = encode_handshake(leaves), [*leaves[: len(leaves) // 2], WireLeaf(1, ())]
    tracemalloc.start()
    try:
        handshake = Handshake()
        at = 0
        while handshake.leaves is None:
            step = handshake.missing
            handshake.feed(data[at : at + step])
            at += step
        assert handshake.leaves == leaves
        assert handshake.leaves != half
        cost = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert cost < HANDSHAKE_LIMIT + GROWTH_BYTES


def corrupt_byte(greeting: bytes, at: int, byte: int) -> bytes:
    at %= len(greeting)
    return greeting[:at] + bytes([byte]) + greeting[at + 1 :]


@no_time_limit
@given(
    noise=st.binary(max_size=80)
    | st.binary(max_size=80).map(lambda data: MAGIC + bytes([VERSION]) + data)
    | st.builds(corrupt_byte, wire_leaves.map(encode_handshake), st.integers(0, 1000), st.integers(0, 255)),
    padding=st.sampled_from([b"\0", b"\x01", b"\xff"]),
    pieces=piece_sizes,
)
def test_any_bytes_end_in_leaves_or_a_handshake_error(noise: bytes, padding: bytes, pieces: list[int]) -> None:
    """Within the limit, whatever a peer says and however long it goes on."""
    stream = noise + padding * (HANDSHAKE_LIMIT - len(noise))
    try:
        handshake, rest = read_handshake(stream, pieces)
    except HandshakeError:
        return
    assert handshake.leaves is not None
    assert encode_handshake(handshake.leaves) + rest == stream


# Acks.


@pytest.mark.parametrize(
    ("data", "count", "outstanding"),
    [(b"", 0, 0), (b"\x01", 1, 1), (b"\x01" * 5, 5, 9), (b"\x01" * 64, 64, 64), (b"\x01\x01\xee", 2, 3)],
    ids=["none", "the only one", "fewer than due", "all", "the buffer is longer than what was read"],
)
def test_expected_acks_pass(data: bytes, count: int, outstanding: int) -> None:
    read_into = bytearray(data)
    assert check_acks(read_into, count, outstanding) is None
    assert read_into == data


@pytest.mark.parametrize(("count", "outstanding"), [(1, 0), (2, 1), (65, 64)])
def test_an_ack_too_many_is_refused_with_both_counts(count: int, outstanding: int) -> None:
    with pytest.raises(ProtocolError, match=rf"{count} acks while {outstanding} payloads"):
        check_acks(bytearray(ACK * count), count, outstanding)


@pytest.mark.parametrize("wrong", [0x00, 0x02, 0xFF])
def test_a_wrong_byte_anywhere_is_refused_and_named(wrong: int) -> None:
    for at in range(8):
        data = bytearray(ACK * 8)
        data[at] = wrong
        with pytest.raises(ProtocolError, match=f"0x{wrong:02x}"):
            check_acks(data, 8, 8)
