"""One patched model at run time: its layers, their slots, and the one link that fills them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from promoe_triton.backends.choice import make_backend
from promoe_triton.budget import RAM, Budget, first_experts, free_memory
from promoe_triton.config import Config, format_size
from promoe_triton.core import Core, make_core
from promoe_triton.counters import Ahead, Counters, Stats
from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout
from promoe_triton.links.choice import make_link
from promoe_triton.links.streams import Order, streams_of
from promoe_triton.policies import make_policy
from promoe_triton.predictors.choice import make_predictor
from promoe_triton.predictors.reach import Reach
from promoe_triton.prefetch import Outlook, Prefetcher, read
from promoe_triton.protocols import Call, ExpertKey, Link, Part, Policy, Predictor, Store, Transfer, expert_key
from promoe_triton.slots import SlotTable
from promoe_triton.speculation import PROMPT
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.host import HostStore, ResidentStore
from promoe_triton.techniques import Step
from promoe_triton.timeline import Timeline
from promoe_triton.waves import RECENT, Waves

Popularity = Mapping[ExpertKey, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the host knows of a call: its experts; those of a prompt's last tokens (None: all tokens count alike); those
    that were predicted with it.
    """

    experts: Collection[int]
    recent: Sequence[int] | None
    named: Sequence[Sequence[int]]


