"""Noise schedules, grids of levels, and the ways to place them: identities, published numbers, and what is refused."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

import fastode
from fastode import GRIDS, Grid
from fastode.schedules import (
    EDM,
    VE,
    Cosine,
    Discrete,
    Flow,
    SubVP,
    VPLinear,
    ays,
    beta,
    explicit,
    exponential,
    karras,
    leading,
    linspace,
    log_snr,
    polynomial,
    quadratic,
    time_uniform,
    trailing,
)

SCHEDULES = {
    "edm": EDM(),
    "ve": VE(),
    "vp": VPLinear(),
    "vp_fitted": VPLinear.fitted(),
    "sub_vp": SubVP(),
    "cosine": Cosine(),
    "ddpm": Discrete.linear(),
    "ddpm_sigma": Discrete.linear(interpolation="sigma"),
    "ddpm_log_alpha": Discrete.linear(interpolation="log_alpha"),
    "sd": Discrete.scaled_linear(),
    "sd_zero_snr": Discrete.scaled_linear(zero_terminal_snr=True),
    "squared_cosine": Discrete.squared_cosine(),
    "flow": Flow(),
    "flow_shifted": Flow(shift=3.0, label_scale=1000.0),
    "flow_inner": Flow(t_max=0.99, t_min=0.01),
}
VARIANCE_PRESERVING = [n for n in SCHEDULES if n not in ("edm", "ve", "sub_vp") and not n.startswith("flow")]

shares = st.floats(0, 1)
each = pytest.mark.parametrize("name", SCHEDULES)


def time_at(name: str, share: float) -> float:
    """A time of the schedule. Zero terminal SNR has no level between the last label (rho = inf) and the one before."""
    s = SCHEDULES[name]
    first = s.t_start - 1 if name == "sd_zero_snr" and share else s.t_start
    return first + share * (s.t_end - first)


# -- schedules -----------------------------------------------------------------------------------------------


@each
@given(share=shares)
@settings(max_examples=60, deadline=None)
def test_time_inverts_rho(name, share):
    s, t = SCHEDULES[name], time_at(name, share)
    rho = s.rho(t)
    span = abs(s.t_start - s.t_end)
    # The cosine schedule is the worst: acos near 1 turns a rounding of 1e-16 into 1e-14 of an angle that spans 1.5.
    # ln alpha near label 0 is 5e-5 with knots 1e-4 apart, so a rounding of 1e-16 is 1e-12 of a label there.
    assert float(s.time(rho)) == pytest.approx(t, abs=1e-11 * span)
    if t not in (s.t_start, s.t_end) and 0 < float(rho) < math.inf:
        assert float(s.rho(s.time(rho))) == pytest.approx(float(rho), rel=1e-9)


@each
@given(share=shares)
@settings(max_examples=30, deadline=None)
def test_alpha_sigma_rho_and_lam_are_one_process(name, share):
    s, t = SCHEDULES[name], time_at(name, share)
    alpha, sigma, rho = (float(f(t)) for f in (s.alpha, s.sigma, s.rho))
    assert alpha >= 0
    assert sigma >= 0
    if alpha:
        assert rho == pytest.approx(sigma / alpha, rel=1e-12)
        # where rho = 1e-3 and a schedule forms sigma as sqrt(1 - alpha^2), 1e-16 becomes 1e-10; no schedule here does
        assert float(s.lam(t)) == pytest.approx(math.log(alpha / sigma) if sigma else math.inf, rel=1e-12, abs=1e-12)
    else:
        assert rho == math.inf
        assert float(s.lam(t)) == -math.inf
    if name in VARIANCE_PRESERVING:
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-14)


@each
def test_schedules_are_monotone_and_work_on_tensors(name):
    s = SCHEDULES[name]
    t = torch.tensor([time_at(name, share) for share in numpy.linspace(0, 1, 41)], dtype=torch.float64)
    rho = s.rho(t)
    assert rho.dtype == torch.float64
    assert bool((rho[1:] < rho[:-1]).all())
    for function in (s.alpha, s.sigma, s.rho, s.lam, s.label):
        together = function(t)
        assert together.shape == t.shape
        one_by_one = torch.stack([function(float(v)) for v in t])
        # vectorised elementary functions may round the last bit otherwise
        torch.testing.assert_close(together, one_by_one, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(s.time(rho), t, rtol=0, atol=1e-11 * float(t[0] - t[-1]))
    assert s.time(rho.reshape(1, -1)).shape == (1, 41)


@each
def test_ends(name):
    s = SCHEDULES[name]
    assert s.sigma_max == pytest.approx(float(s.rho(s.t_start)), rel=1e-14)  # VE: 0.01 exp(ln 5000)
    assert s.sigma_min == pytest.approx(float(s.rho(s.t_end)), rel=1e-14)
    assert s.t_start > s.t_end


ENDS = {  # (sigma_max, sigma_min) in the EDM frame, with as many digits as published
    "edm": (80.0, 0.002),
    "ve": (50.0, 0.01),
    "vp": (152.167, 0.010486),  # diff-sampler's ADM range
    "vp_fitted": (80.0, 0.002),
    "ddpm": (157.4073, 0.0100005),
    "sd": (14.6146412, 0.0291672),  # Stable Diffusion
    "sd_zero_snr": (math.inf, 0.0291672),
    "flow": (math.inf, 0.0),
    "flow_inner": (99.0, 1 / 99),
}


@pytest.mark.parametrize("name", ENDS)
def test_published_ranges(name):
    high, low = ENDS[name]
    assert SCHEDULES[name].sigma_max == pytest.approx(high, rel=5e-6)  # the digits that are published
    assert SCHEDULES[name].sigma_min == pytest.approx(low, rel=5e-5)


def test_vp_constants():
    """Score-SDE with beta 0.1 .. 20: alpha(1), sigma(1) of VP and sub-VP (arXiv:2011.13456, appendix C)."""
    vp, sub = VPLinear(), SubVP()
    assert float(vp.alpha(1.0)) == pytest.approx(0.006571586, abs=5e-10)
    assert float(vp.sigma(1.0)) == pytest.approx(0.99997841, abs=5e-9)
    assert float(sub.alpha(1.0)) == float(vp.alpha(1.0))
    assert float(sub.sigma(1.0)) == pytest.approx(0.99995681, abs=5e-9)
    assert float(vp.sigma(1e-3)) ** 2 == pytest.approx(1.1e-4, rel=1e-2)  # chosen to match DDPM's first level, 1e-4
    t = torch.linspace(1e-3, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(sub.sigma(t), vp.sigma(t) ** 2, rtol=1e-13, atol=0)  # the VP variance used as a std


def test_vp_is_the_solution_of_its_equation():
    """d ln alpha/dt = -beta/2 and d sigma^2/dt = beta (1 - sigma^2); sub-VP has beta (1 - alpha^4 - sigma^2)."""
    t = torch.linspace(0.01, 1, 9, dtype=torch.float64, requires_grad=True)
    rate = 0.1 + 19.9 * t.detach()
    for s, push in ((VPLinear(), lambda a: torch.ones_like(a)), (SubVP(), lambda a: 1 - a**4)):
        (log_slope,) = torch.autograd.grad(torch.log(s.alpha(t)).sum(), t)
        (variance_slope,) = torch.autograd.grad((s.sigma(t) ** 2).sum(), t)
        alpha, sigma = s.alpha(t).detach(), s.sigma(t).detach()
        # a handful of float64 operations on numbers of order 1
        torch.testing.assert_close(log_slope, -rate / 2, rtol=1e-12, atol=0)
        torch.testing.assert_close(variance_slope, rate * (push(alpha) - sigma**2), rtol=1e-9, atol=1e-12)


def test_fitted_vp_time():
    """The diffusion time of diff-sampler for 0.002 .. 80: beta_d = 17.537957, beta_min = -0.004769."""
    vp = VPLinear.fitted(0.002, 80.0)
    assert vp.beta_max - vp.beta_min == pytest.approx(17.537957, abs=5e-7)
    assert vp.beta_min == pytest.approx(-0.004769, abs=5e-7)
    assert float(vp.rho(1.0)) == pytest.approx(80, rel=1e-13)
    assert float(vp.rho(1e-3)) == pytest.approx(0.002, rel=1e-11)  # float32 with exp(.) - 1 would give 0.00201324


def test_cosine_is_the_published_formula():
    """alpha_bar = f(t)/f(0), f = cos^2((t + s)/(1 + s) pi/2); sigma has no cancellation in 1 - alpha^2."""
    s, t = Cosine(), torch.linspace(0.2, 0.9946, 9, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(s.alpha(t) ** 2, f, rtol=1e-12, atol=0)
    torch.testing.assert_close(s.sigma(t) ** 2, 1 - f, rtol=1e-12, atol=0)


def test_discrete_tables():
    """Labels give the cumulative products themselves; plain products in numpy are the definition."""
    steps = numpy.arange(1000)
    linear = numpy.cumprod(1 - (1e-4 + (0.02 - 1e-4) * steps / 999))
    scaled = numpy.cumprod(1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * steps / 999) ** 2)
    f = numpy.cos((numpy.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    cosine = numpy.cumprod(1 - numpy.minimum(1 - f[1:] / f[:-1], 0.999))
    pairs = [(Discrete.linear(), linear), (Discrete.scaled_linear(), scaled), (Discrete.squared_cosine(), cosine)]
    for made, bar in pairs:
        labels = torch.arange(1000, dtype=torch.float64)
        # alpha comes back through ln rho, with rho^2 = (1 - bar)/bar: at label 0, 1 - bar = 4e-5 in float64
        numpy.testing.assert_allclose(made.alpha(labels).numpy() ** 2, bar, rtol=1e-11)
        assert len(made) == 1000
        assert (made.t_start, made.t_end) == (999.0, 0.0)
        assert float(made.label(3.5)) == 3.5


@pytest.mark.parametrize("interpolation", ["log_sigma", "sigma", "log_alpha"])
def test_discrete_interpolation(interpolation):
    """Halfway between two labels, the named quantity is halfway; all three agree on the labels."""
    s, plain = Discrete.linear(interpolation=interpolation), Discrete.linear()
    quantities = {"log_sigma": lambda t: s.rho(t).log(), "sigma": s.rho, "log_alpha": lambda t: s.alpha(t).log()}
    quantity = quantities[interpolation]
    for k in (0.0, 17.0, 998.0):
        assert float(s.rho(k)) == pytest.approx(float(plain.rho(k)), rel=1e-12)
        middle = (float(quantity(k)) + float(quantity(k + 1))) / 2
        # ln alpha at label 0 is 5e-5, known to 1e-16
        assert float(quantity(k + 0.5)) == pytest.approx(middle, rel=1e-11)


def test_zero_terminal_snr():
    """arXiv:2305.08891, Algorithm 1: no signal at the last label, the first unchanged, alpha affine in between."""
    before, after = Discrete.scaled_linear(), Discrete.scaled_linear(zero_terminal_snr=True)
    assert float(after.alpha(999.0)) == 0.0
    assert float(after.sigma(999.0)) == 1.0
    assert float(after.rho(999.0)) == math.inf
    assert float(after.time(math.inf)) == 999.0
    assert float(after.alpha(0.0)) == pytest.approx(float(before.alpha(0.0)), rel=1e-14)
    labels = torch.arange(1000, dtype=torch.float64)
    a, b = before.alpha(labels), after.alpha(labels)
    first, last = a[0], a[-1]
    torch.testing.assert_close(b, (a - last) * first / (first - last), rtol=1e-10, atol=1e-13)
    grid = linspace(after, 5)
    assert grid[0].is_noise
    assert grid[-1].is_data
    assert grid.sigmas[0] == math.inf


def test_flow_shift():
    """t -> shift t / (1 + (shift - 1) t) (SD3): it multiplies sigma/alpha by the shift, and grids apply it."""
    flow, t = Flow(shift=3.0), torch.linspace(0, 0.9, 7, dtype=torch.float64)
    torch.testing.assert_close(flow.rho(flow.shifted(t)), 3 * flow.rho(t), rtol=1e-14, atol=0)
    assert float(flow.shifted(1.0)) == 1.0
    plain, moved = time_uniform(Flow(), 5), time_uniform(flow, 5)
    torch.testing.assert_close(moved.t, flow.shifted(plain.t))
    assert plain.t.tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0], abs=1e-15)
    assert moved[0].is_noise
    assert moved[-1].is_data


LABELS = {
    "edm": (80.0, math.log(80.0) / 4),
    "ve": (0.25, 0.01 * 5000**0.25),
    "vp": (0.5, 499.5),
    "cosine": (0.5, 499.5),
    "ddpm": (500.0, 500.0),
    "flow": (0.5, 0.5),
    "flow_shifted": (0.5, 500.0),
}


@pytest.mark.parametrize("name", LABELS)
def test_what_a_network_is_told(name):
    t, label = LABELS[name]
    assert float(SCHEDULES[name].label(t)) == pytest.approx(label, rel=1e-14)


@each
def test_gradients_of_schedules(name):
    """Autograd against central differences, for every function of t and for time as a function of rho."""
    s = SCHEDULES[name]
    # off the labels, where a table is piecewise smooth only
    shares_ = [0.1037, 0.4713, 0.9021]
    t = torch.tensor([time_at(name, u) for u in shares_], dtype=torch.float64, requires_grad=True)
    rho = s.rho(t).detach().requires_grad_()
    scale = abs(s.t_start - s.t_end)
    functions = [(f, t, 1e-5 * scale) for f in (s.alpha, s.sigma, s.rho, s.lam)]
    for function, at, step in [*functions, (s.time, rho, None)]:
        value = function(at).sum()
        if not value.requires_grad:  # alpha = 1
            continue
        (slope,) = torch.autograd.grad(value, at)
        with torch.no_grad():
            h = 1e-5 * at if step is None else torch.full_like(at, step)
            numeric = (function(at + h) - function(at - h)) / (2 * h)
        # A central difference errs by h^2 f'''/6 (1e-8 of the slope: these functions change by e^10 over the span, and
        # h is 1e-5 of it) and by rounding, 1e-16 |f| / h.
        size = float(function(at).detach().abs().max())
        torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-9 * size / scale)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(80.0, 0.002), "sigma_min, sigma_max: need 0 < sigma_min < sigma_max"),
        (lambda: EDM(0.0, 80.0), "sigma_min, sigma_max"),
        (lambda: VE(-1.0, 80.0), "sigma_min, sigma_max"),
        (lambda: VPLinear(t_min=0.0), "t_min: must be in"),
        (lambda: VPLinear(beta_min=20.0, beta_max=0.1), "beta_max: must exceed"),
        (lambda: VPLinear.fitted(0.002, math.inf), "sigma_min, sigma_max"),
        (lambda: Cosine(t_max=1.5), "t_max, t_min"),
        (lambda: Flow(shift=0.0), "shift: must be positive"),
        (lambda: Flow(t_max=0.2, t_min=0.5), "t_max, t_min"),
        (lambda: Discrete((0.5, 0.9)), "alphas_bar: must be"),
        (lambda: Discrete((0.5,)), "alphas_bar: must be"),
        (lambda: Discrete((0.9, 0.5), interpolation="cubic"), "interpolation: log_sigma, sigma or log_alpha"),
    ],
)
def test_schedules_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# -- placements of levels ------------------------------------------------------------------------------------

PUBLISHED = {  # EDM range, 0.002 .. 80; digits as in the papers' code (diff-sampler; restart sampling)
    "time_uniform": (time_uniform, (80, 6.950235, 1.286669, 0.002)),
    "time_uniform_6": (time_uniform, (80, 16.506206, 4.746338, 1.754111, 0.650216, 0.002)),
    "polynomial": (polynomial, (80, 9.723201, 0.469979, 0.002)),
    "log_snr": (log_snr, (80, 2.339214, 0.068399, 0.002)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_grids(name):
    make, levels = PUBLISHED[name]
    grid = make(EDM(), len(levels) - 1)
    assert grid.sigmas.tolist() == pytest.approx(levels, abs=5.1e-7)  # six decimals are given
    assert grid.steps == len(levels) - 1


def test_edm_grid_of_18_points():
    levels = (80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088, 0.585, 0.296, 0.140)
    levels += (0.0599, 0.0229, 0.0075, 0.002)
    with_zero = karras(EDM(), 18, final="zero")
    assert karras(EDM(), 17).sigmas.tolist() == pytest.approx(levels, abs=5.1e-4)
    assert with_zero.sigmas.tolist()[:-1] == karras(EDM(), 17).sigmas.tolist()
    assert with_zero[-1].is_data
    assert (float(with_zero.sigma[0]), float(with_zero.sigma[17])) == (80.0, 0.002)  # ends exactly


DIFFUSERS = {  # five steps on DDPM's linear betas: labels of the five network calls, and sigma/alpha there
    "linspace": (lambda t: linspace(t, 5), (999, 799, 599, 400, 200), (157.4073, 25.5285, 6.1352, 2.0411, 0.7236)),
    "trailing": (lambda t: trailing(t, 5), (999, 799, 599, 399, 199), None),
    "leading_ddim": (lambda t: leading(t, 5, offset=1), (801, 601, 401, 201, 1), None),
    "karras": (
        lambda t: karras(t, 5, final="zero"),
        (999, 843, 593, 142, 0),
        (157.4073, 36.9092, 5.9113, 0.4913, 0.0100),
    ),
    "lu": (
        lambda t: log_snr(t, 5, final="zero"),
        (999, 722, 302, 30, 0),
        (157.4073, 14.0535, 1.2547, 0.1120, 0.0100),
    ),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_labels_of_diffusers(name):
    make, labels, levels = DIFFUSERS[name]
    grid = make(Discrete.linear())
    assert grid.t[:-1].round().int().tolist() == list(labels)
    assert grid[-1].is_data
    if levels is not None:
        # four decimals of numbers that diffusers makes in float32 through powers: 2e-5 seen
        assert grid.sigmas[:-1].tolist() == pytest.approx(levels, rel=3e-5, abs=5.1e-5)


def test_leading_of_multistep_schedulers():
    """diffusers' DPM-Solver divides by one step more: 831 665 499 333 167 for offset 1, so multiples of 166 without."""
    grid = leading(Discrete.linear(), 5, final="sigma_min")
    assert (grid.t[:-1] + 1).tolist() == [831, 665, 499, 333, 167]
    assert float(grid.t[-1]) == 0


