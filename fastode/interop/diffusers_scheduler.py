"""A diffusers scheduler that plays any of our solvers, one evaluation per ``step``.

    pipe.scheduler = fastode.FastODEScheduler.from_config(pipe.scheduler.config, solver="unipc", order=3)

``timesteps`` lists the label of every evaluation, so single-step methods simply have more of them than steps. The levels are
those of the scheduler class the config belongs to (:mod:`fastode.interop.diffusers_levels`), the state stays in its frame.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import __version__ as diffusers_version
    from diffusers.configuration_utils import ConfigMixin, FrozenDict
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("FastODEScheduler needs diffusers: pip install 'fastode[diffusers]'") from error

from fastode.denoisers.nonlinear import Clip, DynamicThreshold
from fastode.interop import diffusers_levels
from fastode.interop.diffusers_levels import METHODS, Levels
from fastode.interop.stages import Stages
from fastode.program import Program
from fastode.schedules.grid import Grid, Level
from fastode.solvers import SOLVERS

OWN = ("solver", "solver_options", "levels")
"""Config fields of ours, besides those of diffusers."""

FULL = ("Euler", "Heun", "KDPM2", "LMS", "EDMEuler", "DDPM")
"""Classes that start with all training steps, where the others want ``set_timesteps`` first."""


@dataclass
class FastODESchedulerOutput(BaseOutput):
    """``prev_sample``: the state at which the next evaluation is due; ``pred_original_sample``: the denoised estimate."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Plan:
    """What ``set_timesteps`` decides: levels, program, and the labels of its evaluations. Shared between threads."""

    levels: Levels
    solver: str
    options: Mapping[str, Any]
    program: Program
    labels: tuple[float, ...]
    timesteps: Tensor


