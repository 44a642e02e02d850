"""What one sample looks like, and whether a batch is made of such samples.

The wire knows nothing but item sizes, so every leaf of every batch is checked here: its key path, shape and dtype.

* The wire order is optree's: dict keys sorted, OrderedDict and sequences in their own order, ``None`` dropped.
* Leaves match by key path: mappings of any type are interchangeable, and so are list, tuple and namedtuple. Whatever
  order a batch has its keys in, its leaves travel in the example's order.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import optree
import torch

from .errors import SpecMismatchError
from .leaves import (
    ARRAY_TYPES,
    OPAQUE,
    Array,
    Key,
    Leaf,
    Unreadable,
    as_array,
    dtypes_of,
    how_to_cast,
    how_to_expand,
    shape_of,
)
from .wire import WireLeaf

# How many structures of batches are remembered; a loader yields one or two, and a fresh one each time is no leak.
_MAX_STRUCTURES = 64
# How many wrong leaves an error names.
_MAX_NAMED = 8
# After so many different structures in a row the next is not tried for the last one: to find that it differs is slow,
# since optree writes it all down for the error.
_MAX_MISSES = 8

_TENSORS = {torch.Tensor}
_ARRAYS = {np.ndarray}
_NUMPY_TYPES = {np.ndarray, *np.sctypeDict.values()}
# The torch.func transform that is running, or None: asked once per batch, where each tensor would cost more.
_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


class Match(NamedTuple):
    """A batch that was found to be right."""

    arrays: list[Array]
    """One array per leaf in wire order, sharing the batch's memory where possible.

    Of shape ``(rows, *leaf.shape)``, or ``leaf.shape`` if the batch was one sample.
    """
    rows: int
    batched: bool
    """False if the batch was one sample."""


class SampleSpec:
    """The leaves of one sample, made from an example of it.

    Args:
        example: pytree of tensors, numpy arrays and Python or numpy scalars; only shapes and dtypes count.
        root: what messages call the data that is matched.

    Raises:
        TypeError: a leaf is no dense array of numbers; the message names its path.
        ValueError: a sample has no bytes.
    """

    def __init__(self, example: Any, root: str = "batch") -> None:
        self.root = root
        flat, self.treespec = flatten(example)
        keys, paths = _keys_and_paths(self.treespec)
        offset = 0
        leaves = []
        for leaf, key, path in zip(flat, keys, paths, strict=True):
            dtype, travels_as = dtypes_of(leaf, f"example{path}")
            shape = shape_of(leaf)
            leaves.append(Leaf(path, key, shape, dtype, travels_as, offset, dtype in OPAQUE))
            offset += leaves[-1].wire.nbytes
        self.leaves = tuple(leaves)
        self.payload_size = offset
        if offset == 0:
            raise ValueError(f"a sample has no bytes: {self.describe()}; the example needs a leaf that is not empty")
        self._dtypes = [leaf.travels_as for leaf in leaves]
        self._any_opaque = any(leaf.opaque for leaf in leaves)
        self._in_order = tuple(range(len(leaves)))
        self._last_met = (self.treespec, self._in_order)
        self._misses = 0  # how many in a row had another structure than the one before
        self._orders: dict[Any, tuple[int, ...]] = {}
        self._shapes_for: tuple[int, list[tuple[int, ...]]] = (-1, [])

    def __getstate__(self) -> dict[str, Any]:
        """Without what was learnt, which may hold types that do not pickle."""
        return {
            **self.__dict__,
            "_last_met": (self.treespec, self._in_order),
            "_orders": {},
            "_shapes_for": (-1, []),
        }

    def describe(self) -> str:
        """All leaves on one line."""
        return "{" + ", ".join(map(str, self.leaves)) + "}"

    def numpy_sample(self) -> Any:
        """The example's structure with zeroed numpy arrays, as ``echo.Server`` and clients take it."""
        return optree.tree_unflatten(self.treespec, [np.zeros(leaf.shape, leaf.travels_as) for leaf in self.leaves])

    def unflatten(self, arrays: Iterable[Any]) -> Any:
        """A sample of the example's structure from leaves in wire order."""
        return optree.tree_unflatten(self.treespec, arrays)

    def check_server(self, theirs: Sequence[WireLeaf], peer: str) -> None:
        """Compare with what a server expects.

        Raises:
            SpecMismatchError: naming both sides, leaf by leaf.
        """
        ours = [leaf.wire for leaf in self.leaves]
        if list(theirs) == ours:
            return
        lines = []
        for index, (server, mine) in enumerate(itertools.zip_longest(theirs, ours)):
            if server != mine:
                example = f"{self.leaves[index]} ({mine.itemsize}-byte items)" if mine else "nothing"
                expected = f"{server.itemsize}-byte items {list(server.shape)}" if server else "nothing"
                lines.append(f"leaf {index}: server expects {expected}, example has {example}")
        what = f"Server spec mismatch: {peer} expects {len(theirs)} arrays, the example has {len(ours)}"
        raise SpecMismatchError(_listing(what, _shortened(lines)))

    def numpy_leaves(self, sample: Any) -> list[Array] | None:
        """The leaves of one sample that is, to the letter, the example in numpy arrays; None to have it `match`-ed."""
        leaves = self._flat_like_last(sample)
        if leaves is None or self._any_opaque or not _NUMPY_TYPES.issuperset(map(type, leaves)):
            return None
        return leaves if self._are_right(leaves, self._shapes(1, False)) else None

    def match(self, batch: Any, batched: bool | None = None) -> Match:
        """Check ``batch`` against the example, leaf by leaf.

        Args:
            batch: one sample, or samples stacked along a new first dimension that all leaves share.
            batched: says which of the two; None to tell by the rank of the leaves.

        Raises:
            SpecMismatchError: structure, shape or dtype differ; names path, got, expected and remedy.
            TypeError: a leaf is no dense array of numbers.
        """
        leaves = self.leaves
        arrays = self._as_they_are(batch)
        if arrays is None:
            flat = self._in_wire_order(batch)
            arrays = [as_array(value, leaf, self.root) for value, leaf in zip(flat, leaves, strict=True)]
        first = arrays[0]
        stacked = first.ndim > len(leaves[0].shape) if batched is None else batched
        rows = len(first) if stacked and first.ndim else 1
        if not self._are_right(arrays, self._shapes(rows, stacked)):
            self._refuse(self._in_wire_order(batch), batched)
        return Match(arrays, rows, stacked)

    def _as_they_are(self, batch: Any) -> list[Array] | None:
        """The arrays of a batch of the structure met last, all of it plain CPU tensors or all of it arrays; or None.

        This is what a training loop sends again and again; whatever else there is takes the long way.
        """
        flat = self._flat_like_last(batch)
        if flat is None or self._any_opaque or _transform() is not None:
            return None
        types = set(map(type, flat))
        if types == _TENSORS:
            try:
                return [tensor.numpy() for tensor in flat]
            except Exception:  # another device or layout, a gradient, a lazy negation, a mode: the long way tells
                return None
        return flat if types == _ARRAYS else None

    def _flat_like_last(self, tree: Any) -> list[Any] | None:
        """The leaves in wire order, some of them maybe containers, if they are found where they were last; or None."""
        if self._misses >= _MAX_MISSES:
            return None
        treespec, order = self._last_met
        try:
            flat: list[Any] = treespec.flatten_up_to(tree)
        except Exception:  # another structure; but what comes is what its `repr` raises, if that does
            self._misses += 1
            return None
        self._misses = 0
        return flat if order == self._in_order else [flat[i] for i in order]

    def _are_right(self, arrays: list[Array], shapes: list[tuple[int, ...]]) -> bool:
        return [array.shape for array in arrays] == shapes and [array.dtype for array in arrays] == self._dtypes

    def _in_wire_order(self, batch: Any) -> list[Any]:
        """The leaves of a batch of any structure that has the example's."""
        flat, treespec = flatten(batch)
        order = self._orders.get(treespec)
        if order is None:
            order = self._learn(treespec)
        self._last_met = (treespec, order)
        return flat if order == self._in_order else [flat[i] for i in order]

    def _shapes(self, rows: int, batched: bool) -> list[tuple[int, ...]]:
        """The shapes that the arrays of a batch must have."""
        wanted = rows if batched else -2
        known, shapes = self._shapes_for
        if known != wanted:
            shapes = [(rows, *leaf.shape) if batched else leaf.shape for leaf in self.leaves]
            self._shapes_for = (wanted, shapes)
        return shapes

    def _learn(self, treespec: Any) -> tuple[int, ...]:
        """Where each leaf of the example is found among the leaves of a structure not seen before."""
        keys = _keys_and_paths(treespec)[0]
        found = dict(zip(keys, range(len(keys)), strict=True))
        if found.keys() != {leaf.key for leaf in self.leaves}:
            what = f"{self.root} has not the structure of the example"
            remedies = ["send what the example holds (select= picks it), or give an example of what is sent"]
            if self._lists_for_leaves(treespec, found):
                remedies.insert(0, "numbers in a list become one leaf with torch.tensor(x)")
            problems = [*self._missing(treespec, found), *self._unexpected(treespec, keys)]
            raise SpecMismatchError(_listing(what, problems, remedies))
        if len(self._orders) >= _MAX_STRUCTURES:
            self._orders.clear()
        order = tuple(found[leaf.key] for leaf in self.leaves)
        self._orders[treespec] = order
        return order

    def _lists_for_leaves(self, treespec: Any, found: Mapping[Key, int]) -> bool:
        """Whether one side has a list where the other has a leaf, as a tokenizer makes them of single samples."""
        theirs, ours = _nodes(treespec), _nodes(self.treespec)
        met = [theirs.get(leaf.key, "") for leaf in self.leaves] + [ours.get(key, "") for key in found]
        return any(node.startswith("list ") for node in met)

    def _missing(self, treespec: Any, found: Mapping[Key, int]) -> list[str]:
        """What there is in place of the example's leaves that a structure has not."""
        nodes = _nodes(treespec)
        problems = []
        for leaf in self.leaves:
            if leaf.key in found:
                continue
            if leaf.key in nodes:
                shape = _expected_shape(leaf, None)
                problems.append(f"{self.root}{leaf.path}: got {nodes[leaf.key]}, expected {leaf.dtype} {shape}")
            else:
                problems.append(f"{self.root}{leaf}: missing")
        return _shortened(problems)

    def _unexpected(self, treespec: Any, keys: Sequence[Key]) -> list[str]:
        """What a structure has that the example has not: whole containers rather than all that is in them."""
        theirs, ours = _nodes(treespec), _nodes(self.treespec)
        wanted = {leaf.key for leaf in self.leaves}
        problems: dict[str, None] = {}
        for key in keys:
            # The outermost container that the example has not: naming it says all.
            top = next((key[:n] for n in range(len(key)) if key[:n] not in ours), key)
            if key in wanted or top in wanted:
                continue
            got = f"{self.root}{_path_of(top)}: unexpected {theirs.get(top, '')}".rstrip()
            if top in ours and ours[top] != "None":
                got = f"{self.root}{_path_of(top)}: unexpected leaf, expected {ours[top]}"
            elif ours.get(top[:-1]) != theirs.get(top[:-1]) and _path_of(top) in map(_path_of, wanted):
                got = f"{got}; in {theirs[top[:-1]]}, expected {ours[top[:-1]]}"
            problems[got] = None
        return _shortened(list(problems))

    def _refuse(self, flat: Sequence[Any], batched: bool | None) -> NoReturn:
        """Raise the error that names every wrong leaf."""
        shapes = [shape_of(value) for value in flat]
        # One leaf with a batch dimension makes it a batch, in which the leaves without one are the mistake.
        stacked = any(len(shape) == len(leaf.shape) + 1 for shape, leaf in zip(shapes, self.leaves, strict=True))
        stacked = stacked if batched is None else batched
        problems = []
        sizes: dict[int, str] = {}
        for shape, leaf in zip(shapes, self.leaves, strict=True):
            if stacked and shape[1:] == leaf.shape and len(shape) == len(leaf.shape) + 1:
                sizes.setdefault(shape[0], self.root + leaf.path)
        for value, shape, leaf in zip(flat, shapes, self.leaves, strict=True):
            path = self.root + leaf.path
            dtype = dtypes_of(value, path)[0]
            remedies = [how_to_cast(value, leaf.dtype)] if dtype != leaf.dtype else []
            if len(shape) != len(leaf.shape) + stacked or shape[int(stacked) :] != leaf.shape:
                remedies.append(_how_to_reshape(value, leaf, shape, stacked, list(sizes)))
            if remedies:
                expected = _expected_shape(leaf, True if stacked and shape == leaf.shape else batched)
                got = f"{path}: got {dtype} {list(shape)}, expected {leaf.dtype} {expected}"
                problems.append(f"{got}; {', and '.join(remedies)}")
        problems = _shortened(problems)
        if len(sizes) > 1:
            found = ", ".join(f"{size} at {path}" for size, path in sizes.items())
            problems.append(f"leaves differ in the number of samples: {found}; send as many of each")
        raise SpecMismatchError(
            _listing(f"{self.root} does not match the example", problems, self._whether_example_is_batch(shapes))
        )

    def _whether_example_is_batch(self, shapes: Sequence[tuple[int, ...]]) -> list[str]:
        """A remedy, if the shapes of a batch are what they would be if the example were a batch itself."""
        pairs = list(zip(shapes, (leaf.shape for leaf in self.leaves), strict=True))
        ours = {example[:1] for _, example in pairs}
        theirs = {shape[:1] for shape, _ in pairs}
        as_batch = len(theirs) == 1 and all(shape and shape[1:] == example[1:] for shape, example in pairs)
        as_sample = all(shape == example[1:] for shape, example in pairs)
        if len(ours) != 1 or () in ours or not (as_batch or as_sample):
            return []
        ((rows,),) = ours
        return [
            f"if the example is a batch of {rows} samples: give one of them as the example, such as dataset[0], or "
            "make the sink with EchoSink.from_batch"
        ]


