"""echo wire version 1 as plain values: bytes in, bytes out; no sockets, no threads, no torch.

* The server speaks first and once: ``magic, version, num_arrays`` and, per array, ``itemsize, num_dims, dims``, all
  little-endian. Everything after it that comes from the server is acks.
* The client sends payloads back to back. A payload is the leaves of one sample, C order, concatenated.
* An ack is one byte, 0x01, per payload and in order.
* A peer is not trusted: no count it sends makes us read or hold more than `HANDSHAKE_LIMIT` bytes. So what it announces
  stays the bytes that it sent (`WireLeaves`).
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from echo_torch.errors import HandshakeError, ProtocolError

MAGIC = b"ECHO"
VERSION = 1
ACK = b"\x01"

# A sample of more arrays or dimensions than these is taken for noise: numpy itself stops at 64 dimensions.
MAX_ARRAYS = 4096
MAX_DIMS = 64
# All of the handshake, in bytes.
HANDSHAKE_LIMIT = 64 * 1024

_HEADER = struct.Struct("<4sBI")
_ARRAY = struct.Struct("<II")


class WireLeaf(NamedTuple):
    """All that the wire knows of one leaf: the bytes per item and the shape, but no dtype."""

    itemsize: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


class WireLeaves(Sequence[WireLeaf]):
    """The leaves that a whole greeting announces, read from its bytes whenever they are asked for.

    As objects they would take up to thirty times the memory. Equal to every sequence of the same leaves.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, greeting: bytes | bytearray) -> None:
        self._greeting = greeting

    def __len__(self) -> int:
        num_arrays: int = _HEADER.unpack_from(self._greeting)[2]
        return num_arrays

    def __iter__(self) -> Iterator[WireLeaf]:
        at = _HEADER.size
        for _ in range(len(self)):
            itemsize, num_dims = _ARRAY.unpack_from(self._greeting, at)
            dims_at = at + _ARRAY.size
            yield WireLeaf(itemsize, struct.unpack_from(f"<{num_dims}I", self._greeting, dims_at))
            at = dims_at + 4 * num_dims

    @overload
    def __getitem__(self, index: int) -> WireLeaf: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[WireLeaf, ...]: ...
    def __getitem__(self, index: int | slice) -> WireLeaf | tuple[WireLeaf, ...]:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    def __repr__(self) -> str:
        return f"WireLeaves({list(self)})"


class Handshake:
    """Reads a server's greeting from bytes that arrive in any pieces.

    Call `feed` with what was read until `leaves` is not None. ``missing`` says how many more bytes may be read now
    without taking an ack that follows.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._arrays_left = 0  # how many are not parsed yet
        self._parsed = 0
        self._needed = _HEADER.size
        self.leaves: WireLeaves | None = None

    @property
    def missing(self) -> int:
        """Bytes without which the next step cannot be taken; 0 once the handshake is complete."""
        return self._needed - len(self._data)

    @property
    def received(self) -> int:
        """Bytes that were fed so far."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Take the next bytes, at most `missing` of them.

        Raises:
            HandshakeError: wrong magic (as early as its first wrong byte), another wire version, or counts over the
                caps. The object is of no use afterwards.
        """
        if len(data) > self.missing:
            raise ValueError(f"fed {len(data)} bytes where {self.missing} were missing")
        self._data += data
        self._check_greeting()
        while self.leaves is None and self.missing == 0:
            self._parse_header()

    def _check_greeting(self) -> None:
        magic = bytes(self._data[: len(MAGIC)])
        if not MAGIC.startswith(magic):
            raise HandshakeError(f"unexpected handshake magic: got {magic!r}, expected {MAGIC!r}; no echo server?")
        if len(self._data) > len(MAGIC) and self._data[len(MAGIC)] != VERSION:
            raise HandshakeError(
                f"unsupported echo wire version {self._data[len(MAGIC)]}; this client speaks {VERSION}"
            )

    def _parse_header(self) -> None:
        """Parse one header whose bytes are all there, and say what is needed next."""
        if self._parsed == 0:
            self._arrays_left = _HEADER.unpack_from(self._data)[2]
            _check_limit("num_arrays", self._arrays_left, MAX_ARRAYS)
            self._parsed = _HEADER.size
        else:
            num_dims = _ARRAY.unpack_from(self._data, self._parsed)[1]
            _check_limit("num_dims", num_dims, MAX_DIMS)
            end = self._parsed + _ARRAY.size + 4 * num_dims
            if len(self._data) < end:
                self._need(end)
                return
            self._parsed = end
            self._arrays_left -= 1
        if self._arrays_left:
            self._need(self._parsed + _ARRAY.size)
        else:
            self.leaves = WireLeaves(self._data)

    def _need(self, total: int) -> None:
        _check_limit("handshake bytes", total, HANDSHAKE_LIMIT)
        self._needed = total


def _check_limit(what: str, got: int, limit: int) -> None:
    if got > limit:
        raise HandshakeError(f"handshake announces {got} {what}, more than the {limit} that this client accepts")


def encode_handshake(leaves: Sequence[WireLeaf]) -> bytes:
    """The greeting of a server whose samples have these leaves."""
    parts = [_HEADER.pack(MAGIC, VERSION, len(leaves))]
    for leaf in leaves:
        parts.append(_ARRAY.pack(leaf.itemsize, len(leaf.shape)))
        parts.append(struct.pack(f"<{len(leaf.shape)}I", *leaf.shape))
    return b"".join(parts)


def check_acks(data: bytearray, count: int, outstanding: int) -> None:
    """Check the first ``count`` bytes of ``data``, read while ``outstanding`` payloads waited for their acks.

    Raises:
        ProtocolError: more acks than payloads, or a byte that is no ack.
    """
    if count > outstanding:
        raise ProtocolError(f"got {count} acks while {outstanding} payloads were un-acked")
    if data.count(ACK, 0, count) != count:
        wrong = next(byte for byte in data[:count] if byte != ACK[0])
        raise ProtocolError(f"got byte 0x{wrong:02x} where only acks (0x01) can be")
