"""`patch`, `unpatch` and `stats`: what happens to a model, in order, and how it is undone."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import CompileConfig

from promoe_triton import ops
from promoe_triton.budget import Budget, LayerNeed, free_memory, plan_slots
from promoe_triton.config import Config, configured, format_size
from promoe_triton.counters import Stats
from promoe_triton.devices import dense_bytes, move_dense, resolve_device
from promoe_triton.errors import PromoeError
from promoe_triton.layer import ProMoEExperts, patched_class
from promoe_triton.layout import ExpertLayout
from promoe_triton.memory import in_files, own_memory
from promoe_triton.patch._families import describe
from promoe_triton.patch._quantised import refuse_quantised
from promoe_triton.patch._rest import (
    check_own_memory,
    covers,
    expert_parameters,
    load_profile,
    mapped,
    nbytes_of,
    plan,
    rest,
    room_for_context,
)
from promoe_triton.protocols import Store
from promoe_triton.runtime import ModelRuntime
from promoe_triton.stores.checkpoint import CheckpointStore
from promoe_triton.stores.host import HostStore, ResidentStore
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

    @torch.inference_mode(False)
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
            runtime.check_read_back("the state dict of all experts")
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
        kwargs |= self._compile_options(kwargs)
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

    def _compile_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return how to compile on a GPU where transformers will and nobody has said how: without captured graphs.

        That those hold what a layer does on the host has not been proved on a GPU yet.
        """
        config: Any = given.get("generation_config") or getattr(self, "generation_config", None)
        if self._promoe_runtime.device.type != "cuda" or config is None:
            return {}
        cache = given.get("cache_implementation") or config.cache_implementation
        compiles = cache is not None or getattr(given.get("past_key_values"), "is_compileable", False)
        if not compiles or "compile_config" in given or config.compile_config is not None:
            return {}
        logger.info("generate compiles with mode='default', not 'reduce-overhead'; pass a compile_config to choose")
        return {"compile_config": CompileConfig(mode="default")}


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


@torch.inference_mode(False)
def patch(model: Model, config: Config | None = None, **options: Any) -> Model:
    """Replace the experts of every MoE block by a ProMoE layer, in place, and return the model.

    Outputs stay the model's own, bit for bit. With as many slots as experts the weights stay where they are;
    with fewer, the experts' memory is given back: they rest in the checkpoint the model came from if it holds
    the same weights, else in a spool file, and slots are filled from there.

    On a GPU the experts rest in RAM (or in the checkpoint) and have slots on the GPU, where the rest of the model is
    moved as well; where all experts fit there, all of the model is.

    model: a transformers model with MoE blocks, on the CPU, in eval mode (on the GPU, if all experts stay there). Also
        a context manager afterwards: ``with patch(model, slots=0.5): ...`` unpatches at the end.
    config, options: see `Config`; options override the fields of `config`.
    Raises PromoeError where the model cannot be patched (no MoE, patched already, in training, quantised, too
    little memory), ValueError or TypeError for options that make no sense. Nothing has changed after an error.
    """
    config = configured(config, options)
    device = resolve_device(config.device)
    check_patchable(model)
    found = find_experts(model)
    modules = [model.get_submodule(path) for path in found]
    layouts = list(found.values())
    specs = [layout.spec(module) for module, layout in zip(modules, layouts, strict=True)]
    experts = [layout.experts for layout in layouts]
    weights = sum(spec.nbytes * n for spec, n in zip(specs, experts, strict=True))
    parameters = expert_parameters(modules, layouts)
    home = next((parameter.device for parameter in parameters), torch.device("cpu"))
    dense = 0 if device == home else dense_bytes(model, parameters)
    room = room_for_context(model) if config.slots is None and device.type != "cpu" else 0
    free = free_memory(device) - dense - room
    if home == device and device.type != "cpu":
        free += weights
    if config.store != "memory" and _all_resident(config, device, sum(experts), weights, free):
        if device.type == "cpu":
            staying = mapped(model, ())
            check_own_memory(staying)
            own_memory(staying)
        budget = Budget(
            slots_of_layer=tuple(layout.experts for layout in layouts),
            slot_bytes=(0,) * len(layouts),
            shared=False,
        )
        install(model, modules, layouts, config, device, ResidentStore(modules, layouts), budget)
        return model
    if home.type != "cpu":
        raise PromoeError(
            f"the experts are to rest in RAM or on disk, but are on {home}; load the model on the CPU, and patch moves "
            "the rest of it to the GPU"
        )
    staying = mapped(model, parameters) if device.type == "cpu" else []
    if device.type == "cpu" and config.store != "memory":
        # What the experts themselves take is given back and counts as free, unless it is a file's.
        free += nbytes_of(parameters) - nbytes_of(in_files(parameters)) - nbytes_of(staying)
    # An early answer to a budget that cannot be met, before anything is read or written.
    free = max(free, 0)
    needs = [LayerNeed(experts=n, spec=spec, slot_bytes=spec.nbytes) for spec, n in zip(specs, experts, strict=True)]
    plan_slots(config.slots, config.partition, needs, free)
    store = rest(model, found, config, device)
    budget = plan(config, store, layouts, free)
    own_memory(staying)
    install(model, modules, layouts, config, device, store, budget)
    return model


