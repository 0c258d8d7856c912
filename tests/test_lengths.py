"""Packed sequences, used lengths, left padding and segments on the CPU, against each sequence by itself in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fa2cupy
from fa2cupy.errors import InvalidArgument, InvalidType
from fa2cupy.frameworks import CUPY
from fa2cupy.sequences import sequences
from tests.covering import covering
from tests.fake_gpu import FakeGpu, cupy_array, host_view, to_cupy
from tests.lengths import FORMS, MIXED, SMALL, Case, dead_rows, draw, expect_sequences
from tests.reference import as_float64, store

pytestmark = pytest.mark.filterwarnings("error")

NAMES = ("dq", "dk", "dv")


def run(case: Case, *, dlse: Any = None, given: bool = False, **keywords: Any) -> dict[str, Any]:
    """Everything that comes out. given: outputs are, filled with NaN, and rows of no sequence of what the backward
    gets hold NaN too.
    """
    q, k, v, dout = case.inputs
    layout = keywords.get("layout", "bshd")
    keywords |= case.lengths
    if q.dtype == np.uint16:
        keywords["dtype"] = "bfloat16"

    def turned(x: Any) -> Any:
        return x if x is None or layout == "bshd" else x.swapaxes(1, 2)

    def empty(x: Any, width: int) -> Any:
        return turned(np.full((*x.shape[:-1], width), np.array(np.nan).astype(np.float16).view(np.uint16), np.uint16)
                      if x.dtype == np.uint16 else np.full((*x.shape[:-1], width), np.nan, x.dtype))  # fmt: skip

    outputs: dict[str, Any] = {"out": empty(q, v.shape[-1])} if given else {}
    arrays = [turned(x) for x in (q, k, v)]
    for x in (q, k, v, dout):
        x.flags.writeable = False
    out, lse = fa2cupy.attention(*arrays, return_lse=True, **outputs, **keywords)
    saved, saved_lse = out, lse
    if given:
        assert out is outputs["out"]
        saved, saved_lse = out.copy(), lse.copy()
        dead = dead_rows(case.inputs, case.lengths)[0]
        turned(saved)[dead] = store(np.array(np.nan), "bfloat16" if q.dtype == np.uint16 else str(q.dtype))
        np.moveaxis(saved_lse, -1, -2)[dead] = np.nan
        outputs = {name: empty(x, x.shape[-1]) for name, x in zip(NAMES, (q, k, v), strict=True)}
    gradients = fa2cupy.attention_backward(
        turned(dout), *arrays, saved, saved_lse, dlse=dlse, deterministic=given, **keywords, **outputs
    )
    if given:
        assert all(x is outputs[name] for name, x in zip(NAMES, gradients, strict=True))
    results = {"out": out, **dict(zip(NAMES, gradients, strict=True))}
    return {"lse": lse, **{name: turned(x) for name, x in results.items()}}


def check(case: Case, *, causal: bool = False, window: Any = None, dlse: Any = None, **keywords: Any) -> dict[str, Any]:
    results = run(case, causal=causal, window_size=window, dlse=dlse, **keywords)
    expected = expect_sequences(case.inputs, case.lengths, causal=causal, window=window, dlse=dlse, out=results["out"])
    expected.check(**results)
    return results


_USED = ("seqused_q", "seqused_k", "leftpad_k")
_FACTORS = {
    "form": FORMS,
    "pairs": (MIXED, SMALL),
    "seqused_q": (False, True),
    "seqused_k": (False, True),
    "leftpad_k": (False, True),
    "mask": ("full", "causal", (7, 3), (20, 0), (-1, 2), (5, -1), "causal (9, -1)"),
    "heads": ((4, 4), (6, 3), (4, 1)),
    "head_dims": ((16, 16), (24, 40), (7, 1)),
    "dtype": ("float16", "bfloat16", "float32", "float64"),
    "layout": ("bshd", "bhsd"),
    "dlse": (False, True),
    "given": (False, True),
    "integers": (np.int32, np.int64),
}


def _impossible(case: Any) -> bool:
    return "packed" in case.get("form", "") and case.get("layout") == "bhsd"


@pytest.mark.parametrize(
    "choice", covering(_FACTORS, impossible=_impossible), ids=lambda c: f"{c['form']}-{c['dtype']}"
)
def test_all_pairs_of_choices(choice: dict[str, Any]) -> None:
    head_dim, head_dim_v = choice["head_dims"]
    case = draw(
        5, choice["form"], pairs=choice["pairs"], used=[name for name in _USED if choice[name]],
        dtype=choice["dtype"], heads=choice["heads"], head_dim=head_dim, head_dim_v=head_dim_v,
        integers=choice["integers"],
    )  # fmt: skip
    mask = choice["mask"]
    window = mask if isinstance(mask, tuple) else (9, -1) if mask == "causal (9, -1)" else None
    dlse = None
    if choice["dlse"]:
        shape = np.moveaxis(case.inputs.q[..., 0], -1, -2).shape
        dlse = np.random.default_rng(1).standard_normal(shape)
        dlse = dlse.astype(np.float64 if choice["dtype"] == "float64" else np.float32)
        np.moveaxis(dlse, -1, -2)[dead_rows(case.inputs, case.lengths)[0]] = np.nan
    check(case, causal=str(mask).startswith("causal"), window=window, dlse=dlse, layout=choice["layout"],
          given=choice["given"])  # fmt: skip


def test_infinities_of_neighbours_reach_nobody() -> None:
    for form in FORMS:
        check(draw(7, form, used=("seqused_q", "seqused_k"), poison=np.inf), causal=True)


def test_a_sequence_alone_among_8192() -> None:
    """None but one has tokens, and one in 64 a query and no key (a peer left garbage where lengths are 0)."""
    pairs = [(int(n % 64 == 0), 0) for n in range(8192)]
    pairs[4000] = (5, 7)
    results = check(draw(0, "packed", pairs=pairs), causal=True)
    assert np.isfinite(results["lse"]).sum() == 4 * 5


def test_no_sequences_and_no_tokens() -> None:
    for pairs in ((), ((0, 0),), ((0, 0), (0, 3)), ((2, 0),)):
        for form in FORMS:
            check(draw(1, form, pairs=pairs))


def test_alone_it_is_dense_attention_bit_for_bit() -> None:
    case = draw(3, "dense", pairs=((40, 70), (40, 70)), dtype="float32")
    q, k, v, dout = case.inputs
    out, lse = fa2cupy.attention(q, k, v, causal=True, return_lse=True)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, causal=True)
    packed = {f"cu_seqlens_{side}": np.array([0, n, 2 * n], np.int32) for side, n in (("q", 40), ("k", 70))}
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, dout)]
    out_p, lse_p = fa2cupy.attention(*flat[:3], causal=True, return_lse=True, **packed)
    assert (out_p == out.reshape(out_p.shape)).all() and (lse_p == np.concatenate(list(lse), axis=1)).all()
    again = fa2cupy.attention_backward(flat[3], *flat[:3], out_p, lse_p, causal=True, **packed)
    for got, expected in zip(again, gradients, strict=True):
        assert (got == expected.reshape(got.shape)).all()


def test_left_padding_moves_nobody() -> None:
    """Key j stays key j: the last query stands beside key seqused_k - 1, whatever leftpad_k is."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 1, 8)) for n in (4, 9, 9))
    pad, used = np.array([2], np.int32), np.array([8], np.int32)
    lse = fa2cupy.attention(q, k, v, window_size=(3, 0), leftpad_k=pad, seqused_k=used, return_lse=True)[1]
    scores = q[0, :, 0] @ k[0, :, 0].T * 8**-0.5
    for i in range(4):
        seen = [j for j in range(9) if 2 <= j < 8 and i + 4 - 3 <= j <= i + 4]
        assert lse[0, 0, i] == pytest.approx(np.log(np.exp(scores[i, seen]).sum()))


