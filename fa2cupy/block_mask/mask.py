"""The class for users."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fa2cupy.block_mask import pytree
from fa2cupy.block_mask.arrays import Home, home_of, moved
from fa2cupy.block_mask.build import build
from fa2cupy.block_mask.lists import BLOCK, FULL, NAMES, PARTIAL, BlockLists, elements_of, kinds_of, numbers_of
from fa2cupy.block_mask.plot import picture
from fa2cupy.block_mask.tiles import Band, Blocks, Both, Dense, Either, Listed, Tiles, Traced
from fa2cupy.checks import check_flag, check_window, shown
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks.base import describe
from fa2cupy.tracing import MASK, UserFunction

__all__ = ["BlockMask"]

_MAX_LENGTH = 2**30


class BlockMask:
    """Which keys queries see, in blocks of 128 x 128, of which empty ones cost nothing and full ones need no mask.

    Made by `from_blocks`, `from_dense` or `from_mask_mod`; goes into `fa2cupy.attention` and the like as mask=. It has
    its own causal and window: they are not given beside it. `&` and `|` combine two of the same lengths. Its arrays
    live where those that it was made of do; it is a pytree of them for torch and JAX, and pickles.

    shape: (batch, num_heads, seqlen_q, seqlen_k), of which batch and num_heads are 1 if the mask is for all. With
    packed sequences batch is 1 and the lengths are those of the packed rows. Lengths need be multiples of nothing.
    """

    __slots__ = ("_home", "_lists", "_shape")

    def __init__(self, shape: tuple[int, int, int, int], lists: BlockLists, home: Home) -> None:
        self._shape, self._lists, self._home = shape, lists, home
        pytree.register(BlockMask)

    # ------------------------------------------------------------------------------------------------------------------
    # Ways to make one

    @classmethod
    def from_blocks(
        cls,
        blocks: Any,
        block_size: int | tuple[int, int],
        *,
        causal: bool = False,
        window_size: tuple[int, int] | None = None,
        max_partial: int | None = None,
    ) -> BlockMask:
        """Block-sparse attention: blocks[..., m, n] says whether query block m sees key block n.

        Args:
            blocks: bool, (query blocks, key blocks) or (batch or 1, num_heads or 1, query blocks, key blocks).
            block_size: of a block, in rows: one number, or (queries, keys). Any will do; multiples of 128 are computed
                without masks, others need masks where visible and hidden blocks meet.
            causal, window_size: as in `fa2cupy.attention`: what they hide is hidden as well.
            max_partial: room for so many blocks of 128 x 128 that are visible in part; more are an error. Without it
                there is as much room as is needed.

        Raises ValueError or TypeError for arguments that are not as described.
        """
        array, home = _bools("blocks", blocks, "(query blocks, key blocks)")
        block_q, block_k = _block_size(block_size)
        causal = check_flag("causal", causal)
        left, right = (-1, -1) if window_size is None else check_window("window_size", window_size)
        if causal and right > 0:
            from fa2cupy.declared import RIGHT_OF_CAUSAL

            raise RIGHT_OF_CAUSAL.error(value=window_size)
        tiles: Tiles = Blocks(array, block_q, block_k)
        _check_lengths(tiles.shape)
        right = 0 if causal else right
        if left >= 0 or right >= 0:
            ends = (None if end < 0 else end for end in (left, right))
            tiles = Both(tiles, Band(*tiles.shape[2:], *ends))
        return cls._of(tiles, max_partial, home)

    @classmethod
    def from_dense(cls, mask: Any, *, max_partial: int | None = None) -> BlockMask:
        """From a bool array, True where a query sees a key.

        Args:
            mask: (seqlen_q, seqlen_k), or (batch or 1, num_heads or 1, seqlen_q, seqlen_k), any strides.
            max_partial: as in `from_blocks`.
        """
        array, home = _bools("mask", mask, "(seqlen_q, seqlen_k)")
        return cls._of(Dense(array), max_partial, home)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[..., Any] | str,
        batch: int,
        num_heads: int,
        seqlen_q: int,
        seqlen_k: int,
        *,
        arrays: Mapping[str, Any] | None = None,
        like: Any = None,
        max_partial: int | None = None,
    ) -> BlockMask:
        """From a function mask_mod(b, h, q_idx, kv_idx) that says whether a query sees a key.

            BlockMask.from_mask_mod(lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) | (kv_idx < prefix[b]),
                                    batch, 1, seqlen, seqlen, arrays={"prefix": prefix})

        Args:
            mask_mod: traced by its operators: arithmetic, comparisons, & | ~, numpy.where, numpy.minimum, ... (all of
                `fa2cupy.functions`), elements of arrays. Positions count from the first stored rows, from 0; a fifth
                parameter named q_pos is q_idx + seqlen_k - seqlen_q, the key that the query stands beside. Integers are
                of 32 bits. if, while, and, or, not cannot be traced. Or text, for arrays on a GPU: a CUDA C++
                expression of b, h, q_idx, kv_idx, q_pos and the arrays, or statements with a return.
            batch, num_heads: 1 if the mask is the same for all.
            arrays: what the function uses beside its parameters, by the names of its variables, global or of a closure:
                arrays, whose elements it may read, and numbers. An index outside reads the last element.
            like: an array whose framework and device are taken. Not needed with arrays; NumPy's without.
            max_partial: as in `from_blocks`.
        """
        sizes = (("batch", batch), ("num_heads", num_heads), ("seqlen_q", seqlen_q), ("seqlen_k", seqlen_k))
        shape = tuple(_size(name, value, 0 if name.startswith("seqlen") else 1) for name, value in sizes)
        function = UserFunction.of(MASK, mask_mod, arrays)
        given = {each.name: (arrays or {})[each.name] for each in function.captures}
        homes = {each.name: home_of(each.name, given[each.name]) for each in function.captures if each.rank is not None}
        if like is not None:
            homes["like"] = home_of("like", like)
        first = next(iter(homes), "")
        for name, home in homes.items():
            if home != homes[first]:
                raise InvalidArgument(
                    f"{name} is on {home} but {first} is on {homes[first]}: one framework and device are needed"
                )
        home = homes[first] if homes else home_of("like", np.empty(0))
        return cls._of(Traced(shape, function, function.on_host(given)), max_partial, home)  # type: ignore[arg-type]

    @classmethod
    def _of(cls, tiles: Tiles, max_partial: int | None, home: Home) -> BlockMask:
        _check_lengths(tiles.shape)
        if max_partial is not None:
            max_partial = _size("max_partial", max_partial, 0)
        return cls(tiles.shape, home.take(build(tiles, max_partial)), home)

    # ------------------------------------------------------------------------------------------------------------------
    # What it is

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self._shape

    @property
    def lists(self) -> BlockLists:
        """What the kernels read."""
        return self._lists

    @property
    def home(self) -> Home:
        """Framework and device of the arrays."""
        return self._home

    def on_host(self) -> BlockLists:
        """The lists in NumPy. Waits for a GPU."""
        return self._home.to_numpy(self._lists)

    def sparsity(self) -> float:
        """The part of the blocks of 128 x 128 that are not computed, 0.0 to 1.0."""
        kinds = kinds_of(self.on_host())
        return float((kinds == 0).mean()) if kinds.size else 0.0

    def to_dense(self) -> Any:
        """bool, of `shape`: True where a query sees a key. In the framework of the mask, on its device."""
        lists = self.on_host()
        dense = self._dense_of(lists, slice(None))
        return self._home.own(dense.reshape(self._shape))

    def _dense_of(self, lists: BlockLists, masks: slice) -> np.ndarray:
        numbers = numbers_of(lists)[masks]
        found = np.zeros((*numbers.shape, BLOCK, BLOCK), bool)
        found[numbers == -1] = True
        found[numbers >= 0] = elements_of(lists.bits[numbers[numbers >= 0]])
        count, m, n = numbers.shape
        dense: np.ndarray = found.transpose(0, 1, 3, 2, 4).reshape(count, m * BLOCK, n * BLOCK)
        return np.ascontiguousarray(dense[:, : self._shape[2], : self._shape[3]])

    def plot(self, batch: int = 0, head: int = 0, *, width: int = 64) -> str:
        """A picture of one mask in text: rows are queries, █ all is visible, ▒ some, · nothing; width: letters a line.

        By elements as far as they are few, else by blocks.
        """
        width = _size("width", width, 1)
        which = []
        for name, value, count in (("batch", batch, self._shape[0]), ("head", head, self._shape[1])):
            number = _size(name, value, 0)
            if number >= count:
                raise InvalidArgument(f"{shown(name, value)} is not there: the mask has {count}, 0 to {count - 1}")
            which.append(number)
        mask = which[0] * self._shape[1] + which[1]
        lists = self.on_host()
        if max(self._shape[3], self._shape[2] / 2) <= width * BLOCK:
            dense = self._dense_of(lists, slice(mask, mask + 1))[0]
            return picture(dense, dense, width)
        kinds = kinds_of(lists)[mask]
        return picture(kinds >= PARTIAL, kinds == FULL, width)

    def __repr__(self) -> str:
        try:
            kinds = kinds_of(self.on_host())
        except Exception:  # while JAX or torch traces it, there is nothing to count
            return f"BlockMask(shape={self._shape})"
        partial, full = (int((kinds == kind).sum()) for kind in (PARTIAL, FULL))
        return (
            f"BlockMask(shape={self._shape}, {kinds.size} blocks of {BLOCK} x {BLOCK}: {full} full, {partial} partial, "
            f"{self.sparsity():.1%} empty, on {self._home})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{self.plot(width=32)}"

    # ------------------------------------------------------------------------------------------------------------------
    # What else can be made of it

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._with("&", Both, other)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._with("|", Either, other)

    def _with(self, sign: str, kind: type[Both] | type[Either], other: BlockMask) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        if self._home != other._home:
            raise InvalidArgument(f"{sign} of BlockMasks on {self._home} and on {other._home}: move one with .to()")
        a, b = self._shape, other._shape
        if a[2:] != b[2:] or any(x != y and 1 not in (x, y) for x, y in zip(a[:2], b[:2], strict=True)):
            raise InvalidArgument(
                f"{sign} of BlockMasks of shapes {a} and {b}: the same lengths are needed, and batch and num_heads "
                "that are equal or 1"
            )
        tiles = kind(*(Listed(each._shape, each.on_host()) for each in (self, other)))
        return BlockMask._of(tiles, None, self._home)

    def to(self, device: Any) -> BlockMask:
        """The same on another device, as its framework calls it; itself where it is there already."""
        lists, home = moved(self._lists, self._home, device)
        return self if home == self._home else BlockMask(self._shape, lists, home)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self._shape, self._lists.arrays())


def _rebuilt(shape: tuple[int, int, int, int], arrays: tuple[Any, ...]) -> BlockMask:
    return BlockMask(shape, BlockLists(*arrays), home_of(NAMES[0], arrays[0]))


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


def _size(name: str, value: Any, least: int) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise InvalidType(f"{name}={value} is a bool: an int of at least {least} is needed")
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(
            f"{shown(name, value)} is a {describe(value)}: an int of at least {least} is needed"
        ) from None
    if number < least or number > _MAX_LENGTH:
        raise InvalidArgument(f"{shown(name, value)} is not supported: {least} to {_MAX_LENGTH}")
    return number


def _block_size(value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        return (_size("block_size", value, 1),) * 2
    if len(value) != 2:
        raise InvalidArgument(f"{shown('block_size', value)} has {len(value)} elements: (queries, keys) is needed")
    return _size("block_size", value[0], 1), _size("block_size", value[1], 1)


def _bools(name: str, value: Any, form: str) -> tuple[np.ndarray, Home]:
    """An array of four dimensions in NumPy, and whose it is."""
    home = home_of(name, value)
    shape, dtype = home.framework.shape(value), home.framework.dtype(value)
    if dtype != "bool":
        hint = "; numbers that are added are a bias" if dtype.startswith(("float", "bfloat")) else ""
        raise InvalidType(f"{name} has dtype {dtype}: bool is needed, True where a query sees a key{hint}")
    if len(shape) not in (2, 4):
        four = f"(batch or 1, num_heads or 1, {form[1:]}"
        hint = f"; pass {name}[:, None] for one of each batch row, {name}[None] for one of each head"
        raise InvalidArgument(
            f"{name} has {len(shape)} dimensions, shape {tuple(shape)}: {form} or {four} is needed"
            + (hint if len(shape) == 3 else "")
        )
    if len(shape) == 4 and 0 in shape[:2]:
        raise InvalidArgument(f"{name} has shape {tuple(shape)}: batch and num_heads of at least 1 are needed")
    array = home.array(value)
    return (array if len(shape) == 4 else array[None, None]), home


def _check_lengths(shape: tuple[int, ...]) -> None:
    for name, length in zip(("batch", "num_heads", "seqlen_q", "seqlen_k"), shape, strict=True):
        if length > _MAX_LENGTH:
            raise InvalidArgument(f"the mask has {name} {length}, which is not supported: at most {_MAX_LENGTH}")
