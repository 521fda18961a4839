"""DIAGen's properties, against stock diffusers, references written by hand, torch-fidelity and the oracle."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch_fidelity.metric_prc import prc_features_to_metric
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
import diagen
from digits import judge, pretrain, world

NAMES = ["two", "seven", "four"]
TOKENS = [f"<{name}>" for name in NAMES]
LABELS = torch.tensor([world.NAMES.index(name) for name in NAMES])
GREY = 2 / 255  # two grey levels: as far as another batch size may move an image


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


@pytest.fixture(scope="module")
def pipe():
    """The embedded Stable Diffusion, loaded for this module alone, because its vocabulary grows."""
    return common.load_pipeline(common.DIGITS_CLEAN)


@pytest.fixture(scope="module")
def few():
    """Four images of each of three digits [12, 3, 32, 32], and their labels 0, 1 and 2."""
    r = world.render_pool(world.pools()["train"], 150, seed=1)
    chosen = torch.cat([(r["labels"] == y).nonzero()[:4, 0] for y in LABELS])
    return r["images"][chosen].permute(0, 3, 1, 2).float() / 255, torch.arange(3).repeat_interleave(4)


def embed(pipe, prompts):
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0].detach()


# --- Textual Inversion


def invert(pipe, images, labels, classes, steps, **options):
    start = diagen.initial_embeddings(pipe, [NAMES[c] for c in classes], "background")
    options = dict(lr=0.02, templates=[diagen.PHOTO], flip=False, keys=classes) | options
    tokens = [TOKENS[c] for c in classes]
    return diagen.textual_inversion(pipe, images, labels, tokens, start, steps=steps, **options)


def weights(pipe):
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {(k, name): t.clone() for k, part in parts.items() for name, t in part.state_dict().items()}


@pytest.fixture(scope="module")
def learned(pipe, few):
    """The embeddings after 50 steps, and the pipeline's weights before and after."""
    before = weights(pipe)
    return SimpleNamespace(rows=invert(pipe, *few, [0, 1, 2], 50), before=before, after=weights(pipe))


def test_nothing_but_the_new_tokens_rows_changes(pipe, learned):
    old, new = learned.before, learned.after
    changed = [name for name in new if not torch.equal(old[name], new[name])]
    assert [name.rpartition("embeddings.")[2] for _, name in changed] == ["token_embedding.weight"]
    old, new = old[changed[0]], new[changed[0]]
    ids = pipe.tokenizer.convert_tokens_to_ids(TOKENS)
    others = [i for i in range(len(new)) if i not in ids]
    assert torch.equal(new[ids], learned.rows) and torch.equal(new[others], old[others])
    assert len(new) == len(old) + 3 == len(pipe.tokenizer)
    modules = [*pipe.text_encoder.modules(), *pipe.unet.modules()]
    assert not any(m._forward_hooks for m in modules)
    assert not any(p.requires_grad or p.grad is not None for m in modules for p in m.parameters())


def test_stock_diffusers_loads_the_embedding_and_uses_it(pipe, learned, tmp_path):
    stock = StableDiffusionPipeline.from_pretrained(common.DIGITS_CLEAN)
    for row, token in zip(learned.rows, TOKENS, strict=True):
        diagen.save_embedding(row, token, tmp_path / "learned_embeds.safetensors")
        assert torch.equal(diagen.load_embedding(tmp_path / "learned_embeds.safetensors", 96), row)
        stock.load_textual_inversion(str(tmp_path))
    prompts = [f"a photo of a red {word} on a flower background" for word in [*TOKENS, "background"]]
    with diagen.NewTokens(pipe, TOKENS, learned.rows):
        ours = embed(pipe, prompts)
    assert torch.allclose(embed(stock, prompts), ours, atol=1e-5)
    assert (ours[:3] - ours[3]).abs().amax((1, 2)).min() > 0.1


