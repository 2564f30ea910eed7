"""Every row of the table of formulas is below its bound, and names a test that exists."""

import re
from pathlib import Path

import formulas
import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("row", formulas.FORMULAS, ids=lambda row: row.deviation.__name__)
def test_the_two_sides_agree(row):
    assert row.deviation() <= row.bound


@pytest.mark.parametrize("row", formulas.FORMULAS, ids=lambda row: row.deviation.__name__)
def test_its_test_exists(row):
    file, name = row.test.split("::")
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE)
