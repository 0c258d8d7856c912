"""transformers' models on our kernels, tiny and random, against its own eager attention.

Which kernels ran is counted at every step, so that a fallback cannot pass for us.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils

import fa2cupy
from fa2cupy import attention
from fa2cupy.errors import InvalidArgument, MissingDependency, NotTaken

transformers = pytest.importorskip("transformers")

from transformers import masking_utils as hf  # noqa: E402
from transformers.integrations import sdpa_attention  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from fa2cupy.transformers import layer, masks, probe, register  # noqa: E402
from tests.frameworks.transformers_models import (  # noqa: E402
    DECODERS,
    ENCODERS,
    LAYERS,
    SCORED,
    WINDOW,
    config,
    made,
    result_of,
)

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SEQLEN = 12


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    """The same model with eager attention and with ours, without dropout."""
    register()
    return made(name, "eager"), made(name, "fa2cupy")


def lengths_as_mask(side: str) -> torch.Tensor:
    """12, 8 and 5 tokens of 12."""
    kept = torch.arange(SEQLEN)[None] < torch.tensor([SEQLEN, 8, 5])[:, None]
    return (kept if side == "right" else kept.flip(1)).long()


IDS = torch.randint(3, 64, (3, SEQLEN), generator=torch.Generator().manual_seed(1))
LEFT, RIGHT = lengths_as_mask("left"), lengths_as_mask("right")
POSITIONS = torch.cat([torch.arange(n) for n in (6, 1, 5)])[None]
STARTS = torch.tensor([0, 6, 7, 12], dtype=torch.int32)


@pytest.fixture(autouse=True)
def from_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FA2CUPY_STRICT", raising=False)
    register()
    fa2cupy.report(reset=True)
    yield
    register()


def counted() -> dict[str, int]:
    """Calls by kernel since the last question."""
    rows = fa2cupy.report(reset=True)
    assert {row.door for row in rows} <= {"transformers"}
    return {row.kernel: sum(r.calls for r in rows if r.kernel == row.kernel) for row in rows}


def output(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return result_of(model, **inputs)


def same(name: str, tokens: torch.Tensor | None = None, **inputs: Any) -> None:
    """Our model's output is eager's where there are tokens, and every layer ran on our kernels."""
    eager, ours = pair(name)
    wanted = output(eager, **{k: x for k, x in inputs.items() if not k.startswith(("cu_seq", "max_length"))})
    got = output(ours, **inputs)
    assert counted() == {"fa2cupy": LAYERS}
    kept = slice(None) if tokens is None else tokens.bool()
    torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=2e-6)
    assert got.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("name", [*DECODERS, *SCORED, "phimoe", *ENCODERS])
def test_full_and_padded(name: str) -> None:
    same(name, input_ids=IDS)
    same(name, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    for mask in (LEFT, RIGHT):
        same(name, mask, input_ids=IDS, attention_mask=mask)


@pytest.mark.parametrize("name", [*DECODERS, "gemma2"])
def test_packed(name: str) -> None:
    """Found in position_ids; said by DataCollatorWithFlattening's keywords; two rows, each packed in its own way."""
    row = {"input_ids": IDS[:1], "position_ids": POSITIONS, "use_cache": False}
    same(name, **row)
    starts = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 6, "max_length_k": 6}
    same(name, **row, **starts)
    rows = torch.cat([POSITIONS, torch.arange(SEQLEN)[None] % 4])
    same(name, input_ids=IDS[:2], position_ids=rows, use_cache=False)


def test_the_collator_of_packed_sequences() -> None:
    """transformers' own; as its Trainer calls a model, with labels."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    batch = collator([{"input_ids": row.tolist()} for row in (IDS[0, :5], IDS[1, :1], IDS[2, :7])])
    assert "cu_seq_lens_q" in batch and batch["input_ids"].shape == (1, 13)
    eager, ours = pair("qwen3")
    with torch.no_grad():
        got = ours(**batch, use_cache=False).loss
        wanted = eager(**{k: batch[k] for k in ("input_ids", "labels", "position_ids")}, use_cache=False).loss
    assert counted() == {"fa2cupy": LAYERS}
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["mistral", "gpt-oss"])
def test_packed_is_each_sequence_by_itself(name: str) -> None:
    """Not only what eager's mask of position_ids says, which GPT-OSS does not show to its masks."""
    eager, ours = pair(name)
    starts = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS} if name == "gpt-oss" else {}
    whole = output(ours, input_ids=IDS[:1], position_ids=POSITIONS, use_cache=False, **starts)[0]
    assert counted() == {"fa2cupy": LAYERS}
    parts = [output(eager, input_ids=IDS[:1, a:b], use_cache=False)[0] for a, b in ((0, 6), (6, 7), (7, 12))]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=2e-6)


