"""transformers' models on our kernels, in bfloat16, against eager attention in float32 with the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fa2cupy
from fa2cupy.frameworks.base import Device, TensorRef
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common, plan_backward, plan_forward
from fa2cupy.kernels.plan import Plan
from fa2cupy.problem import SPECS, AttentionProblem
from fa2cupy.spec import LengthsSpec

transformers = pytest.importorskip("transformers")

from fa2cupy.transformers import layer, register  # noqa: E402
from tests.frameworks.transformers_models import (  # noqa: E402
    DECODERS,
    ENCODERS,
    LAYERS,
    SCORED,
    VOCABULARY,
    WINDOW,
    made,
    result_of,
)

Tensor = torch.Tensor
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

HEADS, HEAD_DIM, BATCH, SEQLEN = 4, 64, 3, 200
PACKED = (70, 1, 129)
# Each model, and each kind with and without causal and windows, but not all pairs.
PAIRS = [
    ("llama", "full"),
    ("llama", "left"),
    ("mistral", "right"),
    ("mistral", "packed"),
    ("gemma3", "left"),
    ("qwen3", "full"),
    ("gpt2", "packed"),
    ("bert", "full"),
    ("bert", "left"),
    ("modernbert", "full"),
    ("modernbert", "right"),
]
assert {name for name, _ in PAIRS} == {*DECODERS, *ENCODERS}
# Of kernels that are not ours, whatever else attention is made of.
OTHERS = ("pytorch_flash", "fmha", "cudnn", "softmax", "mem_eff")


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    register()
    fa2cupy.report(reset=True)
    yield
    torch.cuda.set_sync_debug_mode("default")
    register()


def needed_plans(info: DeviceInfo) -> Iterator[Plan]:
    """Of the calls that layers make here; nothing of them lies in memory."""
    padding = LengthsSpec(BATCH, seqused_k=True, leftpad_k=True)
    packed = LengthsSpec(len(PACKED), cu_seqlens_q=True, cu_seqlens_k=True)
    causal = [problem(lengths=lengths, window=window) for lengths in (None, padding, packed) for window in (0, WINDOW)]
    both_ways = [
        problem(causal=False, heads_k=HEADS, lengths=lengths, window=window)
        for lengths, window in ((None, 0), (padding, 0), (None, 3), (replace(padding, seqused_q=True), 3))
    ]
    gpt2 = problem(heads_k=HEADS, lengths=packed)
    for each in (*causal, *both_ways, gpt2):
        yield plan_forward(each, info)
        yield plan_backward(each, info, False)
    for seqlen_q in (SEQLEN, 1):  # a static cache, windows of which are no longer than they are
        for window in (0, WINDOW):
            yield plan_forward(problem(seqlen_q, SEQLEN + 12, lengths=padding, window=window), info)
    for whisper in ((10, 10, False), (30, 30, True), (30, 10, False)):
        yield plan_forward(problem(*whisper, heads_k=HEADS), info)
    yield plan_forward(problem(dtype="float16"), info)
    sinks = TensorRef(0, (HEADS,), (1,), "bfloat16", Device("cuda", 0), None)
    for lengths, window in itertools.product((None, padding), (0, WINDOW)):  # gemma2's softcaps, gpt-oss' sinks
        capped = SPECS["softcap"](problem(lengths=lengths, window=window), 0.1)
        yield plan_forward(capped, info)
        yield plan_backward(capped, info, False)
        yield plan_forward(
            SPECS["sinks"](problem(lengths=lengths, window=window, names=common.FORWARD_ARRAYS), sinks), info
        )
        of_backward = SPECS["sinks"](problem(lengths=lengths, window=window), sinks)
        yield plan_backward(SPECS["dsinks"](of_backward, sinks), info, False)


def problem(
    seqlen_q: int = SEQLEN,
    seqlen_k: int = SEQLEN,
    causal: bool = True,
    heads_k: int = 2,
    lengths: LengthsSpec | None = None,
    window: int = 0,
    dtype: str = "bfloat16",
    names: tuple[str, ...] = (*common.FORWARD_ARRAYS, *backward.ARRAYS),
) -> AttentionProblem:
    """Of a layer. window: as layers count it, 0 for none; if not causal, to either side. names: of the arrays."""
    found = AttentionProblem(
        batch=BATCH if lengths is None else lengths.sequences,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=HEADS,
        num_heads_k=heads_k,
        head_dim=HEAD_DIM,
        head_dim_v=HEAD_DIM,
        dtype=dtype,
        causal=causal,
        softmax_scale=HEAD_DIM**-0.5,
        strides=tuple((name, (0, HEADS * HEAD_DIM, HEAD_DIM)) for name in names),
        aligned=True,
        lengths=lengths,
    )
    if not window:
        return found
    return SPECS["window_size"](found, (window - 1, 0) if causal else (window, window))


def counted() -> dict[str, int]:
    rows = fa2cupy.report(reset=True)
    return {row.kernel: sum(r.calls for r in rows if r.kernel == row.kernel) for row in rows}


def models(name: str, device: torch.device, peer: str = "sdpa") -> dict[str, Any]:
    """By implementation; "exact" is eager attention in float32 with the weights that the others have in bfloat16."""
    ours = made(name, "fa2cupy", HEAD_DIM).to(device, torch.bfloat16)
    sdpa = made(name, peer, HEAD_DIM).to(device, torch.bfloat16)
    exact = made(name, "eager", HEAD_DIM).to(device)
    exact.load_state_dict({n: x.float() for n, x in ours.state_dict().items()})
    return {"ours": ours, "sdpa": sdpa, "exact": exact}


def inputs_of(kind: str, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, SEQLEN), generator=generator).to(device)
    kept = torch.arange(SEQLEN, device=device)[None] < torch.tensor([SEQLEN, 131, 64], device=device)[:, None]
    if kind == "full":
        return {"input_ids": ids}
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in PACKED])[None].to(device)
        return {"input_ids": ids[:1], "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "attention_mask": (kept if kind == "right" else kept.flip(1)).long()}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def no_further_than_sdpa(results: dict[str, Tensor]) -> None:
    """Rounding in all of a model is bfloat16's, with SDPA's attention as with ours."""
    exact = results["exact"].double()
    error, peers = (rms(results[name].double() - exact) for name in ("ours", "sdpa"))
    assert error <= 1.3 * peers + 1e-3 * rms(exact)


def results(name: str, inputs: dict[str, Any], device: torch.device, peer: str = "sdpa") -> dict[str, Tensor]:
    """Output where there are tokens and the gradient of a weight below all attention, in one."""
    mask = inputs.get("attention_mask")
    tokens = slice(None) if mask is None else mask.bool()
    found = {}
    for key, model in models(name, device, peer).items():
        out = result_of(model, **inputs)[tokens].float()
        weight = (out * torch.arange(out.numel(), device=device).reshape(out.shape).sin()).sum()
        [gradient] = torch.autograd.grad(weight, [model.get_input_embeddings().weight])
        found[key] = torch.cat([out.flatten() / rms(out), gradient.float().flatten() / rms(gradient)]).detach()
    return found


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_models(device: torch.device, name: str, kind: str) -> None:
    assert WINDOW < SEQLEN
    no_further_than_sdpa(results(name, inputs_of(kind, device), device))
    assert counted() == {"fa2cupy": LAYERS}


@pytest.mark.parametrize("kind", ["full", "left"])
@pytest.mark.parametrize("name", SCORED)
def test_scores(device: torch.device, name: str, kind: str) -> None:
    """Softcaps and sinks, which SDPA has not: eager attention in bfloat16 is the peer."""
    no_further_than_sdpa(results(name, inputs_of(kind, device), device, "eager"))
    assert counted() == {"fa2cupy": LAYERS}


def test_cross_attention(device: torch.device) -> None:
    features = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2)).to(device)
    ids = inputs_of("full", device)["input_ids"][:2, :30]
    with torch.no_grad():
        found = {
            key: model(features.to(model.dtype), decoder_input_ids=ids).logits.float()
            for key, model in models("whisper", device).items()
        }
    no_further_than_sdpa(found)
    assert counted() == {"fa2cupy": 3 * LAYERS}


@pytest.mark.parametrize("kind", ["left", "packed"])
def test_the_kernels_are_ours(device: torch.device, kind: str) -> None:
    """By torch's profiler, forward and backward: no other attention, and no softmax."""
    ours, inputs = models("mistral", device)["ours"], inputs_of(kind, device)

    def step() -> None:
        ours.zero_grad()
        result_of(ours, **inputs).float().square().mean().backward()

    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names.count("flash_fwd") == names.count("flash_bwd") == LAYERS
    assert not [name for name in names if any(word in name for word in OTHERS)]


