"""Renew what is generated in docs/: the rows of the tile tables, in docs/tuning.md; the keywords, in docs/usage.md.

    python tools/docs.py

tests/test_docs.py fails as long as a page differs from what this writes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from fa2cupy.declared import DECLARED  # noqa: E402 - found from anywhere
from fa2cupy.kernels import tiles  # noqa: E402
from fa2cupy.kernels.sm80 import flash_bwd as bwd_sm80  # noqa: E402
from fa2cupy.kernels.sm80 import flash_fwd as fwd_sm80  # noqa: E402
from fa2cupy.kernels.sm90 import flash_bwd as bwd_sm90  # noqa: E402
from fa2cupy.kernels.sm90 import flash_bwd_wide as bwd_sm90_wide  # noqa: E402
from fa2cupy.kernels.sm90 import flash_fwd as fwd_sm90  # noqa: E402
from fa2cupy.keywords import KEYWORDS, OTHER_NAMES  # noqa: E402

__all__ = ["PAGES", "renewed"]

# Fields that have a column of their own, in every table.
_SHOWN = ("head_dim", "head_dim_v", "block_m", "block_n", "num_warps", "note", "spill_bytes", "element_bytes")


def tile_tables(wide: bool = False) -> Iterator[tuple[str, Sequence[Any], Callable[[Any], int]]]:
    """(title, rows, bytes of shared memory of a row) of each table; wide: of float32 and float64. Nothing else here
    knows where the tables are."""

    def padded_bytes(row: Any) -> int:
        return row.shared_mem_bytes(
            tiles.padded_head_dim(row.head_dim, getattr(row, "split", getattr(row, "row_warps", 1)))
        )

    def own_bytes(row: Any) -> int:
        return row.shared_mem_bytes()

    sm80: tuple[tuple[str, dict[int, Any]], ...] = (
        ("forward", fwd_sm80.FWD_TILES),
        ("backward", bwd_sm80.BWD_TILES),
    )
    wider: tuple[tuple[str, dict[int, Any]], ...] = (
        ("forward of float32", fwd_sm80.FWD_TILES_F32),
        ("forward of tf32", fwd_sm80.FWD_TILES_TF32),
        ("backward of float32 and tf32", bwd_sm80.BWD_TILES_F32),
        ("forward of float64", fwd_sm80.FWD_TILES_F64),
        ("backward of float64", bwd_sm80.BWD_TILES_F64),
    )
    for what, tables in wider if wide else sm80:
        for shared_memory, rows in tables.items():
            architectures = [arch for arch, size in tiles.SHARED_MEMORY.items() if size == shared_memory]
            yield f"`sm80` {what}, {shared_memory // 1024} KB ({', '.join(architectures)})", rows, padded_bytes
    if wide:
        return
    for causal, rows in fwd_sm90.FWD_TILES_SM90.items():
        yield f"`sm90` forward, {'causal' if causal else 'full'}", rows, own_bytes
    yield "`sm90` backward", bwd_sm90.BWD_TILES_SM90, own_bytes
    yield "`sm90` backward, wide", bwd_sm90_wide.BWD_TILES_SM90_WIDE, own_bytes


def _cell(value: object, default: object) -> str:
    if value == default:
        return ""
    return "yes" if value is True else "no" if value is False else str(value)


def _table(rows: Sequence[Any], shared_bytes: Callable[[Any], int]) -> Iterator[str]:
    """Lines of Markdown. A field in which no row differs from its default has no column."""
    fields = [field for field in dataclasses.fields(rows[0]) if field.name not in _SHOWN]
    fields = [field for field in fields if any(getattr(row, field.name) != field.default for row in rows)]
    heads = ["head_dim up to", "tile", *(f"`{field.name}`" for field in fields), "KB", "may spill", "why"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        head_dim_v = getattr(row, "head_dim_v", 0)
        cells = [
            f"{row.head_dim}/{head_dim_v}" if head_dim_v else str(row.head_dim),
            f"{row.block_m}x{row.block_n}x{row.num_warps}",
            *(_cell(getattr(row, field.name), field.default) for field in fields),
            str(-(-shared_bytes(row) // 1024)),
            _cell(row.spill_bytes, 0),
            row.note,
        ]
        yield f"| {' | '.join(cells)} |"


def tile_rows(wide: bool = False) -> str:
    """Every row of every table, as they are now."""
    lines = []
    for title, rows, shared_bytes in tile_tables(wide):
        lines += ["", f"**{title}**", "", *_table(rows, shared_bytes)]
    return "\n".join(lines) + "\n"


# The functions of a keyword, in one word.
_PLACES = {
    "attention": "forward",
    "attention_backward": "backward",
    "backward_workspace_bytes": "bytes",
    "attention_with_kvcache": "cache",
    "attention_probabilities": "probabilities",
}
# Named with one of those, or always with them.
_BESIDE = {"attention_vjp", "forward_workspace_bytes", "KVCache", "KVCache.attend"}


def keywords() -> str:
    """Every keyword: those that are there, then those to come."""
    lines = ["", "| keyword | type | in | absent | since | |", "|---|---|---|---|---|---|"]
    for keyword in sorted(KEYWORDS.values(), key=lambda keyword: not keyword.since):
        names = [_PLACES.get(name, f"`{name}`") for name in keyword.functions if name not in _BESIDE]
        absent = ", ".join(f"`{value!r}`" for value in keyword.neutral)
        cells = [f"`{keyword.name}`", f"`{keyword.type}`", ", ".join(names), absent, keyword.since or "to come"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (*cells, keyword.meaning)) + " |")
    return "\n".join(lines) + "\n"


def other_names() -> str:
    """What keywords are called elsewhere."""
    lines = ["", "| elsewhere | here | |", "|---|---|---|"]
    for name, (ours, remark) in OTHER_NAMES.items():
        lines.append(f"| `{name}` | {' or '.join(f'`{target}`' for target in ours)} | {remark} |")
    return "\n".join(lines) + "\n"


def declared_errors() -> str:
    """Every declared error."""
    lines = ["", "| refused | why, or what instead | error |", "|---|---|---|"]
    for entry in DECLARED:
        lines.append(f"| {entry.what} | {entry.why} | `{entry.kind.__name__}` |")
    return "\n".join(lines) + "\n"


# What is generated, by page and by the name in the comments around it.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/tuning.md": {"tile rows": tile_rows},
    "docs/lab/precision.md": {"tile rows": lambda: tile_rows(wide=True)},
    "docs/usage.md": {"keywords": keywords, "other names": other_names, "declared errors": declared_errors},
}


def renewed(page: str, text: str) -> str:
    """`text` of a page with its generated blocks as they should be. A ValueError if a block is not there once."""
    for name, generate in PAGES[page].items():
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        block = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(block.findall(text)) != 1:
            raise ValueError(f"{page} has not exactly one block '{name}' between its two comments")
        content = begin + generate() + end
        text = block.sub(lambda _, content=content: content, text)
    return text


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        new = renewed(page, text)
        path.write_text(new, encoding="utf-8")
        print(f"{page}: {'as it was' if new == text else 'renewed'}")


if __name__ == "__main__":
    main()