class LayerRuntime:
    """The experts of one layer: what is readable now, and how the rest comes.

    With `table` None every expert is placed for good: the store's tensors are the slots.
    """

    def __init__(
        self,
        model: ModelRuntime,
        index: int,
        module: nn.Module,
        layout: ExpertLayout,
        table: SlotTable | None,
    ) -> None:
        self.model = model
        self.index = index
        self.layout = layout
        self.table = table
        self.kernels = model.backend.layer(module, layout, model.store.specs[index])
        self.keys = [expert_key(index, expert) for expert in range(layout.experts)]
        self.uses = [0] * layout.experts
        self.resident = False
        self._bound = table is not None

    @property
    def experts(self) -> int:
        return self.layout.experts

    @property
    def step(self) -> Step:
        return self.model.config.step

    @property
    def core(self) -> Core:
        return self.model.core

    @property
    def link(self) -> Link:
        return self.model.open_link()

    @property
    def counters(self) -> Counters:
        return self.model.counters

    def has(self, part: Part) -> bool:
        return bool(self.model.store.specs[self.index].names(part))

    def remove(self, expert: int) -> None:
        self.kernels.remove(expert)

    def waited(self, began: float) -> None:
        self.model.note("stall", f"layer {self.index} waits", began)

    def dropped(self, keys: Sequence[ExpertKey]) -> None:
        model = self.model
        if model.timeline is not None:
            experts, now = ", ".join(str(key.expert) for key in keys), model.now()
            model.timeline.add("copy", f"layer {self.index} drops {experts}", "dropped", now, now)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts of the layer."""
        return self.model.store.specs[self.index].nbytes * self.layout.experts

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerRuntime:
        raise PromoeError("a part of a patched model cannot be copied; copy the whole model, or unpatch it first")

    def bind(self, module: nn.Module) -> None:
        """Place the experts of a layer whose parameters are its slots, unless that has been done."""
        if self._bound:
            return
        for expert in range(self.layout.experts):
            cut = {n: self.layout.cut(module.get_parameter(n).detach(), expert) for n in self.layout.names}
            self.kernels.place(expert, cut)
        self._bound = self.resident = True

    def unbind(self) -> None:
        """The parameters are about to change: look at them again before the next call."""
        self._bound = self.table is not None

    def stack(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the layer's stacked parameters, read back from the store, or as they rest in the host's memory."""
        if isinstance(self.model.store, HostStore):
            return dict(self.model.store.stacked(self.index))
        stacked = {
            name: torch.zeros(module.get_parameter(name).shape, dtype=module.get_parameter(name).dtype)
            for name in self.layout.names
        }
        for expert in range(max(self.layout.stacked(tensor) for tensor in stacked.values())):
            for name, tensor in self.model.store.load(ExpertKey(self.index, expert)).items():
                self.layout.cut(stacked[name], expert).copy_(tensor)
        return stacked

    def run(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, ids_by_token: bool) -> Tensor:
        """Compute one call: resident experts first, the others as they arrive, while later ones are copied ahead.

        ids_by_token: whether rows of the ids are tokens, so that predictors can learn from them.
        """
        kernels, model = self.kernels, self.model
        call = kernels.begin(x_TD, expert_ids_TA, weights_TA)
        if self.resident and model.is_settled:
            if x_TD.is_cpu:  # elsewhere looking would wait for the device
                self._count(call.experts)
                model.counters.hits += len(call.experts)
            self._compute(kernels.up, call, None)
            kernels.activate(call)
            self._compute(kernels.down, call, None)
            return kernels.combine(call)
        began, absent = model.now(), model.core.absent
        ids_TA = expert_ids_TA if ids_by_token else None
        model.begin_change()
        try:
            # The host reads a device once, so predictions come first there; else what is missing is asked for first.
            ahead = None if x_TD.is_cpu else self._look_ahead(x_TD, ids_TA, began, absent)
            known = self._read(call, ids_TA, ahead)
            self._count(known.experts)
            waves = Waves(self, known.experts, known.recent)
            if x_TD.is_cpu:
                ahead = self._look_ahead(x_TD, ids_TA, began, absent)
            if ahead is not None and model.prefetcher is not None:
                model.prefetcher.speculate(ahead, known.named or model.read(ahead.tensors))
            for wave in waves.up():
                self._compute(kernels.up, call, wave)
            kernels.activate(call)
            for wave in waves.down():
                self._compute(kernels.down, call, wave)
            waves.close()
        except BaseException:
            model.start_afresh(0.0)
            raise
        model.end_change()
        return kernels.combine(call)

    def _look_ahead(self, x_TD: Tensor, ids_TA: Tensor | None, began: float, absent: int) -> Outlook | None:
        model = self.model
        if model.prefetcher is None:
            return None
        asked = model.now()
        ahead = model.prefetcher.routed(self.index, x_TD, ids_TA, began, absent)
        model.note("predict", f"layer {self.index} predicts", asked)
        return ahead

    def _read(self, call: Call, ids_TA: Tensor | None, ahead: Outlook | None) -> _Known:
        """Read what the host must know of a call, and of what was predicted with it."""
        asked = call.asked
        tensors = [] if asked is None else [asked]
        is_prompt = ids_TA is not None and len(ids_TA) >= PROMPT
        if ids_TA is not None and is_prompt:
            tensors.append(ids_TA[-RECENT:].flatten())
        lists = self.model.read(tensors + (ahead.tensors if ahead else []))
        experts = call.experts if asked is None else sorted({e for e in lists.pop(0) if 0 <= e < self.experts})
        recent = lists.pop(0) if is_prompt else None
        return _Known(experts=experts, recent=recent, named=lists)

    def _count(self, experts: Collection[int]) -> None:
        for expert in experts:
            self.uses[expert] += 1

    def _compute(
        self, product: Callable[[Any, Sequence[int] | None], None], call: Call, wave: Sequence[int] | None
    ) -> None:
        model = self.model
        if model.timeline is None:
            product(call, wave)
            return
        began = model.now()
        product(call, wave)
        experts = "all" if wave is None else ", ".join(map(str, wave))
        model.note("compute", f"layer {self.index} {product.__name__} of {experts}", began)

    def place(self, keys: Sequence[ExpertKey]) -> None:
        """Let the kernels know where those of these experts lie that have arrived since they last looked."""
        for key, tensors in self.model.open_link().arrivals(keys).items():
            self.kernels.place(key.expert, tensors)

    def check_resident(self) -> None:
        """Note when every expert has a slot of its own: from then on nothing can leave."""
        table = self.table
        if table is not None and not self.model.budget.shared and table.holds(self.keys):
            self.place(self.keys)  # also what was copied ahead and never asked for
            self.resident = True
            self.model.check_settled()


