"""transformers' models on our kernels, in bfloat16, against eager attention in float32 with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fa2cupy

transformers = pytest.importorskip("transformers")

from fa2cupy.transformers import layer, register  # noqa: E402
from tests.frameworks.transformers_models import (  # noqa: E402
    DECODERS,
    ENCODERS,
    LAYERS,
    VOCABULARY,
    WINDOW,
    made,
    result_of,
)

Tensor = torch.Tensor
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

HEAD_DIM, BATCH, SEQLEN = 64, 3, 200
# Of kernels that are not ours, whatever else attention is made of.
OTHERS = ("pytorch_flash", "fmha", "cudnn", "softmax", "mem_eff")


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    register()
    fa2cupy.report(reset=True)
    yield
    torch.cuda.set_sync_debug_mode("default")
    register()


def counted() -> dict[str, int]:
    rows = fa2cupy.report(reset=True)
    return {row.kernel: sum(r.calls for r in rows if r.kernel == row.kernel) for row in rows}


def models(name: str, device: torch.device) -> dict[str, Any]:
    """By implementation; "exact" is eager attention in float32 with the weights that the others have in bfloat16."""
    ours = made(name, "fa2cupy", HEAD_DIM).to(device, torch.bfloat16)
    sdpa = made(name, "sdpa", HEAD_DIM).to(device, torch.bfloat16)
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
        positions = torch.cat([torch.arange(n) for n in (70, 1, 129)])[None].to(device)
        return {"input_ids": ids[:1], "position_ids": positions, "use_cache": False}
    return {"input_ids": ids, "attention_mask": (kept if kind == "right" else kept.flip(1)).long()}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def no_further_than_sdpa(results: dict[str, Tensor]) -> None:
    """Rounding in all of a model is bfloat16's, with SDPA's attention as with ours."""
    exact = results["exact"].double()
    error, peers = (rms(results[name].double() - exact) for name in ("ours", "sdpa"))
    assert error <= 1.3 * peers + 1e-3 * rms(exact)


def results(name: str, inputs: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Output where there are tokens and the gradient of a weight below all attention, in one."""
    mask = inputs.get("attention_mask")
    tokens = slice(None) if mask is None else mask.bool()
    found = {}
    for key, model in models(name, device).items():
        out = result_of(model, **inputs)[tokens].float()
        weight = (out * torch.arange(out.numel(), device=device).reshape(out.shape).sin()).sum()
        [gradient] = torch.autograd.grad(weight, [model.get_input_embeddings().weight])
        found[key] = torch.cat([out.flatten() / rms(out), gradient.float().flatten() / rms(gradient)]).detach()
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in (*DECODERS, *ENCODERS) for kind in ("full", "left", "right")]
    + [(name, "packed") for name in DECODERS],  # transformers packs causal sequences alone
)
def test_models(device: torch.device, name: str, kind: str) -> None:
    assert WINDOW < SEQLEN
    no_further_than_sdpa(results(name, inputs_of(kind, device), device))
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


@pytest.mark.parametrize("kind", ["full", "left", "packed"])
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


def strictly(modules: Any) -> Callable[[], None]:
    """From now on these modules may not wait for the GPU; what comes back ends it."""

    def before(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def after(*_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    hooks = [h for m in modules for h in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]

    def end() -> None:
        for hook in hooks:
            hook.remove()
        after()

    return end


@pytest.mark.parametrize("kind", ["full", "left", "right", "packed", "static"])
@pytest.mark.parametrize("name", ["mistral", "llama"])
def test_no_layer_waits(device: torch.device, name: str, kind: str) -> None:
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
        end = strictly(ours.model.layers)
        try:
            result_of(ours, **inputs)
        finally:
            end()
    assert counted() == {"fa2cupy": LAYERS}


def test_a_wait_would_be_seen(device: torch.device) -> None:
    class Waiting(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.nonzero()

    module = Waiting()
    end = strictly([module])
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            module(torch.ones(3, device=device))
    finally:
        end()


@pytest.mark.parametrize("kind", ["left", "right"])
def test_nothing_of_a_forward_waits(device: torch.device, kind: str) -> None:
    """With wait=False, the mask too."""
    ours, inputs = models("mistral", device)["ours"], {**inputs_of(kind, device), "use_cache": False}
    register(wait=False)
    with torch.no_grad():
        wanted = result_of(ours, **inputs)
        end = strictly([ours])
        try:
            got = result_of(ours, **inputs)
        finally:
            end()
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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation(device: torch.device, name: str) -> None:
    """Tokens of float32 arithmetic could differ by a tie; of a static and a dynamic cache of ours they do not: both
    compute with the same kernels. transformers compiles the steps of the static one, with CUDA graphs."""
    ours, inputs = models(name, device)["ours"], inputs_of("left", device)
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


@pytest.mark.parametrize("kind", ["full", "left"])
def test_compiled(device: torch.device, kind: str) -> None:
    torch.compiler.reset()
    ours, inputs = models("gemma3", device)["ours"], inputs_of(kind, device)
    tokens = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    found = []
    for model in (ours, torch.compile(ours, fullgraph=True)):
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
