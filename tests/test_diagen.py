"""DIAGen's properties, against stock diffusers, references written by hand and the oracle."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image
from transformers import LlamaConfig, LlamaForCausalLM

import common
import diagen
from digits import pretrain, world
from runs import generators, refused

NAMES = ["two", "seven", "four"]
TOKENS = [f"<{y:04d} {name}>" for y, name in enumerate(NAMES)]
PLAIN = common.make_transforms(32)[1]
TINY = dict(steps=4, variations=2, inversion_steps=3, generation_batch_size=5, prompts_per_class=3)


@pytest.fixture(scope="module")
def pipe():
    """The built-in Stable Diffusion, loaded for this module alone, because its vocabulary grows."""
    return common.load_pipeline(common.DIGITS_CLEAN)


@pytest.fixture(scope="module")
def few():
    """Four images of each of three digits [12, 3, 32, 32], and their labels 0, 1 and 2."""
    r = world.render_pool(world.pools()["train"], 150, seed=1)
    chosen = torch.cat([(r["labels"] == world.NAMES.index(name)).nonzero()[:4, 0] for name in NAMES])
    return r["images"][chosen].permute(0, 3, 1, 2).float() / 255, torch.arange(3).repeat_interleave(4)


@pytest.fixture(scope="module")
def data(few):
    """Two training images of each of three digits; all twelve are the test and the validation split."""
    test = common.Images([to_pil_image((255 * x).round().byte()) for x in few[0]], few[1].tolist(), PLAIN)
    return common.Data(NAMES, test.subset(range(0, 12, 2)), test, test, class_names=NAMES)


def embed(pipe, prompts):
    return pipe.encode_prompt(prompts, "cpu", 1, False)[0].detach()


def a_run(out, **changes):
    """The arguments of a tiny run on digits, and its folder."""
    args = diagen.METHOD.arguments(**TINY | changes, out=str(out))
    return args, common.Run(args, common.make_accelerator())


def synthesize(pipe, data, out, **changes):
    """The metadata of a run's variations, their weights, and their pixels."""
    args, run = a_run(out, **changes)
    records = diagen.draw_variations(args, run, pipe, data, folder := out / "synthetic")
    images, weights, _ = diagen.weigh(args, run, data, records, folder)
    pixels = np.stack([*map(np.asarray, images.sources)]).astype(int)  # decoded, for thousands of epochs
    return common.read_file(folder / "metadata.jsonl"), weights, pixels


def invert(pipe, few, c, steps, lr=0.02):
    start, images = diagen.initial_embedding(pipe, NAMES[c], "background"), few[0][few[1] == c]
    options = dict(steps=steps, lr=lr, templates=[diagen.PHOTO], flip=False, seed=(0, c))
    return diagen.textual_inversion(pipe, images, TOKENS[c], start, **options)


def test_nothing_but_the_new_tokens_rows_changes_and_no_hook_is_left(pipe, few, monkeypatch):
    parts = nn.ModuleList([pipe.unet, pipe.vae, pipe.text_encoder])
    old, rows = copy.deepcopy(parts.state_dict()), torch.stack([invert(pipe, few, c, 2) for c in range(3)])
    (name,) = (key for key, value in parts.state_dict().items() if not torch.equal(old[key], value))
    old, new, ids = old[name], parts.state_dict()[name], pipe.tokenizer.convert_tokens_to_ids(TOKENS)
    others = [i for i in range(len(old)) if i not in ids]
    assert name.endswith("token_embedding.weight") and len(new) == len(pipe.tokenizer)
    assert torch.equal(new[ids], rows) and torch.equal(new[others], old[others])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(pipe.unet, "forward", lambda *_, **__: 1 / 0)
        invert(pipe, few, 0, 5)
    assert not any(m._forward_hooks for m in parts.modules())
    assert not any(p.requires_grad or p.grad is not None for p in parts.parameters())


