"""The ledger: one small memory-mapped file per child, by which a parent learns what the child sent for a sink.

Each sink has a folder for its files. It lies in the temporary folder of the process that made the sink::

    echo_torch-<random token>-<user id>/<pid of the parent>.<pid of the child>.<random>

* A file begins with `FIELDS`, numbers of 8 bytes that are each stored atomically. Behind them come the times, an
  error's text, and the counts of each learner. Those are not atomic: a reader may see them half written.
* The child writes everything but ``finish`` and ``counted``. With ``finish`` the parent asks a daemonic child, such as
  a DataLoader worker, to deliver and close. Such a child does not end by itself: it ends with its parent.
* A child locks its file for life, see `file_locks`. So its parent learns of its death, and every file has one writer.
* A file gets its name once it is locked. Until then the name begins with a dot.
* A parent makes the folder before its first child starts, and marks it as its own by the file
  ``<pid of the parent>.0.parent``. So no other sink removes or takes the folder while the parent lives. If the folder
  is missing later, something else removed it.
* The parent removes a file once it has counted what the file says. If parent and child are dead, the next sink that
  makes a folder removes the file.
* ``<pid of the parent>.0.<flag>`` is an empty file, a flag for children that start later. The parent removes it, with
  the folder, when it drops a closed sink, or ends.
* Ctrl-C may interrupt a parent anywhere in this module. Its descriptors do not leak, because they belong to objects
  that C code closes.
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

from echo_torch.errors import ConnectionClosedError, DeliveryTimeoutError, LearnerGoneError, ProtocolError
from echo_torch.metrics.stats import LOSS_FIELDS, PeerCounts
from echo_torch.metrics.timing import TIMES_BYTES, Times

from .file_locks import call_if_unlocked, has_ended, is_alive, try_lock

# The numbers of a file, in their order there.
FIELDS = (
    "sent",  # samples that `send` accepted
    "acked",  # acked samples from the first on, up to the first gap; all of them once the connection has ended
    "dropped",  # samples given to `send` and not sent
    *LOSS_FIELDS,
    "daemon",  # 1 if the child is daemonic
    "closed",  # 1 once the child has written its last report
    "finish",  # set to 1 by the parent: deliver everything and close
    "counted",  # set to 1 by the parent before it removes the file, because it needs no more reports
    "error_kind",  # an index into `ERROR_KINDS`; 0 if the connection has not failed
    "error_bytes",  # length of the error's text
    "learners",  # how many learners the child sends to
)
# The fields that add up over children.
SUMMED_FIELDS = ("sent", "acked", "dropped", *LOSS_FIELDS)
# The exceptions that ``error_kind`` stands for. If several children fail, the parent raises the one that stands last
# in this tuple.
ERROR_KINDS = (None, LearnerGoneError, DeliveryTimeoutError, ConnectionClosedError, ProtocolError)
# A file takes whole pages, of this many bytes.
_PAGE = 4096
# Where the parts of a file begin, and the most bytes of an error's text.
_TIMES_AT = 8 * len(FIELDS)
_TEXT_BYTES = 2048
_TEXT_AT = _TIMES_AT + TIMES_BYTES
_PEER_COUNTS_AT = _TEXT_AT + _TEXT_BYTES
# The counts of one learner.
_PEER_COUNTS = struct.Struct(f"={len(PeerCounts._fields)}q")
# The flag of a parent that has closed the sink: its daemonic children must not send any more.
SINK_CLOSED = "closed"
# The flag of a parent whose children did not find the learner: later ones wait for it only briefly.
LEARNER_GONE = "gone"
# The file by which a parent marks a folder as its own.
_PARENT = "parent"
# How the names of all folders begin.
_PREFIX = "echo_torch-"
# Where the folder lies if a process cannot write to the temporary folder of the sink.
_FALLBACK_FOLDER = "/tmp"


class LedgerEntry:
    """The file of one child; ``entry[field]`` reads and writes its numbers.

    Args:
        path: the file.
        descriptor: in the child, the open and locked file; the entry closes it. None in the parent.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        # The file; its name holds both pids.
        self.path = path
        # The child's descriptor, which keeps the lock; None in the parent.
        self._descriptor = descriptor
        # Whether `close` was called.
        self._closed = False
        with io.FileIO(path if descriptor is None else descriptor, "r+", closefd=descriptor is None) as file:
            mapped = mmap.mmap(file.fileno(), 0)
        # The whole file, memory-mapped; after `close` a copy of it.
        self._bytes: memoryview | bytearray = memoryview(mapped)
        # The file's `FIELDS` as integers; after `close` a copy of them.
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
        """Store where the child's time went. Not atomic: a reader may get some old numbers among the new ones."""
        self._bytes[_TIMES_AT:_TEXT_AT] = times.to_bytes()

    @property
    def peer_counts(self) -> list[PeerCounts]:
        """What the child sent to each learner, in the order of the sink's learners."""
        end = _PEER_COUNTS_AT + self["learners"] * _PEER_COUNTS.size
        return [PeerCounts(*numbers) for numbers in _PEER_COUNTS.iter_unpack(self._bytes[_PEER_COUNTS_AT:end])]

    def write_peer_counts(self, peers: Iterable[PeerCounts]) -> None:
        """Store what the child sent to each learner; not atomic either."""
        packed = b"".join(_PEER_COUNTS.pack(*counts) for counts in peers)
        self._bytes[_PEER_COUNTS_AT : _PEER_COUNTS_AT + len(packed)] = packed

    @property
    def was_removed(self) -> bool:
        """In the child: whether somebody other than the parent has removed the file."""
        return self._descriptor is not None and not self["counted"] and os.fstat(self._descriptor).st_nlink == 0

    @property
    def child_pid(self) -> int:
        return int(self.path.name.split(".")[1])

    @property
    def error(self) -> str:
        return bytes(self._bytes[_TEXT_AT : _TEXT_AT + self["error_bytes"]]).decode(errors="replace")

    def write_error(self, kind: int, text: str) -> None:
        """Store what ended the child's connection; the first error wins."""
        if not self["error_kind"]:
            encoded = text.encode()[:_TEXT_BYTES]
            self._bytes[_TEXT_AT : _TEXT_AT + len(encoded)] = encoded
            self["error_bytes"] = len(encoded)
            self["error_kind"] = kind  # last, because the parent reads the text as soon as it is set

    @property
    def is_dead(self) -> bool:
        """Whether the child has ended, in whatever way, or closed its file. For the parent only: see `file_locks`."""
        try:
            return self._closed or call_if_unlocked(self.path, lambda: None)
        except FileNotFoundError:  # a cleaner of old files, say, has removed it; its numbers are still mapped
            return has_ended(self.child_pid)

    def close(self) -> None:
        """Release the file and the lock; idempotent. The numbers stay readable, as they are now."""
        if not self._closed:
            self._closed = True
            # Another thread may be reading the map. So only drop the references: the last one to go frees the map.
            self._numbers, self._bytes = list(self._numbers), bytearray(self._bytes)
            if self._descriptor is not None:
                os.close(self._descriptor)


