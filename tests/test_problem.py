"""`problem.py`: options, lengths and the frozen problem that plans are made from."""

from __future__ import annotations

import dataclasses
import fractions
import itertools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fa2cupy.checks import check_flag
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY
from fa2cupy.frameworks.base import Device, TensorRef, contiguous_strides
from fa2cupy.options import Options
from fa2cupy.problem import (
    ARRAY_RULES,
    SPECS,
    AttentionProblem,
    Sizes,
    check_dtypes,
    softmax_scale,
    with_features,
)
from fa2cupy.spec import LengthsSpec, WindowSpec
from tests.fake_gpu import cupy_array
from tests.reference import visible_keys

GPU = Device("cuda", 0)


def ref(shape: tuple[int, ...], dtype: str = "float16", device: Device = GPU, ptr: int = 512) -> TensorRef:
    return TensorRef(ptr, shape, contiguous_strides(shape), dtype, device, None)


def options(**changes: object) -> Options:
    values = {"causal": False, "softmax_scale": None, "layout": "bshd", "dtype": None, "deterministic": False}
    return Options.checked(**{**values, **changes})


def problem(changes: dict[str, TensorRef] | None = None, *, heads_k: int = 2, **keywords: object) -> AttentionProblem:
    """q (2, 5, 4, 16), k and v (2, 7, heads_k, 16), the rest to match."""
    chosen = options(**keywords)
    sizes = Sizes(2, 5, 7, 4, heads_k, 16, 16)
    tensors = {name: ref(sizes.shape(name, chosen.layout)) for name in ("q", "k", "v", "out")}
    tensors["lse"] = ref(sizes.shape("lse", chosen.layout), "float32")
    return AttentionProblem.from_refs({**tensors, **(changes or {})}, sizes, "float16", chosen)


def test_fields() -> None:
    p = problem(causal=True)
    assert (p.batch, p.seqlen_q, p.seqlen_k, p.num_heads, p.num_heads_k) == (2, 5, 7, 4, 2)
    assert (p.head_dim, p.head_dim_v, p.dtype) == (16, 16, "float16")
    assert p.causal and p.specs == ()
    assert p.softmax_scale == 0.25
    assert p.aligned
    assert dict(p.strides) == {
        "q": (320, 64, 16),
        "k": (224, 32, 16),
        "v": (224, 32, 16),
        "out": (320, 64, 16),
        "lse": (20, 5, 1),
    }
    assert not problem().causal
    assert "seqlen_q=5" in str(p) and str(p) == re.sub(r", \w+=None", "", repr(p))
    assert hash(p) == hash(problem(causal=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.batch = 3  # type: ignore[misc]


def test_layouts_give_the_same_order() -> None:
    p = problem(layout="bhsd")
    assert dict(p.strides)["q"] == (320, 16, 80)
    assert dict(p.strides)["lse"] == (20, 5, 1)


def test_junk_strides_are_dropped() -> None:
    sizes = Sizes(1, 1, 3, 1, 1, 1, 1)
    junk = {name: TensorRef(512, sizes.shape(name, "bshd"), (7, 9, 11, 13), "float16", GPU, None) for name in "qkv"}
    junk["out"] = junk["q"]
    junk["lse"] = TensorRef(512, (1, 1, 1), (5, 6, 7), "float32", GPU, None)
    strides = dict(AttentionProblem.from_refs(junk, sizes, "float16", options()).strides)
    assert strides == {"q": (0, 0, 0), "k": (0, 9, 0), "v": (0, 9, 0), "out": (0, 0, 0), "lse": (0, 0, 0)}


def test_empty_tensors_have_no_strides() -> None:
    sizes = Sizes(2, 0, 3, 4, 4, 8, 8)
    tensors = {name: ref(sizes.shape(name, "bshd")) for name in ("q", "k", "v", "out")}
    tensors["lse"] = ref(sizes.shape("lse", "bshd"), "float32")
    p = AttentionProblem.from_refs(tensors, sizes, "float16", options())
    assert dict(p.strides)["q"] == dict(p.strides)["lse"] == (0, 0, 0)
    assert dict(p.strides)["k"] == (96, 32, 8)
    assert p.aligned


@pytest.mark.parametrize(
    "odd",
    [
        TensorRef(514, (2, 5, 4, 16), (320, 64, 16, 1), "float16", GPU, None),
        TensorRef(512, (2, 5, 4, 16), (324, 64, 16, 1), "float16", GPU, None),
        TensorRef(512, (2, 5, 4, 16), (320, 65, 16, 1), "float16", GPU, None),
        TensorRef(512, (2, 5, 4, 16), (320, 64, 18, 1), "float16", GPU, None),
    ],
)
@pytest.mark.parametrize("name", ["q", "out"])
def test_unaligned(name: str, odd: TensorRef) -> None:
    assert not problem({name: odd}).aligned


def test_aligned_in_spite_of() -> None:
    expanded = TensorRef(512, (2, 7, 2, 16), (0, 0, 16, 1), "float16", GPU, None)
    assert problem({"k": expanded}).aligned
    assert dict(problem({"k": expanded}).strides)["k"] == (0, 0, 16)
    negative = TensorRef(512, (2, 5, 4, 16), (320, -64, 16, 1), "float16", GPU, None)
    assert problem({"q": negative}).aligned
    assert dict(problem({"q": negative}).strides)["q"] == (320, -64, 16)
    lse = TensorRef(516, (2, 4, 5), (20, 5, 1), "float32", GPU, None)
    assert problem({"lse": lse}).aligned


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "aligned"),
    [
        (8, 8, True),
        (16, 16, True),
        (59, 59, False),
        (4, 4, False),
        (256, 256, True),
        (192, 128, True),
        (64, 59, False),
        (4, 64, False),
    ],
)
def test_odd_head_dims_are_not_aligned(head_dim: int, head_dim_v: int, aligned: bool) -> None:
    sizes = Sizes(1, 1, 1, 1, 1, head_dim, head_dim_v)
    tensors = {name: ref(sizes.shape(name, "bshd")) for name in ("q", "k", "v", "out")}
    tensors["lse"] = ref((1, 1, 1), "float32")
    assert AttentionProblem.from_refs(tensors, sizes, "float16", options()).aligned == aligned