def test_a_class_learns_with_checkpoints_and_beside_other_tokens_what_it_learns_without(pipe, few):
    diagen.place_tokens(pipe, TOKENS, torch.randn(3, 96))
    less_memory = common.load_pipeline(common.DIGITS_CLEAN, checkpointing=True)
    assert less_memory.unet.is_gradient_checkpointing and less_memory.vae.is_gradient_checkpointing
    assert torch.allclose(*(invert(p, few, 1, 3) for p in (pipe, less_memory)), atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_follows_the_gradient_of_the_denoising_error(pipe, few, prediction, monkeypatch):
    """Of equation (1), by hand. Inside the U-Net the gradient is larger, as fp16 has no small numbers."""
    images, templates = few[0][4:8], [diagen.PHOTO, "the red {} on a plain background"]
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    drawn, inner, add_noise, encode = [], [], scheduler.add_noise, pipe.encode_prompt
    monkeypatch.setattr(scheduler, "add_noise", lambda *a: drawn.append(a) or add_noise(*a))
    monkeypatch.setattr(pipe, "encode_prompt", lambda p, *a: drawn.append(p) or encode(p, *a))
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    monkeypatch.setattr(torch.optim, "AdamW", lambda rows, lr, weight_decay: torch.optim.SGD(rows, lr))
    start, options = diagen.initial_embedding(pipe, "seven"), dict(steps=1, batch_size=15, lr=1.0)
    with pipe.unet.register_forward_hook(lambda *a: a[2].sample.register_hook(inner.append) and None):
        S = diagen.textual_inversion(pipe, images, TOKENS[1], start, templates=templates, **options)
    prompts, (z, noise, t) = drawn
    views, found = [common.encode(pipe, x) for x in (images, images.flip(-1))], []
    for latents in z:  # of an image, mirrored or not
        distances = (torch.cat(views) - latents).abs().amax((1, 2, 3))
        found.append(distances.argmin().item())
        assert distances.min() < 1e-4
    assert len({i % 4 for i in found}) == 4 and 0 < sum(i < 4 for i in found) < 15
    assert len(t.unique()) > 10 and {*prompts} == {p.replace("{}", TOKENS[1]) for p in templates}
    table = pipe.text_encoder.get_input_embeddings().weight
    row = pipe.tokenizer.convert_tokens_to_ids(TOKENS[1])
    (name,) = (name for name, p in pipe.text_encoder.named_parameters() if p is table)
    leaf = table.clone().index_copy(0, torch.tensor([row]), start[None]).requires_grad_()
    padded = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    text = torch.func.functional_call(pipe.text_encoder, {name: leaf}, (padded,))[0]
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    target = noise if prediction == "epsilon" else a * noise - b * z
    output = pipe.unet(a * z + b * noise, t, text).sample
    gradient, at_output = torch.autograd.grad(F.mse_loss(output, target), (leaf, output))
    error = (start - S - gradient[row]).norm() / gradient[row].norm()
    assert error < 1e-3 and inner[0].norm() > 100 * at_output.norm()


def test_a_learned_token_draws_its_class_and_drifts_the_more_the_larger_sigma_is(pipe, few):
    prompts, oracle, texts = [f"a photo of a {t}" for t in TOKENS for _ in range(8)], common.load_oracle(), []
    truth = torch.tensor([world.NAMES.index(name) for name in NAMES]).repeat_interleave(8)
    options = dict(num_inference_steps=12, guidance_scale=4.0, output_type="pt")
    learned = torch.stack([invert(pipe, few, c, 50) for c in range(3)])
    start = diagen.initial_embedding(pipe, "background").expand(3, -1)
    noisy = diagen.noisy_embeddings(learned, [0.0, 0.25, 0.5, 1.0, 5.0], generators(3), relative=True)
    for rows, least, most in ((start, 0, 0.4), (noisy[:, 0], 0.8, 1), (noisy[:, -1], 0, 0.5)):
        diagen.place_tokens(pipe, TOKENS, rows)
        read = oracle(pipe(prompts, generator=generators(24), **options).images)[:, :10].argmax(1)
        assert least <= (read == truth).float().mean() <= most
    for rows in noisy.unbind(1):
        diagen.place_tokens(pipe, TOKENS, rows)
        texts.append(embed(pipe, prompts[::8]))
    distances = [(text - texts[0]).flatten(1).norm(dim=1).mean().item() for text in texts]
    assert distances[0] == 0 and sorted(distances) == distances and distances[1] > 0.1


def test_tokens_start_from_the_mean_of_a_words_pieces_and_say_what_keeps_them_from_learning(
    pipe, few, monkeypatch
):
    ids = pipe.tokenizer.convert_tokens_to_ids(["seven</w>", "red</w>"])
    seven, red = pipe.text_encoder.get_input_embeddings().weight[ids]
    assert torch.equal(diagen.initial_embedding(pipe, "seven"), seven)
    assert torch.equal(diagen.initial_embedding(pipe, "one", "seven"), seven)
    assert torch.allclose(diagen.initial_embedding(pipe, "red seven"), (red + seven) / 2)
    for name, initializer in (("", ""), (" ", ""), ("one", "  ")):
        with refused("no token for .*--initializer"):
            diagen.initial_embedding(pipe, name, initializer)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode(), refused("needs gradients; leave torch.inference_mode"):
            invert(pipe, few, 0, 1)
    with refused("diverged; lower --inversion_lr"):
        invert(pipe, few, 0, 3, lr=1e30)
    monkeypatch.setattr(pipe.text_encoder, "forward", copy.deepcopy(pipe.text_encoder).forward)
    with refused("the text encoder bypasses its hooks"):
        invert(pipe, few, 0, 1)


def test_every_new_token_is_one_with_its_own_row(pipe):
    odd = 'car|0 carrot|0 dog|0 seven|1 seven|10 A|0 a|0 Ünï猫|3 A baker\'s|0 "y"|0'.split(" ")
    tokens = ["<hot dog|0>", *(f"<{name}>" for name in odd)]
    rows, prompts = torch.randn(len(tokens), 96), [f"a photo of a {token}" for token in [*tokens, "car"]]
    ids = diagen.place_tokens(pipe, tokens, rows).tolist()
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)
    for i, token in enumerate(tokens):
        for text in ("{}", "a photo of a {}.", "x{}y", "{}{}", "the {}, {} and {}"):
            found = pipe.tokenizer(text.replace("{}", token), add_special_tokens=False).input_ids
            assert [j for j in found if j in ids] == [ids[i]] * text.count("{}")
        before = embed(pipe, prompts)
        with diagen.new_token(pipe, token, -rows[i]):
            inside = embed(pipe, prompts)
        assert ((inside - before).abs().amax((1, 2)) > 1e-4).nonzero().flatten().tolist() == [i]
        assert torch.allclose(embed(pipe, prompts), inside, atol=1e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_every_token_has_noise_of_its_own_of_standard_deviation_sigma(relative):
    rows, sigmas = 1 + (1 + 3 * torch.rand(2, 1)) * torch.randn(2, 50_000), [0.0, 0.5, 2.0]
    noisy = diagen.noisy_embeddings(rows, sigmas, generators(2), relative)
    assert noisy.shape == (2, 3, 50_000) and torch.equal(noisy[:, 0], rows)
    scale = rows.square().mean(-1).sqrt() if relative else torch.ones(2)
    for v, sigma in enumerate(sigmas):
        assert torch.allclose((noisy[:, v] - rows).std(-1), sigma * scale, rtol=0.02)
    noise = (noisy - rows[:, None])[:, 1:].flatten(0, 1)
    correlation = torch.corrcoef(torch.cat([noise, rows]))
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.025
    alone = diagen.noisy_embeddings(rows[1:], sigmas, generators(2)[1:], relative)
    assert torch.equal(alone[0], noisy[1])  # a class has the noise of its own generator


def test_stock_diffusers_and_other_runs_read_a_runs_tokens_and_refuse_others(data, tmp_path):
    pipe, stock = (common.load_pipeline(common.DIGITS_CLEAN) for _ in range(2))
    args, run = a_run(tmp_path, inversion_steps=20, inversion_lr=0.02, initializer="background")
    rows = diagen.learn_tokens(args, run, pipe, data)
    others = torch.cat([rows, diagen.initial_embedding(pipe, "background")[None]])
    assert (torch.cdist(rows, others) > 0.1).sum() == 9  # each learns another
    for file in (files := diagen.embedding_files(tmp_path, NAMES)):
        StableDiffusionPipeline.load_textual_inversion(stock, str(file.parent))
    prompts = [f"a photo of a {TOKENS[0]} on a flower background", f"a red {TOKENS[1]}", "a red seven"]
    prompts.append(f"{TOKENS[0]} {TOKENS[2]}")
    diagen.place_tokens(pipe, TOKENS, rows)
    assert torch.equal(embed(stock, prompts), embed(pipe, prompts))
    args, run = a_run(tmp_path / "other", embeddings=str(tmp_path))
    assert torch.equal(diagen.learn_tokens(args, run, pipe, data), rows)
    assert not (run.path / "embeddings").exists()
    for shape in (2, 96), (95,), (192,):
        save_file({"<x>": torch.ones(shape)}, files[1])
        with refused(f"{files[1]} was made for another text encoder, or has several vectors: .*, here .96"):
            diagen.check(args, run, data, pipe)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [4.0, 1.0, 0.0])
