"""Training: the loss is the paper's, a killed run ends where an unbroken one does, and what it writes can be read."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import fastode
from fastode import Denoiser, files
from fastode.denoisers import Gaussian
from fastode.learn import denoiser as learn
from fastode.learn.data import Images, load_images
from fastode.learn.denoiser import Run, TrainSettings, drop_labels, loss, train
from fastode.nets.unet import UNet, UNetConfig, build, parameter_count
from tests.tiny_model import network

CONFIG = UNetConfig(resolution=16, num_classes=3, channels=(8, 16), blocks=1, attention=(8,), embedding=16)
STEPS, BATCH = 6, 4
EXACT = TrainSettings(images=STEPS * BATCH, batch=BATCH, bf16=False, warmup=2, flip=True)
SAVE_ALWAYS = {**EXACT.__dict__, "checkpoint_minutes": 0.0}


@pytest.fixture(scope="module")
def images() -> Images:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    pixels = torch.randint(0, 80, (12, 1, 16, 16), generator=g, dtype=torch.uint8)
    pixels[:, :, 4:12, 4:12] += (labels * 60).to(torch.uint8)[:, None, None, None]
    return Images(pixels, labels, ("a", "b", "c"))


@pytest.fixture
def plain_curve(monkeypatch):
    """Runs that save at every step do not draw a picture every time."""
    monkeypatch.setattr(learn, "plot_curve", lambda *_: None)


def weights(path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- the loss ------------------------------------------------------------------------------------------------------


def test_loss_is_the_published_formula():
    """E[lambda(sigma) |D(y + n; sigma) - y|^2] with D from Denoiser, in float64 and from the same draws."""
    settings = TrainSettings(bf16=False, p_mean=-0.8, p_std=1.1, sigma_data=0.4)
    net = network().double().requires_grad_(False)
    y, labels = torch.rand(5, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([0, 1, 2, 3, 1])
    got = loss(net, y, labels, settings, torch.Generator().manual_seed(3))

    g = torch.Generator().manual_seed(3)
    sigma = (torch.randn(5, 1, 1, 1, generator=g) * 1.1 - 0.8).exp().double()
    noise = torch.randn(y.shape, generator=g).double()
    d = Denoiser(net, sigma_data=0.4, num_classes=3, null_label=3)
    want = 0.0
    for i in range(5):
        s = float(sigma[i])
        weight = (s**2 + 0.4**2) / (s * 0.4) ** 2
        denoised = d(y[i : i + 1] + s * noise[i : i + 1], s, class_labels=labels[i : i + 1])
        want += weight * float((denoised - y[i]).square().mean()) / 5
    # float64; the weight reaches 1e2 where D - y is a difference of nearly equal numbers
    assert float(got.detach()) == pytest.approx(want, rel=1e-10)


def test_the_ideal_denoiser_has_the_least_loss():
    """On Gaussian data F has a known best form; its loss is the irreducible variance, below any other network's."""
    sd = 0.5
    g = torch.Generator().manual_seed(0)
    y = sd * torch.randn(4000, 1, 2, 2, generator=g)
    settings = TrainSettings(bf16=False, sigma_data=sd)
    ideal = Gaussian(torch.zeros(1, 2, 2), sd**2)

    def perfect(x, c, labels):  # c_skip x is already E[y | x]: the best F is 0
        return torch.zeros_like(x)

    best = loss(perfect, y, None, settings, torch.Generator().manual_seed(1))
    # lambda times the posterior variance is 1 at every sigma: 16000 squares of unit normals, 4 s.e.
    assert float(best) == pytest.approx(1.0, abs=4 * math.sqrt(2 / y.numel()))
    worse = loss(lambda x, c, labels: 0.3 * x, y, None, settings, torch.Generator().manual_seed(1))
    assert float(worse) > float(best) + 0.05
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    zero = Denoiser(lambda x, c: torch.zeros_like(x), sigma_data=sd)
    torch.testing.assert_close(zero(x, 0.7), ideal(x, 0.7), rtol=1e-12, atol=0)


def test_labels_are_dropped_at_the_given_share():
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels, 10, 0.1, torch.Generator().manual_seed(0))
    share = float((dropped == 10).float().mean())
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / 20_000)
    assert torch.equal(dropped[dropped != 10], labels[dropped != 10])
    assert torch.equal(drop_labels(labels, 10, 0.0, torch.Generator()), labels)


