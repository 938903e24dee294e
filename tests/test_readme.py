"""The README tells what was seen."""

from __future__ import annotations

import json

from families_table import REPORT, ROOT, section
from zoo import FAMILIES


def test_families_table_is_made_from_the_report() -> None:
    assert section() in (ROOT / "README.md").read_text()


def test_report_covers_every_family_and_all_of_it_passed() -> None:
    families = json.loads(REPORT.read_text())["families"]
    assert families.keys() == FAMILIES.keys()
    assert {outcome for outcomes in families.values() for outcome in outcomes.values()} == {"passed"}
