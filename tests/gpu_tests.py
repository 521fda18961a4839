"""What a GPU would run: on a pretend GPU, which refuses tensors of the CPU; and in half precision on the CPU.

On the pretend GPU everything has to give what it gives on the CPU, up to rounding, and the host may not wait
for the device more often than it must.
"""

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

GPU = pretend_gpu.DEVICE
DIGITS = dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, image_size=32)


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


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
    """Four held-out digits: images [4, 3, 32, 32], labels, prompts."""
    r = world.render_pool(world.pools()["test"], 4, seed=5)
    prompts = [f"a photo of a {world.NAMES[y]}" for y in r["labels"]]
    return r["images"].permute(0, 3, 1, 2).float() / 255, r["labels"], prompts


@pytest.fixture(scope="module")
def data():
    """A digits world of 40 training images and 20 of each other split."""
    splits = {}
    for i, name in enumerate(("train", "val", "test", "test_ood")):
        pool = world.render_pool(world.pools()["train" if i < 2 else "test"], 80 if i == 0 else 20, seed=i)
        splits[name] = [Image.fromarray(image) for image in pool["images"].numpy()], pool["labels"].tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "splits", lambda style: splits)
        yield common.load_data("digits", "", 32, "digits", per_class=4)


# --- the pretend GPU itself


def test_it_refuses_what_a_gpu_refuses():
    here, there = torch.arange(3.0), torch.arange(3.0).to(GPU)
    number = torch.tensor(2.0)
    refused = [
        lambda: here + there,
        lambda: torch.where(there > 0, there, here),
        lambda: torch.stack([there[0], number]),
        lambda: number.add_(there[0]),
        lambda: here[there.long()],
        lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
        lambda: torch.nn.Linear(3, 1)(there),
        lambda: torch.randn(3, device=GPU, generator=torch.Generator()),
    ]
    for operation in refused:
        with pytest.raises(RuntimeError, match="same device|generator"):
            operation()
    with pytest.raises(RuntimeError, match="numpy"):
        there.numpy()
    assert_same(here + number, there + number)
    assert_same(here[[2, 0]], there[torch.tensor([2, 0])])


def test_it_counts_how_often_the_host_waits():
    there, mask = torch.arange(3.0).to(GPU), (torch.arange(3) > 0).to(GPU)

    def waits(operation):
        count = pretend_gpu.waits(operation)
        return count["read"], count["upload"]

    assert waits(lambda: (there * 2 + torch.tensor(1.0)).sum() > 3) == (0, 0)
    assert waits(lambda: torch.where(mask, there, 0.0)) == (0, 0)
    assert waits(lambda: there.sum().item()) == waits(lambda: there.cpu()) == (1, 0)
    assert waits(lambda: there[mask]) == waits(lambda: mask.nonzero()) == (1, 0)
    assert waits(lambda: there[torch.tensor([0])]) == waits(lambda: torch.ones(3).to(GPU)) == (0, 1)


# --- ActGen's sampler


def guided(pipe, sources, n=4, **options):
    """Variants with both losses, guides, mask, and a bank; the last image is plain text-to-image."""
    images, labels, _ = (part[:n] for part in sources)
    oracle = common.load_oracle().to(pipe.device)
    bank = {int(y): torch.randn(3, 4, 16, 16, generator=common.generator(int(y))).half() for y in labels}
    options = dict(steps=4, gradient_steps=2, guidance_centre=2.0, nu=0.3, bank=bank, **DIGITS) | options
    options |= dict(
        generators=generators(n), guided=torch.arange(n) < n - 1, adversarial=torch.arange(n) != 1
    )
    return actgen.generate(pipe, images, labels, world.NAMES, lambda x: oracle(x)[:, :10], **options)


def test_the_guided_sampler(pipe, on_gpu, sources):
    for options in ({}, {"channel_steps": True, "nu": 0.03}):
        here, there = guided(pipe, sources, **options), guided(on_gpu, sources, **options)
        for parts in zip(here, there, strict=True):
            assert_same(*parts)
    without = guided(pipe, sources, nu=0.0)[0]
    assert (without - here[0]).abs().amax((1, 2, 3))[:3].min() > 1e-2  # the losses do something