def test_average_is_the_power_function_of_the_steps():
    """Karras et al. 2023: after n steps, step k has weight k^gamma' - telescoped from (1 - 1/n)^(gamma + 1)."""
    run = Run(CONFIG, EXACT, torch.device("cpu"))
    gamma, values = EXACT.ema_gamma, [2.0, -1.0, 4.0, 0.5]
    first = next(iter(run.network.parameters()))
    for value in values:
        run.step += 1
        with torch.no_grad():
            first.fill_(value)
        run._update_average()
    n = len(values)
    shares = [((k + 1) / n) ** (gamma + 1) - (k / n) ** (gamma + 1) for k in range(n)]
    assert sum(shares) == pytest.approx(1)
    average = next(iter(run.average.parameters()))
    torch.testing.assert_close(
        average, torch.full_like(average, sum(s * v for s, v in zip(shares, values, strict=True)))
    )


def test_learning_rate():
    """Linear warm-up, 1/sqrt(k) after lr_reference, linear to zero in the last ``cooldown`` steps."""
    run = Run(
        CONFIG, TrainSettings(images=40, batch=2, lr=1.0, warmup=4, lr_reference=9, cooldown=5), torch.device("cpu")
    )
    y, rates = torch.zeros(2, 1, 16, 16), []
    for _ in range(20):
        run.train_step(y, None)
        rates.append(run.optimizer.param_groups[0]["lr"])
    want = [min(k / 4, 1) * min(1, math.sqrt(9 / k)) * min(1, (21 - k) / 5) for k in range(1, 21)]
    assert rates == pytest.approx(want, rel=1e-14)


# -- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_model(tmp_path, images):
    path = train(images, tmp_path / "run", config=CONFIG, settings=EXACT, progress=False, card={"name": "squares"})
    assert path == tmp_path / "run" / "weights.safetensors"
    card = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert card["format"] == "fastode-denoiser-1"
    assert card["name"] == "squares"
    assert (card["steps"], card["images_seen"]) == (STEPS, STEPS * BATCH)
    assert (card["prediction"], card["sigma_data"], card["sigma_min"], card["sigma_max"]) == ("edm", 0.5, 0.002, 80.0)
    assert card["settings"]["seed"] == 0
    assert card["settings"]["minutes"] is None  # infinity is not JSON
    assert card["parameters"] == parameter_count(build(CONFIG))
    assert card["torch"] == torch.__version__
    assert math.isfinite(card["loss"])
    assert card["loss"] > 0
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "weights.safetensors",
        "weights.json",
        "checkpoint.safetensors",
        "checkpoint.json",
        "loss.png",
    }  # nothing temporary is left

    d = fastode.load(path)
    assert (d.name, d.num_classes, d.null_label, d.sample_shape) == ("squares", 3, 3, (1, 16, 16))
    assert same(dict(d.network.state_dict()), weights(path))
    out = fastode.sample(d, seeds=[0, 1], class_labels=[0, 2], nfe=3, guidance_scale=2.0)
    assert out.shape == (2, 1, 16, 16)
    assert bool(torch.isfinite(out).all())


def test_longer_runs_have_a_point_per_hundred_steps():
    run = Run(CONFIG, EXACT, torch.device("cpu"))
    for k in range(250):
        run.step = k + 1
        run.record(float(k))
    run.record()
    run.record()
    assert run.curve == [(100, 49.5), (200, 149.5), (250, 224.5)]


def test_training_lowers_the_loss(tmp_path, images):
    """60 steps on twelve nearly constant images; the start is F = 0 with loss near its variance."""
    settings = TrainSettings(images=60 * 8, batch=8, bf16=False, warmup=5, lr=4e-3, label_dropout=0.0)
    path = train(images, tmp_path, config=CONFIG, settings=settings, progress=False)
    y, labels = images.batch(torch.arange(12).repeat(8))
    start, end = (
        float(loss(net, y, labels, settings, torch.Generator().manual_seed(5)).detach())
        for net in (UNet(CONFIG), fastode.load(path).network)
    )
    assert end < 0.7 * start


class Killed(BaseException):
    pass