def test_cross_attention() -> None:
    eager, ours = pair("whisper")
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2))
    inputs = {"input_features": features, "decoder_input_ids": IDS[:2, :9]}
    torch.testing.assert_close(output(ours, **inputs), output(eager, **inputs), rtol=1e-4, atol=2e-6)
    assert counted() == {"fa2cupy": 3 * LAYERS}
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(features, **options), eager.generate(features, **options))
    assert set(counted()) == {"fa2cupy"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_cross_attention_to_padding(side: str) -> None:
    """Fewer queries than keys, keys padded on either side, queries on the right."""
    eager, ours = pair("bart")
    kept = LEFT if side == "left" else RIGHT
    queries = RIGHT[:, :9]
    inputs = {
        "input_ids": IDS, "attention_mask": kept, "decoder_input_ids": IDS[:, :9].flip(1),
        "decoder_attention_mask": queries,
    }  # fmt: skip
    got, wanted = (output(model, **inputs)[queries.bool()] for model in (ours, eager))
    assert counted() == {"fa2cupy": 3 * LAYERS}
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    got, wanted = (model.generate(IDS, attention_mask=kept, **options) for model in (ours, eager))
    assert torch.equal(got, wanted)
    assert set(counted()) == {"fa2cupy"}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [*DECODERS, *SCORED])
def test_generate(name: str, cache: str | None) -> None:
    """Without padding and with it on the left; windows slide."""
    assert WINDOW < SEQLEN
    eager, ours = pair(name)
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "cache_implementation": cache}
    if cache:
        options["disable_compile"] = True
    for mask in (None, LEFT):
        wanted = eager.generate(IDS, attention_mask=mask, **options)
        assert torch.equal(ours.generate(IDS, attention_mask=mask, **options), wanted)
        assert counted() == {"fa2cupy": 7 * LAYERS}


def test_generate_with_beams_and_with_chunks() -> None:
    """Several tokens at once behind a cache, which is where causal alignments differ."""
    eager, ours = pair("mistral")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    for more in ({"num_beams": 3}, {"prefill_chunk_size": 5}):
        wanted = eager.generate(IDS, attention_mask=LEFT, **options, **more)
        assert torch.equal(ours.generate(IDS, attention_mask=LEFT, **options, **more), wanted)
        assert set(counted()) == {"fa2cupy"}


@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_generate_on_with_a_cache(name: str) -> None:
    """A second turn of a chat: padding in front, several new tokens."""
    mask = torch.cat([LEFT, torch.ones(3, 4, dtype=torch.long)], 1)
    more = torch.cat([IDS, IDS[:, :4] + 1], 1)
    results = []
    for model in pair(name):
        with torch.no_grad():
            cache = model(IDS, attention_mask=LEFT, use_cache=True).past_key_values
            results.append(model(more[:, SEQLEN:], attention_mask=mask, past_key_values=cache).logits)
    assert counted() == {"fa2cupy": 2 * LAYERS}
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=2e-6)


def gradients(model: Any, name: str, labels: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if name in ENCODERS:
        out = model(**inputs).last_hidden_state[labels >= 0]
        (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
    else:
        model(**inputs, labels=labels).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in (*DECODERS, *SCORED, *ENCODERS) for kind in ("full", "left", "right")]
    + [(name, "packed") for name in (*DECODERS, "gemma2")],  # transformers packs causal sequences alone
)
def test_gradients(name: str, kind: str) -> None:
    mask = {"left": LEFT, "right": RIGHT}.get(kind)
    ids = IDS[:1] if kind == "packed" else IDS
    labels = ids if mask is None else ids.masked_fill((mask == 0) | (mask.cumsum(1) < 2), -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "packed":
        inputs = {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False}
    eager, ours = pair(name)
    for model in (eager, ours):
        model.train()
    try:
        wanted, got = gradients(eager, name, labels, **inputs), gradients(ours, name, labels, **inputs)
    finally:
        for model in (eager, ours):
            model.eval()
    assert counted() == {"fa2cupy": LAYERS}
    assert set(got) == set(wanted) and len(got) > 10
    for parameter, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-5 * scale + 1e-8)


def of_an_assertion(event: Any) -> bool:
    """On the CPU an assertion on the device is an `item`."""
    while event is not None and event.name != "fa2cupy::asserted":
        event = event.cpu_parent
    return event is not None


def test_the_lengths_are_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """By FA2CUPY_CHECK: no token in a row, none yet in a chunk of a prompt, empty sequences behind the packed ones."""
    monkeypatch.setenv("FA2CUPY_CHECK", "1")
    _, ours = pair("mistral")
    mask = LEFT.clone()
    mask[1] = 0
    for wait in (True, False):
        register(wait=wait)
        assert output(ours, input_ids=IDS, attention_mask=mask).isfinite().all()
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            ours.generate(IDS, attention_mask=LEFT, max_new_tokens=3, do_sample=False, prefill_chunk_size=4, **cache)
        output(ours, input_ids=IDS[:1], position_ids=POSITIONS, use_cache=False)
    assert set(counted()) == {"fa2cupy"}


