"""What the pages say is so: their links and anchors lead somewhere, docs/README.md lists them, what is generated is
current, the pages about the kernels name what is in the code. And what holds for every file: its length, no path of
somebody's machine, no package index."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import docs

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("cuda_src/**/*.cu*"), *ROOT.glob("fa2cupy/**/*.py"), ROOT / "tests" / "reference.py"]
# Pages that name code, and what else they set in its type: the paper's sign, arguments, instructions.
NAMING = {
    "docs/algorithm.md": {"*", "causal=True", "deterministic=True", "red.add"},
    "docs/forward_sm90.md": {"FA2CUPY_KERNEL=sm80", "str(plan)"},
    "docs/backward.md": {"FA2CUPY_KERNEL=sm80", "str(plan)", "cp.reduce.async.bulk .add.f32", "stmatrix.trans"},
}
HOMES = (".", "cuda_src", "fa2cupy")  # what paths in these pages begin at

FOLDERS = ("fa2cupy", "cuda_src", "tests", "tools", "examples", "benchmarks", "docs", ".ci")
CODE = {".py", ".pyi", ".cu", ".cuh", ".cpp", ".c", ".h", ".sh"}
TEXT = {"", ".cff", ".cfg", ".in", ".json", ".md", ".toml", ".txt"} | CODE
FILES = [
    *(path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")),
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()),
]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in FILES
    if path.suffix in TEXT and "__pycache__" not in path.parts
}
PAGES = {name: text for name, text in TEXTS.items() if name.endswith(".md")}

MAX_LINES = 480
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _prose(page: str) -> Iterator[str]:
    """Lines of a page that are no code, neither fenced nor indented."""
    fenced = False
    for line in page.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield line


def _anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for line in _prose(page):
        heading = re.match(r"#+ +(.*)", line)
        if heading:
            text = re.sub(r"\]\([^)]*\)", "]", heading[1]).lower()
            anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            number = 0
            while (name := f"{anchor}-{number}" if number else anchor) in found:
                number += 1
            found.add(name)
    return found


def _links(page: str) -> Iterator[str]:
    for line in _prose(page):
        yield from (link for link in LINK.findall(line) if not re.match(r"\w+:", link))


def _broken(name: str, link: str) -> str | None:
    """What is wrong with a link of a page, if anything."""
    path, _, anchor = link.partition("#")
    target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
    if not target.exists():
        return f"{name}: {link} is not there"
    if anchor and target.suffix == ".md" and anchor not in _anchors(target.read_text(encoding="utf-8")):
        return f"{name}: {link} names no heading of {target.name}"
    return None


def test_links_lead_somewhere() -> None:
    links = [(name, link) for name, page in PAGES.items() for link in _links(page)]
    assert len(links) > 80
    assert [problem for name, link in links if (problem := _broken(name, link))] == []


def test_a_broken_link_or_anchor_is_found() -> None:
    assert _broken("docs/README.md", "tuning.md#how-to-measure") is None
    assert _broken("docs/README.md", "../README.md#install") is None
    assert _broken("docs/README.md", "tuning.md#how-to-guess") is not None
    assert _broken("docs/README.md", "no_such_page.md") is not None
    page = "# A `b_c`, d: e/f\n\n## Twice\n\n```\n# no heading\n```\n\n## Twice\n"
    assert _anchors(page) == {"a-b_c-d-ef", "twice", "twice-1"}


def test_pages_that_code_names_are_there() -> None:
    """Comments and messages lead to pages, too."""
    named = {
        (name, page)
        for name, text in TEXTS.items()
        for page in re.findall(r"(?<![\w/.])(?:docs|cuda_src|benchmarks)/[\w/]+\.md", text)
    }
    assert named
    assert sorted(f"{name} names {page}" for name, page in named if page not in PAGES) == []


@pytest.mark.parametrize("index", ["docs/README.md", "docs/lab/README.md"])
def test_an_index_lists_every_page_beside_it(index: str) -> None:
    folder = Path(index).parent
    pages = {Path(name).name for name in PAGES if Path(name).parent == folder} - {"README.md"}
    assert pages
    assert sorted(pages - set(_links(PAGES[index]))) == []


def test_maps_have_every_folder_and_every_kernel_file() -> None:
    folders = {f"{name.split('/')[0]}/" for name in TEXTS if "/" in name and not name.startswith(".")}
    folders |= {
        f"fa2cupy/{name.split('/')[1]}/" for name in TEXTS if name.startswith("fa2cupy/") and name.count("/") > 1
    }
    assert sorted(folder for folder in folders if not re.search(rf"^    {folder}", PAGES["README.md"], re.M)) == []
    sources = {name.removeprefix("cuda_src/") for name in TEXTS if re.search(r"^cuda_src/.*\.cuh?$", name)}
    listed = set(re.findall(r"^\| `([\w/]+\.cuh?)`", PAGES["cuda_src/README.md"], re.M))
    assert sources ^ listed == set()


@pytest.mark.parametrize("page", docs.PAGES)
def test_what_is_generated_is_current(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert docs.renewed(page, text) == text, "run `python tools/docs.py`"


def test_a_stale_block_is_renewed_and_a_lost_one_reported() -> None:
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    assert text.count("| 160 | 128x48x4 |") == 2
    assert docs.renewed("docs/tuning.md", text.replace("| 160 | 128x48x4 |", "| 160 | 128x32x4 |")) == text
    with pytest.raises(ValueError, match="tile rows"):
        docs.renewed("docs/tuning.md", text.replace("<!-- tile rows: end -->", ""))


def test_notes_of_rows_say_how_much_shared_memory_they_take() -> None:
    noted = 0
    for title, rows, shared_bytes in (*docs.tile_tables(), *docs.tile_tables(wide=True)):
        for row in rows:
            for said in re.findall(r"(?<!need )\b(\d+) KB", row.note):
                noted += 1
                assert abs(shared_bytes(row) / 1024 - int(said)) < 1, f"{title}, head_dim {row.head_dim}: {row.note}"
    assert noted > 20


def test_tuning_stays_short() -> None:
    """Its rounds belong into docs/lab."""
    assert len(PAGES["docs/tuning.md"].splitlines()) <= 250


def test_files_stay_short() -> None:
    lines = {name: text.count("\n") for name, text in TEXTS.items() if name.startswith(("fa2cupy/", "cuda_src/"))}
    assert len(lines) > 50
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_nothing_belongs_to_one_machine() -> None:
    """No absolute path of a home or a mount, no package index: what is written here runs anywhere."""
    private = re.compile(
        r"(?<![\w.])/(?:home|root|work|Users|mnt|srv)/|pypi\.org|pythonhosted\.org|pytorch\.org/whl|--(?:extra-)?index-u"
    )
    slash, dash = "/", "--"
    assert private.search(f"see {slash}home/user/x") and private.search(f"pip {dash}index-url x")
    assert not private.search("docs/lab/work/x")
    found = [f"{name}: {hit[0]}" for name, text in TEXTS.items() if (hit := private.search(text))]
    assert found == []


@pytest.fixture(scope="module")
def code() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


@pytest.mark.parametrize("page", NAMING)
def test_everything_that_a_page_names_is_in_the_code(page: str, code: str) -> None:
    names = set(re.findall(r"`([^`\n]+)`", PAGES[page])) - NAMING[page]
    assert len(names) > 30
    files = {path.name for path in SOURCES}

    def found(name: str) -> bool:
        name = re.sub(r"(\[\w+\])+$", "", name)  # a barrier of several
        if name in code or name in files or any((ROOT / folder / name).is_file() for folder in HOMES):
            return True
        owner, _, member = name.partition("::")
        return bool(member) and f"struct {owner}" in code and re.search(rf"\b{member}\b", code) is not None

    assert sorted(name for name in names if not found(name)) == []
