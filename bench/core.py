"""What the decisions of a layer take at batch 1: gate, misses, chunks, release and speculation, nothing else.

No bytes move and no predictor runs: events go in and plans come out, as from a link and a layer, by all that a model
has by default (also the caches that are reckoned to try whether predictions pay). 48 layers of 128 experts, half of
them in slots, 8 needed per token. Each layer is predicted twice, two layers and one layer ahead, all 8 of its experts;
of 2.5 missing, 2 are let ahead of need, and the others are asked for at the gate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import record

from promoe_triton.config import Config
from promoe_triton.core import make_core
from promoe_triton.policies import make_policy
from promoe_triton.protocols import Cuts, ExpertKey, Part, Seam, Transfer
from promoe_triton.slots import SlotTable
from promoe_triton.speculation import Place, Ranking, Speculation

LAYERS, EXPERTS, SLOTS, ACTIVE, CHUNK = 48, 128, 64, 8, 4 << 20
CUTS = Cuts(ends=(3 << 20, 6 << 20, 9 << 20))
LAYER_SECONDS = 1e-3
"""What a layer seems to take; together with the link's bandwidth it says how much is let ahead."""


def cuts(transfer: Transfer) -> Cuts:
    return CUTS


class Model:
    """Layers that need `misses` absent experts each, on average, and otherwise what is in slots."""

    def __init__(self, misses: float, seed: int = 0) -> None:
        tables = [SlotTable(range(SLOTS), make_policy(Config().replacement, {})) for _ in range(LAYERS)]
        self.core = make_core(Config(), tables, cuts)
        self._speculation, self._now = Speculation(always=True), 0.0
        self._misses = misses
        self._bandwidth = CUTS.ends[-1] * misses / 4 / LAYER_SECONDS
        self._random = random.Random(seed)
        for layer in range(LAYERS):
            self._serve(layer, list(range(SLOTS)))

    def _serve(self, layer: int, experts: list[int], rankings: Sequence[Ranking] = ()) -> None:
        core = self.core
        needs = core.gate(layer, experts)
        for key in needs.missing:
            core.ask(key, Part.WHOLE)
        if rankings:
            self._speculation.queue(core, Place(layer, Seam.ROUTED), 1, rankings, self._bandwidth)
        self._drive()
        core.release([*needs.resident, *needs.missing])

    def _drive(self) -> None:
        core = self.core
        while (chunk := core.next_chunk(CHUNK, CHUNK)) is not None:
            if core.landed(chunk):
                core.finished(chunk.transfer)

    def _draw(self, layer: int, misses: int) -> list[int]:
        ready = [key.expert for key in self.core.tables[layer].ready()]
        absent = [expert for expert in range(EXPERTS) if expert not in {*ready}]
        return self._random.sample(ready, ACTIVE - misses) + self._random.sample(absent, misses)

    def steps(self, layers: int) -> float:
        """Run so many layers; return seconds per layer in the core."""
        taken, core = 0.0, self.core
        whole, part = divmod(self._misses, 1.0)
        needed: dict[int, list[int]] = {}
        for index in range(layers):
            layer, later = index % LAYERS, [(index + ahead) % LAYERS for ahead in (1, 2)]
            for to in (layer, *later):
                if to not in needed:
                    needed[to] = self._draw(to, int(whole) + (self._random.random() < part))
            ranked = [[ExpertKey(to, expert) for expert in needed[to]] for to in later]
            rankings = [Ranking(to <= layer, keys) for to, keys in zip(later, ranked, strict=True)]
            experts = needed.pop(layer)
            self._now += LAYER_SECONDS
            began = time.perf_counter()
            self._speculation.routed(layer, 1, self._now, 0.0, core.absent)
            self._serve(layer, experts, rankings)
            taken += time.perf_counter() - began
        return taken / layers


def main() -> None:
    args = record.arguments(__doc__ or "").parse_args()
    record.confine()
    results = record.results(args, "core")
    layers, repeats, long = (480, 2, 4_800) if args.quick else (2_400, 5, 48_000)
    for misses, target in ((2.5, 40.0), (0.0, 10.0)):
        case = f"{misses:g} misses per layer"
        if results.has(case):
            continue
        results.begin()
        model = Model(misses)
        early = [model.steps(layers) * 1e6 for _ in range(repeats)]
        model.steps(long)
        late = [model.steps(layers) * 1e6 for _ in range(repeats)]
        results.write(
            [
                record.row(case, "at the start", "core", "us/layer", early, target=target, better="lower"),
                record.row(case, f"after {long:,} layers", "core", "us/layer", late, target=target, better="lower"),
            ]
        )


if __name__ == "__main__":
    main()