WAITS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


@pytest.mark.parametrize("kind", ["left", "packed", "static"])
def test_nothing_waits(kind: str) -> None:
    """With wait=False a forward has no operation for which a GPU would be waited for, nor has a layer ever."""
    _, ours = pair("mistral")

    def waits(wait: bool) -> set[str]:
        register(wait=wait)
        if kind == "packed":  # transformers itself waits, to see whether sequences are packed
            inside = ours.model.layers
            inputs = {"input_ids": IDS[:1], "position_ids": POSITIONS, "use_cache": False}
        elif kind == "left":
            inside = [ours] if not wait else ours.model.layers
            inputs = {"input_ids": IDS, "attention_mask": LEFT, "use_cache": False}
        else:
            inside = ours.model.layers
            cache = transformers.StaticCache(config=ours.config, max_cache_len=20)
            output(ours, input_ids=IDS, attention_mask=LEFT, past_key_values=cache)
            mask = torch.cat([LEFT, torch.ones(3, 1, dtype=torch.long)], 1)
            inputs = {"input_ids": IDS[:, :1], "attention_mask": mask, "past_key_values": cache}
        names: set[str] = set()
        running: list[Any] = []

        def before(*_: Any) -> None:
            running.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]))
            running[-1].__enter__()

        def after(*_: Any) -> None:
            running[-1].__exit__(None, None, None)
            names.update(event.name for event in running.pop().events() if not of_an_assertion(event))

        hooks = [h for m in inside for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
        try:
            output(ours, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
        assert "aten::linear" in names
        return names & WAITS

    assert waits(True) == waits(False) == set()
    assert set(counted()) == {"fa2cupy"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).nonzero()
        torch.ones(1).item()
    assert {event.name for event in profile.events()} >= {"aten::item", "aten::nonzero"}


def test_checkpointed_gradients() -> None:
    eager, ours = pair("llama")
    labels = IDS.masked_fill(LEFT.cumsum(1) < 2, -100)
    wanted = gradients(eager, "llama", labels, input_ids=IDS, attention_mask=LEFT)
    ours.gradient_checkpointing_enable()
    ours.train()
    try:
        got = gradients(ours, "llama", labels, input_ids=IDS, attention_mask=LEFT)
    finally:
        ours.eval()
        ours.gradient_checkpointing_disable()
    assert counted() == {"fa2cupy": 2 * LAYERS}
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "plain"), ("gemma3", "left"), ("gemma3", "packed"), ("modernbert", "left"), ("gemma2", "left")],
)
def test_compiled(name: str, kind: str) -> None:
    """One graph, forward and backward; counted once a layer, when it is traced."""
    torch.compiler.reset()
    eager, ours = pair(name)
    inputs = {
        "plain": {"input_ids": IDS},
        "left": {"input_ids": IDS, "attention_mask": LEFT},
        "packed": {"input_ids": IDS[:1], "position_ids": POSITIONS, "use_cache": False},
    }[kind]
    tokens = LEFT.bool() if kind == "left" else slice(None)
    results = []
    for model in (eager, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        out = result_of(model, **inputs)
        weight = model.get_input_embeddings().weight
        results.append((out[tokens], *torch.autograd.grad(out[tokens].square().mean(), [weight])))
    assert counted() == {"fa2cupy": LAYERS}
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_compiled_with_other_lengths() -> None:
    """Dynamic shapes: no graph for each length, and masks are data."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    function = sliding_window_causal_mask_function(WINDOW)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: torch.Tensor) -> Any:
        length = q.shape[2]
        mask = masks.mask(3, length, length, mask_function=function, attention_mask=tokens, local_size=WINDOW)
        return layer.attention_layer(Layer(), q, k, v, mask)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 9, 7):
        tokens = LEFT[:, -length:].bool().clone()
        q, k, v = heads(length, length, batch=3)
        seen = hf.sdpa_mask(3, length, length, mask_function=function, attention_mask=tokens)
        torch.testing.assert_close(compiled(q, k, v, tokens)[tokens], by_formula(q, k, v, seen)[tokens])
    assert graphs["unique_graphs"] == 1
    assert set(counted()) == {"fa2cupy"}


def test_compiled_generation() -> None:
    """Static caches as transformers compiles them: steps of one token in one graph."""
    from transformers import CompileConfig

    torch.compiler.reset()
    eager, ours = pair("gemma3")
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    wanted = eager.generate(IDS, attention_mask=LEFT, **options)
    got = ours.generate(IDS, attention_mask=LEFT, cache_implementation="static", compile_config=how, **options)
    assert torch.equal(got, wanted)
    calls = counted()
    assert set(calls) == {"fa2cupy"} and calls["fa2cupy"] < 7 * LAYERS  # traced, not called, for some of the steps


@pytest.mark.parametrize(("name", "feature"), [("gemma2", "softcap"), ("gpt-oss", "sinks")])
def test_scores_count(name: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them these models' outputs are others; and on the way to SDPA, which has none, they are not dropped."""
    _, ours = pair(name)
    whole = output(ours, input_ids=IDS)
    with monkeypatch.context() as patch:
        patch.setattr(layer, "attention", lambda *arrays, **keywords: attention(*arrays, **{**keywords, feature: None}))
        without = output(ours, input_ids=IDS)
    assert not torch.allclose(whole, without, rtol=1e-4, atol=2e-6)
    gaps = LEFT.clone()
    gaps[0, 3] = 0
    with pytest.raises(InvalidArgument, match=f"{feature}.*not supported where attention goes to torch's SDPA"):
        output(ours, input_ids=IDS, attention_mask=gaps)


class Dropped:
    """nn.functional.dropout of eager's P: by numbers from torch's generator, as our layers draw them."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, p: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
        if not training or not probability:
            return p
        self.calls += 1
        seed = torch.randint(2**63 - 1, (2,))
        kept = fa2cupy.dropout_mask(*p.shape, probability, seed, like=p)
        return p * kept / (1 - round(probability * 2**15) / 2**15)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2", "bert"])
def test_dropout_of_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training: loss and gradients are eager's with the same P dropped, checkpointed too; without it nothing is."""
    dropped = Dropped()
    monkeypatch.setattr(
        torch.nn.functional, "dropout", lambda x, p=0.5, training=True, inplace=False: dropped(x, p, training)
    )
    models = [made(name, implementation) for implementation in ("eager", "fa2cupy", "fa2cupy")]
    for model in models:
        for module in model.modules():
            for attribute in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, attribute, None), float) and "Attention" in type(module).__name__:
                    setattr(module, attribute, 0.25)
            if "SelfAttention" in type(module).__name__:
                module.dropout = torch.nn.Dropout(0.25)
        model.train()
    models[2].gradient_checkpointing_enable()
    labels = IDS.masked_fill(LEFT.cumsum(1) < 2, -100)
    results = []
    for model in models:
        torch.manual_seed(5)
        results.append(gradients(model, name, labels, input_ids=IDS, attention_mask=LEFT))
    assert dropped.calls == LAYERS
    assert counted() == {"fa2cupy": 3 * LAYERS}
    for found in results[1:]:
        assert set(found) == set(results[0])
        for parameter, wanted in results[0].items():
            torch.testing.assert_close(
                found[parameter], wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-8
            )
    model = models[1].eval()
    assert torch.equal(output(model, input_ids=IDS), output(model, input_ids=IDS))


