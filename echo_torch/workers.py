"""Send from where a DataLoader makes its batches: in its workers, or in the main process if it has none.

* `EchoSink.wait` and `EchoSink.stats` in the process that has the loader cover its workers.
* Loaders read ahead, so a batch that was sent may never be trained on. If you leave a loop early, up to
  ``prefetch_factor`` batches per worker were sent that the loop never saw.
* Use ``persistent_workers=True``. Other workers end with each epoch: each sends its last samples again then, and
  the workers of the next epoch connect anew.
* A loader that resumes by fast-forwarding makes the skipped batches again, and so sends them again. Torchdata's
  ``StatefulDataLoader`` skips the whole epoch so far if neither the iterable dataset nor its iterator has a state.
  Otherwise it skips what came after its last snapshot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, default_collate

_STATE_METHODS = ("state_dict", "load_state_dict")


class LoaderSender:
    """Base class of what `SinkCollate` and `SinkDataset` send with: `EchoSink`, and callbacks that have one."""

    def _send_from_loader(self, batch: Any) -> None:
        """Send a batch or an item, in the process that made it."""
        raise NotImplementedError


class Sent(NamedTuple):
    """What a loader yields in place of a batch that was sent, with ``forward=False``."""

    # How many items of the dataset the batch had; 1 with ``batch_size=None``.
    samples: int


class SinkCollate:
    """A ``collate_fn`` that sends each batch it makes, in the process that makes it, and then returns it.

    It pickles if its functions do, as workers need that are not forked. Each worker opens its own connection. A loader
    that resumes by fast-forwarding sends what it skips again.

    Args:
        sink: an `EchoSink`, which you still close yourself. Or a `SinkCallback`: each process then applies its policy
            for itself, such as which batches it sends and what it does if the learner is slow. `EchoSink.stats` counts
            samples that found no room as dropped.
        collate_fn: turns a list of samples into a batch. With ``batch_size=None`` it gets a single item of the dataset
            instead: pass ``torch.utils.data.default_convert`` then.
        select: a function that turns a batch into what is sent, or returns None to send nothing. By default the batch
            is sent as it is.
        forward: whether the loader yields the batch. With False it yields a `Sent`, which costs next to nothing to
            pass to the main process.

    Raises:
        TypeError: an argument has the wrong type.

    A call raises whatever ``collate_fn``, ``select`` and the send raise; the loader raises it again.
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
        self._send = _make_send_fn(sink, select)
        self._collate_fn = collate_fn
        self._forward = forward

    def __call__(self, samples: Any) -> Any:
        batch = self._collate_fn(samples)
        self._send(batch)
        return batch if self._forward else Sent(len(samples) if isinstance(samples, list) else 1)


class SinkDataset(IterableDataset[Any]):
    """An iterable dataset that sends each item of another one and then yields it, such as simulators in workers.

    You may change an item that it yielded. With a ``batch_size``, prefer `SinkCollate`, which sends a whole batch at
    once, unless you send something else than you collate.

    It has a length, ``set_epoch`` and a state if ``dataset`` has them. Its iterator has a state if that of ``dataset``
    has one. Without either state, a loader that resumes by fast-forwarding sends what it skips again.

    Args:
        dataset: what to iterate over. Each worker gets a copy, which must pick its own shard, as usual.
        sink: an `EchoSink`, which you still close yourself, or a `SinkCallback`, as for `SinkCollate`.
        select: a function that turns an item into what is sent, or returns None to send nothing. By default the item
            is sent as it is.
        forward: whether to yield the item. With False it yields a `Sent`.

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
        self._send = _make_send_fn(sink, select)
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
    """The iterator of a `SinkDataset`: sends each of ``items``, then yields it."""

    def __init__(self, items: Iterator[Any], send_and_return: Callable[[Any], Any]) -> None:
        self._items = items
        self._send_and_return = send_and_return
        _copy_methods(items, self, _STATE_METHODS)

    def __next__(self) -> Any:
        return self._send_and_return(next(self._items))


def _copy_methods(owner: object, wrapper: object, methods: Iterable[str]) -> None:
    """Give ``wrapper`` those of ``methods`` that ``owner`` has, because loaders look which ones exist."""
    # Set real attributes: from Python 3.12 on, ``isinstance`` with a protocol does not ask ``__getattr__``.
    for name in methods:
        if hasattr(owner, name):
            setattr(wrapper, name, getattr(owner, name))


def _make_send_fn(sink: LoaderSender, select: Callable[[Any], Any] | None) -> Callable[[Any], None]:
    if not isinstance(sink, LoaderSender):
        raise TypeError(f"sink: got {sink!r}, expected an EchoSink or an echo_torch.callbacks.loop.SinkCallback")
    if select is not None and not callable(select):
        raise TypeError(f"select: got {select!r}, expected something to call, or None")
    # A partial of a module-level function pickles; a closure would not.
    return functools.partial(_send, sink._send_from_loader, select)


def _send(send: Callable[[Any], None], select: Callable[[Any], Any] | None, item: Any) -> None:
    selected = item if select is None else select(item)
    if selected is not None:
        send(selected)
