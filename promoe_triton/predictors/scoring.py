"""How a router turns logits into a choice: data, with one function that applies it to many layers at once.

Letters: T tokens, L layers, E experts (with those that stand for none, where a family has such), A active
experts per token.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Scoring(enum.Enum):
    """What is applied to the logits before they are compared."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt(softplus)"
    LOGITS = "none"


class GroupScore(enum.Enum):
    """What a group of experts is judged by."""

    TOP2 = "sum of its two best"
    BEST = "its best"


_SCORE: dict[Scoring, Callable[[Tensor], Tensor]] = {
    Scoring.SOFTMAX: lambda logits: logits.softmax(-1),
    Scoring.SIGMOID: torch.sigmoid,
    Scoring.SQRT_SOFTPLUS: lambda logits: F.softplus(logits).sqrt(),
    Scoring.LOGITS: lambda logits: logits,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """From logits to the scores that a router chooses by.

    active: A, how many experts a token gets.
    groups, kept: only experts of the `kept` best of `groups` equal groups can be chosen; 1 and 1: all can.
    multiplier: of the logits. softcap: logits are held within it by a tanh; None: they are not.
    """

    scoring: Scoring
    active: int
    groups: int = 1
    kept: int = 1
    group_score: GroupScore = GroupScore.TOP2
    multiplier: float = 1.0
    softcap: float | None = None

    @property
    def keeps_order(self) -> bool:
        """Whether, with no correction, a larger logit is a larger score, or an equal one."""
        return self.kept == self.groups and self.multiplier > 0.0

    def scores(self, logits: Tensor, correction: Tensor | None) -> Tensor:
        """Return what is compared, [..., E] in single precision: minus infinity where a group was left out.

        correction: the router's bias on scores, broadcast over the logits [..., E]; None where it has none.
        """
        logits = logits.float()
        if self.multiplier != 1.0:
            logits = logits * self.multiplier
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        scores = _SCORE[self.scoring](logits)
        if correction is not None:
            scores = scores + correction
        return scores if self.kept == self.groups else self._within_groups(scores)

    def _within_groups(self, scores: Tensor) -> Tensor:
        grouped = scores.reshape(*scores.shape[:-1], self.groups, -1)
        best = 1 if self.group_score is GroupScore.BEST else min(2, grouped.shape[-1])
        chosen = grouped.topk(best, -1).values.sum(-1).topk(self.kept, -1).indices
        left_out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, chosen, False)
        return grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(-2)


def over_tokens(scores: Tensor) -> Tensor:
    """Sum scores over their first dimension, the tokens: [T, ...] -> [...] (paper, section on batches).

    A token that cannot choose an expert gives it nothing; a single token's scores stay what they are.
    """
    if len(scores) == 1:
        return scores[0]
    return scores.masked_fill(scores == -torch.inf, 0.0).sum(0)
