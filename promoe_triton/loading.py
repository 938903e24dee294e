"""`from_pretrained`: load a model's dense part, and leave its experts where they are."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from promoe_triton.budget import free_memory
from promoe_triton.config import Config, configured, meant_by
from promoe_triton.devices import dense_bytes, resolve_device
from promoe_triton.errors import PromoeError
from promoe_triton.layout import ExpertLayout
from promoe_triton.memory import in_files, own_memory
from promoe_triton.patch._families import describe
from promoe_triton.patch._quantised import refuse_quantised
from promoe_triton.patch._rest import checkpoint_store, nbytes_of, plan, room_for_context
from promoe_triton.patch._swap import check_patchable, find_experts, install, patch
from promoe_triton.stores.conversion import QuantisedTensor
from promoe_triton.stores.resolve import resolve_files

logger = logging.getLogger(__name__)

_UNSUPPORTED = (
    "device_map",
    "quantization_config",
    "gguf_file",
    "tp_plan",
    "distributed_config",
    # The experts would come from other files than the rest.
    "variant",
    "state_dict",
    # A model is what this function returns.
    "output_loading_info",
)

_FILE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@torch.inference_mode(False)
def from_pretrained(name: str, config: Config | PreTrainedConfig | None = None, **options: Any) -> PreTrainedModel:
    """Load a Mixture-of-Experts model whose experts never all have to be in memory, and patch it.

    The dense part is loaded as transformers does; the experts stay in the checkpoint and come from there into
    slots. With ``slots=None`` everything is loaded where it fits in free memory.

    name: a folder or a hub id (a local snapshot serves with HF_HUB_OFFLINE=1).
    config, options: see `Config`; every option that is not a field of it goes to transformers' own
        from_pretrained (revision, token, dtype, attn_implementation, trust_remote_code...). A configuration of
        transformers goes there too, in the place of the checkpoint's own; our fields then are options.
    Raises PromoeError where the checkpoint or the model is of a kind that cannot be run from slots.
    """
    mine = {field.name for field in fields(Config)}
    # All else goes to transformers, but for what can only be a slip of the pen.
    chosen = {k: options.pop(k) for k in list(options) if k in mine or (k not in _UNSUPPORTED and meant_by(k))}
    if isinstance(config, PreTrainedConfig):
        options["config"], config = config, None
    config = configured(config, chosen)
    device = resolve_device(config.device)
    for unsupported in _UNSUPPORTED:
        if (value := options.get(unsupported)) is not None and value is not False:
            raise PromoeError(f"from_pretrained does not support {unsupported} yet; leave it out")
    _check_name(name)
    if Path(name).is_file():
        raise PromoeError(f"{name} is no checkpoint: expected a folder with a config.json, or a hub id; this is a file")
    file_options = {key: options[key] for key in _FILE_OPTIONS if key in options}
    skeleton = skeleton_of(name, options)
    found = find_experts(skeleton)
    files = resolve_files(name, **file_options)
    reason = _unreadable(skeleton, found, files, options.get("key_mapping"))
    whole = config.slots is None and _everything_fits(skeleton, device)
    # Beside slots on a GPU, RAM is the nearest place to rest in.
    in_memory = config.store == "memory" or (
        config.store == "auto" and device.type != "cpu" and nbytes_of(skeleton.parameters()) <= free_memory()
    )
    if whole or in_memory:
        model = type(skeleton).from_pretrained(name, **options)
        return patch(model.eval(), config)
    if reason is not None:
        if config.store == "checkpoint":
            raise reason
        logger.warning("loading the whole model, because its experts cannot be read one at a time: %s", reason)
        return patch(type(skeleton).from_pretrained(name, **options).eval(), replace(config, store="spool"))
    with _without_experts(skeleton, found):
        model = type(skeleton).from_pretrained(name, **options)
    model.eval()
    for path in found:
        stub = model.get_submodule(path)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, stub.restore())
    if device.type == "cpu":
        own_memory(in_files((*model.parameters(), *model.buffers())))
    check_patchable(model, resting=True)
    found = find_experts(model)
    modules = [model.get_submodule(path) for path in found]
    layouts = list(found.values())
    store = checkpoint_store(model, found, files, options.get("key_mapping"))
    # What the context needs shapes our own choice of slots; it is no ground to refuse the user's.
    taken = (room_for_context(model) if config.slots is None else 0) + (
        0 if device.type == "cpu" else dense_bytes(model, ())
    )
    budget = plan(config, store, layouts, max(free_memory(device) - taken, 0))
    install(model, modules, layouts, config, device, store, budget)
    return model


def read_configuration(name: str, options: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the configuration of a checkpoint folder, a config.json or a hub id.

    Raises PromoeError, saying what was expected, where there is none that transformers can read.
    """
    _check_name(name)
    try:
        return AutoConfig.from_pretrained(name, **(options or {}))
    except (OSError, ValueError) as error:
        refuse_untrusted(name, error)
        path = Path(name)
        found = "this is a file" if path.is_file() else "there is no such folder"
        found = "the folder has none that can be read" if path.is_dir() else found
        raise PromoeError(
            f"{name} is no checkpoint: expected a folder with a config.json, or a hub id; {found} ({error})"
        ) from error