def test_the_guided_samplers_waits_do_not_grow_with_the_batch(on_gpu, sources):
    def waits(n, steps, gradient_steps):
        options = dict(steps=steps, gradient_steps=gradient_steps)
        return pretend_gpu.waits(lambda: guided(on_gpu, sources, n, **options))

    a_step, a_guided_step = {}, {}
    for n in (2, 4):
        start, step, guided_step = waits(n, 1, 0), waits(n, 2, 0), waits(n, 2, 1)
        assert start["read"] == step["read"] == guided_step["read"] <= 1
        a_step[n] = step["upload"] - start["upload"]
        a_guided_step[n] = guided_step["upload"] - start["upload"]
    assert a_step[2] == a_step[4] <= 8 and a_guided_step[2] == a_guided_step[4] <= 20


# --- DreamDA's inversion and variation


@pytest.mark.parametrize("inversion, prompt", [("cycle", ""), ("cycle", "a one"), ("ddim", ""), ("none", "")])
def test_inversion(pipe, on_gpu, sources, inversion, prompt):
    options = dict(inversion=inversion, source_prompts=[prompt] * 4, steps=5)
    here, there = (dreamda.invert(p, sources[0], generators(4), **options) for p in (pipe, on_gpu))
    for part in ("start", "noise"):
        assert_same(getattr(here, part), getattr(there, part))


def varied(pipe, sources, inversion="cycle", **options):
    """Latents of two variations of the first image and one of the last."""
    images, _, prompts = sources
    inverted = dreamda.invert(pipe, images, generators(len(images)), inversion=inversion, steps=5)
    which, prompts = torch.tensor([0, 0, len(images) - 1]), [prompts[0], prompts[0], prompts[-1]]
    options = dict(noise_scale=0.5, relative_noise=True, guidance_scale=4.0) | options
    return dreamda.vary(pipe, inverted, which, prompts, generators(3, 1), **options)


@pytest.mark.parametrize("perturb", ["bottleneck", "up", "latents"])
def test_variation(pipe, on_gpu, sources, perturb):
    assert_same(varied(pipe, sources, perturb=perturb), varied(on_gpu, sources, perturb=perturb))


def test_inversion_and_variation_wait_only_for_their_noise(on_gpu, sources):
    def waits(n, steps):
        part, options = (torch.arange(n), sources[2][:n], generators(n)), dict(steps=steps, strength=1.0)
        inverted = dreamda.invert(on_gpu, sources[0][:n], generators(n), **options)
        invert = pretend_gpu.waits(lambda: dreamda.invert(on_gpu, sources[0][:n], generators(n), **options))
        vary = pretend_gpu.waits(lambda: dreamda.vary(on_gpu, inverted, *part))
        assert invert["read"] == vary["read"] == 0
        return invert["upload"], vary["upload"]

    for n in (1, 2):
        (invert, vary), (invert_more, vary_more) = waits(n, 2), waits(n, 3)
        assert invert_more - invert == 1
        assert vary_more - vary == 2  # each of the two rows of guidance has noise of its own


# --- DIAGen's variations and Textual Inversion


def edited(pipe, sources, steps=5):
    images, _, prompts = sources
    z = common.encode(pipe, images)
    return diagen.img2img(pipe, z, prompts, generators(len(z)), steps=steps, guidance_scale=4.0)


def test_img2img(pipe, on_gpu, sources):
    assert_same(edited(pipe, sources), edited(on_gpu, sources))
    waits = [pretend_gpu.waits(lambda n=n: edited(on_gpu, sources, n)) for n in (5, 10)]
    assert waits[0]["read"] == waits[1]["read"] == 0
    assert waits[1]["upload"] - waits[0]["upload"] <= 4  # a timestep each; strength 0.7: 3 and 7 steps


