"""Other people's checkpoints as denoisers: D is what their own preconditioning makes of the network, written out here."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

import fastode
from fastode.cli import main
from fastode.denoisers import Denoiser
from fastode.interop import adm, edm, score_sde
from fastode.interop.unpickle import UnsafePickle
from fastode.models import load, load_foreign, save
from fastode.schedules import EDM, VE, Discrete, SubVP, VPLinear, karras
from fastode.schedules.noise import schedule_from_dict, schedule_to_dict
from tests.conftest import relative
from tests.network_cases import CASES, build
from tests.pickles import Calls, edm_pickle

SIGMAS = (0.01, 0.7, 60.0)


def data(sigma):
    """x [2, 3, 16, 16] at noise level sigma."""
    g = torch.Generator().manual_seed(3)
    return 0.5 * torch.randn(2, 3, 16, 16, generator=g) + sigma * torch.randn(2, 3, 16, 16, generator=g)


def official_d(kind, network, x, sigma, labels=None):
    """EDM's Table 1 (arXiv:2206.00364), in float64 on the host."""
    c_skip, c_out, c_in = 1.0, -sigma, 1 / math.sqrt(sigma**2 + 1)
    if kind == "EDMPrecond":
        total = sigma**2 + 0.5**2
        c_skip, c_out, c_in, c_noise = (
            0.25 / total,
            sigma * 0.5 / math.sqrt(total),
            1 / math.sqrt(total),
            math.log(sigma) / 4,
        )
    elif kind == "VPPrecond":
        c_noise = 999 * (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9
    elif kind == "VEPrecond":
        c_out, c_in, c_noise = sigma, 1.0, math.log(sigma / 2)
    else:
        u = [0.0]
        for j in range(1000, 0, -1):
            bar = [math.sin(0.5 * math.pi * i / (1000 * 1.008)) ** 2 for i in (j - 1, j)]
            u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(bar[0] / bar[1], 0.001) - 1))
        c_noise = 999 - min(range(1001), key=lambda i: abs(u[i] - sigma))
    raw = network((c_in * x), torch.full((len(x),), float(c_noise)), labels)
    return c_skip * x + c_out * raw


PRECONDS = [
    ("EDMPrecond", "dhariwal"), ("EDMPrecond", "ddpmpp"), ("VPPrecond", "ddpmpp"), ("VEPrecond", "ncsnpp residual"),
    ("VEPrecond", "ncsnpp skip"), ("iDDPMPrecond", "dhariwal, two outputs"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), PRECONDS)
def test_edm_pickles(tmp_path, kind, case):
    """1e-5: float32 networks, told c_noise to 24 bits."""
    network = build(case)
    d = edm.load(edm_pickle(tmp_path / f"edm-{kind}.pkl", network, kind))
    classes = network.config.label_dim
    assert (d.name, d.sample_shape, d.num_classes, d.null_label) == (f"edm-{kind}", (3, 16, 16), classes, None)
    labels = torch.tensor([3, 1]) if classes else None
    for sigma in SIGMAS:
        x = data(sigma)
        expected = official_d(kind, network, x, sigma, labels)
        assert relative(d(x, sigma, class_labels=labels), expected) < 1e-5, sigma
    x = data(80.0)
    samples = fastode.sample(d, x, solver="dpm_solver_pp", grid=karras(EDM(0.02, 80), 3), class_labels=labels)
    assert samples.shape == x.shape
    expected = fastode.sample(
        lambda y, s: official_d(kind, network, y, float(s), labels),
        x,
        solver="dpm_solver_pp",
        grid=karras(EDM(0.02, 80), 3),
    )
    assert relative(samples, expected) < 1e-4  # three steps of 1e-5