def test_img2img_is_stock_img2img_bit_for_bit(pipe, few, prediction, scale, monkeypatch):
    """Up to a guidance scale of 1 the prompt alone counts. Latents that other schedulers clip are not."""
    changes, prompts = dict(prediction_type=prediction), [f"a photo of a blue {name}" for name in NAMES]
    own = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=True, **changes)
    stock = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    stock.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False)
    monkeypatch.setattr(pipe, "scheduler", own)
    latents, options = common.encode(pipe, few[0][[0, 4, 8]]), dict(strength=0.7, guidance_scale=scale)
    ours = diagen.img2img(pipe, latents, prompts, generators(3), steps=7, **options)
    options |= dict(num_inference_steps=7, generator=generators(3), output_type="pt")
    assert torch.equal(ours, stock(prompts, latents, **options).images) and pipe.scheduler is own


def test_without_noise_prompts_and_weights_it_is_da_fusion_bit_for_bit(pipe, data, tmp_path):
    free = dict(strength=[1.0], guidance_scale=8.0, prompt="one {}")  # the prompt has much to say
    _, equal, pixels = synthesize(pipe, data, tmp_path / "baseline", method="da_fusion", **free)
    parts = free | dict(prompts="none", weighting=False)
    records, weights, ours = synthesize(pipe, data, tmp_path / "same", sigmas=[0.0] * 4, **parts)
    assert [r["prompt"] for r in records[:4]] == [f"one <0000 two|{v}>" for v in range(4)]
    assert len(ours) == 12 and np.array_equal(ours, pixels) and torch.equal(weights, equal)
    parts |= dict(sigmas=[0.0, 5.0], embeddings=str(tmp_path / "same"))
    noisy = synthesize(pipe, data, tmp_path / "noisy", **parts)[2]
    plain, changed = abs(noisy - pixels).max((1, 2, 3)).reshape(-1, 2).T  # every second one has the noise
    assert plain.max() <= 2 < 20 < changed.min()