def test_sinks_in_other_dtypes() -> None:
    """Parameters in another 16-bit type than the query's, or beside float64."""
    q, k, v = heads()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    for dtype, other, tolerance in (
        (torch.float64, torch.float32, 1e-6), (torch.float16, torch.bfloat16, 3e-3),
        (torch.bfloat16, torch.float32, 2e-2),
    ):  # fmt: skip
        query, key, value = (x.to(dtype) for x in (q, k, v))
        found, _ = layer.attention_layer(Layer(), query, key, value, None, s_aux=sinks.to(other), softcap=2.0)
        arrays = (x.transpose(1, 2) for x in (q, k, v))
        wanted = attention(*arrays, causal=True, sinks=sinks.double(), softcap=2.0)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Masks: each that we take, as a dense one, is transformers'

FUNCTIONS = {
    "causal": (causal_mask_function, {}),
    "window": (sliding_window_causal_mask_function(4), {"local_size": 4}),
    "window 1": (sliding_window_causal_mask_function(1), {"local_size": 1}),
    "bidirectional": (bidirectional_mask_function, {"allow_is_bidirectional_skip": True}),
    "bidirectional window": (
        sliding_window_bidirectional_mask_function(3), {"local_size": 3, "allow_is_bidirectional_skip": True}
    ),
}  # fmt: skip
PADDINGS: dict[str, tuple[tuple[int, ...], ...] | None] = {
    "none": None,
    "full": ((1,) * 9, (1,) * 9),
    "left": ((0, 0, 0, 1, 1, 1, 1, 1, 1), (1,) * 9),
    "right": ((1, 1, 1, 1, 1, 1, 0, 0, 0), (1,) * 9),
    "both": ((0, 1, 1, 1, 1, 1, 1, 0, 0), (0, 0, 1, 1, 1, 1, 1, 1, 1)),
    "a row of padding": ((0,) * 9, (1,) * 9),
}
# (queries, their first position, keys, their first position): all, a chunk behind a cache, a step, a sliding cache
PLACES = {"all": (9, 0, 9, 0), "chunk": (3, 6, 9, 0), "step": (1, 8, 9, 0), "sliding": (2, 7, 5, 4)}


