"""Seconds per image of each method's generation against the stock pipeline at equal steps, and peak memory.

    python tests/bench.py                          digits_sd on the CPU, the calls of a table interleaved
    python tests/bench.py --methods dreamda        one method
    python tests/bench.py --batch_sizes 1 4 8      with a GPU: Stable Diffusion's full architecture (2.1 for
                                                   ActGen, else 1.5), random weights, bf16, 512x512
    python tests/bench.py --flops                  counts an ActGen image's operations instead, on any machine

ActGen: both losses on for every image, guide and attention mask on, its most expensive setting. DreamDA: a
batch is the variations of one seed, its inversion included. DIAGen: a batch of img2img; Textual Inversion.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = common.DIGIT_NAMES
PROMPT = "a photo of a {}"
BATCH = {"actgen": 16, "dreamda": 8, "diagen": 16}  # on the CPU


def stable_diffusion(version: str, device=DEVICE):
    """The full architecture of Stable Diffusion 1.5 or 2.1-base, random weights (nothing is downloaded)."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, heads, layers, act = (768, 12, 12, "quick_gelu") if version == "1.5" else (1024, 16, 23, "gelu")
    tokenizer = common.build_tokenizer(["a", "photo", "of", *NAMES], max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, hidden_act=act,
    )  # fmt: skip
    unet = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=width)
    unet |= {"attention_head_dim": 8 if version == "1.5" else (5, 10, 20, 20)}
    unet |= {"use_linear_projection": version != "1.5"}
    vae = dict(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    with torch.device(device):
        parts = [AutoencoderKL(**vae), CLIPTextModel(text), UNet2DConditionModel(**unet)]
    parts = [p.to(torch.bfloat16).eval().requires_grad_(False) for p in parts]
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=parts[0], text_encoder=parts[1], tokenizer=tokenizer, unet=parts[2], scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(b):
    return [PROMPT.format(NAMES[i % 10]) for i in range(b)]


def generators(b):
    return [common.generator(i) for i in range(b)]


def quiet(pipeline_class, pipe, scheduler):
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipeline = pipeline_class(**parts, requires_safety_checker=False)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def actgen_calls(pipe, steps):
    """name -> (call of a batch size, images it makes); the first is the stock pipeline."""
    scale = 15.0 if GPU else 4.0
    size = 224 if GPU else 32
    classifier = common.build_classifier("resnet50" if GPU else "small_cnn", NAMES, size).to(DEVICE).eval()
    pixels, side = common.resolution(pipe), pipe.unet.config.sample_size
    bank = {y: torch.randn(200, pipe.unet.config.in_channels, side, side, device=DEVICE) for y in range(10)}
    common_arguments = dict(
        steps=steps or 40, prompt=PROMPT, guidance_scale=scale, attention_resolution=16 if GPU else 8
    )

    def stock(b):
        pipe(
            prompts(b), num_inference_steps=steps or 40, guidance_scale=scale, generator=generators(b),
            output_type="pt",
        )  # fmt: skip

    def guided(b, **losses):
        actgen.generate(
            pipe, torch.rand(b, 3, pixels, pixels), torch.arange(b) % 10, NAMES, generators=generators(b),
            **common_arguments, **losses,
        )  # fmt: skip

    def with_losses(b):
        guided(b, classifier=classifier, bank=bank, classifier_size=size)

    return {
        "stock StableDiffusionPipeline, DDPM": (stock, None),
        "ActGen, image guidance and mask": (guided, None),
        "ActGen, both losses on every image": (with_losses, None),
    }


def dreamda_calls(pipe, steps):
    from diffusers import CycleDiffusionPipeline, DDIMScheduler, StableDiffusionImg2ImgPipeline

    steps, scale = steps or 100, 7.5
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    img2img = quiet(StableDiffusionImg2ImgPipeline, pipe, ddim)
    cycle = quiet(CycleDiffusionPipeline, pipe, ddim)
    pixels = common.resolution(pipe)
    options = dict(strength=0.8, num_inference_steps=steps, guidance_scale=scale, eta=1.0)

    def stock(b):
        images = torch.rand(b, 3, pixels, pixels)
        img2img(prompts(b), images, generator=generators(b), output_type="pt", **options)

    def one_seed(b):
        inverted = dreamda.invert(
            pipe, torch.rand(1, 3, pixels, pixels), generators(1), steps=steps, rows=2 * b
        )
        seeds = torch.zeros(b, dtype=torch.long)
        common.decode(
            pipe, dreamda.vary(pipe, inverted, seeds, prompts(b), generators(b), guidance_scale=scale)
        )

    def stock_cycle(b):
        cycle(
            prompts(1)[0], "", torch.rand(1, 3, pixels, pixels), source_guidance_scale=1.5,
            generator=generators(1)[0], output_type="np", **options,
        )  # fmt: skip

    return {
        "stock StableDiffusionImg2ImgPipeline, DDIM": (stock, None),
        "DreamDA, one seed inverted and varied": (one_seed, None),
        "stock CycleDiffusionPipeline, one image": (stock_cycle, 1),
    }


def diagen_calls(pipe, steps):
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    steps, scale = steps or 50, 15.0
    stock_pipeline = quiet(
        StableDiffusionImg2ImgPipeline, pipe, DDIMScheduler.from_config(pipe.scheduler.config)
    )
    pixels = common.resolution(pipe)
    options = dict(strength=0.7, num_inference_steps=steps, guidance_scale=scale, output_type="pt")

    def stock(b):
        stock_pipeline(prompts(b), torch.rand(b, 3, pixels, pixels), generator=generators(b), **options)

    def batched(b):
        with torch.no_grad():  # four real images, each encoded once
            latents = common.encode(pipe, torch.rand(max(1, b // 4), 3, pixels, pixels))
        latents = latents.repeat_interleave(-(-b // len(latents)), 0)[:b]
        diagen.img2img(pipe, latents, prompts(b), generators(b), steps=steps, guidance_scale=scale)

    def one_by_one(b):
        for i in range(b):
            stock_pipeline(
                prompts(b)[i], torch.rand(1, 3, pixels, pixels), generator=generators(b)[i], **options
            )

    def inversion(b):  # b steps on 4 images of one class
        tokens, start = ["<one>"], diagen.initial_embeddings(pipe, ["one"])
        diagen.textual_inversion(
            pipe, torch.rand(4, 3, pixels, pixels), torch.zeros(4, dtype=torch.long), tokens, start, steps=b
        )

    return {
        "stock StableDiffusionImg2ImgPipeline, DDIM": (stock, None),
        "DIAGen": (batched, None),
        "stock, one image a call": (one_by_one, None),
        "Textual Inversion, a step of 4 images": (inversion, None),
    }


def count_flops(steps: int = 40, gradient_steps: int = 10) -> None:
    """Prints TFLOP of an image by ActGen with Stable Diffusion 2.1, both losses on; computes nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe = stable_diffusion("2.1", "meta")

    def tflop(call, *shape):
        x = torch.empty(1, *shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = call(x).sample
            forward = counter.get_total_flops() / 1e12
            out.sum().backward()
        return forward, counter.get_total_flops() / 1e12 - forward

    z, t = torch.empty(1, 4, 64, 64, device="meta", dtype=torch.bfloat16), torch.empty((), device="meta")
    forward, backward = tflop(lambda text: pipe.unet(z, t, text), 77, 1024)
    unet = 2 * steps * forward + gradient_steps * backward
    print("| pixels decoded for L_adv | U-Net | L_adv's decoder | final decoder | TFLOP per image |")
    print("|---|---|---|---|---|")
    image = tflop(pipe.vae.decode, 4, 64, 64)[0]
    for pixels in (512, 256, 128):
        decoder = gradient_steps * sum(tflop(pipe.vae.decode, 4, pixels // 8, pixels // 8))
        total = unet + decoder + image
        print(f"| {pixels} | {unet:.1f} | {decoder:.1f} | {image:.1f} | {total:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=[*BATCH], choices=[*BATCH])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--flops", action="store_true")
    options = parser.parse_args()
    if options.flops:
        return count_flops()
    name = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}; medians of {options.rounds} rounds, interleaved")
    print("| batch | what | s/image | ratio to stock | peak GPU memory, GiB |\n|---|---|---|---|---|")
    pipes = {}
    for method in options.methods:
        version = ("2.1" if method == "actgen" else "1.5") if GPU else "digits_sd"
        if version not in pipes:
            pipes = {
                version: stable_diffusion(version)
                if GPU
                else common.load_pipeline(str(common.ROOT / "digits_sd"))
            }
        calls = globals()[f"{method}_calls"](pipes[version], options.steps)
        for b in options.batch_sizes or [BATCH[method]]:
            seconds, memory = {}, {}
            for turn in range(options.rounds + 1):  # the first warms up
                for what, (call, images) in calls.items():
                    if GPU:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                    clock = time.perf_counter()
                    call(b)
                    if GPU:
                        torch.cuda.synchronize()
                        memory[what] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
                    if turn:
                        seconds.setdefault(what, []).append((time.perf_counter() - clock) / (images or b))
            base = torch.tensor(next(iter(seconds.values())))
            for what, values in seconds.items():
                values = torch.tensor(values)
                ratio = (values / base).median()
                print(f"| {b} | {what} | {values.median():.4f} | {ratio:.2f} | {memory.get(what, '-')} |")


if __name__ == "__main__":
    main()
