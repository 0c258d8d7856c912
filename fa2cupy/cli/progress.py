"""A progress bar where tqdm is installed and somebody is watching, one line or silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def counter(total: int, description: str) -> Iterator[Callable[[], None]]:
    """Within the block a bar on stderr counts to `total`; call what is yielded once for each step."""
    try:
        from tqdm import tqdm
    except ImportError:
        if sys.stderr.isatty():
            print(f"{description} ... (pip install tqdm to see how far it is)", file=sys.stderr)
        yield lambda: None
        return
    # disable=None is tqdm's own word for "only on a terminal".
    with tqdm(total=total, desc=description, leave=False, ascii=" -", disable=None, dynamic_ncols=True) as bar:

        def step() -> None:
            bar.update()

        yield step


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield `items`, showing how far along they are."""
    with counter(len(items), description) as step:
        for item in items:
            yield item
            step()
