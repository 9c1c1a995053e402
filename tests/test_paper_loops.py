"""The paper loops of tests/papers/ against golden values, against each other, and in every frame.

Golden values were made beforehand by other implementations, which had been compared with the authors' code.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.papers import (
    ddim,
    deis,
    dpm_solver_2,
    dpm_solver_3,
    dpm_solver_pp,
    dpm_solver_pp_s,
    edm,
    heun,
    ipndm,
    ipndm_v,
    lms,
    pndm,
    unipc,
)

PRINTED = 6e-11  # values printed with 10 decimals: half a unit of the last one, and rounding
SAME = 1e-12  # two formulas of one number, some ten steps, float64
BETA_0, BETA_1 = 0.1, 20.0
X_T = np.array([-1.0, 0.1, 1.5])


# --- the toy problem: 0.3 N(-1, 0.2^2) + 0.7 N(0.8, 0.35^2), VP-linear ---


def mixture(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """E[x0 | x] in closed form."""
    log_p, means = [], []
    for w, m, s in ((0.3, -1.0, 0.2), (0.7, 0.8, 0.35)):
        var = (alpha * s) ** 2 + sigma**2
        log_p.append(math.log(w) - 0.5 * math.log(var) - (x - alpha * m) ** 2 / (2 * var))
        means.append(m + alpha * s**2 / var * (x - alpha * m))
    p = np.exp(np.array(log_p) - np.max(log_p, axis=0))
    return (p * np.array(means)).sum(axis=0) / p.sum(axis=0)


class Counted:
    """A denoiser that remembers its calls."""

    def __init__(self, denoise: Callable[[np.ndarray, float, float], np.ndarray] = mixture) -> None:
        self.denoise = denoise
        self.levels: list[tuple[float, float]] = []

    def __call__(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        assert sigma > 0, "no evaluation at sigma = 0"
        self.levels.append((alpha, sigma))
        return self.denoise(x, alpha, sigma)


def vp(t: float) -> tuple[float, float]:
    log_alpha = -0.25 * t**2 * (BETA_1 - BETA_0) - 0.5 * t * BETA_0
    return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))


def vp_time(rho: float) -> float:
    """Inverse of vp: ln(1 + rho^2) = beta_d t^2/2 + beta_0 t."""
    beta_d = BETA_1 - BETA_0
    return (math.sqrt(BETA_0**2 + 2 * beta_d * math.log1p(rho**2)) - BETA_0) / beta_d


def levels_of_times(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pairs = [vp(float(t)) for t in times]
    return np.array([a for a, _ in pairs]), np.array([s for _, s in pairs])


def log_snr_levels(n: int) -> tuple[np.ndarray, np.ndarray]:
    (a_s, s_s), (a_t, s_t) = vp(1.0), vp(1e-3)
    lams = np.linspace(math.log(a_s / s_s), math.log(a_t / s_t), n + 1)
    return 1 / np.sqrt(1 + np.exp(-2 * lams)), 1 / np.sqrt(1 + np.exp(2 * lams))


def discrete_levels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    path = np.append(alpha_bar[np.arange(900, -1, -100)], 1.0)
    return np.sqrt(path), np.sqrt(1 - path), alpha_bar


def close(value: np.ndarray, golden: str, tolerance: float = PRINTED) -> None:
    np.testing.assert_allclose(value, [float(v) for v in golden.split()], rtol=0, atol=tolerance)


def same(one: np.ndarray, other: np.ndarray, tolerance: float = SAME) -> None:
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def test_the_grid_is_that_of_the_golden_values() -> None:
    alphas, sigmas = log_snr_levels(8)
    lams = np.log(alphas / sigmas)
    np.testing.assert_allclose(lams[[0, -1]], [-5.024978406659, 4.557714932730], rtol=0, atol=6e-13)  # 12 decimals


DPMPP_ALL = partial(dpm_solver_pp.sample, lower_order_final=False)
DPM_ALL = partial(DPMPP_ALL, prediction="eps")


@pytest.mark.parametrize(
    ("sample", "golden"),
    [
        (ddim.sample, "-0.7690189665 0.5778441356 1.0931658419"),
        (partial(DPMPP_ALL, order=2), "-1.1055821164 0.6963819822 1.3235705842"),
        (partial(DPMPP_ALL, order=2, solver_type="heun"), "-1.1960369799 0.7320428383 1.3906014936"),
        (partial(DPMPP_ALL, order=2, exact=True), "-1.1960369799 0.7320428383 1.3906014936"),
        (partial(DPMPP_ALL, order=3), "-1.1163495493 0.7194206116 1.3371767989"),
        (partial(DPMPP_ALL, order=3, exact=True), "-1.0895046315 0.7159944372 1.3193014604"),
        (
            partial(unipc.sample, order=3, corrector=False, lower_order_final=False, exact=True),
            "-1.0895046315 0.7159944372 1.3193014604",
        ),
        (partial(DPM_ALL, order=2), "-0.9767421503 0.6489167399 1.2294425405"),
        (partial(DPM_ALL, order=2, solver_type="heun"), "-0.9440410006 0.6363853045 1.2062406004"),
        (partial(deis.sample, order=2, space="lam"), "-0.9440410006 0.6363853045 1.2062406004"),
        (partial(DPM_ALL, order=3), "-0.9887416205 0.6548342980 1.2381641427"),
        (partial(deis.sample, order=3, space="lam"), "-0.9973317887 0.6587299542 1.2449368825"),
        (partial(DPM_ALL, order=3, exact=True), "-0.9973317887 0.6587299542 1.2449368825"),
        (partial(dpm_solver_pp.sample, order=2), "-1.0885088322 0.6929082409 1.3030226159"),
        (partial(unipc.sample, order=2, variant="bh1"), "-1.3097936984 0.7984865408 1.4606012239"),
        (partial(unipc.sample, order=2, variant="bh2"), "-1.1002399671 0.7013083842 1.3078732240"),
        (partial(unipc.sample, order=3, variant="bh1"), "-1.2916425499 0.8036375515 1.3740212870"),
        (partial(unipc.sample, order=3, variant="bh2"), "-1.2427674126 0.7832402366 1.3461659147"),
        (partial(unipc.sample, order=3, prediction="eps"), "-1.0254899702 0.6818790371 1.2822941009"),
    ],
)
def test_golden_log_snr_8_steps(sample: Callable, golden: str) -> None:
    denoise = Counted()
    close(sample(denoise, X_T, *log_snr_levels(8)), golden)
    assert len(denoise.levels) == 8


@pytest.mark.parametrize(
    ("sample", "nfe", "golden"),
    [
        (dpm_solver_2.sample, 8, "-1.9204139081 1.0199374180 1.6468914632"),
        (partial(dpm_solver_pp_s.sample, prediction="eps"), 8, "-1.9204139081 1.0199374180 1.6468914632"),
        (dpm_solver_3.sample, 12, "-0.6956827129 0.5183258166 1.2794550513"),
        (partial(dpm_solver_pp_s.sample, order=3, prediction="eps"), 12, "-0.6956827129 0.5183258166 1.2794550513"),
        (dpm_solver_pp_s.sample, 8, "-0.8674004513 0.6171703063 1.1372519318"),
        (partial(dpm_solver_pp_s.sample, order=3), 12, "-1.0276447725 0.6898602214 1.2604466360"),
    ],
)
def test_golden_single_step_4_outer_steps(sample: Callable, nfe: int, golden: str) -> None:
    denoise = Counted()
    close(sample(denoise, X_T, *log_snr_levels(4)), golden)
    assert len(denoise.levels) == nfe


@pytest.mark.parametrize(
    ("order", "space", "golden"),
    [
        (1, "t", "-0.8784936815 0.6223203621 1.1395964588"),
        (2, "t", "-0.9587674433 0.6542254024 1.2053236332"),
        (3, "t", "-0.9742112763 0.6608953097 1.2260840513"),
        (4, "t", "-0.9756561991 0.6614138935 1.2340683143"),
        (2, "rho", "-0.9367807367 0.6437364050 1.1887107801"),
        (3, "rho", "-0.9432643191 0.6450008088 1.2014379848"),
    ],
)
def test_golden_deis_quadratic_time(order: int, space: str, golden: str) -> None:
    levels = levels_of_times(np.linspace(1, math.sqrt(1e-3), 9) ** 2)
    close(deis.sample(mixture, X_T, *levels, order=order, space=space, t_of_rho=vp_time), golden)


S_PNDM = partial(pndm.sample, skip_prk_steps=True, order=2)


@pytest.mark.parametrize(
    ("sample", "nfe", "golden"),
    [
        (ddim.sample, 10, "-0.9186561333 0.6541035396 1.0934049420"),
        (S_PNDM, 11, "-1.0465464292 0.7009495147 1.1698793503"),
        (pndm.sample, 19, "-0.9540157478 0.6522456252 1.2207753976"),
        (ipndm.sample, 10, "-0.9547538207 0.6523110652 1.2220328706"),
    ],
)
def test_golden_pndm_continuous(sample: Callable, nfe: int, golden: str) -> None:
    times = np.linspace(1, 1e-3, 11)
    options = {}
    if sample is pndm.sample:
        options["between_t"] = lambda i: vp((times[i] + times[i + 1]) / 2)  # the half step is in time
    denoise = Counted()
    close(sample(denoise, X_T, *levels_of_times(times), **options), golden)
    assert len(denoise.levels) == nfe


@pytest.mark.parametrize(
    ("sample", "golden"),
    [
        (ddim.sample, "-0.9199196888 0.6530194639 1.0923371963"),
        (S_PNDM, "-1.0456248890 0.6984869647 1.1732548032"),
        (ipndm.sample, "-0.9531981262 0.6488418752 1.2284501870"),
        (pndm.sample, "-0.9534736605 0.6490780961 1.2309997011"),
    ],
)
def test_golden_pndm_discrete(sample: Callable, golden: str) -> None:
    alphas, sigmas, alpha_bar = discrete_levels()
    options = {}
    if sample is pndm.sample:
        half = [alpha_bar[900 - 100 * i - 50] for i in range(3)]
        options["between_t"] = lambda i: (math.sqrt(half[i]), math.sqrt(1 - half[i]))
    close(sample(mixture, X_T, alphas, sigmas, **options), golden)


def test_pndm_evaluates_the_labels_of_diffusers() -> None:
    alphas, sigmas, alpha_bar = discrete_levels()

    def labels(**options: Any) -> list[int]:
        denoise = Counted()
        pndm.sample(denoise, X_T, alphas, sigmas, **options)
        return [int(np.argmin(np.abs(alpha_bar - a**2))) for a, _ in denoise.levels]

    def half(i: int) -> tuple[float, float]:
        value = alpha_bar[900 - 100 * i - 50]
        return math.sqrt(value), math.sqrt(1 - value)

    rest = [600, 500, 400, 300, 200, 100, 0]
    assert labels(between_t=half) == [900, 850, 850, 800, 800, 750, 750, 700, 700, 650, 650, 600, *rest]
    assert labels(skip_prk_steps=True) == [900, 800, 800, 700, *rest]


# --- Gaussian data N(0, 1/2^2), VE, 80 -> 0.002, N points: relative error of the final state ---


def gaussian(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    return alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * x


def ve_levels(name: str, points: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.arange(points) / (points - 1)
    if name == "polynomial":
        rhos = (80 ** (1 / 7) + a * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    elif name == "logsnr":
        rhos = 80 ** (1 - a) * 0.002**a
    else:
        low, high = math.log1p(0.002**2), math.log1p(80.0**2)
        beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
        u = 1 + a * (1e-3 - 1)
        rhos = np.sqrt(np.expm1(beta_d / 2 * u**2 + (high - beta_d / 2) * u))
    return np.ones(points), rhos


@pytest.mark.parametrize(
    ("name", "points", "golden"),
    [
        ("polynomial", 6, "-0.452182 0.706098 0.485745 0.015261 -0.221202 -0.208966 -0.211674"),
        ("logsnr", 6, "-0.428666 0.927565 0.409796 -0.044132 0.067680 0.121519 -0.271359"),
        ("time_uniform", 4, "-0.651031 0.875109 1.696546 -0.423100 -0.648594 -0.647687 -0.448040"),
    ],
)
def test_golden_few_steps_gaussian(name: str, points: int, golden: str) -> None:
    alphas, sigmas = ve_levels(name, points)
    x = np.array([80.0])
    exact = x * math.sqrt((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2))
    methods: list[Callable] = [
        ddim.sample,
        heun.sample,
        dpm_solver_2.sample,
        ipndm.sample,
        partial(dpm_solver_pp.sample, order=3),
        unipc.sample,
        deis.sample,  # space "t" in the refitted VP time, four evaluations
    ]
    errors = [((m(gaussian, x, alphas, sigmas) - exact) / exact).item() for m in methods]
    close(np.array(errors), golden, tolerance=6e-7)  # printed with 6 decimals


# --- one method, two formulas ---


def logsnr_8() -> tuple[np.ndarray, np.ndarray]:
    return log_snr_levels(8)


def uneven_to_zero() -> tuple[np.ndarray, np.ndarray]:
    """A flow grid (alpha = 1 - sigma) with uneven steps that ends at sigma = 0."""
    sigmas = np.array([0.98, 0.9, 0.83, 0.6, 0.41, 0.3, 0.12, 0.02, 0.0])
    return 1 - sigmas, sigmas


PAIRS: dict[str, tuple[Callable, Callable]] = {
    "UniP-2 bh2 = 2M midpoint": (
        partial(unipc.sample, order=2, corrector=False),
        partial(dpm_solver_pp.sample, order=2),
    ),
    "UniP-2 bh2 = 2M midpoint, eps": (
        partial(unipc.sample, order=2, corrector=False, prediction="eps"),
        partial(dpm_solver_pp.sample, order=2, prediction="eps"),
    ),
    "UniP-2 solved = 2M heun": (
        partial(unipc.sample, order=2, corrector=False, exact=True, variant="bh1"),
        partial(dpm_solver_pp.sample, order=2, solver_type="heun"),
    ),
    "UniP-3 = 3M exact": (
        partial(unipc.sample, order=3, corrector=False, exact=True),
        partial(dpm_solver_pp.sample, order=3, exact=True),
    ),
    "UniP-3 = 3M exact, eps": (
        partial(unipc.sample, order=3, corrector=False, exact=True, prediction="eps"),
        partial(dpm_solver_pp.sample, order=3, exact=True, prediction="eps"),
    ),
    "UniPC bh1 = bh2 without shortcuts": (
        partial(unipc.sample, order=3, exact=True, variant="bh1"),
        partial(unipc.sample, order=3, exact=True, variant="bh2"),
    ),
    "UniPC-4 bh1 = bh2 without shortcuts, eps": (
        partial(unipc.sample, order=4, exact=True, variant="bh1", prediction="eps"),
        partial(unipc.sample, order=4, exact=True, variant="bh2", prediction="eps"),
    ),
    "DEIS-lam(2) = eps 2M heun": (
        partial(deis.sample, order=2, space="lam"),
        partial(dpm_solver_pp.sample, order=2, prediction="eps", solver_type="heun", lower_order_final=False),
    ),
    "DEIS-lam(3) = eps 3M exact": (
        partial(deis.sample, order=3, space="lam"),
        partial(dpm_solver_pp.sample, order=3, prediction="eps", exact=True, lower_order_final=False),
    ),
    "DEIS-lam(4) = eps UniP-4 solved": (
        partial(deis.sample, order=4, space="lam"),
        partial(unipc.sample, order=4, prediction="eps", exact=True, corrector=False, lower_order_final=False),
    ),
    "DEIS-rho = lms": (partial(deis.sample, space="rho"), lms.sample),
    "lms = iPNDM_v exact": (lms.sample, partial(ipndm_v.sample, exact=True)),
    "lms(3) = iPNDM_v(3) exact": (partial(lms.sample, order=3), partial(ipndm_v.sample, order=3, exact=True)),
    "lms(2) = iPNDM_v(2)": (partial(lms.sample, order=2), partial(ipndm_v.sample, order=2)),
    "Heun = EDM": (heun.sample, edm.sample),
    "DPM-Solver-2(r=1) = Heun": (partial(dpm_solver_2.sample, r=1.0), heun.sample),
    "DPM-Solver-2 = eps 2S": (
        partial(dpm_solver_2.sample, r=0.4),
        partial(dpm_solver_pp_s.sample, r1=0.4, prediction="eps"),
    ),
    "DPM-Solver-3 = eps 3S": (
        partial(dpm_solver_3.sample, r1=0.3, r2=0.7),
        partial(dpm_solver_pp_s.sample, order=3, r1=0.3, r2=0.7, prediction="eps"),
    ),
    **{
        f"{name} of order 1 = DDIM": (m, ddim.sample)
        for name, m in {
            "1M": partial(dpm_solver_pp.sample, order=1),
            "1M eps": partial(dpm_solver_pp.sample, order=1, prediction="eps"),
            "UniP": partial(unipc.sample, order=1, corrector=False),
            "UniP eps": partial(unipc.sample, order=1, corrector=False, prediction="eps"),
            "DEIS": partial(deis.sample, order=1),
            "lms": partial(lms.sample, order=1),
            "iPNDM": partial(ipndm.sample, order=1),
            "iPNDM_v": partial(ipndm_v.sample, order=1),
        }.items()
    },
}


@pytest.mark.parametrize("grid", [logsnr_8, uneven_to_zero])
@pytest.mark.parametrize("name", PAIRS)
def test_equalities(name: str, grid: Callable) -> None:
    one, other = PAIRS[name]
    alphas, sigmas = grid()
    same(one(mixture, X_T, alphas, sigmas), other(mixture, X_T, alphas, sigmas))


def test_adams_bashforth_on_equal_steps_is_ipndm() -> None:
    alphas, sigmas = np.ones(8), np.linspace(3.0, 0.2, 8)
    for order in (1, 2, 3, 4):
        one = ipndm.sample(mixture, X_T, alphas, sigmas, order=order)
        same(one, lms.sample(mixture, X_T, alphas, sigmas, order=order))
        if order <= 3:  # the slip of order 3 vanishes on equal steps, those of order 4 do not
            same(one, ipndm_v.sample(mixture, X_T, alphas, sigmas, order=order))


@pytest.mark.parametrize(
    ("exact", "rhos", "expected"),
    [
        # equal steps: the classical weights; as evaluated, T2 is 5/12 + 1/24 = 11/24 instead of 9/24
        (True, [5.0, 4.0, 3.0, 2.0, 1.0], "2.291666666667 -2.458333333333 1.541666666667 -0.375000000000"),
        (False, [5.0, 4.0, 3.0, 2.0, 1.0], "2.375000000000 -2.708333333333 1.791666666667 -0.458333333333"),
        # uneven steps: the numbers of diff-sampler's own expressions, orders 3 and 4
        (False, [10.0, 6.0, 3.0, 1.0], "1.801587301587 -1.152777777778 0.351190476190"),
        (False, [10.0, 6.0, 3.0, 1.0, 0.2], "1.757481481481 -1.161587301587 0.428444444444 -0.021634332745"),
    ],
)
def test_ipndm_v_weights(exact: bool, rhos: list[float], expected: str) -> None:
    """eps = 1 at one evaluation only: the state is the sum of that evaluation's weights; last step by difference."""
    n = len(rhos) - 1

    def run(k: int, steps: int) -> float:
        def denoise(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
            return x - sigma * (1.0 if sigma == rhos[k] else 0.0)

        return ipndm_v.sample(denoise, np.zeros(1), np.ones(steps + 1), rhos[: steps + 1], exact=exact).item()

    h = rhos[n] - rhos[n - 1]
    weights = [(run(k, n) - run(k, n - 1)) / h for k in range(n - 1, -1, -1)]
    close(np.array(weights), expected, tolerance=1e-12)  # printed with 12 decimals


def test_deis_in_any_time_that_is_ln_rho() -> None:
    """A given time of ln rho, infinite at rho = 0, is space "lam", last step to 0 included."""
    alphas, sigmas = uneven_to_zero()
    one = deis.sample(mixture, X_T, alphas, sigmas, order=3, t_of_rho=lambda r: math.log(r) if r > 0 else -math.inf)
    same(one, deis.sample(mixture, X_T, alphas, sigmas, order=3, space="lam"))


# --- every method: point mass, frames, ends, calls, order ---

METHODS: dict[str, Callable] = {
    "ddim": ddim.sample,
    "heun": heun.sample,
    "edm": edm.sample,
    "dpm_solver_2": dpm_solver_2.sample,
    "dpm_solver_3": dpm_solver_3.sample,
    "2s": dpm_solver_pp_s.sample,
    "3s": partial(dpm_solver_pp_s.sample, order=3),
    "2s eps": partial(dpm_solver_pp_s.sample, prediction="eps"),
    "3s eps": partial(dpm_solver_pp_s.sample, order=3, prediction="eps"),
    "2m": dpm_solver_pp.sample,
    "2m heun all": partial(dpm_solver_pp.sample, solver_type="heun", lower_order_final=False),
    "2m eps": partial(dpm_solver_pp.sample, prediction="eps"),
    "3m": partial(dpm_solver_pp.sample, order=3),
    "3m eps": partial(dpm_solver_pp.sample, order=3, prediction="eps"),
    "3m exact all": partial(dpm_solver_pp.sample, order=3, exact=True, lower_order_final=False),
    "unipc 1": partial(unipc.sample, order=1),
    "unipc 2 bh1": partial(unipc.sample, order=2, variant="bh1"),
    "unipc 3": unipc.sample,
    "unipc 3 all": partial(unipc.sample, lower_order_final=False),
    "unipc 3 eps": partial(unipc.sample, prediction="eps"),
    "unip 3": partial(unipc.sample, corrector=False),
    "unipc 3 exact": partial(unipc.sample, exact=True),
    "deis t": deis.sample,
    "deis rho": partial(deis.sample, space="rho", order=3),
    "deis lam": partial(deis.sample, space="lam", order=3),
    "lms": lms.sample,
    "ipndm": ipndm.sample,
    "ipndm_v 3": partial(ipndm_v.sample, order=3),
    "ipndm_v": ipndm_v.sample,
    "ipndm_v exact": partial(ipndm_v.sample, exact=True),
    "pndm": pndm.sample,
    "plms": partial(pndm.sample, skip_prk_steps=True),
}
# Calls of one step inside, of a last step to sigma = 0, of a first step from alpha = 0; otherwise 1, 1, 1.
CALLS = {"heun": 2, "edm": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "2s": 2, "3s": 3, "2s eps": 2, "3s eps": 3}
WARM_UP = {"pndm": [4, 4, 4], "plms": [2]}


def expected_calls(name: str, n: int, from_noise: bool, to_data: bool) -> int:
    calls = [CALLS.get(name, 1)] * n
    warm_up = WARM_UP.get(name, [])[:n]
    calls[: len(warm_up)] = warm_up
    if from_noise:
        calls[0] = 1
    if to_data:
        calls[-1] = 1
    return sum(calls)


def frame(name: str, rhos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels of the same rho in one of three frames; rho = inf has alpha = 0, sigma = 1 in VP and flow."""
    noise = np.isinf(rhos)
    finite = np.where(noise, 1.0, rhos)
    alphas = {"ve": np.ones_like(rhos), "vp": 1 / np.sqrt(1 + finite**2), "flow": 1 / (1 + finite)}[name]
    return np.where(noise, 0.0, alphas), np.where(noise, 1.0, alphas * finite)


RHOS = np.array([40.0, 18.0, 9.0, 3.1, 1.2, 0.7, 0.2, 0.05])


@pytest.mark.parametrize("name", METHODS)
def test_frames_and_calls(name: str) -> None:
    """VP, VE and flow give one xhat, to a positive sigma and to 0."""
    for rhos in (RHOS, np.append(RHOS, 0.0), RHOS[:4], np.append(RHOS[:2], 0.0), RHOS[:2]):
        results = []
        for view in ("ve", "vp", "flow"):
            alphas, sigmas = frame(view, rhos)
            denoise = Counted()
            x = METHODS[name](denoise, alphas[0] * 40.0 * X_T, alphas, sigmas)
            results.append(x / alphas[-1])
            assert len(denoise.levels) == expected_calls(name, len(rhos) - 1, False, rhos[-1] == 0)
        assert np.isfinite(results[0]).all()
        # A difference of rounding in x/alpha is amplified by the methods' weights and by the mixture's slope, < 100.
        same(results[1], results[0], tolerance=1e-11)
        same(results[2], results[0], tolerance=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_from_pure_noise(name: str) -> None:
    """alpha = 0: first step is DDIM, and VP and flow still agree. Ends at a positive sigma and at 0."""
    for rhos in (
        np.concatenate([[np.inf], RHOS]),
        np.concatenate([[np.inf], RHOS[2:], [0.0]]),
        np.array([np.inf, 2.0]),
    ):
        results = []
        for view in ("vp", "flow"):
            alphas, sigmas = frame(view, rhos)
            denoise = Counted()
            x = METHODS[name](denoise, X_T, alphas, sigmas)
            results.append(x / alphas[-1])
            assert len(denoise.levels) == expected_calls(name, len(rhos) - 1, True, rhos[-1] == 0)
        assert np.isfinite(results[0]).all()
        same(results[1], results[0], tolerance=1e-11)  # as above
    alphas, sigmas = frame("vp", np.array([np.inf, 2.0]))
    one_step = METHODS[name](mixture, X_T, alphas, sigmas)
    same(one_step, alphas[1] * mixture(X_T, 0.0, 1.0) + sigmas[1] * X_T)


@pytest.mark.parametrize("name", ["2m", "3m", "unip 3", "deis t", "deis rho", "deis lam", "lms", "ipndm_v exact"])
def test_pure_noise_is_no_node(name: str) -> None:
    """After the step from alpha = 0 these methods behave as if they started at the next level."""
    alphas, sigmas = frame("vp", np.concatenate([[np.inf], RHOS]))
    second = ddim.sample(mixture, X_T, alphas[:2], sigmas[:2])
    one = METHODS[name](mixture, X_T, alphas, sigmas)
    same(one, METHODS[name](mixture, second, alphas[1:], sigmas[1:]))


def test_fixed_weights_keep_the_node_at_pure_noise() -> None:
    alphas, sigmas = frame("flow", np.concatenate([[np.inf], RHOS]))
    one = ipndm.sample(mixture, X_T, alphas, sigmas)
    same(one, pndm.sample(mixture, X_T, alphas, sigmas, skip_prk_steps=True))  # its first step is DDIM here, too
    second = ddim.sample(mixture, X_T, alphas[:2], sigmas[:2])
    assert np.abs(one - ipndm.sample(mixture, second, alphas[1:], sigmas[1:])).max() > 1e-3


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ipndm_v"])
def test_point_mass_is_exact(name: str) -> None:
    """All data at one point: eps and x0 are constant on a trajectory, any consistent method is exact.

    Not "ipndm_v": as evaluated by diff-sampler its weights do not sum to 1 at order 4.
    """
    mu = np.array([0.3, -1.2, 2.0])
    alphas, sigmas = frame("vp", np.append(RHOS, 0.0))
    x = alphas[0] * mu + sigmas[0] * X_T
    for k in (len(alphas), len(alphas) - 1):
        result = METHODS[name](lambda x, alpha, sigma: mu, x, alphas[:k], sigmas[:k])
        # eps = (x - alpha mu)/sigma loses alpha/sigma = 20 at the last level, and weights and steps add to it
        same(result, alphas[k - 1] * mu + sigmas[k - 1] * X_T, tolerance=1e-12)


ORDERS = {
    "ddim": 1, "heun": 2, "edm": 2, "dpm_solver_2": 2, "dpm_solver_3": 3, "2s": 2, "3s": 3, "2s eps": 2, "3s eps": 3,
    "2m": 2, "3m": 2, "2m eps": 2, "3m eps": 2, "unipc 3": 2, "unipc 3 eps": 2, "deis t": 2, "deis lam": 2, "lms": 2,
    "ipndm": 2, "pndm": 2, "plms": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_order_on_gaussian_data(name: str) -> None:
    """Global order from a cold start (a first-order first step limits multistep methods to 2)."""
    x, errors = np.array([1.0]), []
    for n in (40, 80):
        alphas, sigmas = frame("vp", np.geomspace(5.0, 0.2, n + 1))
        kappa = np.sqrt(0.25 * alphas**2 + sigmas**2)
        errors.append(abs((METHODS[name](gaussian, x, alphas, sigmas) - kappa[-1] / kappa[0] * x).item()))
    assert math.log2(errors[0] / errors[1]) > ORDERS[name] - 0.25  # not yet asymptotic at these n


# --- DDIM with noise ---


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_eta_is_the_printed_formula(eta: float) -> None:
    """DDIM eqs. (12), (16) in the paper's alphas (= alpha^2 here), VP, down to alpha = 1 at which eta has no effect."""
    alphas, sigmas = frame("vp", np.append(RHOS, 0.0))
    rng = np.random.default_rng(0)
    noise = [rng.standard_normal(3) for _ in range(len(alphas) - 2)]
    x = sigmas[0] * X_T
    for i in range(len(alphas) - 1):
        a_t, a_prev = alphas[i] ** 2, alphas[i + 1] ** 2
        eps = (x - alphas[i] * mixture(x, alphas[i], sigmas[i])) / sigmas[i]
        std = eta * math.sqrt((1 - a_prev) / (1 - a_t)) * math.sqrt(1 - a_t / a_prev)
        predicted = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        x = math.sqrt(a_prev) * predicted + math.sqrt(1 - a_prev - std**2) * eps
        if i < len(noise):
            x = x + std * noise[i]
    same(ddim.sample(mixture, sigmas[0] * X_T, alphas, sigmas, eta=eta, noise=noise), x)


def test_ddim_eta_from_pure_noise_and_beyond_one() -> None:
    alphas, sigmas = frame("flow", np.array([np.inf, 2.0, 0.5]))
    noise = [np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -1.0])]
    x = alphas[1] * mixture(X_T, 0.0, 1.0) + sigmas[1] * noise[0]  # rho_up = rho_t: all old noise is replaced
    same(ddim.sample(mixture, X_T, alphas[:2], sigmas[:2], eta=1.0, noise=noise), x)
    x = alphas[2] * mixture(x, alphas[1], sigmas[1]) + sigmas[2] * noise[1]  # eta = 5 is clipped to rho_up = rho_t
    same(ddim.sample(mixture, X_T, alphas, sigmas, eta=5.0, noise=noise), x)
