"""A process that has imported what the helpers' processes need, and forks these: an import takes longer than a fork.

Each process that asks has one of its own, which ends when that does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ("learner_process", "cutting", "terminator")
"""What most helpers run. None of it imports torch or begins a thread, which a fork would lose."""


class Nursery:
    """The process; it begins with `begin`, or with the first request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def begin(self) -> None:
        with self._lock:
            self._begin()

    def start(self, main: Callable[..., None], pipe: Connection, *arguments: Any) -> int:
        """Run ``main(pipe, *arguments)`` in a new process, with this one's folder, path, stdout, and stderr; its pid.

        The pid is that process's until `collect`, even if it ends before.
        """
        return self._ask("start", (sys.path, os.getcwd(), pickle.dumps((main, arguments))), (pipe.fileno(), 1, 2))

    def collect(self, pid: int) -> None:
        """Wait for the end of a process."""
        self._ask("collect", pid)

    def wait_for_stop(self, pid: int) -> None:
        """Wait until SIGSTOP has stopped a process."""
        self._ask("wait_for_stop", pid)

    def _begin(self) -> None:
        if self._owner == os.getpid():
            return
        self._line, theirs = Pipe()
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
            command = [sys.executable, __file__, str(theirs.fileno())]
            os.posix_spawn(sys.executable, command, os.environ, file_actions=[nothing])
        self._owner = os.getpid()

    def _ask(self, what: str, about: Any, descriptors: tuple[int, ...] = ()) -> int:
        with self._lock:
            self._begin()
            try:
                self._line.send((what, about))
                for descriptor in descriptors:
                    reduction.send_handle(self._line, descriptor, 0)
                answer: int = self._line.recv()
                return answer
            except BaseException:  # such as Ctrl-C; the answer must not be taken for that to the next request
                self._owner = 0
                self._line.close()
                raise


NURSERY = Nursery()


def _serve(line: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the terminal is for the tests
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        what, about = line.recv()
        answer = 0
        if what == "start":
            descriptors = [reduction.recv_handle(line) for _ in range(3)]
            answer = os.fork()
            if answer == 0:
                line.close()
                _live(*about, *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            with contextlib.suppress(ChildProcessError):  # of a nursery that was given up
                os.waitid(os.P_PID, about, os.WEXITED if what == "collect" else os.WSTOPPED | os.WNOWAIT)
        line.send(answer)


def _live(path: list[str], folder: str, work: bytes, pipe: int, stdout: int, stderr: int) -> None:
    """All that a new process does."""
    try:
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.close(stdout)
        os.close(stderr)
        sys.path = path
        os.chdir(folder)
        main, arguments = pickle.loads(work)
        main(Connection(pipe), *arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the tests have ended
        _serve(Connection(int(sys.argv[1])))
