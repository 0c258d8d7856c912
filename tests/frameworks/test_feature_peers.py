"""The peers of the features' benchmark on the CPU: torch's own, and stand-ins for wheels, which compute the formula of
the arguments that they are given and refuse what the wheels do not know."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import feature_peers, features
from benchmarks.feature_cells import CELLS, DENSE, MODES, Cell, References, tiny
from fa2cupy.keywords import KEYWORDS

NAMES = ("vl_zero_c", "vl_mix_f", "vl_mix_c_gqa", "w1k_8k", "w512sym_8k", "w1k_8k_gqa", "keypad")
SCORES = ("softcap30", "alibi", "sink", "gptoss", "gemma2", "drop_c")


def formula(
    q: Any, k: Any, v: Any, causal: bool, window: tuple[int, int] = (-1, -1), starts: Any = None, used: Any = None,
    softcap: float = 0.0, changed: Callable[..., Any] | None = None, sinks: Any = None,
) -> Any:  # fmt: skip
    """(batch, seqlen, heads, head_dim), or packed; differentiable."""
    packed = q.ndim == 3
    q, k, v = (x[None] if packed else x for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    rows = torch.arange(q.shape[1])
    sequence = torch.bucketize(rows, starts[1:], right=True) if packed else torch.zeros_like(rows)
    i = rows - (starts[sequence] if packed else 0)
    far = i[:, None] - i[None]
    seen = (sequence[:, None] == sequence[None]).expand(q.shape[0], 1, -1, -1)
    left, right = window
    seen = seen & (far >= 0 if causal else True) & (far <= left if left >= 0 else True)
    seen = seen & (-far <= right if right >= 0 else True)
    if used is not None:
        seen = seen & (i < used[sequence] if packed else i < used[:, None, None, None])
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    s = softcap * torch.tanh(s / softcap) if softcap else s
    if changed is not None:
        s = changed(s, 0, torch.arange(q.shape[2])[:, None, None], i[:, None], i[None], None, None)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    p = s.softmax(-1)[..., : q.shape[1]]
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    return out[0] if packed else out


def fa3(q: Any, k: Any, v: Any, causal: bool = False, softcap: float = 0.0) -> Any:
    return formula(q, k, v, causal, softcap=softcap), None


def fa3_varlen(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_q: Any, max_k: Any, *,
    seqused_k: Any = None, causal: bool = False,
) -> Any:  # fmt: skip
    assert (q.ndim == 3) == (cu_seqlens_q is not None) == (max_q is not None) and cu_seqlens_q is cu_seqlens_k
    return formula(q, k, v, causal, starts=cu_seqlens_q, used=seqused_k)


def fa4(
    q: Any, k: Any, v: Any, *, causal: bool = False, window_size: Any = (None, None), softcap: float = 0.0,
    learnable_sink: Any = None, score_mod: Any = None, score_mod_bwd: Any = None,
) -> Any:  # fmt: skip
    window = tuple(-1 if w is None else w for w in window_size)
    assert (score_mod is None) == (score_mod_bwd is None)
    return formula(q, k, v, causal, window, softcap=softcap, changed=score_mod, sinks=learnable_sink), None


def fa4_varlen(
    q: Any, k: Any, v: Any, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Any = None, causal: bool = False,
) -> Any:  # fmt: skip
    longest = q.shape[1] if q.ndim == 4 else int(cu_seqlens_q.diff().max())
    assert max_seqlen_q == max_seqlen_k == longest and cu_seqlens_q is cu_seqlens_k
    return formula(q, k, v, causal, starts=cu_seqlens_q, used=seqused_k), None


def vllm_fa3(q: Any, k: Any, v: Any, *rest: Any) -> Any:
    assert len(rest) == 34, "the operator has 37 arguments"
    cu_q, cu_k, max_q, max_k, scale, causal, left, right = (rest[n] for n in (4, 5, 9, 10, 20, 21, 22, 23))
    assert cu_q is cu_k and max_q == max_k == 64 and scale == q.shape[-1] ** -0.5
    given = {n: rest[n] for n in range(34) if rest[n] is not None and n not in (4, 5, 9, 10, 20, 21, 22, 23)}
    assert given == {24: 0.0, 25: True, 27: 1, 29: 0, 31: 1, 32: 0}
    return [formula(q, k, v, causal, (left, right), cu_q)]


def fa2(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, dropout: float, causal: bool, debug: bool, *,
    window_size_left: int, window_size_right: int, seqused_k: Any = None,
) -> Any:  # fmt: skip
    assert ((dropout, debug) in ((0.0, False), (0.1, False)) and max_q == max_k and cu_q is cu_k) or torch.equal(
        cu_q, cu_k
    )
    return formula(q, k, v, causal, (window_size_left, window_size_right), cu_q, seqused_k), None


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    def module(name: str, **functions: Callable[..., Any]) -> None:
        made = ModuleType(name)
        made.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, made)

    module("fa3_fwd_interface", flash_attn_func=fa3, flash_attn_varlen_func=fa3_varlen)
    module("flash_attn", __path__=[])  # type: ignore[arg-type]
    module("flash_attn.cute", flash_attn_func=fa4, flash_attn_varlen_func=fa4_varlen)
    module("cutlass", Float32=torch.float32)
    exp2, same = torch.exp2, lambda function: function
    module("cutlass.cute", jit=same, math=SimpleNamespace(exp2=exp2), full_like=lambda x, value: torch.tensor(value))
    sys.modules["cutlass"].cute = sys.modules["cutlass.cute"]  # type: ignore[attr-defined]
    (tmp_path / "vllm_so").mkdir()
    (tmp_path / feature_peers.VLLM[0]).write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "_vllm_fa3_C", SimpleNamespace(fwd=vllm_fa3), raising=False)
    yield


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch.utils.flop_counter")  # which would not have what takes the operator's place
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fa2)


def refusal(peer: str, cell: Cell, mode: str) -> bool:
    """Who has no such thing."""
    windowed, scores = cell.window != (-1, -1), cell.group == "scores"
    return {
        "fa2": (cell.group == "keypad" and mode == "bwd") or (scores and not cell.dropout),
        "fa3": windowed or mode == "bwd" or (scores and not cell.softcap),
        "vfa3": cell.group != "window" or mode == "bwd",
        "fa4": cell.dropout > 0,
        "flex": cell.sinks or cell.dropout > 0,
        "cudnn": cell.group != "keypad" and not cell.dropout,
    }[peer]


@pytest.mark.parametrize("peer", ["fa2", "fa3", "vfa3", "fa4", "flex", "cudnn"])
@pytest.mark.parametrize("name", [*NAMES, *SCORES])
def test_a_peer_is_asked_for_what_the_cell_is(
    name: str, peer: str, wheels: None, flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if peer == "cudnn":  # its path through SDPA, computed by SDPA's formula
        monkeypatch.setitem(feature_peers._MAKERS, "cudnn", feature_peers._sdpa("MATH"))
    cell = tiny(CELLS[name])
    tensors = feature_peers.make_tensors(cell, "cpu")
    references = References(torch, cell, tensors.flat(), tensors.sinks)
    if peer == "flex":
        tensors = replace(tensors, q=tensors.q.detach(), k=tensors.k.detach(), v=tensors.v.detach())
    for mode in MODES if peer != "flex" else MODES[:1]:  # Flex has no backward on a CPU
        if refusal(peer, cell, mode):
            with pytest.raises(feature_peers.UnableError):
                feature_peers.make(peer, cell, tensors, mode)
            continue
        call = feature_peers.make(peer, cell, tensors, mode)
        for _ in range(2):  # again, as it is timed
            errors = references.errors(feature_peers.as_given(call(), tensors, mode), mode)
            assert all(error < (1e-5 if not cell.dropout else 1) for error in errors.values()), (mode, errors)


@pytest.mark.parametrize("name", [*NAMES, *SCORES, "eq1k_c"])
def test_ours_is_asked_for_what_the_cell_is(name: str) -> None:
    cell = tiny(CELLS[name])
    tensors = feature_peers.make_tensors(cell, "cpu")
    references = References(torch, cell, tensors.flat(), tensors.sinks)
    needed = "seqused_k" if cell.used else "cu_seqlens_q" if cell.lengths else "window_size"
    needed = "sinks" if cell.group == "scores" else needed
    for who in ("fa2cupy", *([DENSE] if cell.group == "equal" else [])):
        for mode in MODES:
            if who == "fa2cupy" and KEYWORDS[needed].since is None:
                with pytest.raises(feature_peers.MissingError, match=needed):
                    feature_peers.make(who, cell, tensors, mode)
                continue
            found = feature_peers.as_given(feature_peers.make(who, cell, tensors, mode)(), tensors, mode)
            errors = references.errors(found, mode)
            assert all((0.05 if cell.dropout else 0) < e < (1 if cell.dropout else 1e-5) for e in errors.values()), (
                errors
            )


def test_who_is_absent_is_named() -> None:
    absent = feature_peers.probe(feature_peers.OTHERS)
    assert {"fa3", "vfa3", "fa4"} <= set(absent) and not {"fa2", "eff", "cudnn"} & set(absent)
    assert "_vllm_fa3_C" in absent["vfa3"]


def test_measured_with_torch(wheels: None, flash: None) -> None:
    cell = tiny(CELLS["w1k_8k"])
    found = features.measure(cell, MODES, ["fa2", "fa3", "fa4"], features.WallClock(), "cpu", 1, 0.0)
    assert tuple(found) == MODES and all(set(row.times) == {"fa2cupy", "fa2", "fa4"} for row in found.values())
    assert all(not row.wrong and not row.failed and set(row.refused) == {"fa3"} for row in found.values())
