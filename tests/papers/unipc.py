"""UniPC. Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
arXiv 2302.04867, Algorithm 1 (UniC-p), Algorithm 2 (UniP-p), and their data-prediction forms in the appendix.

r_j = (lam_{s-j} - lam_s)/h < 0, j = 1..p-1, and r_p = 1 for the new point. hh = -h (x0) or h (eps);
B = hh (bh1) or e^hh - 1 (bh2); S = alpha_t (x0) or sigma_t (eps); base = sigma_t/sigma_s x - alpha_t (e^hh - 1) m_0
(x0) or alpha_t/alpha_s x - sigma_t (e^hh - 1) m_0 (eps).

    phi_1 = (e^hh - 1)/hh - 1,  phi_{k+1} = phi_k/hh - 1/(k+1)!,  b_k = k! phi_k / B;   sum_j r_j^{k-1} a_j = b_k
    x_t = base - S B sum_j a_j (m_j - m_0)/r_j

UniP-p has the p-1 old nodes, UniC-p also the new one. One unknown (UniP-2, UniC-1) is a = 1/2, not solved, as the
authors do; `exact=True` solves it too, and then bh1 = bh2.

Order of step i of n: min(order, i+1), with lower_order_final also <= n-i. A step to sigma = 0 or from alpha = 0 is
first order; a level with alpha = 0 is no node. The corrector has the order of the predictor that made the point,
starts from the corrected x_s, and uses outputs made at *uncorrected* points, which is what the history keeps. The last
point is neither evaluated nor corrected: n evaluations. The point after alpha = 0 is not corrected (h is infinite).
In eps mode the first-order step is the base formula, also at sigma_t = 0: alpha_t (x - sigma_s eps)/alpha_s with the
corrected x, which is then not alpha_t times the evaluated x0.
"""

import math

import numpy as np

from tests.papers.common import Denoise, Levels, ddim_step, eps_from_x0, lam


def sample(
    denoise: Denoise,
    x: np.ndarray,
    alphas: Levels,
    sigmas: Levels,
    order: int = 3,
    variant: str = "bh2",
    prediction: str = "x0",
    corrector: bool = True,
    lower_order_final: bool = True,
    exact: bool = False,
) -> np.ndarray:
    assert order >= 1 and variant in ("bh1", "bh2") and prediction in ("x0", "eps")
    n = len(alphas) - 1
    alpha = [float(a) for a in alphas]
    sigma = [float(s) for s in sigmas]
    lams = [lam(a, s) for a, s in zip(alpha, sigma, strict=True)]
    m: list[np.ndarray] = []  # outputs, one per level, at the uncorrected points

    def move(x_s: np.ndarray, s: int, p: int, use_new: bool) -> np.ndarray:
        """From level s to s+1 at order p: UniP-p, or UniC-p when the new output m[s+1] is used."""
        t = s + 1
        if prediction == "x0":
            base = sigma[t] / sigma[s] * x_s + (alpha[t] - alpha[s] * sigma[t] / sigma[s]) * m[s]
        else:
            base = alpha[t] / alpha[s] * x_s + (sigma[t] - sigma[s] * alpha[t] / alpha[s]) * m[s]
        nodes = [s - j for j in range(1, p)] + ([t] if use_new else [])
        if not nodes:
            return base
        h = lams[t] - lams[s]
        hh = -h if prediction == "x0" else h
        big_b = hh if variant == "bh1" else math.expm1(hh)
        r = [(lams[k] - lams[s]) / h for k in nodes]
        b = []
        phi = math.expm1(hh) / hh - 1
        for k in range(1, len(nodes) + 1):
            b.append(math.factorial(k) * phi / big_b)
            phi = phi / hh - 1 / math.factorial(k + 1)
        if len(nodes) == 1 and not exact:
            a = np.array([0.5])
        else:
            a = np.linalg.solve(
                np.array([[r_j ** (k - 1) for r_j in r] for k in range(1, len(nodes) + 1)]), np.array(b)
            )
        total = np.zeros_like(base)
        for a_j, r_j, k in zip(a, r, nodes, strict=True):
            total = total + a_j * (m[k] - m[s]) / r_j
        return base - (alpha[t] if prediction == "x0" else sigma[t]) * big_b * total

    x_before = x  # the corrected state at level i-1
    p = 0  # order of the predictor that made x
    for i in range(n):
        x0 = denoise(x, alpha[i], sigma[i])
        m.append(x0 if prediction == "x0" else eps_from_x0(x, x0, alpha[i], sigma[i]))
        if corrector and i > 0 and alpha[i - 1] > 0:
            x = move(x_before, i - 1, p, use_new=True)
        x_before = x

        if alpha[i] == 0:
            x = ddim_step(x, x0, alpha[i], sigma[i], alpha[i + 1], sigma[i + 1])
            continue
        p = min(order, i + 1, sum(math.isfinite(v) for v in lams[: i + 1]))
        if lower_order_final:
            p = min(p, n - i)
        if sigma[i + 1] == 0:
            p = 1
        x = move(x, i, p, use_new=False)
    return x
