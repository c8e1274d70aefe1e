"""The diffusion bound of uniform noise, per token: what one noisy position contributes to -log p(text).

Forward process: at noise level t a token is kept with probability a = 1 - t, else it is uniform over V; as a jump
process it leaves at rate beta = 1 / (1 - t), to every token at rate beta / V. Reversed, z becomes y at rate beta /
V * q(y) / q(z), where q(y) = a [y = x0] + t / V; the model puts its prediction p(y) in place of [y = x0] (UDLM,
arXiv 2412.10193). The bound is the integral over t of beta / V * sum over y != z of r_model - r + r log(r /
r_model), with r(y) = q(y) / q(z). Its ends cost nothing: t = 1 is the prior, and at t = 0 nothing is left to guess.

The best p is *not* the posterior given everything the network saw, for the rate multiplies by q(y) itself: it is
the posterior that leaves the position's own token z aside. A denoiser trained with cross-entropy gives the former;
Bayes turns one into the other by a known step of the logit of z (`bayes_shift`). A network that is not told t only
guesses it, so the best step for it is fitted (`likelihood.diffusion_bound`). Any function of (t, noisy block) keeps
the bound a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

T_EDGE = 1e-6


def noise_level(u: Tensor) -> Tensor:
    """Noise levels t = u^2 of uniform numbers u, kept off the ends; to be weighted with `2 u`.

    The bound's variance per token grows like 1/t: uniform t would give it an infinite one, t = u^2 the smallest.
    """
    return u.double().square().clamp(T_EDGE, 1 - T_EDGE)


def bayes_shift(t: Tensor, vocab: int) -> Tensor:
    """What to add to the logit of z to leave it aside: minus the log of P(z | x0 = z) / P(z | x0 = another)."""
    return -torch.log1p((1 - t) * vocab / t)


def token_nelbo(logits: Tensor, noisy: Tensor, clean: Tensor, t: Tensor, shifts: Sequence[Tensor | float]) -> Tensor:
    """The integrand at noise level t, in nats, `[N, S]` float64, for S ways to shift the logit of the noisy token.

    `logits [N, V]` predict the clean token, `noisy, clean [N]` are ids, `t [N]` is in (0, 1), a shift is one number or
    `[N]`.
    """
    vocab, at = logits.shape[1], noisy[:, None]
    # w(y) = p(y) / (1 - p(z)) does not depend on the shift, and no 1 - p(z) is rounded away.
    rest = logits.scatter(1, at, float("-inf"))
    top = torch.logsumexp(rest, dim=1)
    rest = rest.sub_(top[:, None]).exp_()
    own = (logits.gather(1, at).squeeze(1) - top).double()
    w_clean = rest.gather(1, clean[:, None]).squeeze(1).double()

    t = t.double()
    alpha, floor, same = 1 - t, t / vocab, noisy == clean
    q_z = floor + alpha * same
    out_true = (floor * (vocab - 1) + alpha * ~same) / q_z
    results = []
    for shift in shifts:
        odds = own + shift
        left = alpha * torch.sigmoid(-odds)
        m_z = floor + alpha * torch.sigmoid(odds)
        spread = torch.log1p(rest * (left / floor).to(rest.dtype)[:, None]).sum(dim=1).double()
        jump = torch.xlogy(alpha + floor, alpha + floor) - torch.xlogy(floor, floor)
        jump = jump - alpha * torch.log(floor + left * w_clean)
        # sum over y != z of q(y) log(q(y) / m(y)): every y has the floor, the clean token (if it is not z) alpha more.
        cross = torch.where(same, 0.0, jump) - floor * spread
        out_model = (floor * (vocab - 1) + left) / m_z
        ratio = cross / q_z + out_true * torch.log(m_z / q_z)
        results.append((out_model - out_true + ratio) / (alpha * vocab))
    return torch.stack(results, dim=1)
