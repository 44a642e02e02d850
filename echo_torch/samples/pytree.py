"""Flattens trees of containers into leaves, and names the place of each leaf in the tree.

* optree decides what a container is and in which order the leaves come. optree takes other mappings and dataclass
  instances for leaves. These are opened: they become dicts first, at any depth.
* Containers are opened item by item. An item that cannot be read becomes an `UnreadableLeaf`, and the others are still
  read. The error is raised later, where the path of the item is known.
* A `KeyPath` is the place of a leaf. It is the same for all types of mapping, and for all types of sequence.
  `format_key_path` writes it the way you would index the tree.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch

from .leaf import ARRAY_TYPES, KeyPath, UnreadableLeaf

# These return the torch.func transform that is running, and the fake mode, or None. One question per batch costs less
# than looking at each tensor. They are private in PyTorch, so a release may lack them; then the answer is None.
_peek_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_get_dispatch_mode = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_FAKE = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "FAKE", None)


def in_transform_or_fake_mode() -> bool:
    """Whether tensors may have memory that does not hold their values."""
    return _peek_transform() is not None or _get_dispatch_mode(_FAKE) is not None


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves and the treespec, after opening containers that optree takes for leaves."""
    leaves, treespec, _ = flatten_with_opened_flag(tree)
    return leaves, treespec


def flatten_with_opened_flag(tree: Any) -> tuple[list[Any], Any, bool]:
    """Return what `flatten` does, and whether any container had to be opened."""
    leaves, treespec = optree.tree_flatten(tree)
    # Most trees have nothing to open. Only the others pay for a second pass.
    opened = any(not isinstance(leaf, ARRAY_TYPES) and _is_container(leaf) for leaf in leaves)
    if opened:
        leaves, treespec = optree.tree_flatten(optree.tree_unflatten(treespec, map(_containers_to_dicts, leaves)))
    if in_transform_or_fake_mode():
        leaves = [_replace_if_unreadable(leaf) for leaf in leaves]
    return leaves, treespec, opened


def _containers_to_dicts(leaf: Any) -> Any:
    return (
        optree.tree_map(_containers_to_dicts, _container_to_dict(leaf))
        if not isinstance(leaf, ARRAY_TYPES) and _is_container(leaf)
        else leaf
    )


def _is_container(leaf: Any) -> bool:
    """Whether a leaf, in optree's eyes, is a mapping or dataclass instance that holds leaves."""
    # tensordict wraps arbitrary objects in classes that are mappings and dataclasses, but hold no tensors.
    if getattr(type(leaf), "_is_non_tensor", False):
        return False
    return isinstance(leaf, Mapping) or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type))


def _container_to_dict(container: Any) -> dict[Any, Any]:
    """Return the items of a mapping, or the fields of a dataclass instance."""
    if isinstance(container, Mapping):
        # Ask for the keys, because iterating over a TensorDict yields its rows.
        return {key: _read_item(operator.getitem, container, key) for key in container.keys()}  # noqa: SIM118
    return {field.name: _read_item(getattr, container, field.name) for field in dataclasses.fields(container)}


def _read_item(read: Callable[[Any, Any], Any], container: Any, key: Any) -> Any:
    """Return one item, or an `UnreadableLeaf` if reading it raises.

    A lazily stacked TensorDict stacks an item when you read it, and raises if its samples differ in shape. A dataclass
    field without a value raises, too.
    """
    try:
        return read(container, key)
    except Exception as error:
        why = " ".join(str(error).split())
        expected = "expected a dense tensor; if its samples differ in shape, pad them to one length"
        return UnreadableLeaf(f"got {type(container).__name__} that cannot give it, {expected} ({why})")


def _replace_if_unreadable(leaf: Any) -> Any:
    """Return the leaf, or an `UnreadableLeaf` in place of a fake or functional tensor.

    Both kinds have memory of their own that does not hold their values. Functional tensors come from
    ``torch.func.functionalize``.
    """
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if _get_dispatch_mode(_FAKE) is not None:
        expected = "expected one that holds values, not a fake or wrapped one; send outside of FakeTensorMode"
        return UnreadableLeaf(f"got a tensor under a fake mode, {expected}")
    if not torch._is_functional_tensor(leaf):
        return leaf
    return UnreadableLeaf(
        "got a functional tensor, expected one that holds values; send outside of torch.func transforms"
    )


def has_only_builtin_containers(treespec: Any) -> bool:
    """Whether optree knows all container types itself; it does not compare the keys of custom ones."""
    return treespec.kind != optree.PyTreeKind.CUSTOM and all(map(has_only_builtin_containers, treespec.children()))


def key_paths(treespec: Any) -> list[KeyPath]:
    """Return the place of each leaf, in the order of the leaves."""
    keys: list[KeyPath] = []
    for accessor in treespec.accessors():
        keys.append(tuple((isinstance(entry, optree.MappingEntry), entry.entry) for entry in accessor))
    return keys


def format_key_path(key: KeyPath) -> str:
    """Return the path as you would index the tree: ``['obs'][0]``; empty for the tree itself."""
    return "".join(f"[{entry!r}]" for _, entry in key)


def describe_containers(treespec: Any, key: KeyPath = ()) -> dict[KeyPath, str]:
    """Map the place of each node that is not a leaf to a description such as ``dict of 2``.

    Args:
        treespec: the tree.
        key: the place of the tree in a larger one; the root by default.
    """
    if treespec.type is None:  # a leaf
        return {}
    if treespec.type is type(None):
        return {key: "None"}
    nodes = {key: f"{treespec.type.__name__} of {len(treespec.entries())}"}
    mapping = issubclass(treespec.type, dict)
    for entry, child in zip(treespec.entries(), treespec.children(), strict=True):
        nodes |= describe_containers(child, (*key, (mapping, entry)))
    return nodes