def asked(place: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    q_length, q_offset, kv_length, kv_offset = place
    return {
        "batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "device": torch.device("cpu"), **more,
    }  # fmt: skip


def agrees(arguments: dict[str, Any], *, ours: bool = True, causal: bool = True) -> None:
    """What `mask` says is what transformers' bool mask says, for queries that are tokens."""
    wanted = hf.sdpa_mask(**{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    got = masks.mask(**arguments)
    batch, q_length, kv_length = (arguments[name] for name in ("batch_size", "q_length", "kv_length"))
    if not ours:
        assert got.dtype == torch.bool and torch.equal(got, wanted)
        return
    assert got is None or (got.dim() == 4 and masks.is_ours(got))
    keys = masks.Keys(causal) if got is None else masks.read(got)
    if keys.starts_q is None:
        dense = masks.dense(keys, q_length, kv_length, "cpu")
    else:
        dense = masks.dense(keys, batch * q_length, batch * kv_length, "cpu")[0, 0]
        blocks = dense.reshape(batch, q_length, batch, kv_length)
        assert not any(blocks[b, :, c].any() for b in range(batch) for c in range(batch) if b != c)
        dense = torch.stack([blocks[b, :, b] for b in range(batch)]).unsqueeze(1)
    dense = torch.ones(1, 1, 1, 1, dtype=torch.bool) if dense is None else dense
    dense = dense.expand(batch, 1, q_length, kv_length)
    padding = arguments.get("attention_mask")
    tokens = torch.ones(batch, q_length, dtype=torch.bool)
    if padding is not None:
        start = int(arguments["q_offset"])
        tokens = torch.nn.functional.pad(padding, (0, 9))[:, start : start + q_length]
    assert torch.equal(dense[:, 0][tokens], wanted[:, 0][tokens])


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_masks(function: str, padding: str, wait: bool) -> None:
    register(wait=wait)
    mask_function, more = FUNCTIONS[function]
    rows = PADDINGS[padding]
    attention_mask = None if rows is None else torch.tensor(rows, dtype=torch.bool)
    causal = "allow_is_bidirectional_skip" not in more
    for place, sizes in PLACES.items():
        arguments = asked(sizes, mask_function=mask_function, attention_mask=attention_mask, **more)
        ours = causal or place == "all" or function == "bidirectional"
        agrees(arguments, ours=ours, causal=causal)
        if causal and place != "sliding":  # a static cache: a buffer of 14, of which nobody but the device knows more
            for offset in (sizes[1], torch.tensor(sizes[1])):
                step = sizes[0] == 1 and (function != "causal" or offset is not sizes[1])
                agrees({**arguments, "kv_length": 14, "q_offset": offset, "allow_is_causal_skip": not step})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_row_of_padding_sees_nothing(function: str) -> None:
    mask_function, more = FUNCTIONS[function]
    padding = torch.tensor([(0,) * 9, (0,) + (1,) * 8], dtype=torch.bool)
    keys = masks.read(masks.mask(**asked(PLACES["all"], mask_function=mask_function, attention_mask=padding, **more)))
    seen = masks.dense(keys, 9, 9, "cpu")
    assert not seen[0].any() and seen[1].any()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("window", [None, 3, 1])
def test_masks_of_packed_sequences(window: int | None, wait: bool) -> None:
    register(wait=wait)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 0], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    arguments = packed_as_transformers_does(positions, window)
    agrees(arguments)
    starts = masks.read(masks.mask(**arguments)).starts_q.tolist()
    wanted = [0, 3, 4, 8, 9, 18] if window != 1 else list(range(19))
    assert starts == (wanted if wait else wanted + [18] * (19 - len(wanted)))


def test_packed_sequences_of_other_versions() -> None:
    """However a version puts the mask together, if it has the functions for it."""
    packed = hf.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1]]))
    for inner, wanted in ((causal_mask_function, -1), (sliding_window_causal_mask_function(3), 2)):
        parts = [inner]
        if hasattr(hf, "remap_positions_for_packed_sequence"):
            parts.append(hf.remap_positions_for_packed_sequence(inner, torch.tensor([[0, 1, 2, 0, 1]])))
        for part in parts:
            for function in (hf.and_masks(part, packed), hf.and_masks(packed, part)):
                assert masks.pattern_of(function) == masks.Pattern(True, wanted, True)
    for inner in (bidirectional_mask_function, hf.chunked_causal_mask_function(2, torch.zeros(1)), packed):
        assert masks.pattern_of(hf.and_masks(inner, packed)) is None


def packed_as_transformers_does(positions: torch.Tensor, window: int | None) -> dict[str, Any]:
    """The arguments of the mask interface for packed sequences."""
    return captured(window, positions, None)


