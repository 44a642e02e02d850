"""What is wrong with a batch, or with a server's spec, and what to do about it, in words.

Only what has been found to differ comes here, so nothing here has to be fast.

* Each function of the public ones makes the error for one kind of difference, for the caller to raise.
* Every problem is a line: path, got, expected, remedy. At most `_MAX_NAMED` of a kind are named, then counted; the
  remedies for the whole come last and are never cut off.
* Only the mistake is named. Where one leaf has a batch dimension, those without one are wrong; where a container is
  not the example's, it is named rather than all that is in it.
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

# How many wrong leaves an error names.
_MAX_NAMED = 8


def server_spec_error(leaves: Sequence[Leaf], theirs: Sequence[WireLeaf], peer: str) -> SpecMismatchError:
    """The error for a server that expects other arrays: names both sides, leaf by leaf."""
    what = f"Server spec mismatch: {peer} expects {len(theirs)} arrays, the example has {len(leaves)}"
    return SpecMismatchError(_format_message(what, _truncate(_server_differences(leaves, theirs))))


def _server_differences(leaves: Sequence[Leaf], theirs: Sequence[WireLeaf]) -> Iterator[str]:
    """A line for each, one at a time: a server may name thousands."""
    for index, (server, leaf) in enumerate(itertools.zip_longest(theirs, leaves)):
        if not (server and leaf) or server != leaf.wire:
            example = f"{leaf} ({leaf.wire.itemsize}-byte items)" if leaf else "nothing"
            expected = f"{server.itemsize}-byte items {list(server.shape)}" if server else "nothing"
            yield f"leaf {index}: server expects {expected}, example has {example}"


def server_batch_error(leaves: Sequence[Leaf], keys: Sequence[KeyPath], arrays: Sequence[Any]) -> SpecMismatchError:
    """The error for a server that gives other batches than of samples like the example.

    Args:
        leaves: the example's.
        keys: of the server's, in the order of the wire.
        arrays: what is there, ``(batch_size, *shape)``.
    """
    problems = []
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
                f"leaf {index}: {format_key_path(key)} is in a dict of the one and in a list or tuple of the other"
            )
    what = "Server spec mismatch: the server was not made for samples like the example"
    remedy = "make it with echo.Server(numpy_example(example), ...), of the example that the senders have, too"
    return SpecMismatchError(_format_message(what, _truncate(problems), [remedy]))


def _describe_leaf(key: KeyPath, dtype: object, shape: Sequence[int]) -> str:
    """A leaf of a server's batches."""
    path = format_key_path(key)
    return f"{path}: {dtype} {_format_batch_shape(shape)}" if path else f"{dtype} {_format_batch_shape(shape)}"


def structure_error(root: str, leaves: Sequence[Leaf], example: Any, batch: Any) -> SpecMismatchError:
    """The error for a batch that has not the example's leaves: names what is missing and what is unexpected.

    Args:
        root: what to call the batch.
        leaves: the example's.
        example: its treespec.
        batch: the treespec of the batch.
    """
    keys = key_paths(batch)
    ours, theirs = describe_containers(example), describe_containers(batch)
    what = f"{root} has not the structure of the example"
    remedies = ["send what the example holds (select= picks it), or give an example of what is sent"]
    if _has_list_for_leaf(leaves, keys, ours, theirs):
        remedies.insert(0, "numbers in a list become one leaf with torch.tensor(x)")
    if batch.type in (list, tuple) and batch.num_children and all(child == example for child in batch.children()):
        remedies.insert(0, "stack a list of samples into one batch with torch.utils.data.default_collate(samples)")
    problems = [*_missing_leaves(root, leaves, keys, theirs), *_unexpected_nodes(root, leaves, keys, ours, theirs)]
    return SpecMismatchError(_format_message(what, problems, remedies))


def _has_list_for_leaf(
    leaves: Sequence[Leaf], keys: Sequence[KeyPath], ours: Mapping[KeyPath, str], theirs: Mapping[KeyPath, str]
) -> bool:
    """Whether one side has a list where the other has a leaf, as a tokenizer makes them of single samples."""
    met = [theirs.get(leaf.key_path, "") for leaf in leaves] + [ours.get(key, "") for key in keys]
    return any(node.startswith("list ") for node in met)


