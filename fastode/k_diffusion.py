"""k-diffusion's sampling functions on our solvers: ``sample_<solver>(model, x, sigmas, extra_args, callback, disable)``.

    from fastode import k_diffusion
    x = k_diffusion.sample_unipc(model, x, sigmas, extra_args={"cond": c, "uncond": u, "cond_scale": 7.5})

There is one function per name in ``SOLVERS`` and, for the solvers that are there, per name of k-diffusion (``sample_euler``,
``sample_dpmpp_2m``, ...), which then gives k-diffusion's samples. ``model`` is any k-diffusion model ``D(x, sigma [B],
**extra_args)``, such as ``CompVisDenoiser``, ``CompVisVDenoiser``, ``VDenoiser``, a guided wrapper of theirs, or EDM's
``net(x, sigma, class_labels)``, taken as it is; or a :class:`fastode.Denoiser`. ``sigmas`` are taken as given, nothing is
appended; a last sigma of 0 is a first-order step to the denoised estimate.

Functions are found by name (``getattr``) and tell their options by signature, as ComfyUI and webui expect.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastode.denoisers.base import Denoiser
from fastode.denoisers.guidance import Guidance
from fastode.engine import Engine
from fastode.program import Program
from fastode.schedules.grid import Grid
from fastode.schedules.noise import Flow
from fastode.solvers import SOLVERS

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("ddim", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm_solver_2", {}),
    "lms": ("lms", {}),
    "dpmpp_2s": ("dpm_solver_pp_s", {"order": 2}),
    "dpmpp_2m": ("dpm_solver_pp", {"order": 2, "lower_order_final": False}),
    "dpmpp_2m_sde": ("sde_dpm_solver_pp", {"order": 2, "lower_order_final": False}),
}
"""Name in k-diffusion -> our solver, and the defaults with which it is that function."""

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SampleFunction:
    """``function(model, x, sigmas, extra_args=None, callback=None, disable=None, **options) -> [B, *sample]``.

    Args:
        model: ``D(x, sigma, **extra_args)`` with ``sigma`` [B] in the dtype of ``x``, or a :class:`fastode.Denoiser` (then
            ``extra_args`` holds its ``class_labels``, ``guidance_scale``, ``uncond`` and further conditions).
        x: the state at ``sigmas[0]``, [B, *sample]. The state is kept in float32 (float64 if ``x`` is) and handed to the
            model, and returned, in the dtype of ``x``.
        sigmas: decreasing noise levels in the EDM frame [n + 1]; for flow models the times t of (1 - t) x_0 + t n.
        callback: given ``{"x", "i", "sigma", "sigma_hat", "denoised"}`` once per step, before the step is made.
        disable: hides the progress bar; None shows it on a terminal.
        noise_sampler, s_noise: the noise of stochastic solvers, ``noise_sampler(sigma, sigma_next)``, and its scale. Without
            one it is ``torch.randn_like(x)``.
        flow: whether the state is that of a flow. None asks the model, as ComfyUI does (``model_sampling`` is a CONST).
        options: the solver's own, ``afs`` and ``denoise_to_zero``.

    Raises ``ValueError`` or ``TypeError`` naming the argument before the model is called.
    """

    name: str
    solver: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def __name__(self) -> str:
        return f"sample_{self.name}"

    @property
    def __signature__(self) -> inspect.Signature:
        kind, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        fixed = {"extra_args": None, "callback": None, "disable": None}
        options = {**SOLVERS[self.solver].options, **self.defaults}
        late = {"s_noise": 1.0, "noise_sampler": None, "flow": None}
        return inspect.Signature(
            [inspect.Parameter(n, kind) for n in ("model", "x", "sigmas")]
            + [inspect.Parameter(n, kind, default=d) for n, d in fixed.items()]
            + [inspect.Parameter(n, keyword, default=d) for n, d in {**options, **late}.items()]
        )

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Any,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
        flow: bool | None = None,
        **options: Any,
    ) -> Tensor:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            raise TypeError(f"x: must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        solver = SOLVERS[self.solver]
        solver.check(options)
        levels = torch.as_tensor(sigmas)
        if levels.ndim != 1:
            raise ValueError(f"sigmas: must be one-dimensional, got shape {list(levels.shape)}")
        if len(levels) < 2:
            return x
        flow = is_flow(model) if flow is None else flow
        exact = levels.detach().double().cpu()
        grid = Grid(exact, 1 - exact, schedule=Flow()) if flow else Grid(exact)
        program = solver(grid, **{**self.defaults, **options})
        denoiser, call = _denoiser(model, x, dict(extra_args or {}), flow)
        engine = Engine(
            program,
            denoiser,
            x.shape,
            device=x.device,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
            guidance=Guidance() if call.get("guidance_scale") is not None else None,
            graph=False,
        )

        def report(i: int, sigma: float, state: Tensor, denoised: Tensor) -> None:
            assert callback is not None
            sigma_hat = levels.new_tensor(
                sigma / (1 + sigma) if flow and math.isfinite(sigma) else 1.0 if flow else sigma
            )
            state, denoised = state.to(x.dtype), denoised.to(x.dtype)
            callback({"x": state, "i": i, "sigma": levels[i], "sigma_hat": sigma_hat, "denoised": denoised})

        made = engine(
            x,
            noise=_Noise(program, x, levels, noise_sampler, s_noise) if program.draws else None,
            callback=report if callback is not None else None,
            progress=not disable if disable is not None else sys.stderr.isatty(),
            **call,
        )
        return made.to(x.dtype)


class _Noise:
    """Draw k of ``program``, made when it is first asked for and in order, as k-diffusion draws it."""

    def __init__(self, program: Program, x: Tensor, levels: Tensor, sampler: NoiseSampler | None, scale: float) -> None:
        self._x, self._levels, self._sampler, self._scale = x, levels, sampler, scale
        self._steps = [0] * program.draws
        for stage in reversed(program.stages):
            for atom in stage.table.columns:
                if atom.kind == "noise":
                    self._steps[atom.index] = stage.step
        self._made: dict[int, Tensor] = {}

    def __call__(self, index: int) -> Tensor:
        while len(self._made) <= index:
            k = len(self._made)
            step = self._steps[k]
            if self._sampler is None:
                z = torch.randn_like(self._x)
            else:
                z = self._sampler(self._levels[step], self._levels[step + 1])
            self._made[k] = z * self._scale
        return self._made[index]


def is_flow(model: Any) -> bool:
    """Whether a model of ComfyUI works on the state (1 - t) x_0 + t n; it says so by the class of ``model_sampling``."""
    seen: list[Any] = [model]
    for _ in range(4):
        seen.append(getattr(seen[-1], "inner_model", None))
    for found in seen:
        patcher = getattr(found, "model_patcher", None)
        sampling = getattr(found, "model_sampling", None)
        if patcher is not None and hasattr(patcher, "get_model_object"):
            sampling = patcher.get_model_object("model_sampling")
        if sampling is not None:
            return any(c.__name__ == "CONST" for c in type(sampling).__mro__)
    return False


def _denoiser(model: Any, x: Tensor, extra: dict[str, Any], flow: bool) -> tuple[Denoiser, dict[str, Any]]:
    """The model as a denoiser, and what is passed with the call."""
    if isinstance(model, Denoiser):
        named: dict[str, Any] = {k: extra.pop(k) for k in ("class_labels", "guidance_scale", "uncond") if k in extra}
        return model, {**named, "cond": extra}
    if not callable(model):
        raise TypeError(f"model: must be D(x, sigma, **extra_args) or a Denoiser, got {type(model).__name__}")
    ones, dtype = x.new_ones([x.shape[0]]), x.dtype

    def network(state: Tensor, sigma: Tensor) -> Any:
        return model(state.to(dtype), sigma.reshape(-1).to(dtype) * ones, **extra)

    if flow:  # the model is told the time t, which is sigma in the frame of its state
        return Denoiser(network, prediction="x0", schedule=Flow()), {}
    return Denoiser(network, prediction="denoised"), {}


def _functions() -> dict[str, SampleFunction]:
    found = {name: SampleFunction(name, name) for name in SOLVERS}
    found |= {a: SampleFunction(a, s) for a, s in SOLVERS.aliases.items() if a.isidentifier()}
    return found | {n: SampleFunction(n, s, options) for n, (s, options) in NAMES.items() if s in SOLVERS}


_FUNCTIONS = {f"sample_{name}": function for name, function in _functions().items()}
__all__ = ["NAMES", "SampleFunction", "is_flow", *_FUNCTIONS]
globals().update(_FUNCTIONS)


def __getattr__(name: str) -> Any:
    hint = ""
    if name.startswith("sample_"):
        close = difflib.get_close_matches(name, _FUNCTIONS, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(sorted(_FUNCTIONS))}"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
