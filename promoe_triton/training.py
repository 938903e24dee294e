"""Training the learned predictor from a trace, in minutes on a CPU (paper, section on the learned predictor).

For each layer and seam a correction to the gates is fitted (or the paper's network, to compare with), so that logits
of the layers in reach come near to what their routers then gave: least divergence between both softmaxes, by Adam.
Whole texts, never tokens, are held out; a correction that does not get better on those stays zero.

Letters: N tokens, H layers in reach, G rows of a router, D model dim, R hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from promoe_triton.errors import PromoeError
from promoe_triton.predictors.gates import Gate, Gates
from promoe_triton.predictors.learned import Head, Source, fingerprint
from promoe_triton.predictors.reach import Reach, Target
from promoe_triton.protocols import Seam
from promoe_triton.traces import Document, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    network: the paper's network instead of a correction. distance: layers ahead. width: R, hidden units. patience:
    epochs without progress before it ends.
    """

    network: bool = False
    distance: int = 4
    width: int = 256
    epochs: int = 30
    patience: int = 3
    batch: int = 1024
    rate: float = 2e-3
    held_out: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many of the A experts named for a layer it then chose, on held-out documents: of the gate, and corrected."""

    layer: int
    seam: str
    ahead: int
    target: int
    gate: float
    learned: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Examples:
    """What one source saw (u, standardised), what its gates say, and what came of it."""

    u_ND: Tensor
    truth_NHG: Tensor
    chosen_NHG: Tensor


def sources(gates: Gates, distance: int) -> dict[Source, list[Target]]:
    """Return from where predictions are made while a model runs, and of which layers: those with a gate alike."""
    reach = Reach(distance=distance)
    firsts = {stack: layer for layer, stack in reversed(list(enumerate(gates.stacks)))}.values()
    lasts = {stack: layer for layer, stack in enumerate(gates.stacks)}.values()
    found = {}
    for layer, gate in enumerate(gates.layers):
        for seam in Seam:
            if layer not in {Seam.ENTERED: firsts, Seam.LEFT: lasts}.get(seam, (layer,)):
                continue
            targets = list(reach.targets(gates.stacks, layer, seam))
            alike = all(_alike(gates.layers[target.layer], gate) for target in targets)
            if targets and isinstance(gate, Gate) and alike:
                found[layer, seam] = targets
    return found


def _alike(one: object, other: object) -> bool:
    return (
        isinstance(one, Gate)
        and isinstance(other, Gate)
        and (one.weight_GD.shape, one.rule, one.norm.standard)
        == (other.weight_GD.shape, other.rule, other.norm.standard)
    )


def check_trace(trace: Trace, gates: Gates) -> None:
    """Raise PromoeError unless a trace has the hidden states of the model whose gates these are."""
    trace.check_model(fingerprint(gates))
    shapes = [(layer.experts, layer.hidden) for layer in trace.layers]
    ours = [(gate.experts, gate.weight_GD.shape[1]) if isinstance(gate, Gate) else None for gate in gates.layers]
    if len(shapes) != len(ours) or any(one not in (None, shape) for one, shape in zip(ours, shapes, strict=True)):
        raise PromoeError(f"the trace in {trace.folder} is of another model: {trace.about.get('model')}")
    trace.check_states()
    if not any(isinstance(gate, Gate) for gate in gates.layers):
        whys = "; ".join(sorted({*gates.refused.values()})) or "its layers route by token"
        raise PromoeError(f"there is no gate of this model to learn a correction to: {whys}")
    if trace.documents < 2:
        raise PromoeError(f"the trace in {trace.folder} has a single document, and some must be held out")


def train(
    trace: Trace, gates: Gates, recipe: Recipe, step: Callable[[str], None] = lambda what: None
) -> tuple[dict[Source, Head], list[Score]]:
    """Return what was learned for all sources, and how good it is. step: is told after each of the `sources`.

    Raises PromoeError where a trace does not fit the model, or nothing can be learned from it. Scores are of the
    documents that also said when to end: `evaluate` on others tells more.
    """
    check_trace(trace, gates)
    heads: dict[Source, Head] = {}
    scores = []
    held_out = split([document.text for document in trace.read()], recipe)
    for source, targets in sources(gates, recipe.distance).items():
        examples = _examples((d for d in trace.read() if d.number not in held_out), gates, source, targets)
        tests = _examples((d for d in trace.read() if d.number in held_out), gates, source, targets)
        if examples is None or tests is None:
            step(f"layer {source[0]}: no {source[1].name.lower()} state in the trace")
            continue
        heads[source] = _fit(examples, tests, gates, targets, recipe)
        found = _scores(tests, gates, source, targets, heads[source])
        scores += found
        step(f"layer {source[0]}, {source[1].name.lower()}: {found[0].gate:.1%} to {found[0].learned:.1%}")
    if not heads:
        raise PromoeError(
            f"there is nothing to learn from the trace in {trace.folder}: no layer predicts another's gate"
        )
    return heads, scores


def split(texts: Sequence[int], recipe: Recipe) -> set[int]:
    """Return which documents are held out, given of which text each is: whole texts, up to a tenth of the documents.

    Where no text is that short, the last documents of one: there alone are two neighbours on different sides.
    """
    most, found = max(round(recipe.held_out * len(texts)), 1), set[int]()
    every = sorted({*texts})
    for place in torch.randperm(len(every), generator=torch.Generator().manual_seed(recipe.seed)).tolist():
        mine = [number for number, text in enumerate(texts) if text == every[place]]
        if len(found) + len(mine) <= most:
            found.update(mine)
    return found or {*range(len(texts) - most, len(texts))}


def _examples(
    documents: Iterable[Document], gates: Gates, source: Source, targets: Sequence[Target]
) -> _Examples | None:
    parts = [part for d in documents if (part := _of_document(d, gates, source, targets)) is not None]
    if not parts:
        return None
    u_ND, truth_NHG, chosen_NHG = (torch.cat([part[i] for part in parts]) for i in range(3))
    return _Examples(u_ND=u_ND, truth_NHG=truth_NHG, chosen_NHG=chosen_NHG)


def _of_document(
    document: Document, gates: Gates, source: Source, targets: Sequence[Target]
) -> tuple[Tensor, Tensor, Tensor] | None:
    layer, seam = source
    gate = _gate(gates, layer)
    match seam:
        case Seam.ENTERED:
            state_TD = document.entered_TD(layer)
        case Seam.ROUTED:
            state_TD = document.state_TD(layer)
        case Seam.LEFT:
            state_TD = document.left_TD()
    if state_TD is None:
        return None
    u_TD = gate.norm.undo(state_TD) if seam is Seam.ROUTED else gate.norm.standardise(state_TD)
    steps = targets[0].steps
    truth, chosen = [], []
    for target in targets:
        later = _gate(gates, target.layer)
        seen_TD = document.state_TD(target.layer)
        if seen_TD is None:
            return None
        truth.append(_logits(later, later.norm.undo(seen_TD)).half())
        hot_TG = torch.zeros_like(truth[-1], dtype=torch.bool)
        ids_TA = document.expert_ids_TA(target.layer)
        known_TA = ids_TA < hot_TG.shape[1]
        hot_TG.scatter_(1, ids_TA.clamp(max=hot_TG.shape[1] - 1), known_TA)
        chosen.append(hot_TG)
    # What comes `steps` tokens later is beside what was seen.
    T = document.tokens - steps
    return u_TD[:T], torch.stack(truth, 1)[steps:], torch.stack(chosen, 1)[steps:]


def _gate(gates: Gates, layer: int) -> Gate:
    gate = gates.layers[layer]
    assert isinstance(gate, Gate)
    return gate


def _logits(gate: Gate, u_TD: Tensor) -> Tensor:
    return torch.addmm(gate.bias_G.float(), u_TD.float(), gate.weight_GD.float().T)


def _fit(examples: _Examples, tests: _Examples, gates: Gates, targets: Sequence[Target], recipe: Recipe) -> Head:
    generator = torch.Generator().manual_seed(recipe.seed)
    joined = _joined(gates, targets)
    D, H = joined[0].shape[0], len(targets)
    head = _new(D, recipe.width, H, joined[0].shape[1] // H, recipe.network, generator)
    parameters = [tensor.requires_grad_() for tensor in head.tensors().values()]

    def loss(u_ND: Tensor, truth_NHG: Tensor) -> Tensor:
        found = F.log_softmax(_head_logits(head, joined, u_ND), -1)
        return F.kl_div(found, F.log_softmax(truth_NHG.float(), -1), log_target=True, reduction="sum") / len(u_ND)

    def kept() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def tested() -> float:
        parts = zip(torch.split(tests.u_ND, PART), torch.split(tests.truth_NHG, PART), strict=True)
        return sum(float(loss(*part)) * len(part[0]) for part in parts) / len(tests.u_ND)

    optimiser = torch.optim.Adam(parameters, lr=recipe.rate)
    least, best, since = tested(), kept(), 0
    for _ in range(recipe.epochs):
        shuffled_N = torch.randperm(len(examples.u_ND), generator=generator)
        for begin in range(0, len(shuffled_N), recipe.batch):
            part_N = shuffled_N[begin : begin + recipe.batch]
            optimiser.zero_grad()
            loss(examples.u_ND[part_N], examples.truth_NHG[part_N]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        now = tested()
        since += 1
        if now < least:
            least, best, since = now, kept(), 0
        if since >= recipe.patience:
            break
    dtype = _gate(gates, targets[0].layer).weight_GD.dtype
    return Head(**{name: tensor.to(dtype) for name, tensor in zip(head.tensors(), best, strict=True)})


PART = 16384
"""Held-out tokens looked at together."""


def _new(D: int, R: int, H: int, G: int, network: bool, generator: torch.Generator) -> Head:
    """Return what to start from: a correction by nothing, or a network with random weights."""
    in_DR = torch.randn(D, R, generator=generator) * D**-0.5
    if not network:
        return Head(in_DR=in_DR, in_R=torch.zeros(R), out_RHG=torch.zeros(R, H, G))
    out_RHG = torch.randn(R, H, G, generator=generator) * R**-0.5
    return Head(in_DR=in_DR, in_R=torch.zeros(R), out_RHG=out_RHG, out_HG=torch.zeros(H, G))


def _head_logits(head: Head, gates: tuple[Tensor, Tensor], u_ND: Tensor) -> Tensor:
    """Return the logits [N, H, G] of all targets. gates: their weights and biases, joined."""
    _, H, G = head.out_RHG.shape
    weight_DX, bias_X = gates
    said_NX = torch.addmm(bias_X, u_ND, weight_DX) if head.out_HG is None else head.out_HG.flatten().float()
    inner_NR = torch.addmm(head.in_R.float(), u_ND, head.in_DR.float()).relu()
    logits_NX = torch.addmm(said_NX, inner_NR, head.out_RHG.flatten(1).float())
    return logits_NX.view(len(u_ND), H, G)


def _joined(gates: Gates, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Return the weights [D, H G] and biases [H G] of all targets."""
    found = [_gate(gates, target.layer) for target in targets]
    return torch.cat([gate.weight_GD.float() for gate in found]).T, torch.cat([gate.bias_G.float() for gate in found])


@torch.no_grad()
def _scores(tests: _Examples, gates: Gates, source: Source, targets: Sequence[Target], head: Head) -> list[Score]:
    weight_DX, bias_X = joined = _joined(gates, targets)
    plain_NHG = torch.addmm(bias_X, tests.u_ND, weight_DX).view(tests.truth_NHG.shape)
    learned_NHG = _head_logits(head, joined, tests.u_ND)

    def accuracy(logits_NG: Tensor, place: int) -> float:
        gate = _gate(gates, targets[place].layer)
        named_NA = gate.rule.scores(logits_NG, gate.correction_G)[:, : gate.experts].topk(gate.rule.active).indices
        return float(tests.chosen_NHG[:, place].gather(1, named_NA).float().mean())

    return [
        Score(
            layer=source[0],
            seam=source[1].name,
            ahead=place + (source[1] is not Seam.ENTERED),
            target=target.layer,
            gate=accuracy(plain_NHG[:, place], place),
            learned=accuracy(learned_NHG[:, place], place),
        )
        for place, target in enumerate(targets)
    ]
