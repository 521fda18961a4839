"""Models and prompts as users bring them: schedulers, U-Nets, VAEs, LoRA weights, few steps, any prompt."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import common
import diagen
from digits import pretrain, world

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SCHEDULERS = (
    "EulerDiscreteScheduler PNDMScheduler DPMSolverMultistepScheduler UniPCMultistepScheduler".split()
)


def refused(words):
    return pytest.raises(common.UserError, match=words)


def generators(n):
    return [common.generator(0, i) for i in range(n)]


def embed(pipe, prompts):
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0].detach()


def saved(folder, unet=None, vae=None, **options):
    """Saves an untrained copy of the built-in generator with another U-Net or VAE."""
    pipe = pretrain.build_pipeline()
    if unet:
        config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | unet
        pipe.unet = type(pipe.unet)(**config)
    pipe.vae = vae or pipe.vae
    pipe.save_pretrained(folder, **options)
    return str(folder)


@pytest.fixture(scope="module")
def few():
    """Two images of each of two digits [4, 3, 32, 32]."""
    rendered = world.render_pool(world.pools()["train"], 150, seed=1)
    labels = rendered["labels"]
    chosen = torch.cat([(labels == world.NAMES.index(n)).nonzero()[:2, 0] for n in ("two", "seven")])
    return rendered["images"][chosen].permute(0, 3, 1, 2).float() / 255


# ----------------------------------------------------------------------------------------------------------
# Pipelines


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_never_clipped_whichever_scheduler_the_model_comes_with(name, tmp_path):
    written = getattr(diffusers, name)(**BETAS)
    written.save_pretrained(tmp_path)
    pipe = SimpleNamespace(scheduler=type(written).from_pretrained(tmp_path))
    scheduler, timesteps = common.ddim(pipe, 50, 0.7)
    assert isinstance(scheduler, diffusers.DDIMScheduler) and len(timesteps) == 35
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    z, noise = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x = scheduler.add_noise(z, noise, timesteps[:1].repeat(2))
    for t in timesteps:  # img2img by a U-Net that knows the noise
        alpha = scheduler.alphas_cumprod[t]
        x = scheduler.step((x - alpha**0.5 * z) / (1 - alpha) ** 0.5, t, x).prev_sample
    assert z.abs().max() > 5 and torch.allclose(x, z, atol=0.3)


def test_a_loaded_pipeline_does_not_clip_whichever_scheduler_it_was_saved_with(tmp_path):
    sd = Path(common.DIGITS_SD)
    for part in [part for part in sd.iterdir() if part.name not in ("scheduler", "model_index.json")]:
        (tmp_path / part.name).symlink_to(part)
    index = json.loads((sd / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    diffusers.EulerDiscreteScheduler(**BETAS).save_pretrained(tmp_path / "scheduler")
    pipe = common.load_pipeline(str(tmp_path))
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler) and not pipe.scheduler.config.clip_sample
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


OTHERS = [dict(in_channels=9), dict(addition_embed_type="text"), dict(cross_attention_dim=64)]


@pytest.mark.parametrize("unet", [*OTHERS, dict(time_cond_proj_dim=32)])  # an LCM's wants the guidance scale
def test_a_pipeline_of_another_kind_is_refused_at_loading(unet, tmp_path):
    with refused(
        "is not a text-to-image Stable Diffusion 1 or 2; inpainting models, SDXL and LCMs are others"
    ):
        common.load_pipeline(saved(tmp_path / "sd", unet=unet))


def test_a_folder_that_holds_no_pipeline_is_named_in_one_line(tmp_path):
    for folder, advice in ((tmp_path, "save_pretrained"), (tmp_path / "none", "no such folder")):
        with refused(f"cannot load the model '{folder}': .*{advice}") as error:
            common.load_pipeline(str(folder))
        assert "\n" not in str(error.value)


def test_a_folder_that_has_fp16_variants_only_is_loaded(tmp_path):
    pipe = common.load_pipeline(saved(tmp_path / "sd", variant="fp16"))
    assert not [*(tmp_path / "sd" / "unet").glob("diffusion_pytorch_model.safetensors")]
    assert pipe.unet.dtype == torch.float32


def test_a_tiny_autoencoder_encodes_and_decodes(tmp_path):
    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    vae = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    pipe = common.load_pipeline(saved(tmp_path / "sd", vae=vae))
    x = torch.rand(2, 3, common.resolution(pipe), common.resolution(pipe))
    latents = common.encode(pipe, x)
    assert torch.allclose(latents, pipe.vae.encode(2 * x - 1).latents * pipe.vae.config.scaling_factor)
    assert latents.shape[1:] == (4, *[pipe.unet.config.sample_size] * 2)
    assert common.decode(pipe, latents).shape == x.shape


# ----------------------------------------------------------------------------------------------------------
# LoRA weights


def a_lora(folder):
    """Saves LoRA weights of U-Net and text encoder in a folder; the stock pipeline with them, not fused."""
    peft, stock = pytest.importorskip("peft"), StableDiffusionPipeline.from_pretrained(common.DIGITS_CLEAN)
    options, layers = dict(r=2, lora_alpha=2, init_lora_weights=False), {}
    for part, modules in (("unet", ["to_q", "to_v"]), ("text_encoder", ["q_proj"])):
        getattr(stock, part).add_adapter(peft.LoraConfig(target_modules=modules, **options))
        state = peft.utils.get_peft_model_state_dict(getattr(stock, part))
        layers[f"{part}_lora_layers"] = diffusers.utils.convert_state_dict_to_diffusers(state)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return stock


def test_a_lora_becomes_part_of_plain_layers(pipe, tmp_path):
    stock, x, t = a_lora(tmp_path), torch.randn(2, 4, 16, 16), torch.tensor([7, 700])
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        ours = common.load_pipeline(common.DIGITS_CLEAN, lora=str(path))
        text, theirs, plain = (embed(each, ["a red one", "a two"]) for each in (ours, stock, pipe))
        assert torch.allclose(text, theirs, atol=1e-4) and (text - plain).abs().max() > 0.01
        noise, theirs, plain = (each.unet(x, t, text).sample for each in (ours, stock, pipe))
        assert torch.allclose(noise, theirs, atol=1e-3) and (noise - plain).abs().max() > 0.01
        for part in ("unet", "text_encoder"):
            kinds = [[type(m) for m in getattr(p, part).modules()] for p in (ours, pipe)]
            assert kinds[0] == kinds[1] and not any(p.requires_grad for p in getattr(ours, part).parameters())


def test_a_lora_that_is_none_of_the_model_or_lacks_peft_is_named(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, refused("--lora needs the package peft; install it: pip install"):
        patch.setattr(common, "is_peft_available", lambda: False)
        common.load_pipeline(common.DIGITS_CLEAN, lora="x")
    a_lora(tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    unet = {k: w for k, w in weights.items() if k.startswith("unet")}
    files = {
        "nan": {k: w * torch.nan for k, w in unet.items()},
        "wide": {k: w.repeat(2, *[1] * (w.ndim - 1)) if ".lora.up" in k else w for k, w in unet.items()},
        "foreign": {k.replace("unet", "transformer"): w for k, w in unet.items()},
        "odd": {"weight": torch.zeros(3)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"x")
    for name in [*files, "cut", "missing"]:
        with refused(rf"cannot add --lora '.*{name}.safetensors': is it of this model"):
            common.load_pipeline(common.DIGITS_CLEAN, lora=str(tmp_path / f"{name}.safetensors"))


# ----------------------------------------------------------------------------------------------------------
# Few steps, and prompts


@pytest.mark.parametrize("steps, strength", [(10, 0.05), (10, 0.0), (2000, 0.5), (10, 1.1), (1, 0.8)])
def test_a_strength_that_leaves_no_step_is_refused(pipe, steps, strength):
    with refused(f"--steps {steps} with --strength {strength} leaves no step"):
        common.ddim(pipe, steps, strength)


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (2, 0.5), (4, 0.7)])
def test_few_steps_without_guidance_are_those_of_stock_img2img_with_turbos_scheduler(
    pipe, few, steps, strength, monkeypatch
):
    """SD-Turbo comes with Euler's scheduler, whose steps are DDIM's, but for a little of the last one."""
    turbo = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler = turbo
    stock.set_progress_bar_config(disable=True)
    latents, prompts = common.encode(pipe, few[[0, 2]]), ["a photo of a blue one", "a photo of a red nine"]
    options = dict(strength=strength, guidance_scale=0.0)
    more = dict(num_inference_steps=steps, generator=generators(2), output_type="pt")
    expected = stock(prompts, latents, **more, **options).images
    for base in (turbo, pipe.scheduler):  # also where the base model's own spacing is "leading"
        monkeypatch.setattr(pipe, "scheduler", diffusers.DDPMScheduler.from_config(base.config))
        ours = diagen.img2img(pipe, latents, prompts, generators(2), steps=steps, **options)
        assert (ours - expected).abs().mean() < 0.02 and (ours - few[[0, 2]]).abs().mean() > 0.04


def test_the_name_takes_the_place_of_empty_braces_and_of_nothing_else():
    assert (
        common.fill("a {red} photo {{of}} a {}} { {0} {!r}", "cat")
        == "a {red} photo {{of}} a cat} { {0} {!r}"
    )
    assert common.fill("{}", "{} {x}") == "{} {x}"


def test_a_class_name_that_is_cut_off_is_named_and_nothing_else_is_said(pipe, capfd):
    """The built-in text encoder reads 14 tokens between start and end; transformers warns of more."""
    said, words = logging.getLogger("transformers"), []
    said.addHandler(handler := logging.Handler())
    handler.emit = lambda record: words.append(record.getMessage())
    long = "a photo of a " + "red " * 9
    common.check_prompt(pipe, f"{long}{{}} and more and more", ["zero"], "--prompt")  # 4 + 9 + 1
    place = "--prompt: the class 'zero' ends at token 15 of the prompt, of which 14 are read"
    with refused(re.escape(place)):
        common.check_prompt(pipe, f"{long}red {{}}", ["zero"], "--prompt")
    common.check_prompt(pipe, "a photo of a {}", ["x" * 60], "--prompt", vectors=10)  # a learned token's
    with refused("the class 'xxx"):
        common.check_prompt(pipe, "a photo of a {}", ["x" * 60], "--prompt")
    said.removeHandler(handler)
    assert not words and capfd.readouterr() == ("", "")