@pytest.mark.parametrize(
    "value", [0.125, np.float32(0.125), np.float64(0.125), fractions.Fraction(1, 8), np.float16(0.125)]
)
def test_scales(value: object) -> None:
    scale = options(softmax_scale=value).softmax_scale
    assert type(scale) is float
    assert scale == 0.125


def test_scale_of_the_true_head_dim() -> None:
    assert softmax_scale(Sizes(1, 1, 1, 1, 1, 59, 59), options()) == 59**-0.5
    assert softmax_scale(Sizes(1, 1, 1, 1, 1, 192, 128), options()) == 192**-0.5
    assert softmax_scale(Sizes(1, 1, 1, 1, 1, 59, 59), options(softmax_scale=0)) == 0.0
    assert options(softmax_scale=-3).softmax_scale == -3.0
    assert options(softmax_scale=np.int32(2)).softmax_scale == 2.0


def test_scale_beyond_float32_on_a_gpu() -> None:
    assert problem(softmax_scale=1e38).softmax_scale == 1e38
    with pytest.raises(InvalidArgument, match=r"softmax_scale=1e\+39 .* at most 2e\+38"):
        problem(softmax_scale=1e39)


def test_flags() -> None:
    for value in (True, False, np.True_, np.False_):
        assert check_flag("causal", value) is bool(value)
    for value in ("yes", 1, 0, None, 1.0, np.int64(1), np.array(True)):
        with pytest.raises(InvalidType, match=r"causal.* True or False"):
            check_flag("causal", value)


def test_shapes_by_name() -> None:
    sizes = Sizes(2, 5, 7, 4, 2, 16, 8)
    for names, shape in (
        (("q", "dq"), (2, 5, 4, 16)),
        (("k", "dk"), (2, 7, 2, 16)),
        (("v", "dv"), (2, 7, 2, 8)),
        (("out", "dout"), (2, 5, 4, 8)),
    ):
        for name in names:
            assert sizes.shape(name, "bshd") == shape
            assert sizes.shape(name, "bhsd") == (shape[0], shape[2], shape[1], shape[3])
    for name in ("lse", "lse_out"):
        assert sizes.shape(name, "bshd") == sizes.shape(name, "bhsd") == (2, 4, 5)


