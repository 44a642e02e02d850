"""What a parent and those of its children that end with it tell each other for later, when some may not have begun.

It is kept in the ledger's folder. In a process that is no such child, nothing is told by a parent.
"""

from __future__ import annotations

import multiprocessing
import os

from echo_torch.routing.connector import WORKER_RECONNECT_S

from . import ledger
from .child import parent_of


class Marks:
    """Those of one process and its parent.

    Args:
        token: the sink's.
        origin: the process that made the sink.
    """

    def __init__(self, token: str, origin: int) -> None:
        self._token = token
        self._parent = parent_of(origin) if multiprocessing.current_process().daemon else None

    def close(self) -> None:
        """Tell children that the sink was closed here."""
        if not multiprocessing.current_process().daemon:  # which has no children that end with it
            ledger.mark(self._token, os.getpid(), ledger.CLOSED)

    @property
    def closed(self) -> bool:
        """Whether the parent has closed the sink."""
        return self._parent is not None and ledger.is_marked(self._token, self._parent, ledger.CLOSED)

    def tell_gone(self, gone: bool) -> None:
        """Tell the workers of later epochs whether the learner was found."""
        if self._parent is not None:
            (ledger.mark if gone else ledger.unmark)(self._token, self._parent, ledger.GONE)

    def patience(self, timeout: float | None) -> float | None:
        """Seconds to connect in, of ``timeout``: few if a worker before has waited for the learner in vain."""
        if self._parent is None or not ledger.is_marked(self._token, self._parent, ledger.GONE):
            return timeout
        return WORKER_RECONNECT_S if timeout is None else min(timeout, WORKER_RECONNECT_S)
