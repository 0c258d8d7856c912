"""The kernels under the address and undefined-behaviour sanitizers: every buffer ends where its malloc ends."""

from __future__ import annotations

import pytest

from tests.host import sanitized


@pytest.mark.parametrize(
    ("backward", "arch"), [(False, "sm_90"), (False, "sm_80"), (True, "sm_90")], ids=["hopper", "forward", "backward"]
)
def test_sanitized(backward: bool, arch: str) -> None:
    """`arch` takes the place of sm_90 in the cases."""
    done = sanitized.python(
        "-c",
        "import dataclasses\n"
        "from tests.host import cases, kernel_run as k\n"
        f"for case in cases.sanitized_cases({backward}):\n"
        f"    case = dataclasses.replace(case, arch={arch!r}) if case.arch == 'sm_90' else case\n"
        f"    k.check(case, {backward}, schedules=(k.Schedule.LOWEST_FIRST,))",
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
