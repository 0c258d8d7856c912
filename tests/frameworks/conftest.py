"""Before JAX starts: four devices on the CPU, so that shardings have something to shard over."""

import os
from typing import Any

import pytest

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"


@pytest.fixture
def host_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """What is computed on the CPU: the direction and the shape of q."""
    from fa2cupy import host

    seen: list[tuple[str, tuple[int, ...]]] = []
    for name in ("forward", "backward"):
        original = getattr(host, name)

        def spy(framework: Any, arrays: Any, *rest: Any, _name: str = name, _run: Any = original, **more: Any) -> Any:
            seen.append((_name, arrays["q"].shape))
            return _run(framework, arrays, *rest, **more)

        monkeypatch.setattr(host, name, spy)
    return seen
