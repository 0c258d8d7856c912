"""A BlockMask as a pytree of torch and of JAX: its arrays are the leaves, its shape is not."""

from __future__ import annotations

import sys
from typing import Any

from fa2cupy.block_mask.lists import BlockLists

__all__ = ["register"]

_registered: set[str] = set()


def register(kind: type) -> None:
    """The class, with those frameworks that are loaded by now."""
    for name, how in (("jax", _register_jax), ("torch", _register_torch)):
        if name not in _registered and name in sys.modules:
            _registered.add(name)
            how(kind)


def _leaves(mask: Any) -> tuple[Any, ...]:
    return mask.lists.arrays()  # type: ignore[no-any-return]


def _rest(mask: Any) -> tuple[Any, ...]:
    return mask.shape, mask.home


def _register_jax(kind: type) -> None:
    def rebuilt(rest: tuple[Any, ...], leaves: Any) -> Any:  # leaves may be anything: tracers, placeholders
        return kind(rest[0], BlockLists(*leaves), rest[1])

    tree = sys.modules["jax"].tree_util
    tree.register_pytree_node(kind, lambda mask: (_leaves(mask), _rest(mask)), rebuilt)


def _register_torch(kind: type) -> None:
    import torch.utils._pytree as tree

    def rebuilt(leaves: Any, rest: tuple[Any, ...]) -> Any:
        return kind(rest[0], BlockLists(*leaves), rest[1])

    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    tree.register_pytree_node(kind, lambda mask: (list(_leaves(mask)), _rest(mask)), rebuilt, serialized_type_name=name)
