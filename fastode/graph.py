"""Whole-run CUDA graphs: all updates, noise and network calls of a run recorded once and replayed with one host call.

What a recording reads lies at fixed addresses: the start, labels, conditions, noise levels, seeds and the tables of all
updates. Before a replay they are overwritten in place, so a new guidance strength, other seeds or labels need no new
recording. Only the last update is launched after the replay, while the device is still busy: it writes the samples
where the caller wants them, so nothing is cloned.

:class:`Graphs` keeps the recordings of one or more engines. They belong to *lanes*: a thread takes a lane for the time
of a call, and the recordings of a lane share one memory pool, since they never run at the same time. The least recently
used make room when a budget of bytes is exhausted. Nothing in this file but :class:`CudaRecorder` knows CUDA.

A recording reads the parameters of the network at their addresses; new weights may be loaded in place, and where
``network.to(...)`` has moved them the run is recorded anew.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from fastode.backends import BACKENDS
from fastode.backends.base import Buffers, make_numbers
from fastode.denoisers.base import Condition
from fastode.scalar import Late, evaluate
from fastode.shelf import GraphError, Key, Ring, Shelf, pays

if TYPE_CHECKING:
    from fastode.engine import Engine
    from fastode.program.lower import Call

Mode = Literal["auto"] | bool


class Recorder(Protocol):
    """How a run is recorded: CUDA graphs, or a stand-in in tests. ``bakes``: numbers of the host become constants of a
    recording, so that weights can change only where executors read them from device memory."""

    bakes: bool

    def pool(self) -> Any:
        """Memory that the recordings of one lane share."""

    def record(self, body: Callable[[], None], pool: Any) -> Callable[[], None]:
        """Warm ``body`` up, record it, and return what replays it."""

    def enter(self, mark: Any) -> None:
        """Order this thread's work after ``mark``, the end of the lane's last call."""

    def leave(self) -> Any:
        """A mark at the end of the work so far."""

    def seconds(self, work: Callable[[], None], repeats: int) -> tuple[float, float]:
        """Seconds until the host is free again, and until the device is, per execution of ``work``."""

    def used(self) -> int:
        """Bytes of device memory taken so far."""

    def wait(self) -> None:
        """Until all replays have ended, so that their memory may be freed."""


class CudaRecorder:
    """Recordings as CUDA graphs on one device."""

    bakes = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = (
            threading.RLock()
        )  # one capture at a time, and nobody waits for the device meanwhile: CUDA forbids it

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def record(self, body: Callable[[], None], pool: Any) -> Callable[[], None]:
        with self._lock, torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels, chooses convolution algorithms, fills workspaces
                for _ in range(3):
                    body()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: what other threads do on the device meanwhile does not spoil the capture.
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    body()
            except BaseException:
                # Where ending the capture failed, the allocator still counts it as under way and would free nothing.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
                raise
            return graph.replay

    def enter(self, mark: Any) -> None:
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def leave(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def seconds(self, work: Callable[[], None], repeats: int) -> tuple[float, float]:
        with self._lock:
            torch.cuda.synchronize(self.device)
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            host = time.perf_counter() - began
            torch.cuda.synchronize(self.device)
            return host / repeats, (time.perf_counter() - began) / repeats

    def used(self) -> int:
        with self._lock:
            torch.cuda.empty_cache()  # as every capture does when it begins; else a difference would mean nothing
            return torch.cuda.memory_reserved(self.device)

    def wait(self) -> None:
        with self._lock:
            torch.cuda.synchronize(self.device)


@dataclass(eq=False)
class _Lane:
    """What one thread at a time works with."""

    number: int
    pool: Any
    mark: Any = None
    rings: dict[Key, Ring] = field(default_factory=dict)


class _Draws:
    """The noise of a recorded run: made by the executor from its own copy of the seeds, or given in fixed tensors."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given, self.seeds = given, None

    seeds: Tensor | None

    def __call__(self, index: int) -> Tensor:
        return self.given[index]


