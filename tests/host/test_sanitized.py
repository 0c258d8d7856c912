"""The kernels under the address and undefined-behaviour sanitizers: every buffer ends where its malloc ends."""

from __future__ import annotations

import pytest

from tests.host import sanitized


@pytest.mark.parametrize("hopper", [False, True], ids=["sm80", "sm90"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_sanitized(backward: bool, hopper: bool) -> None:
    done = sanitized.python(
        "-c",
        "from tests.host import cases, kernel_run as k\n"
        f"for case in cases.sanitized_cases({backward}, {hopper}):\n"
        f"    assert (k.prepare(case, {backward}).plan.family == 'sm90') == {hopper}\n"
        f"    k.check(case, {backward}, schedules=(k.Schedule.LOWEST_FIRST,))",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
