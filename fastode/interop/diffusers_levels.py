"""Where a diffusers config puts its noise levels, and which of our solvers its method is.

The levels and labels are those of the scheduler class the config belongs to: it is asked for them (``set_timesteps``), so
every spacing, sigma rule and shift of diffusers is there, to the last bit. What we add is the frame of its state: "vp"
(alpha^2 + sigma^2 = 1), "ve" (alpha = 1) or "flow" (alpha + sigma = 1), each x = alpha x_0 + sigma n.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from fastode.schedules.grid import Grid, Level
from fastode.schedules.noise import Discrete, Flow, NoiseSchedule

Frame = Literal["vp", "ve", "flow", "edm"]
Method = tuple[str, dict[str, Any]]


def _multistep(c: Mapping[str, Any], steps: int) -> Method:
    rule = {"lower_order_final": bool(c["lower_order_final"]) and steps < 15} if "lower_order_final" in c else {}
    kind = str(c.get("algorithm_type", "dpmsolver++"))
    order = int(c["solver_order"])
    if kind == "sde-dpmsolver++":
        return "sde_dpm_solver_pp", {"order": order, "solver_type": c["solver_type"], **rule}
    if kind.startswith("sde-"):
        raise ValueError(f"algorithm_type: there is no {kind!r} here, only 'sde-dpmsolver++'; or give solver=")
    if c.get("euler_at_final") and c.get("final_sigmas_type") == "sigma_min" and order > 1:
        warnings.warn(
            "euler_at_final: the last step keeps its order here; lower_order_final lowers it", UserWarning, stacklevel=2
        )
    own = {"order": order, "prediction": "x0" if kind.endswith("++") else "eps", "solver_type": c["solver_type"]}
    return "dpm_solver_pp", {**own, **rule}


def _singlestep(c: Mapping[str, Any], steps: int) -> Method:
    order = int(c["solver_order"])
    if order == 1:
        return "ddim", {}
    prediction = "x0" if str(c["algorithm_type"]).endswith("++") else "eps"
    return "dpm_solver_pp_s", {"order": order, "prediction": prediction}


def _unipc(c: Mapping[str, Any], steps: int) -> Method:
    disabled = list(c.get("disable_corrector") or [])
    if disabled and not set(range(steps)) <= set(disabled):
        raise ValueError(f"disable_corrector: the corrector is on or off for a whole run here, got {disabled}")
    return "unipc", {
        "order": int(c["solver_order"]),
        "variant": c["solver_type"],
        "prediction": "x0" if c["predict_x0"] else "eps",
        "corrector": not disabled,
        "lower_order_final": bool(c["lower_order_final"]),
    }


def _deis(c: Mapping[str, Any], steps: int) -> Method:
    lower = bool(c["lower_order_final"]) and steps < 15
    return "deis", {"order": int(c["solver_order"]), "space": "lam", "lower_order_final": lower}


def _ddpm(c: Mapping[str, Any], steps: int) -> Method:
    kind = str(c.get("variance_type", "fixed_small")).removesuffix("_log")
    return "ddpm", {"variance_type": kind if kind == "fixed_large" else "fixed_small"}


def _fixed(name: str, **options: Any) -> Callable[[Mapping[str, Any], int], Method]:
    return lambda c, steps: (name, dict(options))


METHODS: dict[str, Callable[[Mapping[str, Any], int], Method]] = {
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "EulerDiscreteScheduler": _fixed("ddim"),
    "EulerAncestralDiscreteScheduler": _fixed("euler_ancestral"),
    "HeunDiscreteScheduler": _fixed("heun"),
    "KDPM2DiscreteScheduler": _fixed("dpm_solver_2"),
    "LMSDiscreteScheduler": _fixed("lms"),
    "DDIMScheduler": _fixed("ddim"),
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": lambda c, steps: ("pndm", {"skip_prk_steps": bool(c["skip_prk_steps"])}),
    "EDMEulerScheduler": _fixed("ddim"),
    "EDMDPMSolverMultistepScheduler": _multistep,
    "FlowMatchEulerDiscreteScheduler": _fixed("ddim"),
    "FlowMatchHeunDiscreteScheduler": _fixed("heun"),
}
"""diffusers class -> (solver, options) of its method, given its config and the number of steps."""


@dataclass(frozen=True, eq=False)
class Levels:
    """``grid``: levels of the state in the pipeline's frame; ``labels``: what the network is told at each but the last."""

    grid: Grid
    labels: tuple[float, ...]
    whole: bool
    frame: Frame
    schedule: NoiseSchedule | None
    init_noise_sigma: Any
    continuous: bool = False
    train_steps: int = 1000

    def label(self, level: Level) -> float:
        """The label of a grid level is its scheduler's; that of an inner level is interpolated as diffusers does."""
        if level.index is not None and level.index < len(self.labels):
            return self.labels[level.index]
        return label_of(level.rho, self.frame, self.schedule, self.continuous, self.train_steps)


