"""Reading the gates of a model: each layer's norm, router weights and rule, tried against the router itself.

A gate that does not give its router's own choice is refused, by name and with the reason. Letters: T tokens,
E experts, G rows of a router (E, or more where some stand for no expert), A active experts per token, D model dim,
V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from promoe_triton.predictors.norms import Norm, no_norm, read_norm
from promoe_triton.predictors.places import Place, find_place, run_router
from promoe_triton.predictors.scoring import GroupScore, Rule, Scoring

PROBES = 512
"""Random states on which a gate must give its router's choice; with few, a sigmoid passes for a softmax."""

TIE = 1e-4
"""Scores nearer than this share of a token's spread count as equal: rounding may choose either."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """A router of E experts as one product: logits = weight_GD @ u + bias_G, u the standardised state.

    The gain and shift of the layer's norm are folded in. correction_G: the router's bias on scores, None where it
    has none. The weights have the router's own dtype, the rest is single precision. digest: of the router's weights,
    whatever their dtype.
    """

    name: str
    norm: Norm
    experts: int
    weight_GD: Tensor
    bias_G: Tensor
    correction_G: Tensor | None
    rule: Rule
    digest: str

    def scores(self, u_TD: Tensor) -> Tensor:
        """Return the scores that the router compares, [T, G], from the standardised state."""
        logits_TG = u_TD.to(self.weight_GD.dtype) @ self.weight_GD.T + self.bias_G
        return self.rule.scores(logits_TG, self.correction_G)

    def like(self, matrix: Tensor) -> Gate:
        """Return this gate where `matrix` is, its weights in that dtype."""
        return replace(
            self,
            norm=self.norm.to(matrix.device),
            weight_GD=self.weight_GD.to(matrix),
            bias_G=self.bias_G.to(matrix.device),
            correction_G=None if self.correction_G is None else self.correction_G.to(matrix.device),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenRoutes:
    """A router of E experts that goes by the token's id: ids_VA. Its norm serves to look ahead from its layer."""

    name: str
    norm: Norm
    experts: int
    ids_VA: Tensor
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """The gates of a model by layer, in the order of its experts modules; None where one is refused.

    stacks: which layers follow each other, by layer: equal values are one stack. refused: why there is no gate,
    by the path of the experts; the reasons name the router's class.
    """

    layers: tuple[Gate | TokenRoutes | None, ...]
    stacks: tuple[str, ...]
    refused: Mapping[str, str]


@torch.no_grad()
def read_gates(model: nn.Module, experts: Mapping[str, int]) -> Gates:
    """Read the gates of a model whose routers and norms hold their weights.

    experts: how many experts each experts module has, by its path, in the model's order.
    """
    layers: list[Gate | TokenRoutes | None] = []
    stacks, refused = [], {}
    for path, E in experts.items():
        place = find_place(model, path)
        stacks.append(place.stack)
        try:
            layers.append(_read(model, place, E))
        except ValueError as reason:
            layers.append(None)
            refused[path] = str(reason)
    return Gates(layers=tuple(layers), stacks=tuple(stacks), refused=refused)


def _read(model: nn.Module, place: Place, E: int) -> Gate | TokenRoutes:
    if place.router is None:
        raise ValueError(f"{type(model.get_submodule(place.block)).__name__} has no router beside its experts")
    block = model.get_submodule(place.block)
    original: Any = model.get_submodule(place.router)
    name = type(original).__name__
    # A copy in single precision: what is tried is the structure, not this dtype's rounding.
    router: Any = _plain_copy(original)
    owner, matrix = _matrix(router, name)
    D = matrix.shape[1]
    if isinstance(getattr(original, "tid2eid", None), Tensor):
        norm = _outer_norm(model, place, name, D).to(original.tid2eid.device)
        ids_VA = original.tid2eid.long()
        return TokenRoutes(name=name, norm=norm, experts=E, ids_VA=ids_VA, digest=_digest(ids_VA))
    norm = _inner_norm(router, block, owner, D) or _outer_norm(model, place, name, D)
    states = torch.randn(PROBES, D, generator=torch.Generator().manual_seed(1))
    seen_TD = states if norm.inside else norm.standardise(states) * norm.gain_D + norm.shift_D
    chosen_TA = run_router(router, block, seen_TD)
    u_TD = norm.undo(seen_TD)
    weight = matrix.detach().float()
    bias = getattr(owner, "bias", None)
    bias = torch.zeros(len(weight)) if bias is None else bias.detach().float()
    digest = _digest(matrix.detach().to(torch.bfloat16).view(torch.int16))
    for rule, correction in _candidates(router, block, len(weight), chosen_TA.shape[1], bias):
        G = len(correction)
        gate = Gate(
            name=name,
            norm=norm,
            experts=E,
            weight_GD=weight[:G] * norm.gain_D,
            bias_G=bias[:G] + weight[:G] @ norm.shift_D,
            correction_G=correction if correction.any() else None,
            rule=rule,
            digest=digest,
        )
        if _reproduces(gate, u_TD, chosen_TA):
            return gate.like(_matrix(original, name)[1])
    raise ValueError(f"{name}: its own choice is not reproduced from its weights by any rule known")