def captured(window: int | None, positions: torch.Tensor | None, attention_mask: Any, **more: Any) -> dict[str, Any]:
    """What transformers gives the interface for a model's masks."""
    seen: list[dict[str, Any]] = []
    original = masks.mask

    def spy(**arguments: Any) -> Any:
        seen.append(arguments)
        return original(**arguments)

    hf.AttentionMaskInterface.register("fa2cupy", spy)
    own = copy.deepcopy(config("mistral", 8))
    own.sliding_window, own._attn_implementation = window, "fa2cupy"
    try:
        create = hf.create_causal_mask if window is None else hf.create_sliding_window_causal_mask
        batch = 2 if positions is None else positions.shape[0]
        create(own, torch.zeros(batch, 9, 4), attention_mask, None, position_ids=positions, **more)
    finally:
        register(wait=masks.may_wait)
    return seen[0]


def test_masks_that_are_not_ours() -> None:
    """As transformers would give them to SDPA."""
    chunks = hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    blocks = hf.or_masks(causal_mask_function, hf.blockwise_overlay(torch.arange(9)[None].expand(2, -1) // 3))
    odd = hf.and_masks(causal_mask_function, hf.sliding_window_overlay(3))  # another order: nobody makes it
    gaps = torch.tensor([(1, 1, 0, 1, 1, 1, 1, 1, 1), (1,) * 9], dtype=torch.bool)
    for more in (
        {"mask_function": chunks, "local_size": 4},
        {"mask_function": blocks},
        {"mask_function": odd},
        {"mask_function": lambda b, h, q, k: k <= q},
        {"attention_mask": gaps},
        {"attention_mask": gaps, "mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": True},
        {"use_vmap": True},
        {"allow_is_causal_skip": False},  # the model works with the mask
        {"mask_function": bidirectional_mask_function, "allow_is_bidirectional_skip": False},
    ):
        agrees(asked(PLACES["all"], **more), ours=False)
    queries_beyond_the_keys = asked((3, 8, 9, 0))
    agrees(queries_beyond_the_keys, ours=False)
    other = {"mask_function": FUNCTIONS["bidirectional window"][0], "allow_is_bidirectional_skip": True}
    agrees(asked((3, 2, 9, 0), **other), ours=False)


def test_what_dynamo_can_see_says_the_same() -> None:
    """Recognised by names where closures cannot be opened, from what transformers itself passes."""
    positions = torch.arange(9)[None].expand(2, -1)
    packed = torch.cat([torch.arange(5), torch.arange(4)])[None].expand(2, -1)
    padding = torch.ones(2, 9, dtype=torch.bool)
    for window in (None, 3):
        for position_ids, attention_mask in ((positions, None), (packed, None), (positions, padding), (None, None)):
            seen = captured(window, position_ids, attention_mask)
            pattern = masks.pattern_of(seen["mask_function"])
            assert pattern is not None and pattern.packed == (position_ids is packed)
            by_name = masks._traced_pattern(
                seen["mask_function"], seen.get("local_size"), False, False,
                attention_mask is None and not seen["allow_is_causal_skip"],
            )  # fmt: skip
            assert by_name == pattern
    for size in (2, 7):
        function = sliding_window_bidirectional_mask_function(size)
        assert masks._traced_pattern(function, size, True, False, False) == masks.pattern_of(function)
    chunks = hf.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    for function in (chunks, hf.or_masks(causal_mask_function), lambda b, h, q, k: k <= q):
        assert masks._traced_pattern(function, 4, False, True, False) is None
        assert masks.pattern_of(function) is None


def test_gaps_that_nobody_waits_for_are_an_error() -> None:
    """Neither SDPA nor wrong numbers: an assertion on the device."""
    gaps = LEFT.clone()
    gaps[0, 3] = 0
    eager, ours = pair("llama")
    wanted = output(eager, input_ids=IDS, attention_mask=gaps)
    got = output(ours, input_ids=IDS, attention_mask=gaps)
    assert counted() == {"torch's SDPA": LAYERS}
    torch.testing.assert_close(got[gaps.bool()], wanted[gaps.bool()], rtol=1e-4, atol=2e-6)
    register(wait=False)
    with pytest.raises(InvalidArgument, match="padding mask has gaps"):
        output(ours, input_ids=IDS, attention_mask=gaps)
    register()

    def compiled(attention_mask: torch.Tensor) -> Any:
        return masks.mask(3, SEQLEN, SEQLEN, attention_mask=attention_mask)

    in_one_graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert torch.equal(in_one_graph(LEFT.bool()), compiled(LEFT.bool()))
    with pytest.raises(InvalidArgument, match="padding mask has gaps"):
        in_one_graph(gaps.bool())


def test_blocks_among_packed_sequences_are_an_error_where_they_cannot_be_seen() -> None:
    """torch.compile, no mask, no cache: what is left over after recognising by names."""
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1]] * 2)
    seen = captured(None, torch.arange(5).repeat(2)[None, :9].expand(2, -1), None, block_sequence_ids=blocks)
    agrees(seen, ours=False)
    with pytest.raises(InvalidArgument, match="only packed causal"):
        masks._starts(seen["mask_function"], 2, 9, "cpu", False)