def kill_at(monkeypatch, owner: object, name: str, count: int) -> None:
    """The ``count``-th call of ``owner.name`` does not happen, nor anything after it."""
    whole, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return whole(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("unbroken")
    return weights(train(images, folder, config=CONFIG, settings=EXACT, progress=False))


@pytest.mark.parametrize(
    ("what", "count"),
    [("step", 1), ("step", 4), ("step", STEPS), *(("replace", k) for k in (1, 2, 3, 4, 7, 14, 26))],
)
def test_a_killed_run_continues_bitwise(tmp_path, images, unbroken, monkeypatch, plain_curve, what, count):
    """Killed in a step, or while any of its files is written; called again, it ends with the same weights to the bit."""
    settings = TrainSettings(**SAVE_ALWAYS)
    with monkeypatch.context() as patch:
        kill_at(patch, *((Run, "train_step") if what == "step" else (files.os, "replace")), count)
        with pytest.raises(Killed):
            train(images, tmp_path, config=CONFIG, settings=settings, progress=False)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # no fragments
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    calls = []
    step = Run.train_step
    monkeypatch.setattr(Run, "train_step", lambda run, *a: calls.append(run.step) or step(run, *a))
    again = train(images, tmp_path, config=CONFIG, settings=settings, progress=False)
    assert same(weights(again), unbroken)
    if what == "step":
        assert calls == list(range(count - 1, STEPS))  # steps that were saved are not repeated


def test_a_finished_run_can_be_lengthened(tmp_path, images, plain_curve):
    short = TrainSettings(**{**SAVE_ALWAYS, "images": 2 * BATCH})
    first = weights(train(images, tmp_path, config=CONFIG, settings=short, progress=False))
    again = weights(train(images, tmp_path, config=CONFIG, settings=short, progress=False))
    assert same(first, again)  # nothing left to do
    longer = weights(train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False))
    whole = weights(train(images, tmp_path / "whole", config=CONFIG, settings=EXACT, progress=False))
    assert same(longer, whole)


def test_starting_over_forgets_the_old_run(tmp_path, images, unbroken, monkeypatch, plain_curve):
    other = TrainSettings(**{**SAVE_ALWAYS, "seed": 9})
    train(images, tmp_path, config=CONFIG, settings=other, progress=False)
    with monkeypatch.context() as patch:
        kill_at(patch, Run, "train_step", 1)
        with pytest.raises(Killed):  # killed before its first checkpoint: the old one must not come back
            train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False, resume=False)
    fresh = train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False)
    assert same(weights(fresh), unbroken)


def test_minutes_end_a_run(tmp_path, images, plain_curve):
    settings = TrainSettings(images=10**6, minutes=0.005, batch=BATCH, bf16=False)
    train(images, tmp_path, config=CONFIG, settings=settings, progress=False)
    card = json.loads((tmp_path / "weights.json").read_text())
    assert 0 < card["steps"] < 1000
    assert card["seconds"] >= 0.3
    assert card["settings"]["minutes"] == 0.005


