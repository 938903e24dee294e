"""The gate predictor: a later layer's own router, asked today (paper, section on skip-based prediction).

Training-free. What a layer's router was given goes back to the standardised state u, and one product with the
routers of all later layers in reach, gains folded in, gives what each would choose if nothing changed on the way.
The weights of a stack of layers lie one after the other, each once, whatever the distance; on a CPU small ones, and
those beside which something was learned, are copied for each layer that they are asked from, as it is fastest.

Letters: T tokens, N layers looked at together, G rows of a router, E experts, D model dim, K experts named.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from promoe_triton.predictors.gates import Gate, Gates, TokenRoutes
from promoe_triton.predictors.learned import Head, Heads
from promoe_triton.predictors.norms import Norm
from promoe_triton.predictors.reach import Reach, Target
from promoe_triton.predictors.scoring import Rule, over_tokens
from promoe_triton.protocols import Observation, Prediction, Seam

logger = logging.getLogger(__name__)

UNLIKE = 0.1
"""How far the mean square of u may be from 1, or the share of a call's experts missed, before a layer is refused."""

EQUAL = 0.02
"""By what part of the range of a token's scores two experts may differ and still be taken for equally good."""


class GatePredictor:
    """Ranks experts by the scores their own router would give them now.

    The first observation of each layer is compared with what its router chose; a layer that differs is reported
    once, by name, and neither looked ahead from nor predicted. That comparison waits for the host, nothing else
    does. Scores are the router's own, summed over tokens; of one token its logits, where they are in the same order.
    heads: what was learned beside the gates, or in place of them (see `learned`).
    """

    stateless = True

    def __init__(self, gates: Gates, reach: Reach, heads: Heads | None = None) -> None:
        self._gates = list(gates.layers)
        self._heads = heads or {}
        self._reach = reach
        self._layers_after = {
            (layer, seam): tuple(reach.targets(gates.stacks, layer, seam))
            for layer in range(len(gates.layers))
            for seam in Seam
        }
        self._banks = _banks(gates)
        for bank in self._banks:
            for layer, weight_GD in zip(bank.layers, bank.weight_GD.chunk(len(bank.layers)), strict=True):
                gate = self._gates[layer]
                assert isinstance(gate, Gate)
                self._gates[layer] = replace(gate, weight_GD=weight_GD)
        self._plans: dict[tuple[int, Seam], tuple[_Run, ...]] = {}
        self._confirmed: set[int] = set()
        self._refused: set[int] = {i for i, gate in enumerate(gates.layers) if gate is None}

    def predict(self, seen: Observation) -> Sequence[Prediction]:
        """Rank experts of the layers in reach. Says nothing where the layer or all in reach have no gate."""
        source = self._gates[seen.layer]
        if not seen.tokens:
            return ()
        named = self._by_token(seen)
        if source is None or seen.state_TD is None:
            return named
        if seen.seam is Seam.ROUTED and seen.layer not in self._confirmed:
            self._confirm(source, seen, seen.state_TD)
        if seen.layer in self._refused:
            return named
        u_TD: Tensor | None = None
        for run in self._plan(seen):
            if not run.of_state and u_TD is None:
                u_TD = _standardised(source.norm, seen.seam, seen.state_TD)
            named += self._look(run, seen.state_TD if u_TD is None or run.of_state else u_TD)
        return named

    def _look(self, run: _Run, u_TD: Tensor) -> list[Prediction]:
        """Ask the routers of a run of layers in one product."""
        T = len(u_TD)
        logits_TNG = run.logits(u_TD.to(run.weight_DG.dtype)).view(T, len(run.targets), -1)
        if T == 1 and run.correction_NG is None and run.rule.keeps_order:
            scores_NG = logits_TNG[0]
        else:
            scores_NG = over_tokens(run.rule.scores(logits_TNG, run.correction_NG))
        scores_NE = scores_NG if scores_NG.shape[1] == run.experts else scores_NG[:, : run.experts]
        best_NK, ids_NK = scores_NE.topk(self._reach.named(run.experts, run.rule.active, T))
        return [
            Prediction(layer=target.layer, steps=target.steps, expert_ids=ids_K, scores=best_K)
            for target, ids_K, best_K in zip(run.targets, ids_NK.unbind(), best_NK.unbind(), strict=True)
            if target.layer not in self._refused
        ]

    def _by_token(self, seen: Observation) -> list[Prediction]:
        """Name the experts of layers that route by token id, exactly."""
        named: list[Prediction] = []
        if seen.token_ids_T is None:
            return named
        for target in self._layers_after[seen.layer, seen.seam]:
            routes = self._gates[target.layer]
            if isinstance(routes, TokenRoutes) and target.steps == 0:
                ids = routes.ids_VA[seen.token_ids_T].flatten()
                counts_E = torch.bincount(ids, minlength=routes.experts)[: routes.experts].float()
                best = counts_E.topk(min(len(ids), routes.experts))
                # Tokens may share experts: the places left over name none.
                ids_K = best.indices.masked_fill(best.values == 0, -1)
                named.append(Prediction(layer=target.layer, steps=0, expert_ids=ids_K, scores=best.values))
        return named

    def _plan(self, seen: Observation) -> tuple[_Run, ...]:
        key = (seen.layer, seen.seam)
        if key not in self._plans:
            source = self._gates[seen.layer]
            assert source is not None
            runs = _runs(self._banks, self._gates, source.norm, self._layers_after[key])
            head = self._heads.get(key)
            if head is not None:
                order = [target.layer for target in self._layers_after[key]]
                runs = [part for run in runs for part in _learned(run, head, order)]
            norm = source.norm if seen.seam is Seam.ROUTED and source.norm.is_gain else None
            self._plans[key] = tuple(_quick(run, norm) for run in runs)
        return self._plans[key]

    def _confirm(self, source: Gate | TokenRoutes, seen: Observation, state_TD: Tensor) -> None:
        """Refuse a layer that is not what was read: another norm before its router, or another choice."""
        self._confirmed.add(seen.layer)
        u_TD = _standardised(source.norm, seen.seam, state_TD)
        square = float(u_TD.square().mean())
        if source.norm.is_affine and abs(square - 1.0) > UNLIKE:
            self._refuse(seen.layer, f"what it is given is not what its norm gives (mean square {square:.3g}, not 1)")
            return
        ids_TA = seen.expert_ids_TA
        if isinstance(source, TokenRoutes) or ids_TA is None or len(ids_TA) != len(u_TD):
            return
        asked = ids_TA < source.experts
        scores_TE = source.scores(u_TD)[:, : source.experts]
        least_T1 = scores_TE.topk(min(ids_TA.shape[1], source.experts)).values[:, -1:]
        # The router rounds otherwise: it may prefer one of two experts that are all but equal.
        slack_T1 = EQUAL * (scores_TE.amax(-1, keepdim=True) - scores_TE.amin(-1, keepdim=True))
        scores_TA = scores_TE.gather(1, ids_TA.clamp(max=source.experts - 1))
        right = ((scores_TA >= least_T1 - slack_T1) & asked).sum() / asked.sum().clamp(min=1)
        if asked.any() and float(right) < 1.0 - UNLIKE:
            self._refuse(seen.layer, f"only {float(right):.0%} of the experts it chose are those its weights give")

    def _refuse(self, layer: int, reason: str) -> None:
        self._refused.add(layer)
        source = self._gates[layer]
        assert source is not None
        logger.warning("no gate prediction for MoE layer %d (%s): %s", layer, source.name, reason)


