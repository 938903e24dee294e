"""What a norm does, as data: x = gain * u + shift, where u is the standardised state.

A later router wants its own norm of the state, but a layer's router was given that layer's norm of it. Where both
norms standardise alike, u is the same for both, so gain and shift can be taken back out of one and folded into
the weights of the other: exact, up to rounding. D: model dim.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


class Standard(enum.Enum):
    """How a state is standardised before gain and shift."""

    RMS = "divided by its root mean square"
    MEAN_VARIANCE = "centred, and divided by its standard deviation"
    NONE = "taken as it is"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """x = gain_D * u + shift_D with u the standardised state; inside: the router itself applies it."""

    standard: Standard
    gain_D: Tensor
    shift_D: Tensor
    eps: float
    inside: bool
    inverse_D: Tensor = field(init=False)
    offset_D: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # u = inverse_D * x + offset_D, in one operation.
        object.__setattr__(self, "inverse_D", 1.0 / self.gain_D)
        object.__setattr__(self, "offset_D", -self.shift_D / self.gain_D)

    def to(self, device: torch.device) -> Norm:
        return replace(self, gain_D=self.gain_D.to(device), shift_D=self.shift_D.to(device))

    def standardise(self, state: Tensor) -> Tensor:
        """Return u of a residual stream [..., D], in single precision."""
        state = state.float()
        if self.standard is Standard.NONE:
            return state
        if self.standard is Standard.RMS:
            return F.rms_norm(state, state.shape[-1:], eps=self.eps)
        return F.layer_norm(state, state.shape[-1:], eps=self.eps)

    @property
    def is_affine(self) -> bool:
        """Whether u is what a router was given, times and plus something: it was standardised before."""
        return not self.inside and self.standard is not Standard.NONE

    @property
    def is_gain(self) -> bool:
        """Whether u is what a router was given, over the gain: nothing else has to cancel."""
        return self.is_affine and not self.shift_D.any()

    def undo(self, x: Tensor) -> Tensor:
        """Return u of what a router was given [..., D], in single precision."""
        if not self.is_affine:
            return self.standardise(x)
        return torch.addcmul(self.offset_D, x.float(), self.inverse_D)

    def folded(self, weight_DG: Tensor) -> Tensor:
        """Return what makes of a router's input what this makes of u, where `is_gain`. Columns lie as they did."""
        return (weight_DG.T * self.inverse_D).T


def read_norm(apply: Callable[[Tensor], Tensor], D: int, *, inside: bool) -> Norm:
    """Return what `apply`, a norm of [..., D], does, learned from what it makes of a few single-precision states.

    Raises ValueError, with the reason, where it is no gain and shift of a standardised state, or has gains of
    zero: then u cannot be had back from x.
    """
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, D, generator=generator)
    for standard in (Standard.RMS, Standard.MEAN_VARIANCE):
        blank = Norm(standard=standard, gain_D=torch.ones(D), shift_D=torch.zeros(D), eps=0.0, inside=inside)
        # An odd part and an even one: a gain and a shift, if it is of this kind.
        u, x, opposite = blank.standardise(states), apply(states), apply(-states)
        gains = (x - opposite) / 2 / u
        # Where u is small its quotient is all rounding: take the state with the largest u.
        largest = u.abs().argmax(0, keepdim=True)
        gain_D = gains.gather(0, largest)[0]
        shift_D = ((x + opposite) / 2).mean(0)
        if not torch.allclose(u * gain_D + shift_D, x, rtol=1e-3, atol=1e-4 * float(x.abs().max())):
            continue
        if float(gain_D.abs().min()) <= 1e-6 * float(gain_D.abs().max()):
            raise ValueError("its norm has gains of zero, so that the state cannot be had back")
        return Norm(standard=standard, gain_D=gain_D, shift_D=shift_D, eps=_eps(apply, states), inside=inside)
    raise ValueError("its norm is no gain and shift of a standardised state")


def no_norm(D: int) -> Norm:
    """Return what stands for a norm where the router is given the residual stream as it is."""
    return Norm(standard=Standard.NONE, gain_D=torch.ones(D), shift_D=torch.zeros(D), eps=0.0, inside=False)


def _eps(apply: Callable[[Tensor], Tensor], states: Tensor) -> float:
    """Return what is added to the mean square, from how much smaller a tiny state comes out than a large one."""
    scale = 1e-3
    large, tiny = (float((apply(c * states) - apply(-c * states)).norm()) for c in (1.0, scale))
    return max(0.0, scale**2 * float(states.square().mean()) * ((large / tiny) ** 2 - 1.0))