def test_images_of_several_strengths_in_a_batch_are_drawn_as_each_is_alone(pipe, data, few, tmp_path):
    options = dict(method="real_guidance", strength=[0.05, 0.9], generation_batch_size=8, steps=20)
    records, _, mixed = synthesize(pipe, data, tmp_path / "mixed", **options)
    assert {r["prompt"] for r in records} == {f"a photo of a {name}" for name in NAMES}
    assert not (tmp_path / "mixed" / "embeddings").exists()
    guides = common.decode(pipe, common.encode(pipe, few[0][::2])).repeat_interleave(2, 0).permute(0, 2, 3, 1)
    for strength, least, most in ((0.05, 0, 8), (0.9, 30, 255)):  # little, it is nearly its reconstruction
        options |= dict(strength=[strength], generation_batch_size=1)
        _, _, alone = synthesize(pipe, data, tmp_path / str(strength), **options)
        own = np.array([r["strength"] == strength for r in records])
        assert abs(alone - mixed)[own].max() <= 2 < 10 < abs(alone - mixed)[~own].max((1, 2, 3)).min()
        assert least <= abs(alone - 255 * guides.numpy()).mean() <= most


@pytest.fixture
def rows(monkeypatch):
    """Learned embeddings [3, 96], which cost nothing, as do the images: the decoded latents of the guides."""
    rows = torch.randn(3, 96)
    monkeypatch.setattr(diagen, "learn_tokens", lambda *_: rows)
    monkeypatch.setattr(diagen, "img2img", lambda pipe, z, *_, **__: common.decode(pipe, z).detach())
    return rows


def test_given_prompts_and_noisy_tokens_are_used_in_rotation_by_a_baseline_too(pipe, data, tmp_path, rows):
    plain = diagen.METHOD.arguments(method="da_fusion")
    assert (plain.sigmas, plain.prompts, plain.weighting) == ([0.0], "none", False)
    colours, sigmas = ("red", "blue", "green"), [0.0, 0.5, 1.0, 2.0]
    lines = [f"{name};0;a photo of a {c} {{name}}\n" for name in NAMES for c in colours]
    (tmp_path / "p.csv").write_text("".join(lines))
    given = dict(prompts=str(tmp_path / "p.csv"), sigmas=sigmas, weighting=True)
    args, run = a_run(tmp_path, variations=7, method="da_fusion", **given)
    assert {key: getattr(args, key) for key in given} == given
    records = diagen.draw_variations(args, run, pipe, data, tmp_path / "synthetic")
    noisy = [f"{token[:-1]}|{v}>" for token in TOKENS for v in range(4)]
    for c in range(3):
        own = [r["prompt"] for r in records if r["label"] == c]
        assert own == [f"a photo of a {colours[j % 3]} {noisy[4 * c + j % 4]}" for j in range(14)]
    ids = pipe.tokenizer.convert_tokens_to_ids(noisy)
    table = pipe.text_encoder.get_input_embeddings().weight[ids].view(3, 4, 96)
    distance = (table - rows[:, None]).square().mean(2).sqrt() / rows.square().mean(1).sqrt()[:, None]
    assert torch.allclose(distance, torch.tensor(sigmas), rtol=0.3)
    assert len({tuple(r["seed"]) for r in records}) == len({r["file_name"] for r in records}) == 42


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("square, width, colours", [("squeeze", 96, [0, 1, 2]), ("crop", 32, [1, 1, 1])])
def test_a_variation_has_the_shape_of_its_source_or_is_its_centre(pipe, tmp_path, square, width, colours):
    pixels = (250 * np.eye(3, dtype=np.uint8)).repeat(40, 0)[None].repeat(40, 0)  # three squares in a row
    data = common.Data([*"ab"], common.Images([Image.fromarray(pixels)], [0], PLAIN), class_names=[*"ab"])
    args, run = a_run(tmp_path, square=square, method="real_guidance", variations=1)
    (record,) = diagen.draw_variations(args, run, pipe, data, tmp_path)
    image = Image.open(tmp_path / record["file_name"])
    shown = np.asarray(image.resize((9, 9)))[4, [1, 4, 7]].argmax(1).tolist()
    assert image.size == (width, 32) and shown == colours


