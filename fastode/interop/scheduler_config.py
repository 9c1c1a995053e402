"""What a diffusers scheduler's config says about the network it was made for: prediction, noise schedule, flow shift.

How to step, the rest of the config, is a solver's business here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fastode.schedules.noise import EDM, VE, Discrete, Flow, NoiseSchedule

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
"""diffusers' ``prediction_type`` -> prediction."""

FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


def meaning(
    config: Mapping[str, Any], *, prediction: str | None = None, tokens: int | None = None
) -> tuple[str, NoiseSchedule, float]:
    """(prediction, schedule, sigma_data) of the network that goes with a scheduler's config.

    ``prediction``: what the caller says it is, to be checked against the config. ``tokens``: length of the image's sequence,
    on which Flux's flow shift depends (``use_dynamic_shifting``).

    Raises ``ValueError`` where the config contradicts ``prediction`` or itself, or where it is of an unknown kind.
    """
    name = str(config.get("_class_name", "scheduler"))
    flow = name in FLOW_CLASSES or bool(config.get("use_flow_sigmas"))
    default = "flow_prediction" if name in FLOW_CLASSES else "epsilon"
    kind = config.get("prediction_type", default)
    if kind not in PREDICTION_TYPES:
        raise ValueError(
            f"scheduler: prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r} in {name}"
        )
    found = PREDICTION_TYPES[kind]
    if flow != (found == "flow"):
        raise ValueError(
            f"scheduler: {name} has prediction_type {kind!r}, which contradicts "
            + ("its flow sigmas" if flow else "its table of betas (use_flow_sigmas is off)")
        )
    if name in EDM_CLASSES:
        if found != "eps":
            raise ValueError(f"scheduler: {name} with prediction_type {kind!r} is not supported, only 'epsilon'")
        found = "edm"
    if name == "ScoreSdeVeScheduler":
        found = "score"
    if prediction is not None and prediction != found:
        raise ValueError(f"prediction: the config of {name} says {kind!r}, which is {found!r} here, got {prediction!r}")
    if flow:
        return found, flow_schedule(config, tokens), 0.5
    if name in EDM_CLASSES:
        sigma_data = float(config.get("sigma_data", 0.5))
        return found, EDM(float(config.get("sigma_min", 0.002)), float(config.get("sigma_max", 80.0))), sigma_data
    if name == "ScoreSdeVeScheduler":
        return found, VE(float(config.get("sigma_min", 0.01)), float(config.get("sigma_max", 1348.0))), 0.5
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(
            f"scheduler: {name} has neither betas nor flow sigmas; how its network was trained is not known"
        )
    return found, beta_table(config, found), 0.5


def beta_table(config: Mapping[str, Any], prediction: str) -> Discrete:
    """The DDPM table of a config: ``trained_betas``, or ``beta_schedule`` from ``beta_start`` to ``beta_end``; zero-SNR."""
    name = str(config.get("_class_name", "scheduler"))
    steps, kind = int(config.get("num_train_timesteps", 1000)), str(config.get("beta_schedule", "linear"))
    low, high = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    zero = bool(config.get("rescale_betas_zero_snr"))
    if zero and prediction == "eps":
        raise ValueError(
            f"scheduler: {name} has rescale_betas_zero_snr and prediction_type 'epsilon', which contradict each other: "
            "pure noise says nothing about the image (arXiv:2305.08891)"
        )
    if config.get("trained_betas") is not None:
        return Discrete.from_betas([float(b) for b in config["trained_betas"]], zero_terminal_snr=zero)
    if kind == "linear":
        return Discrete.linear(low, high, steps, zero_terminal_snr=zero)
    if kind == "scaled_linear":
        return Discrete.scaled_linear(low, high, steps, zero_terminal_snr=zero)
    if kind == "squaredcos_cap_v2":
        return Discrete.squared_cosine(steps, zero_terminal_snr=zero)
    if kind == "sigmoid":
        betas = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64)) * (high - low) + low
        return Discrete.from_betas(betas, zero_terminal_snr=zero)
    raise ValueError(
        f"scheduler: beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {kind!r} in {name}"
    )


def flow_schedule(config: Mapping[str, Any], tokens: int | None) -> Flow:
    """The flow of a config with its shift: constant, or growing with the length of the image's sequence."""
    name = str(config.get("_class_name", "scheduler"))
    if config.get("invert_sigmas"):
        raise ValueError(f"scheduler: {name} has invert_sigmas, flows from data to noise are not supported")
    scale = float(config.get("num_train_timesteps", 1000))
    if not config.get("use_dynamic_shifting"):
        return Flow(float(config.get("shift", config.get("flow_shift", 1.0)) or 1.0), label_scale=scale)
    if tokens is None:
        raise ValueError(
            f"sample_shape: the flow shift of {name} depends on it (use_dynamic_shifting); give sample_shape"
        )
    few, many = int(config.get("base_image_seq_len", 256)), int(config.get("max_image_seq_len", 4096))
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    mu = low + (high - low) * (tokens - few) / (many - few)
    linear = config.get("time_shift_type", "exponential") == "linear"
    return Flow(mu if linear else math.exp(mu), label_scale=scale)