# The position of each field among the numbers of a file.
_INDEX = {name: index for index, name in enumerate(FIELDS)}


def new_token() -> str:
    """Return a new token, which a sink shares with its copies: the path of their folder, without the user id.

    It makes no folder.
    """
    try:
        home = os.path.abspath(tempfile.gettempdir())
    except FileNotFoundError:  # no folder can be written to; a sink without children needs none
        home = ""
    return os.path.join(home, _PREFIX + secrets.token_hex(16))


def folder_path(token: str) -> Path:
    """Return the folder of a sink's ledger on this host; it need not exist.

    All processes of one user on one host must get the same folder, whatever ``TMPDIR`` each of them has.
    """
    # The token contains the temporary folder of the process that made the sink. Another host may not have that folder.
    folder = Path(f"{token}-{os.getuid()}")
    if os.access(folder.parent, os.W_OK | os.X_OK):
        return folder
    return Path(_FALLBACK_FOLDER if os.path.isdir(_FALLBACK_FOLDER) else tempfile.gettempdir(), folder.name)


def create_entry(token: str, parent: int, daemon: bool = False, learners: int = 1) -> LedgerEntry:
    """Make and lock this child's file.

    Args:
        token: names the folder.
        parent: pid of the process that reads the file.
        daemon: whether this child is daemonic.
        learners: how many learners it sends to.

    Raises:
        ConnectionClosedError: the child is daemonic, and its parent has closed the sink.
        OSError: the file cannot be made or locked.
    """
    folder = folder_path(token)
    try:
        _check_owner(folder)
    except FileNotFoundError:
        what = (
            f"no folder {folder}; it was removed, or could not be made: set TMPDIR to a folder that can be written to"
        )
        raise FileNotFoundError(errno.ENOENT, what) from None
    # Pids are used again, so the name has a random part.
    name = f"{parent}.{os.getpid()}.{secrets.token_hex(8)}"
    path = folder / f".{name}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Write all bytes now, so that the file has no holes. If the disk is full, a write through the map into a hole
        # kills the process.
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
        # The file is locked and filled in. With its final name, the parent sees it.
        entry.path = path.rename(folder / name)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    # Check the flag only now. The parent sets it before it lists the files. So either the parent sees this file, or
    # this process sees the flag.
    if daemon and has_flag(token, parent, SINK_CLOSED):
        entry["closed"] = 1
        entry.path.unlink(missing_ok=True)
        entry.close()
        raise ConnectionClosedError("this sink was closed")
    return entry