# ----------------------------------------------------------------------------------------------------------------------
# What goes to torch's SDPA


@pytest.mark.parametrize("name", ["llama", "mistral", "modernbert"])
def test_sdpa_gets_the_same_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were our kernels to refuse: each mask of ours, written out for SDPA."""
    monkeypatch.setattr(layer, "objection", lambda *arguments: "of a test")
    eager, ours = pair(name)
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"input_ids": IDS}, slice(None)),
        ({"input_ids": IDS, "attention_mask": LEFT}, LEFT.bool()),
        ({"input_ids": IDS, "attention_mask": RIGHT}, RIGHT.bool()),
    ]
    if name not in ENCODERS:
        rows = torch.cat([POSITIONS, torch.arange(SEQLEN)[None] % 4])
        cases.append(({"input_ids": IDS[:2], "position_ids": rows, "use_cache": False}, slice(None)))
    for inputs, tokens in cases:
        wanted, got = output(eager, **inputs), output(ours, **inputs)
        torch.testing.assert_close(got[tokens], wanted[tokens], rtol=1e-4, atol=2e-6)
        assert [(row.kernel, row.why, row.calls) for row in fa2cupy.report(reset=True)] == [
            ("torch's SDPA", "of a test", LAYERS)
        ]
    if name not in ENCODERS:
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        for cache in ({}, {"cache_implementation": "static", "disable_compile": True}):
            wanted, got = (m.generate(IDS, attention_mask=LEFT, **options, **cache) for m in (eager, ours))
            assert torch.equal(got, wanted)
        assert set(counted()) == {"torch's SDPA"}


class Layer(torch.nn.Module):
    """What a layer is to the interface."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, 2