def invert_text(device, sources, tokens=2, steps=4, dtype=None):
    """Learned embeddings, with noise, and the pipeline, whose table has them."""
    pipe = common.load_pipeline(common.DIGITS_CLEAN, device, dtype)
    start, names = diagen.initial_embeddings(pipe, world.NAMES[:tokens]), [f"<{i}>" for i in range(tokens)]
    options = dict(steps=steps, batch_size=2, lr=0.01)
    rows = diagen.textual_inversion(pipe, sources[0], torch.arange(4) % tokens, names, start, **options)
    noisy = diagen.noisy_embeddings(rows, [0.0, 0.5], generators(tokens), relative=True)
    diagen.place_tokens(pipe, ["<a>"], noisy[0, 1:])
    return start, rows, noisy, pipe


def test_textual_inversion(sources):
    start, *here = invert_text("cpu", sources)
    _, *there = invert_text(GPU, sources)
    assert (start - here[0]).abs().max() > 1e-2
    assert_same(here[0], there[0])
    assert_same(here[1], there[1])
    prompts = ["a photo of a <0>", "a photo of a <a>"]
    text = [pipe.encode_prompt(prompts, pipe.device, 1, False)[0] for pipe in (here[2], there[2])]
    assert_same(*text)


def test_textual_inversions_waits_do_not_grow_with_the_tokens(sources):
    def waits(tokens, steps):
        return pretend_gpu.waits(lambda: invert_text(GPU, sources, tokens, steps))

    a_step = {}
    for tokens in (1, 2):
        one, two = waits(tokens, 1), waits(tokens, 2)
        assert one["read"] == two["read"]
        a_step[tokens] = two["upload"] - one["upload"]
    assert a_step[1] == a_step[2] <= 6


# --- training and evaluation


def new_training(accelerator, data, optimizer="adamw"):
    """A small classifier with its optimizer, and a function that trains it for an epoch."""
    args = SimpleNamespace(classifier="small_cnn", pretrained=True, image_size=32, seed=0, head_lr=1.0)
    args.optimizer, args.lr, args.weight_decay = optimizer, 1e-3, 0.05
    net, model, optimizer = common.new_classifier(args, accelerator, data.class_names)

    def train(epoch: int, images=16):
        order = common.shuffled(images, images, epoch)
        batches = common.load(data.train, 8, accelerator, order=order, seed=(epoch,))
        return common.train_epoch(model, batches, optimizer, [1e-3] * len(batches), accelerator)

    return net, optimizer, train


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_and_evaluation(engine, data, optimizer):
    results = []
    for device in ("cpu", GPU):
        accelerator = engine(device)
        net, _, train = new_training(accelerator, data, optimizer)
        losses = [train(epoch) for epoch in range(2)]
        logits, labels = common.predict(net, data.test, accelerator)
        assert logits.device.type == labels.device.type == "cpu"
        results.append((losses, common.evaluate(net, data, accelerator), logits, labels, net.state_dict()))
    here, there = results
    assert_alike(here[:2], there[:2], 0.01)
    assert torch.allclose(here[2], there[2], atol=1e-2) and torch.equal(here[3], there[3])
    for name, value in here[4].items():
        assert_same(value, there[4][name])


def test_training_reads_nothing_from_the_device_until_an_epoch_ends(engine, data):
    _, _, train = new_training(engine(GPU), data)
    short, long = (pretend_gpu.waits(lambda n=n: train(0, n)) for n in (8, 24))
    assert short["read"] == long["read"] and long["upload"] - short["upload"] == 2 * 3  # x, y and i


def test_a_checkpoint_comes_back_on_the_device(engine, data, tmp_path):
    accelerator = engine(GPU)

    def train_until(name, last):
        run = common.Run(SimpleNamespace(out=tmp_path / name, overwrite=False, seed=0), accelerator)
        (net, state, train), best = new_training(accelerator, data), diagen.Best()
        for epoch in run.epochs("net", 3, model=net, optimizer=state, best=best):
            if epoch > last:
                break
            run.log(loss=train(epoch))
            best.judge(epoch, -epoch, net)
        return net, best

    straight, _ = train_until("straight", 1)
    train_until("stopped", 0)
    resumed, best = train_until("stopped", 1)  # moments of the optimizer on the CPU would be an error
    for name, value in straight.state_dict().items():
        assert_same(value.cpu(), resumed.state_dict()[name])
    assert best["epoch"] == 0
    resumed.load_state_dict(best["weights"])  # as they were in the file, on the CPU
    assert {p.device for p in resumed.parameters()} == {GPU}


