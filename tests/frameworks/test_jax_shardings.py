"""fa2cupy.attention on meshes of four devices of the CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fa2cupy
import fa2cupy.jax
from fa2cupy.errors import InvalidArgument, InvalidType
from tests.frameworks.jax_problems import B, D, H, S, X, assert_close, gradients, normal, ours, theirs, weighted
from tests.frameworks.jax_versions import set_mesh

BATCH_AND_HEADS = P("data", None, "model", None)


def mesh_of(kind: str) -> Any:
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_auto_mesh_needs_no_collective(host_calls: Any, layout: str) -> None:
    *arrays, weight = X
    attention = ours
    spec = BATCH_AND_HEADS
    if layout == "bhsd":
        spec = P("data", "model", None, None)

        def attention(q: Any, k: Any, v: Any) -> Any:
            return fa2cupy.attention(q, k, v, causal=True, layout="bhsd")

    def turn(array: Any) -> Any:
        return array.swapaxes(1, 2) if layout == "bhsd" else array

    placed = [jax.device_put(turn(array), NamedSharding(mesh_of("Auto"), spec)) for array in arrays]
    derived = gradients(attention, turn(weight))
    for run, wanted in ((attention, theirs(*arrays)), (derived, gradients(theirs, weight)(*arrays))):
        compiled = jax.jit(run).lower(*placed).compile()
        assert_close(jax.tree.map(turn, compiled(*placed)), wanted)
        assert not [word for word in COLLECTIVES if word in compiled.as_text()]
    shard = (1, S, H // 2, D) if layout == "bshd" else (1, H // 2, S, D)
    assert {shape for _, shape in host_calls} == {shard}


def test_sequence_shards_are_gathered(host_calls: Any) -> None:
    *arrays, _ = X
    placed = [jax.device_put(array, NamedSharding(mesh_of("Auto"), P("data", "model"))) for array in arrays]
    assert_close(jax.jit(ours)(*placed), theirs(*arrays))
    assert {shape for _, shape in host_calls} <= {(1, S, H, D), (B, S, H, D)}


def test_explicit_mesh() -> None:
    *arrays, weight = X
    mesh = mesh_of("Explicit")
    wanted = theirs(*arrays), gradients(theirs, weight)(*arrays)
    with set_mesh(mesh):
        sharding = NamedSharding(mesh, BATCH_AND_HEADS)
        placed = [jax.device_put(np.asarray(array), sharding) for array in (*arrays, weight)]
        assert_close(jax.jit(ours)(*placed[:3]), wanted[0])
        assert_close(jax.jit(gradients(ours, placed[3]))(*placed[:3]), wanted[1])


def line_of(kind: str) -> Any:
    return jax.make_mesh((4,), ("line",), axis_types=(getattr(jax.sharding.AxisType, kind),))


def problem(heads: int, heads_k: int) -> tuple[Any, Any, Any, Any]:
    return (
        normal(0, 4, S, heads, D),
        normal(1, 4, S, heads_k, D),
        normal(2, 4, S, heads_k, D),
        normal(3, 4, S, heads, D),
    )


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("heads", "heads_k", "of_q", "of_k", "shard"),
    [
        # Key heads have a device each along the first axis; along the second they are shared.
        (8, 2, P(None, None, ("data", "model")), P(None, None, "data"), (4, S, 2, D)),
        (4, 1, P(None, None, ("data", "model")), P(), (4, S, 1, D)),
        # Where key heads cannot follow, axes are given up.
        (4, 2, P(None, None, "line"), P(), (4, S, 4, D)),
        # Keys are put where the queries are.
        (4, 4, P("data"), P(None, None, "model"), (2, S, 4, D)),
        (4, 4, P(None, "data", None, "model"), P(), (4, S, 4, D)),
    ],
)
def test_grouped_heads(
    host_calls: Any, kind: str, heads: int, heads_k: int, of_q: Any, of_k: Any, shard: tuple[int, ...]
) -> None:
    *arrays, weight = problem(heads, heads_k)
    mesh = line_of(kind) if "line" in of_q else mesh_of(kind)
    placed = [
        jax.device_put(np.asarray(array), NamedSharding(mesh, spec))
        for array, spec in zip(arrays, (of_q, of_k, of_k), strict=True)
    ]
    derive = jax.jit(jax.value_and_grad(weighted(ours, np.asarray(weight)), (0, 1, 2)))
    assert_close(derive(*placed), jax.jit(jax.value_and_grad(weighted(theirs, weight), (0, 1, 2)))(*arrays), 1e-4)
    assert {shape for _, shape in host_calls} == {shard}


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_vmap_of_sharded_arrays(kind: str) -> None:
    arrays = [jnp.stack([array, -array]) for array in X]
    sharding = NamedSharding(mesh_of(kind), P(None, *BATCH_AND_HEADS))
    q, k, v, weight = (jax.device_put(np.asarray(array), sharding) for array in arrays)
    derived = jax.jit(jax.vmap(lambda q, k, v, w: gradients(ours, w)(q, k, v)))(q, k, v, weight)
    assert_close(derived, jax.vmap(lambda q, k, v, w: gradients(theirs, w)(q, k, v))(*arrays))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_keys_on_every_device(check_vma: bool) -> None:
    """Queries sharded by sequence, keys not: the gradients of k and v are summed over the devices."""
    *arrays, weight = X
    plain = jax.nn.dot_product_attention
    mapped = jax.shard_map(
        fa2cupy.attention,
        mesh=line_of("Auto"),
        in_specs=(P(None, "line"), P(), P()),
        out_specs=P(None, "line"),
        check_vma=check_vma,
    )
    derive = jax.jit(jax.value_and_grad(weighted(mapped, weight), (0, 1, 2)))
    assert_close(derive(*arrays), jax.value_and_grad(weighted(plain, weight), (0, 1, 2))(*arrays))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shard_map_over_some_axes(kind: str) -> None:
    *arrays, weight = X
    sharding = NamedSharding(mesh_of(kind), BATCH_AND_HEADS)
    placed = [jax.device_put(np.asarray(array), sharding) for array in arrays]
    mapped = jax.shard_map(
        ours, mesh=sharding.mesh, in_specs=(P("data"),) * 3, out_specs=P("data"), axis_names={"data"}
    )
    derive = jax.jit(gradients(mapped, np.asarray(weight)))
    if kind == "Auto" and not getattr(jax.config, "jax_use_shardy_partitioner", True):
        with pytest.raises(InvalidArgument, match=r"shard_map over data alone, of the mesh's axes .* needs Shardy"):
            derive(*placed)
        return
    assert_close(derive(*placed), gradients(theirs, weight)(*arrays))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    *arrays, weight = X
    mapped = jax.shard_map(
        ours, mesh=mesh_of("Auto"), in_specs=(BATCH_AND_HEADS,) * 3, out_specs=BATCH_AND_HEADS, check_vma=check_vma
    )
    assert_close(jax.jit(mapped)(*arrays), theirs(*arrays))
    assert_close(jax.jit(gradients(mapped, weight))(*arrays), gradients(theirs, weight)(*arrays))


def test_ring_attention_errors() -> None:
    q, k, v, _ = X
    for more, words in (
        ({"layout": "bhsd"}, r"ring_attention\(\) has no keyword 'layout'.*bshd"),
        ({"return_lse": True}, r"ring_attention\(\) has no keyword 'return_lse'"),
        ({"causal": True}, r"16 queries and 8 keys on a device: causal=True needs as many of each"),
    ):
        with pytest.raises((InvalidArgument, InvalidType), match=words):
            fa2cupy.jax.ring_attention(q, k[:, :8], v[:, :8], "line", **more)


@pytest.mark.parametrize("causal", [False, True])
def test_ring_attention(causal: bool) -> None:
    *arrays, weight = X
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = P(None, "sequence")
    ring = jax.shard_map(
        functools.partial(fa2cupy.jax.ring_attention, axis_name="sequence", causal=causal),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=spec,
    )
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    assert_close(jax.jit(ring)(*arrays), plain(*arrays))
    assert_close(jax.jit(gradients(ring, weight))(*arrays), gradients(plain, weight)(*arrays))