def test_edm_label_dropout_makes_guidance_possible(tmp_path):
    network = build("ddpmpp")
    object.__setattr__(network.config, "label_dropout", 0.1)
    d = edm.load(edm_pickle(tmp_path / "a.pkl", network))
    assert d.null_label == 5
    x = data(80.0)
    guided = fastode.sample(d, x, nfe=3, class_labels=[3, 1], guidance_scale=2.0)
    plain = fastode.sample(d, x, nfe=3, class_labels=[3, 1])
    assert relative(guided, plain) > 1e-3


def test_edm_bad_pickles(tmp_path):
    network = build("ddpmpp")
    path = tmp_path / "a.pkl"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        edm.load(path)
    edm_pickle(path, network)
    with pytest.raises(ValueError, match="has no 'net', it has ema, loss_fn, dataset_kwargs"):
        edm.load(path, key="net")
    with pytest.raises(ValueError, match="holds a EDMLoss; known are EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond"):
        edm.load(path, key="loss_fn")
    edm_pickle(path, network, model_type="DhariwalUNet")
    with pytest.raises(ValueError, match="made with 'channel_mult_noise', an argument that DhariwalUNet has not"):
        edm.load(path)
    edm_pickle(path, network, model_type="UViT")
    with pytest.raises(ValueError, match="network of class 'UViT'; known are SongUNet, DhariwalUNet"):
        edm.load(path)
    edm_pickle(path, network, model_channels=32)
    with pytest.raises(
        ValueError, match=r"weights: a has map_label\.weight of shape \[16, 5\], the network needs \[32, 5\]"
    ):
        edm.load(path)
    edm_pickle(path, network, num_blocks=2)
    with pytest.raises(
        ValueError, match=r"lacks \d+ tensors \(enc\.16x16_block1\.norm0\.weight, .*, which the network needs"
    ):
        edm.load(path)
    for wrong in ({"img_resolution": "x"}, {"num_blocks": None}, {"sigma_data": [1]}):
        edm_pickle(path, network, **wrong)
        with pytest.raises(ValueError, match="pickle: a was made with arguments that are not EDM's"):
            edm.load(path)
    network.extra = nn.Linear(2, 2)
    edm_pickle(path, network)
    with pytest.raises(ValueError, match=r"has 2 tensors \(extra\.weight, extra\.bias\), which belong nowhere"):
        edm.load(path)
    edm_pickle(path, build("ddpmpp"), sigma_min=Calls(eval, "1"))
    with pytest.raises(UnsafePickle, match=r"asks for builtins\.eval"):
        edm.load(path)


# -- guided diffusion, Consistency Models ------------------------------------------------------------------------------------

ADM_OPTIONS = {
    "adm": {"num_head_channels": 16, "noise_schedule": "cosine"},
    "adm, new attention": {"num_heads": 2, "new_attention_order": True, "noise_schedule": "linear"},
    "adm, plain": {"num_heads": 2, "noise_schedule": "linear"},
    "consistency": {"num_head_channels": 16},
}


@pytest.mark.parametrize("case", list(ADM_OPTIONS))
def test_adm_checkpoints(tmp_path, case):
    network, options = build(case), ADM_OPTIONS[case]
    tensors = network.state_dict()
    if case == "consistency":  # its attention has two-dimensional convolutions
        tensors = {
            k: v[..., None] if k.endswith((".qkv.weight", ".proj_out.weight")) else v for k, v in tensors.items()
        }
    torch.save(tensors, tmp_path / "a.pt")
    d = adm.load(tmp_path / "a.pt", image_size=16, **options)
    assert d.network.config == type(network.config)(
        **{**vars(network.config), "dropout": 0.0, "num_heads": d.network.config.num_heads}
    )
    labels = torch.tensor([3, 1]) if case == "adm" else None
    if case == "consistency":
        x = data(2.0)
        total = 2.0**2 + 0.25
        told = torch.full(
            (2,), 250 * math.log(2.0)
        )  # rescaled_t of Consistency Models; the network is told a quarter of ln sigma
        raw = network(x / math.sqrt(total), told / 1000)
        assert relative(d(x, 2.0), 0.25 / total * x + 2 * 0.5 / math.sqrt(total) * raw) < 1e-5
        assert isinstance(d.schedule, EDM)
    else:
        for t in (0, 300, 999):
            bar = guided_alphas_bar(options["noise_schedule"])[t]
            rho = math.sqrt((1 - bar) / bar)
            x = data(rho)  # in the EDM frame; x_t = sqrt(bar) x
            eps = network(math.sqrt(bar) * x, torch.full((2,), float(t)), labels)
            assert relative(d(x, rho, class_labels=labels), x - rho * eps) < 1e-5, t
    samples = fastode.sample(d, seeds=range(2), solver="ddim", nfe=3, class_labels=labels)
    assert samples.shape == (2, 3, 16, 16)


