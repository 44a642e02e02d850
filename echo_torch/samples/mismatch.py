"""Error messages: what is wrong with a batch or with a server's spec, and what to do about it.

These functions run only after a comparison has failed, so they need not be fast.

* Each public function returns the error for one kind of difference. The caller raises it.
* Every problem is one line: path, got, expected, remedy. A message names at most `_MAX_NAMED` problems of a kind and
  counts the others. Remedies for the whole batch come last and are never cut off.
* A message names the mistake and not its consequences. If one leaf has a batch dimension, the leaves without one are
  wrong. If the example lacks a container, the message names the container and not the leaves in it.
* In variable names, ``ours`` is the example and ``theirs`` is the batch or the server.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from echo_torch.errors import SpecMismatchError
from echo_torch.wire.protocol import WireLeaf

from .leaf import KeyPath, Leaf, checked_dtypes, how_to_cast, how_to_expand, shape_of
from .pytree import describe_containers, format_key_path, key_paths

# How many problems of a kind an error names before it only counts them.
_MAX_NAMED = 8


def server_spec_error(leaves: Sequence[Leaf], theirs: Sequence[WireLeaf], peer: str) -> SpecMismatchError:
    """Return the error for a server that expects other arrays; it names both sides, leaf by leaf.

    Args:
        leaves: the leaves of the example.
        theirs: the leaves that the server announced.
        peer: the server, as messages name it.
    """
    summary = f"Server spec mismatch: {peer} expects {len(theirs)} arrays, the example has {len(leaves)}"
    hint = []
    # A server may announce thousands of leaves, so look at their shapes only if there are as many as ours.
    if len(theirs) == len(leaves):
        hint = _hint_if_example_is_batch(leaves, [server.shape for server in theirs])
    return SpecMismatchError(_format_message(summary, _truncate(_server_differences(leaves, theirs)), hint))


def _server_differences(leaves: Sequence[Leaf], theirs: Sequence[WireLeaf]) -> Iterator[str]:
    """Yield one line per leaf that differs; a generator, because a server may name thousands of leaves."""
    for index, (server, leaf) in enumerate(itertools.zip_longest(theirs, leaves)):
        if not (server and leaf) or server != leaf.wire:
            example = f"{leaf} ({leaf.wire.itemsize}-byte items)" if leaf else "nothing"
            expected = f"{server.itemsize}-byte items {list(server.shape)}" if server else "nothing"
            yield f"leaf {index}: server expects {expected}, example has {example}"


def server_batch_error(leaves: Sequence[Leaf], keys: Sequence[KeyPath], arrays: Sequence[Any]) -> SpecMismatchError:
    """Return the error for a server whose batches do not match the example.

    Args:
        leaves: the leaves of the example.
        keys: the key paths of the server's leaves, in wire order.
        arrays: the server's leaves in the same order, ``(batch_size, *shape)`` each.
    """
    problems = []
    # Both sides are formatted the same way, so a leaf differs if its text does.
    for index, (key, array, leaf) in enumerate(itertools.zip_longest(keys, arrays, leaves)):
        theirs = (
            "nothing" if key is None else _describe_leaf(key, getattr(array, "dtype", type(array)), shape_of(array)[1:])
        )
        ours = _describe_leaf(leaf.key_path, leaf.wire_dtype, leaf.shape) if leaf else "nothing"
        if theirs != ours:
            values = f", for {leaf.dtype}" if leaf and leaf.torch_only else ""
            problems.append(f"leaf {index}: the server has {theirs}, the example {ours}{values}")
        elif leaf and key != leaf.key_path:
            problems.append(
                f"leaf {index}: {format_key_path(key)} is in a dict on one side and in a list or tuple on the other"
            )
    summary = "Server spec mismatch: the server was not made for samples like the example"
    remedy = "make it with echo.Server(numpy_example(example), ...), and use the same example in the senders"
    return SpecMismatchError(_format_message(summary, _truncate(problems), [remedy]))


def _describe_leaf(key: KeyPath, dtype: object, shape: Sequence[int]) -> str:
    """Return one line that describes a leaf of a server's batches."""
    path = format_key_path(key)
    return f"{path}: {dtype} {_format_batch_shape(shape)}" if path else f"{dtype} {_format_batch_shape(shape)}"


def structure_error(root: str, leaves: Sequence[Leaf], example: Any, batch: Any) -> SpecMismatchError:
    """Return the error for a batch that lacks leaves of the example, or has leaves that the example lacks.

    Args:
        root: what the message calls the batch.
        leaves: the leaves of the example.
        example: the treespec of the example.
        batch: the treespec of the batch.
    """
    keys = key_paths(batch)
    ours, theirs = describe_containers(example), describe_containers(batch)
    summary = f"{root} does not have the structure of the example"
    remedies = ["send what the example holds (select= picks it), or give an example of what you send"]
    # The more specific a remedy is, the earlier it comes.
    if _has_list_for_leaf(leaves, keys, ours, theirs):
        remedies.insert(0, "numbers in a list become one leaf with torch.tensor(x)")
    if batch.type in (list, tuple) and batch.num_children and all(child == example for child in batch.children()):
        remedies.insert(0, "stack a list of samples into one batch with torch.utils.data.default_collate(samples)")
    problems = [*_missing_leaves(root, leaves, keys, theirs), *_unexpected_nodes(root, leaves, keys, ours, theirs)]
    return SpecMismatchError(_format_message(summary, problems, remedies))


