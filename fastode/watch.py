"""What a caller sees of a run while it goes on: progress, and a callback once per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from fastode.program import Stage

if TYPE_CHECKING:
    from fastode.engine import Engine

Callback = Callable[[int, float, Tensor, Tensor], Any]
"""``callback(step, sigma, state, denoised)``; True ends the run."""


class Watcher:
    """Calls the callback once per step, shows progress, and counts network calls."""

    def __init__(self, engine: Engine, callback: Callback | None, progress: bool) -> None:
        self.engine, self.callback, self.calls = engine, callback, 0
        self._last_step = -1
        self._bar = tqdm(total=engine.nfe, unit="eval", desc=engine.program.name) if progress else None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def looks(self) -> bool:
        return self.callback is not None

    def wants(self, stage: Stage) -> bool:
        return self.callback is not None and stage.step != self._last_step

    def visit(self, stage: Stage, state: Tensor | None, denoised: Tensor | None) -> bool:
        self.calls += 1
        if self._bar is not None:
            self._bar.update()
        if self.callback is None or stage.step == self._last_step:
            return False
        self._last_step = stage.step
        sigma = float(self.engine.program.sigmas[stage.index])
        assert state is not None and denoised is not None
        return bool(self.callback(stage.step, sigma, state, denoised))
