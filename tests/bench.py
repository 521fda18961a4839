"""Times each method's generation, and measures its GPU memory, against the stock pipeline at equal steps.

    python tests/bench.py                       the embedded generator on the CPU
    python tests/bench.py --methods dreamda     one method alone
    python tests/bench.py --batch_sizes 1 4 8   on a GPU: the full architecture of Stable Diffusion (2.1 for
                                                ActGen, 1.5 for the others), random weights, bf16, 512x512
    python tests/bench.py --flops               counts the operations of an ActGen image, on any machine
    python tests/bench.py --scale 10000 100000  what grows with the data set, at so many images

The calls of a table take turns, so that a change in the machine's load meets all of them. What is timed:
    ActGen     its most expensive setting: guide, attention mask, and both losses on for every image
    DreamDA    a batch of variations of one source image, with its inversion
    DIAGen     a batch of img2img, and Textual Inversion
"""

import argparse
import itertools
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import actgen  # noqa: E402
import common  # noqa: E402
import diagen  # noqa: E402
import dreamda  # noqa: E402
from digits import pretrain, world  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
NAMES = world.NAMES
PROMPT = "a photo of a {}"
BATCH = {"actgen": 16, "dreamda": 8, "diagen": 16}  # default batch sizes


def stable_diffusion(version: str, device=DEVICE):
    """The full architecture of Stable Diffusion 1.5 or 2.1 with random weights. Nothing is downloaded."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width, heads, layers, act = (768, 12, 12, "quick_gelu") if version == "1.5" else (1024, 16, 23, "gelu")
    tokenizer = pretrain.build_tokenizer(["a", "photo", "of", *NAMES], max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=act,
    )
    unet = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=width)
    unet |= {"attention_head_dim": 8 if version == "1.5" else (5, 10, 20, 20)}
    unet |= {"use_linear_projection": version != "1.5"}
    vae = dict(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with torch.device(device):
        parts = [AutoencoderKL(**vae), CLIPTextModel(text), UNet2DConditionModel(**unet)]
    vae, text_encoder, unet = (p.to(torch.bfloat16).eval().requires_grad_(False) for p in parts)
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae.to(memory_format=torch.channels_last),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.to(memory_format=torch.channels_last),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(b: int) -> list[str]:
    return [PROMPT.format(NAMES[i % 10]) for i in range(b)]


def generators(b: int) -> list[torch.Generator]:
    return [common.generator(i) for i in range(b)]


def stock_pipeline(pipeline_class, pipe, scheduler):
    """A stock pipeline of pipe's parts, without progress bar."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    pipeline = pipeline_class(**parts, requires_safety_checker=False)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def actgen_calls(pipe, steps):
    """By name: (a function that makes a batch of b images, the number of images it makes if not b).

    The first is the stock pipeline, to which the others are compared.
    """
    scale = 15.0 if GPU else 4.0
    size = 224 if GPU else 32
    classifier = common.build_classifier("resnet50" if GPU else "small_cnn", NAMES, size).to(DEVICE).eval()
    pixels, side = common.resolution(pipe), pipe.unet.config.sample_size
    bank = {y: torch.randn(200, pipe.unet.config.in_channels, side, side, device=DEVICE) for y in range(10)}
    steps, resolution = steps or 40, 16 if GPU else 8
    options = dict(steps=steps, prompt=PROMPT, guidance_scale=scale, attention_resolution=resolution)

    def stock(b):
        options = dict(num_inference_steps=steps, guidance_scale=scale, output_type="pt")
        pipe(prompts(b), generator=generators(b), **options)

    def guided(b, **losses):
        guides, labels = torch.rand(b, 3, pixels, pixels), torch.arange(b) % 10
        actgen.generate(pipe, guides, labels, NAMES, generators=generators(b), **options, **losses)

    def with_losses(b):
        guided(b, classifier=classifier, bank=bank, classifier_size=size)

    return {
        "stock StableDiffusionPipeline, DDPM": (stock, None),
        "ActGen, image guidance and mask": (guided, None),
        "ActGen, both losses on every image": (with_losses, None),
    }