@pytest.mark.parametrize("per_class", [3, 0])
def test_validation_images_come_from_what_the_few_shot_draw_left(per_class):
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(120)]
    train, empty = common.Images(images, [i % 10 for i in range(120)]), common.Images([], [], PLAIN)
    data = common.Data([*"abcdefghij"], train, empty, class_names=[*"abcdefghij"])
    if per_class:
        drawn = common.draw_per_class(train.labels, lambda n: per_class, 0)
        data.train, data.unlabelled = train.subset(drawn), train.subset(np.setdiff1d(np.arange(120), drawn))
    diagen.add_validation(diagen.METHOD.arguments(examples_per_class=per_class), data)
    reds = [{image.getpixel((0, 0))[0] for image in part.sources} for part in (data.train, data.val)]
    assert not reds[0] & reds[1] and data.val.transform is PLAIN and len(data.train) == (per_class or 9) * 10
    assert np.bincount(data.val.labels).tolist() == [3] * 10


@pytest.mark.parametrize("words", [diagen.WORDS, diagen.DIGIT_WORDS], ids=["world", "digits"])
def test_a_prompt_has_the_papers_form(words):
    rng, (adjective, *others) = np.random.default_rng(0), ("|".join(options) for options in words.values())
    form = re.compile(rf"a photo of a (?:({adjective}) )?{{}}" + "".join(rf"(?: ({o}))?" for o in others))
    prompts = [form.fullmatch(diagen.write_prompt(rng, words)).groups() for _ in range(400)]
    assert len({tuple(map(bool, parts)) for parts in prompts}) == 2 ** len(words)
    assert {diagen.write_prompt(rng, words, "the {} seen") for _ in range(99)} >= {"the {} seen"}


def test_a_name_is_found_as_a_word_of_its_own_exactly_once():
    found = [("a hot dog", "dog"), ("a c++ book", "c++"), ("a (x) on a b", "(x)"), ("{an} owl; {x}", "owl")]
    found += [("夜の猫の写真", "猫"), ("올빼미가 나는 사진", "올빼미"), ("a {name} and {x}", "{name}")]
    found += [("ภาพแมวดำ", "แมว"), ("ကြောင်နက်", "ကြောင်"), ("ឆ្មាខ្មៅ", "ឆ្មា")]  # Thai, Burmese, Khmer
    for prompt, name in found:  # {name} stands for a name that is a word of the prompt, too
        assert diagen.template_of(prompt, name.replace("{name}", "a")) == prompt.replace(name, "{}")
    assert diagen.template_of("a photo of a Car", "car") == diagen.PHOTO
    for prompt in ("", "a carrot", "two cars", "a Car, a CAR", "{name} on a {name}", "a {class}"):
        assert diagen.template_of(prompt, "car") == ""


CAR, RED, SNOW = "a photo of a car", "a photo of a red car at dawn", "A photo of an old car in the snow"
ANSWERS = {  # shape of an answer: (answer, prompts in it)
    "numbers": (f"1. {CAR}\n2) {RED}\r\n(3) {SNOW}\n10: {RED} there.", [CAR, RED, SNOW, f"{RED} there"]),
    "quotes": (f"\"{CAR}\",\n'{RED}'\n`{SNOW}`\n1. “{RED} there”", [CAR, RED, SNOW, f"{RED} there"]),
    "lists": (f"{[CAR, RED]}", [CAR, RED]),
    "JSON": (f'{{"prompt": "{CAR}", "place": "x"}}, {{"prompt": "{RED}"}}', [CAR, RED]),
    "thoughts": (f"<think>{CAR}? No.</think>{SNOW}\n<think>\n{SNOW}\n</think>\n{RED}", [RED]),
    "thoughts without a beginning": (f"{CAR}?\n</think>{RED}", [RED]),
    "thoughts without an end": (f"<think>{CAR}?\n{RED}", []),
    "again": (f"a photo of a [adjective] car [weather]\n1. {RED}", [RED]),
    "names missing or twice": (f"a photo of a dog\na photo of a car beside a car\n{RED}\n{RED}.", [RED]),
}