@pytest.mark.parametrize(("heads", "heads_k"), [(1, 1), (4, 4), (6, 3), (8, 2), (6, 1), (0, 0), (0, 3)])
def test_heads_that_divide(heads: int, heads_k: int) -> None:
    k = ref((2, 7, heads_k, 16))
    sizes = Sizes.of({"q": ref((2, 5, heads, 16)), "k": k, "v": k}, "bshd")
    assert (sizes.num_heads, sizes.num_heads_k) == (heads, heads_k)


def test_head_dim_of_v_is_its_own() -> None:
    for head_dim, head_dim_v in ((192, 128), (64, 128), (1, 256), (59, 16)):
        q, k, v = ref((2, 5, 4, head_dim)), ref((2, 7, 2, head_dim)), ref((2, 7, 2, head_dim_v))
        assert Sizes.of({"q": q, "k": k, "v": v}, "bshd") == Sizes(2, 5, 7, 4, 2, head_dim, head_dim_v)


def test_zero_lengths_are_fine() -> None:
    for batch, seqlen_q, seqlen_k in ((0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 0, 0)):
        k = ref((batch, seqlen_k, 1, 16))
        assert Sizes.of({"q": ref((batch, seqlen_q, 1, 16)), "k": k, "v": k}, "bshd").batch == batch


def test_too_long() -> None:
    k = TensorRef(512, (1, 2**31, 1, 8), (0, 0, 0, 1), "float16", GPU, None)
    with pytest.raises(InvalidArgument, match=r"k has seqlen 2147483648.* at most 1073741824"):
        Sizes.of({"q": ref((1, 1, 1, 8)), "k": k, "v": k}, "bshd")


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "uint16")]
)
def test_dtypes(dtype: str, stored: str) -> None:
    tensors = {"q": ref((1, 1, 1, 8), stored), "lse": ref((1, 1, 1), "float32")}
    assert check_dtypes(tensors, options(dtype="bfloat16" if stored == "uint16" else None)) == dtype


def test_explicit_dtype_may_repeat_the_arrays() -> None:
    assert check_dtypes({"q": ref((1, 1, 1, 8), "bfloat16")}, options(dtype="bfloat16")) == "bfloat16"
    assert check_dtypes({"q": ref((1, 1, 1, 8), "float16")}, options(dtype="float16")) == "float16"