def dreamda_calls(pipe, steps):
    """See actgen_calls."""
    from diffusers import CycleDiffusionPipeline, DDIMScheduler, StableDiffusionImg2ImgPipeline

    steps, scale = steps or 100, 7.5
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    img2img = stock_pipeline(StableDiffusionImg2ImgPipeline, pipe, ddim)
    cycle = stock_pipeline(CycleDiffusionPipeline, pipe, ddim)
    pixels = common.resolution(pipe)
    options = dict(strength=0.8, num_inference_steps=steps, guidance_scale=scale, eta=1.0)

    def stock(b):
        images = torch.rand(b, 3, pixels, pixels)
        img2img(prompts(b), images, generator=generators(b), output_type="pt", **options)

    def one_source(b):
        image, sources = torch.rand(1, 3, pixels, pixels), torch.zeros(b, dtype=torch.long)
        inverted = dreamda.invert(pipe, image, generators(1), steps=steps, rows=2 * b)
        latents = dreamda.vary(pipe, inverted, sources, prompts(b), generators(b), guidance_scale=scale)
        common.decode(pipe, latents)

    def path_each(b):  # the paths share z_T
        image = torch.rand(1, 3, pixels, pixels).expand(b, -1, -1, -1)
        starts = [common.generator(0) for _ in range(b)]
        options = dict(steps=steps, rows=2 * b, start_generators=starts)
        inverted = dreamda.invert(pipe, image, generators(b), **options)
        sources = torch.arange(b)
        latents = dreamda.vary(pipe, inverted, sources, prompts(b), generators(b), guidance_scale=scale)
        common.decode(pipe, latents)

    def stock_cycle(b):
        image, source = torch.rand(1, 3, pixels, pixels), dict(source_guidance_scale=1.5)
        cycle(prompts(1)[0], "", image, generator=generators(1)[0], output_type="np", **source, **options)

    return {
        "stock StableDiffusionImg2ImgPipeline, DDIM": (stock, None),
        "DreamDA, one image inverted and varied": (one_source, None),
        "DreamDA, a path for each variation": (path_each, None),
        "stock CycleDiffusionPipeline, one image": (stock_cycle, 1),
    }