def _standardised(norm: Norm, seam: Seam, state_TD: Tensor) -> Tensor:
    return norm.undo(state_TD) if seam is Seam.ROUTED else norm.standardise(state_TD)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Bank:
    """The gates of layers of one stack that follow each other and choose alike, their weights joined."""

    layers: tuple[int, ...]
    like: Gate
    weight_GD: Tensor
    bias_G: Tensor
    correction_NG: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """Consecutive layers of a bank, as one product.

    inner: what was learned, (in_DR, in_R, out_RG). gated: whether that is added to what the gates say, or to the bias.
    of_state: it is asked with what a router was given, not with u.
    """

    targets: tuple[Target, ...]
    experts: int
    rule: Rule
    weight_DG: Tensor
    bias_G: Tensor
    correction_NG: Tensor | None
    inner: tuple[Tensor, Tensor, Tensor] | None = None
    gated: bool = True
    of_state: bool = False

    def logits(self, u_TD: Tensor) -> Tensor:
        """Return the logits of all its layers, [T, N G]."""
        said_TG = torch.addmm(self.bias_G, u_TD, self.weight_DG) if self.gated else self.bias_G
        if self.inner is None:
            return said_TG
        in_DR, in_R, out_RG = self.inner
        inner_TR = torch.addmm(in_R, u_TD, in_DR).relu_()
        if out_RG.dtype != inner_TR.dtype:
            said_TG, inner_TR = said_TG.to(out_RG.dtype), inner_TR.to(out_RG.dtype)
        return torch.addmm(said_TG, inner_TR, out_RG)

    def part(self, begin: int, end: int) -> _Run:
        """Return some of its layers, of the gates alone."""
        G = len(self.bias_G) // len(self.targets)
        return replace(
            self,
            targets=self.targets[begin:end],
            weight_DG=self.weight_DG[:, begin * G : end * G],
            bias_G=self.bias_G[begin * G : end * G],
            correction_NG=None if self.correction_NG is None else self.correction_NG[begin:end],
        )


