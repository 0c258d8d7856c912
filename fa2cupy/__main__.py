"""``python -m fa2cupy demo | env | compile | plan | run``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

import fa2cupy
from fa2cupy.cli import compile, demo, env, plan, run
from fa2cupy.errors import Fa2Error

# What NumPy's BLAS may read when it is imported.
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:
        what = error.filename or "the output cannot be written"
        print(f"fa2cupy: {what}: {error.strerror or error}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):  # what is still in the buffer would be tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fa2cupy", description="Exact FlashAttention for your arrays.")
    parser.add_argument("--version", action="version", version=f"fa2cupy {fa2cupy.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | env | compile | plan | run")
    for module in (demo, env, compile, plan, run):
        help_line = (module.__doc__ or "").partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=help_line, description=help_line)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
    except Fa2Error as error:
        print(f"fa2cupy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def one_blas_thread() -> None:
    """Start this process again with one BLAS thread, unless somebody has chosen.

    More of them fight for the cores of a busy machine, and NumPy, which reads this when imported, is imported already.
    """
    if hasattr(os, "execve") and os.name == "posix" and not any(name in os.environ for name in _BLAS_THREADS):
        environment = {**os.environ, **dict.fromkeys(_BLAS_THREADS, "1")}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        one_blas_thread()
    sys.exit(main())