def numpy_example(example: Any) -> Any:
    """What to pass to ``echo.Server`` for samples like ``example``.

    Args:
        example: one sample: a pytree of tensors, numpy arrays and scalars.

    Returns:
        The same structure with numpy arrays of the same shapes, zeroed. bfloat16 becomes uint16 and the float8 types
        become uint8: the learner gets the values back with ``torch.from_numpy(leaf).view(torch.bfloat16)``.

    Raises:
        TypeError: a leaf is no dense array of numbers.
        ValueError: the sample has no bytes.
    """
    return SampleSpec(example).numpy_sample()


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and treespec, after containers that optree takes for leaves have been made into dicts."""
    leaves, treespec = optree.tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, ARRAY_TYPES) and _opens(leaf):
            leaves, treespec = optree.tree_flatten(optree.tree_unflatten(treespec, map(_open_all, leaves)))
            break
    if _transform() is not None:
        leaves = [_with_memory(leaf) for leaf in leaves]
    return leaves, treespec


def _open_all(leaf: Any) -> Any:
    return optree.tree_map(_open_all, _opened(leaf)) if not isinstance(leaf, ARRAY_TYPES) and _opens(leaf) else leaf


def _opens(leaf: Any) -> bool:
    """Whether it is a mapping or a dataclass instance, and is so to hold leaves."""
    if getattr(type(leaf), "_is_non_tensor", False):  # tensordict's wrappers of any object are both, and hold no leaf
        return False
    return isinstance(leaf, Mapping) or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type))


def _opened(container: Any) -> dict[Any, Any]:
    """The items of a mapping, or the fields of a dataclass instance."""
    if isinstance(container, Mapping):
        # By its keys, for a TensorDict iterates over its rows.
        return {key: _read(operator.getitem, container, key) for key in container.keys()}  # noqa: SIM118
    return {field.name: _read(getattr, container, field.name) for field in dataclasses.fields(container)}


def _read(read: Callable[[Any, Any], Any], container: Any, key: Any) -> Any:
    """One item; a stack that is made only now fails for samples that differ in shape, as do fields without a value."""
    try:
        return read(container, key)
    except Exception as error:
        why = " ".join(str(error).split())
        expected = "expected a dense tensor; if its samples differ in shape, pad them to one length"
        return Unreadable(f"got {type(container).__name__} that cannot give it, {expected} ({why})")


def _with_memory(leaf: Any) -> Any:
    """The leaf; but one of torch.func.functionalize has memory of its own with nothing in it."""
    if not isinstance(leaf, torch.Tensor) or not torch._is_functional_tensor(leaf):
        return leaf
    return Unreadable("got a functional tensor, expected one that holds values; send outside of torch.func transforms")


def _keys_and_paths(treespec: Any) -> tuple[list[Key], list[str]]:
    keys: list[Key] = []
    for accessor in treespec.accessors():
        keys.append(tuple((isinstance(entry, optree.MappingEntry), entry.entry) for entry in accessor))
    return keys, list(map(_path_of, keys))


def _path_of(key: Key) -> str:
    return "".join(f"[{entry!r}]" for _, entry in key)


def _nodes(treespec: Any, key: Key = ()) -> dict[Key, str]:
    """What each node that is no leaf is, in words."""
    if treespec.type is None:
        return {}
    if treespec.type is type(None):
        return {key: "None"}
    nodes = {key: f"{treespec.type.__name__} of {len(treespec.entries())}"}
    mapping = issubclass(treespec.type, dict)
    for entry, child in zip(treespec.entries(), treespec.children(), strict=True):
        nodes |= _nodes(child, (*key, (mapping, entry)))
    return nodes


def _expected_shape(leaf: Leaf, batched: bool | None) -> str:
    single, stacked = f"{list(leaf.shape)}", "[" + ", ".join(["B", *map(str, leaf.shape)]) + "]"
    if batched is None:
        return f"{single} or {stacked}"
    return stacked if batched else single


def _how_to_reshape(value: Any, leaf: Leaf, shape: tuple[int, ...], stacked: bool, rows: Sequence[int]) -> str:
    extra = len(shape) - len(leaf.shape)
    if stacked and shape == leaf.shape:
        size = f", B = {rows[0]} here" if len(rows) == 1 else ""
        return f"a batch needs it once per sample: {how_to_expand(value, leaf)}{size}"
    if extra == stacked:
        return _how_to_resize(leaf, shape, extra)
    if stacked and not extra:
        return f"{_how_to_resize(leaf, shape, extra)}, and repeat it once per sample"
    if extra > 1 and shape[extra:] == leaf.shape:
        new = ", ".join(map(str, (-1, *leaf.shape)))
        return f"make one batch dimension of the first {extra}: x.reshape({new})"
    return "reshape it; or is the example not one sample?"


def _how_to_resize(leaf: Leaf, shape: tuple[int, ...], skip: int) -> str:
    differ = [
        f"dimension {index} is {got}, {wanted} in the example"
        for index, (got, wanted) in enumerate(zip(shape[skip:], leaf.shape, strict=True), skip)
        if got != wanted
    ]
    permute = "permute its dimensions, or " if sorted(shape[skip:]) == sorted(leaf.shape) else ""
    return f"{permute}pad or crop all samples to one length: {', '.join(differ)}"


def _shortened(problems: list[str]) -> list[str]:
    if len(problems) <= _MAX_NAMED:
        return problems
    return [*problems[:_MAX_NAMED], f"... and {len(problems) - _MAX_NAMED} more"]


def _listing(what: str, problems: Sequence[str], remedies: Sequence[str] = ()) -> str:
    lines = [*problems, *remedies]
    return f"{what}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{what}:", *lines])


def check_numpy(data_sample: Any) -> None:
    """Raise TypeError unless every leaf is a numpy array, as the stock client demands of its ``data_sample``."""
    leaves, treespec = flatten(data_sample)
    for leaf, path in zip(leaves, _keys_and_paths(treespec)[1], strict=True):
        if not isinstance(leaf, np.ndarray):
            raise TypeError(f"data_sample{path}: got {type(leaf).__name__}, expected a numpy array")
