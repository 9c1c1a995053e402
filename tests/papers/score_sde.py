"""Score-SDE predictor-corrector samplers. Song et al., arXiv 2011.13456, sections 3 and 4, appendices E to G, with the
discretisation of the public code: times linspace(1, eps, N), level floor(t (N - 1)), Euler-Maruyama step 1/N, corrector
before predictor, the last mean returned, Langevin norms averaged over the batch (``per_sample`` does not).
"""

import math

import numpy as np


def sde(kind, beta=(0.1, 20.0), sigmas=(0.01, 50.0)):
    """(f, g^2, a, s) as functions of t."""
    b0, b1 = beta

    def ell(t):
        return -(t**2) * (b1 - b0) / 4 - t * b0 / 2

    def b(t):
        return b0 + t * (b1 - b0)

    if kind == "vp":
        return lambda t: -b(t) / 2, b, lambda t: math.exp(ell(t)), lambda t: math.sqrt(-math.expm1(2 * ell(t)))
    if kind == "subvp":
        return (
            lambda t: -b(t) / 2,
            lambda t: b(t) * -math.expm1(4 * ell(t)),
            lambda t: math.exp(ell(t)),
            lambda t: -math.expm1(2 * ell(t)),
        )
    low, high = sigmas

    def s(t):
        return low * (high / low) ** t

    return lambda t: 0.0, lambda t: s(t) ** 2 * 2 * math.log(high / low), lambda t: 1.0, s


def sample(
    denoise,
    x,
    kind,
    n,
    noise,
    predictor="reverse_diffusion",
    corrector="none",
    snr=0.16,
    corrector_steps=1,
    flow=False,
    per_sample=True,
    eps=None,
):
    """Returns the mean after the last level. ``noise`` is an iterator of draws in the order of use."""
    f, g2, a, s = sde(kind)
    eps = (1e-5 if kind == "ve" else 1e-3) if eps is None else eps
    times = np.linspace(1, eps, n)
    betas = np.linspace(0.1 / n, 20.0 / n, n)
    sigmas = np.exp(np.linspace(math.log(0.01), math.log(50.0), n))

    def score(y, t):
        return (a(t) * denoise(y, a(t), s(t)) - y) / s(t) ** 2

    def size(v):
        each = np.sqrt((v.reshape(len(v), -1) ** 2).sum(1))
        return each.reshape(-1, *[1] * (v.ndim - 1)) if per_sample else each.mean()

    mean = x
    c = 0.5 if flow else 1.0
    for k, t in enumerate(times):
        i = int(t * (n - 1))
        scale = 1.0 if kind == "ve" else 1 - betas[i]
        for _ in range(corrector_steps if corrector != "none" else 0):
            grad, z = score(x, t), next(noise)
            h = 2 * scale * (snr * (size(z) / size(grad) if corrector == "langevin" else s(t))) ** 2
            x = x + h * grad + np.sqrt(2 * h) * z
        mean = x
        if predictor == "none":
            continue
        grad = score(x, t)
        if predictor == "euler_maruyama" or (kind == "subvp" and predictor == "reverse_diffusion"):
            mean, std = x - (f(t) * x - c * g2(t) * grad) / n, math.sqrt(g2(t) / n)
        elif kind == "vp" and predictor == "reverse_diffusion":
            forward = math.sqrt(1 - betas[i]) * x - x
            mean, std = x - forward + c * betas[i] * grad, math.sqrt(betas[i])
        elif kind == "vp":
            mean, std = (x + betas[i] * grad) / math.sqrt(1 - betas[i]), math.sqrt(betas[i])
        else:
            old = sigmas[i - 1] if i > 0 else 0.0
            gap = sigmas[i] ** 2 - old**2
            mean = x + c * gap * grad
            std = math.sqrt(gap if predictor == "reverse_diffusion" else old**2 * gap / sigmas[i] ** 2)
        x = mean if flow or k == n - 1 else mean + std * next(noise)
    return mean
