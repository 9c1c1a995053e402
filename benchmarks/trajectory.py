"""Samples in five evaluations by DPM-Solver++(2M): ``python -m benchmarks.trajectory``.

The engine's whole call against the loop of the diffusers pipelines (``EDMDPMSolverMultistepScheduler`` on the same levels
with the same network, ``set_timesteps`` not counted) and against nothing but the five calls of the network, taken in
turns; and AMED-Solver in five evaluations where the network offers a feature map. In float32 engine and pipeline must give
the same sample, or nothing is timed. On a GPU also as one CUDA graph, against five replays of the network recorded as a
graph; there the network is in bfloat16 unless asked otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.networks import NETWORKS, make
from benchmarks.registry import (
    BATCHES,
    alternate,
    report,
    significant,
    summary,
    table,
    table_of_targets,
    target,
)
from fastode import SOLVERS, Denoiser, Engine
from fastode.denoisers import Condition
from fastode.nets.predictor import AMEDPredictor
from fastode.nets.unet import parameter_count
from fastode.program import Program
from fastode.schedules import EDM, karras, time_uniform

NFE = 5


class Pipeline:
    """The loop of the pipelines over the raw network. The state has the network's dtype, as theirs has."""

    def __init__(self, diffusers: ModuleType, denoiser: Denoiser, labels: Tensor, device: str) -> None:
        self.scheduler = diffusers.EDMDPMSolverMultistepScheduler(
            sigma_data=denoiser.sigma_data, solver_order=2, lower_order_final=False, final_sigmas_type="zero"
        )
        self.denoiser, self.labels, self.device = denoiser, labels, device
        self.network: Callable[..., Tensor] = denoiser.network
        self.reset()

    def reset(self) -> None:
        self.scheduler.set_timesteps(NFE, device=self.device)

    def run(self, x: Tensor) -> Tensor:
        s, b = self.scheduler, x.shape[0]
        for t in s.timesteps:
            x_in = s.scale_model_input(x, t)
            x = s.step(self.network(x_in, t.to(x.dtype).expand(b), class_labels=self.labels), t, x, return_dict=False)[
                0
            ]
        return x


def program_of() -> Program:
    """The same levels: Karras sigmas from 80 to 0.002, then 0, with a first-order step to 0."""
    return SOLVERS["dpm_solver_pp"](karras(EDM(), NFE, final="zero"), order=2, lower_order_final=False)


def amed_of(denoiser: Denoiser, shape: tuple[int, ...]) -> Program | None:
    """AMED-Solver in five evaluations with the predictor that looks at the network's feature map, or None where there is
    none. Untrained: what it costs does not depend on its numbers."""
    if not denoiser.features:
        return None
    x = torch.zeros((1, *shape[1:]), device=denoiser.device)
    _, made = denoiser.raw_and_features(
        x.to(denoiser.dtype or x.dtype), denoiser.c_noise(0.0, x), Condition(), None, ("bottleneck",)
    )
    torch.manual_seed(0)
    predictor = AMEDPredictor(made["bottleneck"][0, 0].numel(), scale_time=0.1).requires_grad_(False)
    return SOLVERS["amed"](time_uniform(EDM(), 3), afs=True, predictor=predictor.to(denoiser.device))


