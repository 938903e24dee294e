"""From a checkpoint's tensors to one expert's tensors, by transformers' own renaming and conversion rules.

A checkpoint may keep experts one by one or stacked, fused or apart, turned or not; transformers knows how to
load each (its weight conversions). Here the same rules are asked which tensors make up a parameter, and are
then run on the tensors of a single expert. Where they only stack and concatenate, the expert is plain ranges
of the file, and nothing is run at all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import WeightConverter, WeightRenaming

from promoe_triton.errors import PromoeError
from promoe_triton.stores.image import Piece
from promoe_triton.stores.safetensors_files import TensorRef


class QuantisedTensor(PromoeError):
    """A checkpoint's expert is kept in numbers that are no weights without their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSource:
    """Where one stacked expert parameter ([E, ...]) comes from.

    refs: the checkpoint's tensors by source pattern: one per expert, or a single stacked one.
    rows: how many rows of a stacked tensor's first dimension belong to one expert.
    """

    parameter: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    experts: int
    refs: Mapping[str, Sequence[TensorRef]]
    converter: Any = None
    config: Any = None

    @property
    def rows(self) -> int:
        return self.shape[0] // self.experts

    def _share(self, refs: Sequence[TensorRef], expert: int) -> TensorRef:
        """Return the part of one source pattern's tensors that belongs to `expert`."""
        if len(refs) == self.experts:
            return refs[expert]
        (stacked,) = refs
        rows = stacked.shape[0] // self.experts
        shape = (rows, *stacked.shape[1:])
        nbytes = stacked.nbytes // self.experts
        return TensorRef(file=stacked.file, offset=stacked.offset + expert * nbytes, shape=shape, dtype=stacked.dtype)

    def shares(self, expert: int) -> dict[str, TensorRef]:
        return {pattern: self._share(refs, expert) for pattern, refs in self.refs.items()}

    @property
    def plain(self) -> bool:
        """Whether an expert is nothing but ranges of the file one after the other."""
        if any(ref.dtype != self.dtype for refs in self.refs.values() for ref in refs):
            return False
        if self.converter is None:
            return True
        operations = self.converter.operations
        patterns = self.converter.source_patterns
        return all(len(refs) == self.experts for refs in self.refs.values()) and (
            (
                [type(op).__name__ for op in operations] == ["MergeModulelist"]
                and operations[0].dim == 0
                and len(patterns) == 1
            )
            or (
                [type(op).__name__ for op in operations] == ["MergeModulelist", "Concatenate"]
                and (operations[0].dim, operations[1].dim) == (0, 1)
            )
        )

    def pieces(self, expert: int) -> list[Piece]:
        """Return the ranges of the files that make up `expert`, in the order of its bytes (if `plain`)."""
        shares = self.shares(expert)
        order = self.converter.source_patterns if self.converter else list(shares)
        return [
            Piece(file=shares[p].file, offset=shares[p].offset, nbytes=shares[p].nbytes) for p in order if p in shares
        ]

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return one expert's tensor, given its share of each source pattern's tensors."""
        cast = {pattern: tensor.to(self.dtype) for pattern, tensor in tensors.items()}
        if self.converter is None:
            (tensor,) = cast.values()
            return tensor
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in cast.items():
            converter.collected_tensors[pattern] = [tensor]
        expected = _OneExpert(self.config, (self.rows, *self.shape[1:]))
        results = converter.convert(self.parameter, model=expected, config=self.config)
        result: list[Tensor] | Tensor = results[self.parameter]
        return result[0] if isinstance(result, list) else result


class _OneExpert:
    """Stands in for the model where a conversion asks for a parameter's shape: that of a single expert."""

    def __init__(self, config: Any, shape: tuple[int, ...]) -> None:
        self.config = config
        self._shape = shape

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shape, device="meta")


def map_parameters(
    model: Any,
    parameters: Mapping[str, int],
    refs: Mapping[str, TensorRef],
    key_mapping: Mapping[str, str] | None = None,
) -> dict[str, ParameterSource]:
    """Find the sources of expert parameters in a checkpoint.

    parameters: full parameter path -> E. refs: the checkpoint's tensors by name.
    Raises PromoeError for a parameter whose experts cannot be read one at a time, naming it.
    """
    rules = conversion_mapping.get_model_conversion_mapping(model, key_mapping)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    found: dict[str, dict[str, list[TensorRef]]] = {name: {} for name in parameters}
    chosen: dict[str, Any] = {}
    for key in sorted(refs, key=core_model_loading.dot_natural_key):
        target, pattern = core_model_loading.rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if target not in state and key in state:
            target, pattern = core_model_loading.rename_source_key(key, [], [], model.base_model_prefix, state)
        if target in found:
            _refuse_quantised(key, refs[key].dtype)
            found[target].setdefault(pattern or key, []).append(refs[key])
            chosen[target] = by_pattern[pattern] if pattern else None
    return {
        name: _source(model, name, experts, state[name], found[name], chosen.get(name))
        for name, experts in parameters.items()
    }


def _refuse_quantised(key: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise QuantisedTensor(
            f"{key} in the checkpoint has dtype {dtype}, but experts must be float32, bfloat16 or float16: quantised "
            "weights are not supported yet"
        )


def _source(
    model: Any,
    name: str,
    experts: int,
    parameter: Tensor,
    refs: Mapping[str, Sequence[TensorRef]],
    converter: Any,
) -> ParameterSource:
    if not refs:
        raise PromoeError(f"the checkpoint has no tensors for {name}")
    for pattern, tensors in refs.items():
        stacked = len(tensors) == 1 and tensors[0].shape[0] % experts == 0
        if len(tensors) != experts and not stacked:
            raise PromoeError(
                f"{name}: {len(tensors)} tensors match {pattern} in the checkpoint, expected one for each of "
                f"{experts} experts or one that stacks them"
            )
    return ParameterSource(
        parameter=name,
        shape=tuple(parameter.shape),
        dtype=parameter.dtype,
        experts=experts,
        refs=refs,
        converter=converter,
        config=model.config,
    )
