"""The rule of speculative sampling: how many drafted tokens stand, and which token follows them.

The draft is known before anything is tested (`d_i ~ q_i`, independent given all that is known then), p_i is the law of
the token at i after the drafted ones before it. Then the tokens that come out follow p exactly, whatever q is
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), under two conditions that are the caller's: q is
the law that the draft was drawn from, and whether place i is tested depends on nothing but accepted tokens before it.
So nobody cuts a draft at an end token or where it seems weak. Pure functions; knows no network and no request.

Leading axes `...` are independent drafts; n drafted tokens, n + 1 laws.
"""

from __future__ import annotations

import torch
from torch import Tensor


def judge_points(drawn: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """The rule where the draft `[..., n]` is no draw but a fixed guess: q_i is a point mass.

    `drawn [..., n + 1]` are draws from the p_i. A guess stands if it is what was drawn, which happens with probability
    p_i(d_i); else the drawn token is one of p_i without d_i, as the rule wants it. So with the keys of
    `mode="ar"` the answer is that mode's answer, token by token. Returns the count `[...]` that stands and the token
    `[...]` that follows.
    """
    accepted = (drawn[..., :-1] == draft).long().cumprod(dim=-1).sum(dim=-1)
    return accepted, drawn.gather(-1, accepted[..., None]).squeeze(-1)


def judge_draws(p: Tensor, q: Tensor, draft: Tensor, accept: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for a draft `[..., n]` drawn from `q [..., n, V]`; `p [..., n + 1, V]`, both float64 probabilities.

    Token i stands if `accept[..., i]`, uniform in [0, 1), is below p_i(d_i) / q_i(d_i). Returns the count `[...]` that
    stands and the law `[..., V]`, not normalised, that the token behind them is to be drawn from: (p - q)+ where a
    drafted one was refused, the last p where all stand.
    """
    index = draft[..., None]
    own, drafted = p[..., :-1, :].gather(-1, index).squeeze(-1), q.gather(-1, index).squeeze(-1)
    accepted = (accept * drafted < own).long().cumprod(dim=-1).sum(dim=-1)
    # Behind the last drafted token nothing was drafted, so nothing is taken away.
    taken = torch.cat([q, torch.zeros_like(p[..., :1, :])], dim=-2)
    law = _at(p, accepted)
    rest = (law - _at(taken, accepted)).clamp(min=0)
    # Where p = q but for rounding, a refusal is rounding, too.
    return accepted, torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, law)


def _at(values: Tensor, place: Tensor) -> Tensor:
    """`values [..., n, V]` at `place [...]` of the axis before the last."""
    index = place[..., None, None].expand(*place.shape, 1, values.shape[-1])
    return values.gather(-2, index).squeeze(-2)
