"""Models and prompts as users bring them: schedulers, U-Nets, VAEs, few steps, any prompt."""

import logging
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import common
import diagen
from digits import pretrain
from runs import generators, held_out, refused

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def saved(folder, unet=None, variant=None, **parts):
    """Saves an untrained copy of the built-in generator with another U-Net or other parts."""
    pipe = pretrain.build_pipeline()
    if unet:
        config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | unet
        pipe.unet = type(pipe.unet)(**config)
    pipe.register_modules(**parts)
    pipe.save_pretrained(folder, variant=variant)
    return str(folder)


@pytest.mark.parametrize("name", ["EulerDiscrete", "PNDM", "DPMSolverMultistep", "UniPCMultistep"])
def test_latents_are_never_clipped_whichever_scheduler_the_model_comes_with(name, tmp_path):
    written = getattr(diffusers, f"{name}Scheduler")(**BETAS)
    written.save_pretrained(tmp_path)
    pipe = SimpleNamespace(scheduler=type(written).from_pretrained(tmp_path))
    scheduler, timesteps = common.ddim(pipe, 50, 0.7)
    assert isinstance(scheduler, diffusers.DDIMScheduler) and len(timesteps) == 35
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding


OTHERS = [dict(in_channels=9), dict(addition_embed_type="text"), dict(cross_attention_dim=64)]


@pytest.mark.parametrize("unet", [*OTHERS, dict(time_cond_proj_dim=32)])  # an LCM's wants the guidance scale
def test_a_pipeline_of_another_kind_is_refused_at_loading(unet, tmp_path):
    with refused("is SDXL, an LCM or for inpainting, not Stable Diffusion 1 or 2"):
        common.load_pipeline(saved(tmp_path / "sd", unet=unet))


def test_a_tiny_autoencoder_encodes_and_decodes(tmp_path):
    blocks = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    vae = diffusers.AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    pipe = common.load_pipeline(saved(tmp_path / "sd", vae=vae))
    x = torch.rand(2, 3, *[pipe.unet.config.sample_size * pipe.vae_scale_factor] * 2)
    latents = common.encode(pipe, x)
    assert torch.allclose(latents, pipe.vae.encode(2 * x - 1).latents * pipe.vae.config.scaling_factor)
    assert latents.shape[1:] == (4, *[pipe.unet.config.sample_size] * 2)
    assert common.decode(pipe, latents).shape == x.shape


@pytest.mark.parametrize("steps, strength", [(10, 0.05), (10, 0.0), (2000, 0.5), (10, 1.1), (1, 0.8)])
def test_a_strength_that_leaves_no_step_is_refused(pipe, steps, strength):
    with refused(f"--steps {steps} with --strength {strength} leaves no step"):
        common.ddim(pipe, steps, strength)


@pytest.mark.parametrize("steps, strength", [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (2, 0.5), (4, 0.7)])
def test_few_steps_without_guidance_are_those_of_stock_img2img_with_turbos_scheduler(
    pipe, steps, strength, monkeypatch
):
    """SD-Turbo comes with Euler's scheduler, whose steps are DDIM's, but for a little of the last one."""
    images, turbo = held_out(2)[0], diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler = turbo
    stock.set_progress_bar_config(disable=True)
    latents, prompts = common.encode(pipe, images), ["a photo of a blue one", "a photo of a red nine"]
    options = dict(strength=strength, guidance_scale=0.0)
    more = dict(num_inference_steps=steps, generator=generators(2), output_type="pt")
    expected = stock(prompts, latents, **more, **options).images
    monkeypatch.setattr(pipe, "scheduler", diffusers.DDPMScheduler.from_config(turbo.config))
    ours = diagen.img2img(pipe, latents, prompts, generators(2), steps=steps, **options)
    assert (ours - expected).abs().mean() < 0.02 and (ours - images).abs().mean() > 0.04


def test_a_class_name_that_is_cut_off_is_named_and_nothing_else_is_said(pipe, capfd):
    """The built-in text encoder reads 14 tokens between start and end; transformers warns of more."""
    said, words = logging.getLogger("transformers"), []
    said.addHandler(handler := logging.Handler())
    handler.emit = lambda record: words.append(record.getMessage())
    long = "a photo of a " + "red " * 9
    common.check_prompt(pipe, f"{long}{{}} and more and more", ["zero"], "--prompt")  # 4 + 9 + 1
    place = "--prompt: 'zero' ends at token 15, but 14 are read"
    with refused(re.escape(place)):
        common.check_prompt(pipe, f"{long}red {{}}", ["zero"], "--prompt")
    common.check_prompt(pipe, "a photo of a {}", ["x" * 60], "--prompt", learned=True)
    with refused("'xxx"):
        common.check_prompt(pipe, "a photo of a {}", ["x" * 60], "--prompt")
    said.removeHandler(handler)
    assert not words and capfd.readouterr() == ("", "")
