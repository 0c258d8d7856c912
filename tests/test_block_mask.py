"""BlockMask on the CPU: its lists against loops over blocks, what it can be made of, and how it behaves."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy import BlockMask
from fa2cupy.block_mask.lists import elements_of, words_of
from fa2cupy.errors import Fa2Error, InvalidArgument, InvalidType
from tests.block_lists import expected_lists, same_lists
from tests.fake_gpu import FakeGpu, host_view, to_cupy

prefix: Any = None  # rebound
doc: Any = None


def places(seqlen_q: int, seqlen_k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(seqlen_q)[:, None], np.arange(seqlen_k)


def random_dense(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Elements at random, with empty and full blocks, rows without any key, and a key that nobody sees."""
    rng = np.random.default_rng(seed)
    dense = rng.random(shape) < 0.5
    kinds = rng.integers(0, 3, (*shape[:2], -(-shape[2] // 128), -(-shape[3] // 128)))
    kinds = np.repeat(np.repeat(kinds, 128, 2), 128, 3)[:, :, : shape[2], : shape[3]]
    dense = np.where(kinds == 0, False, np.where(kinds == 1, True, dense))
    if shape[2] > 3:
        dense[:, :, 3] = False
    if shape[3] > 9:
        dense[..., 9] = False
    return dense


def holds(mask: BlockMask, dense: np.ndarray) -> None:
    """AssertionError unless the mask is this one, and its lists are what they should be."""
    shape = (*mask.shape[:2], *dense.shape[2:])
    dense = np.ascontiguousarray(np.broadcast_to(dense, shape))
    assert mask.shape == shape
    assert same_lists(mask.on_host(), expected_lists(dense))
    assert (mask.to_dense() == dense).all()


# ----------------------------------------------------------------------------------------------------------------------
# Lists


def test_bits_and_back() -> None:
    elements = np.random.default_rng(1).random((3, 128, 128)) < 0.3
    words = words_of(elements)
    assert words.dtype == np.int32 and words.shape == (3, 2, 128, 4)
    assert (elements_of(words) == elements).all()
    # The rule, spelt out for one element: query 5, key 43 = 8 * 5 + 2 * 1 + 1.
    one = np.zeros((1, 128, 128), bool)
    one[0, 5, 43] = True
    words = words_of(one)
    assert words[0, 0, 5, 1] == 1 << (2 * 5 + 1) and words[0, 1, 43, 2] == 1 << 1  # 5 = 8 * 0 + 2 * 2 + 1
    assert np.count_nonzero(words) == 2


SHAPES = [(1, 1, 128, 128), (1, 1, 1, 1), (2, 1, 300, 500), (1, 3, 260, 129), (2, 2, 127, 256), (1, 1, 640, 131)]


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_of_a_dense_mask(shape: tuple[int, int, int, int]) -> None:
    for seed in range(3):
        dense = random_dense(seed, shape)
        holds(BlockMask.from_dense(dense), dense)
        if shape[:2] == (1, 1):
            holds(BlockMask.from_dense(dense[0, 0]), dense)
    holds(BlockMask.from_dense(np.zeros(shape, bool)), np.zeros(shape, bool))
    holds(BlockMask.from_dense(np.ones(shape, bool)), np.ones(shape, bool))


def test_any_strides() -> None:
    dense = random_dense(1, (2, 3, 300, 200))
    holds(BlockMask.from_dense(dense[:, ::-1, ::-1, ::-1]), dense[:, ::-1, ::-1, ::-1])
    turned = dense.transpose(1, 0, 3, 2)
    holds(BlockMask.from_dense(turned), turned)
    holds(
        BlockMask.from_dense(np.broadcast_to(dense[:, :, :1], dense.shape)),
        np.broadcast_to(dense[:, :, :1], dense.shape),
    )


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(lengths: tuple[int, int]) -> None:
    mask = BlockMask.from_dense(np.zeros(lengths, bool))
    assert mask.to_dense().shape == (1, 1, *lengths) and mask.sparsity() == 0.0
    assert mask.plot() == "\n".join([""] * lengths[0])
    holds(mask, np.zeros((1, 1, *lengths), bool))


BLOCK_SIZES = [128, 256, 384, 64, 32, (128, 64), (16, 256), (100, 96), (1, 1), (300, 7)]


@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
def test_blocks_of_any_size(size: int | tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    block_q, block_k = size if isinstance(size, tuple) else (size, size)
    blocks = rng.random((2, 1, max(1, 500 // block_q), max(1, 700 // block_k))) < 0.4
    blocks[:, :, : len(blocks[0, 0]) // 2] |= rng.random((2, 1, 1, 1)) < 0.5
    dense = np.repeat(np.repeat(blocks, block_q, 2), block_k, 3)
    query, key = places(*dense.shape[2:])
    beside = query + dense.shape[3] - dense.shape[2]
    holds(BlockMask.from_blocks(blocks, size), dense)
    holds(BlockMask.from_blocks(blocks, size, causal=True), dense & (key <= beside))
    seen = (key >= beside - 100) & (key <= beside + 20)
    holds(BlockMask.from_blocks(blocks, size, window_size=(100, 20)), dense & seen)
    holds(BlockMask.from_blocks(blocks[0, 0], size, window_size=(-1, 3)), dense[:1] & (key <= beside + 3))
    holds(
        BlockMask.from_blocks(blocks, size, causal=True, window_size=(9, -1)),
        dense & (key >= beside - 9) & (key <= beside),
    )


def test_blocks_of_whole_size_need_no_bits() -> None:
    blocks = np.random.default_rng(1).random((7, 9)) < 0.5
    for size, factor in ((128, 1), (256, 2)):
        mask = BlockMask.from_blocks(blocks, size)
        assert len(mask.lists.bits) == 0
        assert mask.sparsity() == pytest.approx(1 - blocks.mean())
        assert mask.lists.rows_q.shape == (1, 7 * factor, 4)


@pytest.mark.parametrize("lengths", [(300, 500), (500, 300), (256, 256)])
def test_mask_functions(lengths: tuple[int, int]) -> None:
    query, key = places(*lengths)
    starts, ids = np.array([3, 200]), np.arange(500) // 90
    cases: list[tuple[Callable[..., Any], dict[str, Any] | None, np.ndarray]] = [
        (lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, None, (key <= query)[None, None]),
        (
            lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < prefix[b]),
            {"prefix": starts},
            (key <= query) | (key < starts[:, None, None, None]),
        ),
        (lambda b, h, q, k: doc[q] == doc[k], {"doc": ids}, (ids[query] == ids[key])[None, None]),
        (lambda b, h, q, k: (q - k) % 4 == h, None, (query - key) % 4 == np.arange(2)[None, :, None, None]),
        (lambda b, h, q, k, q_pos: k <= q_pos, None, (key <= query + lengths[1] - lengths[0])[None, None]),
        (lambda b, h, q, k: True, None, np.ones((1, 1, *lengths), bool)),
    ]
    for function, arrays, dense in cases:
        holds(BlockMask.from_mask_mod(function, *dense.shape[:2], *lengths, arrays=arrays), dense)


# ----------------------------------------------------------------------------------------------------------------------
# What else it can do


def test_and_and_or() -> None:
    for shapes in (((2, 1, 300, 500), (1, 3, 300, 500)), ((1, 1, 257, 129), (2, 2, 257, 129))):
        dense = [random_dense(n, shape) for n, shape in enumerate(shapes)]
        one, two = (BlockMask.from_dense(each) for each in dense)
        holds(one & two, dense[0] & dense[1])
        holds(one | two, dense[0] | dense[1])
        holds(one & one, dense[0])
        holds(one | two | one, dense[0] | dense[1])
    halves = [np.repeat(np.arange(256) < 128, 256).reshape(256, 256) for _ in range(2)]
    whole = BlockMask.from_dense(halves[0]) | BlockMask.from_dense(~halves[1])
    assert len(whole.lists.bits) == 0 and whole.sparsity() == 0.0


def test_room_for_partial_blocks() -> None:
    dense = random_dense(2, (1, 2, 300, 500))
    mask = BlockMask.from_dense(dense)
    partial, blocks = len(mask.lists.bits), 2 * 3 * 4
    roomy = BlockMask.from_dense(dense, max_partial=partial + 3)
    holds(roomy, dense)
    assert roomy.lists.bits.shape == (partial + 3, 2, 128, 4) and roomy.lists.entries_k.shape == (blocks, 2)
    assert roomy.lists.ranks.shape == (blocks,)
    holds(roomy & mask, dense)
    with pytest.raises(InvalidArgument, match=f"max_partial={partial - 1} is too small: {partial} blocks"):
        BlockMask.from_dense(dense, max_partial=partial - 1)
    holds(BlockMask.from_blocks(np.ones((2, 2), bool), 64, max_partial=0), np.ones((1, 1, 128, 128), bool))
    with pytest.raises(InvalidArgument, match="max_partial=0"):
        BlockMask.from_mask_mod(lambda b, h, q, k: k <= q, 1, 1, 128, 128, max_partial=0)


def test_sparsity_counts_blocks() -> None:
    assert BlockMask.from_mask_mod(lambda b, h, q, k: k <= q, 1, 1, 512, 512).sparsity() == 6 / 16
    assert BlockMask.from_dense(np.zeros((300, 300), bool)).sparsity() == 1.0


def test_text_and_pictures() -> None:
    mask = BlockMask.from_mask_mod(lambda b, h, q, k: k <= q, 1, 1, 4, 6)
    assert mask.plot() == "█·····\n██····\n███···\n████··"
    assert repr(mask) == (
        "BlockMask(shape=(1, 1, 4, 6), 1 blocks of 128 x 128: 0 full, 1 partial, 0.0% empty, on the CPU (NumPy))"
    )
    assert str(mask) == f"{mask!r}\n{mask.plot()}"
    large = BlockMask.from_mask_mod(lambda b, h, q, k: (k <= q) & (h == 0), 1, 2, 1024, 1024)
    assert large.plot(width=8) == "▒▒······\n██▒▒····\n████▒▒··\n██████▒▒"
    assert large.plot(0, 1, width=8) == "\n".join(["········"] * 4)
    assert large.plot(width=4) == "▒▒··\n██▒▒"  # by blocks
    assert large.plot(width=1) == "▒"
    with pytest.raises(InvalidArgument, match="head=2 is not there: the mask has 2, 0 to 1"):
        large.plot(0, 2)


def test_pickles_and_stays_on_the_cpu() -> None:
    dense = random_dense(4, (1, 1, 300, 200))
    mask = BlockMask.from_dense(dense)
    holds(pickle.loads(pickle.dumps(mask)), dense)
    assert mask.to("cpu") is mask
    with pytest.raises(InvalidArgument, match="device='tpu' is not supported: 'cpu', 'cuda' or 'cuda:1'"):
        mask.to("tpu")


def test_the_package_has_it() -> None:
    assert fa2cupy.BlockMask is BlockMask and "BlockMask" in fa2cupy.__all__


# ----------------------------------------------------------------------------------------------------------------------
# Errors

ONE = np.ones((1, 1), bool)


def later(*sizes: Any) -> BlockMask:
    return BlockMask.from_mask_mod(lambda b, h, q, k: q > k, *sizes)


WRONG: dict[str, tuple[Callable[[], Any], type[Fa2Error], str]] = {
    "a list": (lambda: BlockMask.from_dense([[True]]), InvalidType, "mask is a list: an array of CuPy, PyTorch"),
    "floats": (
        lambda: BlockMask.from_dense(np.zeros((3, 3))),
        InvalidType,
        "dtype float64: bool is needed.*are a bias",
    ),
    "ints": (lambda: BlockMask.from_blocks(np.zeros((3, 3), int), 64), InvalidType, "blocks has dtype int64: bool"),
    "three": (
        lambda: BlockMask.from_dense(np.zeros((2, 3, 3), bool)),
        InvalidArgument,
        r"has 3 dimensions, shape \(2, 3, 3\): \(seqlen_q, seqlen_k\) or .* is needed; pass mask\[:, None\]",
    ),
    "no heads": (lambda: BlockMask.from_dense(np.zeros((1, 0, 3, 3), bool)), InvalidArgument, "of at least 1"),
    "size 0": (lambda: BlockMask.from_blocks(ONE, 0), InvalidArgument, "block_size=0 is not supported"),
    "size": (lambda: BlockMask.from_blocks(ONE, 1.5), InvalidType, "block_size=1.5 is a float"),
    "sizes": (lambda: BlockMask.from_blocks(ONE, (1, 2, 3)), InvalidArgument, "has 3 elements"),
    "causal": (lambda: BlockMask.from_blocks(ONE, 8, causal=1), InvalidType, "causal=1 is a int"),
    "window": (
        lambda: BlockMask.from_blocks(ONE, 8, window_size=(-2, 0)),
        InvalidArgument,
        "-1 is unlimited",
    ),
    "both": (
        lambda: BlockMask.from_blocks(ONE, 8, causal=True, window_size=(3, 1)),
        InvalidArgument,
        "causal makes the right end 0",
    ),
    "long": (
        lambda: BlockMask.from_blocks(ONE, 2**30).shape and BlockMask.from_blocks(np.ones((2, 1), bool), 2**30),
        InvalidArgument,
        "blocks: at most|at most 1073741824",
    ),
    "many": (
        lambda: later(64, 64, 2**20, 2**20),
        InvalidArgument,
        "at most 2147483647",
    ),
    "seqlen": (lambda: later(1, 1, -1, 3), InvalidArgument, "seqlen_q=-1"),
    "batch": (lambda: later(0, 1, 1, 3), InvalidArgument, "batch=0 is not"),
    "heads": (lambda: later(1, "2", 1, 3), InvalidType, "num_heads='2' is a str"),
    "bool": (lambda: later(1, True, 1, 3), InvalidType, "num_heads=True is a bool"),
    "text": (
        lambda: BlockMask.from_mask_mod("q_idx > kv_idx", 1, 1, 3, 3),
        InvalidArgument,
        "a text, which only a GPU",
    ),
    "if": (
        lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k and True, 1, 1, 3, 3),
        InvalidType,
        "mask_mod asks",
    ),
    "and": (
        lambda: BlockMask.from_dense(np.ones((3, 3), bool)) & BlockMask.from_dense(np.ones((3, 4), bool)),
        InvalidArgument,
        r"& of BlockMasks of shapes \(1, 1, 3, 3\) and \(1, 1, 3, 4\): the same lengths",
    ),
    "max_partial": (
        lambda: BlockMask.from_dense(np.ones((3, 3), bool), max_partial=-1),
        InvalidArgument,
        "max_partial=-1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        make()
    with pytest.raises(TypeError):
        BlockMask.from_dense(np.ones((3, 3), bool)) & np.ones((3, 3), bool)  # type: ignore[operator]


def test_on_a_gpu(gpu: FakeGpu, copies: None) -> None:
    """Its arrays are where those are that it was made of, and move."""
    dense = random_dense(4, (1, 2, 300, 200))
    array = to_cupy(dense)
    for mask in (
        BlockMask.from_dense(array),
        BlockMask.from_blocks(array, 1),
        BlockMask.from_mask_mod(lambda b, h, q, k: array[b, h, q, k], 1, 2, 300, 200, arrays={"array": array}),
        BlockMask.from_dense(dense).to("cuda"),
    ):
        assert str(mask.home) == "cuda:0 (CuPy)" and all(type(each) is type(array) for each in mask.lists.arrays())
        assert same_lists(mask.on_host(), expected_lists(dense))
        assert (host_view(mask.to_dense()) == dense).all()
        assert mask.to("cuda:0") is mask and (mask.to("cpu").to_dense() == dense).all()
        assert "on cuda:0 (CuPy)" in repr(mask & mask)
    with pytest.raises(InvalidArgument, match=r"& of BlockMasks on cuda:0 \(CuPy\) and on the CPU \(NumPy\): move one"):
        mask & BlockMask.from_dense(dense)
    mask = BlockMask.from_mask_mod(lambda b, h, q, k: q > k, 1, 1, 300, 200, like=array)
    assert mask.home.device.kind == "cuda"


def test_a_large_one_is_quick() -> None:
    """65,536 by blocks: nothing of the elements is looked at but along the diagonal."""
    blocks = np.random.default_rng(1).random((512, 512)) < 0.05
    mask = BlockMask.from_blocks(blocks, 128, causal=True)
    assert len(mask.lists.bits) == np.diagonal(blocks).sum()
