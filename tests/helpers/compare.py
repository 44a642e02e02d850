"""Compares what was sent with what arrived, as the learner sees them."""

from __future__ import annotations

from typing import Any

import optree
import torch


def to_numpy(batch: Any) -> Any:
    """Convert tensors to numpy arrays, as the learner sees them: bfloat16 becomes uint16."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach()
        return (leaf.view(torch.uint16) if leaf.dtype is torch.bfloat16 else leaf).numpy()

    return optree.tree_map(convert, batch)


def assert_same(got: Any, expected: Any) -> None:
    """Check that structure, dtypes, shapes and bytes are equal."""
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    for path, mine, theirs in zip(
        optree.tree_paths(got), optree.tree_leaves(got), optree.tree_leaves(expected), strict=True
    ):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), path
        assert mine.tobytes() == theirs.tobytes(), path