def _missing_leaves(
    root: str, leaves: Sequence[Leaf], keys: Sequence[KeyPath], theirs: Mapping[KeyPath, str]
) -> list[str]:
    """What there is in place of the example's leaves that a structure has not."""
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
    """What a structure has that the example has not: whole containers rather than all that is in them."""
    wanted = {leaf.key_path for leaf in leaves}
    problems: dict[str, None] = {}
    for key in keys:
        # The outermost container that the example has not: naming it says all.
        top = next((key[:n] for n in range(len(key)) if key[:n] not in ours), key)
        if key in wanted or top in wanted:
            continue
        got = f"{root}{format_key_path(top)}: unexpected {theirs.get(top, '')}".rstrip()
        if top in ours and ours[top] != "None":
            got = f"{root}{format_key_path(top)}: unexpected leaf, expected {ours[top]}"
        elif ours.get(top[:-1]) != theirs.get(top[:-1]) and format_key_path(top) in map(format_key_path, wanted):
            got = f"{got}; in {theirs[top[:-1]]}, expected {ours[top[:-1]]}"
        problems[got] = None
    return _truncate(list(problems))


def leaves_error(root: str, leaves: Sequence[Leaf], values: Sequence[Any], batched: bool | None) -> SpecMismatchError:
    """The error for a batch that differs from the example in shapes or dtypes: names every wrong leaf.

    Args:
        root: what to call the batch.
        leaves: the example's.
        values: the leaves of the batch, in the same order.
        batched: whether it had to be a batch or one sample; None if it was free to be either.

    Raises:
        TypeError: a leaf is no dense array of numbers.
    """
    shapes = [shape_of(value) for value in values]
    # One leaf with a batch dimension makes it a batch, in which the leaves without one are the mistake.
    stacked = any(len(shape) == len(leaf.shape) + 1 for shape, leaf in zip(shapes, leaves, strict=True))
    stacked = stacked if batched is None else batched
    problems = []
    sizes: dict[int, str] = {}
    misshapen = False
    for shape, leaf in zip(shapes, leaves, strict=True):
        if stacked and shape[1:] == leaf.shape and len(shape) == len(leaf.shape) + 1:
            sizes.setdefault(shape[0], root + leaf.path)
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
    if len(sizes) > 1:
        found = ", ".join(f"{size} at {path}" for size, path in sizes.items())
        problems.append(f"leaves differ in the number of samples: {found}; send as many of each")
    what = f"{root} does not match the example"
    return SpecMismatchError(
        _format_message(what, problems, _hint_if_example_is_batch(leaves, shapes) if misshapen else ())
    )


def _hint_if_example_is_batch(leaves: Sequence[Leaf], shapes: Sequence[tuple[int, ...]]) -> list[str]:
    """A remedy, if the shapes of a batch are what they would be if the example were a batch itself."""
    pairs = list(zip(shapes, (leaf.shape for leaf in leaves), strict=True))
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


def _expected_shape(leaf: Leaf, batched: bool | None) -> str:
    single, stacked = f"{list(leaf.shape)}", _format_batch_shape(leaf.shape)
    if batched is None:
        return f"{single} or {stacked}"
    return stacked if batched else single


def _format_batch_shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(["B", *map(str, shape)]) + "]"


def _how_to_reshape(
    value: Any, leaf: Leaf, shape: tuple[int, ...], stacked: bool, sizes: Sequence[int], batched: bool | None
) -> str:
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
    return "reshape it; or is the example not one sample?"


def _reshape_call(leaf: Leaf, rows: int) -> str:
    if math.prod(leaf.shape):  # else torch cannot infer the -1
        rows = -1
    return f"x.reshape({', '.join(map(str, (rows, *leaf.shape)))})"


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _how_to_resize(leaf: Leaf, shape: tuple[int, ...], skip: int) -> str:
    differ = [
        f"dimension {index} is {got}, {wanted} in the example"
        for index, (got, wanted) in enumerate(zip(shape[skip:], leaf.shape, strict=True), skip)
        if got != wanted
    ]
    permute = "permute its dimensions, or " if sorted(shape[skip:]) == sorted(leaf.shape) else ""
    return f"{permute}pad or crop all samples to one length: {', '.join(differ)}"


def _truncate(problems: Iterable[str]) -> list[str]:
    rest = iter(problems)
    named = list(itertools.islice(rest, _MAX_NAMED))
    more = sum(1 for _ in rest)
    return [*named, f"... and {more} more"] if more else named


def _format_message(what: str, problems: Sequence[str], remedies: Sequence[str] = ()) -> str:
    lines = [*problems, *remedies]
    return f"{what}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{what}:", *lines])
