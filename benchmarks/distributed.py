"""A GPT on several GPUs by torch's own means, each way against one process: losses, gradients, milliseconds of a step.

    python benchmarks/distributed.py                            # all GPUs of this host, NCCL
    python benchmarks/distributed.py --device cpu --ranks 2     # two processes on the CPU, gloo, float32, tiny

ddp: DistributedDataParallel, the batch split. fsdp2: fully_shard of each block and the model, weights and batch split.
heads: attention on DTensors whose heads are split. ring: torch's context parallel, the sequence split, over SDPA taken
over (`fa2cupy.torch.enable_sdpa`). The model is that of examples/gpt_torch.py, not compiled. Every rank also trains the
whole model on the whole batch; exit status 1 if a way's losses or gradients differ from that by more than rounding.

torch's ring knows the operators of CUDA alone. On the CPU our kernels are registered for the flash operators' CPU key
and SDPA calls them, so that everything but the choice of the operator is what happens on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import gpt_torch  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import fa2cupy  # noqa: E402
import fa2cupy.torch  # noqa: E402
from benchmarks import results  # noqa: E402

Tensor = torch.Tensor
WAYS = ("ddp", "fsdp2", "heads", "ring")
# layers, width, heads, length, batch of each rank
SIZES = {"cuda": (12, 1024, 8, 2048, 2), "cpu": (2, 32, 4, 32, 2)}
BOUNDS = {"cuda": (2e-3, 3e-2), "cpu": (1e-5, 1e-5)}  # relative: of a loss; rms of all gradients


class Run:
    """One rank's part: the data, which are the same on every rank, and one training after the other."""

    def __init__(self, args: argparse.Namespace, rank: int) -> None:
        self.args, self.rank, self.world = args, rank, dist.get_world_size()
        self.device = torch.device(args.device, rank if args.device == "cuda" else 0)
        layers, width, heads, length, batch = SIZES[args.device]
        cuda = args.device == "cuda"
        self.dtype, vocabulary = (torch.bfloat16, gpt_torch.VOCABULARY) if cuda else (torch.float32, 64)
        torch.manual_seed(0)
        shape = (args.steps, batch * self.world, length + 1)
        self.batches = torch.randint(0, 256 if cuda else vocabulary, shape).to(self.device)
        self.model = gpt_torch.GPT(layers, width, heads, length, "fa2cupy", self.dtype, vocabulary).to(self.device)

    def mine(self, batch: Tensor) -> Tensor:
        return batch.chunk(self.world)[self.rank]

    def train(self, model: Any, loss_of: Callable[[Tensor], Tensor], average: bool = False) -> dict[str, Any]:
        """average: nobody else adds up the gradients of the ranks."""
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses, times, first = [], [], None
        for batch in self.batches:
            self.synchronize()
            begin = time.perf_counter()
            loss = loss_of(batch)
            loss.backward()
            if average:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world
            if first is None:
                first = [whole(parameter.grad).clone() for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
            losses.append(loss.detach())
        return {"losses": losses, "gradients": first, "ms": statistics.median(times[1:])}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------------------------------------------------------------

    def one(self) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        return self.train(model, model)

    def ddp(self) -> dict[str, Any]:
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.rank] if self.device.type == "cuda" else None
        model = DistributedDataParallel(copy.deepcopy(self.model), device_ids=ids)
        return self.train(model, lambda batch: model(self.mine(batch)))

    def fsdp2(self) -> dict[str, Any]:
        from torch.distributed.fsdp import fully_shard

        model, mesh = copy.deepcopy(self.model), self.mesh()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return self.train(model, lambda batch: model(self.mine(batch)))

    def heads(self) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        mesh, model = self.mesh(), copy.deepcopy(self.model)

        def attend(kind: str, qkv: Tensor) -> Tensor:
            whole = (DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in qkv.unbind(2))
            q, k, v = (x.redistribute(placements=[Shard(2)]) for x in whole)
            out = fa2cupy.attention(q, k, v, causal=True)
            if out.placements != (Shard(2),):
                raise RuntimeError(f"heads were not kept apart: {out.placements}")
            return out.full_tensor()

        with replaced(gpt_torch, "attend", attend):
            return self.train(model, model)

    def ring(self) -> dict[str, Any]:
        from torch.distributed.tensor.experimental import context_parallel

        mesh, model = self.mesh(), copy.deepcopy(self.model)
        for block in model.blocks:
            block.kind = "sdpa-flash"

        def loss_of(batch: Tensor) -> Tensor:
            inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            places = torch.arange(inputs.shape[1], device=self.device)
            buffers = [inputs, targets, places]
            with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1, 1, 0], no_restore_buffers=set(buffers)):
                if inputs.shape[1] * self.world != batch.shape[1] - 1:
                    raise RuntimeError(f"the sequence was not split: {tuple(inputs.shape)}")
                x = functional.embedding(inputs, model.tokens) + functional.embedding(places, model.positions)
                for block in model.blocks:
                    x = block(x)
                loss = model.head(x, model.tokens, targets)
                loss.backward()  # which is a ring too
            return Done.apply(loss.detach().requires_grad_())

        fa2cupy.report(reset=True)
        with flash_taken_over(self.device.type):
            found = self.train(model, loss_of, average=True)
        rows = {(row.door, row.kernel) for row in fa2cupy.report()}
        if rows != {("torch's SDPA", "fa2cupy"), ("torch's SDPA, backward", "fa2cupy")}:
            raise RuntimeError(f"the ring ran {rows}")
        return found

    def mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.world,))


