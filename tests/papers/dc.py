"""DC-Solver on UniPC (arXiv:2409.03755, section 3.2), x0 prediction: compensation, predictor, corrector, in plain NumPy."""

import numpy as np


def sample(denoise, x, alphas, sigmas, times, ratios, *, order=3, variant="bh2", dc_order=2, lower_order_final=True):
    lam = [np.log(a / s) for a, s in zip(alphas, sigmas, strict=False)]
    n = len(alphas) - 1
    outputs, last, k = [], None, None
    for i in range(n):
        outputs.append(denoise(x, alphas[i], sigmas[i]))
        if i:
            x = _move(last, outputs, i - 1, i, k, alphas, sigmas, lam, variant, corrected=True)
        if i >= dc_order and ratios[i] != 1:
            t = ratios[i] * times[i] + (1 - ratios[i]) * times[i - 1]
            nodes = range(i, i - dc_order - 1, -1)
            mixed = 0
            for j in nodes:
                basis = np.prod([(t - times[m]) / (times[j] - times[m]) for m in nodes if m != j])
                mixed = mixed + basis * outputs[j]
            outputs[i] = mixed  # persistent: later steps see the compensated output
        k = min(order, i + 1, n - i if lower_order_final else order)
        last = x
        x = _move(last, outputs, i, i + 1, k, alphas, sigmas, lam, variant, corrected=False)
    return x


def _move(x, outputs, s, t, k, alphas, sigmas, lam, variant, corrected):
    """UniP-k, or UniC-k with the output at t as a further node (arXiv:2302.04867, Algorithms 5 to 8)."""
    h = lam[t] - lam[s]
    m = outputs[s]
    nodes = [(lam[s - j] - lam[s]) / h for j in range(1, k)]
    changes = [(outputs[s - j] - m) / r for j, r in zip(range(1, k), nodes, strict=True)]
    if corrected:
        nodes, changes = [*nodes, 1.0], [*changes, outputs[t] - m]
    base = np.expm1(-h)
    b = base if variant == "bh2" else -h
    right, phi, factorial = [], base / -h - 1, 1
    for q in range(1, len(nodes) + 1):
        right.append(phi * factorial / b)
        factorial *= q + 1
        phi = phi / -h - 1 / factorial
    if len(nodes) == 1:
        rhos = [0.5]
    else:
        rhos = (
            np.linalg.solve(np.array([np.power(nodes, q) for q in range(len(nodes))]), np.array(right)) if nodes else []
        )
    total = sum((r * c for r, c in zip(rhos, changes, strict=False)), 0 * m)
    return sigmas[t] / sigmas[s] * x - alphas[t] * base * m - alphas[t] * b * total