def diagen_calls(pipe, steps):
    """See actgen_calls."""
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    steps, scale = steps or 50, 15.0
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    img2img = stock_pipeline(StableDiffusionImg2ImgPipeline, pipe, ddim)
    pixels = common.resolution(pipe)
    options = dict(strength=0.7, num_inference_steps=steps, guidance_scale=scale, output_type="pt")

    def stock(b):
        img2img(prompts(b), torch.rand(b, 3, pixels, pixels), generator=generators(b), **options)

    def batched(b):
        with torch.no_grad():  # four real images, each encoded once
            latents = common.encode(pipe, torch.rand(max(1, b // 4), 3, pixels, pixels))
        latents = latents.repeat_interleave(-(-b // len(latents)), 0)[:b]
        diagen.img2img(pipe, latents, prompts(b), generators(b), steps=steps, guidance_scale=scale)

    def one_by_one(b):
        for prompt, generator in zip(prompts(b), generators(b), strict=True):
            img2img(prompt, torch.rand(1, 3, pixels, pixels), generator=generator, **options)

    def inversion(b):  # b steps on 4 images of one class
        images, labels = torch.rand(4, 3, pixels, pixels), torch.zeros(4, dtype=torch.long)
        start = diagen.initial_embeddings(pipe, ["one"])
        diagen.textual_inversion(pipe, images, labels, ["<one>"], start, steps=b)

    return {
        "stock StableDiffusionImg2ImgPipeline, DDIM": (stock, None),
        "DIAGen": (batched, None),
        "stock, one image a call": (one_by_one, None),
        "Textual Inversion, a step of 4 images": (inversion, None),
    }


def count_flops(steps: int = 40, gradient_steps: int = 10) -> None:
    """Prints the TFLOP of an image by ActGen with Stable Diffusion 2.1 and both losses. Computes nothing."""
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


def measure(call, b: int) -> tuple[float, float]:
    """The seconds of call(b), and the peak GPU memory in GiB (0 on the CPU)."""
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter()
    call(b)
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - clock, torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


def time_method(calls: dict, b: int, rounds: int) -> None:
    """Prints a row for each call: median seconds per image, and their ratio to those of the first call."""
    seconds, memory = {name: [] for name in calls}, {}
    for turn in range(rounds + 1):
        for name, (call, images) in calls.items():
            spent, memory[name] = measure(call, b)
            if turn > 0:  # the first round warms up
                seconds[name].append(spent / (images or b))
    stock = torch.tensor(next(iter(seconds.values())))
    for name, values in seconds.items():
        values = torch.tensor(values)
        ratio, peak = (values / stock).median(), f"{memory[name]:.1f}" if GPU else "-"
        print(f"| {b} | {name} | {values.median():.4f} | {ratio:.2f} | {peak} |")


# What grows with a data set, at n images of 1,000 classes. Images and latents are small and the classifier is
# a stub, so that nothing else counts.


def many_images(n: int) -> common.Images:
    """n image files, which need not exist."""
    return common.Images([Path(f"train/{i % 1000}/{i}.png") for i in range(n)], [i % 1000 for i in range(n)])


def plan(n: int, folder: Path) -> None:
    """ActGen holds out gen-val, and puts an epoch's images together and in order."""
    data = common.Data([str(c) for c in range(1000)], many_images(n), many_images(0))
    real, gen_val = actgen.hold_out(actgen.resolve(actgen.Args(dataset="imagenet", genval_share=0.1)), data)
    loader = common.Loader(real + gen_val, 256, common.make_accelerator(), samples=n).shuffle(0)
    assert sum(1 for _ in loader.batches.batch_sampler) == n // 256


def metadata(n: int, folder: Path) -> None:
    """DreamDA's records of a variation of each image are made, looked for, written, and read again."""
    data = common.Data([str(c) for c in range(1000)], many_images(n), many_images(0))
    records = dreamda.records_of(dreamda.resolve(dreamda.Args(dataset="imagenet")), data)
    run = common.Run(argparse.Namespace(out=folder, overwrite=False), common.make_accelerator())
    next(run.missing("drawing", [folder / record["file_name"] for record in records], 10))
    for record in records:
        record["file_name"] = "metadata.jsonl"  # a file that exists
    run.write("metadata.jsonl", records)
    assert common.read_records(folder, data.class_names) == records


def bank(n: int, folder: Path) -> None:
    """ActGen's variants enter training images and memory bank in 65 epochs; a batch of each draws of it."""
    run, synthetic = argparse.Namespace(path=folder), actgen.Synthetic(None)
    common.write_file(folder / "latents" / "0.pt", torch.zeros(4, 16, 16, dtype=torch.float16))
    for epoch in range(65):
        rows = range(epoch * n // 65, (epoch + 1) * n // 65)
        synthetic.add(run, [dict(file_name="0.png", label=i % 1000, guided=True) for i in rows])
        labels = torch.arange(8)
        actgen.draw_banks(synthetic.bank, labels, labels >= 0, generators(8), "cpu")
    assert sum(map(len, synthetic.bank.values())) == n


def targets(n: int, folder: Path) -> None:
    """AMST labels n images by four heads."""
    from PIL import Image

    class Stub(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)).view(-1, 1, 1) * torch.linspace(0, 50, 1000).expand(5, -1)

    args, to_tensor = dreamda.resolve(dreamda.Args(dataset="imagenet")), common.make_transforms(8, "none")[1]
    images = common.Images([Image.new("RGB", (8, 8), (200, 100, 50))] * n, [0] * n, to_tensor)
    pool = dreamda.Pool(images, torch.zeros(n, dtype=torch.long))
    args.workers = 0
    dreamda.predict_targets(args, common.make_accelerator(), Stub(), pool, "amst")


SCALE = {"planning": plan, "metadata": metadata, "memory bank": bank, "AMST's targets": targets}


def cost(task, n: int) -> tuple[float, float]:
    """The CPU seconds of task(n), and the bytes by which it lifts the peak memory of a process of its own."""

    def measured(pipe):
        with tempfile.TemporaryDirectory() as folder:
            torch.set_num_threads(1)
            before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            task(n, Path(folder))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send((time.process_time() - clock, 1024 * (peak - before)))

    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(its,))
    process.start()
    its.close()
    return mine.recv()


def measure_scale(counts: list[int]) -> None:
    """Prints the time and the memory per image of each of SCALE, for data sets of growing size."""
    print("| what | images | µs/image | peak memory, GiB | bytes/image |\n|---|---|---|---|---|")
    for (name, task), n in itertools.product(SCALE.items(), counts):
        seconds, peak = cost(task, n)
        print(
            f"| {name} | {n:,} | {1e6 * seconds / n:.0f} | {peak / 2**30:.2f} | {peak / n:.0f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=[*BATCH], choices=[*BATCH])
    parser.add_argument("--batch_sizes", type=int, nargs="+", help=f"by default {BATCH}")
    parser.add_argument("--rounds", type=int, default=3, help="number of times that each call is timed")
    parser.add_argument("--steps", type=int, help="sampling steps; by default the method's own")
    parser.add_argument("--flops", action="store_true", help="count operations instead")
    parser.add_argument("--scale", type=int, nargs="+", help="measure what grows with so many images instead")
    options = parser.parse_args()
    if options.flops:
        return count_flops()
    if options.scale:
        return measure_scale(options.scale)
    machine = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}; torch {torch.__version__}; medians of {options.rounds} rounds, interleaved")
    print("| batch | what | s/image | ratio to stock | peak GPU memory, GiB |\n|---|---|---|---|---|")
    calls, version, pipe = dict(actgen=actgen_calls, dreamda=dreamda_calls, diagen=diagen_calls), None, None
    for method in options.methods:
        wanted = ("2.1" if method == "actgen" else "1.5") if GPU else "the embedded generator"
        if wanted != version:
            pipe = None  # frees the memory of the one before
            pipe = stable_diffusion(wanted) if GPU else common.load_pipeline(common.DIGITS_SD)
            version = wanted
        for b in options.batch_sizes or [BATCH[method]]:
            time_method(calls[method](pipe, options.steps), b, options.rounds)


if __name__ == "__main__":
    main()