def test_refs_of_real_arrays() -> None:
    q = cupy_array((2, 5, 4, 16), ml_dtypes.bfloat16)
    assert CUPY.ref(q, "q").dtype == "bfloat16"
    assert CUPY.ref(q[:, :, ::2], "q").strides == (320, 64, 32, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


def windowed(window: tuple[int, int], seqlen_q: int, seqlen_k: int, causal: bool = False) -> AttentionProblem:
    dense = dataclasses.replace(problem(causal=causal), seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    return SPECS["window_size"](dense, window)


def test_equal_windows_are_equal_problems() -> None:
    full, causal = (dataclasses.replace(problem(causal=causal), seqlen_q=5, seqlen_k=7) for causal in (False, True))
    assert {windowed(w, 5, 7) for w in ((6, 4), (-1, 4), (6, -1), (2**40, 2**40))} == {full}
    assert {windowed(w, 5, 7) for w in ((6, 0), (-1, 0), (2**40, 0))} == {causal}
    assert {windowed(w, 5, 7, True) for w in ((6, 0), (6, -1), (2**40, -1))} == {causal}
    assert windowed((2, -1), 5, 7, True) == windowed((2, 0), 5, 7)
    assert windowed((2, 9), 5, 7) == windowed((2, -1), 5, 7) == windowed((2, 5), 5, 7)
    assert windowed((8, 2), 5, 7) == windowed((-1, 2), 5, 7)
    assert windowed((5, 0), 5, 7) == dataclasses.replace(full, window=WindowSpec(5, 0))


@pytest.mark.parametrize("seqlen_k", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("seqlen_q", [0, 1, 2, 5, 9])
def test_what_the_kernels_of_a_window_see(seqlen_q: int, seqlen_k: int) -> None:
    """Of any window, the rows that are left all see a key, and the keys that are left are all seen by a query."""
    for left, right in itertools.product(range(-1, 11), repeat=2):
        p = windowed((left, right), seqlen_q, seqlen_k)
        sees = visible_keys(seqlen_q, seqlen_k, False, (left, right))
        assert sees[: p.empty_rows].sum() == 0 and sees[:, : p.empty_keys].sum() == 0
        rest = sees[p.empty_rows :, p.empty_keys :]
        if seqlen_q == p.empty_rows:
            continue
        assert rest.any(1).all() and rest.any(0).all()
        if p.window is None:
            assert (rest == visible_keys(*rest.shape, p.causal)).all()
        else:
            assert not p.causal and p.window.only_drops == bool(rest.all()), (left, right)
            assert (rest == visible_keys(*rest.shape, False, (p.window.left, p.window.right))).all()


# ----------------------------------------------------------------------------------------------------------------------
# Lengths


def packed_problem(
    names: tuple[str, ...], *, window: tuple[int, int] | None = None, causal: bool = False
) -> AttentionProblem:
    """Three sequences in 5 rows of q or 7 of k and v, of which those arrays say where they lie."""
    arrays = {"q": ref((3, 5, 4, 16)), "k": ref((3, 7, 2, 16)), "v": ref((3, 7, 2, 8))}
    starts = {name: ref((4,), "int32") for name in names if name.startswith("cu")}
    for name in "qkv":
        if ("cu_seqlens_q" if name == "q" else "cu_seqlens_k") in starts:
            arrays[name] = ref(arrays[name].shape[1:])
    sizes = Sizes.of({**arrays, **starts}, "bshd")
    tensors = {**arrays, "out": ref(sizes.shape("out", "bshd")), "lse": ref(sizes.shape("lse", "bshd"), "float32")}
    given: dict[str, Any] = {} if window is None else {"window_size": window}
    given |= {name: ref(next(iter(ARRAY_RULES[name].shapes(sizes))), "int32") for name in names}
    whole = AttentionProblem.from_refs(tensors, sizes, "float16", options(causal=causal))
    return with_features(whole, given)


def test_a_packed_side_has_no_batch() -> None:
    p = packed_problem(("cu_seqlens_q", "cu_seqlens_k", "seqused_k"))
    assert (p.batch, p.seqlen_q, p.seqlen_k) == (3, 5, 7)
    assert p.lengths == LengthsSpec(3, cu_seqlens_q=True, cu_seqlens_k=True, seqused_k=True)
    assert p.extra_arrays == ("cu_seqlens_q", "cu_seqlens_k", "seqused_k")
    strides = {"q": (0, 64, 16), "k": (0, 32, 16), "v": (0, 16, 8), "out": (0, 32, 8), "lse": (0, 5, 1)}
    assert dict(p.strides) == strides
    one_side = packed_problem(("cu_seqlens_k",))
    assert dict(one_side.strides) == {"q": (320, 64, 16), "out": (160, 32, 8), "lse": (20, 5, 1)} | {
        name: strides[name] for name in "kv"
    }
    assert one_side.lengths is not None and (one_side.lengths.packed_q, one_side.lengths.packed_k) == (False, True)


def test_segments_are_at_most_as_many_as_they_have_queries_and_keys() -> None:
    p = packed_problem(("segment_ids_q", "segment_ids_k"))
    assert p.lengths == LengthsSpec(15, segments=True)
    assert p.extra_arrays == ("segment_ids_q", "segment_ids_k")


def test_lengths_leave_unseen_rows_to_the_device() -> None:
    assert packed_problem(("seqused_k",), window=(1, 0)).empty_keys == 0
    p = packed_problem(("seqused_k", "leftpad_k"), causal=True)
    assert (p.empty_rows, p.empty_keys) == (0, 0)
    p = packed_problem(("seqused_k",), window=(0, 1))
    assert p.window is not None and not p.window.only_drops
    assert packed_problem(("seqused_k",), window=(6, 4)).window is None  # no sequence is longer than the arrays
    assert packed_problem(("seqused_k",), window=(5, 9)).window == WindowSpec(5, 5)