def _check_name(name: object) -> None:
    """Raise TypeError or PromoeError for what can name no checkpoint, a blank name above all: it means no folder."""
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"expected the name of a checkpoint (a folder or a hub id), got {name!r}")
    if not os.fspath(name).strip():
        raise PromoeError("the name of the checkpoint is empty: expected a folder with a config.json, or a hub id")


def refuse_untrusted(name: str, error: Exception) -> None:
    """Raise PromoeError where `error` is transformers' refusal to run code that comes with a model."""
    if "trust_remote_code" in str(error):
        raise PromoeError(
            f"{name} brings code of its own, which runs only where it is trusted: read it, then pass "
            "trust_remote_code=True (--trust-remote-code on the command line)"
        ) from error


def skeleton_of(name: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model without any weights, in the class the checkpoint names and the dtype the options ask for."""
    taken = {*_FILE_OPTIONS, "trust_remote_code", "code_revision"}
    configuration = copy.deepcopy(options.get("config"))  # transformers writes the dtype into it
    if configuration is None:
        configuration = read_configuration(name, {k: v for k, v in options.items() if k in taken})
    # Before transformers asks for the packages that a quantised model would need.
    refuse_quantised(configuration)
    dtype = options.get("dtype") or options.get("torch_dtype")
    asked = {"dtype": dtype} if isinstance(dtype, str | torch.dtype) and dtype != "auto" else {}
    architectures = getattr(configuration, "architectures", None) or [""]
    known = getattr(transformers, architectures[0], None)
    with torch.device("meta"):
        if known is not None:
            return known._from_config(configuration, **asked)
        remote = {k: v for k, v in options.items() if k in ("trust_remote_code", "code_revision")}
        return AutoModelForCausalLM.from_config(configuration, **remote, **asked)


def _unreadable(
    skeleton: PreTrainedModel,
    found: Mapping[str, ExpertLayout],
    files: Sequence[Path],
    key_mapping: Mapping[str, str] | None,
) -> PromoeError | None:
    """Return why the experts cannot be read one at a time; None where they can.

    Raises PromoeError for quantised ones: transformers would take their numbers, without the scales, for weights.
    """
    try:
        checkpoint_store(skeleton, found, files, key_mapping)
    except QuantisedTensor:
        raise
    except PromoeError as reason:
        return reason
    return None


def _everything_fits(skeleton: PreTrainedModel, device: torch.device) -> bool:
    return nbytes_of(skeleton.parameters()) + room_for_context(skeleton) <= free_memory(device)


@contextlib.contextmanager
def _without_experts(skeleton: PreTrainedModel, found: Mapping[str, ExpertLayout]) -> Iterator[None]:
    """While a model is built and loaded, build parameter-free stubs where its experts would be.

    Their weights then are keys that no parameter asks for, and are never read.
    """
    originals = {type(skeleton.get_submodule(path)) for path in found}
    ours = {
        original.__name__: type(f"{original.__name__}Stub", (_Stub,), {"_replaces": original}) for original in originals
    }
    places = [
        (module, original)
        for original in originals
        for module in _transformers_modules()
        if vars(module).get(original.__name__) is original  # asking a lazy module would import what it stands for
    ]
    try:
        for module, original in places:
            setattr(module, original.__name__, ours[original.__name__])
        with _ignore_unexpected(type(skeleton), found):
            yield
    finally:
        for module, original in places:
            setattr(module, original.__name__, original)


def _transformers_modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("transformers")]


class _Stub(nn.Module):
    """Takes the place of an experts module while the model is loaded: all of it but the experts' weights."""

    original: nn.Module
    _replaces: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._is_hf_initialized = True
        with torch.device("meta"):
            original = self._replaces(*args, **kwargs)
        # Kept out of the module tree: it has the shapes of the weights, and takes the stub's place later.
        object.__setattr__(self, "original", original)
        layout = describe(original)
        assert layout is not None
        for name, parameter in original.named_parameters(recurse=False):
            if name not in layout.names:
                self._parameters[name] = parameter
        for name, child in original.named_children():
            if not any(path.startswith(f"{name}.") for path in layout.names):
                self._modules[name] = child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def restore(self) -> nn.Module:
        """Return the original, with what was loaded beside the experts' weights."""
        self.original._parameters.update(self._parameters)
        self.original._modules.update(self._modules)
        return self.original.eval()


@contextlib.contextmanager
def _ignore_unexpected(cls: type[PreTrainedModel], found: Mapping[str, ExpertLayout]) -> Iterator[None]:
    """Keep transformers from reporting the experts' weights as unexpected."""
    patterns = [rf"{re.escape(path)}\." for path in found]
    before = cls.__dict__.get("_keys_to_ignore_on_load_unexpected", ...)
    inherited = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(inherited or []), *patterns]
    try:
        yield
    finally:
        if before is ...:
            del cls._keys_to_ignore_on_load_unexpected
        else:
            cls._keys_to_ignore_on_load_unexpected = before
