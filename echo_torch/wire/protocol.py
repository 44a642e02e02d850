"""echo wire version 1 as plain values: bytes in, bytes out; no sockets, no threads, no torch.

* The server sends one greeting as soon as the connection is open: ``magic, version, num_arrays`` and, for each array,
  ``itemsize, num_dims, dims``. The magic has 4 bytes, the version 1, all else is uint32, little-endian.
* After the greeting, the server sends nothing but acks: one byte, 0x01, for each payload, in order.
* The client sends payloads back to back. A payload is the leaves of one sample, concatenated, each in C order.
* The peer is not trusted: no count that it sends makes us read or hold more than `HANDSHAKE_LIMIT` bytes. So we keep
  the greeting as the bytes that the server sent (`WireLeaves`).
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

from echo_torch.errors import HandshakeError, ProtocolError

# The first bytes of a greeting.
MAGIC = b"ECHO"
# The only version that we speak.
VERSION = 1
# What the server sends for each payload.
ACK = b"\x01"

# A greeting that announces more arrays or dimensions than these is noise. NumPy itself stops at 64 dimensions.
MAX_ARRAYS = 4096
MAX_DIMS = 64
# The longest greeting that we accept, in bytes.
HANDSHAKE_LIMIT = 64 * 1024

# magic, version, num_arrays
_HEADER = struct.Struct("<4sBI")
# itemsize, num_dims; the dims follow
_ARRAY = struct.Struct("<II")


class WireLeaf(NamedTuple):
    """What the wire says about one leaf: the bytes per item and the shape, but no dtype."""

    itemsize: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.itemsize * math.prod(self.shape)


class WireLeaves(Sequence[WireLeaf]):
    """The leaves that a complete greeting announces. Equal to every sequence of the same leaves.

    Parses the bytes again for each access, because objects would take up to thirty times their memory.
    """

    # Equal to lists, too, which have no hash.
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, greeting: bytes | bytearray) -> None:
        # The whole greeting, already checked by `Handshake`.
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
    """Parses a server's greeting from bytes that arrive in any pieces.

    Read at most `missing` bytes, pass them to `feed`, and repeat until `leaves` is not None. If you read more, you may
    take acks that follow the greeting.
    """

    def __init__(self) -> None:
        # All bytes so far.
        self._data = bytearray()
        # How many arrays are not parsed yet.
        self._arrays_left = 0
        # How many bytes are parsed: none, or the header and some whole arrays.
        self._parsed = 0
        # How many bytes, in all, the next step needs.
        self._needed = _HEADER.size
        # What the greeting announces; None until it is complete.
        self.leaves: WireLeaves | None = None

    @property
    def missing(self) -> int:
        """How many more bytes the next step needs; 0 once the handshake is complete."""
        return self._needed - len(self._data)

    @property
    def received(self) -> int:
        """How many bytes were fed so far."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """Parse the next bytes, at most `missing` of them.

        Raises:
            HandshakeError: wrong magic (raised at its first wrong byte), another wire version, or a count above its
                limit. Drop the object then.
            ValueError: more than `missing` bytes.
        """
        if len(data) > self.missing:
            raise ValueError(f"fed {len(data)} bytes where {self.missing} were missing")
        self._data += data
        self._check_greeting()
        while self.leaves is None and self.missing == 0:
            self._parse_next()

    def _check_greeting(self) -> None:
        magic = bytes(self._data[: len(MAGIC)])
        if not MAGIC.startswith(magic):
            raise HandshakeError(f"unexpected handshake magic: got {magic!r}, expected {MAGIC!r}; no echo server?")
        if len(self._data) > len(MAGIC) and self._data[len(MAGIC)] != VERSION:
            raise HandshakeError(
                f"unsupported echo wire version {self._data[len(MAGIC)]}; this client speaks {VERSION}"
            )

    def _parse_next(self) -> None:
        """Parse the next header, whose bytes are complete, and set how many bytes the step after it needs."""
        if self._parsed == 0:  # the greeting's own header
            self._arrays_left = _HEADER.unpack_from(self._data)[2]
            _check_limit("num_arrays", self._arrays_left, MAX_ARRAYS)
            self._parsed = _HEADER.size
        else:
            num_dims = _ARRAY.unpack_from(self._data, self._parsed)[1]
            _check_limit("num_dims", num_dims, MAX_DIMS)
            end = self._parsed + _ARRAY.size + 4 * num_dims
            # An array comes in two steps, because only its num_dims tells how long it is.
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
    """Return the greeting of a server whose samples have these leaves, in wire order."""
    parts = [_HEADER.pack(MAGIC, VERSION, len(leaves))]
    for leaf in leaves:
        parts.append(_ARRAY.pack(leaf.itemsize, len(leaf.shape)))
        parts.append(struct.pack(f"<{len(leaf.shape)}I", *leaf.shape))
    return b"".join(parts)


def check_acks(data: bytearray, count: int, outstanding: int) -> None:
    """Check that what the server sent is acks, and not too many.

    Args:
        data: a buffer; its first ``count`` bytes are what was read.
        count: how many bytes were read.
        outstanding: how many payloads had no ack when they were read.

    Raises:
        ProtocolError: more acks than payloads, or a byte that is not an ack.
    """
    if count > outstanding:
        raise ProtocolError(f"got {count} acks while {outstanding} payloads were un-acked")
    if data.count(ACK, 0, count) != count:
        wrong = next(byte for byte in data[:count] if byte != ACK[0])
        raise ProtocolError(f"got byte 0x{wrong:02x} where only acks (0x01) are allowed")
