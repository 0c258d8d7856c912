"""plan: which kernels, tiles and launches a problem would get, and what spoke against better ones. Needs no GPU."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fa2cupy import env, kernels
from fa2cupy.checks import check_window
from fa2cupy.errors import Fa2Error, UnsupportedDevice
from fa2cupy.frameworks.base import Device, TensorRef, contiguous_strides
from fa2cupy.jit import driver
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import backward, common
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.options import Options
from fa2cupy.problem import AttentionProblem, Sizes, with_features

# A GPU of each architecture: name, multiprocessors, MiB of L2 cache.
GPUS = {
    "sm_80": ("A100", 108, 40),
    "sm_86": ("GeForce RTX 3090", 82, 6),
    "sm_87": ("Jetson AGX Orin", 16, 4),
    "sm_89": ("GeForce RTX 4090", 128, 72),
    "sm_90": ("H100 SXM", 132, 50),
    "sm_100": ("B200", 148, 126),
    "sm_103": ("B300", 148, 126),
    "sm_120": ("GeForce RTX 5090", 170, 96),
    "sm_121": ("GB10", 48, 24),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``plan``."""
    number: dict[str, Any] = {"type": _count, "metavar": "N"}
    parser.add_argument("--head-dim", required=True, **number)
    parser.add_argument("--head-dim-v", help="of v and out (default: head_dim)", **number)
    parser.add_argument("--seqlen", required=True, help="of the queries, and of the keys unless --seqlen-k", **number)
    parser.add_argument("--seqlen-k", **number)
    parser.add_argument("--batch", default=1, help="default: 1", **number)
    parser.add_argument("--heads", default=16, help="default: 16", **number)
    parser.add_argument("--heads-k", help="of k and v (default: as many as of q)", **number)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window-size", nargs=2, type=int, metavar=("LEFT", "RIGHT"), help="-1 is unlimited")
    parser.add_argument("--deterministic", action="store_true", help="the gradients repeat their bits")
    parser.add_argument("--arch", metavar="sm_XY", help="a usual GPU of that architecture (default: this machine's)")
    parser.add_argument("--sm-count", help="multiprocessors, if not those of that GPU", **number)


def run(args: argparse.Namespace) -> int:
    """Print the plans of both directions; 1 when there is none, 2 when there is no GPU to plan for."""
    device = _gpu_of(args.arch) if args.arch else _own_gpu()
    if device is None:
        print("This machine has no usable GPU. Name one: --arch sm_80 (A100), sm_86, sm_89, sm_90a (H100), sm_120 ...")
        return 2
    if args.sm_count:
        device = dataclasses.replace(device, sm_count=args.sm_count)
    sizes = _sizes(args)
    family = env.kernel()
    print(
        f"{device.name}: {common.arch_of(device)}, {device.sm_count} multiprocessors, {device.l2_bytes >> 20} MiB of L2"
    )
    status = 0
    for direction in ("forward", "backward"):
        try:
            if direction == "forward":
                plan: object = kernels.plan_forward(_problem(args, sizes, common.FORWARD_ARRAYS), device, family=family)
            else:
                problem = _problem(args, sizes, backward.ARRAYS)
                plan = kernels.plan_backward(problem, device, args.deterministic, family=family)
        except Fa2Error as error:
            plan, status = f"no {direction}: {error}", 1
        print(f"\n{plan}")
    return status


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)  # argparse says what of
    return number


def _gpu_of(arch: str) -> DeviceInfo:
    base = arch.removesuffix("a")
    if base not in GPUS:
        raise UnsupportedDevice(f"{arch} is not supported: one of {', '.join(GPUS)} is needed")
    name, sm_count, l2 = GPUS[base]
    digits = base.removeprefix("sm_")
    return DeviceInfo(0, name, (int(digits[:-1]), int(digits[-1])), sm_count, SHARED_MEMORY[base], l2 << 20)


def _own_gpu() -> DeviceInfo | None:
    try:
        return driver.device_info(0)
    except Fa2Error:
        return None


def _sizes(args: argparse.Namespace) -> Sizes:
    """InvalidArgument for what no call could have."""
    seqlen_k = args.seqlen if args.seqlen_k is None else args.seqlen_k
    heads_k = args.heads if args.heads_k is None else args.heads_k
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v
    q = _ref((args.batch, args.seqlen, args.heads, args.head_dim), args.dtype)
    k = _ref((args.batch, seqlen_k, heads_k, args.head_dim), args.dtype)
    v = _ref((args.batch, seqlen_k, heads_k, head_dim_v), args.dtype)
    return Sizes.of({"q": q, "k": k, "v": v}, "bshd")


def _problem(args: argparse.Namespace, sizes: Sizes, names: tuple[str, ...]) -> AttentionProblem:
    """Of contiguous arrays."""
    refs = {name: _ref(sizes.shape(name, "bshd"), "float32" if name == "lse" else args.dtype) for name in names}
    window = check_window("window_size", args.window_size or (-1, -1))
    features = {"window_size": window} if max(window) >= 0 else {}
    options = Options.checked(args.causal, None, "bshd", None, args.deterministic, tuple(features.items()))
    return with_features(AttentionProblem.from_refs(refs, sizes, args.dtype, options), features)


def _ref(shape: tuple[int, ...], dtype: str) -> TensorRef:
    return TensorRef(0, shape, contiguous_strides(shape), dtype, Device("cuda", 0), None)