def guided_alphas_bar(kind):
    """Guided diffusion's betas, in plain numbers."""
    if kind == "linear":
        betas = [0.0001 + (0.02 - 0.0001) * i / 999 for i in range(1000)]
    else:
        bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
        betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)]
    product, out = 1.0, []
    for beta in betas:
        product *= 1 - beta
        out.append(product)
    return out


def test_adm_presets_are_the_published_ones():
    """Files by name need no option: the architecture is read off the tensors."""
    for name, preset in adm.PRESETS.items():
        heads = {"num_head_channels", "num_heads"} & set(preset)
        assert (
            "image_size" in preset and len(heads) == 1 and ("noise_schedule" in preset) == (not name.startswith("edm"))
        ), name


def test_adm_architecture_of_a_published_size():
    """Guided diffusion's 256 x 256 network by its flags, on meta tensors: 553,838,086 parameters, attention at 32, 16, 8."""
    from fastode.nets.adm import ADMConfig, ADMUNet

    config = ADMConfig(256, 3, 6, 256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32), 1000, num_head_channels=64)
    with torch.device("meta"):
        tensors = ADMUNet(config).state_dict()
    assert sum(v.numel() for v in tensors.values()) == 553_838_086
    read = adm.read_architecture(tensors, "x")
    assert read == {k: v for k, v in vars(config).items() if k in read}
    half = ADMConfig(512, 3, 6, 64, (0.5, 1, 1, 2, 2, 4, 4), 2, (16, 32, 64), 1000, num_head_channels=64)
    with torch.device("meta"):
        assert adm.read_architecture(ADMUNet(half).state_dict(), "x")["channel_mult"] == (0.5, 1, 1, 2, 2, 4, 4)


