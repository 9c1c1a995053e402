"""Predictors of the official AMED code (``amed-solver-main`` of diff-sampler) as artifacts. Their pickles are read as data:
nothing in them is run, see :mod:`fastode.interop.unpickle`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastode.artifact import Artifact
from fastode.interop.unpickle import Object, load_pickle
from fastode.nets.predictor import AMEDPredictor, to_numbers
from fastode.schedules import EDM, Discrete, NoiseSchedule, karras, log_snr, time_uniform

LAYERS = {"enc_layer0": "hidden", "enc_layer1": "feature", "map_layer0": "noise"}
HEADS = ("fc_r", "fc_scale_dir", "fc_scale_time")
STUDENTS = {"amed": "amed", "euler": "ddim", "dpm": "dpm_solver_2", "ipndm": "ipndm", "dpmpp": "dpm_solver_pp"}


def schedule_of(dataset: str | None) -> NoiseSchedule | None:
    """The noise schedule of the networks that the official code loads for ``dataset``, where the name settles it."""
    if dataset in ("cifar10", "ffhq", "afhqv2", "imagenet64", "lsun_bedroom", "lsun_cat"):
        return EDM(0.002, 80.0)
    if dataset == "ms_coco":
        return Discrete.scaled_linear(interpolation="log_alpha")
    if dataset == "lsun_bedroom_ldm":
        return Discrete.scaled_linear(0.0015, 0.0195, interpolation="log_alpha")
    return None


def load(path: str | os.PathLike[str], *, schedule: NoiseSchedule | None = None) -> Artifact:
    """The artifact that plays an official predictor: student, grid, analytical first step and orders are in the file.

    ``schedule``: of the network, where its data set does not settle it. DPM-Solver++ of data predictions clips them
    dynamically in the official code; here that belongs to the denoiser (``transforms``), and the card says so. Raises
    ``FileNotFoundError``, ``ValueError`` for anything that is not such a predictor, and
    :class:`~fastode.interop.unpickle.UnsafePickle` for a pickle that would run something.
    """
    found = load_pickle(path)
    model = found.get("model") if isinstance(found, dict) else found
    if not isinstance(model, Object) or model.class_name.rpartition(".")[2] != "AMED_predictor":
        held = getattr(model, "class_name", type(model).__name__)
        raise ValueError(f"predictor: {Path(path).name} holds no AMED_predictor but {held}")
    state = model.state
    try:
        student = str(state["sampler_stu"])
        steps, afs = int(state["num_steps"]) - 1, bool(state["afs"])
        scale_dir, scale_time = float(state.get("scale_dir") or 0), float(state.get("scale_time") or 0)
        base = STUDENTS[student]
        made = schedule or schedule_of(state.get("dataset_name"))
        if made is None:
            raise ValueError(f"schedule: {state.get('dataset_name')!r} does not settle it; give the network's schedule")
        grid = _grid(made, steps, str(state["schedule_type"]), float(state["schedule_rho"]))
        predictor = _predictor(model.tensors(), scale_dir, scale_time)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"predictor: {Path(path).name} is not complete ({' '.join(str(error).split())})") from error
    options: dict[str, Any] = {"afs": afs}
    order = state.get("max_order")
    if base == "ipndm":
        options["order"] = int(order or 4)
    if base == "dpm_solver_pp":
        data = bool(state.get("predict_x0", True))
        options |= {
            "order": int(order or 3),
            "prediction": "x0" if data else "eps",
            "lower_order_final": bool(state.get("lower_order_final", True)),
        }
    guided = state.get("guidance_type") == "cfg"
    card = {
        "source": Path(path).name,
        "teacher": {"solver": state.get("sampler_tea"), "intermediate": state.get("M")},
        "predictor": "features",
        "loss": "steps",
        "scale_dir": scale_dir,
        "scale_time": scale_time,
    }
    if options.get("prediction") == "x0":
        card["transforms"] = "the official code clips every data prediction dynamically (0.995)"
    model_card = {
        "name": state.get("dataset_name"),
        "guidance_scale": float(state["guidance_rate"]) if guided and state.get("guidance_rate") else None,
    }
    return Artifact("amed", base, grid, to_numbers(predictor), options, model_card, card)


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Path:
    """:func:`load`, written as ``out``.safetensors."""
    path = Path(out)
    path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
    artifact = load(source, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact.save(path)
    return path


def _grid(schedule: NoiseSchedule, steps: int, kind: str, rho: float) -> Any:
    if kind == "polynomial":
        return karras(schedule, steps, rho=rho)
    if kind == "logsnr":
        return log_snr(schedule, steps)
    if kind == "time_uniform" or (kind == "discrete" and rho == 1):
        return time_uniform(schedule, steps, power=rho)
    raise ValueError(f"schedule_type: {kind!r} with rho {rho:g} is not known")


def _predictor(tensors: dict[str, Tensor], scale_dir: float, scale_time: float) -> AMEDPredictor:
    """The official layers under our names; their heads are separate, ours is one layer with a row for each."""
    hidden, inputs = tensors["enc_layer0.weight"].shape
    width, channels = tensors["enc_layer1.weight"].shape[0], tensors["map_layer0.weight"].shape[0]
    made = AMEDPredictor(
        inputs, hidden=hidden, width=width, noise_channels=channels, scale_dir=scale_dir, scale_time=scale_time
    )
    kept = [HEADS[0], *(h for h, scale in zip(HEADS[1:], (scale_dir, scale_time), strict=True) if scale)]
    numbers = made.state_dict()
    for kind in ("weight", "bias"):
        numbers |= {f"{ours}.{kind}": tensors[f"{theirs}.{kind}"].float() for theirs, ours in LAYERS.items()}
        numbers[f"head.{kind}"] = torch.cat([tensors[f"{head}.{kind}"].float() for head in kept])
    made.load_state_dict(numbers)
    return made.eval().requires_grad_(False)
