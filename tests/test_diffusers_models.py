"""Models of diffusers as denoisers: against their own forward pass, and against diffusers' own loop from noise to sample."""

import json
import math

import pytest
import torch

import fastode
from fastode.denoisers import Denoiser
from fastode.interop.scheduler_config import meaning
from fastode.models import load as load_model
from fastode.schedules import EDM, VE, Discrete, Flow
from tests.conftest import relative
from tests.pickles import attacks

diffusers = pytest.importorskip("diffusers", reason="an optional extra: pip install 'fastode[diffusers]'")

BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
TABLE = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
         "num_train_timesteps": 1000, "prediction_type": "epsilon"}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def randomised(model):
    """Weights at random, also where training starts from zero."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=g))
    return model.eval().requires_grad_(False)


def unet(**more):
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return randomised(diffusers.UNet2DModel(**{**BLOCKS, **kinds, "attention_head_dim": 4, **more}))


def skipping_unet():
    """NCSN++ as diffusers has it: Fourier features, a pyramid of the input and of the output, output divided by sigma."""
    kinds = {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
             "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D")}  # fmt: skip
    wide = {"block_out_channels": (32, 64), "norm_num_groups": None, "sample_size": 8, "layers_per_block": 1}
    return randomised(diffusers.UNet2DModel(**kinds, **wide, time_embedding_type="fourier", attention_head_dim=None))


def text_unet(**more):
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    sizes = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 12, "attention_head_dim": 4}
    return randomised(diffusers.UNet2DConditionModel(**{**BLOCKS, **kinds, **sizes, **more}))


def sdxl_unet():
    return text_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 10
    )


def dit(kind="DiTTransformer2DModel"):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
             "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero",
             "norm_elementwise_affine": False, "attention_bias": True, "activation_fn": "gelu-approximate"}  # fmt: skip
    return randomised(getattr(diffusers, kind)(**sizes))


def sd3():
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8,
             "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
             "pooled_projection_dim": 10, "pos_embed_max_size": 8}  # fmt: skip
    return randomised(diffusers.SD3Transformer2DModel(**sizes))


def flux(guidance=True):
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2,
             "joint_attention_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": guidance,
             "axes_dims_rope": (4, 4, 4)}  # fmt: skip
    return randomised(diffusers.FluxTransformer2DModel(**sizes))


def noise(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = {"encoder_hidden_states": noise(2, 6, 12, seed=1)}
POOLED = {**TEXT, "pooled_projections": noise(2, 10, seed=2)}
SDXL = {**TEXT, "text_embeds": noise(2, 10, seed=3), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)}
LABELS = torch.tensor([3, 7])


def tell(t):
    """A label for both samples; a plain number would be rounded to a whole one."""
    return torch.full((2,), float(t))


def flux_by_hand(model, x, t, cond, guidance):
    """Flux on latents, from its paper's patches: each 2 x 2 patch of the latents is a token."""
    b, _, h, w = x.shape
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # by channel, row, column
    ids = torch.tensor([[0.0, i, j] for i in range(h // 2) for j in range(w // 2)])
    out = model(
        hidden_states=tokens,
        timestep=torch.full((b,), t),
        img_ids=ids,
        txt_ids=torch.zeros(6, 3),
        guidance=guidance,
        **cond,
    ).sample
    return torch.nn.functional.fold(out.transpose(1, 2), (h, w), 2, stride=2)


def case(name):
    """(model, scheduler config, conditions of a sample, the owner's own raw output (x, label) -> tensor)."""
    if name == "unet":
        m = unet()
        return m, TABLE, {}, lambda x, t: m(x, tell(t)).sample
    if name == "unet, learned variance":
        m = unet(out_channels=6)
        return m, TABLE, {}, lambda x, t: m(x, tell(t)).sample[:, :3]
    if name == "unet, classes":
        m = unet(num_class_embeds=10)
        return (
            m,
            {**TABLE, "prediction_type": "v_prediction"},
            {"class_labels": LABELS},
            lambda x, t: m(x, tell(t), LABELS).sample,
        )
    if name == "ncsnpp":
        m = skipping_unet()
        config = {"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 50.0}
        return m, config, {}, lambda x, t: t * m(x, tell(t)).sample
    if name == "stable diffusion":
        m = text_unet()
        return m, TABLE, TEXT, lambda x, t: m(x, tell(t), **TEXT).sample
    if name == "stable diffusion xl":
        m = sdxl_unet()
        added = {k: SDXL[k] for k in ("text_embeds", "time_ids")}
        return m, TABLE, SDXL, lambda x, t: m(x, tell(t), added_cond_kwargs=added, **TEXT).sample
    if name in ("dit", "dit, old class"):
        m = dit("DiTTransformer2DModel" if name == "dit" else "Transformer2DModel")
        linear = {**TABLE, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        labelled = {"class_labels": LABELS}
        return m, linear, labelled, lambda x, t: m(x, timestep=tell(t), class_labels=LABELS).sample[:, :4]
    if name == "sd3":
        m = sd3()
        return m, FLOW, POOLED, lambda x, t: m(x, timestep=tell(t), **POOLED).sample
    assert name == "flux"
    m = flux()
    dynamic = {**FLOW, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    strength = torch.full((2,), 3.5)
    return m, dynamic, POOLED, lambda x, t: flux_by_hand(m, x, t / 1000, POOLED, strength)


CASES = ("unet", "unet, learned variance", "unet, classes", "ncsnpp", "stable diffusion", "stable diffusion xl", "dit",
         "dit, old class", "sd3", "flux")  # fmt: skip
SHAPES = {"unet": (3, 8, 8), "unet, learned variance": (3, 8, 8), "unet, classes": (3, 8, 8), "ncsnpp": (3, 8, 8)}


def load(name):
    model, config, cond, owner = case(name)
    shape = (4, 8, 8) if name == "flux" else None  # the model does not say
    return Denoiser.from_diffusers(model, scheduler=config, sample_shape=shape), cond, owner


@pytest.mark.parametrize("name", CASES)
def test_raw_output_is_the_owner_s(name):
    """The same modules in the same order: 1e-5 leaves room for other shapes of the same sums. bfloat16 keeps 8 bits."""
    d, cond, owner = load(name)
    x = noise(2, *SHAPES.get(name, (4, 8, 8)))
    assert d.sample_shape == x.shape[1:]
    for t in (0.5, 30.0) if name == "ncsnpp" else (0.0, 437.0, 999.0):
        expected = owner(x, t)
        told = tell(t)
        assert relative(d.network(x, told, **cond), expected) < 1e-5
        if isinstance(d.network.model, (diffusers.UNet2DModel, diffusers.UNet2DConditionModel)):
            raw, features = d.network(x, told, **cond, features=True)
            assert relative(raw, expected) < 1e-5 and features["bottleneck"].shape[2:] == (4, 4)
    if name == "flux":  # it rounds 1000 t and 1000 guidance to the network's dtype; these are the same in both
        told, cond = tell(500.0), {**cond, "guidance": tell(2.0)}
        expected = d.network(x, told, **cond)
    d.to(torch.bfloat16)
    narrow = d.network(x.bfloat16(), told, **cond)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - expected).norm() / expected.norm()) < 0.05


def test_bottleneck_is_the_middle_block_s():
    """What a hook would have seen, without one."""
    for name in ("unet", "ncsnpp", "stable diffusion"):
        d, cond, _ = load(name)
        seen = []
        handle = d.network.model.mid_block.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o))
        x = noise(2, *d.sample_shape)
        d.network(x, torch.full((2,), 5.0), **cond)
        handle.remove()
        _, features = d.network(x, torch.full((2,), 5.0), **cond, features=True)
        torch.testing.assert_close(features["bottleneck"], seen[0])


def test_ragged_latents():
    """Sides that the U-Net's levels do not divide: features=True pads the way the model does."""
    d, cond, _ = load("stable diffusion")
    x = noise(2, 4, 7, 9)
    plain = d.network(x, torch.full((2,), 5.0), **cond)
    torch.testing.assert_close(d.network(x, torch.full((2,), 5.0), **cond, features=True)[0], plain)


@pytest.mark.parametrize("name", [n for n in CASES if n != "ncsnpp"])
def test_samples_are_diffusers_own(name):
    """Euler's method, 5 steps from pure noise: diffusers' scheduler and loop against ours, 1e-4 in the final state."""
    d, cond, owner = load(name)
    x = noise(2, *d.sample_shape)
    if isinstance(d.schedule, Flow):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=d.schedule.shift)
        scheduler.set_timesteps(5)
        state = x.clone()
        for t in scheduler.timesteps:
            state = scheduler.step(owner(state, float(t)), t, state).prev_sample
        sigma = [float(s) for s in scheduler.sigmas]
        grid = fastode.Grid(sigma, [1 - s for s in sigma], sigma, d.schedule)
        start = x
    else:
        config = {k: v for k, v in case(name)[1].items() if k != "_class_name"}
        scheduler = diffusers.EulerDiscreteScheduler(**config, timestep_spacing="trailing")
        scheduler.set_timesteps(5)
        start = state = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            state = scheduler.step(owner(scheduler.scale_model_input(state, t), float(t)), t, state).prev_sample
        grid = [float(s) for s in scheduler.sigmas]
    labels = cond.get("class_labels")
    prompts = {k: v for k, v in cond.items() if k != "class_labels"}
    made = fastode.sample(d, start, solver="ddim", grid=grid, class_labels=labels, cond=prompts)
    assert relative(made, state) < 1e-4


def test_score_network():
    """D = x + sigma^2 score, and the model returns the score."""
    d, _, _ = load("ncsnpp")
    x, sigma = noise(2, 3, 8, 8) * 4, 4.0
    assert d.schedule == VE(0.01, 50.0) and d.prediction == "score"
    assert relative(d(x, sigma), x + sigma**2 * d.network.model(x, tell(sigma)).sample) < 1e-5
    assert fastode.sample(d, seeds=[0, 1], nfe=4).shape == (2, 3, 8, 8)


def test_guidance_with_prompt_embeddings():
    """[uncond; cond] in one call is two calls; DiT's "no class" is the label behind the last."""
    d, cond, _ = load("stable diffusion xl")
    x = noise(2, 4, 8, 8) * 14.6
    uncond = {"encoder_hidden_states": noise(2, 6, 12, seed=8), "text_embeds": noise(2, 10, seed=9)}
    one = fastode.sample(d, x, nfe=3, cond=cond, uncond=uncond, guidance_scale=5.0)
    two = fastode.sample(
        d, x, nfe=3, cond=cond, uncond=uncond, guidance_scale=5.0, guidance=fastode.Guidance(batched=False)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    d, cond, _ = load("dit")
    assert (d.num_classes, d.null_label) == (10, 10)
    x = noise(2, 4, 8, 8)
    assert torch.equal(d.network(x, torch.ones(2)), d.network(x, torch.ones(2), torch.tensor([10, 10])))
    assert fastode.sample(d, x, nfe=3, class_labels=LABELS, guidance_scale=4.0).shape == x.shape
    with pytest.raises(ValueError, match="cond: the network needs 'pooled_projections'"):
        load("sd3")[0](x, 1.0, **TEXT)


# -- pipelines, folders, autoencoders --------------------------------------------------------------------------------------


def autoencoder(**more):
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    return randomised(diffusers.AutoencoderKL(**sizes, **more))


def test_pixel_pipeline(tmp_path):
    """The pipeline, its folder, and the command line's name for it are one denoiser."""
    pipe = diffusers.DDPMPipeline(
        unet(), diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    )
    pipe.save_pretrained(tmp_path / "pipe")
    ways = [Denoiser.from_diffusers(w) for w in (pipe, tmp_path / "pipe", str(tmp_path / "pipe"))]
    ways.append(load_model(f"diffusers:{tmp_path / 'pipe'}"))
    for d in ways:
        assert d.prediction == "x0" and d.schedule.alphas_bar == Discrete.squared_cosine().alphas_bar
        samples = fastode.sample(d, seeds=[0, 1], nfe=3)
        assert torch.equal(samples, fastode.sample(ways[0], seeds=[0, 1], nfe=3)) and samples.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="vae: DDPMPipeline has no autoencoder"):
        ways[0].decode(samples)
    narrow = Denoiser.from_diffusers(tmp_path / "pipe", dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    model_alone = Denoiser.from_diffusers(tmp_path / "pipe" / "unet", scheduler=tmp_path / "pipe" / "scheduler")
    assert model_alone.prediction == "x0"


def test_latent_pipeline_from_disk(tmp_path):
    """Shaped like Stable Diffusion's folder; text encoder and tokenizer are named there and never touched."""
    vae, network = autoencoder(scaling_factor=0.18215), text_unet()
    network.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(
        tmp_path / "scheduler"
    )
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "PNDMScheduler"],
             "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None]}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    d = Denoiser.from_diffusers(tmp_path)
    assert d.schedule.alphas_bar == Discrete.scaled_linear().alphas_bar and d.sample_shape == (4, 8, 8)
    latents = fastode.sample(d, seeds=[0, 1], nfe=3, cond=TEXT)
    images = d.decode(latents)
    torch.testing.assert_close(images, vae.decode(latents / 0.18215).sample)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(d.encode(images), vae.encode(images).latent_dist.mode() * 0.18215)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "unet": ["my_code", "MyUNet"]}))
    with pytest.raises(ValueError, match=r"unet: .* brings its own code for it \(my_code.MyUNet\), it is not run"):
        Denoiser.from_diffusers(tmp_path)