def test_the_oracle_reads_the_same(engine, data):
    here, there = (data.truth(data.test, engine(device)) for device in ("cpu", GPU))
    assert torch.equal(here, there)


# --- whole runs

ACTGEN = dict(epochs=4, images_per_epoch=3, steps=3, gradient_steps=2, generation_batch_size=2)
ACTGEN |= dict(examples_per_class=4, genval_share=0.25, batch_size=8, eval_every=4)
DREAMDA = dict(epochs=1, variations=2, steps=4, batch_size=20, examples_per_class=2)
DIAGEN = dict(epochs=1, iterations=2, batch_size=8, filter_epochs=1, examples_per_class=1, variations=2)
DIAGEN |= dict(steps=4, inversion_steps=2, inversion_batch_size=1)
RUNS = {actgen: ACTGEN, dreamda: DREAMDA, diagen: DIAGEN}


def a_run(script, accelerator, out):
    """The result of a run of the script, its metadata and metrics; its synthetic images."""
    args = script.METHOD.arguments(**RUNS[script], baseline=False, out=str(out))
    result = common.run_once(script.METHOD, args, accelerator)
    files = ("synthetic/metadata.jsonl", "metrics.jsonl")
    records, metrics = (common.read_file(out / name) for name in files)
    images = [np.asarray(Image.open(out / "synthetic" / record["file_name"])) for record in records]
    return {"result": result, "records": records, "metrics": metrics}, np.stack(images).astype(int)


@pytest.mark.parametrize("script", RUNS)
def test_a_run(engine, data, tmp_path, script):
    """All of it: generation, memory bank, pseudo-labels, filter, training, evaluation, checkpoints."""
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


@pytest.mark.parametrize("script", RUNS)
def test_a_run_in_bf16(bf16, data, tmp_path, script):
    out, images = a_run(script, bf16, tmp_path)
    assert bf16.mixed_precision == "bf16"
    assert all(math.isfinite(line["loss"]) for line in out["metrics"])
    assert (images.std((1, 2, 3)) > 5).all()


# --- half precision

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_half_precision_draws_nearly_the_same(pipe, sources, dtype):
    half, two = common.load_pipeline(common.DIGITS_CLEAN, dtype=dtype), [part[:2] for part in sources]
    for draw in (
        lambda pipe: guided(pipe, two, 2, steps=6, nu=0.05)[0],
        lambda pipe: common.decode(pipe, varied(pipe, two)),
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
        lambda pipe: varied(pipe, sources, "ddim", perturb="none"),  # cycle undoes the rounding of a step
        lambda pipe: edited(pipe, sources),
    ):
        latents, expected = draw(half), draw(pipe)
        assert latents.dtype == torch.float32 and torch.allclose(latents, expected, atol=1e-5)


def test_textual_inversion_in_bf16(sources):
    start, full, *_ = invert_text("cpu", sources)
    _, half, _, pipe = invert_text("cpu", sources, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and pipe.text_encoder.dtype == torch.bfloat16
    assert torch.cosine_similarity((full - start).flatten(), (half - start).flatten(), dim=0) > 0.8


def test_the_generator_leaves_the_gpu_while_the_language_model_is_asked(monkeypatch):
    pipe = common.load_pipeline(common.DIGITS_CLEAN, GPU)

    def where():
        return {part.device.type for part in (pipe.unet, pipe.vae, pipe.text_encoder)}

    def ask(model, names, *_):
        assert where() == {"cpu"}
        return [["a {}"] for _ in names]

    monkeypatch.setattr(diagen, "ask_llm", ask)
    text = diagen.write_prompts(diagen.METHOD.arguments(prompts="llm"), ["owl"], pipe)
    assert "owl;0;a {name}" in text and where() == {GPU.type}
