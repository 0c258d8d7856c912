"""Ours and the peers, each as one call without arguments on given tensors.

fa2: torch SDPA's FLASH_ATTENTION; cudnn: torch SDPA's CUDNN_ATTENTION; fa3: the wheel ``fa3-fwd`` (forward only); fa4:
the wheel ``flash-attn-4``. The peers' backward is `torch.autograd.grad` on a kept graph, ours is `attention_backward`:
both are all the kernels from (dout, q, k, v, out, lse) to (dq, dk, dv). Our forward writes its lse, as training needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Case, parse_case

__all__ = [
    "DEFAULT",
    "FORWARD_ONLY",
    "NAMES",
    "Tensors",
    "calls",
    "kernel_family",
    "make_tensors",
    "ours",
    "peak_bytes",
    "probe",
    "torch_call",
    "warm_fa4_cache",
    "workspace_bytes",
]

Call = Callable[[], Any]

DEFAULT = ("fa2cupy", "fa2", "cudnn", "fa3", "fa4", "gemm")
# fa2cupy-deterministic is ours with deterministic=True, to be set against fa2cupy itself; backward only.
NAMES = (*DEFAULT, "fa2cupy-deterministic")
FORWARD_ONLY = ("fa3",)  # the wheel has no backward


@dataclass(frozen=True, slots=True)
class Tensors:
    """(batch, seqlen, heads, head_dim) on the current GPU; q, k and v require grad."""

    q: Any
    k: Any
    v: Any
    dout: Any


def make_tensors(case: Case, seed: int = 0) -> Tensors:
    """Normal random numbers: zeros or constants would run faster than anything real."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(heads: int, width: int) -> Any:
        shape = (case.batch, case.seqlen, heads, width)
        return torch.randn(shape, device="cuda", dtype=getattr(torch, case.dtype), generator=generator)

    q, k = normal(case.num_heads, case.head_dim), normal(case.num_heads_k, case.head_dim)
    v, dout = normal(case.num_heads_k, case.head_dim_v), normal(case.num_heads, case.head_dim_v)
    return Tensors(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def probe(names: Iterable[str]) -> dict[str, str]:
    """name -> why it cannot be measured on this machine, of those that cannot."""
    # Read when flash_attn.cute is imported: what other processes have compiled is then found (`warm_fa4_cache`).
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    absent = {}
    for name in names:
        try:
            if name == "fa3":
                import fa3_fwd_interface  # noqa: F401
            elif name == "fa4":
                import flash_attn.cute  # noqa: F401
        except Exception as error:  # a wheel for another Python or CUDA fails in its own ways
            absent[name] = f"{type(error).__name__}: {error}"
    return absent


def ours(case: Case, t: Tensors, deterministic: bool = False, package: Any = None) -> Call:
    """A call of `package`: fa2cupy, or the same of another commit."""
    if package is None:
        import fa2cupy as package

    q, k, v = t.q.detach(), t.k.detach(), t.v.detach()
    if case.mode == "fwd":
        return lambda: package.attention(q, k, v, causal=case.causal, return_lse=True)[0]
    out, lse = package.attention(q, k, v, causal=case.causal, return_lse=True)
    return lambda: package.attention_backward(
        t.dout, q, k, v, out, lse, causal=case.causal, deterministic=deterministic
    )


def _sdpa(backend: str) -> Callable[[Case, Tensors], Call]:
    def make(case: Case, t: Tensors) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        kind = SDPBackend.__members__[backend]
        q, k, v = (x.transpose(1, 2) for x in (t.q, t.k, t.v))
        gqa = case.num_heads != case.num_heads_k

        def forward() -> Any:
            with sdpa_kernel(kind):
                out = scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=gqa)
            return out.transpose(1, 2)

        return torch_call(case.mode, t, forward)

    return make


def _fa3(case: Case, t: Tensors) -> Call:
    from fa3_fwd_interface import flash_attn_func

    q, k, v = t.q.detach(), t.k.detach(), t.v.detach()

    def forward() -> Any:
        out = flash_attn_func(q, k, v, causal=case.causal)
        return out[0] if isinstance(out, tuple) else out

    return forward