class Done(torch.autograd.Function):
    """A loss whose backward has run already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        return None


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def flash_taken_over(device: str) -> Iterator[None]:
    """SDPA is flash attention, computed by our kernels."""
    if device == "cuda":
        with fa2cupy.torch.sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
        return
    from fa2cupy.torch import takeover
    from fa2cupy.torch.counted import counted

    operators = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name in operators:
        kernel = takeover._OPERATORS["cuda"][name](counted(name, None))
        library.impl(name, kernel, "CPU", with_keyset=True)

    def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=is_causal)[0]
        return out

    with replaced(functional, "scaled_dot_product_attention", scaled_dot_product_attention):
        yield
    library._destroy()


# ----------------------------------------------------------------------------------------------------------------------


def compared(found: dict[str, Any], right: dict[str, Any], world: int) -> dict[str, float]:
    """Largest relative difference of a loss (mean over the ranks), rms of that of the first step's gradients."""
    losses = 0.0
    for x, y in zip(found["losses"], right["losses"], strict=True):
        mean = x.clone()
        dist.all_reduce(mean)
        losses = max(losses, abs(float(mean) / world - float(y)) / abs(float(y)))
    pairs = list(zip(found["gradients"], right["gradients"], strict=True))
    error = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    size = sum(float(y.double().square().sum()) for _, y in pairs)
    return {"losses": losses, "gradients": (error / size) ** 0.5, "ms": found["ms"]}


def rank_main(rank: int, args: argparse.Namespace, rendezvous: str) -> NoReturn:
    """Ends the process."""
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=args.ranks)
    try:
        run = Run(args, rank)
        right = run.one()
        for way in args.ways:
            found = compared(getattr(run, way)(), right, args.ranks)
            if rank == 0:
                print("@" + json.dumps({"way": way, "one_ms": right["ms"], **found}), flush=True)
    finally:
        dist.destroy_process_group()
    # Threads of torch may still let go of Python objects. One that does while the interpreter goes away ends the
    # process with "terminate called without an active exception", seldom and after everything has been computed.
    sys.stdout.flush()
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--ranks", type=int, help="processes (default: one for each GPU)")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS), metavar=",".join(WAYS))
    parser.add_argument("--steps", type=int, help="default: 8, on the CPU 2")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # a process of this command
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.ranks = args.ranks or torch.cuda.device_count()
    args.steps = args.steps or (8 if args.device == "cuda" else 2)
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: two or more are needed")
    if args.rank is not None:
        rank_main(args.rank, args, args.rendezvous)
    return together(args)


def together(args: argparse.Namespace) -> int:
    """Start the ranks, print their table."""
    import subprocess

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--device", args.device, "--ranks", str(args.ranks)]
        command += ["--ways", ",".join(args.ways), "--steps", str(args.steps), "--rendezvous", f"{folder}/meet"]
        environment = {**os.environ, "FA2CUPY_STRICT": "1", "PYTHONFAULTHANDLER": "1"}
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
            )
            for rank in range(args.ranks)
        ]
        try:
            outputs = [process.communicate(timeout=500)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        print(f"rank {failed[0]} ended with status {processes[failed[0]].returncode}:\n{outputs[failed[0]]}")
        return 1
    rows = [json.loads(line[1:]) for line in outputs[0].splitlines() if line.startswith("@")]
    bounds, status = BOUNDS[args.device], 0
    date, commit = results.new_run_id()[:10], results.commit()
    print(f"{args.ranks} x {name}, {date}, torch {torch.__version__}, commit {commit}, sizes {SIZES[args.device]}\n")
    print("| way | loss differs by | gradients differ by | ms a step | one process, the whole batch | |")
    print("|---|---:|---:|---:|---:|---|")
    for row in rows:
        equal = row["losses"] <= bounds[0] and row["gradients"] <= bounds[1]
        status |= not equal
        cells = [f"{row['losses']:.1e}", f"{row['gradients']:.1e}", f"{row['ms']:.1f}", f"{row['one_ms']:.1f}"]
        print("| " + " | ".join([row["way"], *cells, "equal" if equal else "**differs**"]) + " |")
    return 1 if len(rows) != len(args.ways) else int(status)


if __name__ == "__main__":
    raise SystemExit(main())
