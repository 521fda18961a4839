"""On a pretend GPU all gives what it gives on the CPU, with few waits; and half precision, on the CPU."""

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import actgen
import common
import diagen
import dreamda
import pretend_gpu
from digits import world
from runs import DIGITS, each_script, generators, held_out

GPU = pretend_gpu.DEVICE


def assert_same(here, there, tolerance=1e-3):
    """Equal up to rounding, of one dtype; `here` comes from the CPU, `there` is on the pretend GPU."""
    assert there.device == GPU and here.device.type == "cpu" and there.dtype == here.dtype
    assert there.shape == here.shape and here.isfinite().all()
    assert (there.cpu() - here).abs().max() <= tolerance * max(1.0, here.abs().max().item())


def assert_alike(here, there, tolerance=0.05):
    """The same JSON value, its floats equal up to the tolerance. Seconds are not compared."""
    if isinstance(here, dict):
        assert here.keys() == there.keys()
        for key in here.keys() - {"seconds", "training", "generation"}:
            assert_alike(here[key], there[key], tolerance)
    elif isinstance(here, list | tuple):
        assert len(here) == len(there)
        for a, b in zip(here, there, strict=True):
            assert_alike(a, b, tolerance)
    else:
        same = pytest.approx(here, rel=tolerance, abs=tolerance) if isinstance(here, float) else here
        assert there == same


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(common, "save_curves", lambda *_: None)


@pytest.fixture(scope="module")
def on_gpu():
    """The embedded Stable Diffusion on the pretend GPU."""
    return common.load_pipeline(common.DIGITS_CLEAN, GPU)


@pytest.fixture
def engine(monkeypatch):
    """engine(device): Accelerate's engine for the device, to be used before the next call."""

    def for_device(device):
        accelerator = common.make_accelerator()
        for state in (PartialState(), accelerator.state):
            monkeypatch.setattr(state, "device", torch.device(device))
        return accelerator

    return for_device


@pytest.fixture(scope="module")
def sources():
    return held_out(4)


@pytest.fixture(scope="module")
def data(few_digits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "splits", lambda style: few_digits)
        yield common.load_data("digits", "", 32, "digits", examples_per_class=4)


def waits(call):
    """The reads and the uploads for which the host waits."""
    count = pretend_gpu.waits(call)
    return count["read"], count["upload"]


def test_it_refuses_what_a_gpu_refuses_and_counts_waits():
    here, there, number = torch.arange(3.0), torch.arange(3.0).to(GPU), torch.tensor(2.0)
    for operation in (
        lambda: here + there,
        lambda: torch.stack([there[0], number]),
        lambda: number.add_(there[0]),
        lambda: here[there.long()],
        lambda: torch.nn.Linear(3, 1)(there),
        lambda: torch.randn(3, device=GPU, generator=torch.Generator()),
        lambda: there.numpy(),
    ):
        with pytest.raises(RuntimeError, match="same device|generator|numpy"):
            operation()
    assert_same(here[[2, 0]] + number, there[torch.tensor([2, 0])] + number)
    assert waits(lambda: (there * 2 + number).sum() > 3) == (0, 0)
    assert waits(lambda: there.sum().item()) == waits(lambda: there[there > 0]) == (1, 0)
    assert waits(lambda: there[torch.tensor([0])]) == waits(lambda: torch.ones(3).to(GPU)) == (0, 1)


def more_uploads(call, few, many, reads=0):
    """How many uploads more call(many) waits for than call(few); both for so many reads at most."""
    before, after = (waits(lambda n=n: call(n)) for n in (few, many))
    assert before[0] == after[0] <= reads
    return after[1] - before[1]


def guided(pipe, sources, n=4, **options):
    """Variants with both losses, guides, mask, and a bank; the last image is plain text-to-image."""
    images, labels, *_ = (part[:n] for part in sources)
    oracle = common.load_oracle().to(pipe.device)
    bank = {y: [*torch.randn(3, 4, 16, 16, generator=common.generator(y)).half()] for y in labels.tolist()}
    options = dict(steps=4, gradient_steps=2, guidance_centre=2.0, nu=0.3, bank=bank) | options
    options |= dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, image_size=32)
    options |= dict(guided=torch.arange(n) < n - 1, adversarial=torch.arange(n) != 1)
    options["generators"] = generators(n)
    return actgen.generate(pipe, images, labels, world.NAMES, lambda x: oracle(x)[:, :10], **options)