class _Run:
    """One pass through a plan, owned by one thread."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.timesteps = plan.timesteps
        self.index: int | None = None
        self.begin: int | None = None
        self.first = 0  # the evaluation of the plan at which this run began
        self.stages: Stages | None = None
        self.returned: Tensor | None = None  # what the pipeline was handed, and the same in full precision
        self.exact: Tensor | None = None


class FastODEScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs a solver of ``SOLVERS``.

    Args:
        solver: a name in ``SOLVERS``; by default the method of the class the config belongs to, with its options
            (``solver_order``, ``algorithm_type``, ...).
        solver_options: options of the solver, as a dict that goes into the config.
        levels: the diffusers class whose rule places the levels and whose frame the state has. ``from_config`` takes it from
            the config's ``_class_name``, or from its fields.
        config: every config field of the classes in ``diffusers_levels.METHODS``. Fields that none of them knows are kept, with
            a warning.

    ``step`` computes in float32 (float64 if the sample is); between two steps the state is remembered unrounded while the
    pipeline leaves it alone. State of a run belongs to its thread: pipelines in several threads may share one scheduler.

    Differs from diffusers where a table cannot follow: ``clip_sample`` of DDIM clips the estimate and the noise that goes with
    it (its ``use_clipped_model_output=True``); a learned or "fixed_large" variance is not used; DPMSolverSinglestep's levels
    are whole steps here, so there are more evaluations; a last step that leads nowhere (to its own level) is not made, and
    UniPC's corrector not run there; FlowMatchHeun's trapezoid is in t, ours in sigma/alpha.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 (as diffusers' own)
    default_levels = "DPMSolverMultistepScheduler"

    def __init__(
        self,
        solver: str | None = None,
        solver_options: Mapping[str, Any] | None = None,
        levels: str | None = None,
        **config: Any,
    ) -> None:
        config = {k: v for k, v in config.items() if not k.startswith("_")}
        given = {"solver": solver, "solver_options": solver_options, "levels": levels}
        levels = levels or self.default_levels
        if levels not in METHODS:
            raise ValueError(f"levels: must be one of {', '.join(METHODS)}, got {levels!r}")
        defaults = diffusers_levels.defaults(levels)
        unknown = sorted(set(config) - diffusers_levels.known_fields())
        if unknown:
            warnings.warn(
                f"config: fields {', '.join(map(repr, unknown))} are not known; they are kept and have no effect",
                UserWarning,
                stacklevel=2,
            )
        options = dict(solver_options or {})
        if solver is not None:
            SOLVERS[solver].check(options)
        fields = {**defaults, **config, "solver": solver, "solver_options": options, "levels": levels}
        unset = [name for name in defaults if name not in config]
        unset += [name for name, value in given.items() if value is None]
        self.register_to_config(**fields, **({"_use_default_values": sorted(unset)} if unset else {}))
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._last: _Plan | None = None
        self._local = threading.local()
        self._method(10)  # what cannot be followed is an error here, not in the run

    @classmethod
    def from_config(
        cls,
        config: Any = None,
        return_unused_kwargs: bool = False,
        solver: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A scheduler for the ``config`` of another one (or the scheduler itself), running ``solver``.

        ``kwargs``: options of the solver, and config fields to replace. Without ``solver``: the method of the config's own
        class. Raises ``ValueError`` for classes without a method or levels here, ``TypeError`` for unknown options.
        """
        if config is None:
            raise ValueError("config: give the config of a scheduler")
        name: Any = None
        if isinstance(config, ConfigMixin):
            name, config = type(config).__name__, config.config
        if not isinstance(config, Mapping):
            raise TypeError(f"config: must be a scheduler's config, got {type(config).__name__}")
        name = name or config.get("_class_name")
        unset = set(config.get("_use_default_values", ()))  # as diffusers: a default is not carried to another class
        fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in unset}
        kept = {k: fields.pop(k, None) for k in OWN}
        levels = kwargs.pop("levels", None) or kept["levels"]
        if levels is None and name != cls.__name__ and not set(OWN) & set(config):
            if name is not None and name not in METHODS:
                raise ValueError(f"config: the levels of {name} are not known here; known are {', '.join(METHODS)}")
            levels = name or diffusers_levels.guess(config, method=solver is None)
        options = dict(kwargs.pop("solver_options", None) or {})
        if solver is None or solver == kept["solver"]:
            solver, options = kept["solver"], {**(kept["solver_options"] or {}), **options}
        known = diffusers_levels.known_fields() | set(fields)
        fields.update({k: v for k, v in kwargs.items() if k in known})
        rule = levels or cls.default_levels
        if solver is None and rule in METHODS:
            method = METHODS[rule]({**diffusers_levels.defaults(rule), **fields}, 10)[0]
        else:
            method = solver or "ddim"
        for key, value in kwargs.items():
            if key in SOLVERS[method].options:
                options[key] = value
            elif key not in known:
                SOLVERS[method].check([key])
        given = {"solver": solver, "solver_options": options or None, "levels": levels}
        made = cls(**given, **fields)
        said = ({*config} - unset) | {*kwargs} | {k for k, v in given.items() if v is not None}
        config = {k: v for k, v in made.config.items() if k != "_use_default_values"}
        unset = {k for k in config if k not in said}
        origin = {"_class_name": cls.__name__, "_diffusers_version": diffusers_version} if name is not None else {}
        made.__dict__["_internal_dict"] = FrozenDict(
            {**config, **({"_use_default_values": sorted(unset)} if unset else {}), **origin}
        )
        return (made, {}) if return_unused_kwargs else made

    # -- what the config says --------------------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        return {k: v for k, v in self.config.items() if not k.startswith("_") and k not in OWN}

    def _method(self, steps: int) -> tuple[str, dict[str, Any]]:
        """(solver, options) for so many steps."""
        given = dict(self.config["solver_options"])
        solver = self.config["solver"]
        own, options = METHODS[self.config["levels"]](self._fields(), steps) if solver is None else (solver, {})
        return own, {**options, **given}

    def _peer(self) -> Any:
        return diffusers_levels.make(self.config["levels"], self._fields())

    @property
    def order(self) -> int:
        """Evaluations of one step, as pipelines count them."""
        solver, options = self._method(6)
        program = SOLVERS[solver](Grid([8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5]), **options)
        counts = [sum(stage.step == i for stage in program.stages) for i in range(5)]
        return max(1, min(counts))

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._peer().alphas_cumprod

    @property
    def betas(self) -> Tensor:
        return self._peer().betas

    # -- the plan and the run of this thread -----------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Place the levels and compile the solver for them, for this thread.

        ``num_inference_steps`` steps; or ``timesteps``, labels of the steps; or ``sigmas``, in the convention of the class in
        ``levels`` (EDM-frame levels with the last one, or times of a flow without); ``mu`` is the dynamic shift of a flow.
        """

        def plain(values: Any) -> list[float] | None:
            return None if values is None else [float(v) for v in values]

        labels, levels = plain(timesteps), plain(sigmas)
        key = (num_inference_steps, str(device), tuple(labels or ()), tuple(levels or ()), mu, repr(self.config))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(num_inference_steps, device, labels, levels, mu)
            self._plans[key] = plan
            while len(self._plans) > 8:
                self._plans.popitem(last=False)
        self._last = plan
        self._local.run = _Run(plan)

    def _make_plan(self, steps: int | None, device: Any, labels: Any, sigmas: Any, mu: float | None) -> _Plan:
        placed = diffusers_levels.place(self.config["levels"], self._fields(), steps, labels, sigmas, mu)
        solver, options = self._method(placed.grid.steps)
        program = SOLVERS[solver](placed.grid, **options)
        Stages(program)  # refuses what cannot be played
        told = tuple(placed.label(stage.level) for stage in program.stages)
        whole = placed.whole and all(float(v).is_integer() for v in told)
        tensor = torch.tensor(told, dtype=torch.int64 if whole else torch.float32, device=device)
        return _Plan(placed, solver, options, program, told, tensor)

    @property
    def _run(self) -> _Run | None:
        run: _Run | None = getattr(self._local, "run", None)
        if run is None and self._last is not None:  # set_timesteps was called in another thread
            run = self._local.run = _Run(self._last)
        return run

    def _needed(self) -> _Run:
        run = self._run
        if run is None:
            if not self.config["levels"].startswith(FULL):
                raise ValueError("num_inference_steps: call set_timesteps first")
            self.set_timesteps(int(self.config["num_train_timesteps"]))
            run = self._run
        assert run is not None
        return run

    @property
    def timesteps(self) -> Tensor:
        """What the network is told at every evaluation: [NFE], integers where all labels are."""
        run = self._run
        return self._peer().timesteps if run is None else run.timesteps

    @property
    def sigmas(self) -> Tensor:
        """The levels as diffusers counts them: sigma/alpha, or the times of a flow; float32 [steps + 1]."""
        run = self._run
        if run is None:
            return self._peer().sigmas
        grid = run.plan.levels.grid
        return (grid.sigma if run.plan.levels.frame == "flow" else grid.sigmas).float()

    @property
    def num_inference_steps(self) -> int | None:
        run = self._run
        return None if run is None else run.plan.program.grid.steps

    @property
    def step_index(self) -> int | None:
        """The evaluation that is due; None before the first."""
        run = self._run
        return None if run is None else run.index

    @property
    def begin_index(self) -> int | None:
        run = self._run
        return None if run is None else run.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of ``timesteps``, the first evaluation of a step."""
        self._needed().begin = int(begin_index)

    @property
    def init_noise_sigma(self) -> Any:
        """The standard deviation of the initial noise, as the class in ``levels`` has it."""
        run = self._run
        return getattr(self._peer(), "init_noise_sigma", 1.0) if run is None else run.plan.levels.init_noise_sigma

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_local"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    # -- one evaluation --------------------------------------------------------------------------------------------------

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The evaluation with this label; of several the first one of a step, where a run may begin."""
        run = self._needed()
        value = float(timestep)
        listed = run.plan.labels if schedule_timesteps is None else [float(v) for v in schedule_timesteps]
        found = [i for i, label in enumerate(listed) if label == value or float(torch.tensor(label)) == value]
        if not found:
            raise ValueError(f"timestep: {value:g} is none of timesteps; they are {_listed(listed)}")
        stages = run.plan.program.stages
        starts = [i for i in found if i < len(stages) and (i == 0 or stages[i - 1].step != stages[i].step)]
        return starts[-1] if starts else found[-1]

    def _begin(self, run: _Run, timestep: Any) -> None:
        """Compile what is left of the plan from the evaluation at which this run begins."""
        first = run.begin if run.begin is not None else self.index_for_timestep(timestep)
        run.index, run.first = first, first
        program = run.plan.program
        if not 0 <= first < len(program.stages):
            raise ValueError(f"begin_index: must be in 0 .. {len(program.stages) - 1}, got {first}")
        if first:
            stage = program.stages[first]
            if stage.step == program.stages[first - 1].step:
                raise ValueError(
                    f"begin_index: {first} is inside a step of {run.plan.solver}; begin at a multiple of {self.order}"
                )
            grid = run.plan.levels.grid
            rest = Grid(grid.sigma[stage.step :], grid.alpha[stage.step :], grid.t[stage.step :], grid.schedule)
            program = SOLVERS[run.plan.solver](rest, **run.plan.options)
            if len(program.stages) != len(run.plan.labels) - first:
                raise ValueError(
                    f"begin_index: {run.plan.solver} makes {len(program.stages)} evaluations from here, "
                    f"timesteps has {len(run.plan.labels) - first} left; use a solver without a warm-up"
                )
        run.stages = Stages(program)

    def _due(self, timestep: Any, eta: float = 0.0) -> tuple[_Run, Level]:
        """The level of the evaluation that is due. The first call finds it by ``begin_index`` or by the label."""
        run = self._needed()
        if run.index is None:
            self._begin(run, timestep)
        assert run.index is not None and run.stages is not None
        if eta and run.index == run.first and "eta" in SOLVERS[run.plan.solver].options:
            program = run.stages.program
            run.stages = Stages(SOLVERS[run.plan.solver](program.grid, **{**run.plan.options, "eta": float(eta)}))
        if run.index >= len(run.plan.labels):
            raise ValueError(f"step: all {len(run.plan.labels)} evaluations have been made; call set_timesteps again")
        return run, run.stages.program.stages[run.index - run.first].level

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the state itself ("vp", "flow"), in unit variance ("ve"), or times c_in ("edm")."""
        if diffusers_levels.frame_of(self.config["levels"], self.config) in ("vp", "flow"):
            return sample
        run = self._run
        apart = run is None or (run.index is None and run.begin is None and float(timestep) not in run.plan.labels)
        level = self._level(timestep) if apart else self._due(timestep)[1]
        return sample * self._input_scale(level)

    def _input_scale(self, level: Level) -> float:
        """c_in."""
        frame = diffusers_levels.frame_of(self.config["levels"], self.config)
        if frame in ("vp", "flow"):
            return 1.0
        return 1 / math.hypot(level.rho, float(self.config["sigma_data"]) if frame == "edm" else 1.0)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> FastODESchedulerOutput | tuple[Tensor, ...]:
        """One evaluation, already made, and the update that follows it: the state at which the next one is due.

        ``generator`` makes the noise of stochastic solvers, as in diffusers; ``variance_noise`` replaces it. ``eta`` above 0,
        as pipelines pass it on, replaces that of the solver, if it has one, from the first step on.
        """
        run, level = self._due(timestep, eta)
        assert run.index is not None and run.stages is not None
        if model_output.shape[1:2] != sample.shape[1:2] and model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output[:, : sample.shape[1]]  # the rest is a learned variance
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output: must have the shape of sample {list(sample.shape)}, got {list(model_output.shape)}"
            )
        exact = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x = run.exact if run.returned is sample and run.exact is not None else sample.to(exact)
        denoised = self._denoised(model_output.to(exact), x, level)

        def noise() -> Tensor:
            if variance_noise is not None:
                return variance_noise.to(x)
            z = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
            return z.to(exact)

        made = run.stages.advance(run.index - run.first, x, denoised, noise)
        run.index += 1
        run.exact, run.returned = made, made.to(model_output.dtype)
        if run.returned is made:  # a pipeline may write into what it is handed
            run.exact = None
        if not return_dict:
            return run.returned, denoised
        return FastODESchedulerOutput(run.returned, denoised.to(model_output.dtype))

    def _denoised(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """E[x_0 | x] from the network's output, in the frame of the state."""
        c_skip, c_out = self._scaling(level)
        d = output * c_out if c_skip == 0 else torch.add(x * c_skip, output, alpha=c_out)
        for transform in self._transforms():
            d = transform(d)
        return d

    def _transforms(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """What the config does to the denoised estimate."""
        config = self.config
        if config.get("thresholding"):
            return (partial(_threshold, ratio=config["dynamic_thresholding_ratio"], limit=config["sample_max_value"]),)
        if config.get("clip_sample"):
            limit = float(config["clip_sample_range"])
            return (Clip(-limit, limit),)
        return ()

    def _scaling(self, level: Level) -> tuple[float, float]:
        """(c_skip, c_out): x_0 = c_skip x + c_out F."""
        frame = diffusers_levels.frame_of(self.config["levels"], self.config)
        alpha, sigma, rho = level.alpha, level.sigma, level.rho
        kind = self.config.get("prediction_type") or ("flow_prediction" if frame == "flow" else "epsilon")
        if self.config["levels"].startswith("FlowMatch"):
            kind = "flow_prediction"
        if frame == "edm":
            data = float(self.config["sigma_data"])
            size = rho**2 + data**2
            return data**2 / size, (-1 if kind == "v_prediction" else 1) * rho * data / math.sqrt(size)
        if kind == "flow_prediction":
            return 1.0, -sigma
        if kind in ("sample", "original_sample"):
            return 0.0, 1.0
        if kind == "epsilon":
            if alpha == 0:
                raise ValueError("prediction_type: epsilon says nothing about the image at alpha = 0, the first level")
            return 1 / alpha, -sigma / alpha
        if kind == "v_prediction":  # v = a n - s x_0 on the circle a^2 + s^2 = 1
            size = math.hypot(alpha, sigma)
            return alpha / size**2, -sigma / size
        raise ValueError(f"prediction_type: {kind!r} is not known")

    # -- noise added to images -------------------------------------------------------------------------------------------

    def _level(self, timestep: Any) -> Level:
        """The level of a label: of this run's evaluations, or of the training table."""
        value, run = float(timestep), self._run
        if run is not None:
            for label, stage in zip(run.plan.labels, run.plan.program.stages, strict=True):
                if label == value or float(torch.tensor(label)) == value:
                    return stage.level
        frame = diffusers_levels.frame_of(self.config["levels"], self.config)
        if frame == "flow":
            t = value / float(self.config["num_train_timesteps"])
            return Level(1 - t, t)
        if frame == "edm":
            return Level(1.0, math.exp(4 * value))
        bar = self._peer().alphas_cumprod.double()
        k = min(max(value, 0.0), len(bar) - 1.0)
        low = min(int(k), len(bar) - 2)
        # Between labels sigma/alpha is linear, as diffusers has it; at a label it is the table's.
        at = float(bar[round(k)]) if k == round(k) else 0.0
        if not at and k != round(k):
            rho = [math.sqrt((1 - float(b)) / float(b)) for b in bar[low : low + 2]]
            at = 1 / (1 + (rho[0] + (k - low) * (rho[1] - rho[0])) ** 2)
        alpha, sigma = math.sqrt(at), math.sqrt(1 - at)
        return Level(1.0, sigma / alpha) if frame == "ve" else Level(alpha, sigma)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma n at the level of each of ``timesteps`` [B] (or one for all)."""
        levels = [self._level(t) for t in timesteps.reshape(-1)]
        run = self._run
        if run is not None and run.index is None and run.begin is not None:  # a pipeline that begins in the middle
            levels = [run.plan.program.stages[run.begin].level] * len(levels)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (
            torch.tensor([v for v in values]).to(original_samples).reshape(shape)
            for values in ([x.alpha for x in levels], [x.sigma for x in levels])
        )
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """The same with the arguments of flow pipelines."""
        if noise is None:
            raise ValueError("noise: give the noise that is mixed into the sample")
        return self.add_noise(sample, noise, torch.as_tensor(timestep).reshape(-1))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha n - sigma x_0 of the variance preserving process, for training."""
        rho = torch.tensor([self._level(t).rho for t in timesteps.reshape(-1)]).to(sample)
        rho = rho.reshape(-1, *[1] * (sample.ndim - 1))
        return (noise - rho * sample) * torch.rsqrt(1 + rho**2)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])


def _threshold(denoised: Tensor, ratio: float, limit: float) -> Tensor:
    """Dynamic thresholding with diffusers' upper limit on the threshold, which wins where it is below 1."""
    if limit <= 1:
        return denoised.clamp(-limit, limit) / limit
    flat = denoised.flatten(1).abs()
    if flat.shape[1] > 2**24:  # torch.quantile refuses more
        return DynamicThreshold(ratio)(denoised)
    s = torch.quantile(flat, ratio, dim=1).clamp(1, limit).reshape(-1, *[1] * (denoised.ndim - 1))
    return torch.maximum(torch.minimum(denoised, s), -s) / s


def _listed(values: Sequence[float]) -> str:
    shown = [f"{v:g}" for v in values]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]])


__all__ = ["FastODEScheduler", "FastODESchedulerOutput", "SchedulerMixin"]