@pytest.mark.parametrize("make", [linspace, leading, trailing])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 500])
def test_discrete_grids_use_labels(make, final, steps):
    table = Discrete.linear()
    grid = make(table, steps, final=final)
    assert grid.steps == steps
    inner = grid.t[:-1] if final == "zero" else grid.t
    assert torch.equal(inner, inner.round())
    assert float(inner.max()) <= 999
    torch.testing.assert_close(grid.sigmas[: len(inner)], table.rho(inner), rtol=1e-12, atol=0)
    assert grid[-1].is_data == (final == "zero")


def test_a_table_has_only_so_many_labels():
    table = Discrete.linear()
    for make, most in ((linspace, 999), (leading, 1000), (trailing, 1000)):
        assert make(table, most).steps == most
        with pytest.raises(ValueError, match=r"^steps: .* 1000 labels"):
            make(table, most + 1)
    with pytest.raises(ValueError, match=r"^offset: labels of this table are 0 .. 999, got"):
        leading(table, 5, offset=200)
    with pytest.raises(ValueError, match=r"^offset: "):
        leading(table, 5, offset=-1)


AYS_SIGMAS = {  # as published (arXiv:2404.14507, project page)
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
AYS_LABELS = {  # the same tables as timesteps of Stable Diffusion, as diffusers has them
    "sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}


@pytest.mark.parametrize("table", AYS_SIGMAS)
def test_align_your_steps(table):
    rounded, labels = AYS_SIGMAS[table], AYS_LABELS.get(table)
    sd = Discrete.scaled_linear()
    schedule = EDM(0.002, 700.0) if table == "svd" else sd
    grid = ays(schedule, 10, table=table)
    # the page gives three decimals; timesteps are whole numbers, which moves a level by up to 0.005 or 1.5%
    assert grid.sigmas.tolist() == pytest.approx(rounded, rel=1.5e-2, abs=5e-3)
    if labels is not None:
        want = sd.rho(torch.tensor(labels, dtype=torch.float64))
        torch.testing.assert_close(grid.sigmas, want, rtol=0, atol=6e-11)  # ten decimals are stored
    ended = ays(schedule, 10, table=table, final="zero")
    assert ended.steps == 10
    assert ended[-1].is_data
    torch.testing.assert_close(ended.sigmas[:-1], grid.sigmas[:-1], rtol=1e-12, atol=0)
    # other counts: ln sigma is interpolated linearly over equal positions
    logs = grid.sigmas.log().numpy()
    for steps in (4, 7, 25):
        want = numpy.interp(numpy.linspace(0, 10, steps + 1), numpy.arange(11), logs)
        numpy.testing.assert_allclose(ays(schedule, steps, table=table).sigmas.log().numpy(), want, rtol=0, atol=1e-12)


def test_beta_grid_is_the_distribution_of_scipy():
    """Times are quantiles: their distribution function is uniform. On EDM schedules the time is the fitted VP time."""
    a = numpy.linspace(0, 1, 11)
    for schedule, clock in ((VPLinear(), VPLinear()), (EDM(), VPLinear.fitted()), (Flow(), Flow())):
        grid = beta(schedule, 10, a=0.6, b=0.6, final="sigma_min")
        t = (clock.time(grid.sigmas) - clock.t_end) / (clock.t_start - clock.t_end)
        # the density of Beta(0.6, 0.6) is unbounded at both ends: 1e-12 in t is 1e-12^0.6 = 6e-8 in probability
        numpy.testing.assert_allclose(beta_distribution.cdf(t.numpy().clip(0, 1), 0.6, 0.6), 1 - a, atol=2e-7)
    assert beta(EDM(), 10).steps == 10
    assert beta(EDM(), 10)[-1].is_data


def test_power_grids():
    """t^(1/power) is uniform in the schedule's own time: quadratic is power 2."""
    for schedule in (VPLinear(), SubVP(), Cosine(), Discrete.linear()):
        for power in (1.0, 2.0, 3.0):
            root = time_uniform(schedule, 8, power=power).t ** (1 / power)
            torch.testing.assert_close(root, torch.linspace(float(root[0]), float(root[-1]), 9, dtype=torch.float64))
    assert torch.equal(quadratic(VPLinear(), 8).t, time_uniform(VPLinear(), 8, power=2.0).t)
    assert polynomial is karras
    assert exponential is log_snr


PLACED_BY_A = {  # placements that are functions of a_i = i/n only
    "karras": karras,
    "karras_5": lambda s, n, **k: karras(s, n, rho=5.0, **k),
    "log_snr": log_snr,
    "time_uniform": time_uniform,
    "quadratic": quadratic,
    "beta": beta,
}


@pytest.mark.parametrize("name", PLACED_BY_A)
@given(
    schedule=st.sampled_from(["edm", "vp", "sub_vp", "cosine", "sd", "flow_inner"]),
    steps=st.integers(1, 9),
    more=st.integers(1, 4),
    final=st.sampled_from(["sigma_min", "zero"]),
)
@settings(max_examples=25, deadline=None)
def test_grids_nest(name, schedule, steps, more, final):
    """The grid with (M + 1)(N - 1) + 1 points contains the N points: teachers of learned solvers rely on it."""
    make, s = PLACED_BY_A[name], SCHEDULES[schedule]
    zero = int(final == "zero")  # an appended zero is no a_i
    coarse = make(s, steps + zero, final=final)
    fine = make(s, steps * (more + 1) + zero, final=final)
    points = len(coarse) - zero
    inside = fine.sigmas[: len(fine) - zero : more + 1]
    assert len(inside) == points
    # scipy's quantile solver for "beta" is good to 1e-12 in t, which near the ends of a range of 1e4 is 1e-8 in sigma
    rtol = 1e-7 if name == "beta" else 1e-11
    torch.testing.assert_close(inside, coarse.sigmas[:points], rtol=rtol, atol=0)
    torch.testing.assert_close(fine.alpha[: len(fine) - zero : more + 1], coarse.alpha[:points], rtol=rtol, atol=0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("schedule", ["edm", "vp", "ddpm", "flow_inner"])
def test_every_grid_is_on_its_schedule(name, final, schedule):
    s = SCHEDULES[schedule]
    if name in ("linspace", "leading", "trailing") and schedule != "ddpm":
        with pytest.raises(TypeError, match=r"^schedule: this grid picks labels of a Discrete schedule"):
            GRIDS[name](s, 6, final=final)
        return
    grid = GRIDS[name](s, 6, final=final)
    assert grid.steps == 6
    assert grid.schedule is s
    assert grid[-1].is_data == (final == "zero")
    inner = grid.t[:-1] if final == "zero" else grid.t
    if schedule == "edm" or name != "ays":  # the AYS table reaches beyond the range of other schedules
        torch.testing.assert_close(s.alpha(inner), grid.alpha[: len(inner)], rtol=1e-10, atol=0)
        torch.testing.assert_close(s.sigma(inner), grid.sigma[: len(inner)], rtol=1e-8, atol=0)
    assert float(grid.alpha[-1]) <= 1


def test_ranges_can_be_narrowed():
    for make in (karras, log_snr):
        grid = make(EDM(), 5, sigma_min=0.1, sigma_max=10.0)
        assert (float(grid.sigma[0]), float(grid.sigma[-1])) == (10.0, 0.1)
    flow, plain = (karras(s, 5, sigma_min=0.1, sigma_max=10.0) for s in (Flow(), EDM()))
    torch.testing.assert_close(flow.sigmas, plain.sigmas, rtol=1e-13, atol=0)
    torch.testing.assert_close(flow.alpha + flow.sigma, torch.ones(6, dtype=torch.float64))


def test_explicit_levels_keep_their_values():
    grid = explicit(VPLinear(), [10.0, 1.0, 0.1])
    assert grid.sigmas.tolist() == pytest.approx([10.0, 1.0, 0.1], rel=1e-14)
    torch.testing.assert_close(grid.alpha**2 + grid.sigma**2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: karras(EDM(), 0), "steps: must be a whole number of at least 1"),
        (lambda: karras(EDM(), 2.5), "steps: must be a whole number"),
        (lambda: log_snr(EDM(), True), "steps: must be a whole number"),
        (lambda: ays(EDM(), -1), "steps"),
        (lambda: karras(EDM(), 5, rho=0.0), "rho: must be positive"),
        (lambda: karras(EDM(), 5, final="end"), "final: 'sigma_min' or 'zero'"),
        (lambda: karras(EDM(), 5, sigma_min=90.0), "sigma_min, sigma_max: this grid needs"),
        (lambda: karras(Flow(), 5), "sigma_min, sigma_max: .* use time_uniform, or give sigma_max"),
        (lambda: log_snr(Flow(t_max=0.9), 5), "sigma_min, sigma_max: .* give sigma_min"),
        (lambda: time_uniform(EDM(), 5, power=0.0), "power: must be positive"),
        (lambda: ays(EDM(), 5, table="sd3"), "table: published AYS tables are .*sd15.*, got 'sd3'"),
    ],
)
def test_placements_refuse_nonsense(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# -- the grid itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0],), "sigma: a grid needs at least two levels"),
        (([],), "sigma: a grid needs at least two levels"),
        (([[2.0, 1.0]],), "sigma: a grid needs at least two levels in one dimension"),
        (([2.0, float("nan")],), "sigma: every level must be finite, got nan at level 1"),
        (([float("inf"), 1.0],), "sigma: every level must be finite, got inf at level 0"),
        (([2.0, -1.0],), "sigma: levels cannot be negative, got -1.0 at level 1"),
        (([2.0, 1.0, 1.0, 0.5],), "sigma: levels must decrease strictly .* level 1 is 1 and level 2 is 1"),
        (([1.0, 2.0],), "sigma: levels must decrease strictly"),
        (([2.0, 1.0], [1.0, 0.2]), "sigma: levels must decrease strictly"),  # sigma/alpha rises
        (([2.0, 1.0], [1.0, 1.0, 1.0]), "alpha: must be one number or 2 numbers"),
        (([2.0, 1.0], [1.0, math.nan]), "alpha: every level must be finite"),
        (([2.0, 1.0], -1.0), "alpha: levels cannot be negative"),
        (([2.0, 0.0], [1.0, 0.0]), "sigma, alpha: a level with sigma = 0 and alpha = 0 is empty"),
        (([2.0, 1.0], 1.0, [1.0]), "t: must have 2 entries"),
    ],
)
def test_grids_check_their_levels(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Grid(*arguments)


@pytest.mark.parametrize("value", ["abc", 3.0, None, object()])
def test_grids_are_sequences_of_numbers(value):
    with pytest.raises(TypeError, match=r"^grid: must be a Grid or a sequence of EDM-frame sigmas"):
        Grid.of(value)
    with pytest.raises(TypeError, match=r"^sigma: must be a sequence of numbers"):
        Grid(["a", "b"])


def test_a_sequence_is_taken_as_given():
    for levels in ([3.0, 2.0, 0.0], (3, 2, 0), numpy.array([3.0, 2.0, 0.0]), torch.tensor([3.0, 2.0, 0.0])):
        grid = Grid.of(levels)
        assert grid.sigmas.tolist() == [3.0, 2.0, 0.0]
        assert grid.sigmas.dtype == torch.float64
        assert grid.alpha.tolist() == [1.0, 1.0, 1.0]
        assert grid.t.tolist() == [3.0, 2.0, 0.0]
        assert Grid.of(grid) is grid


def test_levels_and_windows():
    grid = Grid([1.0, 0.8, 0.0], [0.0, 0.6, 1.0], t=[1.0, 0.5, 0.0])
    assert (len(grid), grid.steps) == (3, 2)
    assert grid[0].is_noise
    assert grid[0].rho == math.inf
    assert grid[0].lam == -math.inf
    assert grid[-1].is_data
    assert grid[-1].index == 2
    assert grid[2].lam == math.inf
    assert grid[1].lam == pytest.approx(math.log(0.6 / 0.8), rel=1e-15)
    triples = [(a and a.index, b.index, c.index) for a, b, c in grid.windows()]
    assert triples == [(None, 0, 1), (0, 1, 2)]
    with pytest.raises(IndexError):
        grid[3]
    assert repr(grid) == "Grid(explicit: inf, 1.3333, 0)"


def test_frame_changes_the_scale_and_nothing_else():
    grid = log_snr(VPLinear(), 5)
    for scale in (1.0, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)):
        other = grid.frame(scale)
        torch.testing.assert_close(other.sigmas, grid.sigmas, rtol=1e-14, atol=0)
        torch.testing.assert_close(other.alpha, torch.as_tensor(scale, dtype=torch.float64).expand(6))
        assert torch.equal(other.t, grid.t)
    back = grid.frame(1.0).frame(grid.alpha)
    torch.testing.assert_close(back.sigma, grid.sigma, rtol=1e-14, atol=0)


