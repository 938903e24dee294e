"""Fit the simulator to two columns of the authors' development table: LRU (hits and times), and everything resident.

Two numbers say how tokens are routed (popularity, reuse) and are fitted to the hit ratios of LRU; what one operation
costs the host follows from the time with everything resident, and the link's bandwidth from the times of LRU. Nothing
else is fitted, to nothing else.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean

import numpy as np
from stage import FITTED, Fitted, published, run, scene, shape_of

from promoe_triton.simulation.routing import Routed, Statistics, Synthetic

TABLE = published()["development"]
NAME = "deepseek-moe-16b"


def lru_hits(text: Routed, experts: int, shares: list[float]) -> list[float]:
    """Return the hit ratios of an LRU cache of each size, a token at a time, from stack distances.

    The first 100 tokens fill the caches and do not count.
    """
    hits, n = np.zeros(len(shares)), 0
    for ids_TA in text.ids:
        stack = list(range(experts))
        for t, row in enumerate(ids_TA.tolist()):
            if t >= 100:
                depths = [stack.index(e) for e in row]
                n += len(row)
                hits += [sum(d < round(share * experts) for d in depths) for share in shares]
            for e in row:
                stack.remove(e)
            stack[:0] = row
    return (hits / n).tolist()


def fit_routing(quick: bool) -> tuple[float, float]:
    """Return popularity and reuse with the least mean error of hits, from a grid."""
    layer = shape_of(NAME).layers[0]
    wanted, best = TABLE["columns"]["lru"]["hits"], (9.0, 0.0, 0.0)
    step = 0.06 if quick else 0.02
    for popularity in np.arange(0.34, 0.5, step):
        for reuse in np.arange(0.18, 0.36, step):
            found = Statistics(popularity=float(popularity), reuse=float(reuse), accuracy=())
            text = Synthetic(found, [(layer.experts, layer.active)] * (2 if quick else 6)).text(500)
            hits = lru_hits(text, layer.experts, TABLE["shares"])
            error = fmean(abs(a - b) for a, b in zip(hits, wanted, strict=True))
            best = min(best, (error, float(popularity), float(reuse)))
    print(f"hits of LRU within {best[0]:.3f} on average")
    return round(best[1], 3), round(best[2], 3)


def fit(quick: bool) -> Fitted:
    popularity, reuse = fit_routing(quick)
    found = Fitted(popularity=popularity, reuse=reuse, launch_seconds=1.5e-5, link_bandwidth=24e9)
    count, tokens = (2, 12) if quick else (3, 64)
    resident = fmean(TABLE["resident_ms"]) / 1e3
    for _ in range(3):
        took = run(scene(NAME, found, count, tokens, roomy=True), slots=1.0, ablation="lru").tpot_seconds
        found = _with(found, launch_seconds=found.launch_seconds * resident / took)
    low, high = 10e9, 40e9
    for _ in range(5 if quick else 10):
        found = _with(found, link_bandwidth=(low + high) / 2)
        of = scene(NAME, found, count, tokens, roomy=True)
        excess = fmean(
            run(of, slots=share, ablation="lru").tpot_seconds * 1e3 / ms - 1.0
            for share, ms in zip(TABLE["shares"], TABLE["columns"]["lru"]["ms"], strict=True)
        )
        low, high = (found.link_bandwidth, high) if excess > 0 else (low, found.link_bandwidth)
    return found


def _with(found: Fitted, **values: float) -> Fitted:
    cells = {name: getattr(found, name) for name in Fitted.__slots__}
    return Fitted(**cells | values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a coarse grid and short texts; writes nothing")
    args = parser.parse_args()
    found = fit(args.quick)
    values = {name: getattr(found, name) for name in Fitted.__slots__}
    print(values)
    if not args.quick:
        about = "fitted to the LRU and the 100 % columns of the development table by bench/paper/fit.py"
        FITTED.write_text(json.dumps({"source": about, "values": values}, indent=1) + "\n")


if __name__ == "__main__":
    main()
