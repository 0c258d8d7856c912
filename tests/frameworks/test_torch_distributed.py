"""`fa2cupy.attention` on DTensors: batch and heads may be split over a mesh, sequences are gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import fa2cupy


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """2 x 2 ranks of which only the first is there; what it gets from the others is nothing sensible."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("batch", "heads"))
    dist.destroy_process_group()


def distributed(mesh: Any, shape: tuple[int, ...], *placements: Any) -> Any:
    """A tensor of this global shape that requires grad."""
    local = list(shape)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            local[placement.dim] = -(-local[placement.dim] // mesh.size(dim))
    return DTensor.from_local(
        torch.randn(local), mesh, placements, shape=torch.Size(shape), stride=torch.empty(shape).stride()
    ).requires_grad_()


def test_compiled(mesh: Any) -> None:
    """First of all: no eager call has told DTensor about the operators yet."""
    torch.compiler.reset()
    q, k, v = (distributed(mesh, (4, 6, 4, 16), Shard(0), Shard(2)) for _ in range(3))
    compiled = torch.compile(lambda *x: fa2cupy.attention(*x, causal=True), backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v)
    assert out.placements == (Shard(0), Shard(2))
    eager = fa2cupy.attention(q, k, v, causal=True)
    assert torch.equal(out.to_local(), eager.to_local())
    for x, y in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, eager)), strict=True):
        assert torch.equal(x.to_local(), y.to_local())


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("through_lse", [False, True])
def test_batch_and_heads_stay_where_they_are(mesh: Any, layout: str, through_lse: bool) -> None:
    heads = 2 if layout == "bshd" else 1
    shapes = [(4, 6, 8, 16), (4, 6, 2, 16), (4, 6, 2, 24)]
    if layout == "bhsd":
        shapes = [(b, h, s, d) for b, s, h, d in shapes]
    q, k, v = (distributed(mesh, shape, Shard(0), Shard(heads)) for shape in shapes)
    out, lse = fa2cupy.attention(q, k, v, causal=True, layout=layout, return_lse=True)
    assert out.placements == (Shard(0), Shard(heads)) and lse.placements == (Shard(0), Shard(1))
    assert (out.shape[heads], out.shape[3], lse.shape) == (8, 24, (4, 8, 6))
    loss = out.sum() + (lse.sum() if through_lse else 0)
    gradients = torch.autograd.grad(loss, (q, k, v))
    assert all(gradient.placements == (Shard(0), Shard(heads)) for gradient in gradients)
    local = [x.to_local().detach().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = fa2cupy.attention(*local, causal=True, layout=layout, return_lse=True)
    assert torch.equal(out.to_local(), wanted)
    loss = wanted.sum() + (wanted_lse.sum() if through_lse else 0)
    for gradient, other in zip(gradients, torch.autograd.grad(loss, local), strict=True):
        assert torch.equal(gradient.to_local(), other)


@pytest.mark.parametrize("placement", [Shard(1), Shard(3), Partial()])
def test_what_cannot_be_split_is_gathered(mesh: Any, placement: Any) -> None:
    q = distributed(mesh, (4, 6, 4, 16), Replicate(), placement)
    out = fa2cupy.attention(q, q, q)
    assert placement not in out.placements
    assert out.shape == q.shape
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.shape == q.shape


@pytest.mark.parametrize(
    ("key_heads", "placements", "kept"),
    [
        (2, (Replicate(), Shard(2)), False),  # the first dimension of the mesh might come to split them too
        (4, (Replicate(), Shard(2)), True),
        (2, (Shard(0), Shard(2)), True),
        (3, (Shard(0), Shard(2)), False),
        (1, (Shard(0), Shard(2)), False),
    ],
)
def test_heads_are_split_only_into_whole_groups(
    mesh: Any, key_heads: int, placements: tuple[Any, Any], kept: bool
) -> None:
    """Query heads 0-2 of 6 belong to key head 0 of 2: two ranks may share them, three may not."""
    q = distributed(mesh, (4, 6, 12, 16), *placements)
    k, v = (distributed(mesh, (4, 6, key_heads, 16), *placements) for _ in range(2))
    out = fa2cupy.attention(q, k, v)
    assert (Shard(2) in out.placements) == kept


@pytest.mark.parametrize("form", ["packed", "k packed", "seqused", "segments"])
def test_lengths(mesh: Any, form: str) -> None:
    """Used lengths and segments are split with the batch; of packed arrays heads alone are split."""
    packed_q, packed_k = form == "packed", form in ("packed", "k packed")
    shapes = [(20, 4, 16) if packed else (4, 6, 4, 16) for packed in (packed_q, packed_k, packed_k)]
    dims = [1 if packed else 2 for packed in (packed_q, packed_k, packed_k)]
    batch = Replicate() if packed_k else Shard(0)
    q, k, v = (distributed(mesh, shape, batch, Shard(dim)) for shape, dim in zip(shapes, dims, strict=True))

    def integers(*shape: int) -> Any:
        local = [shape[0] if packed_k else shape[0] // 2, *shape[1:]]
        return DTensor.from_local(torch.zeros(local, dtype=torch.int32), mesh, (batch, Replicate()))

    lengths = {"seqused": {"seqused_k": integers(4)}, "segments": {"segment_ids": integers(4, 6)}}.get(form, {})
    lengths |= {
        f"cu_seqlens_{side}": integers(5) for side, packed in zip("qk", (packed_q, packed_k), strict=True) if packed
    }
    out, lse = fa2cupy.attention(q, k, v, return_lse=True, **lengths)
    assert out.placements == (batch, Shard(dims[0])) and lse.placements == (batch, Shard(0 if packed_q else 1))
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert (gradient.placements, gradient.shape) == (x.placements, x.shape)
