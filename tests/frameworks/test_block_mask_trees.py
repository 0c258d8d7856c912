"""BlockMask of torch's and JAX's arrays, and as a pytree of theirs."""

from __future__ import annotations

import copy
import pickle

import jax
import numpy as np
import pytest
import torch
import torch.utils._pytree as torch_tree

import fa2cupy
from fa2cupy import BlockMask
from fa2cupy.block_mask.lists import NAMES
from fa2cupy.errors import InvalidArgument
from tests.block_lists import expected_lists, same_lists

doc = None  # rebound
DENSE = np.random.default_rng(1).random((1, 2, 200, 300)) < 0.5


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_lives_where_its_arrays_do(library: str) -> None:
    if library == "torch":
        kind, array = torch.Tensor, torch.from_numpy(DENSE)
    else:
        kind, array = jax.Array, jax.numpy.asarray(DENSE)
    mask = BlockMask.from_dense(array)
    assert all(isinstance(each, kind) for each in (*mask.lists.arrays(), mask.to_dense()))
    assert same_lists(mask.on_host(), expected_lists(DENSE))
    assert (np.asarray(mask.to_dense()) == DENSE).all()
    assert library in repr(mask).lower()
    both = mask & mask
    assert isinstance(both.lists.bits, kind) and mask.to("cpu") is mask
    for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert same_lists(again.on_host(), expected_lists(DENSE)) and isinstance(again.lists.bits, kind)
    with pytest.raises(InvalidArgument, match="move one with"):
        mask & BlockMask.from_dense(DENSE)


def test_arrays_of_functions() -> None:
    ids = np.arange(300) // 70
    dense = (ids[:200, None] == ids)[None, None]
    for array, kind in ((torch.from_numpy(ids), torch.Tensor), (jax.numpy.asarray(ids), jax.Array)):
        mask = BlockMask.from_mask_mod(lambda b, h, q, k: doc[q] == doc[k], 1, 1, 200, 300, arrays={"doc": array})
        assert same_lists(mask.on_host(), expected_lists(dense)) and isinstance(mask.lists.bits, kind)
    narrow = torch.from_numpy(ids / 2).to(torch.bfloat16)
    mask = BlockMask.from_mask_mod(lambda b, h, q, k: doc[q] == doc[k], 1, 1, 200, 300, arrays={"doc": narrow})
    assert same_lists(mask.on_host(), expected_lists(dense))
    like = BlockMask.from_mask_mod(lambda b, h, q, k: q == k, 1, 1, 5, 5, like=torch.zeros(1))
    assert isinstance(like.lists.bits, torch.Tensor)
    with pytest.raises(
        InvalidArgument, match=r"like is on the CPU .NumPy. but doc is on the CPU .PyTorch.: one framework"
    ):
        BlockMask.from_mask_mod(
            lambda b, h, q, k: doc[q] == k, 1, 1, 5, 5, arrays={"doc": torch.arange(5)}, like=np.zeros(1)
        )


def test_foreign_functions_are_named() -> None:
    for function, name in (
        (lambda b, h, q, k: torch.where(q > k, q, k) > 3, "to torch's where"),
        (lambda b, h, q, k: torch.arange(5)[q] > 3, "arrays= has to name its tensors"),
        (lambda b, h, q, k: jax.numpy.where(q > k, q, k) > 3, "where requires ndarray or scalar"),
        (lambda b, h, q, k: q + torch.arange(5) > 3, "arrays= has to name its tensors|arrays= does not name"),
    ):
        with pytest.raises(TypeError, match=name):
            BlockMask.from_mask_mod(function, 1, 1, 5, 5)


def test_a_tree_of_torch() -> None:
    mask = BlockMask.from_dense(torch.from_numpy(DENSE))
    leaves, spec = torch_tree.tree_flatten({"mask": mask})
    assert len(leaves) == len(NAMES) and all(isinstance(each, torch.Tensor) for each in leaves)
    again = torch_tree.tree_unflatten(leaves, spec)["mask"]
    assert isinstance(again, BlockMask) and again.shape == mask.shape and again.lists.bits is mask.lists.bits
    moved = torch_tree.tree_map(lambda each: each + 0, mask)
    assert same_lists(moved.on_host(), expected_lists(DENSE))


def test_a_tree_of_jax() -> None:
    mask = BlockMask.from_dense(jax.numpy.asarray(DENSE))
    leaves, spec = jax.tree_util.tree_flatten(mask)
    assert len(leaves) == len(NAMES)
    assert jax.tree_util.tree_unflatten(spec, leaves).shape == mask.shape
    inside = []

    @jax.jit
    def same(mask: BlockMask) -> BlockMask:
        inside.append(repr(mask))
        return mask

    again = same(mask)
    assert inside == ["BlockMask(shape=(1, 2, 200, 300))"]
    assert same_lists(again.on_host(), expected_lists(DENSE))
    same(mask)
    assert len(inside) == 1  # the same tree, not traced again


def test_a_mask_of_numpy_is_a_tree() -> None:
    leaves, _ = torch_tree.tree_flatten(BlockMask.from_dense(DENSE))
    assert all(isinstance(each, np.ndarray) for each in leaves) and len(leaves) == len(NAMES)


def test_attention_of_torch_tensors() -> None:
    """With bool tensors, and with BlockMasks of any library's arrays on the CPU; no copy is made of these."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, n, heads, 16)).astype(np.float32) for n, heads in ((200, 2), (300, 1), (300, 1)))
    expected, lse = fa2cupy.attention(q, k, v, mask=DENSE, return_lse=True)
    tensors = [torch.from_numpy(each) for each in (q, k, v)]
    masks = [torch.from_numpy(DENSE), BlockMask.from_dense(DENSE), BlockMask.from_dense(torch.from_numpy(DENSE))]
    for mask in (*masks, BlockMask.from_dense(jax.numpy.asarray(DENSE))):
        out = fa2cupy.attention(*tensors, mask=mask)
        assert isinstance(out, torch.Tensor) and (out.numpy() == expected).all()
        assert (fa2cupy.attention(q, k, v, mask=masks[2]) == expected).all()
    dout = torch.ones_like(tensors[0])
    gradients = fa2cupy.attention_backward(
        dout, *tensors, torch.from_numpy(expected), torch.from_numpy(lse), mask=masks[1]
    )
    wanted = fa2cupy.attention_backward(dout.numpy(), q, k, v, expected, lse, mask=DENSE)
    assert all((a.numpy() == b).all() for a, b in zip(gradients, wanted, strict=True))


def test_where_it_is_not_supported_yet() -> None:
    q, k = jax.numpy.zeros((1, 200, 2, 16)), jax.numpy.zeros((1, 300, 2, 16))
    for mask in (jax.numpy.asarray(DENSE), BlockMask.from_dense(DENSE), BlockMask.from_dense(jax.numpy.asarray(DENSE))):
        with pytest.raises(InvalidArgument, match="mask is not supported yet for JAX arrays"):
            fa2cupy.attention(q, k, k, mask=mask)