def test_adm_bad_input(tmp_path):
    tensors = build("adm, plain").state_dict()
    good = {"image_size": 16, "num_heads": 2, "noise_schedule": "linear"}
    for change, message in (
        ({"image_size": None}, "image_size: a does not say"),
        ({"num_heads": None}, "num_head_channels: a does not say; give num_head_channels or num_heads"),
        ({"num_head_channels": 8}, "give num_head_channels or num_heads"),
        ({"noise_schedule": None}, "noise_schedule: must be linear or cosine, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            adm.of(tensors, name="a", **{**good, **change})
    four = {k: v[..., None] if k.endswith(".qkv.weight") else v for k, v in tensors.items()}
    with pytest.raises(ValueError, match="noise_schedule: must be left out for EDM networks"):
        adm.of(four, name="a", **good)
    with pytest.raises(ValueError, match="not a state dict of guided diffusion's UNetModel"):
        adm.of({"a": torch.zeros(1)}, name="a", **good)
    with pytest.raises(ValueError, match=r"weights: a lacks 1 tensors \(out\.0\.bias\)"):
        adm.of({k: v for k, v in tensors.items() if k != "out.0.bias"}, name="a", **good)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="option: adm has none of that name"):
        load_foreign("adm", tmp_path / "a.pt", size=3)
    torch.save({"state": tensors}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="expected a state dict of tensors by name, got a dict with state"):
        adm.load(tmp_path / "b.pt")


# -- score-SDE -----------------------------------------------------------------------------------------------------------


def sde_checkpoint(path, case):
    """As score-SDE saves one: names with "module.", averages as a list, the last weights wrong."""
    network = build(case)
    model = {f"module.{k}": v for k, v in network.state_dict().items()}
    frequencies = [k for k in model if k == "module.all_modules.0.W"]
    shadows = [v for k, v in model.items() if k not in frequencies]
    last = {k: v if k in frequencies else v + 1 for k, v in model.items()}
    last = {"module.sigmas": torch.ones(1000), **last}
    torch.save(
        {
            "optimizer": {},
            "model": last,
            "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadows},
            "step": 3,
        },
        path,
    )
    return network


@pytest.mark.parametrize(
    ("case", "sde", "continuous"),
    [
        ("score-sde ddpmpp", "vp", True), ("score-sde ddpmpp", "vp", False), ("score-sde ddpmpp", "subvp", True),
        ("score-sde ncsnpp", "ve", True), ("score-sde skip", "ve", True), ("score-sde ddpmpp", "ve", False),
    ],
)  # fmt: skip
def test_score_sde_checkpoints(tmp_path, case, sde, continuous):
    """Tweedie's formula with score-SDE's score: -F / std for VP and sub-VP; for VE F(2 x - 1) / sigma, images in [0, 1]."""
    network = sde_checkpoint(tmp_path / "a.pth", case)
    training = score_sde.Training(network.config, sde, continuous)
    d = score_sde.load(tmp_path / "a.pth", config=training)
    kinds = {"vp": VPLinear if continuous else Discrete, "subvp": SubVP, "ve": VE}
    assert isinstance(d.schedule, kinds[sde]) and d.prediction == ("score" if sde == "ve" else "eps")
    for i in (0, 400, 900):
        t = (i + 1) / 1000
        if sde == "ve":
            sigma = 0.01 * (50 / 0.01) ** t if continuous else 0.01 * (50 / 0.01) ** (i / 999)
            z = (data(2 * sigma) + 1) / 2  # in [0, 1] plus noise of sigma
            told = math.log(sigma) if continuous else 999.0 - i
            score = network(2 * z - 1, torch.full((2,), told)) / sigma
            expected = 2 * (z + sigma**2 * score) - 1
            assert relative(d(2 * z - 1, 2 * sigma), expected) < 1e-5, i
            continue
        if continuous:
            alpha = math.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1)
            std, told = (1 - alpha**2 if sde == "subvp" else math.sqrt(1 - alpha**2)), 999 * t
        else:
            alpha = math.sqrt(math.prod(1 - (0.1 + 19.9 * k / 999) / 1000 for k in range(i + 1)))
            std, told = math.sqrt(1 - alpha**2), float(i)
        x = alpha * data(std / alpha)
        score = -network(x, torch.full((2,), told)) / std
        assert relative(d(x / alpha, std / alpha), (x + std**2 * score) / alpha) < 1e-5, i
    assert fastode.sample(d, seeds=range(2), solver="ddim", nfe=3).shape == (2, 3, 16, 16)
    last = score_sde.load(tmp_path / "a.pth", config=training, ema=False)
    assert relative(last(data(1.0), 1.0), d(data(1.0), 1.0)) > 1e-2


