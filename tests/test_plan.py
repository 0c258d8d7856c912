"""What plans have in common: tiles that fit, what is compiled ahead of them, and launches."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from fa2cupy import jit
from fa2cupy.errors import LaunchError
from fa2cupy.jit import driver, tensor_map
from fa2cupy.jit.driver import DeviceInfo
from fa2cupy.kernels import common, compile_jobs, plan_backward, plan_forward
from fa2cupy.kernels import launch as launching
from fa2cupy.kernels.params import FwdTmaParams
from fa2cupy.kernels.sm80.flash_bwd import BwdTile
from fa2cupy.kernels.sm90.flash_bwd import BWD_TILES_SM90
from fa2cupy.kernels.sm90.flash_bwd_wide import BWD_TILES_SM90_WIDE
from fa2cupy.kernels.sm90.flash_fwd import FWD_TILES_SM90
from fa2cupy.kernels.tiles import SHARED_MEMORY
from fa2cupy.spec import SoftmaxSpec
from tests.fake_driver import FakeDriver, FakeMap, fake_driver
from tests.gpu.cases import Case, problem_of
from tests.plan_cases import A100, B200, H200, backward_problem, main_launch, problem


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90"])
def test_every_pair_of_head_dims_has_a_tile_that_fits(arch: str) -> None:
    device = DeviceInfo(0, "", (int(arch[3]), int(arch[4])), 100, SHARED_MEMORY[arch], 40 << 20)
    for head_dim, head_dim_v in itertools.product(range(8, 257, 8), repeat=2):
        case = Case(2048, 2048, head_dim, "bfloat16", True, 1, (16, 1), head_dim_v=head_dim_v)
        launches = plan_forward(problem_of(case, False), device).launches
        plan = plan_backward(problem_of(case, True), device, False)
        for launch in launches + plan.launches:
            assert launch.config.shared_mem_bytes <= SHARED_MEMORY[arch]
            if launch.arch != "sm_90a":  # where a row's head dims are those of its kernels
                assert ("FA2_HEAD_DIM_V" in launch.defines) == (head_dim != head_dim_v)
        if isinstance(plan.tile, BwdTile):
            for width in common.padded_head_dims(plan.problem, plan.tile.split):
                assert width % (16 * plan.tile.split) == 0
        else:
            assert max(head_dim, head_dim_v) <= plan.tile.head_dim


def test_jobs_of_sm90a() -> None:
    jobs = compile_jobs("sm_90a", True)
    own = [job for job in jobs if job.arch == "sm_90a"]
    beside = [job for job in jobs if job.arch != "sm_90a"]  # with the kernels beside the backward
    assert all(job in beside for job in compile_jobs("sm_90", True))
    sources = [[job for job in own if job.source == f"sm90/flash_{name}.cu"] for name in ("fwd", "bwd", "bwd_wide")]
    forward, backward, wide = sources
    assert len({job.label for job in own}) == len(own) == sum(map(len, sources))
    assert len(forward) == 2 * sum(map(len, FWD_TILES_SM90.values()))
    # Wide ones always from zeros; the others, if not deterministic, or not, but shared full ones always.
    assert len(backward) == 2 * 11 * len(BWD_TILES_SM90) and len(wide) == 2 * 8 * len(BWD_TILES_SM90_WIDE)
    assert {job.defines["FA2_HEAD_DIM"] for job in compile_jobs("sm_90a", False) if job.arch == "sm_90a"} == {64, 128}
    compiled = [(job.name, job.arch, dict(job.defines)) for job in jobs]
    launches = (main_launch(plan_forward(problem(head_dim=128, causal=True), H200)),)
    for head_dim, length, causal, heads in itertools.product((64, 256), (300, 5000), (False, True), ((1, 1), (8, 1))):
        wanted = backward_problem(length, length, head_dim, "float16", causal, 1, heads)
        for deterministic, dlse in itertools.product((False, True), (None, SoftmaxSpec((1, 1, 1)))):
            launches += plan_backward(dataclasses.replace(wanted, softmax=dlse), H200, deterministic).launches
    assert {launch.defines.get("FA2_DLSE", 0) for launch in launches} == {0, 1}
    assert all((launch.name, launch.arch, dict(launch.defines)) in compiled for launch in launches)


@pytest.mark.parametrize("device", [A100, H200, B200], ids=lambda device: device.name)
def test_jobs_of_a_head_dim_of_v_of_its_own(device: DeviceInfo) -> None:
    arch = common.arch_of(device) + "a" * (device is H200)
    pairs = [job for job in compile_jobs(arch, True) if "FA2_HEAD_DIM_V" in job.defines]
    assert {(job.defines["FA2_HEAD_DIM"], job.defines["FA2_HEAD_DIM_V"]) for job in pairs} == {(192, 128)}
    assert all("head_dim 192/128" in job.label for job in pairs)
    compiled = [dict(job.defines) for job in pairs]
    wanted = Case(2048, 2048, 192, "float16", True, head_dim_v=128)
    launches = plan_forward(problem_of(wanted, False), device).launches
    for deterministic in (False, True):
        launches += plan_backward(problem_of(wanted, True), device, deterministic).launches
    assert all(launch.defines in compiled for launch in launches)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """A driver that records launches, and kernels that need no compiling."""
    loaded = SimpleNamespace(function=lambda device_index, shared_mem_bytes: 0x1234)
    monkeypatch.setattr(jit, "kernel", lambda *args, **options: loaded)
    monkeypatch.setattr(jit, "kernels", lambda *args, **options: ())
    tensor_map.encode.cache_clear()
    with fake_driver(monkeypatch) as found:
        found["params_bytes"] = ctypes.sizeof(FwdTmaParams)
        with driver.device_guard(0):
            yield found
    tensor_map.encode.cache_clear()


MAPS = ("q", "k", "v", "out")


def arrived(fake: FakeDriver, index: int = -1) -> tuple[dict[str, FakeMap], FwdTmaParams]:
    """The maps of a launch, and its struct."""
    content = bytes(fake.launches[index].params[: ctypes.sizeof(FwdTmaParams)])
    params = FwdTmaParams.from_buffer_copy(content)
    return {name: FakeMap.from_buffer_copy(bytes(getattr(params, name))) for name in MAPS}, params


CAUSAL = problem(250, 200, causal=True)
Q_SKIPPED, LSE_SKIPPED = 50 * 2 * 4 * 64, 50 * 4


def test_bound_launch(fake: FakeDriver) -> None:
    launch = main_launch(plan_forward(CAUSAL, H200))
    bound = dataclasses.replace(plan_forward(CAUSAL, H200), launches=(launch,)).bind(0)
    pointers = (0x10000, 0x20000, 0x30000, 0x40000, 0x50004)
    for number in range(3):
        bound(pointers, 7)
        maps, params = arrived(fake)
        assert [each.address for each in maps.values()] == [0x10000 + Q_SKIPPED, 0x20000, 0x30000, 0x40000 + Q_SKIPPED]
        assert params.lse == 0x50004 + LSE_SKIPPED
        assert fake.launches[-1].stream == 7 and len(fake.launches) == number + 1
    assert fake["encode_count"] == 4
    content = bytes(fake.launches[-1].params[: len(launch.params)])
    assert content == launch.pack(pointers)
    assert content[520:] == launch.params[520:]  # strides, shape and scale, as planned
    # Everything may change, alone or together, and come back.
    for position in (0, 1, 2, 3, 4, None, 2, None):
        changed = tuple(p + 0x1000 * (position in (i, None)) for i, p in enumerate(pointers))
        bound(changed, 0)
        assert bytes(fake.launches[-1].params[: len(launch.params)]) == launch.pack(changed)
        bound(pointers, 0)
        assert bytes(fake.launches[-1].params[: len(launch.params)]) == content
    assert fake["encode_count"] == 8


def test_pack_takes_another_encoder() -> None:
    launch = main_launch(plan_forward(CAUSAL, H200))
    seen = []

    def encode(spec: tensor_map.TensorMapSpec, pointer: int) -> bytes:
        seen.append((spec, pointer))
        return bytes([len(seen)]) * 128

    packed = launch.pack((1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20), encode)
    assert bytes(packed[:512]) == b"".join(bytes([number]) * 128 for number in (1, 2, 3, 4))
    assert [pointer for _, pointer in seen] == [(1 << 20) + Q_SKIPPED, 2 << 20, 3 << 20, (4 << 20) + Q_SKIPPED]
    assert [spec for spec, _ in seen] == [each.spec for each in launch.tensor_maps]
    assert FwdTmaParams.from_buffer_copy(packed).lse == (5 << 20) + LSE_SKIPPED


def test_a_refused_map_leaves_nothing_wrong(fake: FakeDriver) -> None:
    bound = plan_forward(problem(), H200).bind(0)
    good = (0x10000, 0x20000, 0x30000, 0x40000, 0x50000)
    bound(good, 0)
    with pytest.raises(LaunchError, match=r"cuTensorMapEncodeTiled.*at address 0x20008"):
        bound((0x11000, 0x20008, 0x31000, 0x41000, 0x51000), 0)
    assert len(fake.launches) == 1
    bound(good, 0)
    maps, params = arrived(fake)
    assert [each.address for each in maps.values()] == list(good[:4]) and params.lse == good[4]


def test_nothing_to_launch(fake: FakeDriver) -> None:
    plan = plan_forward(problem(0, 128), H200)
    assert not plan.launches
    plan.bind(0)((0x10000, 0x20000, 0x30000, 0x40000, 0x50000), 0)
    assert not fake.launches


def test_a_launch_finds_its_context(fake: FakeDriver) -> None:
    """In a thread where the device's context is not current; and what is wrong with a launch is said of its kernel."""
    bound = plan_forward(problem(), H200).bind(0)
    pointers = (0x10000, 0x20000, 0x30000, 0x40000, 0x50000)
    bound(pointers, 0)
    fake["needs_context"] = 1
    for there in (pointers, tuple(pointer << 8 for pointer in pointers)):  # the struct of before, and a new one
        thread = threading.Thread(target=bound, args=(there, 0))
        thread.start()
        thread.join()
    assert [launch.context for launch in fake.launches] == [0x1000] * 3
    fake["launch_status"] = 700
    with pytest.raises(LaunchError, match=r"700: an illegal memory access.*grid="):
        bound(pointers, 0)


def test_what_was_launched_is_kept_within_bounds(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_MAX_READY", 8)
    monkeypatch.setattr(launching, "_ready", {})
    bound = plan_forward(problem(), H200).bind(0)
    for number in (*range(20), 19):
        bound(tuple((number << 32) + (i << 16) for i in range(5)), number)
        assert launching._ready and len(launching._ready) <= 8
        maps, params = arrived(fake)
        assert [each.address for each in maps.values()] == [(number << 32) + (i << 16) for i in range(4)]
        assert params.lse == (number << 32) + (4 << 16) and fake.launches[-1].stream == number


def test_threads_launch_their_own_arrays(fake: FakeDriver) -> None:
    bound = plan_forward(problem(), H200).bind(0)
    barrier = threading.Barrier(6)

    def work(number: int) -> None:
        barrier.wait()
        for step in range(100):
            bound(tuple((number << 32) + (i << 16) + 16 * (step % 7) for i in range(5)), number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake.launches) == 600
    for index, launch in enumerate(fake.launches):
        maps, params = arrived(fake, index)
        addresses = [*(each.address for each in maps.values()), params.lse]
        assert {address >> 32 for address in addresses} == {launch.stream}
        assert len({address & 0xFFFF for address in addresses}) == 1