def test_segments_see_their_own_id() -> None:
    ids_q = np.array([[4, 4, 9, -1, 2]])
    ids_k = np.array([[9, 9, 4, 7, 7, -1, 2, 2]])
    q, k, v = (np.ones((1, n, 2, 4)) for n in (5, 8, 8))
    lse = fa2cupy.attention(q, k, v, segment_ids=(ids_q, ids_k), softmax_scale=0.0, return_lse=True)[1]
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse[0], np.log([[1, 1, 2, 0, 2]] * 2))


def test_hints_are_never_read() -> None:
    case = draw(2, "packed")
    q, k, v, _ = case.inputs

    class Untouchable:
        ndim = 0

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    expected = fa2cupy.attention(q, k, v, **case.lengths)
    for hint in (0, 1, 10**9, -3, 2.5, np.int64(7), np.array(3), Untouchable()):
        out = fa2cupy.attention(q, k, v, **case.lengths, max_seqlen_q=hint, max_seqlen_k=hint)
        assert (out == expected).all()
    for wrong in ("4", True, (3, 4)):
        with pytest.raises(InvalidType, match=r"max_seqlen_q=.*: a number, or an array of one, is needed"):
            fa2cupy.attention(q, k, v, **case.lengths, max_seqlen_q=wrong)


