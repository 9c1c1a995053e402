"""Other people's architectures: our modules give the numbers that the official ones gave with the same weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastode.nets.edm_blocks import Block, Conv, last_at
from fastode.nets.families import build_network, describe_network
from fastode.nets.ncsnpp import grow, shrink
from tests.conftest import relative
from tests.network_cases import CASES, build, inputs, sparse

GOLDEN = load_file(Path(__file__).parent / "golden" / "networks.safetensors")


def call(name, network, dtype=torch.float32, **more):
    x, c_noise, labels = inputs(name)
    more |= {} if labels is None else {"class_labels": labels}
    return network(x.to(dtype), c_noise, **more)


@pytest.mark.parametrize("name", list(CASES))
def test_official_numbers(name):
    """1e-5 of the largest output: float32 sums over a few thousand terms in another order differ by 1e-6."""
    raw, features = call(name, build(name), features=True)
    assert raw.shape == (2, 3, 16, 16) and relative(sparse(raw), GOLDEN[name]) < 1e-5
    assert list(features) == ["bottleneck"] and features["bottleneck"].ndim == 4
    if f"{name}, bottleneck" in GOLDEN:  # what AMED reads there: an encoder block, or the middle block
        assert relative(features["bottleneck"].flatten()[::211], GOLDEN[f"{name}, bottleneck"]) < 1e-5
    assert torch.equal(call(name, build(name)), raw)  # asking for features changes no bit


@pytest.mark.parametrize("name", list(CASES))
def test_narrow_and_wide(name):
    """In bfloat16 (8 bits) the output is off by less than 4% of its size; in float64 by float32's rounding of the embedding."""
    exact = call(name, build(name))
    narrow = call(name, build(name).to(torch.bfloat16), torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - exact).norm() / exact.norm()) < 0.04
    wide = call(name, build(name).double(), torch.float64)
    assert wide.dtype == torch.float64 and relative(exact.double(), wide) < 1e-5


@pytest.mark.parametrize("name", ["ddpmpp", "score-sde ncsnpp", "adm"])
def test_frequencies_stay_exact(name):
    """Label 437 has 9 bits: in bfloat16 it is 438, and its fastest angle wrong by one radian."""
    network = build(name).to(torch.bfloat16)
    assert call(name, network, torch.bfloat16).std() > 0
    kept = [m for m in network.modules() if hasattr(m, "exact")]
    assert len(kept) == 1 and getattr(kept[0], kept[0].exact).dtype == torch.float32


@pytest.mark.parametrize("name", [n for n, (_, c) in CASES.items() if c.get("label_dim") or c.get("num_classes")])
def test_no_class(name):
    """The label behind the last class is no class, and so is none at all."""
    network, (x, c_noise, labels) = build(name), inputs(name)
    none = network(x, c_noise)
    assert torch.equal(network(x, c_noise, torch.tensor([5, 5])), none)
    assert relative(network(x, c_noise, labels), none) > 1e-3


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp residual", "dhariwal", "consistency"])
def test_derivative_in_c_noise(name):
    """AMED learns times, so a network is differentiated in what it is told: central differences, float64."""
    network, (x, c_noise, _) = build(name).double(), inputs(name)
    x, c, h = x.double(), c_noise.double().requires_grad_(), 1e-6
    network(x, c).sum().backward()
    with torch.no_grad():
        slope = (network(x, c + h).flatten(1).sum(1) - network(x, c - h).flatten(1).sum(1)) / (2 * h)
    assert relative(c.grad, slope) < 1e-5


