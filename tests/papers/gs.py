"""GS, the generalised solver. arXiv 2510.17699. VP coordinates z = alpha x with alpha = 1/sqrt(1 + s^2), s the EDM level.

The step of DPM-Solver++(3M) as published (its second difference at half its exact weight, no lower order at the end) plus
additive corrections; the network is asked at the level s_told about rho z/alpha, rho = sqrt((1 + s_told^2)/(1 + s^2)), and
m = x - (s/s_told)(rho x - D(rho x, s_told)). Signs: corrections are added to the weights of z_j and of m_j.
"""

import math


def sample(denoise, x, levels, told, a, c):
    alpha = [1 / math.sqrt(1 + s * s) for s in levels]
    sigma = [s * al for s, al in zip(levels, alpha, strict=True)]
    lam = [-math.log(s) for s in levels]
    z, m = [alpha[0] * x], []
    for k in range(len(levels) - 1):
        s, asked = levels[k], told[k] * levels[k]
        xk = z[k] / alpha[k]
        rho = math.sqrt((1 + asked**2) / (1 + s**2))
        m.append(xk - s / asked * (rho * xk - denoise(rho * xk, asked)))
        h = lam[k + 1] - lam[k]
        phi1 = math.exp(-h) - 1
        phi2, new = phi1 / h + 1, alpha[k + 1]
        phi3 = phi2 / h - 0.5
        y = sigma[k + 1] / sigma[k] * z[k] - new * phi1 * m[k]
        if k == 1:
            r0 = (lam[1] - lam[0]) / h
            y = y - new * phi1 / 2 * (m[1] - m[0]) / r0
        elif k >= 2:
            r0, r1 = (lam[k] - lam[k - 1]) / h, (lam[k - 1] - lam[k - 2]) / h
            d0, d1 = (m[k] - m[k - 1]) / r0, (m[k - 1] - m[k - 2]) / r1
            first = d0 + r0 / (r0 + r1) * (d0 - d1)
            second = (d0 - d1) / (r0 + r1)
            y = y + new * phi2 * first - new * phi3 * second
        for j in range(k + 1):
            y = y + a.get((k, j), 0.0) * z[j] + c.get((k, j), 0.0) * m[j]
        z.append(y)
    return z[-1] / alpha[-1]