def test_the_pullback_has_the_lengths_of_its_call() -> None:
    case = draw(4, "packed", used=("seqused_k",))
    q, k, v, dout = case.inputs
    (out, lse), pullback = fa2cupy.attention_vjp(q, k, v, causal=True, return_lse=True, **case.lengths)
    expect_sequences(case.inputs, case.lengths, causal=True, out=out).check(
        out=out, lse=lse, **dict(zip(NAMES, pullback(dout), strict=True))
    )
    assert fa2cupy.backward_workspace_bytes(q, k, v, **case.lengths) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Wrong lengths


def q_k_v(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [np.ones(shape, np.float32) for shape in shapes]


PACKED = q_k_v((10, 4, 8), (12, 2, 8), (12, 2, 8))
DENSE = q_k_v((3, 10, 4, 8), (3, 12, 2, 8), (3, 12, 2, 8))
STARTS = {"cu_seqlens_q": [0, 4, 4, 10], "cu_seqlens_k": [0, 5, 9, 12]}


@pytest.mark.parametrize(
    ("arrays", "lengths", "message"),
    [
        (PACKED, STARTS | {"cu_seqlens_q": [0, 6, 4, 10]},
         "cu_seqlens_q ends sequence 1 at 4, before its start, 6: starts must not fall"),
        (PACKED, STARTS | {"cu_seqlens_q": [-1, 4, 4, 10]}, "cu_seqlens_q starts sequence 0 at -1: at least 0"),
        (PACKED, STARTS | {"cu_seqlens_k": [0, 5, 9, 13]},
         "cu_seqlens_k ends sequence 2 at 13: at most 12 is possible, the rows of the array"),
        (PACKED, STARTS | {"cu_seqlens_k": [0, 5, 2**40, 2**40]}, "cu_seqlens_k ends sequence 1 at 1099511627776"),
        (PACKED, STARTS | {"seqused_q": [4, 1, 6]}, "seqused_q of sequence 1 is 1: 0 to 0 is needed"),
        (PACKED, STARTS | {"seqused_k": [5, 4, -2]}, "seqused_k of sequence 2 is -2: 0 to 3 is needed"),
        (DENSE, {"seqused_k": [12, 13, 0]}, "seqused_k of sequence 1 is 13: 0 to 12 is needed"),
        (DENSE, {"leftpad_k": [0, -1, 0]}, "leftpad_k of sequence 1 is -1: 0 to 12 is needed, its keys in use"),
        (DENSE, {"seqused_k": [12, 4, 0], "leftpad_k": [12, 5, 0]}, "leftpad_k of sequence 1 is 5: 0 to 4 is needed"),
        (DENSE, {"segment_ids": ([[0] * 10] * 3, [[0] * 12, [3, 3, 1] * 4, [0] * 12])},
         "segment_ids_k has id 1 at places apart in batch row 1: equal ids must be together"),
    ],
)  # fmt: skip
def test_wrong_lengths_are_clamped_and_found_if_asked(
    arrays: list[np.ndarray], lengths: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        name: tuple(map(np.array, value)) if isinstance(value, tuple) else np.array(value)
        for name, value in lengths.items()
    }
    out, lse = fa2cupy.attention(*arrays, return_lse=True, **given)  # all values are 1, whoever sees whom
    assert (out[np.moveaxis(lse, -1, -2) > -np.inf] == 1).all()
    gradients = fa2cupy.attention_backward(out, *arrays, out, lse, **given)
    assert all(np.isfinite(x).all() for x in gradients)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    for call in (
        lambda: fa2cupy.attention(*arrays, **given),
        lambda: fa2cupy.attention_backward(out, *arrays, out, lse, **given),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert isinstance(caught.value, InvalidArgument) and message in str(caught.value)


def test_what_wrong_lengths_are_clamped_to() -> None:
    """No row is in two sequences, so that no gradient is written twice."""

    def found(q: list[int], k: list[int], **used: list[int]) -> list[tuple[int, ...]]:
        lengths = {"cu_seqlens_q": q, "cu_seqlens_k": k, **used}
        table = sequences({name: np.array(x) for name, x in lengths.items()}, len(q) - 1, 10, 12)
        return [(each.first_q, each.length_q, each.first_k, each.length_k) for each in table]

    rising = [0, 4, 8, 12]
    assert found([0, 6, 4, 10], rising) == [(0, 6, 0, 4), (6, 4, 8, 4)]
    assert found([-5, 3, 99, 10], rising) == [(0, 3, 0, 4), (3, 7, 4, 4)]
    assert found([0, 3, 6, 10], rising, seqused_k=[9, -1, 2]) == [(0, 3, 0, 4), (6, 4, 8, 2)]
    assert found([0, 3, 6, 10], rising, seqused_k=[3, 3, 9], leftpad_k=[5, -2, 1]) == [(3, 3, 4, 3), (6, 4, 9, 3)]


def test_right_lengths_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    for form in FORMS:
        for pairs in (MIXED, SMALL, ()):
            run(draw(9, form, pairs=pairs, used=("seqused_q", "seqused_k", "leftpad_k")))


def starts(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


@pytest.mark.parametrize(
    ("arrays", "lengths", "kind", "message"),
    [
        (PACKED, {}, InvalidArgument,
         "q has 3 dimensions, shape (10, 4, 8): 4 are needed, (batch, seqlen, num_heads, head_dim); pass q[None] for"),
        (PACKED, {}, InvalidArgument, "say where they start with cu_seqlens_q"),
        (PACKED, {"cu_seqlens_q": starts(0, 10)}, InvalidArgument,
         "k has 3 dimensions, shape (12, 2, 8): 4 are needed, (batch, seqlen, num_heads, head_dim); pass k[None] for"),
        (PACKED, {"cu_seqlens_q": starts(0, 10)}, InvalidArgument, "say where they start with cu_seqlens_k"),
        (DENSE, {"cu_seqlens_q": starts(0, 10), "cu_seqlens_k": starts(0, 12)}, InvalidArgument,
         "head_dim); leave cu_seqlens_q out for 3 sequences of 10 rows each, where seqused says how many"),
        ([x[:1] for x in DENSE], {"cu_seqlens_q": starts(0, 10), "cu_seqlens_k": starts(0, 12)}, InvalidArgument,
         "3 are needed with cu_seqlens_q, (total, num_heads, head_dim); pass q[0]"),
        (PACKED, {"cu_seqlens_q": starts(0, 10), "cu_seqlens_k": starts(0, 3, 12)}, InvalidArgument,
         "cu_seqlens_k is for a batch of 2 but cu_seqlens_q is for a batch of 1: they must be equal"),
        ([PACKED[0], *DENSE[1:]], {"cu_seqlens_q": starts(0, 10)}, InvalidArgument,
         "k has batch 3 but cu_seqlens_q is for a batch of 1: they must be equal"),
        (PACKED, {"cu_seqlens_q": starts(), "cu_seqlens_k": starts(0, 12)}, InvalidArgument,
         "cu_seqlens_q has shape (0,): (batch + 1,) is needed"),
        (PACKED, {"cu_seqlens_q": starts(0, 10)[None], "cu_seqlens_k": starts(0, 12)}, InvalidArgument,
         "cu_seqlens_q has shape (1, 2): (batch + 1,) is needed"),
        (PACKED, {"cu_seqlens_q": starts(0, 10) * 1.0, "cu_seqlens_k": starts(0, 12)}, InvalidType,
         "cu_seqlens_q has dtype float64: int32 or int64 is needed"),
        (PACKED, {"cu_seqlens_q": [0, 10], "cu_seqlens_k": starts(0, 12)}, InvalidType, "cu_seqlens_q is a list"),
        (PACKED, {"cu_seqlens_q": starts(0, 10), "cu_seqlens_k": starts(0, 12), "layout": "bhsd"}, InvalidArgument,
         "layout='bhsd' is not for packed sequences, whose arrays are (total, heads, head_dim): leave it out"),
        (PACKED, {"cu_seqlens_q": starts(0, 10), "cu_seqlens_k": starts(0, 12), "segment_ids": starts(0)},
         InvalidArgument, "segment_ids is given beside cu_seqlens, which say where sequences are already"),
        (DENSE, {"seqused_k": starts(1, 2)}, InvalidArgument,
         "seqused_k has shape (2,): (batch,) is needed, here (3,)"),
        (DENSE, {"segment_ids": np.zeros((3, 10), int)}, InvalidArgument,
         "segment_ids_k has shape (3, 10): (batch, seqlen_k) is needed, here (3, 12)"),
        (DENSE, {"segment_ids": (np.zeros((3, 10), int),)}, InvalidType,
         "segment_ids is a tuple of 1: an array, or a pair of them, is needed"),
    ],
)  # fmt: skip
def test_errors(arrays: list[np.ndarray], lengths: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fa2cupy.attention(*arrays, **lengths)
    assert message in str(caught.value)


def test_shapes_of_the_backward_follow() -> None:
    q, k, v = PACKED
    given = {name: np.array(value) for name, value in STARTS.items()}
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **given)
    with pytest.raises(InvalidArgument, match=r"lse has shape \(1, 4, 10\): \(4, 10\) is needed"):
        fa2cupy.attention_backward(out, q, k, v, out, lse[None], **given)
    with pytest.raises(InvalidArgument, match=r"dlse has shape \(10, 4\): lse's shape is needed, here \(4, 10\)"):
        fa2cupy.attention_backward(out, q, k, v, out, lse, dlse=lse.T.copy(), **given)
    with pytest.raises(InvalidArgument, match=r"dk has shape \(12, 4, 8\): \(12, 2, 8\) is needed"):
        fa2cupy.attention_backward(out, q, k, v, out, lse, dk=np.empty((12, 4, 8), np.float32), **given)
    assert as_float64(out).shape == (10, 4, 8)


# ----------------------------------------------------------------------------------------------------------------------
# What reaches a GPU


def gpu_case(form: str, used: tuple[str, ...] = ()) -> tuple[Case, list[Any], dict[str, Any]]:
    """Of fp16: the case, q, k, v, dout and the lengths on a GPU that is not there."""
    case = draw(11, form, used=used, dtype="float16", head_dim=8, head_dim_v=16)
    lengths = {name: tuple(map(to_cupy, x)) if isinstance(x, tuple) else to_cupy(x) for name, x in case.lengths.items()}
    return case, [to_cupy(x) for x in case.inputs], lengths


@pytest.mark.parametrize("form", FORMS)
def test_what_a_gpu_is_told(form: str, gpu: FakeGpu) -> None:
    """The front end's pointers, strides and shapes serve a computation with them alone."""
    case, (q, k, v, dout), lengths = gpu_case(form, ("seqused_q", "seqused_k", "leftpad_k"))
    window, dlse = (30, 4), np.random.default_rng(0).standard_normal(case.inputs.q.shape[:-1])
    dlse = np.ascontiguousarray(np.moveaxis(dlse, -1, -2), np.float32)
    out, lse = fa2cupy.attention(q, k, v, window_size=window, return_lse=True, **lengths)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, window_size=window, dlse=to_cupy(dlse), **lengths)
    results = dict(zip(("out", "lse", *NAMES), map(host_view, (out, lse, *gradients)), strict=True))
    expect_sequences(case.inputs, case.lengths, window=window, dlse=dlse, out=results["out"]).check(**results)
    assert gpu.last.problem.lengths is not None and gpu.last.problem.extra_arrays[-1] == "dlse"


def test_equal_shapes_of_lengths_are_one_signature(gpu: FakeGpu) -> None:
    """Whatever the lengths are: nobody reads them."""
    _, (q, k, v, _), lengths = gpu_case("packed", ("seqused_k",))
    for shift in range(3):
        fa2cupy.attention(q, k, v, **{name: to_cupy(host_view(x) + shift) for name, x in lengths.items()})
    assert len(gpu.plans) == 1 and len(gpu.launches) == 3
    fa2cupy.attention(q, k, v, **{name: x for name, x in lengths.items() if name != "seqused_k"})
    assert len(gpu.plans) == 2


def test_wide_lengths_are_converted_on_the_device(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (q, k, v, _), lengths = gpu_case("packed")
    copies = []

    def as_int32(array: Any) -> Any:
        copies.append(to_cupy(host_view(array).astype(np.int32)))
        return copies[-1]

    monkeypatch.setattr(CUPY, "as_int32", as_int32)
    wide = {name: to_cupy(host_view(x).astype(np.int64)) for name, x in lengths.items()}
    for _ in range(2):
        out = host_view(fa2cupy.attention(q, k, v, **wide))
        expect_sequences(case.inputs, case.lengths).check(out=out)
    assert len(copies) == 4 and len(gpu.plans) == 1
    assert gpu.last.pointers["cu_seqlens_k"] == copies[-1].data.ptr
    fa2cupy.attention(q, k, v, **lengths)
    assert len(copies) == 4 and len(gpu.plans) == 1
    gpu.capturing = True
    with pytest.raises(
        InvalidArgument, match=r"cu_seqlens_q must be copied because it is not int32, .*: pass an int32"
    ):
        fa2cupy.attention(q, k, v, out=to_cupy(out), lse_out=None, **wide)


def test_lengths_with_gaps_are_copied(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of longer rows, or rows shared by all: the kernels know no strides of these arrays."""
    case, (q, k, v, _), lengths = gpu_case("segments")
    ids = host_view(lengths["segment_ids"])
    longer = cupy_array((3, ids.shape[1] + 5), np.int32)
    host_view(longer)[:, : ids.shape[1]] = ids
    monkeypatch.setattr(CUPY, "contiguous", lambda array: to_cupy(host_view(array).copy()))
    out = host_view(fa2cupy.attention(q, k, v, segment_ids=longer[:, : ids.shape[1]]))
    expect_sequences(case.inputs, case.lengths).check(out=out)
    assert gpu.last.pointers["segment_ids_q"] != longer.data.ptr
    fa2cupy.attention(q, k, v, segment_ids=lengths["segment_ids"])
    assert gpu.last.pointers["segment_ids_k"] == lengths["segment_ids"].data.ptr


def test_pieces_of_packed_keys_are_merged() -> None:
    """Each sequence's keys in two pieces, by their starts: what ring attention does with packed sequences."""
    case = draw(8, "packed")
    q, k, v, _ = case.inputs
    first, last = case.lengths["cu_seqlens_k"][:-1], case.lengths["cu_seqlens_k"][1:]
    half = (last - first) // 2
    pieces = [
        fa2cupy.attention(q, k, v, return_lse=True, **case.lengths, **used)
        for used in ({"seqused_k": half}, {"leftpad_k": half})
    ]
    out, lse = fa2cupy.merge_attention(*zip(*pieces, strict=True))
    expect_sequences(case.inputs, case.lengths).check(out=out, lse=lse)


def test_lengths_on_a_gpu_are_found_wrong(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (q, k, v, _), lengths = gpu_case("packed")
    monkeypatch.setattr(CUPY, "to_host", host_view)
    fa2cupy.attention(q, k, v, **lengths)
    host_view(lengths["cu_seqlens_k"])[3] = 10**6
    fa2cupy.attention(q, k, v, **lengths)
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    with pytest.raises(InvalidArgument, match="cu_seqlens_k ends sequence 2 at 1000000"):  # of a prepared call
        fa2cupy.attention(q, k, v, **lengths)
    gpu.capturing = True
    with pytest.raises(
        InvalidArgument, match="FA2CUPY_CHECK=1 waits for cu_seqlens_q, which a CUDA graph capture cannot"
    ):
        fa2cupy.attention(q, k, v, **lengths)
    assert len(gpu.launches) == 2


def test_lengths_of_another_framework_or_device(gpu: FakeGpu) -> None:
    case, (q, k, v, _), lengths = gpu_case("packed")
    with pytest.raises(InvalidType, match=r"cu_seqlens_k is a numpy.ndarray but q is a cupy.ndarray"):
        fa2cupy.attention(q, k, v, **lengths | {"cu_seqlens_k": case.lengths["cu_seqlens_k"]})
    other = to_cupy(case.lengths["cu_seqlens_k"], 1)
    with pytest.raises(InvalidArgument, match="cu_seqlens_k is on cuda:1 but q is on cuda:0"):
        fa2cupy.attention(q, k, v, **lengths | {"cu_seqlens_k": other})
    with pytest.raises(InvalidArgument, match="out shares memory with cu_seqlens_q"):
        out = cupy_array((*q.shape[:2], 16), np.float16)
        starts = out.reshape(-1).view(np.int32)[: len(case.lengths["cu_seqlens_q"])]
        fa2cupy.attention(q, k, v, out=out, **lengths | {"cu_seqlens_q": starts})
