"""Times training, and each method's sampler against the stock pipeline at equal steps.

    python tests/bench.py                       the built-in generator on the CPU
    python tests/bench.py --methods dreamda     one method alone
    python tests/bench.py --batch_sizes 1 4 8   on a GPU: the full architecture of Stable Diffusion (2.1 for
                                                ActGen, 1.5 for the others), random weights, bf16, 512x512

The calls of a table take turns, so that a change in the machine's load meets all of them.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import world  # noqa: E402
from runs import stable_diffusion  # noqa: E402

GPU, NAMES = torch.cuda.is_available(), world.NAMES
BATCH = {"training": 64, "actgen": 16, "dreamda": 8, "diagen": 16}


def calls_of(method: str, b: int) -> dict:
    """Functions by name, each for b images; the first is the one to which the others are compared."""
    args = dict(pretrained=False, seed=0, optimizer="sgd", lr=0.1, weight_decay=0, head_lr=1, frozen=False)
    args |= dict(classifier="resnet50" if GPU else "small_cnn", image_size=224 if GPU else 32)
    args = SimpleNamespace(**args)
    accelerator = common.make_accelerator()
    net, model, optimizer = common.new_classifier(args, accelerator, NAMES)
    if method == "training":
        data = common.load_data("digits", "", args.image_size, "crop")

        def epoch(augment):
            images = data.train.seen(common.make_transforms(args.image_size, augment)[0]).subset(range(b))
            batches = common.load(images, b, accelerator, seed=(0,))
            common.train_epoch(model, batches, optimizer, [0.1], accelerator)

        return {a: partial(epoch, a) for a in ("none", "crop", "resized", "crop+randaugment")}

    version = "2.1" if method == "actgen" else "1.5"
    pipe = stable_diffusion(version, "cuda") if GPU else common.load_pipeline(common.DIGITS_SD)
    side, scale, y = pipe.unet.config.sample_size, pipe.vae_scale_factor, torch.arange(b) % 10
    images, prompts = torch.rand(b, 3, scale * side, scale * side), [f"a photo of a {NAMES[i]}" for i in y]
    generators, stock = [common.generator(i) for i in range(b)], dict(guidance_scale=7.5, output_type="pt")
    if method == "actgen":
        options = dict(generators=generators, prompt="a photo of a {}", steps=40, guidance_scale=7.5)
        options |= dict(attention_resolution=16 if GPU else 8, image_size=args.image_size)
        losses = dict(classifier=net.eval(), bank={c: [*torch.randn(200, 4, side, side)] for c in range(10)})
        stock |= dict(num_inference_steps=40, generator=generators)
        return {
            "stock text-to-image": lambda: pipe(prompts, **stock),
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
        start = diagen.initial_embedding(pipe, "one")
        diagen.textual_inversion(pipe, images[:4], "<one>", start, steps=b)

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