def test_score_sde_bad_input(tmp_path):
    network = sde_checkpoint(tmp_path / "a.pth", "score-sde ddpmpp")
    with pytest.raises(ValueError, match=r"config: a\.pth does not say; give one of vp/cifar10_ddpmpp_continuous"):
        score_sde.load(tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match="got 'cifar10_ddpmpp_continuous'; did you mean 'vp/cifar10_ddpmpp_continuous'"
    ):
        score_sde.load(tmp_path / "a.pth", config="cifar10_ddpmpp_continuous")
    with pytest.raises(ValueError, match=r"weights: a has .* averages for .*|weights: a lacks"):
        score_sde.load(tmp_path / "a.pth", config="vp/cifar10_ddpmpp_continuous")
    with pytest.raises(ValueError, match="not a checkpoint of score-SDE, a dict with model and ema"):
        score_sde.of({"model": {}}, score_sde.Training(network.config, "vp"))
    with pytest.raises(ValueError, match="a has 1 averages for 2 trained tensors"):
        score_sde.averaged({"a": torch.ones(1), "b": torch.ones(1)}, {"shadow_params": [torch.ones(1)]}, "a")
    with pytest.raises(ValueError, match="not in the order of its parameters, see b"):
        score_sde.averaged({"b": torch.ones(2)}, {"shadow_params": [torch.ones(1)]}, "a")


def test_score_sde_configs_are_the_published_ones():
    """Some 62 million parameters in DDPM++ and NCSN++ of CIFAR-10, under twice that in the deep ones (arXiv:2011.13456)."""
    from fastode.nets.ncsnpp import NCSNpp

    counts = {}
    for name in ("vp/cifar10_ddpmpp_continuous", "ve/cifar10_ncsnpp_continuous", "ve/cifar10_ncsnpp_deep_continuous"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in NCSNpp(score_sde.CONFIGS[name].model).parameters())
    assert [round(n / 1e6) for n in counts.values()] == [62, 63, 108]


# -- one format for all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "case"), PRECONDS)
def test_saved_is_loaded(tmp_path, kind, case):
    """Weights and card make the same denoiser again, to the bit."""
    d = edm.load(edm_pickle(tmp_path / "a.pkl", build(case), kind))
    again = load(save(d, tmp_path / "b", source="test"))
    assert (again.prediction, again.sigma_data, again.num_classes, again.null_label, again.sample_shape) == (
        d.prediction, d.sigma_data, d.num_classes, d.null_label, d.sample_shape
    )  # fmt: skip
    assert schedule_to_dict(again.schedule) == schedule_to_dict(d.schedule)
    assert torch.equal(again(data(1.0), 1.0), d(data(1.0), 1.0)) and again.card["source"] == "test"


@pytest.mark.parametrize(
    "schedule", [VE(0.02, 100, "log_half_sigma"), VE(told="index", steps=50), edm.improved_ddpm(50)]
)
def test_schedules_as_data(schedule):
    plain = json.loads(json.dumps(schedule_to_dict(schedule)))
    assert schedule_to_dict(schedule_from_dict(plain)) == schedule_to_dict(schedule)
    for rho in (0.03, 0.5, 40.0):
        assert float(schedule_from_dict(plain).label(schedule.time(rho))) == float(schedule.label(schedule.time(rho)))


def test_improved_ddpm_rounds_to_the_nearest_level():
    """Labels are whole, those of the levels themselves; between two levels the nearer in sigma has it."""
    s = edm.improved_ddpm(100)
    rho = [float(s.rho(k)) for k in range(100)]
    for k in (0, 1, 50, 98):
        assert float(s.label(s.time(rho[k]))) == k
        for w, expected in ((0.49, k), (0.51, k + 1)):
            assert float(s.label(s.time(rho[k] + w * (rho[k + 1] - rho[k])))) == expected


def test_ve_schedule_is_checked():
    with pytest.raises(ValueError, match="told: must be sigma, log_half_sigma or index, got 'log'"):
        VE(told="log")


def test_save_says_what_it_cannot(tmp_path):
    with pytest.raises(ValueError, match="network: function is none of the families"):
        save(Denoiser(lambda x, s: x, "denoised"), tmp_path / "a")
    from fastode.denoisers import clipped

    with pytest.raises(ValueError, match="transforms cannot be written"):
        save(clipped(load("mnist")), tmp_path / "a")