def test_the_guided_sampler_whose_waits_do_not_grow_with_the_batch(pipe, on_gpu, sources):
    for options in ({}, {"channel_steps": True, "nu": 0.03}):
        here, there = guided(pipe, sources, **options), guided(on_gpu, sources, **options)
        for parts in zip(here, there, strict=True):
            assert_same(*parts)
    without = guided(pipe, sources, nu=0.0)[0]
    assert (without - here[0]).abs().amax((1, 2, 3))[:3].min() > 1e-2  # the losses do something
    step, guided_step = [], []
    for n in (2, 4):
        draw = functools.partial(guided, on_gpu, sources, n)
        step.append(more_uploads(lambda s, f=draw: f(steps=s, gradient_steps=0), 1, 2, reads=1))
        guided_step.append(more_uploads(lambda g, f=draw: f(steps=2, gradient_steps=g), 0, 1, reads=1))
    assert step[0] == step[1] <= 8 and guided_step[0] == guided_step[1] <= 12


def varied(pipe, sources, inversion="cycle", source="", perturb="bottleneck"):
    """Start and noise of the inverted images; latents of two variations of the first and one of the last."""
    (images, _, prompts, _), options = sources, dict(inversion=inversion, steps=5)
    options["source_prompts"] = [source] * len(images)
    inverted = dreamda.invert(pipe, images, generators(len(images)), **options)
    which, prompts = torch.tensor([0, 0, len(images) - 1]), [prompts[0], prompts[0], prompts[-1]]
    options = dict(noise_scale=0.5, relative_noise=True, guidance_scale=4.0, perturb=perturb)
    varied = dreamda.vary(pipe, inverted, which, prompts, generators(3, 1), **options)
    return inverted.start, inverted.noise, varied


PATHS = [("cycle", "", "bottleneck"), ("cycle", "a one", "up"), ("ddim", "", "latents"), ("none", "", "none")]


@pytest.mark.parametrize("path", PATHS)
def test_inversion_and_variation(pipe, on_gpu, sources, path):
    for parts in zip(varied(pipe, sources, *path), varied(on_gpu, sources, *path), strict=True):
        assert_same(*parts)


def test_inversion_and_variation_wait_only_for_their_noise(on_gpu, sources):
    for n in (1, 2):

        def invert(steps, n=n):
            return dreamda.invert(on_gpu, sources[0][:n], generators(n), steps=steps, strength=1.0)

        inverted = {steps: invert(steps) for steps in (2, 3)}

        def vary(steps, n=n, inverted=inverted):
            return dreamda.vary(on_gpu, inverted[steps], torch.arange(n), sources[2][:n], generators(n))

        assert more_uploads(invert, 2, 3) == 1
        assert more_uploads(vary, 2, 3) == 2  # each of the two rows of guidance has noise of its own


def edited(pipe, sources, steps=5):
    images, _, prompts, _ = sources
    z = common.encode(pipe, images)
    return diagen.img2img(pipe, z, prompts, generators(len(z)), steps=steps, guidance_scale=4.0)


def test_img2img(pipe, on_gpu, sources):
    assert_same(edited(pipe, sources), edited(on_gpu, sources))
    # a timestep each; strength 0.7: 3 and 7 steps
    assert more_uploads(lambda steps: edited(on_gpu, sources, steps), 5, 10) <= 4


def invert_text(device, sources, steps=4, dtype=None):
    """A learned embedding, it with noise, and the pipeline, whose table has them."""
    pipe = common.load_pipeline(common.DIGITS_CLEAN, device, dtype)
    start, options = diagen.initial_embedding(pipe, "one"), dict(steps=steps, batch_size=2, lr=0.01)
    S = diagen.textual_inversion(pipe, sources[0], "<one>", start, **options)
    noisy = diagen.noisy_embeddings(S[None], [0.0, 0.5], generators(1), relative=True)
    diagen.place_tokens(pipe, ["<a>"], noisy[0, 1:])
    return start, S, noisy, pipe


def test_textual_inversion(sources):
    start, *here = invert_text("cpu", sources)
    _, *there = invert_text(GPU, sources)
    assert (start - here[0]).abs().max() > 1e-2
    assert_same(here[0], there[0])
    assert_same(here[1], there[1])
    prompts = ["a photo of a <one>", "a photo of a <a>"]
    text = [pipe.encode_prompt(prompts, pipe.device, 1, False)[0] for pipe in (here[2], there[2])]
    assert_same(*text)
    assert more_uploads(lambda steps: invert_text(GPU, sources, steps), 1, 2, reads=9) <= 6


def new_training(accelerator, data):
    """A small classifier with its optimizer, and a function that trains it for an epoch."""
    args = SimpleNamespace(classifier="small_cnn", pretrained=True, image_size=32, seed=0, head_lr=1.0)
    args.optimizer, args.lr, args.weight_decay, args.frozen = "adamw", 1e-3, 0.05, False
    net, model, optimizer = common.new_classifier(args, accelerator, data.class_names)

    def train(epoch: int, images=16):
        order = common.shuffled(images, images, epoch)
        batches = common.load(data.train, 8, accelerator, order=order, seed=(epoch,))
        return common.train_epoch(model, batches, optimizer, [1e-3] * len(batches), accelerator)

    return net, optimizer, train