def label_of(rho: float, frame: Frame, schedule: NoiseSchedule | None, continuous: bool, train_steps: int) -> float:
    if frame == "flow":
        return rho / (1 + rho) * train_steps if rho != float("inf") else float(train_steps)
    if frame == "edm" or continuous:
        return 0.25 * float(numpy.log(rho)) if rho else -float("inf")
    if schedule is None:
        raise ValueError("levels: this table of noise levels does not fall strictly, so a level between has no label")
    label = float(schedule.time(rho).clamp(0, train_steps - 1)) if rho else 0.0
    return round(label) if abs(label - round(label)) < 1e-6 else label


@cache
def known_fields() -> frozenset[str]:
    """All config fields of the classes in ``METHODS``."""
    return frozenset().union(*(defaults(name) for name in METHODS))


@cache
def scheduler_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def defaults(name: str) -> dict[str, Any]:
    """The config fields of a diffusers class with their defaults."""
    parameters = list(inspect.signature(scheduler_class(name).__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def guess(config: Mapping[str, Any], *, method: bool) -> str:
    """The class a config without ``_class_name`` belongs to: the one with just these fields, else one of its kind.

    Raises ``ValueError`` where several classes have these fields and the ``method`` is asked for."""
    fields = {k for k in config if not k.startswith("_")}
    same = [name for name in METHODS if fields == set(defaults(name))]
    if len(same) > 1 and method:
        raise ValueError(
            f"config: it names no class, and its fields are those of {' and '.join(same)}; give solver=, or the scheduler "
            "itself in place of its config"
        )
    if same:
        return same[0]
    if "sigma_data" in fields:
        return "EDMDPMSolverMultistepScheduler" if "solver_order" in fields else "EDMEulerScheduler"
    if "shift" in fields and "beta_start" not in fields:
        return "FlowMatchEulerDiscreteScheduler"
    return "DPMSolverMultistepScheduler"


def make(name: str, config: Mapping[str, Any]) -> Any:
    """A scheduler of class ``name`` for its levels only."""
    own = {k: v for k, v in config.items() if k in defaults(name)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return scheduler_class(name)(**own)


def place(
    name: str,
    config: Mapping[str, Any],
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> Levels:
    """The levels of ``steps`` steps, or of the given labels or sigmas. Raises ``ValueError`` naming the argument."""
    peer = make(name, config)
    if steps is None and timesteps is None and sigmas is None:
        raise ValueError("num_inference_steps: give a number of steps, timesteps or sigmas")
    if steps is not None and steps < 1:
        raise ValueError(f"num_inference_steps: must be at least 1, got {steps}")
    frame = frame_of(name, config)
    taken = inspect.signature(peer.set_timesteps).parameters
    given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
    given = {k: v for k, v in given.items() if v is not None}
    if mu is not None and "mu" not in taken:
        raise ValueError(f"mu: {name} has no dynamic shift")
    if all(k in taken for k in given):
        labels, values = _ask(peer, steps, given, frame)
    else:
        labels, values = _own(peer, config, frame, timesteps, sigmas)
    return _assemble(peer, name, config, frame, labels, values)


def frame_of(name: str, config: Mapping[str, Any]) -> Frame:
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return "flow"
    if name.startswith("EDM"):
        return "edm"
    return "ve" if name.startswith(("Euler", "Heun", "KDPM2", "LMS")) else "vp"


def _ask(peer: Any, steps: int | None, given: dict[str, Any], frame: Frame) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(labels [n], EDM-frame or flow sigmas [n + 1]) from the peer's own rule, without its repeated levels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.set_timesteps(**({} if steps is None else {"num_inference_steps": steps}), **given)
    labels = peer.timesteps.cpu().numpy()
    if _by_label(peer):
        if type(peer).__name__ == "PNDMScheduler":  # it lists a label per call of its warm-up; the steps are these
            labels = numpy.asarray(peer._timesteps)[::-1]
        bar = peer.alphas_cumprod.double().numpy()
        end = float(getattr(peer, "final_alpha_cumprod", getattr(peer, "one", 1.0)))
        return labels, _rho(numpy.append(bar[labels], end))
    values = peer.sigmas.cpu().double().numpy()[: len(labels) + 1]
    if frame == "flow" and getattr(peer.config, "invert_sigmas", False):
        raise ValueError("invert_sigmas: a flow that runs from 0 to 1 is not supported")
    # The last of equal ones; EDM's last two differ by the rounding of a power.
    kept = [i for i, v in enumerate(values) if i + 1 == len(values) or abs(values[i + 1] - v) > 1e-6 * v]
    return labels[kept[:-1]], values[kept]


def _rho(bar: numpy.ndarray) -> numpy.ndarray:
    """sigma/alpha, infinite at zero terminal SNR."""
    with numpy.errstate(divide="ignore"):
        return numpy.sqrt((1 - bar) / bar)


def _by_label(peer: Any) -> bool:
    """DDIM, DDPM and PNDM step between entries of the table; the others between sigmas."""
    return not hasattr(peer, "sigmas")


def _own(
    peer: Any, config: Mapping[str, Any], frame: Frame, timesteps: Any, sigmas: Any
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Custom levels for a class whose own ``set_timesteps`` takes none."""
    end = 0.0
    train = int(config.get("num_train_timesteps", 1000))
    if frame == "edm" or frame == "flow":
        if timesteps is not None:
            raise ValueError(f"timesteps: {type(peer).__name__} takes sigmas")
        values = numpy.asarray(sigmas, dtype=numpy.float64)
        values = values if values[-1] == 0 else numpy.append(values, end)
        labels = values[:-1] * train if frame == "flow" else 0.25 * numpy.log(values[:-1])
        return labels.astype(numpy.float32), values
    bar = peer.alphas_cumprod.double().numpy()
    table = _rho(bar)
    if config.get("final_sigmas_type") == "sigma_min" or config.get("set_alpha_to_one") is False:
        end = float(table[0])
    if timesteps is not None:
        labels = numpy.asarray(timesteps)
        return labels, numpy.append(numpy.interp(labels, numpy.arange(len(table)), table), end)
    values = numpy.asarray(sigmas, dtype=numpy.float64)
    labels = numpy.interp(numpy.log(values[:-1]), numpy.log(table), numpy.arange(len(table)))
    return labels.astype(numpy.float32), values


def _assemble(
    peer: Any, name: str, config: Mapping[str, Any], frame: Frame, labels: numpy.ndarray, values: numpy.ndarray
) -> Levels:
    if len(values) > 2 and values[-1] == values[-2]:  # the list ends with an empty step
        labels, values = labels[:-1], values[:-1]
    sigma = torch.as_tensor(values, dtype=torch.float64)
    train = int(config.get("num_train_timesteps", 1000))
    schedule: NoiseSchedule | None = None
    if frame == "flow":
        schedule = Flow()
        grid = Grid(sigma, 1 - sigma, schedule=schedule)
    elif frame == "edm":
        grid = Grid(sigma)
    else:
        schedule = table_of(peer)
        alpha = torch.ones_like(sigma) if frame == "ve" else torch.rsqrt(1 + sigma**2)
        scaled = torch.where(sigma.isinf(), 1.0, alpha * sigma)
        # In the frame alpha = 1 inner levels stay in it, which a schedule would take them out of.
        grid = Grid(scaled, alpha, schedule=schedule if frame == "vp" else None)
    whole = bool(numpy.issubdtype(labels.dtype, numpy.integer))
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    start = getattr(peer, "init_noise_sigma", 1.0)
    numbers = tuple(int(v) if whole else float(v) for v in labels)
    return Levels(grid, numbers, whole, frame, schedule, start, continuous, train)


def table_of(peer: Any) -> Discrete | None:
    bar: Tensor | None = getattr(peer, "alphas_cumprod", None)
    if bar is None:
        return None
    try:
        return Discrete(tuple(bar.double().tolist()))
    except ValueError:  # a table that does not fall strictly; labels of inner levels are then not asked for
        return None