def _all_resident(config: Config, device: torch.device, experts: int, weights: int, free: int) -> bool:
    """Whether every expert is to be in the memory of the device; on a GPU, where nothing was asked, if all fit."""
    if config.slots is None:
        return device.type == "cpu" or weights <= free
    if not covers(config.slots, experts, weights):
        return False
    if device.type != "cpu" and weights > free:
        raise PromoeError(
            f"all experts take {format_size(weights)}, but only {format_size(free)} of {device} are free beside the "
            "rest of the model; ask for fewer slots"
        )
    return True


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
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("meta") if resting else None}
    if len(devices) > 1 or any(device.type not in ("cpu", "cuda") for device in devices):
        raise PromoeError(
            f"the model must be on the CPU (or all of it on one GPU), but has parameters on "
            f"{', '.join(sorted(map(str, devices)))}"
        )


def install(
    model: nn.Module,
    modules: Sequence[nn.Module],
    layouts: Sequence[ExpertLayout],
    config: Config,
    device: torch.device,
    store: Store,
    budget: Budget,
) -> None:
    """Exchange the modules' classes and move the model, then fill the slots: the only step that changes the model.

    The slots are filled last, when the experts' own memory has been given back; if that fails, all is undone.
    """
    popularity = load_profile(config.profile, layouts) if config.profile else {}
    runtime = ModelRuntime(config, device, store, budget, modules, layouts, popularity)
    if not isinstance(store, ResidentStore):
        runtime.originals = _empty(modules, layouts, free=isinstance(store, CheckpointStore))
    runtime.home = next((p.device for p in model.parameters() if p.device.type != "meta"), device)
    for module, layer in zip(modules, runtime.layers, strict=True):
        module._promoe = layer  # type: ignore[assignment]
        module.__class__ = patched_class(type(module))  # type: ignore[arg-type]
        module.register_buffer("_promoe_name", ops.register(module), persistent=False)
        module._promoe_graph = layer.kernels.graph_form() if isinstance(store, ResidentStore) else None  # type: ignore[assignment]
        slots = torch.arange(layer.layout.experts, dtype=torch.int32, device=device)
        module.register_buffer("_promoe_slots", slots, persistent=False)
    model._promoe_runtime = runtime  # type: ignore[assignment]
    model.__class__ = _model_class(type(model))  # type: ignore[arg-type]
    try:
        if device != runtime.home:
            move_dense(model, device, [module._promoe_name for module in promoe_modules(model)])
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


def _empty(modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout], free: bool) -> list[dict[str, nn.Parameter]]:
    """Leave parameters that have a shape and no weights; return the originals. free: give their memory back.

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
            if free and original.device.type == "cpu":
                original.data = torch.empty(0, dtype=original.dtype)
    return originals


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


@torch.inference_mode(False)
def unpatch(model: Model) -> Model:
    """Put the original modules and weights back, in place, and return the model.

    Weights that rest in a store are loaded again; where they do not fit in memory PromoeError says how much is
    needed, and the model stays patched and usable.
    """
    runtime = _runtime(model)
    with runtime.alone():
        _put_back(model, runtime)
    return model


def _put_back(model: nn.Module, runtime: ModelRuntime) -> None:
    if runtime.link is not None:
        # All of them, beside the slots: those are kept until every weight has been read, so that a fault harms nothing.
        runtime.check_read_back("putting the weights back")
    modules = promoe_modules(model)
    weights = (
        [layer.stack(module) for layer, module in zip(runtime.layers, modules, strict=True)] if runtime.link else []
    )
    if weights and isinstance(runtime.store, HostStore) and not runtime.originals:
        # A copy of a patched model: the weights in the store are the other model's.
        weights = [{name: tensor.clone() for name, tensor in layer.items()} for layer in weights]
    runtime.close()
    for index, module in enumerate(modules):
        if weights:
            for name, tensor in weights[index].items():
                owner, leaf = _owner(module, name)
                parameter = _original(runtime, index, name, owner._parameters[leaf])
                parameter.data = tensor
                owner._parameters[leaf] = parameter
        del module._promoe, module._promoe_name, module._promoe_graph, module._promoe_slots
        module.__class__ = type(module).__bases__[1]
    del model._promoe_runtime
    model.__class__ = type(model).__bases__[1]
    if runtime.home != runtime.device:
        move_dense(model, runtime.home)


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
