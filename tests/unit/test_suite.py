"""Rules of the tests themselves: shared helpers live in `tests/helpers`, each mutant fits the source as it is."""

import re
from collections import Counter

from tests.helpers.files import ROOT
from tests.mutants import MUTANTS, SOURCE

# In a program's text within a test as well.
_IMPORT = re.compile(r"^\s*(?:from|import) tests\.[\w.]*\b(?:test_\w+|conftest)\b.*", re.MULTILINE)


def test_no_file_imports_a_test_or_a_conftest() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / "tests").rglob("*.py")
        if (lines := _IMPORT.findall(path.read_text()))
    }
    assert found == {}, "put what both need into tests/helpers"


def test_each_mutants_text_stands_once_in_the_source() -> None:
    texts = {file: (SOURCE / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    assert {mutant.fault: count for mutant in MUTANTS if (count := texts[mutant.file].count(mutant.old)) != 1} == {}
    assert [fault for fault, count in Counter(mutant.fault for mutant in MUTANTS).items() if count > 1] == []
    assert [mutant.fault for mutant in MUTANTS if mutant.old == mutant.new] == []
    missing = {
        test
        for mutant in MUTANTS
        for test in mutant.tests.split()
        if not (ROOT / "tests/unit" / test.partition("::")[0]).exists()
    }
    assert missing == set()
