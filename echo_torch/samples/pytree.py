"""Trees of containers into leaves, and where in the tree each leaf is.

* optree says what a container is; its order is the order of the leaves. Mappings and dataclass instances that it takes
  for leaves are opened first, into dicts, however deep they lie.
* A container is read item by item, and one item that cannot be read takes no other with it: an `UnreadableLeaf` stands in
  for it, to be refused where its path is known.
* A place in a tree is a `KeyPath`: alike for all mappings, and alike for all sequences. Its path is what one would write to
  index the tree.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch

from .leaf import ARRAY_TYPES, KeyPath, UnreadableLeaf

# The torch.func transform that is running, and the fake mode, or None: asked once per batch, where each tensor would
# cost more.
_peek_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_get_dispatch_mode = getattr(torch._C, "_get_dispatch_mode", lambda key: None)
_FAKE = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "FAKE", None)


def in_transform_or_fake_mode() -> bool:
    """Whether tensors may show memory in which their values are not."""
    return _peek_transform() is not None or _get_dispatch_mode(_FAKE) is not None


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and treespec, after containers that optree takes for leaves have been made into dicts."""
    leaves, treespec, _ = flatten_with_opened(tree)
    return leaves, treespec


def flatten_with_opened(tree: Any) -> tuple[list[Any], Any, bool]:
    """As `flatten`, and whether there was such a container."""
    leaves, treespec = optree.tree_flatten(tree)
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
    """Whether it is a mapping or a dataclass instance, and is so to hold leaves."""
    if getattr(type(leaf), "_is_non_tensor", False):  # tensordict's wrappers of any object are both, and hold no leaf
        return False
    return isinstance(leaf, Mapping) or (dataclasses.is_dataclass(leaf) and not isinstance(leaf, type))


def _container_to_dict(container: Any) -> dict[Any, Any]:
    """The items of a mapping, or the fields of a dataclass instance."""
    if isinstance(container, Mapping):
        # By its keys, for a TensorDict iterates over its rows.
        return {key: _read_item(operator.getitem, container, key) for key in container.keys()}  # noqa: SIM118
    return {field.name: _read_item(getattr, container, field.name) for field in dataclasses.fields(container)}


def _read_item(read: Callable[[Any, Any], Any], container: Any, key: Any) -> Any:
    """One item; a stack that is made only now fails for samples that differ in shape, as do fields without a value."""
    try:
        return read(container, key)
    except Exception as error:
        why = " ".join(str(error).split())
        expected = "expected a dense tensor; if its samples differ in shape, pad them to one length"
        return UnreadableLeaf(f"got {type(container).__name__} that cannot give it, {expected} ({why})")


def _replace_if_unreadable(leaf: Any) -> Any:
    """The leaf; but one of torch.func.functionalize has memory of its own with nothing in it, and so have fake ones."""
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
    """Whether there are only containers that optree knows by itself; of others it does not compare the keys."""
    return treespec.kind != optree.PyTreeKind.CUSTOM and all(map(has_only_builtin_containers, treespec.children()))


def key_paths(treespec: Any) -> list[KeyPath]:
    """Where each leaf is, in the order of the leaves."""
    keys: list[KeyPath] = []
    for accessor in treespec.accessors():
        keys.append(tuple((isinstance(entry, optree.MappingEntry), entry.entry) for entry in accessor))
    return keys


def format_key_path(key: KeyPath) -> str:
    """As one would index the tree: ``['obs'][0]``; empty for the tree itself."""
    return "".join(f"[{entry!r}]" for _, entry in key)


def describe_containers(treespec: Any, key: KeyPath = ()) -> dict[KeyPath, str]:
    """What each node that is no leaf is, in words; ``key`` is where the tree itself is."""
    if treespec.type is None:
        return {}
    if treespec.type is type(None):
        return {key: "None"}
    nodes = {key: f"{treespec.type.__name__} of {len(treespec.entries())}"}
    mapping = issubclass(treespec.type, dict)
    for entry, child in zip(treespec.entries(), treespec.children(), strict=True):
        nodes |= describe_containers(child, (*key, (mapping, entry)))
    return nodes