def test_resuming_something_else_is_refused(tmp_path, images, plain_curve):
    train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name, value in (("lr", 0.1), ("seed", 1), ("batch", 2), ("flip", False)):
        other = TrainSettings(**{**EXACT.__dict__, name: value})
        with pytest.raises(ValueError, match=r"^settings: .* was started with .*; only images, minutes"):
            train(images, tmp_path, config=CONFIG, settings=other, progress=False)
    wider = UNetConfig(**{**CONFIG.to_dict(), "channels": (16, 16)})
    with pytest.raises(ValueError, match=r"^config: .* was started with .*channels=\(8, 16\).*, got "):
        train(images, tmp_path, config=wider, settings=EXACT, progress=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for name in ("checkpoint.safetensors", "checkpoint.json"):
        (tmp_path / name).write_bytes(before[name][: len(before[name]) // 2])
        with pytest.raises(ValueError, match=r"^checkpoint: .* cannot be resumed .*; start over with resume=False"):
            train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False)
        (tmp_path / name).write_bytes(before[name])


def test_a_diverging_run_stops(tmp_path, images, monkeypatch, plain_curve):
    monkeypatch.setattr(learn, "loss", lambda net, *_: next(net.parameters()).sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"^loss: nan at step 1"):
        train(images, tmp_path, config=CONFIG, settings=EXACT, progress=False)
    assert not list(tmp_path.iterdir())


def test_bfloat16_runs(tmp_path, images, plain_curve):
    settings = TrainSettings(images=2 * BATCH, batch=BATCH, bf16=True)
    path = train(images, tmp_path, config=CONFIG, settings=settings, progress=False)
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v).all()) for v in weights(path).values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainSettings(batch=0), "batch: must be at least 1"),
        (lambda: TrainSettings(images=0), "images: must be at least 1"),
        (lambda: TrainSettings(label_dropout=1.0), "label_dropout: must be in"),
        (lambda: UNetConfig(resolution=18, channels=(8, 8, 8)), "resolution: 18 is not divisible by 4"),
        (lambda: UNetConfig(channels=(8, 12)), "channels: every width must be a multiple of 8"),
        (lambda: build(depth=3), "config: unknown U-Net fields"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_networks_must_fit_the_images(tmp_path, images):
    for config, message in (
        (UNetConfig(resolution=32, channels=(8, 16)), r"config: a network for \[1, 32, 32\] cannot learn images of"),
        (UNetConfig(**{**CONFIG.to_dict(), "num_classes": 2}), "config: num_classes = 2, but the images have 3"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            train(images, tmp_path / "run", config=config, settings=EXACT, progress=False)
    with pytest.raises(ValueError, match=r"^config: num_classes = 3, but the images have none"):
        train(Images(images.pixels, None, ()), tmp_path / "run", config=CONFIG, settings=EXACT, progress=False)
    assert not (tmp_path / "run").exists()


def test_the_network_has_a_bottleneck_output():
    """A plain output of the forward pass, so that it survives compilation; the raw output is the same with and without."""
    net = network()
    x, c, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3]), torch.tensor([1, 3])
    with torch.no_grad():
        raw, features = net(x, c, labels, features=True)
        assert torch.equal(raw, net(x, c, labels))
        assert torch.equal(net(x, c), net(x, c, torch.tensor([3, 3])))  # no labels: the "no class" label
    assert features["bottleneck"].shape == (2, 16, 4, 4)
    patched = UNet(UNetConfig(resolution=16, channels=(8, 16), patch=2, attention=(4,)))
    raw, features = patched(torch.randn(2, 1, 16, 16), c, features=True)
    assert raw.shape == (2, 1, 16, 16)
    assert features["bottleneck"].shape == (2, 16, 4, 4)


# -- images --------------------------------------------------------------------------------------------------------


def picture(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_digits_are_padded_without_blur(tmp_path):
    """28 x 28 becomes 32 x 32: two zeros on every side, the rest untouched."""
    digits = np.random.default_rng(0).integers(1, 255, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=digits, labels=np.array([3, 0, 1, 1, 2]))
    made = load_images(tmp_path / "d.npz", resolution=32)
    assert made.pixels.shape == (5, 1, 32, 32)
    assert np.array_equal(made.pixels[:, 0, 2:30, 2:30].numpy(), digits)
    assert int(made.pixels.long().sum()) == int(digits.astype(int).sum())
    assert (made.num_classes, made.classes, made.labels.tolist()) == (4, ("0", "1", "2", "3"), [3, 0, 1, 1, 2])
    x, labels = made.batch(torch.tensor([4, 0]))
    assert labels.tolist() == [2, 3]
    assert x.dtype == torch.float32
    assert float(x[0, 0, 0, 0]) == -1.0
    torch.testing.assert_close(x[1, 0, 2:30, 2:30], torch.from_numpy(digits[0]) / 127.5 - 1, rtol=0, atol=2e-7)


def test_colours_and_larger_images(tmp_path):
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    images[:, :32] = (10, 200, 30)
    np.savez(tmp_path / "c.npz", images=images)
    made = load_images(tmp_path / "c.npz", resolution=16)
    assert made.pixels.shape == (2, 3, 16, 16)
    assert made.labels is None
    assert made.num_classes == 0
    assert made.pixels[0, :, 0, 0].tolist() == [10, 200, 30]  # an area filter: averages of whole blocks
    assert made.pixels[0, :, 15, 0].tolist() == [0, 0, 0]
    assert load_images(tmp_path / "c.npz").pixels.shape == (2, 3, 64, 64)
    assert made.batch(torch.tensor([0]))[1] is None


@pytest.mark.parametrize("shape", [(28, 40), (40, 28), (20, 33), (64, 40), (33, 32), (32, 32), (1, 100)])
def test_pictures_of_any_shape(tmp_path, shape):
    """Centre-cropped where longer than the resolution allows, then shrunk or padded."""
    array = np.full(shape, 7, dtype=np.uint8)
    picture(tmp_path / "f" / "a.png", array)
    np.savez(tmp_path / "f.npz", images=array[None])
    for source in (tmp_path / "f", tmp_path / "f.npz"):
        made = load_images(source, resolution=32).pixels
        assert made.shape == (1, 1, 32, 32)
        side = min(*shape, 32)
        assert int((made == 7).sum()) == side * side if max(shape) > 32 else shape[0] * shape[1]


def test_folders_of_pictures(tmp_path):
    for k, name in enumerate(("cat", "dog", "dog", "bird")):
        picture(tmp_path / name / f"{k}.png", np.full((16, 16), 10 * k, dtype=np.uint8))
    (tmp_path / "dog" / "notes.txt").write_text("not a picture")
    (tmp_path / ".cache").mkdir()
    made = load_images(tmp_path)
    assert made.classes == ("bird", "cat", "dog")
    assert made.labels.tolist() == [0, 1, 2, 2]
    assert made.pixels[:, 0, 0, 0].tolist() == [30, 0, 10, 20]
    flat = load_images(tmp_path / "dog")
    assert flat.labels is None
    assert len(flat) == 2


def test_grey_and_coloured_pictures_together(tmp_path):
    picture(tmp_path / "a.png", np.full((8, 8), 9, dtype=np.uint8))
    picture(tmp_path / "b.png", np.full((8, 8, 3), 50, dtype=np.uint8))
    Image.new("RGBA", (8, 8), (1, 2, 3, 255)).save(tmp_path / "c.png")
    made = load_images(tmp_path)
    assert made.pixels.shape == (3, 3, 8, 8)
    assert made.pixels[0, :, 0, 0].tolist() == [9, 9, 9]
    assert made.pixels[2, :, 0, 0].tolist() == [1, 2, 3]


def test_bad_data(tmp_path):
    def npz(name: str, **arrays: np.ndarray):
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    good = np.zeros((3, 8, 8), dtype=np.uint8)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    whole = npz("whole.npz", images=good).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "broken" / "a.png", good[0])
    (tmp_path / "broken" / "a.png").write_bytes(b"\x89PNG no more")
    picture(tmp_path / "sizes" / "a.png", good[0])
    picture(tmp_path / "sizes" / "b.png", np.zeros((9, 9), dtype=np.uint8))
    for path, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "data: .*nowhere does not exist; give an .npz"),
        (tmp_path / "junk.npz", ValueError, "data: .*junk.npz is damaged or not an .npz"),
        (tmp_path / "cut.npz", ValueError, "data: .*cut.npz is damaged or not an .npz"),
        (npz("p.npz", images=np.array([{}], dtype=object)), ValueError, "data: .*p.npz is damaged"),  # not unpickled
        (npz("x.npz", x=good), ValueError, r"data: .*x.npz has no array 'images' \(found \['x'\]\)"),
        (npz("f.npz", images=good / 255), ValueError, "data: 'images' of .* must be uint8"),
        (npz("n.npz", images=good[0]), ValueError, "data: 'images' of .* must be uint8"),
        (npz("e.npz", images=good[:0]), ValueError, "data: 'images' of .* is empty"),
        (npz("l.npz", images=good, labels=np.zeros(2, dtype=int)), ValueError, "data: 'labels' of .* must be"),
        (npz("g.npz", images=good, labels=np.zeros(3)), ValueError, "data: 'labels' of .* must be"),
        (npz("m.npz", images=good, labels=np.array([0, -1, 2])), ValueError, "data: 'labels' of .* must be 0 or more"),
        (npz("r.npz", images=good[:, :5]), ValueError, r"data: images of .* are 5 x 8; give resolution=\.\.\."),
        (tmp_path / "empty", ValueError, r"data: no pictures .* in .*empty"),
        (tmp_path / "broken", ValueError, "data: .*a.png cannot be read"),
        (tmp_path / "sizes", ValueError, "data: pictures of .* differ in size"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            load_images(path)
