"""What a call of the network costs in each runtime, and five-evaluation sampling through it: ``python -m benchmarks.runtimes``.

The bundled model at a few batch sizes. All runtimes of one batch size are taken in turns, so they see the same load; each must
give the eager samples, or nothing is timed. "whole sampler" is one exported file against the engine: five evaluations, from the
state on. Runtimes that cannot run here are named with the reason. ``--smoke`` uses a tiny network and leaves out what takes
minutes to build.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastode
from benchmarks.registry import RESULTS, alternate, report, significant, store, summary, table
from fastode import SOLVERS, Denoiser, Engine, runtimes
from fastode.nets.unet import build
from fastode.runtimes.base import MissingError
from fastode.schedules import EDM, log_snr

SOLVER, NFE = "unipc", 5
BATCHES = (1, 8)
TOLERANCE = 1e-3  # relative, of samples in float32: errors of a call, some 1e-6, grow through five evaluations


def tiny() -> Denoiser:
    net = build(resolution=8, num_classes=3, channels=(8, 8), blocks=1, attention=(), embedding=16).eval()
    for p in net.parameters():  # its last layers start at zero
        torch.nn.init.normal_(p, std=0.1)
    return Denoiser(net.requires_grad_(False), num_classes=3, null_label=3, sample_shape=(1, 8, 8), name="tiny")


def built(denoiser: Denoiser, name: str, batch: int, folder: Path) -> Denoiser:
    options: dict[str, Any] = {} if name == "eager" else {"batches": (batch,)}
    if name in ("aoti", "onnx", "tensorrt"):
        options["path"] = folder / f"{name}{batch}"
    if name == "torch_tensorrt":
        options["cache"] = folder / "engines"
    return runtimes.build(denoiser, name, **options)


def measure(
    seconds: float = 2.0,
    *,
    batches: Sequence[int] = BATCHES,
    names: Sequence[str] = runtimes.NAMES,
    denoiser: Denoiser | None = None,
    device: str = "cpu",
    least: int = 5,
) -> dict[str, Any]:
    """``seconds`` for the calls of each batch size, and as much for the sampling."""
    model = denoiser or fastode.load("mnist", device=device)
    wait: Callable[[], None] | None = torch.cuda.synchronize if device == "cuda" else None
    rows, absent = [], dict[str, str]()
    with tempfile.TemporaryDirectory() as temporary:
        for batch in batches:
            made: dict[str, Denoiser] = {}
            for name in names:
                try:
                    made[name] = built(model, name, batch, Path(temporary))
                except MissingError as error:
                    absent[name] = str(error)
            rows += _calls(made, batch, seconds, wait, least)
            rows += _sampling(model, made, batch, seconds, wait, least, Path(temporary))
    result = report("runtimes", "us_median", rows, [])
    result["absent"] = absent
    return result


def _calls(
    made: dict[str, Denoiser], batch: int, seconds: float, wait: Callable[[], None] | None, least: int
) -> list[dict[str, Any]]:
    first = next(iter(made.values()))
    device = first.device or torch.device("cpu")
    assert first.sample_shape is not None and first.num_classes
    x = torch.randn(batch, *first.sample_shape).to(device)
    c_noise = torch.linspace(-1, 1, batch).to(device)
    labels = (torch.arange(batch) % first.num_classes).to(device)

    def call(network: Any) -> Callable[[], Any]:
        return lambda: network(x, c_noise, class_labels=labels)

    with torch.no_grad():
        times = alternate([call(d.network) for d in made.values()], seconds, wait=wait, least=least)
    rows = []
    for (name, d), taken in zip(made.items(), times, strict=True):
        card = d.network.card  # type: ignore[attr-defined]
        us = summary(taken, 1e6)
        rows.append(
            {
                "id": f"call {name} {batch}", "what": "call", "runtime": name, "batch": batch, "us": us,
                "us_median": us["median"], "error": max(card.error.values(), default=0.0),
                "provider": card.versions.get("provider"),
                "times_faster": significant(summary(times[0])["median"] / summary(taken)["median"]),
            }
        )  # fmt: skip
    return rows


def _sampling(
    model: Denoiser,
    made: dict[str, Denoiser],
    batch: int,
    seconds: float,
    wait: Callable[[], None] | None,
    least: int,
    folder: Path,
) -> list[dict[str, Any]]:
    assert model.sample_shape is not None and model.num_classes
    device = model.device or torch.device("cpu")
    grid = log_snr(EDM(), NFE)
    program = SOLVERS[SOLVER](grid)
    shape = (batch, *model.sample_shape)
    x = torch.randn(shape).to(device) * float(grid.sigma[0])
    labels = (torch.arange(batch) % model.num_classes).to(device)
    runs: dict[str, Callable[[], Tensor]] = {}
    for name, d in made.items():
        engine = Engine(program, d, shape, device=device)
        engine.warmup(x=x, class_labels=labels)
        runs[name] = lambda engine=engine: engine(x, class_labels=labels)  # type: ignore[misc]
    for suffix in (".pt2", ".onnx"):
        if suffix == ".onnx" and runtimes.onnx_missing() is not None:
            continue
        sampler = runtimes.export_sampler(folder / f"sampler{batch}{suffix}", program, model, batch=batch)
        runs[f"whole sampler {suffix}"] = lambda s=sampler: s(x, class_labels=labels)  # type: ignore[misc]
    wanted = runs["eager"]()
    errors = {name: float((run() - wanted).abs().max() / wanted.abs().max()) for name, run in runs.items()}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise AssertionError(f"not the eager samples, so nothing is timed: {wrong}")
    times = alternate(list(runs.values()), seconds, wait=wait, least=least)
    rows = []
    for (name, _), taken in zip(runs.items(), times, strict=True):
        us = summary(taken, 1e6)
        rows.append(
            {
                "id": f"{NFE} evaluations {name} {batch}", "what": f"{NFE} evaluations", "runtime": name, "batch": batch,
                "us": us, "us_median": us["median"], "error": significant(errors[name]), "solver": SOLVER,
                "times_faster": significant(summary(times[0])["median"] / summary(taken)["median"]),
            }
        )  # fmt: skip
    return rows


def show(result: dict[str, Any]) -> str:
    columns = ("what", "runtime", "batch", "ms", "times faster than eager", "from eager")
    rows = [
        (r["what"], r["runtime"], r["batch"], r["us_median"] / 1e3, r["times_faster"], r["error"])
        for r in result["rows"]
    ]
    text = table(columns, rows)
    return text + "".join(f"\n\nnot here: {name} ({why})" for name, why in result["absent"].items())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="per batch size and kind")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS / "runtimes.json")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny network; eager, and ONNX where installed; not stored"
    )
    args = parser.parse_args(argv)
    if args.smoke:
        names = ["eager", "tensorrt"] + ([] if runtimes.onnx_missing() else ["onnx"])
        print(show(measure(0.0, batches=(2,), names=names, denoiser=tiny(), least=2)))
        return
    result = measure(args.seconds, batches=args.batches, device=args.device)
    store(result, args.out)
    print(show(result))


if __name__ == "__main__":
    main()
