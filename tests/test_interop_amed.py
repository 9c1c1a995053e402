"""Official AMED predictors: their pickles become artifacts that give the official numbers, and nothing in them runs."""

import pickle
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import fastode
from fastode import Artifact
from fastode.interop.amed import convert, load, schedule_of
from fastode.interop.unpickle import UnsafePickle
from fastode.nets.predictor import from_numbers
from fastode.schedules import EDM, Discrete, karras, log_snr, time_uniform
from tests.pickles import Persistent, attacks, persistence

SETTINGS = {
    "num_steps": 4, "sampler_stu": "ipndm", "sampler_tea": "ipndm", "M": 2, "schedule_type": "polynomial",
    "schedule_rho": 7, "afs": True, "max_order": 4, "dataset_name": "cifar10", "guidance_type": None, "guidance_rate": 0.0,
    "predict_x0": True, "lower_order_final": True, "scale_dir": 0.01, "scale_time": 0.2,
}  # fmt: skip


def official(path, seed=0, wrapped=True, **changes):
    """A predictor as the official training writes it: {"model": a persistent module of persistent linear layers}."""
    settings = {**SETTINGS, **changes}
    g = torch.Generator().manual_seed(seed)
    shapes = {"map_layer0": (8, 8), "enc_layer0": (128, 64), "enc_layer1": (4, 128), "fc_r": (1, 20)}
    shapes |= {f"fc_{name}": (1, 20) for name in ("scale_dir", "scale_time") if settings[name]}
    weights = {
        name: (torch.randn(s, generator=g) / s[1] ** 0.5, torch.randn(s[0], generator=g)) for name, s in shapes.items()
    }
    with persistence() as make:

        def module(name, parameters, modules, **attributes):
            state = {"training": True, "_parameters": OrderedDict(parameters), "_buffers": OrderedDict()}
            return Persistent(make, name, {**state, "_modules": OrderedDict(modules), **attributes})

        layers = {
            name: module("Linear", {"weight": nn.Parameter(w), "bias": nn.Parameter(b)}, {})
            for name, (w, b) in weights.items()
        }
        whole = module("AMED_predictor", {}, {"map_noise": module("PositionalEmbedding", {}, {}), **layers}, **settings)
        path.write_bytes(pickle.dumps({"model": whole, "loss_fn": None} if wrapped else whole))
    return {name: (w.double().numpy(), b.double().numpy()) for name, (w, b) in weights.items()}


def formula(weights, feature, t, tn, settings):
    """The official forward pass, from the card: cosines and sines swapped, heads r, c, a."""

    def linear(x, name):
        return x @ weights[name][0].T + weights[name][1]

    def silu(z):
        return z / (1 + np.exp(-z))

    f = (1 / 10000) ** (np.arange(4) / 3)
    times = [silu(linear(np.concatenate([np.sin(u * f), np.cos(u * f)]), "map_layer0")) for u in (t, tn)]
    p = linear(silu(linear(feature.reshape(len(feature), -1), "enc_layer0")), "enc_layer1")
    z = np.concatenate([p, np.tile(np.concatenate(times), (len(p), 1))], 1)

    def head(name, scale):
        s = 1 / (1 + np.exp(-linear(z, name)[:, 0]))
        return s if scale is None else 1 - scale + 2 * scale * s

    scales = {"fc_r": None, "fc_scale_dir": settings["scale_dir"], "fc_scale_time": settings["scale_time"]}
    return [head(name, scale) for name, scale in scales.items() if scale is None or scale]


@pytest.mark.parametrize("scales", [(0, 0), (0.01, 0), (0, 0.2), (0.01, 0.2)])
def test_numbers(tmp_path, scales):
    settings = {"scale_dir": scales[0], "scale_time": scales[1]}
    weights = official(tmp_path / "p.pkl", **settings)
    predictor = from_numbers(load(tmp_path / "p.pkl").numbers)
    feature = torch.randn(3, 5, 8, 8)
    made = predictor.look(0, 6.95, 1.2867)(feature)
    expected = formula(weights, feature.double().mean(1).numpy(), 6.95, 1.2867, settings)
    assert len(made) == len(expected)
    for got, want in zip(made, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)  # float32


