"""Create or refresh the virtual environment that the Makefile's targets run in.

    python tools/setup_venv.py --venv .venv --extras demo

installs this checkout, editable, with the named extras. ``demo`` becomes demo-cuda13 with a driver of R580 or newer,
demo-cuda12 with R525 or newer, and stays without CuPy where there is no GPU. ``cuda`` becomes cuda13 or cuda12, and
cuda12 without a GPU: the tests compile the kernels with NVRTC, which needs none. What is installed is noted in the
environment; nothing runs again until pyproject.toml, setup.cfg, the interpreter or the place of the checkout changes.

Runs on the system's interpreter, before anything is installed: standard library only.
"""

import argparse
import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 10)


def stop(message):
    sys.exit("setup: " + message)


def driver_cuda_version():
    """CUDA version of the driver as 1000 * major + 10 * minor; 0 without a usable GPU."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(name)
        except OSError:
            continue
        count, version = ctypes.c_int(0), ctypes.c_int(0)
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
            return 0
        cuda.cuDriverGetVersion(ctypes.byref(version))
        return version.value
    return 0


def cuda_extra(cuda_version):
    """The extra of pyproject.toml that suits a driver, or None. CUDA 13 came with R580, CUDA 12 with R525."""
    if cuda_version >= 13000:
        return "cuda13"
    if cuda_version >= 12000:
        return "cuda12"
    return None


def resolve_extras(words):
    """Replace ``demo`` and ``cuda`` by the extras for this machine."""
    found = cuda_extra(driver_cuda_version())
    chosen = {"demo": "demo-" + found if found else "demo", "cuda": found or "cuda12"}
    return {chosen.get(word, word) for word in words}


def venv_python(venv):
    return venv / ("Scripts/python.exe" if platform.system() == "Windows" else "bin/python")


def fingerprint():
    digest = hashlib.sha256()
    for part in (sys.version, sys.base_prefix, str(ROOT)):
        digest.update(part.encode())
    for name in ("pyproject.toml", "setup.cfg"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def create(venv):
    print(f"setup: creating {venv.name} with Python {platform.python_version()}", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    result = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        stop(
            f"{sys.executable} cannot create a virtual environment. On Debian and Ubuntu that is a package:\n"
            f"    apt-get install python3-venv        (or python{version}-venv)\n"
            f"What it said:\n{(result.stdout + result.stderr).strip()}"
        )


def install(venv, extras):
    target = ".[{}]".format(",".join(extras)) if extras else "."
    print(f"setup: installing fa2cupy{target[1:]} (once, until pyproject.toml or setup.cfg changes)", flush=True)
    command = [str(venv_python(venv)), "-m", "pip", "install", "-qq", "--editable", target]
    if subprocess.run(command, cwd=ROOT).returncode:
        stop(f"pip could not install {target}; what it said is above. Once, this needs a network or a package mirror.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--extras", default="", help="comma-separated; demo and cuda suit this machine")
    args = parser.parse_args()
    if sys.version_info < MIN_PYTHON:
        stop(f"Python 3.10 or newer is needed, this is {platform.python_version()}: make PYTHON=python3.12 ...")

    venv = ROOT / args.venv
    extras = resolve_extras([word for word in args.extras.split(",") if word])
    stamp = venv / "installed.txt"
    lines = stamp.read_text().splitlines() if stamp.is_file() and venv_python(venv).exists() else []
    if not lines or lines[0] != fingerprint():
        create(venv)
        lines = []
    installed = set(lines[1:])
    if lines and installed >= extras:
        return
    wanted = installed | extras
    if len({"cuda12" if "cuda12" in extra else "cuda13" for extra in wanted if "cuda" in extra}) > 1:
        # The driver changed since the first set-up, and CuPy's wheels for CUDA 12 and 13 exclude each other.
        create(venv)
        wanted = extras
    install(venv, sorted(wanted))
    stamp.write_text("\n".join([fingerprint(), *sorted(wanted)]) + "\n")


if __name__ == "__main__":
    main()