def strictly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but whoever waits for the GPU inside raises."""

    def strict(*arguments: Any, **keywords: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*arguments, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return strict


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "full"), ("llama", "static"), ("mistral", "left"), ("mistral", "packed"), ("mistral", "static")],
)
def test_no_layer_waits(device: torch.device, name: str, kind: str) -> None:
    """Of a layer what is ours: transformers' caches of windows wait when they are made and when they roll."""
    ours = models(name, device)["ours"]
    inputs = inputs_of("left" if kind == "static" else kind, device)
    with torch.no_grad():
        result_of(ours, **inputs)  # kernels are compiled and loaded
        if kind == "static":
            cache = transformers.StaticCache(config=ours.config, max_cache_len=SEQLEN + 10)
            result_of(ours, **inputs, past_key_values=cache)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            inputs = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, "past_key_values": cache}
            result_of(ours, **inputs)
            inputs["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        fa2cupy.report(reset=True)
        transformers.AttentionInterface.register("fa2cupy", strictly(layer.attention_layer))
        result_of(ours, **inputs)
    assert counted() == {"fa2cupy": LAYERS}


def test_a_wait_would_be_seen(device: torch.device) -> None:
    """In a layer's attention, by the model that calls it."""

    def waits(*arguments: Any, **keywords: Any) -> Any:
        arguments[1].nonzero()
        return layer.attention_layer(*arguments, **keywords)

    ours, inputs = models("llama", device)["ours"], inputs_of("full", device)
    transformers.AttentionInterface.register("fa2cupy", strictly(waits))
    with torch.no_grad(), pytest.raises(RuntimeError, match="synchroniz"):
        result_of(ours, **inputs)


def test_nothing_of_a_forward_waits(device: torch.device) -> None:
    """With wait=False, the mask too."""
    ours, inputs = models("mistral", device)["ours"], {**inputs_of("left", device), "use_cache": False}
    register(wait=False)
    with torch.no_grad():
        wanted = result_of(ours, **inputs)
        got = strictly(result_of)(ours, **inputs)
    assert torch.equal(got, wanted)
    assert counted() == {"fa2cupy": 2 * LAYERS}


def test_a_forward_in_a_graph(device: torch.device) -> None:
    """Captured whole and replayed with padding of other lengths."""
    ours = models("mistral", device)["ours"]
    left, right = inputs_of("left", device), inputs_of("right", device)
    ids, mask = left["input_ids"].clone(), left["attention_mask"].clone()
    register(wait=False)
    with torch.no_grad():
        wanted = [result_of(ours, **x, use_cache=False) for x in (left, right)]
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result_of(ours, input_ids=ids, attention_mask=mask, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = result_of(ours, input_ids=ids, attention_mask=mask, use_cache=False)
        for x, right_answer in zip((left, right, left), (*wanted, wanted[0]), strict=True):
            mask.copy_(x["attention_mask"])
            graph.replay()
            tokens = x["attention_mask"].bool()
            assert torch.equal(out[tokens], right_answer[tokens])


def test_generation(device: torch.device) -> None:
    """Tokens of float32 arithmetic could differ by a tie; of a static and a dynamic cache of ours they do not: both
    compute with the same kernels. transformers compiles the steps of the static one, with CUDA graphs."""
    ours, inputs = models("gemma3", device)["ours"], inputs_of("left", device)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    options["output_logits"] = True
    dynamic = ours.generate(**inputs, **options)
    assert counted() == {"fa2cupy": 12 * LAYERS}
    torch.compiler.reset()
    static = ours.generate(**inputs, **options, cache_implementation="static")
    calls = counted()
    assert set(calls) == {"fa2cupy"} and calls["fa2cupy"] < 12 * LAYERS  # graphs are counted when they are traced
    for step, (x, y) in enumerate(zip(dynamic.logits, static.logits, strict=True)):
        assert rms(x.float() - y.float()) < 0.02 * rms(x.float())
        if not torch.equal(x.argmax(1), y.argmax(1)):  # a tie, after which the sequences differ
            assert step > 0
            break


def test_compiled(device: torch.device) -> None:
    """Forward and backward in one graph, which is run as it is traced; Inductor's code is in test_generation."""
    torch.compiler.reset()
    ours, inputs = models("gemma3", device)["ours"], inputs_of("left", device)
    tokens = inputs["attention_mask"].bool()
    found = []
    for model in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        out = result_of(model, **inputs)[tokens].float()
        [gradient] = torch.autograd.grad(out.square().mean(), [ours.get_input_embeddings().weight])
        found.append((out.detach(), gradient))
    assert counted() == {"fa2cupy": 2 * LAYERS}
    for got, wanted in zip(found[1], found[0], strict=True):
        assert rms(got.float() - wanted.float()) < 0.03 * rms(wanted)


def test_float32_is_sdpas_unless_only_norms_are(device: torch.device) -> None:
    """A model in float32 falls back, counted; queries that norms made float32 go back to the layer's own dtype."""
    model = made("llama", "fa2cupy", HEAD_DIM).to(device)
    with torch.no_grad():
        result_of(model, **inputs_of("left", device))
    [row] = fa2cupy.report(reset=True)
    assert (row.kernel, row.calls) == ("torch's SDPA", LAYERS) and "float32" in row.why
    attention = models("llama", device)["ours"].model.layers[0].self_attn
    q, k, v = (torch.randn(2, heads, 70, HEAD_DIM, device=device) for heads in (4, 2, 2))
    out, _ = layer.attention_layer(attention, q, k, v, None)
    assert out.dtype == torch.bfloat16 and counted() == {"fa2cupy": 1}
    with torch.autocast("cuda", torch.float16):
        out, _ = layer.attention_layer(attention, q, k, v, None)
    assert out.dtype == torch.float16 and counted() == {"fa2cupy": 1}
