"""DyWeight. arXiv 2603.11607. EDM frame. The sum of the weights moves the level tau that the state lives on."""

import math


def sample(denoise, x, levels, weights, told, *, afs=True, epsilon=1e-8):
    tau, past, s = levels[0], [], iter(told)
    for i in range(len(levels) - 1):
        if afs and i == 0:
            # D = x - t x/sqrt(1 + t^2), then formed like any other direction
            d = (x - (x - tau * x / math.sqrt(1 + tau * tau))) / (tau + epsilon)
        else:
            d = (x - denoise(x, abs(next(s) * tau))) / (tau + epsilon)
        past.append(d)
        row = weights[i]
        h = levels[i + 1] - tau
        x = x + h * sum(v * old for v, old in zip(row, past[-len(row) :], strict=True))
        tau = tau + h * sum(row)
    return x