def test_prompts_are_found_in_an_answer_and_missing_ones_filled_and_told(capsys):
    for (answer, prompts), count in itertools.product(ANSWERS.values(), (1, 2, 5)):
        expected = [prompt.replace("car", "{}") for prompt in (prompts + [CAR] * 5)[:count]]
        assert diagen.parse_answer(answer, "car", count) == expected
        told = f"warning: {len(prompts)} of {count} prompts for 'car' are usable\n"
        assert capsys.readouterr().out == (told if len(prompts) < count else "")


def test_a_language_model_writes_the_prompts_or_is_named(pipe, data, tmp_path, monkeypatch):
    args, run = a_run(tmp_path / "run", prompts="llm", llm=str(tmp_path))
    tokenizer = pretrain.build_tokenizer("a photo of small owl".split())
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with refused("no chat template; give an instruct model"):
        diagen.check(args, run, data, pipe)
    tokenizer.chat_template = "user: {{ messages[0].content }} bot:"
    tokenizer.save_pretrained(tmp_path)
    diagen.check(args, run, data, pipe)
    request = f"user: {diagen.REQUEST.format(name='owl', count=2, place='not expect')} bot:"
    texts = [request, request + '"a photo of a small owl" "an owl"']
    asked, told = (torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts)
    answers = {(str(asked), 2080): told}  # 2,000 tokens for thoughts

    def find(self, input_ids, max_new_tokens, **_):
        return answers[str(input_ids), max_new_tokens]

    monkeypatch.setattr(LlamaForCausalLM, "generate", find)
    assert diagen.ask_llm(args.llm, ["owl"], 2, uncommon=True) == [["a photo of a small {}", diagen.PHOTO]]


def test_a_language_model_is_asked_once_and_its_prompts_are_kept(pipe, data, tmp_path, rows, monkeypatch):
    def ask(model, names, count, uncommon):
        assert (model, names, uncommon) == ("my/model", NAMES, True)
        return [[f"a {{}} number {k}" for k in range(count)] for _ in names]

    args, run = a_run(tmp_path, prompts="llm", llm="my/model", uncommon=True)
    for asked in (ask, None):
        monkeypatch.setattr(diagen, "ask_llm", asked)
        records = diagen.draw_variations(args, run, pipe, data, tmp_path / "synthetic")
        numbers = [int(r["prompt"].split(" number ")[1]) for r in records if r["label"] == 1]
        assert numbers == [0, 1, 2, 0]


@pytest.mark.parametrize("prompts", ["llm", "bank"])
def test_prompts_survive_their_file(prompts, tmp_path, monkeypatch):
    names = ["guinea pig", 'semi;colon "quoted"', "Ünï 猫", "A", "a", "photo", "table"]
    data, rng = common.Data(names, None, class_names=names), np.random.default_rng(0)
    told = [[f'a photo of a "{k}"; ü\u2028 {{}}, {name}' for k in range(3)] for name in names]
    monkeypatch.setattr(diagen, "ask_llm", lambda *_: told)
    seen = "a wide photo of a {}"
    bank = [[diagen.write_prompt(rng, prompt=seen) for _ in range(3)] for _ in names]
    drawn = told if prompts == "llm" else bank
    args = diagen.METHOD.arguments(dataset="folder", prompts=prompts, prompts_per_class=3, prompt=seen)
    text = diagen.write_prompts(args, names)
    for written in (text, f"\ufeff{text}\n\n".replace("\n", "\r\n")):  # as a spreadsheet writes it
        (tmp_path / "p.csv").write_bytes(written.encode())
        assert diagen.read_prompts(tmp_path / "p.csv", data) == drawn