def entry_paths(token: str, parent: int) -> list[Path]:
    """Return the files of the children of process ``parent``, which has called `make_folder`.

    Raises:
        OSError: the folder cannot be read, for instance because somebody has removed it, or made it in our place.
    """
    folder = folder_path(token)
    names = os.listdir(folder)
    _check_owner(folder)
    mine, flags = f"{parent}.", f"{parent}.0."
    paths = (folder / name for name in names if name.startswith(mine) and not name.startswith(flags))
    return [path for path in paths if not path.is_symlink()]


def set_flag(token: str, parent: int, flag: str) -> None:
    """Set a flag for later children of ``parent``; does nothing if the folder cannot be written to."""
    with contextlib.suppress(OSError):
        folder = folder_path(token)
        _check_owner(folder)
        (folder / f"{parent}.0.{flag}").touch(0o600)


def clear_flag(token: str, parent: int, flag: str) -> None:
    with contextlib.suppress(OSError):
        (folder_path(token) / f"{parent}.0.{flag}").unlink()


def has_flag(token: str, parent: int, flag: str) -> bool:
    with contextlib.suppress(OSError):
        return (folder_path(token) / f"{parent}.0.{flag}").exists()
    return False


def make_folder(token: str, parent: int) -> None:
    """Make the folder for the children of process ``parent``, unless it exists, and mark it as used by that process.

    Raises:
        OSError: the folder cannot be made, or is not this user's alone.
    """
    folder, marker = folder_path(token), f"{parent}.0.{_PARENT}"
    if not folder.exists():
        remove_leftovers(folder.parent)
        # Mark the folder, then give it its name. Until then the name begins with a dot, and nobody removes the folder
        # before it is marked.
        unnamed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
        unnamed.mkdir(mode=0o700)
        (unnamed / marker).touch(0o600)
        try:
            unnamed.rename(folder)
        except OSError:  # another thread, which forks at the same time, was faster
            (unnamed / marker).unlink()
            unnamed.rmdir()
            if not folder.exists():
                raise
    _check_owner(folder)
    (folder / marker).touch(0o600)


def remove_files(token: str, parent: int, keep_living: bool = False) -> None:
    """Remove the files of process ``parent`` and its children, counted or not, and the folder if it is empty then.

    Args:
        token: names the folder.
        parent: pid of the process that reads the files.
        keep_living: whether to keep what living and later children need: their files, flags, and the folder.
    """
    # A forked copy of the parent inherits the finalizers that call this, and must leave the files alone.
    if os.getpid() != parent:
        return
    with contextlib.suppress(OSError, ValueError):
        folder = folder_path(token)
        _check_owner(folder)
        for path in folder.iterdir():
            mine, flags = f"{parent}.", f"{parent}.0."
            if path.name.startswith(mine) and not keep_living:
                path.unlink(missing_ok=True)
            # Remove these only if nobody holds their lock. A name with a dot: the child is making the file, or died
            # while making it. Any other name, with ``keep_living``: the child may still live.
            elif path.name.lstrip(".").startswith(mine):
                if not path.name.startswith(flags):
                    with contextlib.suppress(FileNotFoundError):
                        call_if_unlocked(path, path.unlink)
            else:  # it reports to another process, such as a child with children of its own
                _remove_if_dead(path)
        folder.rmdir()


def remove_leftovers(home: Path) -> None:
    """Remove what crashed runs have left in ``home``: files whose child and parent are both dead, and empty folders."""
    for folder in (*home.glob(f"{_PREFIX}*"), *home.glob(f".{_PREFIX}*/*.{_PARENT}")):
        # The first pattern finds folders. The second finds the markers in folders that have no final name yet.
        folder = folder if folder.name.startswith(_PREFIX) else folder.parent
        # Skip a folder that belongs to another user, is in use, or has files with names that are not ours.
        with contextlib.suppress(OSError, ValueError):
            _check_owner(folder)
            for path in folder.iterdir():
                _remove_if_dead(path)
            folder.rmdir()


def _remove_if_dead(path: Path) -> None:
    parent, child = map(int, path.name.lstrip(".").split(".")[:2])
    # Never open this process's own file: closing it again would drop the lock.
    if child == os.getpid() or is_alive(parent):
        return
    with contextlib.suppress(FileNotFoundError):
        call_if_unlocked(path, path.unlink)


def _check_owner(folder: Path) -> None:
    """Raise PermissionError unless the folder is this user's alone.

    Its name is secret until it exists. Still, the check makes sure that nobody else made it.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder}: expected a folder of this user's, for nobody else")
