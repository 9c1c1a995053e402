"""PNDM: pseudo numerical methods, i.e. classical weights on the noise prediction and DDIM's exact transfer."""

from __future__ import annotations

from fastode.program import Form, Trace
from fastode.schedules.grid import Level
from fastode.solvers.coefficients import ADAMS_BASHFORTH, History, combine, ddim_step, eps_of, is_first_order, settle


def pndm(p: Trace, *, skip_prk_steps: bool = False) -> Form:
    """PNDM (arXiv:2202.09778): order 2, step size in time.

    Every move is the transfer phi(x, e; s -> t) = (alpha_t/alpha_s) x + (sigma_t - alpha_t sigma_s/alpha_s) e with a
    combination e of noise predictions. F-PNDM: three pseudo Runge-Kutta steps, 4 evaluations each, with half steps in time,
    then Adams-Bashforth of order 4 (NFE n + 9). ``skip_prk_steps=True`` (PLMS, diffusers and Stable Diffusion): the first
    step is the pseudo improved Euler step, then orders 2, 3, 4 (NFE n + 1). Warm-up steps that end at sigma = 0 or start at
    alpha = 0 are DDIM steps.
    """
    warmup = 1 if skip_prk_steps else 3
    x, history = p.start(), History(4)
    for i, (_, s, t) in enumerate(p.grid.windows()):
        d = p.denoise(x, s)
        if i < warmup and is_first_order(s, t):
            history.push(s, p.keep(eps_of(x, d, s)))
            x = p.land(ddim_step(x, d, s, t), t)
            continue
        e = p.keep(eps_of(x, d, s))
        history.push(s, e)
        if i < warmup:
            e = _improved_euler(p, x, e, s, t) if skip_prk_steps else _runge_kutta(p, x, e, s, t)
        else:
            settle(p, history, x, d, s, data=False)
            k = len(history)
            e = combine(ADAMS_BASHFORTH[k], history.forms(k))
        x = p.land(transfer(x, e, s, t), t)
    return x


def transfer(x: Form, e: Form, s: Level, t: Level) -> Form:
    """phi: the DDIM move from s to t with noise prediction ``e``; exact for constant e."""
    gain = t.alpha / s.alpha
    return gain * x + (t.sigma - gain * s.sigma) * e


def _improved_euler(p: Trace, x: Form, e: Form, s: Level, t: Level) -> Form:
    y = p.inner(transfer(x, e, s, t), t)
    return (e + eps_of(y, p.denoise(y, t), t)) / 2


def _runge_kutta(p: Trace, x: Form, e1: Form, s: Level, t: Level) -> Form:
    half = p.grid.at_time(s, t, 0.5)
    y2 = p.inner(transfer(x, e1, s, half), half)
    e2 = eps_of(y2, p.denoise(y2, half), half)
    y3, total = p.inner(transfer(x, e2, s, half), half), p.keep(e1 + 2 * e2)
    e3 = eps_of(y3, p.denoise(y3, half), half)
    y4, total = p.inner(transfer(x, e3, s, t), t), p.keep(total + 2 * e3)
    return (total + eps_of(y4, p.denoise(y4, t), t)) / 6