class Run:
    """One engine's run over fixed memory, for calls of one kind (see :func:`kind_of`)."""

    def __init__(self, engine: Engine, condition: Condition, seeded: bool) -> None:
        self.engine, self.lowered, self.call = engine, engine._lower(watch=False), -1
        with torch.inference_mode(False):  # this memory serves later calls too, which may be in another mode
            self._allocate(engine, condition, seeded)

    def _allocate(self, engine: Engine, condition: Condition, seeded: bool) -> None:
        shape, device = engine.shape, engine.device
        slots = torch.empty((self.lowered.slots, *shape), device=device, dtype=engine.dtype)
        self.net_in = torch.empty(shape, device=device, dtype=engine.net_dtype)
        self.start = torch.empty(shape, device=device, dtype=engine.dtype)
        self.bytes = sum(t.numel() * t.element_size() for t in (slots, self.net_in, self.start))
        self.unused = torch.empty(0, device=device, dtype=engine.dtype)
        self.draws = _Draws([])
        self.executor = BACKENDS[engine.backend].bind(self.lowered, Buffers(slots, self.net_in), self.draws)
        if engine.program.draws and not (seeded and getattr(self.executor, "makes_noise", False)):
            self.draws.given = [torch.empty_like(self.start) for _ in range(engine.program.draws)]
        labels, uncond = condition.class_labels, condition.uncond
        self.condition = Condition(
            None if labels is None else labels.clone(),
            _copies(condition.cond),
            None if uncond is None else _copies(uncond),
        )
        self.levels: list[Tensor] = []
        self.outputs: Any = ()
        self.numbers: dict[Late, Any] = {}
        self.makes = False

    def fill(self, start: Tensor, condition: Condition, known: Mapping[Late, Any], source: Any) -> None:
        """Overwrite everything that a call may change."""
        self.start.copy_(start, non_blocking=True)
        if condition.class_labels is not None:
            self.condition.class_labels.copy_(condition.class_labels, non_blocking=True)  # type: ignore[union-attr]
        for fixed, new in (
            (self.condition.cond, condition.cond),
            (self.condition.uncond or {}, condition.uncond or {}),
        ):
            for name, value in new.items():
                if isinstance(value, Tensor):
                    fixed[name].copy_(value, non_blocking=True)
        self.draws.seeds = None if self.draws.given else getattr(source, "seeds", None)
        for k, tensor in enumerate(self.draws.given):
            tensor.copy_(source(k))
        self.executor.load(known)
        self._keep_numbers(known)
        if not self.levels:
            with torch.inference_mode(False):
                told = [self.engine.denoiser.told(call, self.net_in) for call in self.lowered.calls]
                levels = zip(told, self.lowered.calls, strict=True)
                self.levels = [self._told(call, known).clone() if t is None else t for t, call in levels]
            prepare = getattr(self.executor, "prepare", None)
            self.makes = bool(self.lowered.program.binds) and prepare is not None and prepare(self.levels)
        for level, call in zip(self.levels, self.lowered.calls, strict=True):
            if isinstance(call.c_noise, Late) and not call.due:
                level.copy_(self._told(call, known))

    def _tell(self, call: int, value: Any) -> None:
        self.levels[call].copy_(self.engine.denoiser.c_noise(value, self.net_in))

    def _told(self, call: Call, known: Mapping[Late, Any]) -> Tensor:
        return self.engine.denoiser.c_noise(evaluate(call.c_noise, known), self.net_in)

    def _keep_numbers(self, known: Mapping[Late, Any]) -> None:
        """The call's late numbers at fixed places on the device, where numbers made in the run are computed from them."""
        if not self.lowered.program.binds:
            return
        each = (self.start.shape[0], *[1] * (self.start.ndim - 1))
        for late, value in known.items():
            tensor = torch.as_tensor(value, dtype=torch.float64).expand(each)
            if late in self.numbers:
                self.numbers[late].copy_(tensor, non_blocking=True)
            else:
                with torch.inference_mode(False):
                    self.numbers[late] = tensor.to(self.start.device, copy=True)

    def body(self) -> None:
        """All but the last update. ``call`` tells how far it got."""
        engine, last = self.engine, len(self.lowered.calls)
        self.call = -1
        numbers = dict(self.numbers)
        for i in range(last):
            self.executor.update(i, self.start, self.outputs if i else (), self.unused)
            self.call = i
            call = self.lowered.calls[i]
            on = engine.guidance if call.outputs > 1 else None
            self.outputs, features = engine.denoiser.raw_and_features(
                self.net_in, self.levels[i], self.condition, on, call.features
            )
            if self.lowered.binds[i + 1] and self.makes:
                self.executor.make(i + 1, features)  # type: ignore[attr-defined]
            elif self.lowered.binds[i + 1]:
                made = (self.lowered, self.executor, i + 1, numbers, self.start, self.outputs, features)
                make_numbers(*made, self._tell)

    def finish(self, result: Tensor) -> None:
        """The last update, into ``result`` [B, *sample]."""
        self.executor.update(len(self.lowered.calls), self.start, self.outputs, result)


def _copies(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}


@dataclass(eq=False)
class _Recording:
    run: Run
    replay: Callable[[], None]
    row: dict[str, Any]


