"""Learn where to evaluate: AMED for a diffusers U-Net, as a file of a few kilobytes.

python examples/train_amed.py --out out/amed.safetensors          # a tiny random DDPM, made on the spot
python examples/train_amed.py --model google/ddpm-cifar10-32 --nfe 5 --samples 256 --out amed.safetensors
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import fastode
from fastode.learn.methods import trainer
from fastode.learn.teacher import Teacher, held_out_seeds


def tiny() -> DDPMPipeline:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    return DDPMPipeline(unet.eval(), DDPMScheduler())


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a DDPM pipeline's folder or name; a tiny random one without")
    parser.add_argument("--solver", default="amed", help="amed, or the solver that AMED plugs into")
    parser.add_argument("--nfe", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32, help="trajectories to learn from")
    parser.add_argument("--images", type=int, default=None, help="trajectories seen in all")
    parser.add_argument("--features", action="store_true", help="look at the bottleneck, as published; else a table")
    parser.add_argument("--out", type=Path, default=Path("out/amed.safetensors"))
    args = parser.parse_args(argv)
    pipe = tiny() if args.model is None else DDPMPipeline.from_pretrained(args.model)

    # The network as it is; its schedule and what it predicts are read from the pipeline's scheduler.
    model = fastode.Denoiser.from_diffusers(pipe)
    teacher = Teacher(model, batch=min(args.samples, 64))  # exact trajectories, made once
    artifact = trainer("amed")(
        model,
        solver=args.solver,
        nfe=args.nfe,
        samples=args.samples,
        images=args.images,
        predictor="features" if args.features else "table",
        teacher=teacher,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    artifact.save(args.out)

    # The file is all that is needed beside the model. It refuses any other.
    images = fastode.sample(model, seeds=range(4), solver=args.out)
    seeds = held_out_seeds(args.samples)
    before = fastode.SOLVERS["dpm_solver_pp"]
    grid, options = before.plan(args.nfe, fastode.api.grid_maker(before, model.schedule))
    learned, plain = (teacher.error(p, seeds).rmse for p in (artifact.program(), before(grid, **options)))
    print(f"{artifact.nfe} evaluations, {tuple(images.shape)}: error {learned:.4f}, DPM-Solver++ {plain:.4f}")
    print(f"wrote {args.out} ({args.out.stat().st_size:,} bytes)")
    return learned, plain


if __name__ == "__main__":
    main()