def test_a_class_learns_alone_what_it_learns_beside_others(pipe, few, learned):
    images, labels = few
    start = diagen.initial_embeddings(pipe, ["background"])[0]
    together = invert(pipe, images, labels, [0, 1, 2], 8)
    alone = invert(pipe, images[labels == 1], torch.zeros(4, dtype=torch.long), [1], 8)[0]
    assert (alone - together[1]).norm() < 0.01 * (together[1] - start).norm()
    assert torch.cdist(learned.rows, learned.rows).fill_diagonal_(9).min() > 0.5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_gradient_is_that_of_the_denoising_error(pipe, few, prediction, monkeypatch):
    """One step of gradient descent against the error and its gradient written by hand."""
    images, labels = few
    scheduler, templates = pipe.scheduler, [diagen.PHOTO, "the red {} on a plain background"]
    scheduler = DDPMScheduler.from_config(scheduler.config, prediction_type=prediction)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    drawn, add_noise, encode = [], scheduler.add_noise, pipe.encode_prompt
    monkeypatch.setattr(scheduler, "add_noise", lambda *a: drawn.append(a) or add_noise(*a))
    monkeypatch.setattr(pipe, "encode_prompt", lambda p, *a: drawn.append(p) or encode(p, *a))
    monkeypatch.setattr(torch.optim, "AdamW", lambda rows, lr, weight_decay: torch.optim.SGD(rows, lr))
    start = diagen.initial_embeddings(pipe, NAMES)
    rows = diagen.textual_inversion(
        pipe, images, labels, TOKENS, start, steps=1, batch_size=5, lr=1.0, templates=templates
    )
    prompts, (z, noise, t) = drawn
    views = [common.encode(pipe, x) for x in (images, images.flip(-1))]
    mirrored = 0
    for j in range(15):  # five of each class, mirrored or not, under its own token
        distances = [(x[labels == j // 5] - z[j]).abs().amax((1, 2, 3)).min() for x in views]
        assert min(distances) < 1e-4
        mirrored += distances[1] < distances[0]
        assert prompts[j] in [template.format(TOKENS[j // 5]) for template in templates]
    assert 0 < mirrored < 15 and len(t.unique()) > 10 and len(set(prompts)) > 3

    table = pipe.text_encoder.get_input_embeddings().weight
    (name,) = (name for name, p in pipe.text_encoder.named_parameters() if p is table)
    ids = pipe.tokenizer.convert_tokens_to_ids(TOKENS)
    leaf = table.clone().index_copy(0, torch.tensor(ids), start).requires_grad_()
    padded = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text = torch.func.functional_call(pipe.text_encoder, {name: leaf}, (padded,))[0]
    a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = noise if prediction == "epsilon" else a**0.5 * noise - (1 - a) ** 0.5 * z
    output = pipe.unet(a**0.5 * z + (1 - a) ** 0.5 * noise, t, text).sample
    loss = sum(F.mse_loss(output[j : j + 5], target[j : j + 5]) for j in (0, 5, 10))
    (gradient,) = torch.autograd.grad(loss, leaf)
    error = (start - rows - gradient[ids]).norm(dim=1) / gradient[ids].norm(dim=1)
    assert error.max() < 1e-3 and gradient[ids].norm(dim=1).min() > 1e-4


def test_gradient_checkpointing_changes_nothing(pipe, few):
    less_memory = common.load_pipeline(common.DIGITS_CLEAN, gradient_checkpointing=True)
    assert less_memory.unet.is_gradient_checkpointing and less_memory.vae.is_gradient_checkpointing
    plain, again = (invert(p, *few, [0, 1, 2], 2) for p in (pipe, less_memory))
    assert torch.allclose(plain, again, atol=1e-4)


@pytest.fixture(scope="module")
def accuracy(pipe, learned):
    """How often the oracle reads the class in samples with its token: at the start, learned, with noise."""
    oracle, truth = judge.load_oracle(), LABELS.repeat_interleave(8)
    noisy = diagen.noisy_embeddings(learned.rows, [0.0, 5.0], generators(3), relative=True)
    start = diagen.initial_embeddings(pipe, NAMES, "background")

    def read(rows):
        prompts = [f"a photo of a {token}" for token in TOKENS for _ in range(8)]
        options = dict(num_inference_steps=12, guidance_scale=4.0, output_type="pt")
        with diagen.NewTokens(pipe, TOKENS, rows):
            images = pipe(prompts, generator=generators(24), **options).images
        return (oracle(images)[:, :10].argmax(1) == truth).float().mean().item()

    return SimpleNamespace(start=read(start), learned=read(noisy[:, 0]), noisy=read(noisy[:, 1]))


def test_a_learned_token_draws_its_class(accuracy):
    assert accuracy.start < 0.4 and accuracy.learned > 0.8


def test_the_class_is_lost_with_noise_and_drifts_the_more_the_larger_sigma_is(pipe, learned, accuracy):
    assert accuracy.noisy < accuracy.learned - 0.3
    sigmas, prompts, distances = [0.0, 0.25, 0.5, 1.0, 2.0], [f"a photo of a {t}" for t in TOKENS], []
    for rows in diagen.noisy_embeddings(learned.rows, sigmas, generators(3), relative=True).unbind(1):
        with diagen.NewTokens(pipe, TOKENS, rows):
            distances.append(embed(pipe, prompts))
    distances = [(d - distances[0]).flatten(1).norm(dim=1).mean().item() for d in distances]
    assert distances[0] == 0 and sorted(distances) == distances and distances[1] > 0.1


def test_a_learning_rate_at_which_it_diverges_is_named(pipe, few):
    with pytest.raises(common.UserError, match="--inversion_lr"):
        invert(pipe, *few, [0, 1, 2], 3, lr=1e30)


# --- the new tokens

ODD = ["<car|0>", "<carrot|0>", "<dog|0>", "<hot dog|0>", "<seven|1>", "<seven|10>", "<A|0>", "<a|0>"]
ODD += ["<guinea pig|0>", """<baker's "yeast"|0>""", "<Ünï 猫|3>", "<A>"]


def test_every_new_token_is_one_with_its_own_row(pipe):
    rows, prompts = torch.randn(len(ODD), 96), [f"a photo of a {token}" for token in ODD]
    with diagen.NewTokens(pipe, ODD, rows):
        plain = embed(pipe, [*prompts, "a photo of a car"])
    ids = pipe.tokenizer.convert_tokens_to_ids(ODD)
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)
    assert torch.allclose(embed(pipe, [*prompts, "a photo of a car"]), plain, atol=1e-5)
    for i, token in enumerate(ODD):
        for text in ("{}", "a photo of a {}.", "x{}y", "{}{}", "the {}, {} and {}"):
            found = pipe.tokenizer(text.replace("{}", token), add_special_tokens=False).input_ids
            assert [j for j in found if j in ids] == [ids[i]] * text.count("{}")
        assert len(pipe.tokenizer(prompts[i]).input_ids) == len(pipe.tokenizer("a photo of a red").input_ids)
        moved = rows.clone()
        moved[i] *= -1
        with diagen.NewTokens(pipe, ODD, moved):
            change = (embed(pipe, [*prompts, "a photo of a car"]) - plain).abs().amax((1, 2)) > 1e-4
        assert change.nonzero().flatten().tolist() == [i]


def test_no_hook_is_left_after_an_exception(pipe, few, monkeypatch):
    hooks, forward, seen = pipe.text_encoder.get_input_embeddings, pipe.unet.forward, []

    def broken(*args, **kwargs):
        seen.append(len(hooks()._forward_hooks))
        if len(seen) == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(pipe.unet, "forward", broken)
        invert(pipe, *few, [0, 1, 2], 5)
    assert seen == [1, 1, 1] and not hooks()._forward_hooks


def test_tokens_start_from_the_mean_of_a_words_pieces(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    rows = diagen.initial_embeddings(pipe, ["seven", "red seven"])
    seven, red = (
        table[pipe.tokenizer(w, add_special_tokens=False).input_ids].squeeze(0) for w in ("seven", "red")
    )
    assert torch.equal(rows[0], seven) and torch.allclose(rows[1], (red + seven) / 2)
    assert torch.equal(diagen.initial_embeddings(pipe, ["one", "two"], "seven"), seven.expand(2, -1))
    for name, initializer in (("", ""), (" ", ""), ("one", "  ")):
        with pytest.raises(common.UserError, match="no token for .*--initializer"):
            diagen.initial_embeddings(pipe, [name], initializer)


# --- noise on the embeddings


@pytest.mark.parametrize("relative", [False, True])
def test_noise_has_the_standard_deviation_sigma(relative):
    rows, sigmas = torch.tensor([[1.0], [3.0]]) * torch.randn(2, 50_000), [0.0, 0.5, 2.0]
    noisy = diagen.noisy_embeddings(rows, sigmas, generators(2), relative)
    assert noisy.shape == (2, 3, 50_000) and torch.equal(noisy[:, 0], rows)
    noise = noisy - rows[:, None]
    scale = rows.std(1) if relative else torch.ones(2)
    assert torch.allclose(noise.std(2), torch.tensor(sigmas) * scale[:, None], rtol=0.02)
    assert (noise.mean(2).abs() <= 5 * noise.std(2) / 50_000**0.5).all()
    correlation = torch.corrcoef(torch.cat([noise[:, 1:].flatten(0, 1), rows])) - torch.eye(6)
    assert correlation.abs().max() < 0.025


def test_a_class_has_the_noise_of_its_own_generator():
    rows = torch.randn(3, 96)
    noisy = diagen.noisy_embeddings(rows, [0.1, 0.2], generators(3))
    alone = diagen.noisy_embeddings(rows[1:2], [0.1, 0.2], generators(3)[1:2])
    assert torch.equal(alone[0], noisy[1])


# --- img2img


@pytest.fixture(scope="module")
def stock(pipe):
    """diffusers' img2img with DDIM, of the same parts."""
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    return stock


PROMPTS = [f"a photo of a blue {name}" for name in NAMES]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [4.0, 1.0, 0.0])
def test_img2img_is_stock_img2img_bit_for_bit(pipe, stock, few, prediction, scale, monkeypatch):
    """Up to a guidance scale of 1 the prompt alone counts. Latents that other schedulers clip are not."""
    changes = dict(prediction_type=prediction, clip_sample=True)
    monkeypatch.setattr(pipe, "scheduler", DDPMScheduler.from_config(pipe.scheduler.config, **changes))
    changes["clip_sample"] = False
    monkeypatch.setattr(stock, "scheduler", DDIMScheduler.from_config(pipe.scheduler.config, **changes))
    latents, options = common.encode(pipe, few[0][[0, 4, 8]]), dict(strength=0.7, guidance_scale=scale)
    expected = stock(
        PROMPTS, latents, num_inference_steps=7, generator=generators(3), output_type="pt", **options
    ).images
    ours = diagen.img2img(pipe, latents, PROMPTS, generators(3), steps=7, **options)
    assert torch.equal(ours, expected) and ours.std() > 0.1
    assert isinstance(pipe.scheduler, DDPMScheduler)  # the pipeline keeps its own


def test_a_batch_is_stock_img2img_image_by_image(pipe, stock, few, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())
    images, options = few[0][[0, 4, 8]], dict(strength=0.7, guidance_scale=4.0)
    ours = diagen.img2img(pipe, common.encode(pipe, images), PROMPTS, generators(3), steps=10, **options)
    for i, generator in enumerate(generators(3)):
        options |= dict(num_inference_steps=10, generator=generator, output_type="pt")
        alone = stock(PROMPTS[i], images[i : i + 1], **options).images[0]
        assert (ours[i] - alone).abs().max() <= GREY


def test_with_little_strength_the_image_is_nearly_its_reconstruction(pipe, few):
    latents, prompts = common.encode(pipe, few[0][::2]), ["a photo of a red one"] * 6
    options, distances = dict(steps=20, guidance_scale=4.0), []
    for strength in (0.05, 0.3, 0.6, 0.9):
        images = diagen.img2img(pipe, latents, prompts, generators(6), strength=strength, **options)
        distances.append((images - common.decode(pipe, latents)).abs().mean().item())
    assert distances[0] < 0.03 and sorted(distances) == distances and distances[-1] > 5 * distances[0]


def test_steps_that_leave_nothing_are_refused(pipe):
    z = torch.zeros(1, 4, 16, 16)
    for steps, strength in ((2000, 0.7), (1000, 1.0), (4, 0.2), (10, 1.1), (10, 0.0), (0, 1.0)):
        with pytest.raises(common.UserError, match=f"--steps {steps} .*--strength {strength}"):
            diagen.img2img(pipe, z, ["a"], generators(1), steps=steps, strength=strength)


# --- the synthetic images

TINY = dict(steps=4, variations=2, inversion_steps=3, generation_batch_size=5, prompts_per_class=3)


@pytest.fixture(scope="module")
def data(few):
    """Two training images of each of three digits; all twelve are the test split."""
    images, labels = [common.to_pil(x) for x in few[0]], few[1].tolist()
    plain = common.make_transforms(32, "none")[1]
    test = common.Images(images, labels, plain)
    return common.Data(NAMES, test.subset(range(0, 12, 2)), test)


def a_run(out, **changes):
    """The arguments of a tiny run, and its folder."""
    args = diagen.resolve(diagen.Args(**TINY | changes, out=str(out)))
    return args, common.Run(args, common.make_accelerator())


def synthesize(pipe, data, out, **changes):
    """The variations, weighed, their pixels and their files."""
    args, run = a_run(out, **changes)
    records = diagen.synthesize(args, run, pipe, data, folder := out / "synthetic")
    synthetic = diagen.weigh(args, run, data, records, folder)
    files = [folder / record["file_name"] for record in synthetic.records]
    assert sorted(files) == sorted(folder.glob("*/*.png"))
    return synthetic, np.stack([Image.open(f) for f in files]).astype(int), [f.read_bytes() for f in files]


def test_without_noise_prompts_and_weights_it_is_da_fusion_bit_for_bit(pipe, data, tmp_path):
    free = dict(strength=[1.0], guidance_scale=8.0)  # the prompt has much to say
    baseline, pixels, files = synthesize(pipe, data, tmp_path / "baseline", method="da_fusion", **free)
    parts = free | dict(prompts="none", weighting=False)
    same, _, ours = synthesize(pipe, data, tmp_path / "same", sigmas=[0.0] * 4, **parts)
    assert len(ours) == 12 and ours == files and np.array_equal(same.weights, baseline.weights)
    assert [r["seed"] for r in same.records] == [r["seed"] for r in baseline.records]
    parts |= dict(sigmas=[0.0, 5.0], embeddings=str(tmp_path / "same"))
    _, noisy, _ = synthesize(pipe, data, tmp_path / "noisy", **parts)
    plain, changed = abs(noisy - pixels).max((1, 2, 3)).reshape(-1, 2).T  # every second one has the noise
    assert plain.max() <= 2 < 20 < changed.min()


def test_the_baselines_as_published_have_their_own_settings_and_a_strength_for_each_image(data):
    settings = {}
    for method in ("da_fusion", "da_fusion_published", "real_guidance_published"):
        args = diagen.resolve(diagen.Args(dataset="folder", method=method))
        settings[method] = (args.strength, args.guidance_scale, args.synthetic_probability)
        assert (args.sigmas, args.prompts, args.weighting) == ([0.0], "none", False)
        assert diagen.plan_jobs(args).keys() == {"standard augmentation", diagen.METHODS[method]}
        prompts = diagen.find_prompts(args, None, data.class_names)
        records = diagen.plan_variations(args, data, prompts)
        assert {r["strength"] for r in records} == set(args.strength)
        assert ("<" in records[0]["prompt"]) == method.startswith("da_fusion")
        again = diagen.plan_variations(args, data, prompts)
        assert again == records
    assert settings == {
        "da_fusion": ([0.7], 15.0, 0.7),
        "da_fusion_published": ([1.0, 0.75, 0.5, 0.25], 7.5, 0.5),
        "real_guidance_published": ([0.5], 7.5, 0.5),
    }


def test_images_of_several_strengths_are_drawn_at_their_own(pipe, data, tmp_path):
    """In one batch, each as it is drawn alone."""
    _, mixed, _ = synthesize(pipe, data, tmp_path / "mixed", method="real_guidance", strength=[0.3, 0.9])
    records = common.read_file(tmp_path / "mixed" / "synthetic" / "metadata.jsonl")
    assert {r["strength"] for r in records} == {0.3, 0.9}
    for strength in (0.3, 0.9):
        _, alone, _ = synthesize(
            pipe, data, tmp_path / str(strength), method="real_guidance", strength=[strength]
        )
        own = np.array([r["strength"] == strength for r in records])
        difference = abs(alone - mixed).max((1, 2, 3))
        assert difference[own].max() <= 2 < 10 < difference[~own].min()


@pytest.mark.parametrize("per_class, held", [(3, 30), (0, 30)])
def test_validation_images_come_from_what_the_few_shot_draw_left(monkeypatch, capsys, per_class, held):
    """Without a split of its own: as many again; if nothing is left, a quarter of the few, at least one."""
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(120)]
    labels = [i % 10 for i in range(120)]

    def load(*_):
        data = common.Data(
            list("abcdefghij"), common.Images(images, labels, "train"), common.Images([], [], "test")
        )
        if per_class:
            drawn = common.draw_per_class(labels, per_class, 0)
            data.unlabelled = data.train.subset(np.setdiff1d(np.arange(120), drawn))
            data.train = data.train.subset(drawn)
        return data

    monkeypatch.setattr(common, "data_of", load)
    data = diagen.load_few(diagen.resolve(diagen.Args(dataset="folder", examples_per_class=per_class)), True)
    reds = [{image.getpixel((0, 0))[0] for image in part.sources} for part in (data.train, data.val)]
    assert not reds[0] & reds[1] and len(reds[1]) == held and data.val.transform == "test"
    assert np.bincount(data.val.labels).tolist() == [3] * 10
    assert len(data.train) == (30 if per_class else 90)
    assert ("few-shot draw left" in capsys.readouterr().out) == bool(per_class)


def test_gradient_checkpointing_changes_no_token(few):
    learned = []
    for on in (False, True):
        pipe = common.load_pipeline(common.DIGITS_CLEAN, gradient_checkpointing=on)
        start = diagen.initial_embeddings(pipe, ["one"], "background")
        images, labels = few[0][:2], torch.zeros(2, dtype=torch.long)
        learned.append(diagen.textual_inversion(pipe, images, labels, ["<one>"], start, steps=3, lr=0.02))
    assert (learned[0] - start).norm() > 0.1 and torch.allclose(*learned, atol=1e-4)


def test_the_batch_size_does_not_change_an_image(pipe, data, tmp_path):
    images = [
        synthesize(pipe, data, tmp_path / f"{size}", generation_batch_size=size, method="real_guidance")[1]
        for size in (1, 8)
    ]
    assert abs(images[0] - images[1]).max() <= 2 and images[0].std() > 20


def test_prompts_and_noisy_tokens_are_used_in_rotation_within_a_class(pipe, data, tmp_path, monkeypatch):
    drawn, rows = [], torch.randn(3, 96)
    prompts = {name: [f"a photo of a {c} {name}" for c in ("red", "blue", "green")] for name in NAMES}

    def draw(pipe, latents, prompts, *_, **__):
        drawn.extend(prompts)
        return torch.zeros(len(prompts), 3, 32, 32)

    monkeypatch.setattr(diagen, "img2img", draw)
    monkeypatch.setattr(diagen, "learn_tokens", lambda *_: rows)
    monkeypatch.setattr(diagen, "find_prompts", lambda *_: prompts)
    args, run = a_run(tmp_path, variations=7)
    records = diagen.synthesize(args, run, pipe, data, tmp_path / "synthetic")
    assert [r["prompt"] for r in records] == drawn
    for c, name in enumerate(NAMES):
        own = [r["prompt"] for r in records if r["label"] == c]
        assert own == [f"a photo of a {('red', 'blue', 'green')[j % 3]} <{name}|{j % 4}>" for j in range(14)]
    ids = pipe.tokenizer.convert_tokens_to_ids([f"<{name}|{v}>" for name in NAMES for v in range(4)])
    table = pipe.text_encoder.get_input_embeddings().weight[ids].view(3, 4, 96)
    distance = (table - rows[:, None]).square().mean(2).sqrt() / rows.square().mean(1).sqrt()[:, None]
    assert torch.allclose(distance, torch.tensor(args.sigmas), rtol=0.3) and (distance[:, 0] == 0).all()
    assert len({tuple(r["seed"]) for r in records}) == len({r["file_name"] for r in records}) == 42


# --- learned tokens in files


def test_a_group_of_tokens_that_was_interrupted_starts_again_and_learns_the_same(
    pipe, data, tmp_path, monkeypatch
):
    args, run = a_run(tmp_path, generation_batch_size=8)  # groups of two classes
    rows = diagen.learn_tokens(args, run, pipe, data)
    files = {file: file.read_bytes() for file in diagen.embedding_files(tmp_path, NAMES)}
    trained, train = [], diagen.textual_inversion
    monkeypatch.setattr(diagen, "textual_inversion", lambda *a, **k: trained.append(a[3]) or train(*a, **k))
    assert torch.equal(diagen.learn_tokens(args, run, pipe, data), rows) and not trained
    [*files][1].unlink()
    assert torch.equal(diagen.learn_tokens(args, run, pipe, data), rows) and trained == [TOKENS[:2]]
    assert {file: file.read_bytes() for file in files} == files
    args, run = a_run(tmp_path / "other", generation_batch_size=4)  # groups of one class
    assert (diagen.learn_tokens(args, run, pipe, data) - rows).norm() < 0.01 * (rows - rows.mean(0)).norm()


def test_embeddings_of_no_run_or_of_an_unfinished_one_are_refused(pipe, data, tmp_path):
    folder = tmp_path / "tokens"
    (folder / "embeddings").mkdir(parents=True)
    args, run = a_run(tmp_path / "run", embeddings=str(folder))
    data = common.Data(NAMES, data.train, data.test, data.test)
    for _ in range(3):
        with pytest.raises(common.UserError, match=f"--embeddings {folder} .* lacks"):
            diagen.check(args, run, run.accelerator, data, pipe)
        with pytest.raises(common.UserError, match=f"--embeddings {folder} .* lacks"):
            diagen.learn_tokens(args, run, pipe, data)
        *_, missing = (f for f in diagen.embedding_files(folder, NAMES) if not f.exists())
        diagen.save_embedding(torch.ones(96), "<x>", missing)
    diagen.check(args, run, run.accelerator, data, pipe)
    assert torch.equal(diagen.learn_tokens(args, run, pipe, data), torch.ones(3, 96))
    diagen.save_embedding(torch.ones(95), "<x>", missing)
    with pytest.raises(common.UserError, match=f"cannot read the embedding {missing}"):
        diagen.check(args, run, run.accelerator, data, pipe)
    assert len([*folder.glob("embeddings/*/*")]) == 3 and not (tmp_path / "run" / "embeddings").exists()


# --- prompts


@pytest.mark.parametrize("words", [diagen.WORDS, diagen.DIGIT_WORDS], ids=["world", "digits"])
def test_a_prompt_has_the_papers_form(words):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(400):
        prompt = diagen.write_prompt("guinea pig", rng, words)
        before, after = prompt.removeprefix("a photo of a ").split("guinea pig")
        adjective, rest, parts = before.strip(), after, [bool(before)]
        assert adjective in ["", *words["adjective"]] and prompt.startswith("a photo of a ")
        for part in [*words][1:]:
            found = [option for option in words[part] if rest.startswith(f" {option}")]
            rest = rest.removeprefix(f" {found[0]}") if found else rest
            parts.append(bool(found))
        assert not rest
        seen.add(tuple(parts))
    assert len(seen) == 2 ** len(words)
    once, again = (diagen.write_prompt("owl", np.random.default_rng(7), words) for _ in range(2))
    assert once == again


@pytest.mark.parametrize(
    "prompt, name, count",
    [
        ("a photo of a carrot", "car", 0),
        ("a photo of a car, a Car and a CAR", "car", 1),
        ("a photo of a Car and a CAR.", "car", 2),
        ("a photo of a hot dog", "dog", 1),
        ("a photo of two cars", "car", 0),
        ("a photo of a c++ book", "c++", 1),
        ("a photo of a baker's yeast at noon", "baker's yeast", 1),
        ("a photo of a (x) on a b", "(x)", 1),
        ("a photo of an A in a kitchen", "A", 1),
        ("ein Foto von Äpfeln, äpfel", "Äpfel", 1),
        ("", "car", 0),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own(prompt, name, count):
    found = diagen.names_in(prompt, name)
    assert len(found) == count and all(match[0].lower() == name.lower() for match in found)
    if count:
        token = r"<\1|0>"  # nothing in it may be taken for a pattern
        where = found[-1].start()
        assert diagen.with_token(prompt, name, token) == prompt[:where] + token + prompt[where + len(name) :]


CAR, RED, SNOW = "a photo of a car", "a photo of a red car at dawn", "A photo of an old Car in the snow"
ANSWERS = {  # shape of an answer: (answer, prompts in it)
    "lines": (f"{CAR}\n{RED}\n{SNOW}", [CAR, RED, SNOW]),
    "numbers": (f"1. {CAR}\n2) {RED}\n(3) {SNOW}\n10: {RED} there.", [CAR, RED, SNOW, f"{RED} there"]),
    "bullets": (f"- {CAR}\n* **{RED}**\n• {SNOW}\n", [CAR, RED, SNOW]),
    "quotes": (f'"{CAR}",\n\'{RED}\'\n`{SNOW}`\n1. “{RED} there”', [CAR, RED, SNOW, f"{RED} there"]),
    "a JSON list": (json.dumps([CAR, RED, SNOW]), [CAR, RED, SNOW]),
    "a Python list": (str([CAR, RED, SNOW]), [CAR, RED, SNOW]),
    "JSON objects": (json.dumps([{"prompt": CAR, "place": "x"}, {"prompt": RED}], indent=1), [CAR, RED]),
    "a code fence": (f"```json\n{json.dumps([CAR, RED], indent=2)}\n```", [CAR, RED]),
    "chatter": (f"Sure! Here are 3 prompts for a car:\n\n1. {RED}\n\nI hope you like every car.", [RED]),
    "the request again": (f"a photo of a [adjective] car [weather]\n1. {RED}", [RED]),
    "names missing or twice": (f"a photo of a dog\na photo of a car beside a car\n{RED}\ntwo carrots", [RED]),
    "repetitions": (f"{RED}\n{RED}\n{RED}.", [RED]),
    "windows": (f"{CAR}\r\n{RED}\r\n", [CAR, RED]),
    "nothing": ("", []),
    "a refusal": ("I'm sorry, I cannot write about a car.", []),
}  # fmt: skip


@pytest.mark.parametrize("shape", ANSWERS)
def test_prompts_are_found_in_an_answer_and_missing_ones_filled(shape):
    answer, prompts = ANSWERS[shape]
    for count in (1, 2, 5):
        assert diagen.parse_answer(answer, "car", count) == (prompts + [CAR] * 5)[:count]


def test_prompts_survive_their_file(tmp_path, monkeypatch):
    names = ["guinea pig", 'semi;colon "quoted"', "Ünï 猫", "crane", "crane", "plain"]
    prompts = {name: [f'a photo of a "{name}"; ü, {k}' for k in range(3)] for name in names[:-1]}
    monkeypatch.setattr(diagen, "ask_llm", lambda *_: prompts)
    args, run = a_run(tmp_path, dataset="folder", prompts="llm")
    assert diagen.find_prompts(args, run, names) == prompts | {"plain": ["a photo of a plain"]}
    assert (tmp_path / "prompts.csv").read_text().startswith("class_name;class_idx;prompt\nguinea pig;0;")
    (tmp_path / "prompts.csv").write_text(
        "\ufeffclass_name;class_idx;prompt\r\n\r\nplain;5;  a photo of a Plain\r\n", encoding="utf-8"
    )  # a spreadsheet's
    read = diagen.find_prompts(args, run, names)
    assert read["plain"] == ["a photo of a Plain"] and read["crane"] == ["a photo of a crane"]


def test_prompts_of_the_authors_count_within_the_class_and_hold_a_placeholder(tmp_path):
    lines = ["class_name;class_idx;prompt", "guinea pig;1;a photo of a {name}", "owl;1;a photo of an {name}"]
    lines += [
        "guinea pig;2;a photo of a wet {name} at noon",
        "owl;2;a photo of an owl",
        "owl;3;the {name}, {x}",
    ]
    (tmp_path / "authors.csv").write_text("\n".join(lines))
    assert diagen.read_prompts(tmp_path / "authors.csv", ["owl", "guinea pig"]) == {
        "owl": ["a photo of an owl", "a photo of an owl", "the owl, {x}"],
        "guinea pig": ["a photo of a guinea pig", "a photo of a wet guinea pig at noon"],
    }


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no prompts"),
        ("class_name;class_idx;prompt\n", "has no prompts"),
        ("owl;0;an owl\nowl,0,an owl", "line 2: 1 columns"),
        ("owl;0;an owl;at night", "line 1: 4 columns"),
        ("class_name;class_idx;prompt\n\n\ndog;1;a dog", "line 4: .* no class 'dog'"),
        ("owl;0;an owl\nowl;0;a photo", "line 2: the prompt must contain 'owl' exactly once"),
        ("owl;0;an owl beside an owl", "line 1: the prompt must contain 'owl' exactly once"),
        ("owl;1;an {name} beside an owl", "line 1: the prompt must contain 'owl' exactly once"),
        ("owl;1;an {class}", "line 1: the prompt must contain 'owl' exactly once"),
        (b"owl;0;an owl \xff", "cannot read"),
    ],
)
def test_a_bad_file_of_prompts_is_named_with_the_line(text, words, tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(common.UserError, match=words) as error:
        diagen.read_prompts(path, ["owl", "cat"])
    assert str(path) in str(error.value)


def test_the_word_bank_has_prompts_for_names_that_are_words_of_it(tmp_path):
    names = ["table", "forest", "A", "a", "photo", "crane", "crane"]
    args, run = a_run(tmp_path, dataset="folder", prompts_per_class=10)
    prompts = diagen.find_prompts(args, run, names)
    assert [*prompts] == [*dict.fromkeys(names)] and len(prompts["crane"]) == args.prompts_per_class
    for name, lines in prompts.items():
        for line in lines:
            token = diagen.with_token(line, name, "<x>")
            assert token.count("<x>") == 1 and token.replace("<x>", name) == line
            assert token.startswith("a photo of a ")
    assert len(set(prompts["table"])) > 2 and len(set(prompts["A"])) > 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A Llama so small that it learns by heart, in seconds, what to answer for two class names."""
    folder = str(tmp_path_factory.mktemp("llm"))
    answers = {
        "owl": "Sure!\n1. A photo of a small owl in the snow.\n2. An owl and an owl\n3. a photo of an owl",
        "guinea pig": '["a photo of a guinea pig at night", "a photo of a red guinea pig", "a photo"]',
    }
    request = {"count": 3, "place": diagen.UNCOMMON_PLACE}
    chats = [
        [{"role": "user", "content": diagen.REQUEST.format(name=name, **request)},
         {"role": "assistant", "content": answer}] for name, answer in answers.items()
    ]  # fmt: skip
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<pad>", "<end>", "<user>", "<bot>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([turn["content"] for chat in chats for turn in chat], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ '<user>' if turn.role == 'user' else '<bot>' }}{{ turn.content }}"
        "{{ '<end>' if turn.role != 'user' }}{% endfor %}{{ '<bot>' if add_generation_prompt }}"
    )
    ids = [torch.tensor(tokenizer.apply_chat_template(chat, return_dict=False)) for chat in chats]
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = ids.masked_fill((ids == 0) | ((ids == 3).cumsum(1) == 0), -100)  # the answers
    torch.manual_seed(0)
    config = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    optimizer, loss = torch.optim.Adam(model.parameters(), 3e-3), torch.tensor(9.0)
    while loss > 0.02:
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_is_asked_for_the_prompts_of_each_class(llm):
    prompts = diagen.ask_llm(llm, ["guinea pig", "owl"], 3, uncommon=True)
    assert prompts == {
        "guinea pig": [
            "a photo of a guinea pig at night",
            "a photo of a red guinea pig",
            "a photo of a guinea pig",
        ],
        "owl": ["A photo of a small owl in the snow", "a photo of an owl", "a photo of a owl"],
    }


def test_a_model_that_is_missing_or_does_not_chat_is_named(llm, tmp_path):
    with pytest.raises(common.UserError, match="cannot load the model '/nowhere/llm'"):
        diagen.ask_llm("/nowhere/llm", ["owl"], 3)
    LlamaForCausalLM.from_pretrained(llm).save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match=f"cannot load the model '{tmp_path}'"):
        diagen.ask_llm(str(tmp_path), ["owl"], 3)  # no tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llm)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="no chat template; give an instruct model"):
        diagen.ask_llm(str(tmp_path), ["owl"], 3)


# --- weights and training


def nll(logits, labels):
    return F.cross_entropy(logits.double(), labels).item()


@pytest.mark.parametrize("true", [1 / 3, 1.0, 3.0])
def test_the_temperature_that_was_put_in_is_found(true):
    honest = 2 * torch.randn(4000, 10)
    labels = torch.distributions.Categorical(logits=honest).sample()
    assert diagen.fit_temperature(true * honest, labels) == pytest.approx(true, rel=0.08)


@pytest.mark.parametrize(
    "logits, labels",
    [
        (torch.eye(10) * 5, torch.arange(10)),  # all right: the colder the better
        (torch.eye(10) * 5, torch.arange(10).roll(1)),  # all wrong: the hotter the better
        (torch.zeros(10, 10), torch.arange(10)),
        (1e4 * torch.randn(30, 5), torch.arange(30) % 5),
        (torch.randn(1, 5), torch.tensor([2])),
        (1e-4 * torch.randn(30, 5), torch.arange(30) % 5),
    ],
    ids=["right", "wrong", "constant", "large", "one", "small"],
)  # fmt: skip
def test_a_temperature_raises_no_loss_and_changes_no_answer(logits, labels):
    T = diagen.fit_temperature(logits, labels)
    assert 0 < T < np.inf and nll(logits / T, labels) <= nll(logits, labels) + 1e-6
    assert torch.equal((logits / T).argmax(1), logits.argmax(1))


def test_weights_are_the_papers_normalised_over_an_images_variations():
    q = torch.tensor(
        [[0.5, 0.2, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [1.0, 1e-9, 0.0, 0.25]]
    )
    w = diagen.weights_of(q)
    assert torch.allclose(w.sum(1), torch.ones(4))
    assert torch.allclose(w[0] / w[0, 0], torch.tensor([1.0, 0.4, 1.0, 0.0]))
    assert torch.equal(w[1], torch.full((4,), 0.25)) and torch.equal(w[2], w[1])
    assert (
        w[3, 2] == 0
        and w[3, 0] == pytest.approx(2 / 3, abs=1e-6)
        and w[3, 3] == pytest.approx(1 / 3, abs=1e-6)
    )


def test_an_epoch_is_class_balanced_and_draws_variations_by_weight():
    labels, M = np.array([0] * 12 + [1] * 3 + [2] * 1), 4
    weights = np.tile([0.6, 0.3, 0.1, 0.0], (16, 1))
    draws = diagen.draw_epoch(labels, M, weights, 15_000, 0.7, np.random.default_rng(0))
    synthetic = draws >= 16
    real = np.where(synthetic, (draws - 16) // M, draws)
    assert draws.shape == (15_000,) and synthetic.mean() == pytest.approx(0.7, abs=0.015)
    assert np.bincount(labels[real]) / 15_000 == pytest.approx([1 / 3] * 3, abs=0.015)
    assert np.bincount(real[labels[real] == 0]) / 5_000 == pytest.approx([1 / 12] * 12, abs=0.015)
    share = np.bincount((draws[synthetic] - 16) % M, minlength=M) / synthetic.sum()
    assert share == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=0.015) and share[3] == 0
    again = diagen.draw_epoch(labels, M, weights, 15_000, 0.7, np.random.default_rng(0))
    assert np.array_equal(again, draws)
    for probability, given in ((0.7, None), (0.0, weights)):
        assert diagen.draw_epoch(labels, M, given, 999, probability, np.random.default_rng(0)).max() < 16
    assert diagen.draw_epoch(labels, M, weights, 999, 1.0, np.random.default_rng(0)).min() >= 16


def test_of_a_frozen_classifier_only_the_head_learns():
    args = diagen.resolve(diagen.Args(frozen=True))  # on digits: a pretrained small CNN
    net, *_ = diagen.new_classifier(args, common.make_accelerator(), [*"abc"])
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    whole = common.build_classifier("small_cnn", [*"abc"], 32).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), net.state_dict().values(), strict=True)))
    before = copy.deepcopy(net.state_dict())
    assert torch.allclose(net.train()(x), whole(x), atol=1e-5)  # also while it trains
    optimizer, losses = common.make_optimizer("adam", net, 1e-3, 0.01), []
    for _ in range(20):
        losses.append(F.cross_entropy(net(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    changed = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    assert changed == ["head.weight", "head.bias"] and losses[-1] < losses[0]


def test_the_filter_is_trained_once_and_its_confidences_are_kept(data, tmp_path, monkeypatch):
    trained, train_filter = [], diagen.train_filter
    monkeypatch.setattr(diagen, "train_filter", lambda *a: trained.append(1) or train_filter(*a))
    args, run = a_run(tmp_path, variations=1, iterations=2, filter_epochs=2)
    data = common.Data(NAMES, data.train, data.test, data.test)
    records = [{"file_name": f"{i}.png", "label": y} for i, y in enumerate(data.train.labels)]
    (tmp_path / "synthetic").mkdir()
    for image, record in zip(data.train.sources, records, strict=True):
        image.save(tmp_path / "synthetic" / record["file_name"])
    first, second = (diagen.weigh(args, run, data, records, tmp_path / "synthetic") for _ in range(2))
    assert first.records == second.records and first.report == second.report and len(trained) == 1
    assert all(0 < r["confidence"] < 1 == r["weight"] for r in first.records)


def test_the_filter_knows_images_of_the_wrong_class(few, tmp_path, monkeypatch):
    """Three in twelve labels of the validation split are wrong: it trains until it is too sure of the others.

    The confidences must be those of its best epoch, calibrated.
    """
    plain, losses, update = common.make_transforms(32, "none")[1], [], common.Best.update
    monkeypatch.setattr(common.Best, "update", lambda *a: losses.append(-a[2]) or update(*a))
    images = common.Images([common.to_pil(x) for x in few[0]], few[1].tolist(), plain)
    wrong, labels = [(y + 1) % 3 for y in images.labels], [*images.labels]
    labels[::4] = wrong[::4]
    data = common.Data(NAMES, images, images, common.Images(images.sources, labels, plain))
    args, run = a_run(tmp_path, iterations=8, lr=0.01, augment="none")
    shown = common.Images(images.sources * 3, images.labels + wrong + labels, plain)
    judged = diagen.judge_variations(args, run, data, shown)
    (right, wrong, val), report = judged["confidence"].split(12), judged["report"]
    assert right.mean() > 0.6 and wrong.mean() < 0.25
    assert report["accuracy"] == pytest.approx(0.75, abs=0.1)
    assert -val.log().mean().item() == pytest.approx(report["nll_calibrated"], rel=1e-3)
    assert report["nll"] == pytest.approx(min(losses), rel=1e-3) and min(losses) < 0.9 * losses[-1]
    assert report["nll_calibrated"] < report["nll"] - 1e-3 and 5 < len(losses) < args.filter_epochs
    assert min(Image.open(tmp_path / "filter.png").size) >= 300


# --- what common and digits have for this method


def test_precision_and_recall_are_torch_fidelitys():
    real, fake = torch.randn(300, 8), 0.7 * torch.randn(200, 8) + 0.4
    ours = judge.distribution_distances(real, fake)
    expected = prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    assert ours["precision"] == pytest.approx(expected["precision"]) and ours["precision"] < 1
    assert ours["recall"] == pytest.approx(expected["recall"]) != ours["precision"]


def test_the_reliability_diagram_shows_accuracy_over_confidence(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    logits, labels = 2 * torch.randn(500, 4), torch.randint(4, (500,))
    common.save_reliability({"a": (logits, labels), "b": (logits / 9, labels)}, tmp_path / "r.png")
    assert min(Image.open(tmp_path / "r.png").size) >= 300
    diagonal, *lines = figures[0].axes[0].lines
    for line, scaled in zip(lines, (logits, logits / 9), strict=True):
        sure, right = scaled.softmax(1).max(1).values.numpy(), (scaled.argmax(1) == labels).numpy()
        bins = [(sure >= k / 10) & (sure < (k + 1) / 10) for k in range(10)]
        points = [(sure[b].mean(), right[b].mean()) for b in bins if b.any()]
        assert np.allclose(line.get_xydata(), points, atol=1e-5)
    assert np.allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])


def test_captioned_pictures_take_any_caption(tmp_path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    Image.new("RGB", (20, 30), colours[1]).save(tmp_path / "file.png")
    images = [
        Image.new("RGB", (32, 32), colours[0]),
        tmp_path / "file.png",
        Image.new("RGB", (64, 64), colours[2]),
    ]
    captions = ["a photo of a $1 <two|0>, $_^", "word " * 60, ""]
    common.save_captioned(images, captions, tmp_path / "grid.png", 2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    places, shapes = [(0, 0), (0, 1), (1, 0)], [1, 1.5, 1]  # height over width
    for colour, (top, left), shape in zip(colours, places, shapes, strict=True):
        rows, columns = np.nonzero((pixels == colour).all(2))
        height, width = pixels.shape[0] / 2, pixels.shape[1] / 2
        assert np.ptp(rows) / np.ptp(columns) == pytest.approx(shape, rel=0.02)
        assert len(rows) > 1000
        assert top * height <= rows.min() and rows.max() <= (top + 1) * height
        assert left * width <= columns.min() and columns.max() <= (left + 1) * width


def test_the_pretraining_sees_no_class_labels_and_what_it_writes_is_loaded(tmp_path, monkeypatch):
    def render(indices, count, seed):
        rng = np.random.default_rng(seed)
        return {"images": torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), np.uint8))}  # no labels

    monkeypatch.setattr(world, "render_pool", render)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    trained = pretrain.train_backbone(pretrain.Args(backbone_steps=2, backbone_copies=1), "cpu")
    pretrain.save_classifier(trained, tmp_path / "digits" / "backbone")
    loaded = common.build_classifier("small_cnn", [*"abc"], 32, pretrained=True).features.state_dict()
    for name, value in loaded.items():
        assert torch.allclose(value, trained[name], atol=1e-3)