def kind_of(condition: Condition, seeded: bool) -> Key:
    """What calls must have in common to share a recording: which conditions they have, in which shapes."""

    def kind(value: Any) -> Key:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype
        hash(value)  # raises TypeError for values that cannot be compared
        return type(value), value

    def all_of(values: Mapping[str, Any] | None) -> Key:
        return None if values is None else tuple((k, kind(v)) for k, v in sorted(values.items()))

    return condition.class_labels is not None, all_of(condition.cond), all_of(condition.uncond), seeded


def weights_of(engine: Engine) -> Key:
    """Where the parameters lie and in which dtype, by the first one; after a move, recordings are made anew."""
    parameter = engine.denoiser._parameter()
    return None if parameter is None else (parameter.data_ptr(), parameter.dtype)


class Graphs:
    """The recordings of one or more engines; give one object to several engines to let them share memory and budget.

    Args:
        mode: True: a run that cannot be recorded is an error. "auto": it then runs without a graph, and also where the
            measurement says that a graph does not pay; a kind of call is recorded when it comes for the second time.
        budget: bytes of device memory for all recordings; None: no limit.
        ring: hand out this many output tensors in turn. 0: every sample is the caller's to keep (the allocator reuses
            memory that has been let go).
    """

    def __init__(
        self, mode: Mode = "auto", *, budget: int | None = None, ring: int = 0, recorder: Recorder | None = None
    ) -> None:
        if mode not in ("auto", True, False):
            raise ValueError(f"graph: must be 'auto', True or False, got {mode!r}")
        if budget is not None and budget <= 0:
            raise ValueError(f"budget: must be a positive number of bytes, got {budget}")
        if ring < 0:
            raise ValueError(f"ring: must be at least 0, got {ring}")
        self.mode, self.ring = mode, ring
        self._recorder = recorder
        self._lock = threading.RLock()
        self._shelf: Shelf[_Recording] = Shelf(budget)
        self._lanes: list[_Lane] = []
        self._idle: list[_Lane] = []
        self._seen: dict[Key, int] = {}
        self._refused: dict[Key, str] = {}
        self._rows: dict[tuple[int, Key], dict[str, Any]] = {}
        self._numbers: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    @classmethod
    def of(cls, graph: Mode | Graphs, device: torch.device, backend: str) -> Graphs | None:
        """The ``graph`` argument of an engine, or None where runs are not recorded."""
        graphs = graph if isinstance(graph, Graphs) else cls(graph)
        possible = (device.type == "cuda" or graphs._recorder is not None) and backend != "reference"
        if graphs.mode is True and not possible:
            raise ValueError(f"graph: True needs a CUDA device and an executor, got backend {backend!r} on {device}")
        return graphs if possible and graphs.mode is not False else None

    def run(
        self,
        engine: Engine,
        start: Tensor,
        condition: Condition,
        known: Mapping[Late, Any],
        source: Any,
        out: Tensor | None,
    ) -> Tensor | None:
        """The samples, in ``out`` if it is given, or None if this call goes on without a graph."""
        if start.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the caller records a graph of his own
        with torch.cuda.device_of(start):
            return self._run(engine, start, condition, known, source, out)

    def _run(
        self,
        engine: Engine,
        start: Tensor,
        condition: Condition,
        known: Mapping[Late, Any],
        source: Any,
        out: Tensor | None,
    ) -> Tensor | None:
        seeded = getattr(source, "seeds", None) is not None
        try:
            kind = (self._number(engine), kind_of(condition, seeded), weights_of(engine))
        except TypeError as error:
            self._refuse(None, f"a condition that is no tensor cannot be compared ({error})")
            return None
        reason = self._refused.get(kind) or self._impossible(engine)
        if reason:
            self._refuse(None, reason)
            return None
        with self._lock:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self.mode == "auto" and self._seen[kind] < 2:
                return None
            if self._recorder is None:
                self._recorder = CudaRecorder(engine.device)
            if not self._idle:
                self._idle.append(_Lane(len(self._lanes), self._recorder.pool()))
                self._lanes.append(self._idle[-1])
            lane = self._idle.pop()
        key = (lane.number, kind)
        try:
            self._recorder.enter(lane.mark)
            with self._lock:
                recording = self._shelf.take(key)
            if recording is None:
                recording = self._record(engine, key, lane, start, condition, known, source, seeded)
            if recording is None:
                return None
            recording.run.fill(start, condition, known, source)
            recording.replay()
            result = out
            if result is None:
                result = self._output(engine, lane, kind)
            recording.run.finish(result)
            return result
        finally:
            lane.mark = self._recorder.leave()
            with self._lock:
                self._shelf.release(key)
                self._idle.append(lane)

    def _output(self, engine: Engine, lane: _Lane, kind: Key) -> Tensor:
        def make() -> Tensor:
            return torch.empty(engine.shape, device=engine.device, dtype=engine.dtype)

        return lane.rings.setdefault(kind, Ring(self.ring)).take(make) if self.ring else make()

    def _impossible(self, engine: Engine) -> str | None:
        if engine.check_finite:
            return "check_finite makes the host look at every network output; build the engine with check_finite=False"
        if engine.denoiser.transforms:
            return "the denoiser has transforms, whose coefficients are not in a table"
        bakes = self._recorder is None or self._recorder.bakes
        lowered = engine._lower(watch=False)
        if (
            bakes
            and (lowered.late or lowered.program.binds)
            and not getattr(BACKENDS[engine.backend], "device_tables", False)
        ):
            return f"backend {engine.backend!r} takes its weights from the host, and some of them come with the call or the run"
        return None

    def _refuse(self, kind: Key | None, reason: str) -> None:
        """Go on without a graph, or raise if one was demanded."""
        if kind is not None:
            self._refused[kind] = reason
        if self.mode is True:
            raise GraphError(f"graph: {reason}")

    def _record(
        self,
        engine: Engine,
        key: tuple[int, Key],
        lane: _Lane,
        start: Tensor,
        condition: Condition,
        known: Mapping[Late, Any],
        source: Any,
        seeded: bool,
    ) -> _Recording | None:
        recorder = self._recorder
        assert recorder is not None
        before = recorder.used()
        run: Run | None = None
        try:
            run = Run(engine, condition, seeded)
            run.fill(start, condition, known, source)
            run.body()  # a mistake in the network shows here, before anything is captured
            run.finish(torch.empty_like(run.start))
            host, device = recorder.seconds(run.body, 3)
            replay = recorder.record(run.body, lane.pool)
            _, replayed = recorder.seconds(replay, 3)
        except Exception as error:
            where = "while its memory was set up" if run is None else f"at {stage_name(engine, run.call)}"
            message = f"recording failed {where}: {type(error).__name__}: {error}"
            lane.pool = recorder.pool()  # a failed capture may have left the old one unusable
            if self.mode is True:
                self._refused[key[1]] = message
                raise GraphError(f"graph: {message}") from error
            self._refuse(key[1], message)
            return None
        size = max(run.bytes, recorder.used() - before)
        worth, verdict = pays(host, device, replayed)
        row = {
            "batch": engine.shape[0],
            "host_ms": host * 1e3,
            "device_ms": device * 1e3,
            "replay_ms": replayed * 1e3,
            "bytes": size,
            "verdict": verdict,
        }
        with self._lock:
            self._rows[key] = row
            if self.mode == "auto" and not worth:
                self._refuse(key[1], verdict)
                return None
            recording = _Recording(run, replay, row)
            try:
                if self._shelf.put(key, recording, size):
                    recorder.wait()
            except GraphError as error:
                self._refused[key[1]] = str(error)
                if self.mode is True:
                    raise
                return None
        return recording

    def report(self, engine: Engine | None = None) -> list[dict[str, Any]]:
        """One row per recorded kind of call: batch, host_ms (to enqueue without a graph), device_ms (the same until the
        device is done), replay_ms, bytes, verdict; then one row with "reason" per kind that goes without a graph."""

        def mine(kind: Any) -> bool:
            return engine is None or kind[0] == self._number(engine)

        with self._lock:
            rows = [dict(row) for key, row in self._rows.items() if mine(key[1])]
            return rows + [{"reason": why} for kind, why in self._refused.items() if mine(kind)]

    def forget(self, engine: Engine) -> None:
        """Drop the recordings of ``engine``."""
        with self._lock:
            number = self._number(engine)

            def mine(kind: Any) -> bool:
                return kind[0] == number

            if self._recorder is not None:
                self._recorder.wait()
            self._shelf.drop(lambda key: mine(key[1]))
            self._seen = {k: v for k, v in self._seen.items() if not mine(k)}
            self._refused = {k: v for k, v in self._refused.items() if not mine(k)}
            self._rows = {k: v for k, v in self._rows.items() if not mine(k[1])}
            for lane in self._lanes:
                lane.rings = {k: v for k, v in lane.rings.items() if not mine(k)}

    def _number(self, engine: Engine) -> int:
        """A name for ``engine`` that no later engine gets, unlike its address."""
        with self._lock:
            return self._numbers.setdefault(engine, next(self._count))


def stage_name(engine: Engine, call: int) -> str:
    if call < 0:
        return "the first update"
    stage = engine.program.stages[call]
    return f"network call {call} (step {stage.step}, sigma {float(engine.program.sigmas[call]):.6g})"