def recorded(call: Callable[[], Tensor]) -> Callable[[], Any]:
    """``call`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def one(
    diffusers: ModuleType | None,
    denoiser: Denoiser,
    batch: int,
    seconds: float,
    *,
    device: str = "cpu",
    least: int = 5,
) -> dict[str, Any]:
    assert denoiser.sample_shape is not None
    shape = (batch, *denoiser.sample_shape)
    dtype = denoiser.dtype or torch.float32
    labels = (torch.arange(batch) % 10).to(device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    x, levels = noise * 80.0, torch.linspace(1, -1, NFE, device=device).to(dtype)
    program = program_of()
    engine = Engine(program, denoiser, shape, graph=False)
    given = {"class_labels": labels}
    net_in = noise.to(dtype)

    def network(level: Tensor) -> Tensor:
        return denoiser.network(net_in, level.expand(batch), class_labels=labels)

    def bare() -> None:
        for level in levels:
            network(level)

    runs: dict[str, Callable[[], Any]] = {"engine": lambda: engine(x, **given), "network": bare}
    before: dict[str, Callable[[], None]] = {}
    with torch.no_grad():
        learned = amed_of(denoiser, shape)
        if learned is not None:
            amed = Engine(learned, denoiser, shape, graph=False)
            runs["amed"] = lambda: amed(x, **given)
        if diffusers is not None:
            peer = Pipeline(diffusers, denoiser, labels, device)
            theirs = x.to(dtype)
            if dtype == torch.float32:
                agree(engine(x, **given), peer.run(x))
            runs["diffusers"], before["diffusers"] = lambda: peer.run(theirs), peer.reset
        if device == "cuda":
            captured = Engine(program, denoiser, shape, graph=True)
            out = torch.empty(shape, device=device)
            captured.warmup(x=x, out=out, **given)
            runs["captured"] = lambda: captured(x, out=out, **given)
            if learned is not None:
                captured_amed = Engine(learned, denoiser, shape, graph=True)
                captured_amed.warmup(x=x, out=out, **given)
                runs["captured_amed"] = lambda: captured_amed(x, out=out, **given)
            one_call = recorded(lambda: network(levels[0]))

            def replays() -> None:
                for _ in range(NFE):
                    one_call()

            runs["network_replayed"] = replays
        wait = torch.cuda.synchronize if device == "cuda" else None
        times = alternate(list(runs.values()), seconds, before=[before.get(n) for n in runs], wait=wait, least=least)
    ms = {name: summary(taken, 1e3) for name, taken in zip(runs, times, strict=True)}
    row: dict[str, Any] = {
        "id": f"{denoiser.name} batch {batch} {str(dtype)[6:]}",
        "network": denoiser.name,
        "parameters": parameter_count(denoiser.network),  # type: ignore[arg-type]
        "batch": batch,
        "dtype": str(dtype)[6:],
        "device": device,
        "ms": ms,
        "engine_ms": ms["engine"]["median"],
        "ratios": {},
        "ratios_of_best": {},
    }
    ours = [n for n in ("engine", "captured") if n in ms]
    for a in ours:
        for b in ("network", "network_replayed", "diffusers"):
            if b in ms:
                row["ratios"][f"{a} / {b}"] = significant(ms[a]["median"] / ms[b]["median"])
                row["ratios_of_best"][f"{a} / {b}"] = significant(ms[a]["best"] / ms[b]["best"])
    for a, b in (("amed", "engine"), ("captured_amed", "captured")):
        if a in ms:
            row["ratios"][f"{a} / {b}"] = significant(ms[a]["median"] / ms[b]["median"])
            row["ratios_of_best"][f"{a} / {b}"] = significant(ms[a]["best"] / ms[b]["best"])
    if device == "cuda":
        row["engine_ms"] = ms["captured"]["median"]
        row["report"] = captured.report()
        captured.close()
    engine.close()
    return row


def agree(ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference < 1e-3:  # float32 through five network calls
        raise AssertionError(f"the samples differ by {difference:.1e}: nothing is timed")


def measure(
    seconds: float = 4.0,
    *,
    device: str = "cpu",
    networks: Sequence[str] | None = None,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[torch.dtype] = (),
    least: int = 5,
) -> dict[str, Any]:
    """``seconds`` for every row; more where five repeats take longer."""
    diffusers = peers.module("diffusers")
    names = networks or [n.name for n in NETWORKS if device == "cuda" or not n.gpu_only]
    rows = []
    for name in names:
        for dtype in dtypes or ((torch.bfloat16,) if device == "cuda" else (torch.float32,)):
            denoiser = make(name, device).to(dtype)
            rows += [one(diffusers, denoiser, b, seconds, device=device, least=least) for b in batches]
    return report("trajectory", "engine_ms", rows, targets(rows))


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        pair = "captured_amed / captured" if row["device"] == "cuda" else "amed / engine"
        if row["network"] == "mnist" and pair in row["ratios"]:
            name = f"{row['id']}: AMED over DPM-Solver++(2M), {NFE} evaluations each"
            found.append(target(name, row["ratios"][pair], 1.03, at_most=True))
        if row["network"] != "mnist" or row["device"] != "cuda" or row["dtype"] == "float32":
            continue
        ratios = row["ratios"]
        if row["batch"] in (1, 64):
            name = f"{row['id']}: captured sample over five replayed network calls"
            found.append(target(name, ratios["captured / network_replayed"], 1.02, at_most=True))
        if row["batch"] == 1 and "captured / diffusers" in ratios:
            name = f"{row['id']}: diffusers' time over the captured sample"
            found.append(target(name, 1 / ratios["captured / diffusers"], 3, at_most=False))
    return found


def show(result: dict[str, Any]) -> str:
    names = [
        n
        for n in ("captured", "captured_amed", "engine", "amed", "network", "network_replayed", "diffusers")
        if _any(result, n)
    ]
    pairs = sorted({pair for r in result["rows"] for pair in r["ratios"]})
    columns = ("network", "dtype", "batch", *(f"{n}, ms" for n in names), *pairs)
    rows = [
        (
            f"{r['network']} ({r['parameters'] / 1e6:.3g}M)", r["dtype"], r["batch"],
            *(r["ms"].get(n, {}).get("median") for n in names), *(r["ratios"].get(p) for p in pairs),
        )
        for r in result["rows"]
    ]  # fmt: skip
    return table(columns, rows) + ("\n\n" + table_of_targets(result["targets"]) if result["targets"] else "")


def _any(result: dict[str, Any], name: str) -> bool:
    return any(name in r["ms"] for r in result["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="+", choices=[n.name for n in NETWORKS])
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=4.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(show(measure(args.seconds, device=args.device, networks=args.networks, batches=args.batches)))


if __name__ == "__main__":
    main()
