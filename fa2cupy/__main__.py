"""``python -m fa2cupy demo | env | compile | plan``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fa2cupy.cli import compile, demo, env, plan
from fa2cupy.errors import Fa2Error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fa2cupy", description="Exact FlashAttention for your arrays.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | env | compile | plan")
    for module in (demo, env, compile, plan):
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


if __name__ == "__main__":
    sys.exit(main())