def test_convert_and_sample(tmp_path, capsys):
    """The command line from an EDM pickle to images, converted once or read as it is: the same images."""
    pickled = edm_pickle(
        tmp_path / "edm-cifar10-32x32-uncond-vp.pkl", build("ncsnpp residual"), "VPPrecond", model_type="SongUNet"
    )
    out = tmp_path / "cifar10"
    assert main(["convert", "edm", str(pickled), str(out)]) == 0
    assert "prediction eps, VPLinear" in capsys.readouterr().out
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["network"] == "song" and card["source"] == {"kind": "edm", "file": pickled.name}
    for model, file in ((f"edm:{pickled}", "a.npz"), (str(out), "b.npz")):
        arguments = ["--model", model, "--nfe", "2", "--seeds", "0-1", "--device", "cpu", "--out", str(tmp_path / file)]
        assert main(["sample", *arguments]) == 0
    import numpy as np

    a, b = (np.load(tmp_path / f) for f in ("a.npz", "b.npz"))
    assert all(np.array_equal(a[k], b[k]) for k in a.files)
    assert main(["convert", "edm", str(tmp_path / "none.pkl"), str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save(build("adm, plain").state_dict(), tmp_path / "adm.pt")
    options = ["-o", "image_size=16", "-o", "num_heads=2", "-o", "noise_schedule=linear"]
    assert main(["convert", "adm", str(tmp_path / "adm.pt"), str(tmp_path / "adm"), *options]) == 0
    assert load(tmp_path / "adm").schedule.alphas_bar == Discrete.linear().alphas_bar


def test_cases_are_all_loaded():
    """Every tiny network above comes from some format here."""
    seen = {c for _, c in PRECONDS} | set(ADM_OPTIONS) | {"score-sde ddpmpp", "score-sde ncsnpp", "score-sde skip"}
    assert set(CASES) - seen == {"score-sde ddpm"}


def test_amed_s_recipe_from_an_edm_pickle(tmp_path):
    """AMED's published settings for CIFAR-10 in one command, on a small network of the same kind as that of the paper."""
    pickled = edm_pickle(tmp_path / "edm-cifar10-32x32-uncond-vp.pkl", build_uncond(), "EDMPrecond")
    out = tmp_path / "cifar10-amed-5.safetensors"
    recipe = ["-o", "afs=true", "--set", "predictor=features", "--set", "loss=steps"]
    small = ["--set", "images=2", "--set", "batch=2", "--samples", "2", "--held-out", "0"]
    command = ["train", "solver", "amed", "--model", f"edm:{pickled}", "--nfe", "5", *recipe, *small, "--device", "cpu"]
    assert main([*command, "--out", str(out)]) == 0
    artifact = fastode.Artifact.load(out)
    levels = [float(s) for s in artifact.grid.sigma]
    assert artifact.nfe == 5 and artifact.options["afs"] is True
    expected = [80, 6.950235, 1.286669, 0.002]  # the card's levels for N = 4; the last is the official float32's +0.7%
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(levels, expected, strict=True))
    settings = artifact.card["settings"]
    chosen = {k: settings[k] for k in ("scale_dir", "scale_time", "lr", "start", "teacher_solver", "intermediate")}
    assert chosen == {
        "scale_dir": 0.01, "scale_time": 0.0, "lr": 5e-3, "start": "teacher", "teacher_solver": "heun", "intermediate": 1
    }  # fmt: skip
    d = load(f"edm:{pickled}")
    samples = fastode.sample(d, seeds=[0, 1], solver=artifact)
    untrained = fastode.sample(d, seeds=[0, 1], solver="dpm_solver_2", grid=artifact.grid, afs=True)
    assert samples.shape == (2, 3, 8, 8) and relative(samples, untrained) > 1e-4


def build_uncond():
    from fastode.nets.song import SongConfig, SongUNet
    from tests.network_cases import SONG, fill

    tiny = {"img_resolution": 8, "model_channels": 8, "channel_mult": (1,), "attn_resolutions": (), "augment_dim": 9}
    network = SongUNet(SongConfig(**{**SONG, **tiny}))
    fill(network)
    return network.eval()
