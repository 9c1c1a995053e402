"""The comparison itself: every case on every block of seeds, streamed to a file, from where it was left.

The unit of work is one block of seeds of one case. Processes share blocks by number (``rank``, ``world``) and never wait for
each other: whoever finishes the last block of a case sees all others in the files and writes the case's figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from fastode.artifact import identity
from fastode.denoisers import Denoiser
from fastode.engine import Engine, NonFiniteError
from fastode.evaluate.cases import Case
from fastode.evaluate.data import Reference
from fastode.evaluate.drawn import PICTURES, picture, planes, projected
from fastode.evaluate.features import Extractor
from fastode.evaluate.frechet import floor, too_few
from fastode.evaluate.manifold import MEASURES, Manifold
from fastode.evaluate.pool import SETS, pooled
from fastode.evaluate.reference import Converged, Trajectory, _denoise
from fastode.evaluate.results import Record, Results, check_path
from fastode.evaluate.truncation import local_errors
from fastode.files import write_tensors
from fastode.program import Program

CONVERGED = "converged"
MEASURED = ("seconds", "seconds_per_image", "peak_bytes")
"""Entries of a record that are another number in every run."""


@dataclass(frozen=True)
class Settings:
    """What makes figures comparable; part of the header of a result file.

    ``samples`` seeds from ``first_seed`` on, in ``blocks`` independent blocks of equal size; classes in turn. ``screen``
    samples choose the placement of levels; the first ``probe`` ones give local errors, trajectories and pictures. ``steps``,
    ``bound``: of the converged solution, see :class:`~fastode.evaluate.reference.Converged`.
    """

    samples: int = 1000
    blocks: int = 8
    first_seed: int = 0
    screen: int = 48
    probe: int = 16
    guidance_scale: float | None = None
    dtype: str = "float32"
    steps: int = 32
    bound: float = 0.005

    def __post_init__(self) -> None:
        for name in ("samples", "blocks", "screen", "probe", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        if self.samples % self.blocks:
            raise ValueError(f"samples: must be a multiple of blocks ({self.blocks}), got {self.samples}")
        if not self.bound > 0:
            raise ValueError(f"bound: must be positive, got {self.bound}")

    @property
    def size(self) -> int:
        """Samples of a block."""
        return self.samples // self.blocks

    def seeds(self, block: int | None = None) -> range:
        """Seeds of a block, or of all."""
        if block is None:
            return range(self.first_seed, self.first_seed + self.samples)
        return range(self.first_seed + block * self.size, self.first_seed + (block + 1) * self.size)


class Comparison:
    """``run()`` does what is missing in the file ``out``.

    ``metrics``: from :func:`~fastode.evaluate.pool.check_metrics`. ``batch``: samples at a time. ``cache``: folder of
    converged solutions; None keeps nothing. ``say``: where notes go. Raises ``ValueError`` naming the argument before any
    evaluation, also where ``out`` holds results of another model or of other settings.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cases: Sequence[Case],
        settings: Settings,
        out: str | Path,
        *,
        metrics: Sequence[str],
        extract: Extractor | None = None,
        reference: Reference | None = None,
        batch: int = 125,
        backend: str = "auto",
        rank: int = 0,
        world: int = 1,
        cache: Path | None = None,
        machine: Mapping[str, Any] | None = None,
        say: Any = lambda text: None,
    ) -> None:
        if denoiser.sample_shape is None:
            raise ValueError(f"model: {denoiser.name} does not know the shape of its samples")
        if batch < 1:
            raise ValueError(f"batch: must be at least 1, got {batch}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: must be in 0 .. {world - 1}, got {rank}")
        if reference is not None and extract is None:
            raise ValueError("features: a reference needs an extractor")
        self.denoiser, self.cases, self.settings, self.metrics = denoiser, list(cases), settings, tuple(metrics)
        self.extract, self.reference, self.backend = extract, reference, backend
        self.batch = min(batch, settings.size)
        self.rank, self.world, self.say = rank, world, say
        self.shape = tuple(denoiser.sample_shape)
        self.labels = bool(denoiser.num_classes)
        self.manifold = None
        if reference is not None and reference.features is not None and any(m in metrics for m in MEASURES):
            self.manifold = Manifold.of(reference.features[: max(settings.samples, 50)])
        self._check_samples()
        model = identity(denoiser, guidance_scale=settings.guidance_scale)
        self.solutions = Converged(
            denoiser,
            guidance_scale=settings.guidance_scale,
            batch=self.batch,
            backend=backend,
            cache=cache,
            model=model,
        )
        self.out = check_path(out)
        self.results = Results(
            self.out,
            {
                "model": model,
                "settings": {
                    **asdict(settings),
                    "metrics": list(self.metrics),
                    "features": None if extract is None else {"name": extract.name, "digest": extract.digest[:16]},
                    "reference": None
                    if reference is None
                    else {
                        "name": reference.name,
                        "digest": reference.digest[:16],
                        "count": reference.statistics.count,
                        "manifold": None if self.manifold is None else len(self.manifold.features),
                    },
                },
                "card": {k: denoiser.card.get(k) for k in ("data", "parameters", "images_seen") if k in denoiser.card},
                "machine": dict(machine or {}),
            },
            rank=rank,
        )
        self._truth: dict[int, Tensor] = {}
        self._engine: Engine | None = None
        self._warn()

    def _check_samples(self) -> None:
        if self.reference is None or not any(m in self.metrics for m in SETS):
            return
        if self.settings.samples < 2 or (
            self.manifold is not None and self.settings.size * (self.settings.blocks - 1) < 6
        ):
            raise ValueError(f"samples: too few for metrics of sets, got {self.settings.samples}")

    def _warn(self) -> None:
        if self.reference is not None and "frechet" in self.metrics:
            warning = too_few(self.settings.samples, self.reference.statistics)
            if warning is not None:
                self.say(f"warning: {warning}")

    # -- the run ---------------------------------------------------------------------------------------------------------

    def run(self, *, progress: bool = True) -> None:
        """Everything that is missing, with a bar that tells the time left."""
        mine = [b for b in range(self.settings.blocks) if b % self.world == self.rank]
        # Processes start at different cases, so that they choose placements for different ones first.
        offset = self.rank * len(self.cases) // self.world
        order = self.cases[offset:] + self.cases[:offset]
        with tqdm(total=self._work(mine), unit="eval", unit_scale=True, disable=not progress, smoothing=0.05) as bar:
            bar.set_description("converged")
            way = self._solution(bar)
            for block in mine:
                self._converged_block(block, bar)
            self._finish(CONVERGED, self.solutions.program(self._steps), way, None)
            for case in order:
                bar.set_description(case.name)
                program, tried = self._chosen(case, bar)
                for block in mine:
                    self._block(case, program, block, bar)
                self._finish(case.name, program, way, case, tried, bar)

    def _work(self, mine: list[int]) -> int:
        """Evaluations of samples that are left to this process."""
        done = {(r["case"], r.get("block")) for r in self.results.all() if r["kind"] in ("block", "screen", "case")}
        s, work = self.settings, 0
        for block in mine:
            work += 0 if (CONVERGED, block) in done else s.steps * s.size
        if not any(r["kind"] == "solution" for r in self.results.all()):
            work += 4 * s.steps * s.probe
        for case in self.cases:
            if (case.name, None) not in done and len(case.programs) > 1:
                work += len(case.programs) * case.nfe * min(s.screen, s.samples)
            work += sum(case.nfe * s.size for b in mine if (case.name, b) not in done)
            if (case.name, None) not in done:
                work += 2 * case.nfe * s.probe
        return work

    # -- the converged solution ------------------------------------------------------------------------------------------

    def _labels(self, seeds: Sequence[int]) -> list[int] | None:
        n = self.denoiser.num_classes
        return [s % n for s in seeds] if n else None

    def _probe(self) -> range:
        first = self.settings.first_seed
        return range(first, first + min(self.settings.probe, self.settings.samples))

    def _solution(self, bar: Any) -> Trajectory:
        """How many steps are converged, checked on the probe; and the probe's trajectories."""
        probe = self._probe()
        labels = self._labels(probe)
        found = next((r for r in self.results.all() if r["kind"] == "solution"), None)
        if found is None:
            check = self.solutions.check(probe, labels, steps=self.settings.steps, bound=self.settings.bound)
            self._steps = check.steps
            way = self.solutions.trajectory(probe, labels, steps=check.steps)
            self.results.append(
                {
                    "kind": "solution",
                    **asdict(check),
                    **planes(way),
                    **self._floor(),
                    "pictures": len(probe[:PICTURES]),
                }
            )
            bar.update(4 * self.settings.steps * len(probe))
            return way
        self._steps = int(found["steps"])
        return self.solutions.trajectory(probe, labels, steps=self._steps)

    def _floor(self) -> dict[str, Any]:
        if self.reference is None or "frechet" not in self.metrics:
            return {}
        return {"frechet_floor": floor(self.reference.statistics, self.settings.samples)}

    def _true(self, block: int) -> Tensor:
        if block not in self._truth:
            seeds = self.settings.seeds(block)
            self._truth[block] = self.solutions.solve(seeds, self._labels(seeds), steps=self._steps).float()
        return self._truth[block]

    def _converged_block(self, block: int, bar: Any) -> None:
        if self._has("block", CONVERGED, block):
            return
        samples = self._true(block)
        self.results.append(
            {
                "kind": "block",
                "case": CONVERGED,
                "block": block,
                "count": len(samples),
                **self._of_set(CONVERGED, block, samples),
            }
        )
        bar.update(self.settings.steps * len(samples))

    # -- one case --------------------------------------------------------------------------------------------------------

    def _chosen(self, case: Case, bar: Any) -> tuple[Program, dict[str, Any]]:
        """The placement of levels with the least error on the screening samples; the usual one for solvers that draw noise."""
        if len(case.programs) == 1 or case.programs[0].draws:
            return case.programs[0], {}
        found = self._screened(case.name)
        if found is None:
            count = min(self.settings.screen, self.settings.samples)
            seeds = self.settings.seeds()[:count]
            truth = self.solutions.solve(seeds, self._labels(seeds), steps=self._steps)
            errors: dict[str, float | None] = {}
            for i, program in enumerate(case.programs):
                name = _grid_name(program, i, case)
                try:
                    made, _ = self._draw(program, seeds, min(count, self.batch))
                    errors[name] = float((made - truth).double().square().mean().sqrt())
                except NonFiniteError:
                    errors[name] = None
                bar.update(case.nfe * count)
            known = {k: v for k, v in errors.items() if v is not None}
            best = min(known, key=lambda k: known[k]) if known else next(iter(errors))
            record = {"kind": "screen", "case": case.name, "chosen": best, "rmse": errors}
            if self.world > 1:
                found = self._screened(case.name)  # another process may have been faster: its choice holds
            found = found or self.results.append(record)
        names = [_grid_name(program, i, case) for i, program in enumerate(case.programs)]
        if found["chosen"] not in names:
            raise ValueError(
                f"out: {self.out} chose levels {found['chosen']!r} for {case.name}, which are not tried now "
                f"({', '.join(names)})"
            )
        return case.programs[names.index(found["chosen"])], found["rmse"]

    def _screened(self, name: str) -> Record | None:
        return next((r for r in self.results.all() if r["kind"] == "screen" and r["case"] == name), None)

    def _block(self, case: Case, program: Program, block: int, bar: Any) -> None:
        if self._has("block", case.name, block):
            return
        seeds = self.settings.seeds(block)
        record: Record = {
            "kind": "block",
            "case": case.name,
            "block": block,
            "count": len(seeds),
            "grid": program.grid.name,
        }
        try:
            samples, seconds = self._draw(program, seeds, self.batch)
        except NonFiniteError as error:
            record |= {"failed": str(error)}
        else:
            record |= {"seconds": seconds, **self._of_set(case.name, block, samples)}
            if not program.draws:
                truth = self._true(block)
                record["mse"] = float((samples - truth).double().square().mean())
                flat, true = samples.double().flatten(1), truth.double().flatten(1)
                record["cosine"] = float(torch.nn.functional.cosine_similarity(flat, true).mean())
        self.results.append(record)
        bar.update(case.nfe * len(seeds))

    def _draw(self, program: Program, seeds: Sequence[int], batch: int) -> tuple[Tensor, float]:
        """Samples of ``seeds`` on the CPU, and the seconds they took."""
        engine = self._engine_of(program, batch)
        parts, rows = [], list(seeds)
        _wait(engine)
        started = time.perf_counter()
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            filled = part + [part[-1]] * (batch - len(part))
            made = engine(seeds=filled, class_labels=self._labels(filled), guidance_scale=self.settings.guidance_scale)
            parts.append(made[: len(part)].cpu())
        _wait(engine)
        seconds = time.perf_counter() - started
        samples = torch.cat(parts).float()
        if not bool(torch.isfinite(samples).all()):  # on a GPU the engine does not look
            raise NonFiniteError(f"{program.name}: the samples have NaN or Inf")
        return samples, seconds

    def _engine_of(self, program: Program, batch: int) -> Engine:
        """One engine for all blocks of a case."""
        if self._engine is None or self._engine.program is not program or self._engine.shape[0] != batch:
            if self._engine is not None:
                self._engine.close()
            guided = self.settings.guidance_scale is not None
            self._engine = Engine(program, self.denoiser, (batch, *self.shape), self.backend, guidance=guided)
        return self._engine

    def _of_set(self, name: str, block: int, samples: Tensor) -> dict[str, Any]:
        """Class accuracy; the features go to a file beside the results until the case is complete."""
        if self.extract is None or not any(m in self.metrics for m in (*SETS, "accuracy")):
            return {}
        features = self.extract(samples)
        path = self._feature_file(name, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, {"features": features})
        if "accuracy" not in self.metrics:
            return {}
        wanted = torch.tensor(self._labels(self.settings.seeds(block)))
        return {"accuracy": float((self.extract.read(features) == wanted).double().mean())}

    def _finish(
        self, name: str, program: Program, way: Trajectory, case: Case | None, tried: Any = None, bar: Any = None
    ) -> None:
        """The case's figures, once all blocks are there."""
        records = self.results.all()
        if any(r["kind"] == "case" and r["case"] == name for r in records):
            return
        found = {r["block"]: r for r in records if r["kind"] == "block" and r["case"] == name}
        if len(found) < self.settings.blocks:
            return  # another process will
        blocks = [found[b] for b in range(self.settings.blocks)]
        grids = {b.get("grid") for b in blocks}
        if len(grids) > 1:
            raise ValueError(
                f"out: blocks of {name} were made on different levels ({', '.join(map(str, grids))}); start afresh"
            )
        record: Record = {
            "kind": "case",
            "case": name,
            "label": case.label if case is not None else CONVERGED,
            "nfe": program.nfe,
            "solver": program.name,
            "options": {k: v for k, v in program.options.items() if isinstance(v, (str, int, float, bool))},
            "grid": program.grid.name,
            "sigmas": [float(f"{s:.8g}") for s in program.grid.sigmas.tolist()],
            "stochastic": bool(program.draws),
        }
        failed = next((b["failed"] for b in blocks if "failed" in b), None)
        if failed is not None:
            record["failed"] = failed
        else:
            try:
                features = [self._features(name, b) for b in range(self.settings.blocks)]
            except FileNotFoundError:
                if any(r["kind"] == "case" and r["case"] == name for r in self.results.all()):
                    return  # another process finished it meanwhile
                raise
            kept = [f for f in features if f is not None]
            record |= pooled(blocks, kept, self.metrics, self.reference, self.manifold)
            if case is not None:
                times = sorted(b["seconds"] / b["count"] for b in blocks)
                record["seconds_per_image"] = times[len(times) // 2]
                record |= self._memory(program)
                record |= self._looked_at(program, way)
            else:
                record["picture"] = picture(way.at(program.grid[-1])[:PICTURES])
        if tried:
            record["tried"] = tried
        self.results.append(record)
        for block in range(self.settings.blocks):
            self._feature_file(name, block).unlink(missing_ok=True)
        if bar is not None:
            bar.update(2 * program.nfe * len(self._probe()))

    def _looked_at(self, program: Program, way: Trajectory) -> dict[str, Any]:
        """From the probe: local errors, the samples as pictures, and where the trajectories lie in their principal planes."""
        probe = self._probe()
        labels = self._labels(probe)
        scale = self.settings.guidance_scale
        engine = Engine(program, self.denoiser, (len(probe), *self.shape), self.backend, guidance=scale is not None)
        result = engine(seeds=probe, class_labels=labels, guidance_scale=scale, return_trajectory=True)
        found: dict[str, Any] = {"picture": picture(result.samples[:PICTURES].cpu())}
        engine.close()
        if program.draws:
            return found
        device = self.denoiser.device or torch.device("cpu")

        def denoise(x: Tensor, stage: Any) -> Tensor:
            return _denoise(self.denoiser, x.to(device), stage.level, labels, scale).cpu()

        if "truncation" in self.metrics:
            errors = local_errors(program, denoise, way)
            if errors is not None:
                found["truncation"] = errors
        found["trajectories"] = projected(way, program, [s.cpu() for s in result.states])
        return found

    def _memory(self, program: Program) -> dict[str, Any]:
        """Buffers of the sampler for one image beside the network's own memory, and the peak of the process."""
        engine = Engine(
            program, self.denoiser, (1, *self.shape), self.backend, guidance=self.settings.guidance_scale is not None
        )
        numbers = int(np.prod(self.shape))
        width = torch.finfo(engine.net_dtype).bits // 8
        state = (engine.slots + 1) * numbers * 4 + 2 * numbers * width  # slots and result; network input and output
        if engine.device.type == "cuda":
            return {"state_bytes": state, "peak_bytes": int(torch.cuda.max_memory_allocated(engine.device))}
        import resource

        return {"state_bytes": state, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    # -- files -----------------------------------------------------------------------------------------------------------

    def _has(self, kind: str, case: str, block: int) -> bool:
        return any(r["kind"] == kind and r["case"] == case and r["block"] == block for r in self.results.all())

    def _feature_file(self, name: str, block: int) -> Path:
        slug = "".join(c if c.isalnum() or c in "@=,_." else "_" for c in name)
        return self.out.with_suffix(".features") / f"{slug}-{block}.safetensors"

    def _features(self, name: str, block: int) -> Tensor | None:
        if self.extract is None or not any(m in self.metrics for m in SETS):
            return None
        return load_file(self._feature_file(name, block))["features"]


def _grid_name(program: Program, index: int, case: Case) -> str:
    """Its name, numbered where two placements share one."""
    names = [p.grid.name for p in case.programs]
    same = names[:index].count(program.grid.name)
    return program.grid.name + (f" ({same + 1})" if same else "")


def _wait(engine: Engine) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
