"""What dropout drops: Philox as published, the same mask wherever it is drawn, and the statistics of it.

Every statistic has a p-value, and a test the least of all its p-values times their number, which is above 1e-4: seeds
are fixed, so that a test passes always or never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fa2cupy
from fa2cupy import philox
from fa2cupy.errors import InvalidArgument, InvalidType
from tests.reference import make_inputs

pytestmark = pytest.mark.filterwarnings("error")

SEED = (0x243F6A8885A308D3, 0x13198A2E03707344)
LOW = 0xFFFFFFFF


def words_of(*numbers: int) -> tuple[Any, ...]:
    return tuple(np.array([number], np.uint32) for number in numbers)


# Of Random123's kat_vectors: rounds, counter, key, result.
PUBLISHED = [
    (7, "00000000 00000000", "00000000", "257a3673 cd26be2a"),
    (7, "ffffffff ffffffff", "ffffffff", "ab302c4d 3dc9d239"),
    (7, "243f6a88 85a308d3", "13198a2e", "bedbbe6b e4c770b3"),
    (10, "00000000 00000000", "00000000", "ff1dae59 6cd10df2"),
    (10, "ffffffff ffffffff", "ffffffff", "2c3f628b ab4fd7ad"),
    (10, "243f6a88 85a308d3", "13198a2e", "dd7ce038 f62a4c12"),
    (10, "00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (10, "ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (10, "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "result"), PUBLISHED, ids=lambda x: str(x)[:8])
def test_philox_is_the_published_one(rounds: int, counter: str, key: str, result: str) -> None:
    start, keys, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, result))
    if len(start) == 2:
        found = philox.philox2x32(*words_of(*start), keys[0], rounds)
    else:
        found = philox.philox4x32(words_of(*start), (keys[0], keys[1]), rounds)
    assert [int(word[0]) for word in found] == expected


def is_kept(seed: int, offset: int, b: int, h: int, i: int, j: int, p: float) -> bool:
    """One element by the definition, in Python's numbers."""
    c = [offset & LOW, offset >> 32, b & LOW, h & LOW]
    k = [seed & LOW, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & LOW, first >> 32 ^ c[3] ^ k[1], first & LOW]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    x, y = (i // 16 * 8 + i % 8) ^ c[0], (j // 16 * 8 + j % 8) ^ c[1]
    for number in range(7):
        product = 0xD256D193 * x
        x, y = product >> 32 ^ (0x9E3779B9 * (number + 1) & LOW) ^ y, product & LOW
    word = x if i % 16 < 8 else y
    bits = word >> (0 if j % 16 < 8 else 16) & 0x7FFF
    return bits >= round(p * 2**15)


@pytest.mark.parametrize("p", [0.1, 0.5, 2**-15, 1 - 2**-15])
def test_masks_are_as_defined(p: float) -> None:
    shape = 3, 2, 21, 37
    mask = fa2cupy.dropout_mask(*shape, p, SEED)
    assert mask.dtype == np.bool_ and mask.shape == shape
    for place in np.ndindex(shape):
        assert mask[place] == is_kept(*SEED, *place, p)


def test_masks_never_change() -> None:
    """Within a major version: models are trained on with the masks that they were trained with."""
    digest = hashlib.sha256(fa2cupy.dropout_mask(2, 3, 65, 130, 0.1, SEED).tobytes()).hexdigest()
    assert digest == "10f1357d0bf33e25652cf4d11197df2e5d03844f87c0ca11114ea84282aa4d28"


def test_a_part_of_a_mask_is_the_mask_of_the_part() -> None:
    whole = fa2cupy.dropout_mask(4, 6, 70, 90, 0.3, SEED)
    assert (fa2cupy.dropout_mask(2, 3, 33, 41, 0.3, SEED) == whole[:2, :3, :33, :41]).all()
    for empty in ((0, 6, 7, 9), (4, 0, 7, 9), (4, 6, 0, 9), (4, 6, 7, 0)):
        assert fa2cupy.dropout_mask(*empty, 0.3, SEED).shape == empty
    assert fa2cupy.dropout_mask(1, 2, 3, 4, 0.0, SEED).all() and fa2cupy.dropout_mask(1, 2, 3, 4, 1e-6, SEED).all()


@pytest.mark.parametrize(("queries", "keys"), [((0, 16), (0, 16)), ((5, 6), (7, 40)), ((17, 40), (31, 33))])
def test_a_tile_of_a_mask(queries: tuple[int, int], keys: tuple[int, int]) -> None:
    whole = fa2cupy.dropout_mask(2, 3, 40, 40, 0.3, SEED)
    tweaks = philox.tweaks(np.array(SEED, np.uint64), np.arange(2), np.arange(3))
    assert (philox.kept(tweaks, slice(*queries), slice(*keys), 0.3) == whole[..., slice(*queries), slice(*keys)]).all()


def test_shards_are_parts_of_the_whole() -> None:
    """int64 (4,): seed, offset, and the first sequence and head of a shard."""
    q, k, v, dout = make_inputs(1, 20, 30, dtype="float32", batch=4, heads=(6, 3), head_dim=8)
    seed, offset = np.array(SEED, np.uint64).view(np.int64)
    options: dict[str, Any] = {"dropout_p": 0.4, "causal": True}
    out, lse = fa2cupy.attention(q, k, v, dropout_seed=SEED, return_lse=True, **options)
    gradients = fa2cupy.attention_backward(dout, q, k, v, out, lse, dropout_seed=SEED, **options)
    mask = fa2cupy.dropout_mask(4, 6, 20, 30, 0.4, SEED)
    for b, h in ((0, 0), (2, 0), (0, 2), (2, 4)):
        own = np.array([seed, offset, b, h])
        assert (fa2cupy.dropout_mask(2, 2, 20, 30, 0.4, own) == mask[b : b + 2, h : h + 2]).all()
        part = slice(b, b + 2), slice(None), slice(h, h + 2)
        group = slice(b, b + 2), slice(None), slice(h // 2, h // 2 + 1)
        shard = q[part], k[group], v[group]
        shard_out, shard_lse = fa2cupy.attention(*shard, dropout_seed=own, return_lse=True, **options)
        assert (shard_out == out[part]).all()
        found = fa2cupy.attention_backward(dout[part], *shard, shard_out, shard_lse, dropout_seed=own, **options)
        for x, whole, where in zip(found, gradients, (part, group, group), strict=True):
            assert (x == whole[where]).all()
    wrapped = np.array([seed, offset, -1, 0])
    assert (fa2cupy.dropout_mask(2, 1, 20, 30, 0.4, wrapped)[1] == mask[0, :1]).all()


def test_a_seed_has_many_forms() -> None:
    q, k, v, _ = make_inputs(1, 20, 30, dtype="float32", heads=(2, 1), head_dim=8)

    def of(seed: Any) -> np.ndarray:
        out: np.ndarray = fa2cupy.attention(q, k, v, dropout_p=0.5, dropout_seed=seed)
        return out

    words = np.array([5, 2**63 + 1], np.uint64)
    forms = [words, words.view(np.int64), words.view(np.uint32), [5, 2**63 + 1], (np.int8(5), 1 - 2**63)]
    for seed in forms:
        assert (of(seed) == of((5, 2**63 + 1))).all()
    assert (of(np.repeat(words, 2)[::2]) == of(words)).all()  # with a gap
    assert (of(np.array([7, 9], np.uint32)) == of((7 + 9 * 2**32, 0))).all()
    assert (of((-1, -2)) == of((2**64 - 1, 2**64 - 2))).all()
    others = [(5, 2**63), (4, 2**63 + 1), (5 + 2**32, 2**63 + 1), (5, 1)]
    assert all((of(seed) != of(words)).any() for seed in others)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((-1, 1, 1, 1, 0.1, SEED), InvalidArgument, "batch=-1 is not supported: 0 or more is needed"),
        ((1, 1.0, 1, 1, 0.1, SEED), InvalidType, "num_heads=1.0 is a float: an int is needed"),
        ((1, 1, True, 1, 0.1, SEED), InvalidType, "seqlen_q=True is a bool"),
        ((1, 1, 1, 1, 1.0, SEED), InvalidArgument, "dropout_p=1.0 is not supported"),
        ((1, 1, 1, 1, 0.1, 5), InvalidType, "dropout_seed=5 is a int"),
        ((1, 1, 1, 1, 0.1, None), InvalidType, "dropout_seed=None is a NoneType"),
    ],
)
def test_masks_that_are_none(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        fa2cupy.dropout_mask(*arguments)
    assert message in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


PROBABILITIES = (0.1, 0.5, 0.9)
STEPS = {p: round(p * 2**15) / 2**15 for p in (*PROBABILITIES, 2**-10)}


@pytest.fixture(scope="module")
def masks() -> dict[float, np.ndarray]:
    """By probability: 2 sequences, 4 heads, 512 x 384."""
    return {p: fa2cupy.dropout_mask(2, 4, 512, 384, p, (11, 3)) for p in STEPS}


def assert_likely(p_values: Any) -> None:
    """After Bonferroni."""
    p_values = np.ravel(p_values)
    assert np.isfinite(p_values).all()
    assert p_values.min() * p_values.size > 1e-4, f"{p_values.min():.3g} is the least of {p_values.size}"


def of_counts(counts: Any, n: int, p: float) -> Any:
    """Two-sided p-values of binomial counts."""
    return np.minimum(1, 2 * np.minimum(stats.binom.cdf(counts, n, p), stats.binom.sf(counts - 1, n, p)))


def of_deviates(z: Any) -> Any:
    return 2 * stats.norm.sf(abs(z))


@pytest.mark.parametrize("p", STEPS)
@pytest.mark.parametrize(
    "axes", [(3,), (2,), (2, 3), (0, 1, 2, 3), (0, 1)], ids=["row", "column", "head", "all", "place"]
)
def test_means(masks: Any, p: float, axes: tuple[int, ...]) -> None:
    dropped = ~masks[p]
    n = int(np.prod([dropped.shape[axis] for axis in axes]))
    assert_likely(of_counts(dropped.sum(axes), n, STEPS[p]))


@pytest.mark.parametrize("p", STEPS)
def test_counts_are_as_spread_as_chance_has_them(masks: Any, p: float) -> None:
    """A generator that is too even passes every test of a mean: chi-square of rows, of columns."""
    dropped, q = ~masks[p], STEPS[p]
    for axis in (2, 3):
        n = dropped.shape[axis]
        statistic = np.square(dropped.sum(axis) - n * q).sum() / (n * q * (1 - q))
        freedom = dropped.size // n
        assert_likely([stats.chi2.sf(statistic, freedom), stats.chi2.cdf(statistic, freedom)])


# By name: four elements, and where they begin: of every so many rows, and columns, the first ones. None counts twice.
_NEIGHBOURS = {
    "of a call of Philox": (((0, 0), (0, 8), (8, 0), (8, 8)), (16, 8), (16, 8)),
    "beside each other": (((0, 0), (0, 1), (1, 0), (1, 1)), (2, 1), (2, 1)),
    "in a row": (((0, 0), (0, 1), (0, 2), (0, 3)), (1, 1), (4, 1)),
    "in a column": (((0, 0), (1, 0), (2, 0), (3, 0)), (4, 1), (1, 1)),
    "a tile apart": (((0, 0), (0, 128), (64, 0), (64, 128)), (128, 64), (256, 128)),
}


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("name", _NEIGHBOURS)
def test_neighbours_are_independent(masks: Any, name: str, p: float) -> None:
    """Chi-square of the 16 patterns of four elements."""
    dropped = ~masks[p]
    shifts, *starts = _NEIGHBOURS[name]
    begins = []
    for axis, (period, first) in enumerate(starts):
        n = np.arange(dropped.shape[2 + axis] - max(shift[axis] for shift in shifts))
        begins.append(n[n % period < first])
    rows, columns = begins
    parts = [dropped[:, :, rows[:, None] + i, columns + j].astype(int) << bit for bit, (i, j) in enumerate(shifts)]
    counts = np.bincount(np.ravel(sum(parts)), minlength=16)
    ones = np.array([bin(pattern).count("1") for pattern in range(16)])
    expected = counts.sum() * STEPS[p] ** ones * (1 - STEPS[p]) ** (4 - ones)
    assert_likely(stats.chisquare(counts, expected).pvalue)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_no_lag_correlates(masks: Any, p: float) -> None:
    """All two-dimensional lags of every head, by the Fourier transform of the padded mask."""
    x = (~masks[p][0] - STEPS[p]) / np.sqrt(STEPS[p] * (1 - STEPS[p]))
    heads, rows, columns = x.shape
    spectrum = np.fft.rfft2(x, (2 * rows, 2 * columns))
    products = np.fft.irfft2(abs(spectrum) ** 2)
    i, j = np.arange(rows // 2)[:, None], np.arange(columns // 2)
    z = products[:, : rows // 2, : columns // 2] / np.sqrt((rows - i) * (columns - j))
    assert_likely(of_deviates(z.reshape(heads, -1)[:, 1:]))


def _pairs() -> Iterator[tuple[str, np.ndarray]]:
    """Masks that have all but one number in common."""
    shape = 1, 1, 256, 256
    yield "heads", fa2cupy.dropout_mask(1, 24, 256, 256, 0.5, (11, 3))[0]
    yield "sequences", fa2cupy.dropout_mask(24, 1, 256, 256, 0.5, (11, 3))[:, 0]
    yield "seeds", np.stack([fa2cupy.dropout_mask(*shape, 0.5, (seed, 3))[0, 0] for seed in range(24)])
    yield "offsets", np.stack([fa2cupy.dropout_mask(*shape, 0.5, (11, offset))[0, 0] for offset in range(24)])
    bits = np.stack([fa2cupy.dropout_mask(*shape, 0.5, (1 << bit, 0))[0, 0] for bit in range(0, 64, 3)])
    yield "bits of the seed", bits


@pytest.mark.parametrize("name", ["heads", "sequences", "seeds", "offsets", "bits of the seed"])
def test_masks_are_independent_of_each_other(name: str) -> None:
    """Every pair of masks, and of masks shifted against each other."""
    x = 2.0 * dict(_pairs())[name] - 1
    flat = x.reshape(len(x), -1)
    upper = np.triu_indices(len(x), 1)
    assert_likely(of_deviates((flat @ flat.T)[upper] / np.sqrt(flat.shape[1])))
    spectra = np.fft.rfft2(x[:8])
    for first in range(4):
        crossed = np.fft.irfft2(spectra[first] * spectra[first + 4].conj())
        assert_likely(of_deviates(crossed / np.sqrt(flat.shape[1])))


def test_the_output_is_right_on_average() -> None:
    """Over 2,000 masks, out and the gradient of v: those without dropout, since p is what it is rounded to. lse knows
    nothing of them.
    """
    one = make_inputs(1, 12, 20, dtype="float64", batch=1, heads=(2, 1), head_dim=8)
    q, k, v, dout = (np.broadcast_to(x, (2000, *x.shape[1:])) for x in one)  # sequences that differ by number alone
    plain, lse = fa2cupy.attention(*one[:3], causal=True, return_lse=True)
    _, _, plain_dv = fa2cupy.attention_backward(one.dout, *one[:3], plain, lse, causal=True)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.3, "dropout_seed": SEED}
    out, same = fa2cupy.attention(q, k, v, return_lse=True, **options)
    assert (same == lse).all()
    _, _, dv = fa2cupy.attention_backward(dout, q, k, v, out, same, **options)
    for found, exact in ((out, plain), (dv, plain_dv)):
        spread = found.std(0) / np.sqrt(len(found))
        assert_likely(of_deviates((found.mean(0) - exact[0]) / spread))


def test_every_bit_of_the_fifteen_counts() -> None:
    """Thresholds one step apart drop one in 32,768 more."""
    seeds = [(seed, 0) for seed in range(8)]
    for threshold in (1, 2, 16384, 32767):
        below, above = (
            sum(int((~fa2cupy.dropout_mask(1, 1, 512, 512, t / 2**15, seed)).sum()) for seed in seeds)
            for t in (threshold - 1, threshold)
        )
        assert_likely(of_counts(np.array([above - below]), 8 * 512 * 512, 2**-15))