def _digest(numbers: Tensor) -> str:
    return hashlib.blake2b(numbers.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy on the CPU, in single precision and without hooks."""
    plain = copy.deepcopy(module).to(device="cpu", dtype=torch.float32)
    for part in plain.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return plain


def _matrix(router: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    matrices = [path for path, parameter in router.named_parameters() if parameter.squeeze().dim() == 2]
    if len(matrices) != 1:
        raise ValueError(f"{name} is not one product: it has {len(matrices)} matrices")
    owner = router.get_submodule(matrices[0].rpartition(".")[0])
    return owner, router.get_parameter(matrices[0])


def _inner_norm(router: nn.Module, block: nn.Module, owner: nn.Module, D: int) -> Norm | None:
    """Return the norm that a router applies itself before its product, None where it has none."""
    if owner is router or not hasattr(router, "norm"):
        return None
    kept: list[Tensor] = []

    def apply(states: Tensor) -> Tensor:
        run_router(router, block, states)
        return kept.pop().reshape(-1, D)

    handle = owner.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    try:
        return read_norm(apply, D, inside=True)
    finally:
        handle.remove()


def _outer_norm(model: nn.Module, place: Place, name: str, D: int) -> Norm:
    if place.norm is None:
        if place.bare:
            return no_norm(D)
        raise ValueError(f"{name}: no norm is known whose output it is given")
    module = _plain_copy(model.get_submodule(place.norm))
    try:
        return read_norm(module, D, inside=False)
    except ValueError as reason:
        raise ValueError(f"{name}: {type(module).__name__}: {reason}") from reason
    except RuntimeError as mismatch:
        raise ValueError(f"{name}: {place.norm} is no norm of {D} numbers") from mismatch


def _candidates(router: nn.Module, block: nn.Module, G: int, A: int, bias_G: Tensor) -> Iterator[tuple[Rule, Tensor]]:
    """Name the ways in which this router may choose, by what it and its block have; the usual ones first."""
    corrections = [*_corrections(router, G), *_corrections(block, G), torch.zeros(G)]
    groups = _number(router, block, "num_group", "n_group")
    kept = _number(router, block, "topk_group")
    grouped = [{"groups": groups, "kept": kept, "group_score": score} for score in GroupScore]
    groupings: list[dict[str, Any]] = grouped if groups and kept and kept < groups else []
    multiplier = float(getattr(router, "output_multiplier", 1.0))
    softcap = float(getattr(router, "router_logit_softcapping", 0.0)) or None
    for grouping, scoring, correction in itertools.product([*groupings, {}], Scoring, corrections):
        yield Rule(scoring=scoring, active=A, multiplier=multiplier, softcap=softcap, **grouping), correction


def _corrections(module: nn.Module, G: int) -> list[Tensor]:
    """Biases on scores: of this module, not of its experts; shorter than G where the last rows are not chosen."""
    found = []
    for name, tensor in itertools.chain(module.named_buffers(), module.named_parameters()):
        first, _, rest = name.partition(".")
        of_experts = rest and first.endswith("experts")
        if name.endswith("bias") and name != "bias" and not of_experts and 1 < tensor.numel() <= G:
            found.append(tensor.detach().float().cpu().reshape(-1))
    return found


def _number(router: nn.Module, block: nn.Module, *names: str) -> int | None:
    for module, name in itertools.product((router, block), names):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return None


def _reproduces(gate: Gate, u_TD: Tensor, chosen_TA: Tensor) -> bool:
    """Whether the experts a router chose are those with the best scores, up to ties."""
    scores_TG = gate.scores(u_TD)
    if chosen_TA.shape[1] > scores_TG.shape[1] or int(chosen_TA.max()) >= scores_TG.shape[1]:
        return False
    finite = scores_TG.masked_fill(scores_TG == -torch.inf, torch.nan)
    spread_T = finite.nan_to_num(-torch.inf).amax(-1) - finite.nan_to_num(torch.inf).amin(-1)
    best_TA = scores_TG.topk(chosen_TA.shape[1], -1).values
    least_T = scores_TG.gather(1, chosen_TA).amin(-1)
    return bool((least_T >= best_TA[:, -1] - TIE * spread_T).all())