BAD = {
    "class_name;class_idx;prompt\n": "has no prompts",
    "owl;0;an owl\nowl,0,an owl": "line 2: .'owl,0,an owl'. is not class_name;class_idx;prompt",
    "owl;0;an owl;at night": "line 1: .'owl', '0', 'an owl', 'at night'. is not",
    'owl;0;"an owl\nowl;0;an owl': "line 2: .'owl', '0', 'an owl.*'. is not",
    "class_name;class_idx;prompt\n\n\ndog;1;a dog": "line 4: .* no class 'dog'",
    "owl;0;an owl\nowl;0;a photo": "line 2: 'owl' or {name} must be in the prompt exactly once",
    "owl;0;an owl beside an owl": "line 1: 'owl' or {name} must be in the prompt exactly once",
    "owl;0;an owl".encode("utf-16"): "give a whole text file in UTF-8",
    f"owl;0;{'red ' * 14}owl": "line 1: 'owl' ends at token 17, but 14 are read",
}


def test_a_file_of_prompts_has_english_names_or_the_data_sets_and_a_bad_line_is_named(pipe, tmp_path):
    path, folders = tmp_path / "p.csv", ["001.owl", "red_owl", "cat1", "cat2", "x"]
    data = common.Data(folders, None, class_names=["owl", "red owl", "cat", "cat", "x"])
    lines = ["class_name;class_idx;prompt", "owl;1;an Owl, wet", "001.owl;7; the {name} at {night} "]
    lines += ["red_owl;1;a red_owl", "red owl;5;the red owl", "red_owl;;one red owl", "cat;1;a cat"]
    path.write_text("\n".join(lines))
    owls, *others = diagen.read_prompts(path, data)
    assert owls == ["an {}, wet", "the {} at {night}"]
    assert others == [["a {}", "the {}", "one {}"], ["a {}"], ["a {}"], [diagen.PHOTO]]
    for text, fault in BAD.items():
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with refused(f"{path}.*{fault}"):
            diagen.read_prompts(path, data, pipe)


def test_the_temperature_that_was_put_in_is_found_and_no_loss_rises():
    honest = 2 * torch.randn(4000, 10)
    labels = torch.distributions.Categorical(logits=honest).sample()
    for true in (1 / 3, 1.0, 3.0):
        assert diagen.fit_temperature(true * honest, labels) == pytest.approx(true, rel=0.08)
    hard = (5 * torch.eye(5), torch.zeros(5, 5), 1e4 * honest, 1e-4 * honest)
    for logits, shift in itertools.product(hard, (0, 1)):
        labels = torch.arange(len(logits)).roll(shift) % 5  # of the first, all are right, or all are wrong
        T = diagen.fit_temperature(logits, labels)
        before, after = (F.cross_entropy((logits / t).double(), labels) for t in (1, T))
        assert 0 < T < np.inf and after <= before + 1e-6 * max(1, before)


def test_weights_are_the_papers_normalised_and_an_epoch_is_class_balanced_and_draws_by_them():
    w = diagen.weights_of(torch.tensor([[0.5, 0.2, 0.9, 0.0], [0.0] * 4, [0.1] * 4, [1.0, 1e-9, 0.0, 0.25]]))
    expected = [[1 / 2.4, 1 / 6, 1 / 2.4, 0], [0.25] * 4, [0.25] * 4, [2 / 3, 0, 0, 1 / 3]]
    assert torch.allclose(w, torch.tensor(expected)) and w[0, 3] == w[3, 2] == 0
    labels, w, engine = [0] * 12 + [1] * 3 + [2], w[:1].repeat(16, 1), common.make_accelerator()
    share = torch.tensor([1 / 36] * 12 + [1 / 9] * 3 + [1 / 3])  # of a real image, with its variations
    assert torch.allclose(diagen.draw_weights(labels).float() / 3, share)
    for p in (0.0, 1.0, 0.7):
        expected = torch.cat([(1 - p) * share, (p * share[:, None] * w).flatten()])
        chances = diagen.draw_weights(labels, w, p)
        assert torch.allclose((chances / chances.sum()).float(), expected, atol=1e-6)
    args = diagen.METHOD.arguments(iterations=100, batch_size=64)
    images = common.Images([Image.new("RGB", (8, 8))] * 80, labels * 5, common.make_transforms(8)[1])
    batches = (diagen.draw_batches(args, images, chances, engine, epoch) for epoch in (0, 1, 0))
    a, b, again = (torch.cat([i for *_, i in epoch]) for epoch in batches)
    drawn = torch.bincount(a, minlength=80) / 6400
    assert (drawn - expected).abs().max() < 0.02 and not drawn[expected == 0].any()
    assert torch.equal(a, again) and not torch.equal(a, b)