class ModelRuntime:
    """Everything a patched model owns beside its modules. Made by `patch`, ended by `close`."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        store: Store,
        budget: Budget,
        modules: Sequence[nn.Module],
        layouts: Sequence[ExpertLayout],
        popularity: Popularity,
    ) -> None:
        self.config = config
        self.device = device
        self.store = store
        self.budget = budget
        self.backend = make_backend(config.backend, device, Path(config.tiles) if config.tiles else None)
        self.popularity = popularity
        self.home = device
        self.originals: list[dict[str, nn.Parameter]] = []
        self._lock = threading.RLock()
        streams = streams_of(device)
        self._order = Order(streams)
        self._dirty = False
        self.link: Link | None = None
        self.prefetcher: Prefetcher | None = None
        self.timeline: Timeline | None = None
        self._filling_seconds = 0.0
        tables: Sequence[SlotTable | None] = [None] * len(modules)
        if isinstance(store, CheckpointStore | HostStore):
            self.link = make_link(config, device, streams, store, budget)
            self.core = self._core(self.link)
            self.link.restart(self.core)
            tables = self.core.tables
        # The link's clock, not this object's own: two that hold each other would outlive their model.
        self.counters = Counters(self.link.now) if self.link else Counters()
        self.layers = [
            LayerRuntime(self, index, module, layout, table)
            for index, (module, layout, table) in enumerate(zip(modules, layouts, tables, strict=True))
        ]
        self.is_settled = self.link is None

    def _core(self, link: Link) -> Core:
        return make_core(self.config, self.budget.tables(self.store.specs, self._policy), link.cuts)

    def _policy(self) -> Policy:
        return make_policy(self.config.replacement, self.popularity)

    def watch(self, model: nn.Module, paths: Sequence[str]) -> None:
        """Copy ahead from now on what the predictor names, if there is one and experts rest in a store."""
        if self.prefetcher is not None:
            self.prefetcher.remove()
            self.prefetcher = None
        config = self.config
        if self.link is None or not config.predicts:
            return
        predictor: Predictor | None
        if isinstance(config.predictor, str | Path):
            experts = {path: layer.layout.experts for path, layer in zip(paths, self.layers, strict=True)}
            reach = Reach(distance=config.distance, width=config.width)
            predictor = make_predictor(str(config.predictor), model, experts, reach)
        else:
            predictor = config.predictor
        if predictor is not None:
            self.prefetcher = Prefetcher(self, predictor)
            self.prefetcher.watch(model, paths)

    @contextmanager
    def inside(self) -> Iterator[bool]:
        """Between two layers of a forward: whether no other thread's forward is inside a layer."""
        alone = self.link is not None and self._lock.acquire(blocking=False)
        try:
            if alone:
                self._order.follow()
                self.begin_change()
            yield alone
            if alone:
                self.end_change()
        finally:
            if alone:
                self._lock.release()

    def now(self) -> float:
        """Return the time by the link's clock."""
        return time.perf_counter() if self.link is None else self.link.now()

    @property
    def stall_seconds(self) -> float:
        """Seconds that layers have waited for copies: the host, or the device by itself."""
        return self.counters.stall_seconds + (self.link.waited_seconds if self.link else 0.0)

    def read(self, tensors: Sequence[Tensor]) -> list[list[int]]:
        """Return integer (or boolean) tensors as lists. On a device the host waits once for all of them, and counts."""
        self.counters.host_reads += bool(tensors) and not tensors[0].is_cpu
        return read(tensors)

    def note(self, kind: str, name: str, began: float) -> None:
        """Put what ends now on the computing thread's lane of the timeline, if one is kept."""
        if self.timeline is not None:
            self.timeline.add("compute", name, kind, began, self.now())

    def copy_for(self, modules: Sequence[nn.Module]) -> ModelRuntime:
        """Return an independent runtime over the same store, for copies of the same modules."""
        if self.budget.nbytes:
            self.check_room("a copy of the model, with slots of its own,", self.budget.nbytes, self.device)
        layouts = [layer.layout for layer in self.layers]
        store = self.store if self.link is not None else ResidentStore(modules, layouts)
        return ModelRuntime(self.config, self.device, store, self.budget, modules, layouts, self.popularity)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts of the model."""
        return sum(layer.nbytes for layer in self.layers)

    def check_read_back(self, purpose: str, nbytes: int | None = None) -> None:
        """Raise PromoeError unless weights that rest in files fit in memory: `nbytes` of them, default all experts."""
        if not isinstance(self.store, HostStore):
            self.check_room(purpose, self.expert_bytes if nbytes is None else nbytes)

    def check_room(self, purpose: str, nbytes: int, device: torch.device = RAM) -> None:
        """Raise PromoeError unless `nbytes` fit in the memory that is free."""
        needed, free = nbytes, free_memory(device)
        if needed > free:
            raise PromoeError(f"{purpose} needs {format_size(needed)} of memory, but only {format_size(free)} are free")

    def enter(self, layer: int) -> None:
        """Let one forward in at a time, in order; raise PromoeError when another stays inside too long."""
        self._acquire()
        self._order.follow()
        self.counters.enter(layer)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads' forwards out of the layers meanwhile; wait for the one that is inside."""
        try:
            self._acquire()
            yield
        finally:
            self.release()

    def _acquire(self) -> None:
        if not (self._lock.acquire(blocking=False) or self._lock.acquire(timeout=self.config.lock_timeout)):
            raise PromoeError(
                f"waited {self.config.lock_timeout:g} s for another thread's forward through this model; "
                "raise lock_timeout, or patch a copy of the model per thread"
            )

    def leave(self, layer: int, tokens: int) -> None:
        """Note that a layer is done with so many tokens."""
        if layer == len(self.layers) - 1:
            self.counters.leave(tokens)

    def release(self) -> None:
        """Let the next forward in, if this thread is the one inside."""
        try:  # noqa: SIM105  (`suppress` takes longer than all else that is done here)
            self._lock.release()
        except RuntimeError:
            pass

    def open_link(self) -> Link:
        if self.link is None:
            raise PromoeError("this model's slots were closed by unpatch; patch it again")
        return self.link

    def begin_change(self) -> None:
        """Before anything changes slots. Where a change has ended early, wherever that was, they start afresh.

        An interruption may come at any line: so a flag says that all is well only after the last one.
        """
        self.open_link()
        if self._dirty:
            self.start_afresh(self.config.io_timeout)
        self._dirty = True

    def check_settled(self) -> None:
        """Note when every expert of the model has a slot of its own: nothing is predicted or copied any more."""
        self.is_settled = all(layer.resident for layer in self.layers)

    def end_change(self) -> None:
        """After the last change of a call or of warming up."""
        self._dirty = False

    def start_afresh(self, patience: float) -> None:
        """Forget what the slots hold. What is in flight must land first: stay dirty where that takes too long."""
        if self.link is None:
            return  # unpatched meanwhile
        if not self.link.drain(patience):
            if patience:
                raise PromoeError(f"interrupted reads have not ended in {patience:g} s; the disk does not answer")
            return
        self.counters.evictions += self.core.evictions
        self.link.fence(0, None)
        core = self._core(self.link)
        core.inherit(self.core)
        for layer, table in zip(self.layers, core.tables, strict=True):
            layer.table, layer.resident = table, False
            self.is_settled = False
            for expert in range(layer.layout.experts):
                layer.kernels.remove(expert)
        self.core = core
        self.link.restart(core)
        self._dirty = False

    def warm(self) -> None:
        """Fill every slot, with the most popular experts where that is known, in the order of the store."""
        keys = [layer.keys for layer in self.layers if layer.table is not None]
        chosen = first_experts(self.core.tables, keys, self.popularity)
        assert isinstance(self.store, CheckpointStore | HostStore)
        chosen.sort(key=self.store.position)
        link = self.open_link()
        running: list[Transfer] = []
        progress = transformers_logging.tqdm(total=len(chosen), desc="Filling slots", leave=False)
        self.begin_change()
        try:
            for key in chosen:
                running.append(link.tell(lambda key=key: self.core.ask(key, Part.WHOLE)))  # type: ignore[misc]
                if len(running) > 2 * self.config.depth:
                    self._settle(running.pop(0))
                    progress.update(1)
            for transfer in running:
                self._settle(transfer)
                progress.update(1)
            link.settle()
        except BaseException:
            self.start_afresh(0.0)
            raise
        finally:
            progress.close()
        self.end_change()
        self._filling_seconds = link.busy_seconds
        for layer in self.layers:
            layer.check_resident()

    def _settle(self, transfer: Transfer) -> None:
        link, key = self.open_link(), transfer.key
        link.wait([transfer])
        self.layers[key.layer].place([key])
        link.tell(lambda: self.core.release([key]))

    def stats(self) -> Stats:
        counters = self.counters
        link = self.link
        tallies = link.tell(lambda: self.core.tallies()) if link else []
        return Stats(
            experts=sum(layer.layout.experts for layer in self.layers),
            slots=self.budget.slots,
            slot_bytes=self.budget.nbytes,
            store=self.store.describe(),
            hits=counters.hits,
            misses=counters.misses,
            evictions=counters.evictions + (self.core.evictions if link else 0),
            bytes_read=link.bytes_moved if link else 0,
            stall_seconds=self.stall_seconds,
            host_reads=counters.host_reads,
            predicted=self.prefetcher.predicted if self.prefetcher else 0,
            copied_ahead=tuple(Ahead.of([tally]) for tally in tallies),
            link_seconds=link.busy_seconds - self._filling_seconds if link else 0.0,
            link_bandwidth=link.bandwidth if link else 0.0,
            run_seconds=counters.run_seconds,
            prefills=counters.prefills,
            decodes=counters.decodes,
            ttft_seconds=counters.ttft_seconds,
            tpot_seconds=counters.tpot_seconds,
        )

    def record(self, timeline: Timeline | None) -> None:
        """Keep a timeline of computing and copying from now on; None: keep none."""
        self.timeline = timeline
        if self.link is not None:
            self.link.record(timeline)

    def close(self) -> None:
        """Stop the link and let go of layers and slots. Idempotent."""
        if self.prefetcher is not None:
            self.prefetcher.remove()
            self.prefetcher = None
        if self.link is not None:
            self._order.follow()
            self.link.fence(0, None)  # resident layers set none
            self.link.close()
            self.link = None
        self.layers = []
