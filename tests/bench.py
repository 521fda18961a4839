"""Times training, and each method's sampler against the stock pipeline at equal steps.

    python tests/bench.py                       the built-in generator on the CPU
    python tests/bench.py --methods dreamda     one method alone
    python tests/bench.py --batch_sizes 1 4 8   on a GPU: the full architecture of Stable Diffusion (2.1 for
                                                ActGen, 1.5 for the others), random weights, bf16, 512x512

The calls of a table take turns, so that a change in the machine's load meets all of them. What is timed:
    ActGen     its most expensive setting: guide, attention mask, and both losses on for every image
    DreamDA    inversion and variation, with a path for each image
    DIAGen     img2img, and steps of Textual Inversion
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import pretrain, world  # noqa: E402

GPU, NAMES = torch.cuda.is_available(), world.NAMES
BATCH = {"training": 64, "actgen": 16, "dreamda": 8, "diagen": 16}


def stable_diffusion(version: str):
    """The full architecture of Stable Diffusion 1.5 or 2.1 with random weights. Nothing is downloaded."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, heads, layers, act = (768, 12, 12, "quick_gelu") if version == "1.5" else (1024, 16, 23, "gelu")
    text = dict(vocab_size=49408, hidden_size=width, intermediate_size=4 * width, hidden_act=act)
    text |= dict(num_hidden_layers=layers, num_attention_heads=heads)
    unet = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=width)
    unet |= dict(attention_head_dim=8 if version == "1.5" else (5, 10, 20, 20))
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae = dict(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4
    )
    with torch.device("cuda"):
        parts = (
            AutoencoderKL(**vae, **blocks),
            CLIPTextModel(CLIPTextConfig(**text)),
            UNet2DConditionModel(**unet),
        )
    vae, text, unet = (part.to(torch.bfloat16).eval().requires_grad_(False) for part in parts)
    parts = dict(vae=vae, text_encoder=text, unet=unet, safety_checker=None, feature_extractor=None)
    parts |= dict(tokenizer=pretrain.build_tokenizer(["a", "photo", "of", *NAMES], max_length=77))
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    parts |= dict(scheduler=DDPMScheduler(clip_sample=False, **noise), requires_safety_checker=False)
    pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls_of(method: str, b: int) -> dict:
    """Functions by name, each for b images; the first is the one to which the others are compared."""
    args = SimpleNamespace(classifier="resnet50" if GPU else "small_cnn", pretrained=False, seed=0)
    args = SimpleNamespace(
        **vars(args), image_size=224 if GPU else 32, optimizer="sgd", lr=0.1, weight_decay=0, head_lr=1
    )
    accelerator = common.make_accelerator()
    net, model, optimizer = common.new_classifier(args, accelerator, NAMES)
    if method == "training":
        data = common.load_data("digits", "", args.image_size, "crop")

        def epoch(augment):
            images = data.train.seen(common.make_transforms(args.image_size, augment)[0]).subset(range(b))
            batches = common.load(images, b, accelerator, seed=(0,))
            common.train_epoch(model, batches, optimizer, [0.1], accelerator)

        return {
            augment: lambda a=augment: epoch(a) for augment in ("none", "crop", "resized", "crop+randaugment")
        }

    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    pipe = (
        stable_diffusion("2.1" if method == "actgen" else "1.5")
        if GPU
        else common.load_pipeline(common.DIGITS_SD)
    )
    pixels, side, y = common.resolution(pipe), pipe.unet.config.sample_size, torch.arange(b) % 10
    images, prompts = torch.rand(b, 3, pixels, pixels), [f"a photo of a {NAMES[i]}" for i in y]
    generators, stock = [common.generator(i) for i in range(b)], dict(guidance_scale=7.5, output_type="pt")
    if method == "actgen":
        options = dict(generators=generators, prompt="a photo of a {}", steps=40, guidance_scale=7.5)
        options |= dict(attention_resolution=16 if GPU else 8, image_size=args.image_size)
        losses = dict(classifier=net.eval(), bank={c: torch.randn(200, 4, side, side) for c in range(10)})
        return {
            "stock text-to-image": lambda: pipe(
                prompts, num_inference_steps=40, generator=generators, **stock
            ),
            "ActGen, guide and mask": lambda: actgen.generate(pipe, images, y, NAMES, **options),
            "ActGen, both losses": lambda: actgen.generate(pipe, images, y, NAMES, **options, **losses),
        }
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    parts |= dict(scheduler=DDIMScheduler.from_config(pipe.scheduler.config))
    img2img = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)

    def of_stock(steps, strength):
        options = dict(strength=strength, num_inference_steps=steps, generator=generators, **stock)
        return img2img(prompts, images, **options)

    def of_dreamda():
        inverted = dreamda.invert(pipe, images, generators)
        common.decode(pipe, dreamda.vary(pipe, inverted, torch.arange(b), prompts, generators))

    @torch.no_grad()
    def of_diagen():
        diagen.img2img(pipe, common.encode(pipe, images), prompts, generators, guidance_scale=7.5)

    def inversion():  # b steps on 4 images
        start = diagen.initial_embeddings(pipe, ["one"])
        diagen.textual_inversion(pipe, images[:4], torch.zeros(len(images[:4])), ["<one>"], start, steps=b)

    if method == "dreamda":
        return {"stock img2img": lambda: of_stock(100, 0.8), "DreamDA, inversion and variation": of_dreamda}
    return {
        "stock img2img": lambda: of_stock(50, 0.7),
        "DIAGen": of_diagen,
        "Textual Inversion, a step": inversion,
    }


def time_calls(calls: dict, b: int, rounds: int) -> None:
    """Prints a row for each call: median seconds per image, and their ratio to those of the first call."""
    seconds, memory = {name: [] for name in calls}, {}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            clock = time.perf_counter()
            call()
            if GPU:
                torch.cuda.synchronize()
                memory[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            if turn > 0:  # the first round warms up
                seconds[name].append((time.perf_counter() - clock) / b)
    first = torch.tensor(next(iter(seconds.values())))
    for name, values in seconds.items():
        values = torch.tensor(values)
        ratio = (values / first).median()
        print(f"| {b} | {name} | {values.median():.4f} | {ratio:.2f} | {memory.get(name, '-')} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=[*BATCH], choices=[*BATCH])
    parser.add_argument("--batch_sizes", type=int, nargs="+", help=f"by default {BATCH}")
    parser.add_argument("--rounds", type=int, default=3, help="number of times that each call is timed")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; medians of {options.rounds} rounds, interleaved")
    print("| batch | what | s/image | ratio to the first | peak GPU memory, GiB |\n|---|---|---|---|---|")
    for method in options.methods:
        for b in options.batch_sizes or [BATCH[method]]:
            time_calls(calls_of(method, b), b, options.rounds)


if __name__ == "__main__":
    main()
