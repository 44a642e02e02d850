"""What became of the samples: as a client counts them, and as `EchoSink.stats` tells it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Counts(NamedTuple):
    """What became of the samples of one client, in samples."""

    sent: int = 0
    """Accepted by ``send``; those sent again do not count."""
    unacked: int = 0
    """Of those, not acknowledged as far as is known."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Sent again then."""
    maybe_duplicated: int = 0
    """How many the server may have stored once too often, at the most: those sent again, and ``close``'s tail."""
    maybe_lost: int = 0
    """How many the server may not have stored, at the most; 0 while there is a connection, or hope for one."""


@dataclasses.dataclass(frozen=True)
class SinkStats:
    """What a sink did in this process and its DataLoader workers: samples and payload bytes since it connected."""

    samples_sent: int
    """Samples that ``send`` accepted."""
    bytes_sent: int
    samples_acked: int
    """Samples that the server acknowledged."""
    bytes_acked: int
    in_flight: int
    """Samples accepted and not acknowledged; after a connection was lost, those it took with it, maybe stored."""
    dropped: int
    """Samples given to ``send`` after the learner was gone, with ``on_error="warn"``, and those that a `SinkCallback`
    skipped for want of room."""
    blocked_seconds: float
    """Seconds that ``send`` waited for room."""
    reconnects: int = 0
    """How often a lost connection was opened again."""
    resent: int = 0
    """Samples that were sent again then."""
    maybe_duplicated: int = 0
    """How many more samples than were sent the learner may have got, at the most: those sent again, and the tail that
    `close` sends."""
    maybe_lost: int = 0
    """How many samples the learner may never get, at the most, now that the connection has ended: the un-acked ones,
    and the last ``replay_acked`` of the others unless `close` sent them again. 0 before that."""
