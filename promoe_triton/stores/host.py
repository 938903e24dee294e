"""Experts in the model's own parameters: where they are computed with, or at rest beside slots elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from promoe_triton.layout import ExpertLayout
from promoe_triton.protocols import ExpertKey, ExpertSpec, ExpertTensors, Part
from promoe_triton.stores.image import Piece, SlotImage, slot_image
from promoe_triton.stores.registration import Registration


class ResidentStore:
    """The stacked parameters of the experts modules, which are the slots: nothing is ever moved."""

    def __init__(self, modules: Sequence[nn.Module], layouts: Sequence[ExpertLayout]) -> None:
        self._modules = tuple(modules)
        self._layouts = tuple(layouts)

    @property
    def specs(self) -> Sequence[ExpertSpec]:
        pairs = zip(self._modules, self._layouts, strict=True)
        return [layout.spec(module) for module, layout in pairs]

    def load(self, key: ExpertKey) -> ExpertTensors:
        module, layout = self._modules[key.layer], self._layouts[key.layer]
        return {name: layout.cut(module.get_parameter(name).detach(), key.expert) for name in layout.names}

    def describe(self) -> str:
        return "the model's own parameters (everything resident)"


class HostStore:
    """Experts at rest in the host's memory, as loaded: no second copy.

    tensors: the stacked parameters of each layer by name. They are not to change while this is in use.
    """

    def __init__(
        self,
        specs: Sequence[ExpertSpec],
        layouts: Sequence[ExpertLayout],
        tensors: Sequence[Mapping[str, Tensor]],
    ) -> None:
        self._specs = tuple(specs)
        self._layouts = tuple(layouts)
        self._tensors = tuple({name: tensor.detach() for name, tensor in layer.items()} for layer in tensors)
        self.registration = Registration(self.tensors())
        self._bytes = tuple(
            {name: tensor.view(-1).view(torch.uint8) for name, tensor in layer.items() if tensor.is_contiguous()}
            for layer in self._tensors
        )
        self._nbytes = tuple({tensor.name: tensor.nbytes for tensor in spec.tensors} for spec in specs)
        images = {spec: _images(spec) for spec in set(specs)}
        self._images = tuple(images[spec] for spec in specs)

    @property
    def specs(self) -> Sequence[ExpertSpec]:
        return self._specs

    def load(self, key: ExpertKey) -> ExpertTensors:
        layout = self._layouts[key.layer]
        return {name: layout.cut(tensor, key.expert) for name, tensor in self._tensors[key.layer].items()}

    def stacked(self, layer: int) -> Mapping[str, Tensor]:
        """Return the parameters of a layer, as they are."""
        return self._tensors[layer]

    def tensors(self) -> list[Tensor]:
        """Return all stacked parameters, those that layers share once."""
        return list({t.data_ptr(): t for layer in self._tensors for t in layer.values()}.values())

    def bytes_of(self, key: ExpertKey, name: str) -> Tensor:
        """Return the bytes of one of an expert's tensors, uint8, a view where they lie together."""
        flat = self._bytes[key.layer].get(name)
        if flat is None:
            cut = self._layouts[key.layer].cut(self._tensors[key.layer][name], key.expert)
            return cut.reshape(-1).view(torch.uint8)
        nbytes = self._nbytes[key.layer][name]
        return flat[key.expert * nbytes : (key.expert + 1) * nbytes]

    @property
    def lies_together(self) -> bool:
        """Whether each tensor of an expert is a range of memory, so that its bytes are a view."""
        return all(len(mine) == len(layer) for mine, layer in zip(self._bytes, self._tensors, strict=True))

    def image(self, key: ExpertKey, part: Part = Part.WHOLE) -> SlotImage:
        """Lay out an expert in a slot, aligned; it has an extent for each of its tensors."""
        return self._images[key.layer][part]

    def slot_bytes(self, layer: int, experts: int) -> int:
        """Return the room that an expert of a layer needs."""
        return self._images[layer][Part.WHOLE].slot_bytes

    def position(self, key: ExpertKey) -> tuple[int, int]:
        """Return where an expert lies among the others."""
        return key

    def describe(self) -> str:
        return "the host's memory"


def _images(spec: ExpertSpec) -> dict[Part, SlotImage]:
    """Return how an expert, and each part of it, lies in a slot."""
    whole = slot_image(spec, {t.name: [Piece(nbytes=t.nbytes)] for t in spec.tensors}, direct=False)
    return {part: whole.of(part) for part in Part.__members__.values()}