def test_autoencoders_scalings():
    """Shift and scale (SD3, Flux), means and standard deviations by channel, quantised latents."""
    z = noise(2, 4, 8, 8)
    vae = autoencoder(scaling_factor=1.5, shift_factor=0.06)
    d = Denoiser.from_diffusers(text_unet(), scheduler=TABLE, vae=vae)
    torch.testing.assert_close(d.decode(z), vae.decode(z / 1.5 + 0.06).sample)
    x = d.decode(z)
    torch.testing.assert_close(d.encode(x), (vae.encode(x).latent_dist.mode() - 0.06) * 1.5)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = autoencoder(scaling_factor=2.0, latents_mean=mean, latents_std=std)
    d = Denoiser.from_diffusers(text_unet(), scheduler=TABLE, vae=vae)
    by_channel = [torch.tensor(v).reshape(1, 4, 1, 1) for v in (mean, std)]
    torch.testing.assert_close(d.decode(z), vae.decode(z / 2.0 * by_channel[1] + by_channel[0]).sample)
    vq = randomised(
        diffusers.VQModel(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, num_vq_embeddings=8)
    )
    d = Denoiser.from_diffusers(text_unet(), scheduler=TABLE, vae=vq)
    torch.testing.assert_close(d.decode(z), vq.decode(z / vq.config.scaling_factor).sample)
    assert d.encode(d.decode(z)).shape == z.shape


