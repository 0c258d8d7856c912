"""fa2cupy under torch's own parallelism, on every GPU of this machine: each way against one GPU that does it all.

    python examples/several_gpus_torch.py            # one process for each GPU, NCCL
    python examples/several_gpus_torch.py --cpu      # two processes on the CPU, gloo; without the ring, which is CUDA's

DDP and FSDP2 train a small GPT, of which nothing knows that there are several; heads are split by DTensor, which asks
fa2cupy's operator how it may be; the ring (context parallel) is torch's, over an SDPA that fa2cupy has taken over.
"""

import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
from gpt_torch import GPT, SHAPES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import fa2cupy
import fa2cupy.torch


def difference(got, wanted):
    """The largest root mean square difference of two lists of tensors, relative to the size of the second."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(got, wanted, strict=True)]
    return max(float((x - y).square().mean().sqrt() / y.square().mean().sqrt().clamp(min=1e-12)) for x, y in pairs)


def timed(call, device, repeats):
    """What a call returns, and the milliseconds of the next ones."""
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start) / max(1, repeats)


def gpt(shape, device):
    torch.manual_seed(0)  # the same weights everywhere
    return GPT(shape, "fa2cupy").to(device)


def gradients(model, inputs, targets, device):
    """Loss and gradients, of the whole tensors; bfloat16 on a GPU."""
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = model(inputs, targets)
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def trainings(shape, device, mesh, repeats):
    """Name -> (difference from one GPU, milliseconds of a step)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    *_, seqlen, _, _, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(256, (2 * world, seqlen + 1), generator=generator).to(device)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    mine = slice(2 * rank, 2 * rank + 2)
    alone = gpt(shape, device)
    wanted, ms = timed(lambda: gradients(alone, inputs, targets, device), device, repeats)
    results = {f"one, {2 * world} sequences": (0.0, ms)}
    ddp = DistributedDataParallel(gpt(shape, device))
    grads, ms = timed(lambda: gradients(ddp, inputs[mine], targets[mine], device), device, repeats)
    results[f"DDP, 2 on each of {world}"] = difference(grads, wanted), ms
    sharded = gpt(shape, device)
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    grads, ms = timed(lambda: gradients(sharded, inputs[mine], targets[mine], device), device, repeats)
    results[f"FSDP2, 2 on each of {world}"] = difference(grads, wanted), ms
    return results


def attentions(seqlen, device, mesh, repeats):
    """The same for attention alone: heads split by DTensor, sequences split in torch's ring."""
    world = dist.get_world_size()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(2)
    shape = (1, seqlen, 4 * world, 64)
    whole = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    dout = torch.randn(shape, generator=generator).to(device, dtype)

    def one():
        out = fa2cupy.attention(*whole, causal=True)
        return out, *torch.autograd.grad(out, whole, dout)

    wanted, ms = timed(one, device, repeats)
    results = {f"one, {4 * world} heads, S {seqlen}": (0.0, ms)}
    split = [distribute_tensor(x.detach(), mesh, [Shard(2)]).requires_grad_() for x in whole]
    split_dout = distribute_tensor(dout, mesh, [Shard(2)])

    def by_heads():
        out = fa2cupy.attention(*split, causal=True)
        return out, *torch.autograd.grad(out, split, split_dout)

    got, ms = timed(by_heads, device, repeats)
    assert all(x.placements == (Shard(2),) for x in got)
    results[f"heads split over {world}"] = difference([x.full_tensor() for x in got], wanted), ms
    if device.type == "cuda":
        results[f"ring of {world}"] = ring(whole, dout, wanted, device, mesh, repeats)
    return results


def ring(whole, dout, wanted, device, mesh, repeats):
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard

    def around():
        q, k, v, d = (x.detach().transpose(1, 2).clone() for x in (*whole, dout))
        with context_parallel(mesh, buffers=[q, k, v, d], buffer_seq_dims=[2] * 4):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with fa2cupy.torch.sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = functional.scaled_dot_product_attention(*leaves, is_causal=True)
                parts = [out.detach(), *torch.autograd.grad(out, leaves, d)]
        return parts

    fa2cupy.report(reset=True)
    parts, ms = timed(around, device, repeats)
    assert {row.kernel for row in fa2cupy.report()} == {"fa2cupy"}, str(fa2cupy.report())
    got = [x.transpose(1, 2) for x in context_parallel_unshard(mesh, parts, [2] * 4)]
    return difference(got, wanted), ms


def work(rank, args, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device("cpu" if args.cpu else f"cuda:{rank}")
    if not args.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if args.cpu else "nccl", rank=rank, world_size=args.processes)
    mesh = init_device_mesh(device.type, (args.processes,))
    shape, seqlen, repeats = ("tiny", 128, 0) if args.cpu else ("124m", 16384, 5)
    results = trainings(shape, device, mesh, repeats) | attentions(seqlen, device, mesh, repeats)
    if rank == 0:
        name = "the CPU" if args.cpu else torch.cuda.get_device_name()
        print(f"| {args.processes} x {name} | difference | ms |\n|---|---:|---:|")
        for way, (gap, ms) in results.items():
            print(f"| {way} | {gap:.1e} | {f'{ms:.1f}' if repeats else ''} |")
    worst = max(gap for gap, _ in results.values())
    dist.destroy_process_group()
    assert worst < (1e-5 if args.cpu else 2e-2), f"a difference of {worst:.1e} from one device"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    args.processes = 2 if args.cpu else torch.cuda.device_count()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (args, port), args.processes)


if __name__ == "__main__":
    main()