def _learned(run: _Run, head: Head, order: Sequence[int]) -> list[_Run]:
    """Return a run with its part of what was learned. order: the layers in reach, as the head has them."""
    places = [order.index(target.layer) for target in run.targets]
    known = sum(place < head.reach for place in places)
    head = head.like(run.weight_DG)
    mine = places[:known]
    found = []
    if known:
        out_RG = head.out_RHG[:, mine].flatten(1)
        part = replace(run.part(0, known), inner=(_by_columns(head.in_DR), head.in_R, _by_columns(out_RG)))
        if head.out_HG is not None:
            part = replace(part, gated=False, bias_G=head.out_HG[mine].flatten())
        found.append(part)
    if known < len(places):
        found.append(run.part(known, len(places)))
    return found


def _by_columns(matrix: Tensor) -> Tensor:
    """Return a matrix whose columns lie side by side, as the gates' do: for one row it is twice as fast on a CPU."""
    return matrix.T.contiguous().T


SMALL = 1 << 18
"""Weights of a product up to which it is fastest in single precision on a CPU: what counts is operations, not bytes."""


def _quick(run: _Run, norm: Norm | None) -> _Run:
    """Return a run as it is fastest: on a CPU, where it is small or something was learned, as a copy that has the way
    from a router's input to u in it.

    norm: what that router's input went through; None: it is asked with u.
    """
    weight_DG, inner = run.weight_DG, run.inner
    is_small = weight_DG.numel() <= SMALL
    if not weight_DG.is_cpu or not (is_small or inner):
        return run
    dtype = torch.float32 if is_small else weight_DG.dtype

    def quick(matrix_DN: Tensor) -> Tensor:
        return (matrix_DN if norm is None else norm.folded(matrix_DN.float())).to(dtype)

    if inner is not None:
        in_DR, in_R, out_RG = inner
        inner = (quick(in_DR), in_R.to(dtype), out_RG.float() if out_RG.numel() <= SMALL else out_RG.to(dtype))
    return replace(run, weight_DG=quick(weight_DG), bias_G=run.bias_G.to(dtype), inner=inner, of_state=norm is not None)


def _banks(gates: Gates) -> list[_Bank]:
    """Join the gates of each stack that choose alike."""
    groups: list[list[int]] = []
    last_of_stack: dict[str, list[int]] = {}
    for layer, (gate, stack) in enumerate(zip(gates.layers, gates.stacks, strict=True)):
        if not isinstance(gate, Gate):
            continue
        group = last_of_stack.get(stack)
        if group is None or not _alike(gates.layers[group[-1]], gate):
            group = last_of_stack[stack] = []
            groups.append(group)
        group.append(layer)
    return [_bank(group, [gate for i in group if isinstance(gate := gates.layers[i], Gate)]) for group in groups]


def _bank(layers: Sequence[int], gates: Sequence[Gate]) -> _Bank:
    return _Bank(
        layers=tuple(layers),
        like=replace(gates[0], weight_GD=gates[0].weight_GD[:0]),
        weight_GD=torch.cat([gate.weight_GD for gate in gates]),
        bias_G=torch.cat([gate.bias_G for gate in gates]).to(gates[0].weight_GD.dtype),
        correction_NG=_stacked([gate.correction_G for gate in gates]),
    )


def _stacked(corrections: Sequence[Tensor | None]) -> Tensor | None:
    known = next((correction for correction in corrections if correction is not None), None)
    if known is None:
        return None
    return torch.stack([torch.zeros_like(known) if one is None else one for one in corrections])


def _alike(one: Gate | TokenRoutes | None, other: Gate) -> bool:
    return (
        isinstance(one, Gate)
        and (one.rule, one.experts, one.weight_GD.shape) == (other.rule, other.experts, other.weight_GD.shape)
        and (one.weight_GD.dtype, one.weight_GD.device) == (other.weight_GD.dtype, other.weight_GD.device)
        and _same_state(one.norm, other.norm)
    )


def _same_state(one: Norm, other: Norm) -> bool:
    """Whether u of one norm is u of the other."""
    return one.standard is other.standard and one.gain_D.shape == other.gain_D.shape


def _runs(
    banks: Sequence[_Bank], gates: Sequence[Gate | TokenRoutes | None], norm: Norm, targets: Sequence[Target]
) -> list[_Run]:
    """Cut the targets out of the banks, as few products as their layers allow."""
    runs = []
    for bank in banks:
        if not _same_state(norm, bank.like.norm):
            continue
        wanted = {target.layer: target for target in targets}
        places = [i for i, layer in enumerate(bank.layers) if layer in wanted]
        if places:
            # The layers in reach are neighbours in their stack, and so in the bank.
            first, end = places[0], places[-1] + 1
            G = len(bank.like.bias_G)
            runs.append(
                _Run(
                    targets=tuple(wanted[layer] for layer in bank.layers[first:end]),
                    experts=bank.like.experts,
                    rule=bank.like.rule,
                    weight_DG=bank.weight_GD[first * G : end * G].T,
                    bias_G=bank.bias_G[first * G : end * G],
                    correction_NG=None if bank.correction_NG is None else bank.correction_NG[first:end],
                )
            )
    return runs