def test_training_stopped_and_gone_on_with_gives_what_the_cpu_gives(engine, data, tmp_path):
    def train_until(name, last, device):
        accelerator = engine(device)
        run = common.Run(SimpleNamespace(out=tmp_path / name, overwrite=False, seed=0), accelerator)
        (net, state, train), best = new_training(accelerator, data), diagen.Best()
        for epoch in run.epochs("net", 3, model=net, optimizer=state, best=best):
            if epoch > last:
                break
            run.log(loss=train(epoch))
            best.judge(epoch, -epoch, net)
        return net, best

    straight, _ = train_until("straight", 1, "cpu")
    train_until("stopped", 0, GPU)
    resumed, best = train_until("stopped", 1, GPU)  # moments of the optimizer on the CPU would be an error
    for name, value in straight.state_dict().items():
        assert_same(value, resumed.state_dict()[name])
    assert best["epoch"] == 0
    resumed.load_state_dict(best["weights"])  # as they were in the file, on the CPU
    assert {p.device for p in resumed.parameters()} == {GPU}
    *_, train = new_training(engine(GPU), data)  # which reads nothing until an epoch ends
    assert more_uploads(lambda images: train(0, images), 8, 24, reads=2) == 2 * 3  # x, y and i


def a_run(script, accelerator, out):
    """The result of a run of the script, its metadata and metrics; its synthetic images."""
    args = script.METHOD.arguments(**DIGITS[script], baseline=False, lr=1e-3, out=str(out))
    result = common.run_once(script.METHOD, args, accelerator)
    records, metrics = (common.read_file(out / f) for f in ("synthetic/metadata.jsonl", "metrics.jsonl"))
    images = [np.asarray(Image.open(out / "synthetic" / record["file_name"])) for record in records]
    return {"result": result, "records": records, "metrics": metrics}, np.stack(images).astype(int)


@each_script
def test_a_run(engine, data, tmp_path, script):
    here, images = a_run(script, engine("cpu"), tmp_path / "cpu")
    there, images_there = a_run(script, engine(GPU), tmp_path / "gpu")
    assert_alike(here, there, 0.1)
    assert np.abs(images - images_there).mean() < 1


@pytest.fixture
def bf16(monkeypatch):
    """Accelerate's engine on the CPU in the precision of a GPU, in which pipelines are loaded, too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(common, "native_dtype", lambda device: torch.bfloat16)
    AcceleratorState._reset_state()
    yield common.make_accelerator()
    AcceleratorState._reset_state()


@each_script
def test_a_run_in_bf16(bf16, data, tmp_path, script):
    out, images = a_run(script, bf16, tmp_path)
    assert bf16.mixed_precision == "bf16"
    assert all(math.isfinite(line["loss"]) for line in out["metrics"])
    assert (images.std((1, 2, 3)) > 5).all()


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_half_precision_draws_nearly_the_same(pipe, sources, dtype):
    half, two = common.load_pipeline(common.DIGITS_CLEAN, dtype=dtype), [part[:2] for part in sources]
    for draw in (
        lambda pipe: guided(pipe, two, 2, steps=6, nu=0.05)[0],
        lambda pipe: common.decode(pipe, varied(pipe, two)[2]),
        lambda pipe: edited(pipe, two, 8),
    ):
        images, expected = draw(half), draw(pipe)
        assert images.dtype == torch.float32 and images.isfinite().all()
        difference = (images - expected).abs().mean((1, 2, 3))
        assert 0 < difference.min() and difference.max() < 6 / 255  # two images differ by 60 or so


@HALF
def test_only_the_networks_compute_in_half_precision(monkeypatch, pipe, sources, dtype):
    """With a U-Net whose output half precision can hold, the samplers' steps give what they give in fp32."""
    half = common.load_pipeline(common.DIGITS_CLEAN, dtype=dtype)
    z = torch.randn(4, 4, 16, 16)
    monkeypatch.setattr(common, "encode", lambda pipe, images: z[: len(images)])
    monkeypatch.setattr(common, "decode", lambda pipe, latents: latents)
    for unet in (pipe.unet, half.unet):  # its own forward pass is for the attention maps

        def forward(x, t, c, own=unet.forward):
            return own(x, t, c) and SimpleNamespace(sample=x.sign() / 2)

        monkeypatch.setattr(unet, "forward", forward)
    for draw in (
        lambda pipe: guided(pipe, sources, nu=0.0, attention_mask=False)[0],
        lambda pipe: varied(pipe, sources, "ddim", perturb="none")[2],  # cycle undoes the rounding of a step
        lambda pipe: edited(pipe, sources),
    ):
        latents, expected = draw(half), draw(pipe)
        assert latents.dtype == torch.float32 and torch.allclose(latents, expected, atol=1e-5)


def test_textual_inversion_in_bf16(sources):
    start, full, *_ = invert_text("cpu", sources)
    _, half, _, pipe = invert_text("cpu", sources, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    assert torch.cosine_similarity((full - start).flatten(), (half - start).flatten(), dim=0) > 0.8