def test_weights_that_are_pickles_are_refused(tmp_path):
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    raw, _ = attacks(str(tmp_path / "executed"))["exec"]
    (tmp_path / "unet" / "diffusion_pytorch_model.bin").write_bytes(raw)
    with pytest.raises(OSError, match="safetensors"):
        Denoiser.from_diffusers(tmp_path / "unet", scheduler=TABLE)
    assert not (tmp_path / "executed").exists()


# -- scheduler configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear"}, {"beta_schedule": "scaled_linear", "beta_start": 0.001, "num_train_timesteps": 50},
        {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2, 0.3]},
        {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)  # fmt: skip
def test_tables_are_diffusers_own(config):
    """To float32, which diffusers' tables are made in (1e-5 of a product of a thousand factors)."""
    scheduler = diffusers.DDIMScheduler(**config)
    found, schedule, _ = meaning({"_class_name": "DDIMScheduler", **scheduler.config})
    bar = torch.tensor(schedule.alphas_bar)
    torch.testing.assert_close(bar.float(), scheduler.alphas_cumprod, rtol=3e-5, atol=1e-7)
    assert found == ("v" if "prediction_type" in config else "eps")


def test_sigmoid_table():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    schedule = meaning({"_class_name": "DDPMScheduler", **scheduler.config})[1]
    torch.testing.assert_close(
        torch.tensor(schedule.alphas_bar).float(), scheduler.alphas_cumprod, rtol=3e-5, atol=1e-7
    )


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_diffusers_own(tokens, kind):
    config = {"use_dynamic_shifting": True, "time_shift_type": kind}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    schedule = meaning({"_class_name": type(scheduler).__name__, **scheduler.config}, tokens=tokens)[1]
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    for t in (0.1, 0.5, 0.9):
        expected = scheduler.time_shift(mu, 1.0, torch.tensor([t], dtype=torch.float64))
        assert math.isclose(float(schedule.shifted(t)), float(expected), rel_tol=1e-6)