def _fa4(case: Case, t: Tensors) -> Call:
    from flash_attn.cute import flash_attn_func

    return torch_call(case.mode, t, lambda: flash_attn_func(t.q, t.k, t.v, causal=case.causal)[0])


def torch_call(mode: str, t: Any, forward: Call) -> Call:
    """`forward` without a graph, or the gradient for t.q, t.k, t.v (or t.differentiated) through a graph made once."""
    import torch

    if mode == "fwd":
        call: Call = torch.no_grad()(forward)
        return call
    out = forward()
    inputs = getattr(t, "differentiated", (t.q, t.k, t.v))
    return lambda: torch.autograd.grad(out, inputs, t.dout, retain_graph=True)


_MAKERS: dict[str, Callable[[Case, Tensors], Call]] = {
    "fa2cupy": ours,
    "fa2cupy-deterministic": lambda case, t: ours(case, t, deterministic=True),
    "fa2": _sdpa("FLASH_ATTENTION"),
    "cudnn": _sdpa("CUDNN_ATTENTION"),
    "fa3": _fa3,
    "fa4": _fa4,
}


def calls(case: Case, tensors: Tensors, names: Iterable[str]) -> tuple[dict[str, Call], dict[str, str]]:
    """(name -> call, name -> why that peer does not run this case). Each call has run once; ours may not fail.

    What has no such mode at all (FORWARD_ONLY, deterministic forward) is in neither.
    """
    ready: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for name in names:
        if name in (("fa2cupy-deterministic",) if case.mode == "fwd" else FORWARD_ONLY):
            continue
        try:
            call = _MAKERS[name](case, tensors)
            call()
        except Exception as error:
            if name.startswith("fa2cupy"):
                raise
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        ready[name] = call
    return ready, refused


def kernel_family(case: Case) -> str:
    """``sm80`` or ``sm90``: the directory of the source that ours runs for this case, here and now.

    That depends on the current GPU, on FA2CUPY_KERNEL and on the NVRTC in use.
    """
    import torch

    from benchmarks.plans import problem_of
    from fa2cupy import env, operations
    from fa2cupy.kernels import planner

    operation = operations.FORWARD if case.mode == "fwd" else operations.BACKWARD
    plan = planner.plan_call(operation.name, problem_of(case), torch.cuda.current_device(), False, env.kernel())
    families = (str(launch.source).partition("/")[0] for launch in plan.launches)
    return next(family for family in families if family != "smxx")  # smxx: kernels of any architecture


def workspace_bytes(case: Case, tensors: Tensors, deterministic: bool = False) -> int:
    """What our backward allocates beside its results."""
    import fa2cupy

    q, k, v = tensors.q.detach(), tensors.k.detach(), tensors.v.detach()
    return fa2cupy.backward_workspace_bytes(q, k, v, causal=case.causal, deterministic=deterministic)


def peak_bytes(case: Case, tensors: Tensors, name: str) -> int:
    """The most that the forward and the backward of a library allocate beside q, k, v and dout. case: a backward."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _MAKERS[name](case, tensors)()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def warm_fa4_cache(cases: Iterable[Case], processes: int) -> Callable[[], None]:
    """Start compiling FA4's kernels for the cases, in other processes, into its disk cache; the result waits for them.

    Call `probe` first. FA4's just-in-time compiler holds the GIL and takes seconds per kernel. A compilation that fails
    here is repeated, and reported, where the kernel is measured.
    """
    # Kernels differ by mode, dims, mask, dtype and heads per key head; a short sequence compiles as fast as it can.
    kinds = {replace(c, batch=1, seqlen=512).label for c in cases}
    shares = [sorted(kinds)[i::processes] for i in range(processes)]
    quiet = subprocess.DEVNULL
    running = [
        subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *share], stdout=quiet, stderr=quiet)
        for share in shares
        if share
    ]

    def wait() -> None:
        for process in running:
            try:
                process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                process.kill()

    return wait


if __name__ == "__main__":  # a process of warm_fa4_cache
    for label in sys.argv[1:]:
        _case = parse_case(label)
        calls(_case, make_tensors(_case), ["fa4"])
