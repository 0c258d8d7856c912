"""The record of the last GPU run is for the sources that are here, and its digest sees code and nothing else."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from tests.gpu import record


def test_the_sources_have_run_on_a_gpu() -> None:
    allowed, sentence = record.verdict(record.read(), record.digest())
    assert allowed, sentence
    if "PENDING" in sentence:
        warnings.warn(sentence, stacklevel=1)


def test_every_pattern_finds_sources() -> None:
    for pattern in record.SOURCES:
        assert list(record.ROOT.glob(pattern)), f"{pattern} matches nothing: was a file renamed?"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a = b;  // why\n", "a=b;"),
        ("a /* x\n y */ + b", "a + b"),
        ("f(x,\n  y);\n\n", "f(x, y);"),
        ('s = "// no comment";', 's = "// no comment"; // but this'),
        ("#define A \\\n  1\nint x;", "#define A 1\nint x;"),
        ("c = '\"'; // \"\n", "c = '\"';"),
    ],
)
def test_layout_and_comments_of_cuda_do_not_count(left: str, right: str) -> None:
    assert list(record.cuda_tokens(left)) == list(record.cuda_tokens(right))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("int a;", "inta;"),
        ("a + +b", "a ++ b"),
        ("x > > y", "x >> y"),
        ("#define A\nB", "#define A B"),
        ('asm("a  b");', 'asm("a b");'),
        ("1.5f", "1 .5f"),
        ("a = 1;", "a = 2;"),
    ],
)
def test_code_of_cuda_counts(left: str, right: str) -> None:
    assert list(record.cuda_tokens(left)) != list(record.cuda_tokens(right))


def test_python_counts_as_a_syntax_tree() -> None:
    plain = "def f(x):\n    return x + 1\n"
    documented = '"""Module."""\n# why\ndef f(x):\n    """Doc."""\n    return (x +\n            1)  # sum\n'
    assert list(record.python_tokens(plain)) == list(record.python_tokens(documented))
    assert list(record.python_tokens(plain)) != list(record.python_tokens(plain.replace("+ 1", "+ 1.0")))
    assert list(record.python_tokens("x = 'a'")) != list(record.python_tokens("x = b'a'"))


def _copy(destination: Path) -> Path:
    for folder in ("cuda_src", "fa2cupy"):
        shutil.copytree(record.ROOT / folder, destination / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return destination


def test_digest_changes_with_a_source_and_with_its_name(tmp_path: Path) -> None:
    root = _copy(tmp_path)
    before = record.digest(root)
    assert before == record.digest()
    source = root / "fa2cupy" / "problem.py"
    text = source.read_text()
    source.write_text(text + "\n# a remark\n")
    assert record.digest(root) == before
    source.write_text(text + "\nX = 1\n")
    assert record.digest(root) != before
    source.write_text(text)
    (root / "fa2cupy" / "kernels").mkdir(exist_ok=True)
    (root / "fa2cupy" / "kernels" / "new.py").touch()
    assert record.digest(root) != before


def test_verdicts() -> None:
    assert record.verdict({"digest": "a", "status": "passed", "device": "X", "date": "D"}, "a")[0]
    allowed, sentence = record.verdict({"digest": "a", "status": "pending", "reason": "no GPU"}, "a")
    assert allowed and "no GPU" in sentence
    for bad in ({}, {"digest": "b", "status": "passed"}, {"digest": "a", "status": "failed"}, {"digest": "a"}):
        assert not record.verdict(bad, "a")[0]


def test_pending_keeps_the_last_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    record.write({"status": "passed", "device": "NVIDIA X", "digest": "old"}, path)
    assert record.main(["--record", str(path)]) == 1
    for reason in ("the first", "the second"):
        assert record.main(["--record", str(path), "--pending", reason]) == 0
        kept = record.read(path)
        assert (kept["status"], kept["reason"], kept["digest"]) == ("pending", reason, record.digest())
        assert kept["last"] == {"device": "NVIDIA X"}
    assert "PENDING" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        record.main(["--record", str(path), "--pending", " "])
