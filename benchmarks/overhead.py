"""Host time per evaluation with a network that costs nothing: ``python -m benchmarks.overhead``.

Every solver of ``SOLVERS`` at three sizes of the state, beside the diffusers scheduler that is the same method on the same
levels (both must give the same sample, or nothing is timed). Runs of 20 evaluations are taken in turns, and the ratio is
that of the medians. Ours is the whole call ``engine(x)`` with all its checks divided by its evaluations; theirs is the loop
of the pipelines alone, without ``set_timesteps``. An evaluation is what diffusers calls a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.registry import (
    CASES,
    EVALUATIONS,
    LARGE,
    SMALL,
    STATES,
    Case,
    Fixed,
    alternate,
    report,
    significant,
    summary,
    table,
    table_of_targets,
    target,
)
from fastode import SOLVERS, Denoiser, Engine, Grid
from fastode.api import grid_maker
from fastode.schedules import EDM

TOLERANCE = 1e-4  # relative, of two float32 computations in different orders (docs/peers.md)


def usual_grid(case: Case, evaluations: int) -> Grid:
    """For solvers without a peer: their own usual grid."""
    solver = SOLVERS[case.solver]
    make = grid_maker(solver, EDM())
    for nfe in range(evaluations, 0, -1):
        try:
            return solver.plan(nfe, make, afs=False, **case.options)[0]
        except ValueError:
            continue
    raise ValueError(f"case: {case.name} fits no grid of up to {evaluations} evaluations")


def measure_one(
    diffusers: ModuleType | None,
    case: Case,
    shape: Sequence[int],
    seconds: float,
    *,
    evaluations: int = EVALUATIONS,
    device: str = "cpu",
    wait: Callable[[], None] | None = None,
    least: int = 5,
) -> dict[str, Any]:
    network = Fixed(shape, device)
    peer = None
    if diffusers is not None and case.scheduler is not None:
        try:
            peer = peers.Scheduler(diffusers, case, evaluations, device)
        except ImportError as error:
            print(f"{case.scheduler} is left out: {str(error).strip()}", file=sys.stderr)
    grid = usual_grid(case, evaluations) if peer is None else peer.grid(case.every)
    denoiser = Denoiser(network, prediction="edm" if peer is None else "eps")
    engine = Engine(SOLVERS[case.solver](grid, **case.options), denoiser, shape, device=device)
    x = torch.randn(tuple(shape)).to(device) * float(grid.sigma[0])
    runs: list[Callable[[], Tensor]] = [lambda: engine(x)]
    before: list[Callable[[], None] | None] = [None]
    if peer is not None:
        scheduler = peer
        check(engine(x), scheduler.run(network, x), case)
        runs.append(lambda: scheduler.run(network, x))
        before.append(scheduler.reset)
    engine.warmup(x=x)
    with torch.no_grad():
        times = alternate(runs, seconds, before=before, wait=wait, least=least)
    row: dict[str, Any] = {
        "id": f"{case.name} {list(shape)}" + (f" {case.scheduler}" if peer is not None else ""),
        "solver": case.name,
        "shape": list(shape),
        "evaluations": engine.nfe,
        "backend": engine.backend,
        "us": summary(times[0], 1e6 / engine.nfe),
        "scheduler": None,
        "ratio": None,
    }
    row["us_median"] = row["us"]["median"]
    if peer is not None:
        row["scheduler"] = case.scheduler
        row["diffusers_us"] = summary(times[1], 1e6 / len(peer.scheduler.timesteps))
        row["ratio"] = significant(row["us_median"] / row["diffusers_us"]["median"])
    engine.close()
    return row


def check(ours: Tensor, theirs: Tensor, case: Case) -> None:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < TOLERANCE:
        raise AssertionError(f"{case.name} and {case.scheduler} disagree by {difference:.1e}: nothing is timed")


def k_diffusion_row(k: ModuleType, shape: Sequence[int], seconds: float) -> dict[str, Any]:
    """``sample_dpmpp_2m`` on the levels of our usual grid."""
    case = Case("dpm_solver_pp", {"order": 2, "lower_order_final": False})
    levels = usual_grid(case, EVALUATIONS)
    grid = Grid(sigma=torch.cat([levels.sigmas[:-1], torch.zeros(1, dtype=torch.float64)]))
    network = Fixed(shape)
    engine = Engine(SOLVERS[case.solver](grid, **case.options), lambda x, sigma: network.output, shape)
    x, sigmas = torch.randn(tuple(shape)) * float(grid.sigma[0]), grid.sigmas.float()

    def theirs() -> Tensor:
        return k.sampling.sample_dpmpp_2m(lambda x, sigma: network.output, x, sigmas, disable=True)

    check(engine(x), theirs(), case)
    times = alternate([lambda: engine(x), theirs], seconds)
    us, their_us = (summary(t, 1e6 / engine.nfe) for t in times)
    return {
        "id": f"{case.name} {list(shape)} k_diffusion", "solver": case.name, "shape": list(shape),
        "evaluations": engine.nfe, "backend": engine.backend, "us": us, "us_median": us["median"],
        "scheduler": "k_diffusion.sample_dpmpp_2m", "diffusers_us": their_us,
        "ratio": significant(us["median"] / their_us["median"]),
    }  # fmt: skip


def measure(
    seconds: float = 1.0, shapes: Sequence[Sequence[int]] = STATES, cases: Sequence[Case] = CASES
) -> dict[str, Any]:
    """``seconds`` for every row."""
    diffusers, k = peers.module("diffusers"), peers.module("k_diffusion")
    rows = []
    for shape in shapes:
        rows += [measure_one(diffusers, case, shape, seconds) for case in cases]
        if k is not None:
            rows.append(k_diffusion_row(k, shape, seconds))
    short = [measure_one(diffusers, c, SMALL, seconds, evaluations=5) for c in cases[:1]]
    for row in short:
        row["id"] += " 5 evaluations"
    return report("overhead", "us_median", rows + short, targets(rows))


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the project, where their rows were measured."""
    found = []

    def rows_of(solver: str, shape: Sequence[int]) -> list[dict[str, Any]]:
        return [r for r in rows if r["solver"].startswith(solver) and r["shape"] == list(shape) and r["ratio"]]

    for solver, scheduler, part in (("dpm_solver_pp,order=2", "DPMSolver++(2M)", 15), ("unipc", "UniPC", 40)):
        for row in rows_of(solver, SMALL):
            if "k_diffusion" not in row["scheduler"]:
                name = f"{scheduler} ({row['solver']}), 4 elements: our time of diffusers'"
                found.append(target(name, row["ratio"], 1 / part, at_most=True))
    small = [r for r in rows if r["shape"] == list(SMALL)]
    if small:
        slowest = max(small, key=lambda r: r["us_median"])
        name = f"slowest solver ({slowest['solver']}), 4 elements: us per evaluation"
        found.append(target(name, slowest["us_median"], 12, at_most=True))
    for row in rows_of("dpm_solver_pp,order=2", LARGE):
        name = f"DPMSolver++(2M), {row['shape']}: diffusers' time of ours"
        found.append(target(name, 1 / row["ratio"], 4, at_most=False))
    large = [r for r in rows if r["shape"] == list(LARGE) and r["ratio"]]
    if large:
        worst = max(large, key=lambda r: r["ratio"])
        name = f"worst solver ({worst['solver']}, {worst['scheduler']}), {worst['shape']}: diffusers' time of ours"
        found.append(target(name, 1 / worst["ratio"], 4, at_most=False))
    return found


def show(result: dict[str, Any]) -> str:
    columns = ("solver", "peer", "state", "us per evaluation", "peer us", "ours / peer", "times faster")
    rows = []
    for r in result["rows"]:
        theirs = r.get("diffusers_us", {}).get("median")
        times = 1 / r["ratio"] if r["ratio"] else None
        name = f"{r['solver']} ({r['evaluations']} evaluations)" if r["id"].endswith(" evaluations") else r["solver"]
        rows.append((name, r["scheduler"], _size(r["shape"]), r["us_median"], theirs, r["ratio"], times))
    return table(columns, rows) + "\n\n" + table_of_targets(result["targets"])


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    args = parser.parse_args()
    print(show(measure(args.seconds)))


if __name__ == "__main__":
    main()
