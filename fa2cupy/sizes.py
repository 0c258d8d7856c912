"""Sizes: the lengths of one call, from the shapes of its arrays, and what is wrong with shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fa2cupy.checks import LAYOUTS
from fa2cupy.declared import BHSD_OF_PACKED
from fa2cupy.errors import InvalidArgument
from fa2cupy.frameworks.base import TensorRef

__all__ = ["MAX_HEAD_DIM", "MAX_LENGTH", "STARTS", "Sizes"]

MAX_HEAD_DIM = 256
# Lengths, batch and heads: leaves the kernels' 32-bit counters room to round up to a tile. Offsets are 64-bit.
MAX_LENGTH = 2**30


@dataclass(frozen=True, slots=True)
class Sizes:
    """The lengths of a problem, read from q, k and v.

    packed_q, packed_k: this side is (total, heads, head_dim), all sequences one behind the other; its seqlen is the
    total, and batch the number of sequences. lse follows the queries.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    packed_q: bool = False
    packed_k: bool = False

    @classmethod
    def of(cls, refs: Mapping[str, TensorRef], layout: str) -> Sizes:
        """From q, k, v and, where they are among `refs`, cu_seqlens_q and cu_seqlens_k.

        Raises InvalidArgument where the shapes do not fit together.
        """
        starts = {name: _sequences(name, refs[name].shape) for name in STARTS if name in refs}
        if starts and layout != "bshd":
            raise BHSD_OF_PACKED.error()
        packed = {name: start in starts for name, start in zip("qkv", (*STARTS, STARTS[1]), strict=True)}
        forms = {name: _PACKED if packed[name] else LAYOUTS[layout] for name in "qkv"}
        shapes = {name: _bshd(name, refs[name].shape, layout, packed[name]) for name in "qkv"}
        batches = starts | {name: shapes[name][0] for name in "qkv" if not packed[name]}
        first, batch = next((name, batches[name]) for name in ("q", *STARTS, "k") if name in batches)
        _, seqlen_q, num_heads, head_dim = shapes["q"]
        _, seqlen_k, num_heads_k, _ = shapes["k"]
        head_dim_v = shapes["v"][3]
        for name, what, width in (("q", "head_dim", head_dim), ("v", "head_dim_v", head_dim_v)):
            if not 1 <= width <= MAX_HEAD_DIM:
                raise InvalidArgument(f"{name} has {what} {width}, which is not supported: 1 to {MAX_HEAD_DIM}")
        for name, length in batches.items():
            if length != batch:
                if starts:
                    wrong, right = _batch_in_words(name, length), _batch_in_words(first, batch)
                    raise InvalidArgument(f"{wrong} but {right}: they must be equal")
                raise InvalidArgument(f"{name} has batch {length} but q has {batch}: they must be equal")
        if shapes["k"][3] != head_dim:
            raise InvalidArgument(
                f"k has head_dim {shapes['k'][3]} but q has {head_dim}: they must be equal "
                f"({_meaning(layout, forms['k'])})"
            )
        for axis, what in ((1, "rows" if packed["k"] else "seqlen"), (2, "num_heads")):
            if shapes["v"][axis] != shapes["k"][axis]:
                raise InvalidArgument(
                    f"v has {what} {shapes['v'][axis]} but k has {shapes['k'][axis]}: they must be equal "
                    f"({_meaning(layout, forms['v'])})"
                )
        if num_heads % num_heads_k if num_heads_k else num_heads:
            raise InvalidArgument(
                f"q has {num_heads} heads and k has {num_heads_k}: the number of query heads must be a multiple of the "
                f"number of key heads ({_meaning(layout, forms['q'])})"
            )
        for name, what, length in (
            (first, "batch", batch),
            ("q", "seqlen", seqlen_q),
            ("k", "seqlen", seqlen_k),
            ("q", "num_heads", num_heads),
        ):
            if length > MAX_LENGTH:
                raise InvalidArgument(f"{name} has {what} {length}, which is not supported: at most {MAX_LENGTH}")
        return cls(
            batch, seqlen_q, seqlen_k, num_heads, num_heads_k, head_dim, head_dim_v, packed["q"], packed["k"]
        )  # fmt: skip

    def shape(self, name: str, layout: str) -> tuple[int, ...]:
        """The shape, in the user's layout, of a tensor of this problem: 'dq', 'out', ..., 'lse' (no layout)."""
        if name in ("lse", "lse_out"):
            return (() if self.packed_q else (self.batch,)) + (self.num_heads, self.seqlen_q)
        if name == "dsinks":
            return (self.num_heads,)
        is_packed = self.packed_q
        if name in ("q", "dq"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim
        elif name in ("out", "dout"):
            length, heads, width = self.seqlen_q, self.num_heads, self.head_dim_v
        else:
            is_packed = self.packed_k
            width = self.head_dim if name in ("k", "dk") else self.head_dim_v
            length, heads = self.seqlen_k, self.num_heads_k
        if is_packed:
            return length, heads, width
        return (self.batch, length, heads, width) if layout == "bshd" else (self.batch, heads, length, width)

    def check_shape(self, name: str, shape: tuple[int, ...], layout: str) -> None:
        """InvalidArgument if argument `name` does not have the shape that this problem gives it."""
        expected = self.shape(name, layout)
        if shape != expected:
            raise InvalidArgument(f"{name} has shape {shape}: {expected} is needed")


STARTS = ("cu_seqlens_q", "cu_seqlens_k")
_PACKED = "(total, num_heads, head_dim)"


def _sequences(name: str, shape: tuple[int, ...]) -> int:
    """How many sequences an array of their starts is for."""
    if len(shape) != 1 or shape[0] == 0:
        raise InvalidArgument(f"{name} has shape {shape}: (batch + 1,) is needed, the starts and the end of the last")
    return shape[0] - 1


def _batch_in_words(name: str, length: int) -> str:
    return f"{name} is for a batch of {length}" if name in STARTS else f"{name} has batch {length}"


def _meaning(layout: str, form: str) -> str:
    """What the dimensions of an array are, as an error adds it."""
    return f"packed arrays are {form}" if form == _PACKED else f"layout={layout!r} means {form}"


def _bshd(name: str, shape: tuple[int, ...], layout: str, packed: bool) -> tuple[int, int, int, int]:
    """A shape in that order, of a packed array with a batch of one."""
    if len(shape) != (3 if packed else 4):
        needed = f"3 are needed with {_start_of(name)}, {_PACKED}" if packed else f"4 are needed, {LAYOUTS[layout]}"
        hint = _packed_hint(name, shape) if packed else _rank_hint(name, shape, layout)
        raise InvalidArgument(f"{name} has {len(shape)} dimensions, shape {shape}: {needed}{hint}")
    if packed:
        return 1, shape[0], shape[1], shape[2]
    batch, first, second, width = shape
    return (batch, first, second, width) if layout == "bshd" else (batch, second, first, width)


def _start_of(name: str) -> str:
    return STARTS[name != "q"]


def _packed_hint(name: str, shape: tuple[int, ...]) -> str:
    """What an array of another rank than 3 may be, where packed sequences are said to be."""
    if len(shape) == 2:
        return f"; for one head pass {name}[:, None, :]"
    if len(shape) == 4 and shape[0] == 1:
        return f"; pass {name}[0]"
    if len(shape) == 4:
        return (
            f"; leave {_start_of(name)} out for {shape[0]} sequences of {shape[1]} rows each, where seqused says how "
            f"many of these count, or pass {name}.reshape(-1, {shape[2]}, {shape[3]}), whose sequences "
            f"{_start_of(name)} then says"
        )
    return ""


def _rank_hint(name: str, shape: tuple[int, ...], layout: str) -> str:
    """What an array of another rank than 4 may be, and how it is passed."""
    if len(shape) == 2:
        indices = "None, :, None, :" if layout == "bshd" else "None, None, :, :"
        return f"; for one head of one sequence pass {name}[{indices}]"
    if len(shape) != 3:
        return ""
    split = f"{name}.reshape({shape[0]}, {shape[1]}, num_heads, head_dim)"
    split += "" if layout == "bshd" else " with layout='bshd'"
    if shape[2] > MAX_HEAD_DIM:  # longer than any head: several side by side
        return f"; if its last dimension holds all heads, pass {split}"
    indices = ":, :, None, :" if layout == "bshd" else ":, None, :, :"
    return (
        f"; pass {name}[None] for a batch of one, {name}[{indices}] for one head, or {split} if its last dimension "
        f"holds all heads; if it holds packed sequences, {_PACKED}, say where they start with {_start_of(name)}"
    )
