"""How a process learns what its DataLoader workers, or other children, sent for the same sink.

Each child that sends for a sink keeps one small file, in a folder of the sink in the temporary folder, and its parent
reads it::

    echo_torch-<token of the sink>/<pid of the parent>.<pid of the child>.<number>

* The file holds `FIELDS`, numbers of 8 bytes, each stored at once, then an error's text. The child maps and writes it,
  but for ``finish``, by which the parent asks the child to deliver everything and end its connection.
* A child holds a lock on its file for as long as it lives: the system takes it away when the child dies, in whatever
  way. A lock is of a process, so no other may open the file there: each has one writer, and its parent as the reader.
* A file appears under its name when it is locked. It goes when its parent has counted it, or when parent and child are
  dead and another sink's folder is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import stat
import tempfile
from pathlib import Path

FIELDS = (
    "sent",
    "acked",
    "dropped",
    "reconnects",
    "resent",
    "maybe_duplicated",
    "maybe_lost",
    "blocked_us",
    "closed",
    "finish",
    "error_kind",
    "error_bytes",
)
COUNTED = FIELDS[:8]
"""Those that add up over children."""
_SIZE = 4096
_TEXT_AT = 8 * len(FIELDS)
_PREFIX = "echo_torch-"
_numbers = itertools.count()


class Entry:
    """The file of one child: its numbers, by name."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
        try:
            if flags:
                os.ftruncate(self._descriptor, _SIZE)
            self._map = mmap.mmap(self._descriptor, _SIZE)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._bytes = memoryview(self._map)
        self._numbers = self._bytes[:_TEXT_AT].cast("q")

    def __getitem__(self, field: str) -> int:
        return self._numbers[_INDEX[field]]

    def __setitem__(self, field: str, number: int) -> None:
        self._numbers[_INDEX[field]] = number

    @property
    def child(self) -> int:
        """Its process id."""
        return int(self.path.name.split(".")[1])

    @property
    def error(self) -> str:
        return bytes(self._bytes[_TEXT_AT : _TEXT_AT + self["error_bytes"]]).decode(errors="replace")

    def fail(self, kind: int, text: str) -> None:
        """Say, once, what ended the child's connection."""
        if not self["error_kind"]:
            said = text.encode()[: _SIZE - _TEXT_AT]
            self._bytes[_TEXT_AT : _TEXT_AT + len(said)] = said
            self["error_bytes"] = len(said)
            self["error_kind"] = kind  # last, since it says that there is a text

    def lock(self) -> bool:
        """Have the file locked by this process; False if its child holds it, and so lives."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let go of it, and of the lock."""
        self._numbers.release()
        self._bytes.release()
        self._map.close()
        os.close(self._descriptor)


_INDEX = {name: index for index, name in enumerate(FIELDS)}


def folder_of(token: str) -> Path:
    """Where the children of a sink keep their files, if any do."""
    return Path(tempfile.gettempdir(), _PREFIX + token)


def begin(token: str, parent: int) -> Entry:
    """In a child: a new file of its own, locked."""
    folder = folder_of(token)
    name = f"{parent}.{os.getpid()}.{next(_numbers)}"
    while True:
        try:
            _make(folder)
            entry = Entry(folder / f".{name}", os.O_CREAT | os.O_EXCL)
            break
        except FileNotFoundError:  # swept away, being empty, just after it was made
            continue
    entry.lock()
    entry.path = entry.path.rename(folder / name)
    return entry


def entries_of(token: str, parent: int) -> list[Path]:
    """The files of a process's children."""
    folder = folder_of(token)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    _check_mine(folder)
    return [folder / name for name in names if name.startswith(f"{parent}.")]


def remove(token: str) -> None:
    """Remove the folder, if nobody has a file in it."""
    with contextlib.suppress(OSError):
        folder_of(token).rmdir()


def sweep() -> None:
    """Remove what runs that crashed have left: files of dead children with dead parents, and empty folders."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):  # of another user, in use again, or nothing that we made
            _check_mine(folder)
            for path in folder.iterdir():
                _sweep(path)
            folder.rmdir()


def _sweep(path: Path) -> None:
    parent, child = map(int, path.name.lstrip(".").split(".")[:2])
    if child == os.getpid() or _lives(parent):
        return
    entry = Entry(path)
    if entry.lock():
        path.unlink()
    entry.close()


def _make(folder: Path) -> None:
    if not folder.exists():
        sweep()
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_mine(folder)


def _check_mine(folder: Path) -> None:
    """The folder's name is a secret until it is made; still, nobody else shall be able to have made it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder}: expected a folder of this user's, for nobody else")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
