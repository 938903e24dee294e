"""`patch`, `unpatch` and `stats`: what happens to a model, in order, and how it is undone."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from promoe_triton import ops
from promoe_triton.budget import Budget, LayerNeed, available_memory, plan_slots
from promoe_triton.config import Config, configured, format_size, parse_size
from promoe_triton.counters import Stats
from promoe_triton.errors import PromoeError
from promoe_triton.layer import ProMoEExperts, patched_class
from promoe_triton.layout import ExpertLayout
from promoe_triton.memory import in_files, own_memory
from promoe_triton.patch._families import describe
from promoe_triton.patch._quantised import refuse_quantised
from promoe_triton.protocols import ExpertKey, ExpertSpec, Store
from promoe_triton.runtime import ModelRuntime, Popularity
from promoe_triton.stores.checkpoint import CheckpointStore, same_tensors
from promoe_triton.stores.conversion import map_parameters
from promoe_triton.stores.host import HostStore
from promoe_triton.stores.resolve import checkpoint_files
from promoe_triton.stores.safetensors_files import read_headers
from promoe_triton.stores.spool import spool
from promoe_triton.timeline import Timeline

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def promoe_modules(model: nn.Module) -> list[ProMoEExperts]:
    """Return the patched experts modules in the model's order."""
    return [module for module in model.modules() if isinstance(module, ProMoEExperts)]


def _paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, ProMoEExperts)]


class PatchedModel(nn.Module):
    """What a patched model can do beside what it could before: be a context manager that unpatches."""

    _promoe_runtime: ModelRuntime

    def __enter__(self) -> nn.Module:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Return an independent patched model: own slots, own link, the same store."""
        runtime = self._promoe_runtime
        pending = object()  # stands for what can only be made once all modules are whole
        memo |= {id(part): pending for part in (runtime, *runtime.layers)}
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        modules = promoe_modules(twin)
        twin._promoe_runtime = copied = runtime.copy_for(modules)
        for module, layer in zip(modules, copied.layers, strict=True):
            module._promoe = layer
        if copied.link is not None and copied.config.warm:
            copied.warm()
        copied.watch(twin, _paths(twin))
        return twin

    def __copy__(self) -> nn.Module:
        raise PromoeError(
            "a patched model cannot be copied shallowly, as two models would share its slots; use copy.deepcopy"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PromoeError("a patched model cannot be pickled; use save_pretrained, or unpatch it first")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the true weights, experts at rest included, where all of them fit in the memory that is free."""
        runtime = self._promoe_runtime
        if runtime.link is not None:
            runtime.check_room("the state dict of all experts")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse weights for experts that rest in a store, before anything is loaded."""
        for path, module in self.named_modules():
            if isinstance(module, ProMoEExperts):
                module.check_load(state_dict, f"{path}.")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # All experts are asked first, so that a refusal leaves nothing half moved.
        for module in promoe_modules(self):
            module.check_apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        unpatch(self)


class PatchedGenerator(PatchedModel):
    """A patched model with `generate`, which is timed."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._promoe_runtime.counters.generation():
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            except (RuntimeError, IndexError) as error:
                prompt = next((p for p in (*args, *map(kwargs.get, ("inputs", "input_ids"))) if p is not None), None)
                if isinstance(prompt, torch.Tensor) and not prompt.numel():
                    raise ValueError(
                        f"the prompt is empty (shape {[*prompt.shape]}): give generate at least one token, such as "
                        "the tokenizer's bos_token"
                    ) from error
                raise


@functools.cache
def _model_class(original: type[nn.Module]) -> type[nn.Module]:
    # The same name: transformers writes it into saved configurations.
    base = PatchedGenerator if hasattr(original, "generate") else PatchedModel
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (base, original), names)


def find_experts(model: nn.Module) -> dict[str, ExpertLayout]:
    """Return the experts modules of a model by path, in the model's order.

    Raises PromoeError where there are none, or where they are of a kind that cannot be patched.
    """
    found = {}
    for path, module in model.named_modules():
        layout = describe(module)
        if layout is not None:
            found[path] = layout
            for place in (path, path.rpartition(".")[0]):
                if "forward" in vars(model.get_submodule(place)):
                    raise PromoeError(
                        f"the forward of {place or 'the model'} was replaced (by a kernel of the hub?), and may not "
                        "compute what its experts do any more; load the model with use_kernels=False"
                    )
    if not found:
        raise PromoeError(
            f"{type(model).__name__} has no MoE experts that promoe_triton knows: nothing was patched. Is it a "
            "Mixture-of-Experts model? The README lists the families"
        )
    return found


