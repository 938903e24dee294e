"""How much of what is predicted is queued: what the link can bring before the layer comes."""

from __future__ import annotations

import pytest

from promoe_triton.core import Core
from promoe_triton.policies import make_policy
from promoe_triton.protocols import PAGE, Cuts, ExpertKey, Part, Seam
from promoe_triton.slots import SlotTable
from promoe_triton.speculation import Place, Ranking, Speculation

LAYERS, EXPERTS = 4, 16
MILLISECOND = 1 / 1024
"""One that adds up without rounding."""
EXPERT = 6 * PAGE
BANDWIDTH = 2.5 * EXPERT / MILLISECOND
"""The link brings two experts and a half in a millisecond."""
HERE = Place(0, Seam.ROUTED)


class Run:
    """A model at its first layer, whose layers take so many seconds, and as many as `stalled` of waiting."""

    def __init__(self, seconds: float, stalled: float = 0.0) -> None:
        tables = [SlotTable(range(EXPERTS), make_policy("lru", {})) for _ in range(LAYERS)]
        self.core = Core(tables, lambda _: Cuts(ends=(EXPERT,)))
        self.speculation = Speculation(always=True)
        for i in range(LAYERS + 1):
            self.speculation.routed(i % LAYERS, 1, 1.0 + i * (seconds + stalled), i * stalled, 0)
            self.core.gate(i % LAYERS, [])

    def queue(self, *ahead: int) -> list[int]:
        """Rank all experts of layers so far ahead; return how many of each are on their way by then."""
        rankings = [Ranking(0, [ExpertKey(layer, expert) for expert in range(EXPERTS)]) for layer in ahead]
        self.speculation.queue(self.core, HERE, 1, rankings, BANDWIDTH)
        tallies = self.core.tallies()
        return [tallies[layer].issued for layer in ahead]


@pytest.mark.parametrize(
    ("milliseconds", "stalled", "queued"),
    [
        pytest.param(1.0, 0.0, [3, 2, 3], id="one"),  # 2.5; 5 less 3; 7.5 less 5
        pytest.param(1.0, 7.0, [3, 2, 3], id="one and much waiting"),
        pytest.param(2.0, 0.0, [5, 5, 5], id="two"),
        pytest.param(0.25, 0.0, [1, 1, 0], id="a quarter"),  # 0.625; 1.25 less 1; 1.875 less 2
    ],
)
def test_all_but_the_last_fit_into_what_the_link_brings(milliseconds: float, stalled: float, queued: list[int]) -> None:
    run = Run(milliseconds * MILLISECOND, stalled * MILLISECOND)
    assert run.queue(1, 2, 3) == queued


def test_what_is_queued_counts_until_it_is_on_its_way_or_waited_for() -> None:
    run = Run(MILLISECOND)
    assert run.queue(1) == [3]
    assert run.queue(1) == [3], "there are three where two and a half fit"
    assert run.core.next_chunk(EXPERT) is not None
    assert run.queue(1) == [4], "there were two"
    for expert in (1, 2):
        run.core.ask(ExpertKey(1, expert), Part.WHOLE)
    assert run.queue(1) == [6], "one was still to be copied ahead"


def test_what_is_for_later_layers_takes_no_room() -> None:
    run = Run(MILLISECOND)
    assert run.queue(3) == [8]
    assert run.queue(1) == [3]
