"""Seconds per image of ActGen's guided generation against the stock pipeline at equal steps, and peak memory.

    python tests/bench.py                          digits_sd on the CPU: batch 16, 40 DDPM steps, interleaved
    python tests/bench.py --batch_sizes 1 4 8      with a GPU: Stable Diffusion 2.1-base's architecture with
                                                   random weights, bf16, 512x512

Both losses on for every image, guide and attention mask on: the most expensive setting.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402


def stable_diffusion_21(device):
    """The full architecture of stable-diffusion-2-1-base with random weights (nothing is downloaded)."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = common.build_tokenizer(["a", "photo", "of", *common.DIGIT_NAMES], max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
        num_attention_heads=16, hidden_act="gelu",
    )  # fmt: skip
    unet = dict(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024, use_linear_projection=True,
    )  # fmt: skip
    vae = dict(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with torch.device(device):
        parts = [AutoencoderKL(**vae), CLIPTextModel(text), UNet2DConditionModel(**unet)]
    parts = [p.to(torch.bfloat16).eval().requires_grad_(False) for p in parts]
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    pipe = StableDiffusionPipeline(
        vae=parts[0], text_encoder=parts[1], tokenizer=tokenizer, unet=parts[2], scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if gpu:
        pipe, scale, prompt, centre = stable_diffusion_21(device), 15.0, "a photo of {}", 16
        classifier, size = common.build_classifier("resnet50", common.DIGIT_NAMES, 224).to(device).eval(), 224
    else:
        pipe, scale, prompt, centre = (
            common.load_pipeline(str(common.ROOT / "digits_sd")),
            4.0,
            "a photo of a {}",
            8,
        )
        classifier, size = common.build_classifier("small_cnn", common.DIGIT_NAMES, 32).eval(), 32
    pixels, latent = (
        common.resolution(pipe),
        (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2),
    )
    bank = {y: torch.randn(200, *latent, device=device) * 0.5 for y in range(10)}

    def stock(b):
        pipe(
            [prompt.format(common.DIGIT_NAMES[i % 10]) for i in range(b)], num_inference_steps=options.steps,
            guidance_scale=scale, generator=[common.generator(i) for i in range(b)], output_type="pt",
        )  # fmt: skip

    def guided(b):
        actgen.generate(
            pipe, torch.rand(b, 3, pixels, pixels), torch.arange(b) % 10, common.DIGIT_NAMES, classifier,
            generators=[common.generator(i) for i in range(b)], bank=bank, steps=options.steps, prompt=prompt,
            guidance_scale=scale, attention_resolution=centre, classifier_size=size,
        )  # fmt: skip

    def guided_without_losses(b):
        actgen.generate(
            pipe, torch.rand(b, 3, pixels, pixels), torch.arange(b) % 10, common.DIGIT_NAMES,
            generators=[common.generator(i) for i in range(b)], steps=options.steps, prompt=prompt,
            guidance_scale=scale, attention_resolution=centre,
        )  # fmt: skip

    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}; torch {torch.__version__}; {options.steps} steps, {pixels} px, median of {options.rounds}"
    )
    print("| batch | what | s/image | ratio to stock | peak GPU memory, GiB |\n|---|---|---|---|---|")
    for b in options.batch_sizes or [16]:
        seconds, memory = {}, {}
        for turn in range(options.rounds + 1):  # the first warms up
            for run in (stock, guided_without_losses, guided):
                if gpu:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                clock = time.perf_counter()
                run(b)
                if gpu:
                    torch.cuda.synchronize()
                    memory[run.__name__] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
                if turn:
                    seconds.setdefault(run.__name__, []).append((time.perf_counter() - clock) / b)
        base = torch.tensor(seconds["stock"])
        for what, values in seconds.items():
            values = torch.tensor(values)
            ratio = (values / base).median()
            print(f"| {b} | {what} | {values.median():.4f} | {ratio:.2f} | {memory.get(what, '-')} |")


if __name__ == "__main__":
    main()