@given(r=st.floats(0.01, 0.99))
@settings(max_examples=40, deadline=None)
def test_inner_levels_at_a_share_of_lam(r):
    """rho = rho_t^r rho_s^(1-r); on a schedule alpha is the schedule's there, elsewhere it is geometric too."""
    for grid in (karras(EDM(), 4), log_snr(VPLinear(), 4), Grid([2.0, 1.0, 0.1], [0.3, 0.5, 1.0])):
        s, t = grid[1], grid[2]
        u = grid.between(s, t, r)
        assert u.rho == pytest.approx(t.rho**r * s.rho ** (1 - r), rel=1e-12)
        assert u.lam == pytest.approx((1 - r) * s.lam + r * t.lam, abs=1e-12)
        assert u.index is None
        if grid.schedule is None:
            assert u.alpha == pytest.approx(s.alpha ** (1 - r) * t.alpha**r, rel=1e-13)
        else:
            assert u.alpha == pytest.approx(float(grid.schedule.alpha(u.t)), rel=1e-13)
            assert float(grid.schedule.rho(u.t)) == pytest.approx(u.rho, rel=1e-11)


@given(share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_inner_levels_at_a_share_of_time(share):
    vp, plain = log_snr(VPLinear(), 4), Grid([3.0, 1.0, 0.1])
    u = vp.at_time(vp[1], vp[2], share)
    assert u.t == pytest.approx((1 - share) * vp[1].t + share * vp[2].t, rel=1e-14)
    assert (u.alpha, u.sigma) == (float(vp.schedule.alpha(u.t)), float(vp.schedule.sigma(u.t)))
    u = plain.at_time(plain[0], plain[1], share)  # without a schedule, time is sigma
    assert u.sigma == pytest.approx(3 - 2 * share, rel=1e-14)
    assert u.t == pytest.approx(u.sigma, rel=1e-14)


def test_gradients_through_grids():
    """A learned grid keeps its gradient through frames, inner levels and the schedule's own time."""
    sigmas = torch.tensor([9.0, 3.0, 0.5], dtype=torch.float64, requires_grad=True)

    def inner(s: torch.Tensor) -> torch.Tensor:
        grid = Grid(s, schedule=EDM())
        u = grid.between(grid[0], grid[1], 0.4)
        return torch.stack([u.rho, u.lam, grid.frame(0.5).sigma[2], grid.t[1]])

    assert torch.autograd.gradcheck(inner, (sigmas,), eps=1e-7, atol=1e-6, rtol=1e-6)
    assert not Grid(sigmas.detach()).sigma.requires_grad
    assert isinstance(Grid(sigmas)[0].sigma, torch.Tensor)
    assert isinstance(Grid(sigmas.detach())[0].sigma, float)


@pytest.mark.parametrize("name", list(fastode.SOLVERS))
def test_gradients_through_every_solver_from_pure_noise_to_data(name):
    """A learned flow grid: its inner times have the gradients of finite differences; its two ends are fixed."""
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = fastode.Denoiser(lambda y, t: torch.tanh(y) * (1 + t[:, None]), "flow")

    def loss(t: torch.Tensor) -> torch.Tensor:
        grid = Grid(t, 1 - t, schedule=Flow())
        return (
            fastode.sample(network, x, solver=name, grid=grid, seeds=[1, 2]).square().sum()
        )  # the noise of stochastic ones

    t = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(t), t)
    assert (float(slope[0]), float(slope[-1])) == (0.0, 0.0)
    for i in (1, 2, 3):
        h = torch.zeros(5, dtype=torch.float64).index_fill(0, torch.tensor(i), 1e-6)
        with torch.no_grad():
            numeric = float(loss(t + h) - loss(t - h)) / 2e-6
        # rounding 1e-16 / 1e-6 of a loss of order 10, and h^2 times third derivatives
        assert float(slope[i]) == pytest.approx(numeric, rel=1e-6, abs=1e-7)