def _has_list_for_leaf(
    leaves: Sequence[Leaf], keys: Sequence[KeyPath], ours: Mapping[KeyPath, str], theirs: Mapping[KeyPath, str]
) -> bool:
    """Whether one side has a list where the other has a leaf; tokenizers return such lists for single samples."""
    met = [theirs.get(leaf.key_path, "") for leaf in leaves] + [ours.get(key, "") for key in keys]
    return any(node.startswith("list ") for node in met)


def _missing_leaves(
    root: str, leaves: Sequence[Leaf], keys: Sequence[KeyPath], theirs: Mapping[KeyPath, str]
) -> list[str]:
    """Return a line for each leaf of the example that the batch lacks, with what the batch has in its place."""
    found = set(keys)
    problems = []
    for leaf in leaves:
        if leaf.key_path in found:
            continue
        if leaf.key_path in theirs:
            shape = _expected_shape(leaf, None)
            problems.append(f"{root}{leaf.path}: got {theirs[leaf.key_path]}, expected {leaf.dtype} {shape}")
        else:
            problems.append(f"{root}{leaf}: missing")
    return _truncate(problems)


def _unexpected_nodes(
    root: str,
    leaves: Sequence[Leaf],
    keys: Sequence[KeyPath],
    ours: Mapping[KeyPath, str],
    theirs: Mapping[KeyPath, str],
) -> list[str]:
    """Return a line for each container or leaf that the example lacks; a container is one line, without its leaves."""
    wanted = {leaf.key_path for leaf in leaves}
    problems: dict[str, None] = {}
    for key in keys:
        # The outermost container that the example lacks, or else the leaf itself.
        top = next((key[:n] for n in range(len(key)) if key[:n] not in ours), key)
        # `_missing_leaves` already names a container where the example has a leaf.
        if key in wanted or top in wanted:
            continue
        got = f"{root}{format_key_path(top)}: unexpected {theirs.get(top, '')}".rstrip()
        if top != key and top and theirs[top].endswith(" of 1"):
            # Name the one key in it, so that you know what it is.
            got += f": {format_key_path(key[len(top) :])}"
        if top in ours and ours[top] != "None":
            got = f"{root}{format_key_path(top)}: unexpected leaf, expected {ours[top]}"
        elif ours.get(top[:-1]) != theirs.get(top[:-1]) and format_key_path(top) in map(format_key_path, wanted):
            got = f"{got}; in {theirs[top[:-1]]}, expected {ours[top[:-1]]}"
        problems[got] = None
    return _truncate(list(problems))


def leaves_error(root: str, leaves: Sequence[Leaf], values: Sequence[Any], batched: bool | None) -> SpecMismatchError:
    """Return the error for a batch that differs from the example in shapes or dtypes; it names every wrong leaf.

    Args:
        root: what the message calls the batch.
        leaves: the leaves of the example.
        values: the leaves of the batch, in the same order.
        batched: True if a batch is required, False if one sample is, None if either will do.

    Raises:
        TypeError: a leaf is not a dense array of numbers.
    """
    shapes = [shape_of(value) for value in values]
    # If one leaf has a batch dimension, this is a batch, and the leaves without one are the mistake.
    stacked = any(len(shape) == len(leaf.shape) + 1 for shape, leaf in zip(shapes, leaves, strict=True))
    stacked = stacked if batched is None else batched
    problems = []
    sizes: dict[int, str] = {}
    misshapen = False
    # First collect the numbers of samples, each with the path of the first leaf that has so many. The remedies below
    # quote them.
    for shape, leaf in zip(shapes, leaves, strict=True):
        if stacked and shape[1:] == leaf.shape and len(shape) == len(leaf.shape) + 1:
            sizes.setdefault(shape[0], root + leaf.path)
    # Then describe each wrong leaf. One leaf can have a wrong dtype and a wrong shape.
    for value, shape, leaf in zip(values, shapes, leaves, strict=True):
        path = root + leaf.path
        dtype = checked_dtypes(value, path)[0]
        remedies = [how_to_cast(value, leaf.dtype)] if dtype != leaf.dtype else []
        if len(shape) != len(leaf.shape) + stacked or shape[int(stacked) :] != leaf.shape:
            misshapen = True
            remedies.append(_how_to_reshape(value, leaf, shape, stacked, list(sizes), batched))
        if remedies:
            expected = _expected_shape(leaf, True if stacked and shape == leaf.shape else batched)
            got = f"{path}: got {dtype} {list(shape)}, expected {leaf.dtype} {expected}"
            problems.append(f"{got}; {', and '.join(remedies)}")
    problems = _truncate(problems)
    # Append this after truncating, so that it is never cut off.
    if len(sizes) > 1:
        found = ", ".join(f"{size} at {path}" for size, path in sizes.items())
        problems.append(f"leaves differ in the number of samples: {found}; send the same number of each")
    summary = f"{root} does not match the example"
    return SpecMismatchError(
        _format_message(summary, problems, _hint_if_example_is_batch(leaves, shapes) if misshapen else ())
    )


