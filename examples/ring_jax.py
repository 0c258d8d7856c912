"""A sequence that no device holds: ring attention over a mesh axis, forward and backward.

    python examples/ring_jax.py [--seqlen 1024]

Uses all devices that JAX finds; on a CPU four are pretended. Every device keeps its part of the queries; keys and
values travel around the ring, and the pieces are merged by their log-sum-exps.
"""

import argparse
import functools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # of the CPU; GPUs count themselves

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import fa2cupy.jax

parser = argparse.ArgumentParser()
parser.add_argument("--seqlen", type=int, default=1024)
args = parser.parse_args()

devices = len(jax.devices())
mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
shard = PartitionSpec(None, "sequence")
rng = np.random.default_rng(0)
dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
q, k, v = (jnp.asarray(rng.standard_normal((1, args.seqlen, 4, 64)), dtype) for _ in range(3))

ring = jax.shard_map(
    functools.partial(fa2cupy.jax.ring_attention, axis_name="sequence", causal=True),
    mesh=mesh,
    in_specs=(shard,) * 3,
    out_specs=shard,
)
whole = functools.partial(fa2cupy.attention, causal=True)


def loss(attention, q, k, v):
    return (attention(q, k, v).astype("float32") ** 2).sum()


def difference(a, b):
    return float(jnp.abs(a.astype("float32") - b.astype("float32")).max())


print(f"{devices} devices, {args.seqlen // devices} of {args.seqlen} tokens each")
print(f"out: largest difference {difference(jax.jit(ring)(q, k, v), whole(q, k, v)):.1e}")
for name, a, b in zip(
    ("dq", "dk", "dv"),
    jax.jit(jax.grad(functools.partial(loss, ring), (0, 1, 2)))(q, k, v),
    jax.grad(functools.partial(loss, whole), (0, 1, 2))(q, k, v),
    strict=True,
):
    limit = 1e-4 if dtype == "float32" else 5e-2
    print(f"{name}: largest difference {difference(a, b):.1e}")
    assert difference(a, b) <= limit * float(jnp.abs(b.astype("float32")).max())