def patch(model: Model, config: Config | None = None, **options: Any) -> Model:
    """Replace the experts of every MoE block by a ProMoE layer, in place, and return the model.

    Outputs stay the model's own, bit for bit. With as many slots as experts the weights stay where they are;
    with fewer, the experts' memory is given back: they rest in the checkpoint the model came from if it holds
    the same weights, else in a spool file, and slots are filled from there.

    model: a transformers model with MoE blocks, on the CPU, in eval mode. Also a context manager afterwards:
        ``with patch(model, slots=0.5): ...`` unpatches at the end.
    config, options: see `Config`; options override the fields of `config`.
    Raises PromoeError where the model cannot be patched (no MoE, patched already, in training, quantised, too
    little memory), ValueError or TypeError for options that make no sense. Nothing has changed after an error.
    """
    config = configured(config, options)
    check_patchable(model)
    found = find_experts(model)
    modules = [model.get_submodule(path) for path in found]
    layouts = list(found.values())
    specs = [layout.spec(module) for module, layout in zip(modules, layouts, strict=True)]
    experts = [layout.experts for layout in layouts]
    weights = sum(spec.nbytes * n for spec, n in zip(specs, experts, strict=True))
    resident = config.slots is None or covers(config.slots, sum(experts), weights)
    leaving = [] if resident else _parameters(modules, layouts)
    staying = _mapped(model, leaving)
    if resident:
        check_own_memory(staying)
        own_memory(staying)
        budget = Budget(
            slots_of_layer=tuple(layout.experts for layout in layouts),
            slot_bytes=(0,) * len(layouts),
            shared=False,
        )
        install(model, modules, layouts, config, HostStore(modules, layouts), budget)
        return model
    # What the experts themselves take is given back and counts as free, unless it is a file's.
    given = _nbytes(leaving) - _nbytes(in_files(leaving)) - _nbytes(staying)
    # An early answer to a budget that cannot be met, before anything is read or written.
    needs = [LayerNeed(experts=n, spec=spec, slot_bytes=spec.nbytes) for spec, n in zip(specs, experts, strict=True)]
    plan_slots(config.slots, config.partition, needs, available_memory() + given)
    store = rest(model, found, config)
    budget = plan(config, store, layouts, available_memory() + given)
    own_memory(staying)
    install(model, modules, layouts, config, store, budget)
    return model