@pytest.mark.parametrize(
    ("changes", "solver", "grid", "options"),
    [
        ({}, "ipndm", karras(EDM(), 3), {"afs": True, "order": 4}),
        ({"sampler_stu": "amed", "schedule_type": "time_uniform", "schedule_rho": 1, "num_steps": 6, "afs": False}, "amed",
         time_uniform(EDM(), 5), {"afs": False}),
        ({"sampler_stu": "euler", "schedule_rho": 5}, "ddim", karras(EDM(), 3, rho=5), {"afs": True}),
        ({"sampler_stu": "dpm", "schedule_type": "logsnr"}, "dpm_solver_2", log_snr(EDM(), 3), {"afs": True}),
        ({"sampler_stu": "dpmpp", "schedule_type": "logsnr", "max_order": 3}, "dpm_solver_pp", log_snr(EDM(), 3),
         {"afs": True, "order": 3, "prediction": "x0", "lower_order_final": True}),
        ({"sampler_stu": "dpmpp", "schedule_type": "discrete", "schedule_rho": 1, "dataset_name": "ms_coco", "max_order": 2,
          "predict_x0": False, "guidance_type": "cfg", "guidance_rate": 7.5}, "dpm_solver_pp",
         time_uniform(Discrete.scaled_linear(interpolation="log_alpha"), 3),
         {"afs": True, "order": 2, "prediction": "eps", "lower_order_final": True}),
    ],
)  # fmt: skip
def test_settings(tmp_path, changes, solver, grid, options):
    official(tmp_path / "p.pkl", **changes)
    out = convert(tmp_path / "p.pkl", tmp_path / "made")
    artifact = Artifact.load(out)
    assert out.name == "made.safetensors" and sorted(p.name for p in tmp_path.iterdir()) == [
        "made.safetensors",
        "p.pkl",
    ]
    assert (artifact.solver, artifact.options) == (solver, options)
    assert torch.allclose(artifact.grid.sigmas, grid.sigmas, rtol=1e-12, atol=0)
    assert artifact.nfe == 2 * grid.steps - options["afs"]
    assert artifact.model["guidance_scale"] == (7.5 if "guidance_rate" in changes else None)
    assert artifact.card["teacher"] == {"solver": "ipndm", "intermediate": 2}


def test_published_ranges():
    """sigma_min and sigma_max of the networks, as the card lists them."""
    for name, low, high in (
        ("cifar10", 0.002, 80),
        ("ms_coco", 0.02917, 14.6146),
        ("lsun_bedroom_ldm", 0.03876, 83.82),
    ):
        schedule = schedule_of(name)
        assert (schedule.sigma_min, schedule.sigma_max) == pytest.approx((low, high), rel=2e-4)


def test_play(tmp_path):
    """A converted predictor drives samples of a network that offers a feature of its size, and of no other."""
    official(tmp_path / "p.pkl", wrapped=False)

    def network(side):
        def f(x, sigma, features=False):
            raw = x / (1 + sigma**2)
            return (raw, {"bottleneck": torch.ones(len(x), 2, side, side)}) if features else raw

        return fastode.Denoiser(f, "denoised", EDM(), sample_shape=(3, 4, 4))

    images = fastode.sample(network(8), seeds=range(2), solver=load(tmp_path / "p.pkl"))
    assert images.shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="feature: the predictor was trained on 64 pooled numbers"):
        fastode.sample(network(4), seeds=range(2), solver=load(tmp_path / "p.pkl"))
    plain = fastode.Denoiser(lambda x, sigma: x / (1 + sigma**2), "denoised", EDM(), sample_shape=(3, 4, 4))
    with pytest.raises(ValueError, match=r"does not offer .* train one without features"):
        fastode.sample(plain, seeds=range(2), solver=load(tmp_path / "p.pkl"))


def test_bad_files(tmp_path):
    path = tmp_path / "p.pkl"
    with pytest.raises(FileNotFoundError, match=r"p\.pkl does not exist"):
        load(path)
    for changes, message in (
        ({"dataset_name": "imagenet256"}, "schedule: 'imagenet256' does not settle it"),
        ({"sampler_stu": "heun"}, "is not complete"),
        ({"schedule_type": "cosine"}, "schedule_type: 'cosine'"),
    ):
        official(path, **changes)
        with pytest.raises(ValueError, match=message):
            load(path)
    official(path, dataset_name="imagenet256")
    assert load(path, schedule=EDM(0.01, 150.0)).grid.sigmas[0] == 150
    path.write_bytes(pickle.dumps({"model": {"a": 1}}))
    with pytest.raises(ValueError, match="holds no AMED_predictor but dict"):
        load(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="pickle"):
        load(path)


def test_payloads_are_refused_and_nothing_runs(tmp_path):
    """As the whole file, and hidden where a weight should be. Python's own reader does run them."""
    marker = tmp_path / "ran"
    for name, (raw, message) in attacks(str(marker)).items():
        path = tmp_path / "p.pkl"
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"pickle|refused|not") as caught:
            convert(path, tmp_path / "out")
        assert re.search(message, str(caught.value)), name
        assert not marker.exists() and not (tmp_path / "out.safetensors").exists(), name

    class Payload:
        def __reduce__(self):
            return (__import__("os").system, (f"touch {marker}",))

    with persistence() as make:
        state = {
            "_modules": OrderedDict(),
            "_parameters": OrderedDict(x=Payload()),
            "_buffers": OrderedDict(),
            **SETTINGS,
        }
        raw = pickle.dumps({"model": Persistent(make, "AMED_predictor", state)})
    (tmp_path / "p.pkl").write_bytes(raw)
    with pytest.raises(UnsafePickle, match=r"posix\.system"):
        load(tmp_path / "p.pkl")
    assert not marker.exists()
