"""How a process learns what its DataLoader workers, or other children, sent for the same sink.

Each child that sends for a sink keeps one small file, in a folder of the sink in the temporary folder that the sink was
made with, and its parent reads it::

    echo_torch-<token of the sink>-<user>/<pid of the parent>.<pid of the child>.<random>

* The file holds `FIELDS`, numbers of 8 bytes, each stored at once, then times, an error's text, and the numbers of each
  of several learners. The child maps and
  writes it, but for ``finish``, by which the parent asks the child to deliver everything and end its connection. That
  is for daemonic children, such as a DataLoader's workers, which end with their parent, and not by themselves.
* A child holds a lock on its file for as long as it lives: the system takes it away when the child dies, in whatever
  way, or closes the file, however often it is open there. So each file has one writer, and its parent as the reader.
* An interrupt may break off whatever a parent does here: its descriptors belong to objects that C code closes.
* A file appears under its name when it is locked. It goes when its parent has counted it, or when parent and child are
  dead and the folder of another sink is made: for its first child, or when it is closed.
* A parent's empty file for no child, ``<pid of the parent>.0.<flag>``, tells those that come later what has happened.
  It goes, with the folder, when the parent drops the sink or ends.
"""

from __future__ import annotations

import contextlib
import errno
import io
import mmap
import os
import secrets
import stat
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, ProtocolError
from echo_torch.metrics.stats import PeerCounts
from echo_torch.metrics.timing import TIMES_BYTES, Times

from .file_locks import call_if_unlocked, has_ended, is_alive, try_lock

FIELDS = (
    "sent",
    "acked",
    "dropped",
    "reconnects",
    "resent",
    "maybe_duplicated",
    "maybe_lost",
    "daemon",
    "closed",
    "finish",
    "error_kind",
    "error_bytes",
    "learners",
)
SUMMED_FIELDS = FIELDS[:7]
"""Those that add up over children."""
ERROR_KINDS = (None, DeliveryTimeoutError, ConnectionClosedError, ProtocolError)
"""What an entry's ``error_kind`` stands for."""
_PAGE = 4096
_TIMES_AT = 8 * len(FIELDS)
_TEXT_BYTES = 2048
_TEXT_AT = _TIMES_AT + TIMES_BYTES
_PEER_COUNTS_AT = _TEXT_AT + _TEXT_BYTES
_PEER_COUNTS = struct.Struct(f"={len(PeerCounts._fields)}q")
SINK_CLOSED = "closed"
"""The flag of a parent that has closed the sink, which ends it for daemonic children."""
LEARNER_GONE = "gone"
"""The flag of a parent whose children did not find the learner, which the next need not wait for as long."""
_PREFIX = "echo_torch-"
_FALLBACK_FOLDER = "/tmp"


class LedgerEntry:
    """The file of one child: its numbers, by name.

    Args:
        path: where it is.
        descriptor: in the child, which locked it; owned from now on.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = descriptor
        self._closed = False
        with io.FileIO(path if descriptor is None else descriptor, "r+", closefd=descriptor is None) as file:
            mapped = mmap.mmap(file.fileno(), 0)
        self._bytes: memoryview | bytearray = memoryview(mapped)
        self._numbers: memoryview | list[int] = self._bytes[:_TIMES_AT].cast("q")

    def __getitem__(self, field: str) -> int:
        return self._numbers[_INDEX[field]]

    def __setitem__(self, field: str, number: int) -> None:
        self._numbers[_INDEX[field]] = number

    @property
    def times(self) -> Times:
        """Where the child's time went."""
        return Times.from_bytes(self._bytes[_TIMES_AT:_TEXT_AT])

    def write_times(self, times: Times) -> None:
        """Not all at once: who reads them meanwhile gets some from before."""
        self._bytes[_TIMES_AT:_TEXT_AT] = times.to_bytes()

    @property
    def peer_counts(self) -> list[PeerCounts]:
        """What the child sent to each learner."""
        end = _PEER_COUNTS_AT + self["learners"] * _PEER_COUNTS.size
        return [PeerCounts(*numbers) for numbers in _PEER_COUNTS.iter_unpack(self._bytes[_PEER_COUNTS_AT:end])]

    def write_peer_counts(self, peers: Iterable[PeerCounts]) -> None:
        """Not all at once either."""
        packed = b"".join(_PEER_COUNTS.pack(*counts) for counts in peers)
        self._bytes[_PEER_COUNTS_AT : _PEER_COUNTS_AT + len(packed)] = packed

    @property
    def child_pid(self) -> int:
        """Its process id."""
        return int(self.path.name.split(".")[1])

    @property
    def error(self) -> str:
        return bytes(self._bytes[_TEXT_AT : _TEXT_AT + self["error_bytes"]]).decode(errors="replace")

    def write_error(self, kind: int, text: str) -> None:
        """Say, once, what ended the child's connection."""
        if not self["error_kind"]:
            said = text.encode()[:_TEXT_BYTES]
            self._bytes[_TEXT_AT : _TEXT_AT + len(said)] = said
            self["error_bytes"] = len(said)
            self["error_kind"] = kind  # last, since it says that there is a text

    @property
    def is_dead(self) -> bool:
        """In the parent: whether the child has ended, in whatever way, or closed the file."""
        try:
            return self._closed or call_if_unlocked(self.path, lambda: None)
        except FileNotFoundError:  # somebody has removed it, such as a cleaner of old files; it is still mapped
            return has_ended(self.child_pid)

    def close(self) -> None:
        """Let go of the file, and of the lock; idempotent. Other threads may still read the numbers, as they are now.

        What is mapped is freed with the last reference: one of them may be reading it.
        """
        if not self._closed:
            self._closed = True
            self._numbers, self._bytes = list(self._numbers), bytearray(self._bytes)
            if self._descriptor is not None:
                os.close(self._descriptor)