def test_resampling():
    """(1, 1) is nearest neighbour and mean; any filter keeps a constant inside; grow is four times the adjoint of shrink."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    near = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mean = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    up, down = (Conv(3, 3, 0, resample=r).double() for r in ("up", "down"))
    torch.testing.assert_close(up(x), near)
    torch.testing.assert_close(down(x), mean)
    torch.testing.assert_close(grow(x, (1, 1)), near)
    torch.testing.assert_close(shrink(x, (1, 1)), mean)
    y = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close((grow(y, (1, 3, 3, 1)) * x).sum(), 4 * (y * shrink(x, (1, 3, 3, 1))).sum())
    one = torch.ones_like(x)
    for made in (Conv(3, 3, 0, resample=r, taps=(1, 3, 3, 1)).double()(one) for r in ("up", "down")):
        torch.testing.assert_close(made[:, :, 1:-1, 1:-1], torch.ones_like(made)[:, :, 1:-1, 1:-1])
    late = Conv(3, 3, 3, resample="down", taps=(1, 3, 3, 1), late=True).double()
    wide = torch.nn.functional.pad(torch.randn(1, 3, 8, 8, dtype=torch.float64), (4,) * 4)
    full = torch.nn.functional.conv2d(
        wide, late.weight, late.bias, padding=1
    )  # then filter and halve, inside the border
    halved = torch.nn.functional.conv2d(full, late.resample_filter.expand(3, 1, 4, 4), stride=2, padding=1, groups=3)
    torch.testing.assert_close(late(wide)[..., 1:-1, 1:-1], halved[..., 1:-1, 1:-1])


def test_attention_is_a_weighted_mean():
    """With queries of zero every position gets the mean of the values; heads keep to their own channels."""
    block = Block(8, 8, 4, heads=2, scale=1.0).double()
    with torch.no_grad():
        block.qkv.weight.zero_()
        block.qkv.bias.copy_(torch.arange(24.0))  # by head, channel, then q, k, v
        h = torch.randn(1, 8, 2, 2, dtype=torch.float64)
        block.qkv.weight.reshape(2, 4, 3, 8)[:, :, 2] = torch.eye(8).double().reshape(2, 4, 8)
        a = block._attend(h)
    values = block.norm2(h) + torch.arange(24.0).double().reshape(8, 3)[:, 2].reshape(1, 8, 1, 1)
    torch.testing.assert_close(a, values.mean((2, 3), keepdim=True).expand_as(a))


def test_bottleneck_is_amed_s():
    """AMED's code taps 8x8_block3 (4 blocks per level) and 8x8_block2 (3); NCSN++ of CIFAR-10 goes on down to 4 x 4."""
    names = [f"{s}x{s}_{k}" for s in (32, 16, 8) for k in ("down", "block0", "block1", "block2", "block3")]
    assert last_at(names) == "8x8_block3" and last_at(names[:-1]) == "8x8_block2"
    assert last_at([*names, "4x4_down", "4x4_block0"]) == "8x8_block3" and last_at(names[:9]) == "16x16_block2"
    cifar = build_network("song", {"channel_mult": (2, 2, 2), "model_channels": 8})
    assert cifar.tap == "8x8_block3"
    x = torch.randn(1, 3, 32, 32)
    assert cifar(x, torch.zeros(1), features=True)[1]["bottleneck"].shape == (1, 16, 8, 8)


@pytest.mark.parametrize("name", list(CASES))
def test_config_round_trip(name):
    network = build(name)
    family, config = describe_network(network)
    again = build_network(family, config)
    assert family == CASES[name][0] and again.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("resnet", {}, "network: must be one of unet, song, dhariwal, adm, ncsnpp, got 'resnet'"),
        ("song", {"depth": 3}, "config: song has no field 'depth'; its fields are"),
        ("song", {"encoder_type": "none"}, "encoder_type: must be one of standard, skip, residual, got 'none'"),
        ("song", {"embedding_type": "x"}, "embedding_type: must be one of positional, fourier"),
        ("adm", {"qkv_order": "x"}, "qkv_order: must be heads or qkv"),
        ("adm", {"model_channels": 20}, "channel_mult, model_channels: widths must be multiples of 32"),
        ("ncsnpp", {"progressive": "residual"}, "progressive: must be one of none, output_skip, got 'residual'"),
        ("ncsnpp", {"resblock_type": "ddpm", "fir": True}, "fir: must be False where resblock_type is ddpm"),
    ],
)
def test_bad_configs(family, config, message):
    with pytest.raises(ValueError, match=message):
        build_network(family, config)


def test_foreign_networks_have_no_card():
    with pytest.raises(ValueError, match="network: Linear is none of the families"):
        describe_network(torch.nn.Linear(1, 1))
