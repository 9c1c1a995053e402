"""The engine: a program, a denoiser and a backend bound together, ready to sample."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastode.backends import BACKENDS, choose, reference
from fastode.backends.base import Buffers, Executor, make_numbers
from fastode.denoisers.base import Condition, Denoiser
from fastode.denoisers.guidance import GUIDANCE_SCALE, Guidance
from fastode.draws import Draws, Generated, Seeded
from fastode.graph import Graphs, Mode
from fastode.noise import check_seeds, normal
from fastode.program import Program, Stage
from fastode.program.lower import Call, Lowered, lower
from fastode.scalar import Late, evaluate
from fastode.watch import Callback, Watcher

NoiseSource = Callable[[int], Tensor] | Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Result:
    """A run with its trajectory.

    ``samples``: [B, *sample]; ``states[i]``: the state at grid level i, in the grid's frame; ``sigmas``: EDM-frame noise
    level of every network call in order, float64 [NFE]; ``nfe``: evaluations per sample.
    """

    samples: Tensor
    states: list[Tensor]
    sigmas: Tensor
    nfe: int


@dataclass(frozen=True, eq=False)
class _Workspace:
    """Memory of one run in flight; borrowed for a call and given back, never shared.

    ``c_noise[i]``: what the network is told in call i, or None where that is known only with the call; what is made in the
    run is written there. ``makes``: the executor makes all numbers of the run itself (:mod:`fastode.backends.late`).
    """

    buffers: Buffers
    executor: Executor
    draws: Draws
    c_noise: tuple[Tensor | None, ...]
    makes: bool

    def tell(self, denoiser: Denoiser) -> Callable[[int, Any], None]:
        """What writes a level that the run has made to its place."""

        def write(call: int, value: Any) -> None:
            level = self.c_noise[call]
            assert level is not None
            level.copy_(denoiser.c_noise(value, self.buffers.net_in))

        return write


class NonFiniteError(ValueError):
    """The network returned NaN or Inf."""


class Engine:
    """``engine(x)`` or ``engine(seeds=[...])`` returns samples [B, *sample].

    Args:
        program: a compiled solver, ``SOLVERS[name](grid, **options)``.
        denoiser: a :class:`Denoiser`, or a plain callable ``D(x, sigma)`` in the EDM frame.
        shape: ``(B, *sample)``.
        backend: "auto", "reference" (the definition; differentiable) or the name of an executor.
        device, dtype: of the state; by default the network's device and float32. Sums are made in ``dtype`` and the network
            is called in its own.
        guidance: a :class:`Guidance` (or True) prepares classifier-free guidance; its strength comes with each call.
        check_finite: stop with the stage and sigma named when the network returns NaN or Inf. Default: on CPU only, since
            looking at a number on a GPU makes the host wait.
        graph: record whole runs as CUDA graphs: "auto" where that pays, True (a run that cannot be recorded is an error),
            False, or a :class:`Graphs` that several engines share. Runs with a callback, progress or a trajectory are
            never recorded.

    The engine is immutable and safe to share between threads: each call borrows its own buffers. Raises ``ValueError`` or
    ``TypeError`` naming the argument before anything is computed.
    """

    def __init__(
        self,
        program: Program,
        denoiser: Denoiser | Callable[..., Any],
        shape: Sequence[int],
        backend: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        guidance: Guidance | bool | None = None,
        check_finite: bool | None = None,
        graph: Mode | Graphs = "auto",
    ) -> None:
        if not isinstance(program, Program):
            raise TypeError(f"program: must be a Program such as SOLVERS['ddim'](grid), got {type(program).__name__}")
        self.program, self.denoiser = program, Denoiser.of(denoiser)
        self.shape = _check_shape(shape, self.denoiser)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: the state is float32 or float64, got {dtype} (the network may use its own dtype)")
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else (self.denoiser.device or torch.device("cpu"))
        if self.denoiser.device is not None and self.denoiser.device.type != self.device.type:
            raise ValueError(f"device: the network is on {self.denoiser.device}, the state would be on {self.device}")
        self.backend = choose(backend, self.device)
        self.guidance = Guidance() if guidance is True else (guidance or None)
        self.check_finite = self.device.type == "cpu" if check_finite is None else bool(check_finite)
        self.net_dtype = self.denoiser.dtype or dtype
        self.graphs = Graphs.of(graph, self.device, self.backend)
        self._closed = False
        self._lowered: dict[bool, Lowered] = {}
        self._free: dict[bool, queue.SimpleQueue[_Workspace]] = {False: queue.SimpleQueue(), True: queue.SimpleQueue()}
        for stage in program.stages:  # a level that the prediction cannot handle is an error now, not in the run
            self.denoiser.scaling(stage.level)
            self.denoiser.check_outputs(stage.outputs)
        if self.backend != "reference":
            self._lower(watch=False)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample; guidance by a second call is not counted twice."""
        return self.program.nfe

    @property
    def slots(self) -> int:
        """State-sized buffers a run needs besides the network's input and output."""
        return self._lower(watch=False).slots

    def _lower(self, *, watch: bool) -> Lowered:
        if watch not in self._lowered:
            denoiser = self.denoiser
            self._lowered[watch] = lower(
                self.program,
                denoiser.scaling,
                lambda level: denoiser.columns(level, self.guidance),
                folded=not denoiser.transforms,
                exact_input=self.net_dtype == self.dtype,
                watch=set(self.program.states) if watch else (),
            )
        return self._lowered[watch]

    def __call__(
        self,
        x: Tensor | None = None,
        *,
        seeds: Sequence[int] | Tensor | None = None,
        class_labels: Tensor | Sequence[int] | int | None = None,
        guidance_scale: float | Sequence[float] | Tensor | None = None,
        cond: Mapping[str, Any] | None = None,
        uncond: Mapping[str, Any] | None = None,
        noise: NoiseSource | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        return_trajectory: bool = False,
        out: Tensor | None = None,
    ) -> Any:
        """Sample from the state ``x`` at the first level, or from ``seeds`` (one whole number per sample).

        ``seeds`` also drive the noise of stochastic solvers, sample by sample; without them it follows torch's global
        generator. ``noise`` replaces that noise: a list of tensors or a function of the draw's number.
        ``generator``: one ``torch.Generator``, or one per sample, drawn from in diffusers' order instead of seeds: first the
        initial state (if ``x`` is left out), then every draw as it comes; samples then are those of a pipeline that was
        given the same generators.
        ``callback(step, sigma, state, denoised)`` is called after the first evaluation of every step, with the EDM-frame
        noise level, the state there and its denoised estimate; returning True ends the run, and that state is the result.
        ``out``: a tensor [B, *sample] in the state's dtype to write the samples to.
        Returns the samples, or a :class:`Result` with ``return_trajectory=True``.
        """
        if self._closed:
            raise ValueError("engine: it was closed; build a new one")
        self._check_out(out)
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: must take (step, sigma, state, denoised), got {type(callback).__name__}")
        condition = Condition(_as_labels(class_labels), dict(cond or {}), uncond)
        condition = self.denoiser.check_condition(self.shape[0], condition, self.guidance)
        known = self._known(guidance_scale)
        seed_tensor = None if seeds is None else check_seeds(seeds, self.shape[0])
        generated = self._generated(generator, seeds, noise)
        start = self._start(x, seed_tensor, generated)
        source = self._noise_source(noise, seed_tensor) if generated is None else generated
        if self.graphs is not None and callback is None and not progress and not return_trajectory:
            with torch.no_grad():
                replayed = self.graphs.run(self, start, condition, known, source, out)
            if replayed is not None:
                return replayed
        watcher = Watcher(self, callback, progress)
        with watcher:
            if self.backend == "reference":
                samples, values = self._run_reference(start, condition, known, source, watcher, return_trajectory)
                states = [values[v] for v in self.program.states if v in values] if return_trajectory else []
            else:
                with torch.no_grad():
                    samples, states = self._run_lowered(start, condition, known, source, watcher, return_trajectory)
        if out is not None:
            samples = out.copy_(samples.detach())
        if return_trajectory:
            return Result(samples, states, self.program.sigmas[: watcher.calls], watcher.calls)
        return samples

    def warmup(self, **call: Any) -> list[dict[str, Any]]:
        """Run with the arguments of a call until the graph is recorded that such calls will replay; see :meth:`report`.

        Without ``x`` and ``seeds`` the seeds are 0 .. B - 1.
        """
        if "x" not in call and "seeds" not in call:
            call["seeds"] = range(self.shape[0])
        for _ in range(2):  # "auto" records a kind of call when it comes for the second time
            self(**call)
        return self.report()

    def report(self) -> list[dict[str, Any]]:
        """One row per kind of call that was recorded, or that goes without a graph and why; see :meth:`Graphs.report`."""
        return [] if self.graphs is None else self.graphs.report(self)

    def close(self) -> None:
        """Give all memory back. The engine cannot be used afterwards."""
        self._closed = True
        if self.graphs is not None:
            self.graphs.forget(self)
        self._free = {False: queue.SimpleQueue(), True: queue.SimpleQueue()}

    # -- the two ways to run ---------------------------------------------------------------------------------------------

    def _run_reference(
        self,
        start: Tensor,
        condition: Condition,
        known: Mapping[Late, Any],
        source: Callable[[int], Tensor] | None,
        watcher: Watcher,
        keep: bool,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        def denoise(x: Tensor, stage: Stage, late: Mapping[Late, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            def check(raw: Tensor) -> None:
                self._check(stage, raw)

            names = [name for name in stage.outputs if name != "denoised"]
            return self.denoiser.denoise_and_features(
                x, stage.level, condition, guidance=self.guidance, known=late, check=check, names=names
            )

        visit = watcher.visit
        made, values = reference.run(self.program, denoise, start, noise=source, known=known, visit=visit, keep=keep)
        return (
            made.clone() if made is start else made
        ), values  # a run stopped at its first step returns no alias of x

    def _run_lowered(
        self,
        start: Tensor,
        condition: Condition,
        known: Mapping[Late, Any],
        source: Callable[[int], Tensor] | None,
        watcher: Watcher,
        keep: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        lowered, denoiser = self._lower(watch=keep), self.denoiser
        work = self._borrow(keep)
        work.draws.source = source
        work.draws.seeds = source.seeds if isinstance(source, Seeded) else None
        result = torch.empty(self.shape, device=self.device, dtype=self.dtype)
        net_in, executor, transforms = work.buffers.net_in, work.executor, denoiser.transforms
        # An executor that looks at the network outputs while it reads them saves a pass over each, 7 us for 4 elements.
        finite_by_update = self.check_finite and getattr(executor, "reports_finite", False)
        memo: dict[int, Any] = {}
        numbers = dict(known)
        makes = work.makes and not transforms and not watcher.looks
        intact = True
        try:
            executor.load(known)
            executor.update(0, start, (), result)
            for i, (call, c_noise) in enumerate(zip(lowered.calls, work.c_noise, strict=True)):
                on = self.guidance if call.outputs > 1 else None
                if c_noise is None:
                    c_noise = denoiser.c_noise(evaluate(call.c_noise, numbers, memo), net_in)
                version = net_in._version, c_noise._version
                outputs, features = denoiser.raw_and_features(net_in, c_noise, condition, on, call.features)
                if (net_in._version, c_noise._version) != version:
                    intact = False
                    raise RuntimeError("network: it changed its input in place; wrap it so that it works on a copy")
                looked_at = finite_by_update and not transforms and not watcher.wants(call.stage)
                if not looked_at:
                    for raw in outputs:
                        self._check(call.stage, raw)
                if transforms or watcher.wants(call.stage):
                    state = self._state(call, work.buffers, numbers)
                    if watcher.wants(call.stage) and call.point.kind == "slot":
                        state = state.clone()  # the callback may keep it; the slot is written again
                    denoised = denoiser.assemble(state, outputs, call.stage.level, on, numbers)
                    if watcher.visit(call.stage, state, denoised):
                        return state.clone(), self._states(lowered, work.buffers, i) if keep else []
                    if transforms:
                        outputs = (denoised,)
                else:
                    watcher.visit(call.stage, None, None)
                if lowered.binds[i + 1]:
                    if makes:
                        executor.make(i + 1, features)  # type: ignore[attr-defined]
                    else:
                        make_numbers(lowered, executor, i + 1, numbers, start, outputs, features, work.tell(denoiser))
                if not executor.update(i + 1, start, outputs, result) and looked_at:
                    raise self._not_finite(call.stage)
            return result, self._states(lowered, work.buffers, len(lowered.calls)) if keep else []
        finally:
            work.draws.source = None
            if intact:
                self._free[keep].put(work)

    def _states(self, lowered: Lowered, buffers: Buffers, done: int) -> list[Tensor]:
        """States at the grid levels that the first ``done`` stages have reached."""
        written = {0, *self.program.init.writes}.union(*(s.table.writes for s in self.program.stages[:done]))
        reached = [lowered.states[value].index for value in self.program.states if value in written]
        return [buffers.slots[slot].clone() for slot in reached]

    def _state(self, call: Call, buffers: Buffers, known: Mapping[Late, Any]) -> Tensor:
        """The state that ``call`` evaluates, read back for the callback or for an unfolded estimate."""
        if call.point.kind == "slot":
            return buffers.slots[call.point.index]
        c_in = evaluate(self.denoiser.scaling(call.stage.level).c_in, known)
        return buffers.net_in.to(self.dtype) / c_in

    # -- checks and per-call state ---------------------------------------------------------------------------------------

    def _borrow(self, watch: bool) -> _Workspace:
        try:
            return self._free[watch].get_nowait()
        except queue.Empty:
            lowered = self._lower(watch=watch)
            with torch.inference_mode(False):  # this memory serves later calls too, which may be in another mode
                slots = torch.empty((lowered.slots, *self.shape), device=self.device, dtype=self.dtype)
                net_in = torch.empty(self.shape, device=self.device, dtype=self.net_dtype)
                levels = tuple(self.denoiser.told(call, net_in) for call in lowered.calls)
            buffers, draws = Buffers(slots, net_in), Draws()
            executor = BACKENDS[self.backend].bind(lowered, buffers, draws)
            prepare = getattr(executor, "prepare", None)
            makes = bool(lowered.program.binds) and prepare is not None and prepare(levels)
            return _Workspace(buffers, executor, draws, levels, makes)

    def _check(self, stage: Stage, output: Tensor) -> None:
        if self.check_finite and not bool(torch.isfinite(output).all()):
            raise self._not_finite(stage)

    def _not_finite(self, stage: Stage) -> NonFiniteError:
        return NonFiniteError(
            f"network: returned NaN or Inf at stage {stage.index} (step {stage.step}, "
            f"sigma {float(self.program.sigmas[stage.index]):.6g})"
        )

    def _known(self, scale: Any) -> dict[Late, Any]:
        if self.guidance is None:
            if scale is not None:
                raise ValueError(
                    "guidance_scale: this engine was built without guidance; give Engine(..., guidance=True)"
                )
            return {}
        if scale is None:
            raise ValueError("guidance_scale: this engine is guided and needs a strength (a number, or one per sample)")
        value = torch.as_tensor(scale, dtype=torch.float64)
        if value.ndim == 0:
            if not (value.requires_grad or math.isfinite(value)):
                raise ValueError(f"guidance_scale: must be finite, got {float(value)}")
            return {GUIDANCE_SCALE: float(value) if not value.requires_grad else value}
        if value.shape != self.shape[:1]:
            raise ValueError(
                f"guidance_scale: must be a number or [{self.shape[0]}] numbers, got shape {list(value.shape)}"
            )
        return {GUIDANCE_SCALE: value.reshape(-1, *[1] * (len(self.shape) - 1))}

    def _check_out(self, out: Tensor | None) -> None:
        if out is None:
            return
        if tuple(out.shape) != self.shape or out.dtype != self.dtype or out.device.type != self.device.type:
            raise ValueError(
                f"out: must be {self.dtype} {list(self.shape)} on {self.device}, "
                f"got {out.dtype} {list(out.shape)} on {out.device}"
            )

    def _generated(self, generator: Any, seeds: Any, noise: Any) -> Generated | None:
        if generator is None:
            return None
        if seeds is not None or noise is not None:
            raise ValueError("generator: takes the place of seeds and noise; give one of the three")
        generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if any(not isinstance(g, torch.Generator) for g in generators):
            raise TypeError("generator: must be a torch.Generator, or one per sample")
        if not isinstance(generator, torch.Generator) and len(generators) != self.shape[0]:
            raise ValueError(f"generator: need one, or one per sample ({self.shape[0]}), got {len(generators)}")
        single = isinstance(generator, torch.Generator)
        return Generated(generators, self.shape if single else (1, *self.shape[1:]), self.dtype, self.device)

    def _start(self, x: Tensor | None, seeds: Tensor | None, generated: Generated | None) -> Tensor:
        if x is None and generated is not None:
            return generated.next().mul_(float(self.program.grid[0].sigma))
        if x is None:
            if seeds is None:
                raise ValueError("x: give the state at the first level, or seeds")
            made_by = getattr(BACKENDS.get(self.backend), "normal", None)  # 150 times faster where it is compiled
            if made_by is not None:
                z = made_by(seeds, 0, self.shape[1:], self.dtype, self.device)
            else:
                z = normal(seeds, 0, self.shape[1:], dtype=self.dtype, device=self.device)
            return z.mul_(float(self.program.grid[0].sigma))
        if not isinstance(x, Tensor):
            raise TypeError(f"x: must be a tensor, got {type(x).__name__}")
        if tuple(x.shape) != self.shape:
            raise ValueError(f"x: this engine was built for shape {list(self.shape)}, got {list(x.shape)}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"x: must be floating point, got {x.dtype}")
        if x.device.type != self.device.type:
            raise ValueError(f"x: is on {x.device}, the engine on {self.device}")
        return x.to(self.dtype)

    def _check_draw(self, k: int, z: Any) -> Tensor:
        if not isinstance(z, Tensor):
            raise TypeError(f"noise: draw {k} must be a tensor, got {type(z).__name__}")
        if tuple(z.shape) != self.shape:
            raise ValueError(f"noise: draw {k} must have shape {list(self.shape)}, got {list(z.shape)}")
        return z

    def _noise_source(self, noise: NoiseSource | None, seeds: Tensor | None) -> Callable[[int], Tensor] | None:
        count = self.program.draws
        if noise is not None and not callable(noise):
            if not isinstance(noise, (Sequence, Tensor)):
                raise TypeError(
                    f"noise: must be a list of tensors or a function of the draw's number, got {type(noise).__name__}"
                )
            tensors = list(noise)
            if len(tensors) < count:
                raise ValueError(f"noise: this program makes {count} draws, got {len(tensors)}")
            for k in range(count):  # a list is there before the run, so what is wrong with it is said then
                self._check_draw(k, tensors[k])
            noise = tensors.__getitem__
        if noise is not None:
            given = noise

            def checked(k: int) -> Tensor:
                z = self._check_draw(k, given(k))
                return z.to(device=self.device, dtype=self.dtype)

            return checked
        if not count:
            return None
        if seeds is None:
            seeds = torch.randint(0, 2**62, (self.shape[0],))
        return Seeded(seeds, self.shape[1:], self.dtype, self.device)


def _check_shape(shape: Sequence[int], denoiser: Denoiser) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in shape)
    if len(sizes) < 2 or any(n < 1 for n in sizes):
        raise ValueError(f"shape: must be (B, *sample) with positive sizes, got {list(shape)}")
    if denoiser.sample_shape is not None and sizes[1:] != tuple(denoiser.sample_shape):
        raise ValueError(
            f"shape: {denoiser.name} makes samples of shape {list(denoiser.sample_shape)}, got {list(sizes[1:])}"
        )
    return sizes


def _as_labels(labels: Any) -> Tensor | None:
    return None if labels is None else torch.as_tensor(labels)
