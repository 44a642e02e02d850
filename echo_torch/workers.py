"""Sending from where a DataLoader makes its batches: in its workers, or in the main process if it has none.

`EchoSink.wait` in the process that has the loader covers what its workers sent, and so does `EchoSink.stats`. Loaders
read ahead: a batch that was sent is not thereby trained on, and a loop that is left early has sent up to
``prefetch_factor`` batches per worker more than it saw.

Workers that are not persistent end with each epoch, and each sends its last samples once more for that; with
``persistent_workers=True`` they do so only at the end, and need not connect again.

A loader that resumes by fast-forwarding makes again what it skips, and so sends it again: torchdata's
``StatefulDataLoader`` skips all of the epoch so far if neither an iterable dataset nor its iterator has a state, and
what came after its last snapshot otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, default_collate

_STATE_METHODS = ("state_dict", "load_state_dict")


class LoaderSender:
    """What loaders here can send by: an `EchoSink`, or a callback that sends by one."""

    def _send_from_loader(self, batch: Any) -> None:
        """Send a batch, or an item, in whatever process made it."""
        raise NotImplementedError


class Sent(NamedTuple):
    """What comes out of a loader in place of a batch that was sent and is not handed on."""

    samples: int
    """How many items of the dataset: the list that was collated, or 1 where there is none (``batch_size=None``)."""


class SinkCollate:
    """A ``collate_fn`` that sends each batch it makes, in whatever process it runs, before it hands it on.

    It pickles for workers that are not forked, if its functions do. Each worker has a connection of its own. A loader
    that resumes by fast-forwarding has what it skips sent again.

    Args:
        sink: an `EchoSink`, which stays the caller's. Or a `SinkCallback`, whose policy each process then has for
            itself: which batches it sends, and what if the learner is slow. `EchoSink.stats` counts as dropped what
            found no room.
        collate_fn: makes a batch of a list of samples. With ``batch_size=None`` there is no list, but what the dataset
            gives: for that, ``torch.utils.data.default_convert``.
        select: makes what is sent of a batch, or None to send nothing of it. By default the batch is sent.
        forward: whether the loader hands the batch on; or else a `Sent`, which costs next to nothing.

    Raises:
        TypeError: an argument has the wrong type.
        Exception: whatever ``collate_fn``, ``select`` and the sending raise; the loader raises it again.
    """

    def __init__(
        self,
        sink: LoaderSender,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> None:
        if not callable(collate_fn):
            raise TypeError(f"collate_fn: got {collate_fn!r}, expected something to call")
        self._send = _make_sender(sink, select)
        self._collate_fn = collate_fn
        self._forward = forward

    def __call__(self, samples: Any) -> Any:
        batch = self._collate_fn(samples)
        self._send(batch)
        return batch if self._forward else Sent(len(samples) if isinstance(samples, list) else 1)


class SinkDataset(IterableDataset[Any]):
    """An iterable dataset that sends each item of another one before it hands it on: of simulators in workers, say.

    An item that was handed on may be changed. With a ``batch_size``, prefer `SinkCollate`, unless what is sent differs
    from what is collated: it sends a batch at once.

    It has a length, ``set_epoch`` and a state if ``dataset`` has them, and its iterator a state if that of ``dataset``
    has one. Without any, a loader that resumes by fast-forwarding has what it skips sent again.

    Args:
        dataset: what to iterate over; each worker gets its own copy, which has to shard itself as usual.
        sink: stays the caller's; or a `SinkCallback`, as for `SinkCollate`.
        select: makes what is sent of an item, or None to send nothing of it. By default the item is sent.
        forward: whether the item is handed on; or else a `Sent`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        sink: LoaderSender,
        *,
        select: Callable[[Any], Any] | None = None,
        forward: bool = True,
    ) -> None:
        self.dataset = dataset
        self._send = _make_sender(sink, select)
        self._forward = forward
        _copy_methods(dataset, self, (*_STATE_METHODS, "set_epoch"))

    def __iter__(self) -> Iterator[Any]:
        return _SendingIterator(iter(self.dataset), self._send_and_return)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # raises as the dataset does

    def _send_and_return(self, item: Any) -> Any:
        self._send(item)
        return item if self._forward else Sent(1)


class _SendingIterator(Iterator[Any]):
    """What a `SinkDataset` gives: each of ``items`` when it was handed on."""

    def __init__(self, items: Iterator[Any], send_and_return: Callable[[Any], Any]) -> None:
        self._items = items
        self._send_and_return = send_and_return
        _copy_methods(items, self, _STATE_METHODS)

    def __next__(self) -> Any:
        return self._send_and_return(next(self._items))


def _copy_methods(owner: object, wrapper: object, methods: Iterable[str]) -> None:
    """Give ``wrapper`` those ``methods`` that ``owner`` has, for loaders that look which there are.

    As attributes of its own: from Python 3.12 on, ``isinstance`` of a protocol does not ask ``__getattr__``.
    """
    for name in methods:
        if hasattr(owner, name):
            setattr(wrapper, name, getattr(owner, name))


def _make_sender(sink: LoaderSender, select: Callable[[Any], Any] | None) -> Callable[[Any], None]:
    if not isinstance(sink, LoaderSender):
        raise TypeError(f"sink: got {sink!r}, expected an EchoSink or an echo_torch.callbacks.loop.SinkCallback")
    if select is not None and not callable(select):
        raise TypeError(f"select: got {select!r}, expected something to call, or None")
    return functools.partial(_send, sink._send_from_loader, select)


def _send(send: Callable[[Any], None], select: Callable[[Any], Any] | None, item: Any) -> None:
    selected = item if select is None else select(item)
    if selected is not None:
        send(selected)
