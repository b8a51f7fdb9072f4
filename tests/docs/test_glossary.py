"""Glossary and decisions name things that exist: a renamed class, test or report makes its page fail."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
GLOSSARY = ROOT / "docs/glossary.md"
DECISIONS = sorted((ROOT / "docs/decisions").glob("*.md"))
RECORDS = [page for page in DECISIONS if page.name[0].isdigit()]


def _source() -> str:
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "examples/one_file.py"]
    return "\n".join([path.read_text() + path.stem for path in files] + [path.parent.name for path in files])


def _rows() -> list[tuple[str, str]]:
    """Word and names in the code of each row."""
    found = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", GLOSSARY.read_text(), re.M)
    return [(word, names) for word, names in found if not word.startswith(("word", "---"))]


def _is_in(source: str, name: str) -> bool:
    """Whether a class is defined, or any other name stands in the source."""
    before = "class " if name[0].isupper() else r"(?<!\w)"
    return re.search(rf"{before}{re.escape(name)}(?!\w)", source) is not None


def test_the_glossarys_names_are_in_the_source() -> None:
    source = _source()
    rows = _rows()
    assert len(rows) > 50
    missing = [
        (word, name) for word, names in rows for name in re.findall("`([^`]+)`", names) if not _is_in(source, name)
    ]
    assert missing == []
    assert all("`" in names for _, names in rows)
    assert not _is_in(source, "MadeUpImageRef")  # the control


def test_a_word_is_defined_once() -> None:
    words = [word for word, _ in _rows()]
    assert sorted(set(words)) == sorted(words)


@pytest.mark.parametrize("page", RECORDS, ids=lambda page: page.name)
def test_a_decision_has_a_date_its_alternatives_and_what_decided_it(page: Path) -> None:
    text = page.read_text()
    number = page.name[:4]
    assert text.startswith(f"# {number}: ")
    assert re.search(r"^Date: \d{4}-\d\d-\d\d$", text, re.M)
    for part in ("Decision", "Alternatives", "What decided it"):
        assert f"**{part}.**" in text, part


def test_decisions_are_numbered_and_listed() -> None:
    assert [page.name[:4] for page in RECORDS] == [f"{number:04}" for number in range(1, len(RECORDS) + 1)]
    index = (ROOT / "docs/decisions/index.md").read_text()
    assert [page.name for page in RECORDS if page.name not in index] == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.name)
def test_what_a_decision_names_as_evidence_exists(page: Path) -> None:
    text = page.read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    guards = re.findall(r"`(test_\w+)`", text)
    assert [guard for guard in guards if f"def {guard}(" not in tests] == []
    paths = re.findall(r"`((?:benchmarks|examples|tests|docs)/[\w./-]+|[a-z]+(?:/[a-z]+)*/\w+\.py)`", text)
    assert [path for path in paths if not ((ROOT / path).exists() or (ROOT / "src/pointillist" / path).exists())] == []