def _parameters(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> list[nn.Parameter]:
    """Return the experts' parameters, each once."""
    parameters = [
        module.get_parameter(n) for module, layout in zip(modules, layouts, strict=True) for n in layout.names
    ]
    return list({id(parameter): parameter for parameter in parameters}.values())


def _mapped(model: nn.Module, leaving: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Return what lies in mapped files and stays in memory, so that it needs memory of its own."""
    left = set(map(id, leaving))
    return in_files(tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in left)


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def check_own_memory(staying: Sequence[torch.Tensor]) -> None:
    """Raise PromoeError where weights that lie in mapped files do not fit in the memory that is free."""
    needed, free = _nbytes(staying), available_memory()
    if needed > free:
        raise PromoeError(
            f"{format_size(needed)} of weights lie in mapped files, and the model would change with them; their own "
            f"memory is as much, but only {format_size(free)} are free; keep fewer experts resident (slots=...)"
        )


def covers(slots: int | float | str, experts: int, weights: int) -> bool:
    """Whether slots take in every one of so many experts, which have so many bytes of weights."""
    if isinstance(slots, str):
        return parse_size(slots) >= weights
    return slots >= 1.0 if isinstance(slots, float) else slots >= experts


def check_patchable(model: nn.Module, resting: bool = False) -> None:
    """Raise unless `model` can be patched: PromoeError with the reason, TypeError where it is no module.

    resting: its experts are in a store already, and have no weights in memory.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch expects a torch module (a transformers model), got {type(model).__name__}")
    if isinstance(model, PatchedModel) or any(isinstance(m, ProMoEExperts) for m in model.modules()):
        raise PromoeError("the model is patched already; unpatch it first")
    if model.training:
        raise PromoeError("the model is in training mode; call model.eval() first (patching is for inference)")
    refuse_quantised(getattr(model, "config", None), getattr(model, "hf_quantizer", None))
    hooked = [path for path, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise PromoeError(
            f"accelerate's hooks move weights of this model (at {hooked[0] or 'its root'}); load it on the CPU, "
            "without device_map"
        )
    elsewhere = {parameter.device.type for parameter in model.parameters()} - {"cpu"}
    if elsewhere - ({"meta"} if resting else set()):
        raise PromoeError(f"the model must be on the CPU, but has parameters on {', '.join(sorted(elsewhere))}")


def plan(config: Config, store: CheckpointStore, layouts: Sequence[ExpertLayout], memory: int) -> Budget:
    """Share out slots whose size fits every expert of the store, however it lies in its file."""
    sizes: dict[ExpertSpec, int] = {}
    for index, (spec, layout) in enumerate(zip(store.specs, layouts, strict=True)):
        sizes[spec] = max(sizes.get(spec, 0), store.slot_bytes(index, layout.experts))
    needs = [
        LayerNeed(experts=layout.experts, spec=spec, slot_bytes=sizes[spec])
        for spec, layout in zip(store.specs, layouts, strict=True)
    ]
    return plan_slots(config.slots, config.partition, needs, memory)


def install(
    model: nn.Module,
    modules: Sequence[nn.Module],
    layouts: Sequence[ExpertLayout],
    config: Config,
    store: Store,
    budget: Budget,
) -> None:
    """Exchange the modules' classes, then fill the slots: the only step that changes the model.

    The slots are filled last, when the experts' own memory has been given back; if that fails, all is undone.
    """
    popularity = load_profile(config.profile, layouts) if config.profile else {}
    resting = isinstance(store, CheckpointStore)
    runtime = ModelRuntime(config, store, budget, modules, layouts, popularity)
    if resting:
        runtime.originals = _empty(modules, layouts)
    for module, layer in zip(modules, runtime.layers, strict=True):
        module._promoe = layer  # type: ignore[assignment]
        module.__class__ = patched_class(type(module))  # type: ignore[arg-type]
        module.register_buffer("_promoe_name", ops.register(module), persistent=False)
    model._promoe_runtime = runtime  # type: ignore[assignment]
    model.__class__ = _model_class(type(model))  # type: ignore[arg-type]
    try:
        if runtime.link is not None and config.warm:
            runtime.warm()
        runtime.watch(model, _paths(model))
    except BaseException as failure:
        _undo(model, runtime, failure)
        raise


def _undo(model: nn.Module, runtime: ModelRuntime, failure: BaseException) -> None:
    """Take a patch back whose slots could not be filled."""
    if any(p.device.type == "meta" for layer in runtime.originals for p in layer.values()):
        runtime.close()  # the model was being loaded: there is nothing to put back, and nobody has seen it
        return
    try:
        unpatch(model)
    except PromoeError as second:
        raise PromoeError(
            f"{failure}; and the weights could not be put back ({second}). The model stays patched: call it, or "
            "unpatch it, once its files can be read again"
        ) from failure


def _empty(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> list[dict[str, nn.Parameter]]:
    """Leave parameters that have a shape and no weights; return the originals, their memory given back.

    Modules that shared a parameter share what takes its place.
    """
    originals = [
        {name: module.get_parameter(name) for name in layout.names}
        for module, layout in zip(modules, layouts, strict=True)
    ]
    hollow = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=p.requires_grad)
        for layer in originals
        for p in layer.values()
    }
    for module, layer in zip(modules, originals, strict=True):
        for name, original in layer.items():
            owner, leaf = _owner(module, name)
            owner._parameters[leaf] = hollow[id(original)]
    for layer in originals:
        for original in layer.values():
            if original.device.type == "cpu":
                original.data = torch.empty(0, dtype=original.dtype)
    return originals


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def rest(model: nn.Module, found: Mapping[str, ExpertLayout], config: Config) -> CheckpointStore:
    """Return a store that holds exactly the model's experts: its checkpoint where that is so, else a spool."""
    modules = [model.get_submodule(path) for path in found]
    if config.store != "spool":
        try:
            store = checkpoint_store(model, found, checkpoint_files(model))
            verify(store, modules, list(found.values()))
            return store
        except PromoeError as reason:
            if config.store == "checkpoint":
                raise
            logger.warning("the experts cannot rest in the model's own checkpoint: %s", reason)
    return spool(modules, list(found.values()), config.spool_dir)


def checkpoint_store(
    model: nn.Module,
    found: Mapping[str, ExpertLayout],
    files: Sequence[Path],
    key_mapping: Mapping[str, str] | None = None,
) -> CheckpointStore:
    """Return the experts of `model` as they rest in these files."""
    modules = {path: model.get_submodule(path) for path in found}
    parameters = {
        f"{path}.{name}": layout.stacked(modules[path].get_parameter(name))
        for path, layout in found.items()
        for name in layout.names
    }
    sources = map_parameters(model, parameters, read_headers(files), key_mapping)
    return CheckpointStore(
        [layout.spec(modules[path]) for path, layout in found.items()],
        [{name: sources[f"{path}.{name}"] for name in layout.names} for path, layout in found.items()],
        f"checkpoint {files[0].parent}",
    )


def verify(store: CheckpointStore, modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> None:
    """Raise PromoeError unless every expert in the store equals the loaded one bit for bit."""
    loaded = HostStore(modules, layouts)
    keys = [ExpertKey(i, e) for i, layout in enumerate(layouts) for e in range(layout.experts)]
    for key in transformers_logging.tqdm(keys, desc="Comparing experts with the checkpoint", leave=False):
        if not same_tensors(store, key, loaded.load(key)):
            raise PromoeError(
                f"expert {key.expert} of MoE layer {key.layer} differs from {store.describe()}: the weights were "
                "changed after loading"
            )


def unpatch(model: Model) -> Model:
    """Put the original modules and weights back, in place, and return the model.

    Weights that rest in a store are loaded again; where they do not fit in memory PromoeError says how much is
    needed, and the model stays patched and usable.
    """
    runtime = _runtime(model)
    if runtime.link is not None:
        # All of them, beside the slots: those are kept until every weight has been read, so that a fault harms nothing.
        runtime.check_room("putting the weights back")
    modules = promoe_modules(model)
    weights = (
        [layer.stack(module) for layer, module in zip(runtime.layers, modules, strict=True)] if runtime.link else []
    )
    runtime.close()
    for index, module in enumerate(modules):
        if weights:
            for name, tensor in weights[index].items():
                owner, leaf = _owner(module, name)
                parameter = _original(runtime, index, name, owner._parameters[leaf])
                parameter.data = tensor
                owner._parameters[leaf] = parameter
        del module._promoe, module._promoe_name
        module.__class__ = type(module).__bases__[1]
    del model._promoe_runtime
    model.__class__ = type(model).__bases__[1]
    return model


def _original(runtime: ModelRuntime, index: int, name: str, meta: nn.Parameter | None) -> nn.Parameter:
    """Return the parameter object that was there before, or a new one where there never was one with weights."""
    original = runtime.originals[index][name] if runtime.originals else None
    if original is None or original.device.type == "meta":
        assert meta is not None
        return nn.Parameter(torch.empty(0, dtype=meta.dtype), requires_grad=meta.requires_grad)
    return original


def stats(model: nn.Module) -> Stats:
    """Return what a patched model has done so far. Raises PromoeError for a model that is not patched."""
    return _runtime(model).stats()


@contextmanager
def record_timeline(model: nn.Module) -> Iterator[Timeline]:
    """Record what is computed, copied and waited for inside the block: the last 200 000 spans.

    `Timeline.save` writes them as a trace for chrome://tracing and Perfetto.
    """
    runtime, timeline = _runtime(model), Timeline()
    runtime.record(timeline)
    try:
        yield timeline
    finally:
        runtime.record(None)


def _runtime(model: nn.Module) -> ModelRuntime:
    if not isinstance(model, PatchedModel):
        raise PromoeError(f"this {type(model).__name__} is not patched; call promoe_triton.patch(model) first")
    return model._promoe_runtime


def save_profile(model: nn.Module, path: Path | str) -> None:
    """Write how often each expert was used so far, for `Config.profile` of later runs (JSON)."""
    uses = [layer.uses for layer in _runtime(model).layers]
    Path(path).write_text(json.dumps({"uses": uses}) + "\n")


def load_profile(path: Path | str, layouts: Sequence[ExpertLayout]) -> Popularity:
    """Read a profile; raises PromoeError where it is none, or one of another model."""
    try:
        uses = [[float(count) for count in layer] for layer in json.loads(Path(path).read_text())["uses"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromoeError(f"{path} is no popularity profile (save_profile writes one): {error}") from error
    shape, expected = [len(layer) for layer in uses], [layout.experts for layout in layouts]
    if shape != expected:
        raise PromoeError(
            f"{path} is the profile of another model: it has {len(shape)} layers of {sorted(set(shape))} experts, "
            f"this model has {len(expected)} of {sorted(set(expected))}"
        )
    return {ExpertKey(i, e): count for i, layer in enumerate(uses) for e, count in enumerate(layer)}
