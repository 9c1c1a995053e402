"""A diffusers pipeline on another solver: swap the scheduler, or replace the whole loop.

python examples/swap_scheduler.py                                  # a tiny random DDPM, made on the spot
python examples/swap_scheduler.py --model google/ddpm-cifar10-32 --solver unipc --steps 8 --out out/
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel

import fastode


def tiny() -> DDPMPipeline:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)
    return DDPMPipeline(unet.eval(), DPMSolverMultistepScheduler())


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a DDPM pipeline's folder or name; a tiny random one without")
    parser.add_argument("--solver", default="unipc", choices=list(fastode.SOLVERS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a folder for the images")
    args = parser.parse_args(argv)
    pipe = tiny() if args.model is None else DDPMPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)

    # One line: the levels, the labels and the frame stay those of the pipeline's own scheduler.
    config = pipe.scheduler
    pipe.scheduler = fastode.FastODEScheduler.from_config(config, solver=args.solver)
    swapped = pipe(
        batch_size=2, num_inference_steps=args.steps, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    print(f"{args.solver}: {len(pipe.scheduler.timesteps)} evaluations at {pipe.scheduler.timesteps.tolist()}")

    # The same without the pipeline's loop: nothing but the network between two updates.
    fast = fastode.accelerate(pipe, steps=args.steps)
    images = fast(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    difference = float(abs(images - swapped).max())
    print(f"accelerate: {fast.nfe} evaluations, largest difference {difference:.1e}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(pipe.numpy_to_pil(images)):
            image.save(args.out / f"{i}.png")
    return difference


if __name__ == "__main__":
    main()