def _hint_if_example_is_batch(leaves: Sequence[Leaf], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """Return a remedy if the shapes suggest that the example itself is a batch; else nothing.

    They do if all leaves of the example have the same first dimension, and the batch fits the example without that
    dimension.
    """
    pairs = list(zip(shapes, (leaf.shape for leaf in leaves), strict=True))
    ours = {example[:1] for _, example in pairs}
    theirs = {shape[:1] for shape, _ in pairs}
    as_batch = len(theirs) == 1 and all(shape and shape[1:] == example[1:] for shape, example in pairs)
    as_sample = all(shape == example[1:] for shape, example in pairs)
    if len(ours) != 1 or () in ours or not (as_batch or as_sample):
        return []
    ((rows,),) = ours
    return [
        f"the example looks like a batch of {rows}; pass one sample, such as dataset[0], or use EchoSink.from_batch"
    ]


def _expected_shape(leaf: Leaf, batched: bool | None) -> str:
    """Describe the shape that a leaf must have: in a batch (True), in one sample (False), or in either (None)."""
    single, stacked = f"{list(leaf.shape)}", _format_batch_shape(leaf.shape)
    if batched is None:
        return f"{single} or {stacked}"
    return stacked if batched else single


def _format_batch_shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(["B", *map(str, shape)]) + "]"


def _how_to_reshape(
    value: Any, leaf: Leaf, shape: tuple[int, ...], stacked: bool, sizes: Sequence[int], batched: bool | None
) -> str:
    """Return the remedy for a leaf of a wrong shape; the cases go from the most specific to the most general.

    Args:
        value: the leaf.
        leaf: the leaf of the example.
        shape: the shape of ``value``.
        stacked: whether the data counts as a batch.
        sizes: the numbers of samples that other leaves have.
        batched: as for `leaves_error`.
    """
    # How many more dimensions the value has than the leaf of one sample.
    extra = len(shape) - len(leaf.shape)
    if batched is False and extra > 0 and shape[extra:] == leaf.shape:
        return "one sample is expected: send those of a batch one by one"
    if stacked and shape == leaf.shape:
        size = f", B = {sizes[0]} here" if len(sizes) == 1 else ""
        return f"a batch needs it once per sample: {how_to_expand(value, leaf)}{size}"
    if stacked and len(shape) and _without_ones(shape[1:]) == _without_ones(leaf.shape):
        return _reshape_call(leaf, shape[0])
    if extra == stacked:
        return _how_to_resize(leaf, shape, extra)
    if stacked and not extra:
        return f"{_how_to_resize(leaf, shape, extra)}, and repeat it once per sample"
    if extra > 1 and shape[extra:] == leaf.shape:
        return f"make one batch dimension of the first {extra}: {_reshape_call(leaf, math.prod(shape[:extra]))}"
    return "reshape it, or check that the example is one sample"


def _reshape_call(leaf: Leaf, rows: int) -> str:
    """Return the call that reshapes to ``rows`` samples. It says -1 for the number of rows if torch can infer it."""
    if math.prod(leaf.shape):  # with an empty leaf, torch cannot infer it
        rows = -1
    return f"x.reshape({', '.join(map(str, (rows, *leaf.shape)))})"


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _how_to_resize(leaf: Leaf, shape: tuple[int, ...], skip: int) -> str:
    """Return the remedy for a shape with the right number of dimensions but wrong sizes.

    Args:
        leaf: the leaf of the example.
        shape: the shape of the value.
        skip: how many batch dimensions ``shape`` begins with.
    """
    differ = [
        f"dimension {index} is {got}, {wanted} in the example"
        for index, (got, wanted) in enumerate(zip(shape[skip:], leaf.shape, strict=True), skip)
        if got != wanted
    ]
    permute = "permute its dimensions, or " if sorted(shape[skip:]) == sorted(leaf.shape) else ""
    return f"{permute}pad or crop all samples to one length: {', '.join(differ)}"


def _truncate(problems: Iterable[str]) -> list[str]:
    """Return the first `_MAX_NAMED` lines, and a line that counts the rest."""
    rest = iter(problems)
    named = list(itertools.islice(rest, _MAX_NAMED))
    more = sum(1 for _ in rest)
    return [*named, f"... and {more} more"] if more else named


def _format_message(summary: str, problems: Sequence[str], remedies: Sequence[str] = ()) -> str:
    """Return one line if there is a single problem or remedy, else the summary with an indented line for each."""
    lines = [*problems, *remedies]
    return f"{summary}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{summary}:", *lines])