def test_of_a_frozen_classifier_only_the_head_learns_and_the_best_epochs_is_loaded(
    data, tmp_path, monkeypatch
):
    args, run = a_run(tmp_path, frozen=True, pretrained=True, iterations=30)
    net, model, optimizer = common.new_classifier(args, run.accelerator, NAMES)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batches = diagen.draw_batches(args, data.train, torch.ones(6), run.accelerator, 0)
    common.train_epoch(model, batches, optimizer, [0.01] * args.iterations, run.accelerator)
    changed = [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["head.weight", "head.bias"]  # and not the batch norm's means, either
    run.begin(data, "")
    run.write("DIAGen.pt", {"best": {"weights": net.state_dict()}, "model": before})
    monkeypatch.delattr(common, "load_file")  # without the pretrained weights, which may be a download
    loaded, _ = common.load_classifier(tmp_path, "DIAGen")
    assert torch.equal(loaded.head.weight, net.head.weight)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_learning_rate_is_constant_as_released_or_half_a_cosine(cosine, data, tmp_path, monkeypatch):
    args, run = a_run(tmp_path, cosine=cosine, warmup=0.25, epochs=2, iterations=4, lr=0.1)
    expected = [0, 0.05, *(0.05 + 0.05 * np.cos(np.pi * step / 6) for step in range(6))]
    rates, train_epoch = [], common.train_epoch
    monkeypatch.setattr(common, "train_epoch", lambda *a: rates.extend(a[3]) or train_epoch(*a))
    run.begin(data, "")
    diagen.train(args, run, data, "DIAGen")
    assert rates == pytest.approx(expected if cosine else [0.1] * 8)


def test_the_confidence_is_the_mean_over_five_random_views_calibrated(data):
    net, seen = common.Classifier(nn.Flatten(), nn.Linear(3072, 3)), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = data.test.seen(common.make_transforms(32, "none+randaugment")[0])
    q = diagen.confidences(diagen.METHOD.arguments(), common.make_accelerator(), net, 0.1, images)
    expected = torch.stack([(net(x) / 0.1).softmax(1) for x in [*seen]]).mean(0)[range(12), images.labels]
    assert torch.allclose(q, expected, atol=1e-6) and len(seen) == 10 and not torch.equal(*seen[:2])


def test_the_filter_knows_images_of_the_wrong_class(data, tmp_path, monkeypatch):
    losses, views, best, load = [], [], diagen.Best.judge, common.load
    monkeypatch.setattr(diagen.Best, "judge", lambda *a: losses.append(-a[2]) or best(*a))
    monkeypatch.setattr(common, "load", lambda *a, **k: views.append(a[0].transform) or load(*a, **k))
    images, wrong = data.test, [(y + 1) % 3 for y in data.test.labels]
    train = images.seen(common.make_transforms(32, "crop")[0])
    data = common.Data(NAMES, train, images, images.subset(range(12)), class_names=NAMES)
    data.val.labels[::4] = wrong[::4]  # so it gets too sure of the others; its best epoch counts
    options = dict(iterations=8, filter_epochs=50, batch_size=16, pretrained=True, lr=0.01)
    args, run = a_run(tmp_path, augment="crop", **options)
    records = [{"file_name": f"{k}.png", "label": y} for k, y in enumerate(images.labels + wrong)]
    for record, image in zip(records, images.sources * 2, strict=True):
        image.save(tmp_path / record["file_name"])
    _, weights, report = diagen.weigh(args, run, data, records, tmp_path)
    q = torch.tensor([r["confidence"] for r in common.read_file(run.path / tmp_path.name / "metadata.jsonl")])
    before, after = (report["filter"][stage] for stage in ("before", "after"))
    assert q[:12].mean() > 0.45 and q[12:].mean() < 0.25 and 5 < len(losses) < args.filter_epochs
    assert torch.equal(weights, diagen.weights_of(q.view(12, 2))) and after["nll"] < before["nll"] - 1e-3
    assert before["nll"] == pytest.approx(min(losses), rel=1e-3) and min(losses) < 0.9 * losses[-1]
    kinds = {tuple(type(step).__name__ for step in view.transforms[:-2]) for view in views}
    assert kinds == {("Resize", "RandAugment"), ("Resize", "CenterCrop")}


def test_a_folder_has_the_released_recipe():
    args = diagen.METHOD.arguments(dataset="folder")
    expected = dict(sigmas=[0.0, 0.005, 0.01, 0.025], variations=10, strength=[0.7], guidance_scale=15.0)
    expected |= dict(classifier="resnet50.tv2_in1k", pretrained=True, frozen=True, epochs=50, batch_size=16)
    assert {key: getattr(args, key) for key in expected} == expected
    assert (args.augment, args.square) == ("zoomed", "squeeze")
    assert diagen.METHOD.arguments(dataset="coco").augment == "squeezed"
