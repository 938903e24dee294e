"""What a cache of slots holds over a recorded text, without copying ahead: under the policies, and Belady's optimum.

The policies are the ones that run, over the slot tables that run. Letters: T tokens, A active experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from promoe_triton.policies import make_policy
from promoe_triton.protocols import ExpertKey
from promoe_triton.simulation.routing import Ids
from promoe_triton.slots import SlotTable

Mask = NDArray[np.bool_]

BELADY = "belady"
"""The optimum: what is needed last leaves first (L. A. Belady, 1966)."""


def resident(
    policy: str,
    slots: int,
    chosen_TA: Ids,
    experts: int,
    popularity: Mapping[ExpertKey, float],
    named: Sequence[Ids] = (),
) -> Mask:
    """Return which of a layer's experts are in slots when each token comes, bool [T, E].

    popularity: by expert of layer 0, what a static cache goes by. named: [T, K] each, what was predicted for
    every token before it came, earliest first.
    """
    if policy == BELADY:
        return _optimum(slots, chosen_TA, experts)
    table = SlotTable(range(slots), make_policy(policy, popularity))
    keys = [ExpertKey(0, expert) for expert in range(experts)]
    found_TE = np.zeros((len(chosen_TA), experts), dtype=bool)
    for t, chosen in enumerate(chosen_TA.tolist()):
        found_TE[t, [key.expert for key in table.ready()]] = True
        for ids_TK in named:
            table.expect(keys[expert] for expert in reversed(ids_TK[t].tolist()) if expert >= 0)
        wanted = [keys[expert] for expert in chosen if expert >= 0]
        leased = [key for key in wanted if table.is_ready(key)]
        table.lease(leased)
        table.touch(wanted)
        for key in wanted:
            if not table.is_ready(key) and table.admit(key) is not None:
                table.filled(key)
                leased.append(key)
        table.release(leased)
    return found_TE


def _optimum(slots: int, chosen_TA: Ids, experts: int) -> Mask:
    """Keep the experts whose next use is nearest; what is needed now is never in the way of itself."""
    T = len(chosen_TA)
    next_TE = np.full((T + 1, experts), T, dtype=np.int64)
    for t in range(T - 1, -1, -1):
        next_TE[t] = next_TE[t + 1]
        next_TE[t, chosen_TA[t][chosen_TA[t] >= 0]] = t
    held: set[int] = set()
    found_TE = np.zeros((T, experts), dtype=bool)
    for t, chosen in enumerate(chosen_TA.tolist()):
        found_TE[t, list(held)] = True
        held |= {expert for expert in chosen if expert >= 0}
        if len(held) > slots:
            held = {*sorted(held, key=lambda e: (next_TE[t + 1, e], e))[:slots]}
    return found_TE


def hit_ratio(resident_TE: Mask, chosen_TA: Ids) -> float:
    """Return the share of accesses that found their expert in a slot."""
    known_TA = chosen_TA >= 0
    found_TA = np.take_along_axis(resident_TE, np.maximum(chosen_TA, 0).astype(np.int64), 1)
    return float(found_TA[known_TA].mean())