_INDEX = {name: index for index, name in enumerate(FIELDS)}


def new_token() -> str:
    """What a sink and its copies have in common: how the path of their folder begins, which nobody has made yet."""
    try:
        home = os.path.abspath(tempfile.gettempdir())
    except FileNotFoundError:  # there is none to write to, which only children need
        home = ""
    return os.path.join(home, _PREFIX + secrets.token_hex(16))


def folder_path(token: str) -> Path:
    """Where the children of a sink keep their files, if any do; on another host, that may be somewhere else.

    All processes of a host and user must come to the same one, whatever each takes for its temporary folder.
    """
    folder = Path(f"{token}-{os.getuid()}")
    if os.access(folder.parent, os.W_OK | os.X_OK):
        return folder
    return Path(_FALLBACK_FOLDER if os.path.isdir(_FALLBACK_FOLDER) else tempfile.gettempdir(), folder.name)


def create_entry(token: str, parent: int, daemon: bool = False, learners: int = 1) -> LedgerEntry:
    """In a child: a new file of its own, locked, for what so many learners are sent.

    Raises:
        ConnectionClosedError: the child is daemonic, and its parent has closed the sink.
        OSError: none can be made.
    """
    folder = folder_path(token)
    name = f"{parent}.{os.getpid()}.{secrets.token_hex(8)}"  # process ids come again
    path = folder / f".{name}"
    while True:
        try:
            _make_folder(folder)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
        except FileNotFoundError:  # swept away, being empty, just after it was made
            if not folder.parent.is_dir():
                raise
    try:
        # A file with a hole would end who writes there on a full disk.
        size = -(-(_PEER_COUNTS_AT + learners * _PEER_COUNTS.size) // _PAGE) * _PAGE
        if os.write(descriptor, bytes(size)) < size:
            raise OSError(errno.ENOSPC, f"no room for {size} bytes in {folder}")
        try:
            try_lock(descriptor)
        except OSError as error:
            what = f"{error.strerror}; {folder.parent} does not support locks, set TMPDIR to a folder that does"
            raise OSError(error.errno, what) from error
        entry = LedgerEntry(path, descriptor)
        entry["daemon"] = int(daemon)
        entry["learners"] = learners
        entry.path = path.rename(folder / name)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    if daemon and has_flag(token, parent, SINK_CLOSED):  # looked at only now, since the parent sets it before it looks
        entry["closed"] = 1
        entry.path.unlink(missing_ok=True)
        entry.close()
        raise ConnectionClosedError("this sink was closed")
    return entry


def entry_paths(token: str, parent: int) -> list[Path]:
    """The files of a process's children."""
    try:
        folder = folder_path(token)
        names = os.listdir(folder)
        _check_owner(folder)
    except FileNotFoundError:  # none was made, or it was removed just now, being empty
        return []
    mine, flags = f"{parent}.", f"{parent}.0."
    paths = (folder / name for name in names if name.startswith(mine) and not name.startswith(flags))
    return [path for path in paths if not path.is_symlink()]


def set_flag(token: str, parent: int, flag: str) -> None:
    """Tell children of ``parent`` that come later, if there is a place for it."""
    with contextlib.suppress(OSError):
        folder = folder_path(token)
        _make_folder(folder)
        (folder / f"{parent}.0.{flag}").touch(0o600)


def clear_flag(token: str, parent: int, flag: str) -> None:
    with contextlib.suppress(OSError):
        (folder_path(token) / f"{parent}.0.{flag}").unlink()


def has_flag(token: str, parent: int, flag: str) -> bool:
    with contextlib.suppress(OSError):
        return (folder_path(token) / f"{parent}.0.{flag}").exists()
    return False


def remove_files(token: str, parent: int) -> None:
    """Remove the files of this process, of its children, whatever they hold, and the folder if nobody has a file in it.

    Does nothing if this is not ``parent``, but a forked copy of it.
    """
    if os.getpid() != parent:
        return
    with contextlib.suppress(OSError, ValueError):
        folder = folder_path(token)
        _check_owner(folder)
        for path in folder.iterdir():
            if path.name.startswith(f"{parent}."):
                path.unlink(missing_ok=True)
            elif path.name.startswith(f".{parent}."):  # of a child that died before it was done, or is not yet
                call_if_unlocked(path, path.unlink)
            else:  # of a child that was a parent itself
                _remove_if_dead(path)
        folder.rmdir()


def remove_leftovers(home: Path) -> None:
    """Remove what runs that crashed have left: files of dead children with dead parents, and empty folders."""
    for folder in home.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError, ValueError):  # of another user, in use again, or nothing that we made
            _check_owner(folder)
            for path in folder.iterdir():
                _remove_if_dead(path)
            folder.rmdir()


def _remove_if_dead(path: Path) -> None:
    parent, child = map(int, path.name.lstrip(".").split(".")[:2])
    if child == os.getpid() or is_alive(parent):
        return
    with contextlib.suppress(FileNotFoundError):
        call_if_unlocked(path, path.unlink)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        remove_leftovers(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_owner(folder)


def _check_owner(folder: Path) -> None:
    """The folder's name is a secret until it is made; still, nobody else shall be able to have made it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder}: expected a folder of this user's, for nobody else")
