"""A BlockMask as a pytree of torch and of JAX: its arrays are the leaves, its shape is not."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["register"]

_registered: set[str] = set()


def register(kind: type) -> None:
    """With those frameworks that are loaded by now."""
    for name, how in (("jax", _register_jax), ("torch", _register_torch)):
        if name not in _registered and name in sys.modules:
            _registered.add(name)
            how(kind)


def _flatten(mask: Any) -> tuple[list[Any], Any]:
    return list(mask._lists.arrays()), (mask._shape, mask._home)


def _unflatten(leaves: Any, context: Any) -> Any:
    """Leaves may be anything: tracers, placeholders."""
    from fa2cupy.block_mask.lists import BlockLists
    from fa2cupy.block_mask.mask import BlockMask

    shape, home = context
    return BlockMask(shape, BlockLists(*leaves), home)


def _register_jax(kind: type) -> None:
    tree_util = sys.modules["jax"].tree_util
    tree_util.register_pytree_node(
        kind,
        lambda mask: (tuple(_flatten(mask)[0]), _flatten(mask)[1]),
        lambda context, leaves: _unflatten(leaves, context),
    )


def _register_torch(kind: type) -> None:
    import torch.utils._pytree as tree

    tree.register_pytree_node(kind, _flatten, _unflatten, serialized_type_name="fa2cupy.BlockMask")
