"""run: a program with fa2cupy in flash_attn's place, in it and in every Python that it starts."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from fa2cupy.env import FLASH_ATTN
from fa2cupy.errors import InvalidArgument
from fa2cupy.install import install_as_flash_attn

_STARTUP = Path(__file__).resolve().parent.parent / "startup"  # holds a sitecustomize.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The program, its arguments, and --force."""
    parser.usage = "python -m fa2cupy run [--force] (SCRIPT | -m MODULE | PROGRAM) [ARGUMENT ...]"
    parser.add_argument("--force", action="store_true", help="replace a flash-attn that is installed")
    rest = argparse.REMAINDER
    parser.add_argument("-m", dest="module", nargs=rest, metavar="MODULE", help="run a module, as python -m does")
    parser.add_argument("program", nargs=rest, help="a Python file, or a program such as torchrun or accelerate")


def run(args: argparse.Namespace) -> int:
    """Become the program: its process is this one."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise InvalidArgument("python was started with -E, -I or -S, and so reads no PYTHONPATH: run works through it")
    install_as_flash_attn(args.force)  # refuses here, rather than in each process below
    command = _command(args.module, args.program)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment(os.environ, args.force))


def _command(module: list[str] | None, program: list[str]) -> list[str]:
    if module:
        return [sys.executable, *_interpreter_options(), "-m", *module]
    if not program:
        raise InvalidArgument("run needs a Python file, -m MODULE, or a program on the PATH")
    path = Path(program[0])
    if path.suffix != ".py":
        # The programs of a virtual environment that is not activated are beside its interpreter.
        found = shutil.which(program[0]) or shutil.which(program[0], path=str(Path(sys.executable).parent))
        if found is not None:
            return [found, *program[1:]]
    if not path.exists():
        raise InvalidArgument(f"{program[0]} is neither a file nor a program on the PATH")
    return [sys.executable, *_interpreter_options(), *program]


def _interpreter_options() -> list[str]:
    """What stands between python and -m fa2cupy."""
    given = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    if len(given) < 2 or given[-1] != "fa2cupy":
        return []
    *options, last = given[:-1]
    return options if last == "-m" else [*options, last.removesuffix("m")]  # -um is -u -m


def environment(current: Mapping[str, str], force: bool) -> dict[str, str]:
    """The variables with which every Python puts fa2cupy in flash_attn's place."""
    before = current.get("PYTHONPATH", "")
    paths = [entry for entry in before.split(os.pathsep) if entry != str(_STARTUP)] if before else []
    return {
        **current,
        "PYTHONPATH": os.pathsep.join([str(_STARTUP), *paths]),
        FLASH_ATTN.name: "force" if force else "1",
    }
