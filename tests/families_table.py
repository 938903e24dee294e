"""Write the README's table of families from a test run's report: python tests/families_table.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from test_families import LOADED_WHOLE, STOCK_FAILS
from zoo import FAMILIES

from promoe_triton.patch._families import REFUSED, describe

ROOT = Path(__file__).parents[1]
REPORT = Path(__file__).with_name("families.json")
BEGIN, END = "<!-- families: made by tests/families_table.py -->", "<!-- end of families -->"
MARKS = {"passed": "equal", "failed": "**differs**"}


def render(report: Any) -> str:
    """Return the table, one row for each family, with what the run found."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f'Seen with {versions}, every family as a tiny random model; "equal" is bit for bit, in the prefill and every',
        "decode step (in one forward of a model that does not generate), for five numbers of slots from the fewest",
        "possible to all; from a checkpoint in fp32, half of the experts in slots, through the page cache and past it.",
        "",
        "| family | experts | how they are kept | fp32 | bf16 | from a checkpoint |",
        "|---|---|---|---|---|---|",
    ]
    for name, outcomes in report["families"].items():
        experts, kept = _experts(name)
        if "refused" in outcomes:
            why = next(reason for kind, reason in REFUSED.items() if kind == experts)
            lines.append(f"| {name} | {experts} | refused: {why} | | | |")
            continue
        cells = [_cell(name, outcomes, *variants) for variants in (("fp32",), ("bf16",), ("buffered", "direct"))]
        cells[2] += f", loaded whole: {LOADED_WHOLE[name]}" if name in LOADED_WHOLE else ""
        lines.append(f"| {name} | {experts} | {kept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(name: str, outcomes: dict[str, str], *variants: str) -> str:
    """Return what a run found for these variants; KeyError where it left one out for no reason."""
    reason = STOCK_FAILS.get((name, "checkpoint" if "direct" in variants else variants[0]))
    if reason is not None:
        return f"stock fails: {reason}"
    found = {outcomes[variant] for variant in variants}
    return MARKS["passed"] if found == {"passed"} else MARKS["failed"]


def _experts(name: str) -> tuple[str, str]:
    torch.manual_seed(0)
    for module in FAMILIES[name].build().modules():
        if type(module).__name__ in REFUSED:
            return type(module).__name__, ""
        layout = describe(module)
        if layout is not None:
            kept = [
                "gated" if getattr(module, "has_gate", True) and layout.down else "not gated",
                "biased" if layout.up_bias else "",
                "transposed" if layout.transposed else "",
                "" if getattr(module, "is_concatenated", True) else "interleaved",
                "norm after each expert" if getattr(module, "has_post_expert_norm", False) else "",
                "as a loop over experts" if layout.by_expert else "",
                f"{layout.identities} identities" if layout.identities else "",
            ]
            return type(module).__name__, ", ".join(word for word in kept if word)
    raise AssertionError(f"{name} has no experts")


def section() -> str:
    return f"{BEGIN}\n{render(json.loads(REPORT.read_text()))}\n{END}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(before + section() + after)


if __name__ == "__main__":
    main()
