"""ParaDiGMS. Shih et al., "Parallel Sampling of Diffusion Models", arXiv 2305.16317, Algorithm 1 as published code runs it.

DDIM (eta = 0) or DDPM (given noise) over levels 0 .. T; window p; a state is settled when its mean square change is at most
tau^2 times the posterior variance of the step that leaves it; the window slides by the settled states and one more.
"""

import numpy as np


def sample(denoise, x, alphas, sigmas, window, tau, noise=None):
    """Returns (final state, passes, evaluations). ``noise``: [T] arrays for DDPM, None for DDIM."""
    steps = len(alphas) - 1
    variance = []
    for i in range(steps):
        ratio = (sigmas[i + 1] / alphas[i + 1]) * (alphas[i] / sigmas[i])
        variance.append(sigmas[i + 1] ** 2 * (1 - ratio**2))
    states = [x] * (steps + 1)
    begin, passes, evaluations = 0, 0, 0
    end = min(window, steps)
    while begin < steps:
        total, fresh = states[begin], {}
        for i in range(begin, end):
            d = denoise(states[i], alphas[i], sigmas[i])
            down = sigmas[i + 1] if noise is None else np.sqrt(sigmas[i + 1] ** 2 - variance[i])
            moved = down / sigmas[i] * states[i] + (alphas[i + 1] - alphas[i] * down / sigmas[i]) * d
            total = total + (moved - states[i])
            if noise is not None:
                total = total + np.sqrt(variance[i]) * noise[i]
            fresh[i + 1] = total
        passes, evaluations = passes + 1, evaluations + end - begin
        settled = 0
        for j in range(begin + 1, end + 1):
            change = np.mean((fresh[j] - states[j]) ** 2, axis=1).max()
            if j == steps or change > tau**2 * variance[j]:
                break
            settled += 1
        stride = min(settled + 1, end - begin)
        for j, state in fresh.items():
            states[j] = state
        last, old = states[end], end
        begin, end = begin + stride, min(begin + stride + window, steps)
        for j in range(old + 1, end + 1):
            states[j] = last
    return states[-1], passes, evaluations