def test_other_configs():
    multistep = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0,
                 "prediction_type": "flow_prediction"}  # fmt: skip
    assert meaning(multistep)[:2] == ("flow", Flow(3.0, label_scale=1000))
    edm = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.01, "sigma_max": 70.0, "sigma_data": 0.7}
    assert meaning(edm) == ("edm", EDM(0.01, 70.0), 0.7)
    assert meaning(TABLE, prediction="eps")[0] == "eps"


@pytest.mark.parametrize(
    ("config", "prediction", "message"),
    [
        (TABLE, "v", r"prediction: the config of DDIMScheduler says 'epsilon', which is 'eps' here, got 'v'"),
        (
            {**TABLE, "prediction_type": "u"},
            None,
            "prediction_type must be one of epsilon, .*, got 'u' in DDIMScheduler",
        ),
        ({**TABLE, "prediction_type": "flow_prediction"}, None, "contradicts its table of betas"),
        ({**TABLE, "use_flow_sigmas": True}, None, "'epsilon', which contradicts its flow sigmas"),
        (
            {**TABLE, "rescale_betas_zero_snr": True},
            None,
            "rescale_betas_zero_snr and prediction_type 'epsilon', which contr",
        ),
        ({**TABLE, "beta_schedule": "x"}, None, "beta_schedule must be linear, scaled_linear, .*, got 'x'"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, None, "has neither betas nor flow sigmas"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, None, "only 'epsilon'"),
        ({**FLOW, "invert_sigmas": True}, None, "flows from data to noise are not supported"),
        ({**FLOW, "use_dynamic_shifting": True}, None, "sample_shape: the flow shift .* depends on it"),
    ],
)
def test_contradictions(config, prediction, message):
    with pytest.raises(ValueError, match=message):
        meaning(config, prediction=prediction)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match="scheduler: a bare UNet2DModel does not say what it predicts"):
        Denoiser.from_diffusers(unet())
    with pytest.raises(ValueError, match="network: Linear is not known; known models are UNet2DModel"):
        Denoiser.from_diffusers(torch.nn.Linear(1, 1), scheduler=TABLE)
    with pytest.raises(TypeError, match="source: must be a pipeline, a model or a path, got int"):
        Denoiser.from_diffusers(3)
    with pytest.raises(FileNotFoundError, match="is not a folder of diffusers"):
        Denoiser.from_diffusers(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has neither model_index\.json nor config\.json"):
        Denoiser.from_diffusers(tmp_path)
    with pytest.raises(ValueError, match="takes 9 channels and returns 4; inputs beside the state"):
        Denoiser.from_diffusers(text_unet(in_channels=9), scheduler=TABLE)
    with pytest.raises(TypeError, match="scheduler: must be a scheduler or its config, got int"):
        Denoiser.from_diffusers(unet(), scheduler=3)
    with pytest.raises(ValueError, match="x: Flux needs even sides, got 7 x 8"):
        load("flux")[0](noise(2, 4, 7, 8), 1.0, **POOLED)
    with pytest.raises(ValueError, match="cond: the network needs 'encoder_hidden_states'"):
        load("stable diffusion")[0](noise(2, 4, 8, 8), 1.0)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "text_encoder": ["transformers", "T"]}))
    with pytest.raises(ValueError, match="has none of unet, transformer, it has text_encoder"):
        Denoiser.from_diffusers(tmp_path)
