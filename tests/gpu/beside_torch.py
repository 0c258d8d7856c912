"""fa2cupy beside torch and JAX alone, on a GPU: CuPy is hidden, NVRTC comes from their wheels, libcuda by ctypes.

    python tests/gpu/beside_torch.py

starts itself anew in an environment where nothing can import CuPy (whether it is installed or not), with an empty
kernel cache: torch tensors against the oracle, forward and backward; JAX arrays against torch's bits; then once more
with the full cache, where NVRTC must stay unloaded. Exit status 0 if all is right.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDE = """
import importlib.machinery
import sys


class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends")
        return None if hidden else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        found = super().find_distributions(*context)
        return (each for each in found if not (each.metadata["Name"] or "").startswith("cupy"))


sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
"""


def outer() -> int:
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory(prefix="fa2cupy-beside-torch-") as folder:
        (Path(folder) / "sitecustomize.py").write_text(HIDE)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(root), os.environ.get("PYTHONPATH", "")]),
            "FA2CUPY_CACHE_DIR": str(Path(folder) / "cache"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        for cache in ("empty", "full"):
            status = subprocess.run([sys.executable, __file__, cache], env=environment, cwd=root).returncode
            if status:
                return status
        subprocess.run([sys.executable, "-m", "fa2cupy", "env"], env=environment, cwd=root)
    return 0


def inner(cache: str) -> int:
    import torch

    import fa2cupy
    from fa2cupy.jit import compiler, nvrtc
    from tests.gpu.cases import Case
    from tests.gpu.runner import check, inputs_of

    if importlib.util.find_spec("cupy") is not None:
        print("CuPy is not hidden")
        return 1
    device = torch.device("cuda", 0)
    print(f"{cache} cache: torch {torch.__version__}, {torch.cuda.get_device_name(0)}, no CuPy", flush=True)

    case = Case(150, 203, 64, "bfloat16", True, heads=(6, 3), seed=11, given=False)
    x = inputs_of(case, device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    out, lse = fa2cupy.attention(x["q"], x["k"], x["v"], causal=True, return_lse=True)
    gradients = fa2cupy.attention_backward(x["dout"], x["q"], x["k"], x["v"], out, lse, causal=True, deterministic=True)
    torch.cuda.synchronize()
    print(f"first forward and backward: {time.perf_counter() - start:.2f} s")
    if cache == "full":
        loaded = [line for line in Path("/proc/self/maps").read_text().splitlines() if "nvrtc" in line]
        print(f"NVRTC compiled nothing: {not compiler.nvrtc_is_loaded()} ({len(loaded)} mappings of it, torch's own)")
        if compiler.nvrtc_is_loaded():
            return 1

    problems = []
    for each in (
        case,
        Case(1024, 1024, 128, "bfloat16", True, heads=(8, 2)),
        Case(307, 256, 128, "float16", False),
        Case(203, 113, 256, "bfloat16", True),
    ):
        problems += check(each, True, device)

    import jax

    arrays = {name: jax.dlpack.from_dlpack(tensor.contiguous().clone()) for name, tensor in x.items()}
    torch.cuda.synchronize()
    jax_out, jax_lse = fa2cupy.attention(arrays["q"], arrays["k"], arrays["v"], causal=True, return_lse=True)
    jax_gradients = fa2cupy.attention_backward(
        *(arrays[name] for name in ("dout", "q", "k", "v")), jax_out, jax_lse, causal=True, deterministic=True
    )
    names = ("out", "lse", "dq", "dk", "dv")
    for name, ours, theirs in zip(names, (out, lse, *gradients), (jax_out, jax_lse, *jax_gradients), strict=True):
        if not isinstance(theirs, jax.Array):
            problems.append(f"JAX {name} is a {type(theirs)}")
        elif not torch.equal(ours, torch.from_dlpack(jax.block_until_ready(theirs))):
            problems.append(f"JAX {name} differs from torch's")
    print(f"jax {jax.__version__}: {len(problems)} problems", *problems, sep="\n")
    if cache == "empty":
        print(f"NVRTC {compiler.nvrtc_build()} by {type(nvrtc.load()).__name__} from {compiler.nvrtc_path()}")
    return 1 if problems or "cupy" in sys.modules else 0


if __name__ == "__main__":
    sys.exit(inner(sys.argv[1]) if sys.argv[1:] else outer())
