"""A whole five-step sampler, network and solver, as one file that needs neither fastode nor the model to run.

    python examples/export_sampler.py --out five.onnx
    python examples/export_sampler.py --out five.pt2 --model run/model.safetensors --solver dpm_solver_pp --batch 16

Inputs of the file: ``x``, the state at the first level (its sigma times unit noise), and ``class_labels``. What it was made
of is in its metadata. Anything that runs ONNX runs it::

    session = onnxruntime.InferenceSession("five.onnx")
    card = json.loads(session.get_modelmeta().custom_metadata_map["fastode"])
    x = card["sigma"] * numpy.random.randn(card["batch"], *card["sample_shape"]).astype("float32")
    images = session.run(None, {"x": x, "class_labels": labels})[0]
"""

import argparse
from pathlib import Path

import fastode
from fastode import runtimes
from fastode.api import grid_maker


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("five.onnx"), help="ends in .onnx or .pt2")
    parser.add_argument("--model", default="mnist", help="bundled name, or a weights file with its card")
    parser.add_argument("--solver", default="unipc", choices=list(fastode.SOLVERS))
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--guidance", type=float, help="strength of guidance; it becomes a constant of the file")
    args = parser.parse_args(argv)
    denoiser = fastode.load(args.model)
    solver = fastode.SOLVERS[args.solver]
    grid, options = solver.plan(args.nfe, grid_maker(solver, denoiser.schedule))
    program = solver(grid, **options)
    runtimes.export_sampler(args.out, program, denoiser, batch=args.batch, guidance_scale=args.guidance)

    sampler = runtimes.load_sampler(args.out)  # as anyone would, from the file alone
    call = {"seeds": range(args.batch)}
    if denoiser.num_classes:
        call["class_labels"] = [k % denoiser.num_classes for k in range(args.batch)]
    wanted = fastode.sample(denoiser, **call, solver=args.solver, grid=grid, guidance_scale=args.guidance, **options)
    error = float((sampler(**call) - wanted).abs().max() / wanted.abs().max())
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.1f} MB, {args.solver}, {program.nfe} evaluations, from the engine {error:.1e}")
    return error


if __name__ == "__main__":
    main()