def heads(seqlen_q: int = 5, seqlen_k: int = 5, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q)
    shapes = ((batch, 4, seqlen_q, 8), (batch, 2, seqlen_k, 8), (batch, 2, seqlen_k, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Any, scale: float | None = None) -> Any:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    return (scores.masked_fill(~seen, -torch.inf).softmax(3) @ v).transpose(1, 2)


def test_a_layer_by_itself() -> None:
    """Without a mask the module says whether it is causal, and its window counts; with one the mask says both."""
    q, k, v = heads()
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    band = lower & ~torch.ones(5, 5, dtype=torch.bool).tril(-2)
    run = functools.partial(layer.attention_layer, query=q, key=k, value=v)
    windowed = masks.mask(**asked((5, 0, 5, 0), mask_function=sliding_window_causal_mask_function(2), local_size=2))
    for arguments, seen, scale in (
        ({"module": Layer(), "attention_mask": None}, lower, None),
        ({"module": Layer(False), "attention_mask": None, "scaling": 0.3}, torch.ones_like(lower), 0.3),
        ({"module": Layer(), "attention_mask": None, "is_causal": False}, torch.ones_like(lower), None),
        ({"module": Layer(), "attention_mask": None, "sliding_window": 2}, band, None),
        ({"module": Layer(False), "attention_mask": None, "sliding_window": 2}, band | band.T, None),
        ({"module": Layer(False), "attention_mask": windowed}, band, None),
    ):
        out, weights = run(**arguments)
        assert weights is None and out.is_contiguous()
        torch.testing.assert_close(out, by_formula(q, k, v, seen, scale))
    assert counted() == {"fa2cupy": 6}
    q, k, v = heads(2, 6)  # two tokens behind a cache of four
    out, _ = layer.attention_layer(Layer(), q, k, v, None)
    torch.testing.assert_close(out, by_formula(q, k, v, torch.ones(2, 6, dtype=torch.bool).tril(4)))


def test_autocast_casts_before_we_judge() -> None:
    """Norms in float32 beside values in bfloat16, as autocast leaves them."""
    q, k, v = heads()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer.attention_layer(Layer(), q.float(), k.float(), v.bfloat16(), None)
    assert out.dtype == torch.bfloat16 and counted() == {"fa2cupy": 1}
    wanted = by_formula(q, k, v, torch.ones(5, 5, dtype=torch.bool).tril())
    torch.testing.assert_close(out.double(), wanted, rtol=0.03, atol=0.03)


def test_packed_lengths_of_queries_and_keys() -> None:
    """cu_seq_lens_q and cu_seq_lens_k that differ, on our kernels and written out for SDPA."""
    q, k, v = heads(5, 7, batch=1)
    starts = {"cu_seq_lens_q": torch.tensor([0, 2, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 3, 4, 7])}
    seen = torch.zeros(5, 7, dtype=torch.bool)
    seen[0, :2], seen[1, :3], seen[2, 4], seen[3, 4:6], seen[4, 4:7] = True, True, True, True, True
    wanted = by_formula(q, k, v, seen)
    out, _ = layer.attention_layer(Layer(), q, k, v, None, **starts)
    torch.testing.assert_close(out, wanted)
    out, _ = layer.attention_layer(Layer(), q, k, v, None, position_bias=torch.zeros(1, 4, 5, 7).double(), **starts)
    torch.testing.assert_close(out, wanted)
    assert counted() == {"fa2cupy": 1, "torch's SDPA": 1}
    with pytest.raises(InvalidArgument, match="cu_seq_lens_q and cu_seq_lens_k"):
        layer.attention_layer(Layer(), q, k, v, None, cu_seq_lens_q=starts["cu_seq_lens_q"])


def test_what_goes_to_sdpa_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads()
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lower = torch.ones(5, 5, dtype=torch.bool).tril()
    odd = lower.clone()
    odd[4, 1] = False
    wide = [torch.zeros(1, 4, 2, 264), torch.zeros(1, 2, 2, 264), torch.zeros(1, 2, 2, 264)]
    run = functools.partial(layer.attention_layer, Layer())
    out, _ = run(q, k, v, odd[None, None])
    torch.testing.assert_close(out, by_formula(q, k, v, odd))
    out, _ = run(q, k, v, torch.zeros(5, 5).masked_fill(~odd, -torch.inf).double()[None, None])
    torch.testing.assert_close(out, by_formula(q, k, v, odd))
    out, _ = run(q, k, v, None, position_bias=bias)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5 + bias
    wanted = (scores.masked_fill(~lower, -torch.inf).softmax(3) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    torch.manual_seed(1)
    dropped, _ = run(q, k, v, odd[None, None], dropout=0.5)
    assert not torch.allclose(dropped, by_formula(q, k, v, odd))
    run(*wide, None)
    whys = {row.why: row.calls for row in fa2cupy.report() if row.kernel == "torch's SDPA"}
    words = ("a mask that is not", "position_bias", "head_dim")
    assert len(whys) == 3 and all(any(word in why for why in whys) for word in words)
    assert sum(whys.values()) == 5
    monkeypatch.setenv("FA2CUPY_STRICT", "1")
    with pytest.raises(NotTaken, match="transformers would run torch's SDPA"):
        run(q, k, v, odd[None, None])


def test_attention_weights_are_not_there() -> None:
    q, k, v = heads()
    with pytest.warns(fa2cupy.Fa2Warning, match="output_attentions"):
        _, weights = layer.attention_layer(Layer(), q, k, v, None, output_attentions=True)
    assert weights is None


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(hf, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
        with pytest.raises(MissingDependency, match=r"too old.*q_length, q_offset, kv_offset,"):
            register()
    with monkeypatch.context() as patch:
        patch.setattr(sdpa_attention, "sdpa_attention_forward", lambda module, query, **more: None)
        with pytest.raises(MissingDependency, match=r"too old.*knows no position_bias"):
            register()
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match="transformers 5"):
        register()
    monkeypatch.undo()


def test_this_transformers_is_known() -> None:
    """Nothing that the probe asks for is left to SDPA."""
    probe.objection.cache_clear()
    assert probe.objection() == ""
    requests = list(probe._requests())
    assert len(requests) == 10
    for what, asked in requests:
        got = masks.mask(**asked)
        assert masks.pattern_of(asked["mask_function"]) is not None, what
        assert (got is None) == ("whole" in what and "sliding" not in what) or masks.is_ours(got), what


def wider_windows(sliding_window: int) -> Any:
    def inner_mask(batch_idx: int, head_idx: int, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx >= q_idx - sliding_window

    inner_mask.__module__, inner_mask.__qualname__ = hf.__name__, "sliding_window_overlay.<locals>.inner_mask"
    return inner_mask


def unknown_packed(packed_sequence_mask: torch.Tensor) -> Any:
    def inner_mask(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return packed_sequence_mask[batch_idx, q_idx] == packed_sequence_mask[batch_idx, kv_idx]

    return inner_mask


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("sliding_window_overlay", wider_windows, "means by its masks.*create_sliding_window_causal_mask, whole"),
        ("packed_sequence_mask_function", unknown_packed, "means by its masks.*create_causal_mask, packed"),
        ("create_causal_mask", lambda config, embeddings, *, mask: None, "in a way that is not known: TypeError"),
        ("create_bidirectional_mask", lambda *arguments: None, "the mask interface 0 times"),
    ],
)
def test_a_transformers_that_differs_is_refused(
    name: str, changed: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than computed wrongly."""
    probe.objection.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(hf, name, changed)
        with pytest.raises(MissingDependency, match=f"transformers {transformers.__version__} .*{says}"):
            register()
    probe.objection.cache_clear()
    register()


def test_snippets_of_the_page() -> None:
    """docs/transformers.md."""
    page = Path(__file__).parents[2] / "docs" / "transformers.md"
    [snippet] = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(compile(snippet, str(page), "exec"), names)
    assert set(counted()) == {"fa2cupy"}
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
