"""ActGen's properties, against stock diffusers, closed forms, true masks and the oracle."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from scipy.stats import ttest_rel

import actgen
import common
import runs
from digits import world
from runs import generators, refused

NAMES = world.NAMES
DIGITS = dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, image_size=32)
DIGITS |= dict(steps=20, guidance_centre=10.0)


@pytest.fixture(scope="module")
def guides():
    return runs.held_out(24)


@pytest.fixture(scope="module")
def oracle():
    """The oracle as a ten-class classifier."""
    model = common.load_oracle()
    return lambda x: model(x)[:, :10]


def draw(pipe, guides, classifier=None, some=slice(None), **options):
    """Images, latents and masks of variants of some of the guides."""
    images, labels = (part[some] for part in guides[:2])
    options = dict(generators=generators(len(guides[0]))[some]) | DIGITS | options
    return actgen.generate(pipe, images, labels, NAMES, classifier, **options)


# --- the sampler


@pytest.mark.parametrize("steps, kind", [(7, "epsilon"), (40, "epsilon"), (7, "v_prediction")])
def test_without_guidance_and_losses_it_is_stock_ddpm_bit_for_bit(
    pipe, guides, oracle, steps, kind, monkeypatch
):
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    prompts, three = guides[2][:3], slice(3)
    options = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "pt"}
    stock = pipe(prompts, generator=generators(3), **options).images
    assert torch.equal(draw(pipe, guides, some=three, steps=steps, guidance_centre=-math.inf)[0], stock)
    bank, none = {int(y): torch.zeros(1, 4, 16, 16) for y in guides[1]}, torch.zeros(3, dtype=torch.bool)
    options = dict(steps=steps, nu=1.0, bank=bank, guided=none)
    assert torch.equal(draw(pipe, guides, oracle, three, **options)[0], stock)


def test_full_guidance_everywhere_reproduces_the_guide(pipe, guides):
    images, *_ = draw(pipe, guides, some=slice(4), attention_mask=False, guidance_centre=math.inf)
    assert torch.allclose(images, common.decode(pipe, common.encode(pipe, guides[0][:4])), atol=1e-4)


def test_a_batch_equals_calls_with_one_guide(pipe, guides, oracle):
    """With both losses, one, the other, none; within a grey level, where steps do not amplify rounding."""
    four, told = (guides[0][:4], torch.tensor([3, 3, 5, 5])), {}
    hard = torch.tensor([True, False, True, False])
    bank = {3: torch.randn(5, 4, 16, 16, generator=common.generator(0))}

    def tell(i, _, values):
        told.setdefault(i, values)

    options = dict(bank=bank, nu=0.05)
    batch = draw(pipe, four, oracle, adversarial=hard, on_step=tell, **options)[0]
    moved = (batch - draw(pipe, four)[0]).abs().amax((1, 2, 3)) > 2 / 255
    first = told.pop(0)
    assert moved.tolist() == (first["gradient_norm"] > 0).tolist() == [True, True, True, False]
    for i in range(4):
        one = slice(i, i + 1)
        alone = draw(pipe, four, oracle, one, adversarial=hard[one], on_step=tell, **options)[0]
        assert (alone - batch[one]).abs().max() < 1 / 255
        for key, value in told.pop(0).items():
            assert torch.allclose(value[0], first[key][i], rtol=1e-2, atol=1e-3), key


def test_gradient_checkpointing_changes_no_image(guides, oracle):
    """Its second forward pass must not feed the attention maps again."""
    out = []
    for on in (False, True):
        pipe = common.load_pipeline(common.DIGITS_CLEAN, checkpointing=on)
        assert pipe.unet.is_gradient_checkpointing == on
        out.append(draw(pipe, guides, oracle, slice(2), nu=0.05, steps=12))
    assert torch.allclose(out[0][2], out[1][2], atol=1e-3)
    assert (out[0][0] - out[1][0]).abs().max() < 1 / 255


def test_every_step_is_that_of_the_equations(pipe, guides, oracle):
    """(1) and (4) to (6) by the stock scheduler, of two images with their own i_0 and a plain one."""
    three, centres, guided, told = slice(3), [2.0, 4.5, 3.0], torch.tensor([True, True, False]), []
    options = dict(steps=6, guidance_centre=torch.tensor(centres), guided=guided, nu=0.5)
    draw(pipe, guides, oracle, three, **options, on_step=lambda i, t, values: told.append((t, values)))
    scheduler, z_g = DDPMScheduler.from_config(pipe.scheduler.config), common.encode(pipe, guides[0][three])
    scheduler.set_timesteps(6)
    noise = generators(3)
    x, x_g = randn_tensor(z_g.shape, noise, "cpu"), told[0][1]["x_g"]

    def stock(x0, x, t, noise):
        alpha = scheduler.alphas_cumprod[t]
        eps, rows = (x - alpha**0.5 * x0) / (1 - alpha) ** 0.5, range(3)
        return torch.cat([scheduler.step(eps[[k]], t, x[[k]], generator=noise[k]).prev_sample for k in rows])

    for i, (t, values) in enumerate(told):
        if i > 0:  # the guide's trajectory has the same noise
            x_g = stock(z_g, x_g, t, copy.deepcopy(noise))
            assert torch.allclose(x_g, values["x_g"], atol=1e-4)
        gamma = torch.tensor([1 - 1 / (1 + math.exp(c - i)) for c in centres]) * guided
        weight = values["m"] * gamma.view(3, 1, 1, 1)
        x = (1 - weight) * stock(values["x0"], x, t, noise) + weight * x_g
        assert torch.allclose(values["gamma"], gamma, atol=1e-6)
        assert torch.allclose(values["x_tilde"], x, atol=1e-4)


def test_the_first_step_goes_down_the_gradient_that_autograd_gives_of_both_losses(pipe, guides, oracle):
    """(2) and (3): here through U-Net, x^_0 and decoder in one graph."""
    label, values, nu = int(guides[1][0]), [], 0.3
    bank = {label: torch.randn(6, 4, 16, 16)}
    losses = dict(rho=300.0, contrastive_weight=0.7, adversarial_weight=0.2)
    options = dict(bank=bank, nu=nu, steps=10, on_step=lambda *v: values.append(v[2]), **losses)
    draw(pipe, guides, oracle, slice(1), **options)
    pipe.scheduler.set_timesteps(10)
    t, x = pipe.scheduler.timesteps[0], torch.randn(1, 4, 16, 16, generator=generators(1)[0])
    c, empty = pipe.encode_prompt(f"a photo of a {NAMES[label]}", "cpu", 1, True)
    out, out_empty = (pipe.unet(x, t, text).sample for text in (c.requires_grad_(), empty))
    x0 = pipe.scheduler.step(out_empty + 4 * (out - out_empty), t, x).pred_original_sample
    images = common.decode(pipe, x0, clamp=False)
    near = (300 / 4 - (x0 - bank[label]).flatten(1).norm(dim=1)).clamp(min=0)  # a sixteenth of SD's values
    loss = 0.7 * near.mean() - 0.2 * F.cross_entropy(oracle(images), guides[1][:1])
    (gradient,) = torch.autograd.grad(loss, c)
    assert near.min() > 0 and torch.allclose(values[0]["gradient_norm"], gradient.norm(), rtol=1e-3)
    assert torch.allclose(values[0]["c"], c - nu * gradient / gradient.norm(), atol=1e-4)


def test_a_pipeline_in_stable_diffusion_21s_layout_is_loaded_frozen_and_guided(tmp_path, oracle):
    """Four levels, heads per level, 8x autoencoder, 77 tokens, PNDM; thin random weights."""
    pipe = runs.stable_diffusion("2.1", thin=True)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.save_pretrained(tmp_path)
    pipe = common.load_pipeline(str(tmp_path))
    assert isinstance(pipe.scheduler, DDPMScheduler) and not pipe.scheduler.config.clip_sample
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    two = torch.rand(2, 3, 256, 256), torch.tensor([0, 1])
    options = dict(attention_resolution=8, bank={0: torch.zeros(1, 4, 32, 32)}, steps=3)
    images, _, masks = draw(pipe, two, oracle, prompt="a photo of {}", **options)
    assert images.shape == (2, 3, 256, 256) and images.isfinite().all()
    assert masks.shape == (2, 1, 8, 8) and torch.equal(masks.amax((1, 2, 3)), torch.ones(2))


def test_what_the_sampler_cannot_do_is_refused(pipe, guides, monkeypatch):
    """And leaves the U-Net as it was, as every error does."""
    one, before = slice(1), {name: id(part) for name, part in pipe.unet.attn_processors.items()}
    with torch.inference_mode(), refused(r"leave torch.inference_mode\(\)"):
        draw(pipe, guides, some=one)
    monkeypatch.setattr(pipe.unet, "forward", copy.deepcopy(pipe.unet).forward)  # as of an exported engine
    with refused("bypasses its attention processors"):
        draw(pipe, guides, some=one)
    assert actgen.attention_layers(torch.compile(pipe.unet), 8) == actgen.attention_layers(pipe.unet, 8)
    assert {name: id(part) for name, part in pipe.unet.attn_processors.items()} == before


# --- the mask


def test_class_tokens_are_found_in_the_prompt(pipe):
    names, prompt = ["seven", "golden owl", "x" * 300], "a photo of a {} on a flower background"
    weights = actgen.class_token_weights(pipe.tokenizer, prompt, names)
    assert torch.equal(weights[0], F.one_hot(torch.tensor(5), 16).float())
    tokens = pipe.tokenizer(prompt.replace("{}", "golden owl"), truncation=True).input_ids
    on = pipe.tokenizer("on", add_special_tokens=False).input_ids[0]
    inside = weights[1].nonzero().flatten().tolist()
    assert inside == list(range(5, tokens.index(on))) and len(inside) > 1
    assert weights.shape == (3, 16) and torch.allclose(weights.sum(1), torch.ones(3))


def test_stored_maps_are_the_softmax_of_the_class_token(pipe):
    """Against diffusers' own attention scores, at every cross-attention layer of the resolution."""
    x, text, weights = torch.randn(4, 4, 16, 16), torch.randn(4, 16, 96), torch.zeros(2, 16)
    weights[0, 5], weights[1, 6:8] = 1, 0.5
    expected, layers = torch.zeros(2, 64), actgen.attention_layers(pipe.unet, 8)

    def reference(module, args, kwargs, _):
        q = module.head_to_batch_dim(module.to_q(args[0]))
        k = module.head_to_batch_dim(module.to_k(kwargs["encoder_hidden_states"]))
        scores = module.get_attention_scores(q, k).unflatten(0, (4, -1)).sum(1)  # [4, 64, 16]
        expected.add_((scores[2:] * weights[:, None]).sum(-1))  # the first two are of the empty prompt

    attention = actgen.ClassAttention(layers, 8, weights)
    with torch.no_grad():
        plain = pipe.unet(x, 500, text).sample
        with attention:
            deaf = pipe.unet(x, 500, text).sample
            assert not attention.heard and not attention.maps.any()
            handles = [layer.register_forward_hook(reference, with_kwargs=True) for layer in layers]
            attention.listening = True
            heard = pipe.unet(x, 500, text).sample
            for handle in handles:
                handle.remove()
    assert len(layers) >= 2 and torch.equal(plain, heard) and torch.equal(plain, deaf)
    assert torch.allclose(attention.maps.flatten(1), expected, atol=1e-5)
    mask, one = attention.mask(), torch.ones(2)
    assert mask.shape == (2, 1, 8, 8) and mask.amin() == 0 and torch.equal(mask.amax((1, 2, 3)), one)


def test_the_mask_keeps_the_foreground_and_frees_the_background(pipe, guides):
    changes, true = [], guides[3]
    for images in (draw(pipe, guides, attention_mask=False)[0], draw(pipe, guides)[0]):
        distance = (images - guides[0]).abs().mean(1)  # [32, 32, 32]
        parts = ([d[m].mean() for d, m in zip(distance, part, strict=True)] for part in (true, ~true))
        changes.append([torch.stack(part) for part in parts])
    foreground, background = (masked - whole for whole, masked in zip(*changes, strict=True))
    assert ttest_rel(background, torch.zeros(24), alternative="greater").pvalue < 1e-3
    assert ttest_rel(background, foreground, alternative="greater").pvalue < 0.05


# --- gradient guidance


def test_a_gradient_step_has_length_nu_or_as_released_in_every_channel():
    """So as released an embedding of d channels moves by nu sqrt(d): 32 nu for Stable Diffusion 2.1."""
    c, gradient = torch.randn(3, 77, 1024), torch.randn(3, 77, 1024)
    gradient[1], gradient[2, 0, 0], gradient[0, :, 5] = 0, math.nan, 0
    moved = (actgen.gradient_step(c, gradient, nu=0.05) - c).flatten(1).norm(dim=1)
    assert torch.allclose(moved, torch.tensor([0.05, 0.0, 0.05]), atol=1e-4)
    assert torch.equal(actgen.gradient_step(c, torch.full_like(c, math.nan), 0.05), c)
    moved = (actgen.gradient_step(c, gradient, 0.05, channels=True) - c).norm(dim=1)
    expected = torch.full((3, 1024), 0.05)
    expected[1], expected[0, 5] = 0, 0
    assert torch.allclose(moved, expected, atol=1e-4)


@pytest.mark.parametrize("channels", [0, 96])
def test_the_sampler_takes_gradient_steps_only_where_there_is_a_loss(pipe, guides, oracle, channels):
    """Of nu, or nu per channel, in the first gradient_steps, for images with a bank or to be hard."""
    labels, path = guides[1][:4], []
    options = dict(adversarial=torch.tensor([False, True, True, False]), nu=0.3, rho=1e4, steps=12)
    options |= dict(guided=torch.tensor([True, True, False, True]), gradient_steps=5)
    options |= dict(nu=0.3 / channels**0.5, channel_steps=True) if channels else {}
    bank = {int(labels[0]): torch.zeros(1, 4, 16, 16)}
    draw(pipe, guides, oracle, slice(4), bank=bank, on_step=lambda *v: path.append(v[2]["c"]), **options)
    start = pipe.encode_prompt([f"a photo of a {NAMES[y]}" for y in labels], "cpu", 1, False)[0]
    moves = torch.stack([start, *path]).diff(dim=0).flatten(2).norm(dim=2)
    has_loss = torch.tensor([True, True, False, bool(labels[3] == labels[0])])
    assert torch.allclose(moves[:5], (0.3 * has_loss).expand(5, 4), atol=1e-5) and not moves[5:].any()


def test_a_gradient_that_is_rounding_noise_is_no_direction(pipe, guides):
    """Where p(y) is 1 up to rounding, L_adv has no gradient for a step to blow up to its full length."""
    x0 = common.encode(pipe, guides[0][:3]).requires_grad_()
    margins = torch.tensor([5.0, 15.0, 25.0])  # of the right class's logit: -log p(y) = 0.01, 3e-7, 1e-11

    def sure(images):
        return torch.stack([margins + images.mean((1, 2, 3)), torch.zeros(3)], 1)

    loss = actgen.adversarial_loss(pipe, x0, torch.zeros(3, dtype=torch.long), sure, 32)
    (gradient,) = torch.autograd.grad(loss, x0)
    assert gradient[0].abs().max() > 0 and not gradient[1:].any()


def test_contrastive_loss_equals_its_formula_and_vanishes_beyond_the_margin():
    x0, bank = torch.randn(4, 16, 16), torch.randn(7, 4, 16, 16)
    expected = np.mean([max(0.0, 50 - np.linalg.norm((x0 - b).numpy())) for b in bank])
    assert actgen.contrastive_loss(x0, bank, 50.0).item() == pytest.approx(expected, rel=1e-5)
    assert actgen.contrastive_loss(x0, bank, 1.0) == 0


def test_the_losses_make_images_hard_and_unlike_the_bank(pipe, guides, oracle):
    (images, labels), options = guides[:2], dict(nu=1.0, guidance_centre=5.0)
    bank = {int(y): common.encode(pipe, images[labels == y]) for y in labels.unique()}
    plain, hard = draw(pipe, guides, **options), draw(pipe, guides, oracle, **options)
    losses = (F.cross_entropy(oracle(x), labels, reduction="none") for x in (hard[0], plain[0]))
    assert ttest_rel(*losses, alternative="greater").pvalue < 0.05

    def distance(latents):
        pairs = zip(latents, labels.tolist(), strict=True)
        return torch.stack([(z - bank[y]).flatten(1).norm(dim=1).mean() for z, y in pairs])

    apart = distance(draw(pipe, guides, bank=bank, **options)[1]), distance(plain[1])
    assert ttest_rel(*apart, alternative="greater").pvalue < 0.01


# --- which images, when


def test_the_curriculum_goes_from_half_text_only_to_half_adversarial():
    assert actgen.curriculum(0, 40) == (0.5, 0.0) and actgen.curriculum(19, 40) == (0.0, 0.5)
    r, hard = zip(*(actgen.curriculum(e, 40) for e in range(20)), strict=True)
    assert np.allclose(np.diff(r), -0.5 / 19) and np.allclose(np.add(r, hard), 0.5)


def test_the_control_sees_as_many_images_as_active_training():
    args = actgen.METHOD.arguments(epochs=6, images_per_epoch=10, few_shot=False, genval_share=0.25)
    epochs = [75, 75 + 10, 75 + 20, 100 + 30, 100 + 30, 100 + 30]  # gen-val of 25 merges at half time
    args.batch_size = 1
    assert actgen.equal_epochs(args, 100) == round(sum(epochs) / 100)


@pytest.mark.parametrize("real", [40, 96, 127])
def test_the_control_sees_as_many_images_of_a_small_data_set_whose_last_batches_are_dropped(real):
    args = actgen.METHOD.arguments(epochs=20, images_per_epoch=10, few_shot=True, batch_size=64, workers=0)

    def shown(images):
        images = common.Images(
            [Image.new("RGB", (8, 8))] * images, [0] * images, common.make_transforms(8)[0]
        )
        return sum(len(y) for _, y, _ in actgen.batches_of(args, common.make_accelerator(), images, 2, 0)[0])

    seen = sum(shown(real + 10 * min(epoch, 10)) for epoch in range(20))
    assert actgen.equal_epochs(args, real) == round(seen / shown(real))


def plan(logits, labels, epoch=19, **changes):
    """The columns of a plan."""
    changes = dict(few_shot=False) | changes
    args = actgen.METHOD.arguments(images_per_epoch=12, epochs=40, **changes)
    gen_val = common.Images(["an image"] * len(labels), labels.tolist())
    rows = actgen.plan_epoch(args, gen_val, logits, labels, NAMES, epoch)
    return {key: [row[key] for row in rows] for key in rows[0]}


def test_guides_are_the_misclassified_images_cycled():
    labels = torch.arange(10)
    logits = F.one_hot(labels, 10).float() * 5
    logits[3], logits[7] = logits[0], logits[1]
    p = plan(logits, labels)
    assert sorted(p["guide_index"]) == [3] * 6 + [7] * 6 and p["label"] == p["guide_index"]
    assert all(p["guided"]) and plan(logits, labels) == p and plan(logits, labels, seed=1) != p


def test_the_plan_draws_by_the_curriculums_probabilities():
    labels = torch.arange(10)
    rows = [plan(torch.zeros(10, 10), labels, epoch=10, seed=seed) for seed in range(100)]
    plain, hard = actgen.curriculum(10, 40)
    guided, adversarial = (np.array([row[key] for row in rows]) for key in ("guided", "adversarial"))
    assert guided.mean() == pytest.approx(1 - plain, abs=0.06) and not (adversarial & ~guided).any()
    assert adversarial[guided].mean() == pytest.approx(hard, abs=0.06)


def test_without_mistakes_the_least_confident_images_guide_and_random_generation_has_no_guides():
    labels = torch.arange(10).repeat(3)
    logits = F.one_hot(labels, 10).float() * torch.linspace(1, 9, 30)[:, None]
    assert sorted(plan(logits, labels)["guide_index"]) == list(range(12))
    p = plan(logits, labels, random_generation=True)
    assert not any(p["guided"]) and not any(p["adversarial"]) and len(set(p["label"])) > 3


def test_few_shot_guides_are_all_images_and_confidence_sets_their_centre():
    labels = torch.arange(10)
    logits = F.one_hot(labels, 10).float() * torch.linspace(0, 20, 10)[:, None]
    p = plan(logits, labels, few_shot=True, guidance_centre=12.5)
    assert set(p["guide_index"]) == set(range(10))
    for guide, centre in zip(p["guide_index"], p["centre"], strict=True):
        assert centre == pytest.approx(12.5 * (1 - logits.softmax(1)[guide, guide].item()), rel=1e-5)


def test_the_images_to_draw_are_those_the_classifier_gets_wrong_and_are_named(capsys):
    digits = common.load_data("digits", "", 32, examples_per_class=20)
    args = actgen.METHOD.arguments(images_per_epoch=64, epochs=40, few_shot=False, genval_share=0.2)
    train, gen_val = actgen.hold_out(args, digits)
    assert len(train) == 160 and sorted(gen_val.labels) == sorted([*range(10)] * 4)
    assert gen_val.transform is digits.test.transform
    everything = actgen.hold_out(actgen.METHOD.arguments(few_shot=True), digits)
    assert [len(part) for part in everything] == [200, 200]
    few = replace(digits.train.subset(range(3)), labels=[0, 0, 1])
    actgen.hold_out(args, replace(digits, train=few, class_names=["cat", "owl"]))
    assert capsys.readouterr().out == "no guides of classes with a single image: owl\n"

    class Zero(torch.nn.Module):
        def forward(self, x):
            return F.one_hot(torch.zeros(len(x), dtype=torch.long), 10).float()

    answers = common.predict(Zero(), gen_val, common.make_accelerator())
    records = actgen.plan_epoch(args, gen_val, *answers, NAMES, 2)
    assert {r["guide_index"] for r in records} == {i for i, y in enumerate(gen_val.labels) if y != 0}
    for j, record in enumerate(records):
        assert record["file_name"] == f"{record['label']:04d} {NAMES[record['label']]}/e003-{j:04d}.png"
        assert record["seed"] == [0, 2, j] and gen_val.labels[record["guide_index"]] == record["label"]
        assert record["guide"] == (f"#{record['guide_index']}" if record["guided"] else None)


def test_guides_are_cropped_as_the_classifier_sees_them(pipe, tmp_path, monkeypatch):
    """In the recipes of Stable Diffusion: a wide photograph loses its sides, and keeps its proportions."""
    wide = np.repeat(np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255]]), 40, 0)  # red, green, blue
    given, photographs = [], common.Images([Image.fromarray(np.tile(wide, (40, 1, 1)))], [0])
    monkeypatch.setattr(actgen, "generate", lambda pipe, guides, *_, **__: given.append(guides) or 1 / 0)
    args = actgen.METHOD.arguments(dataset="folder", out=str(tmp_path))
    record = dict(guide_index=0, label=0, guided=True, adversarial=True, centre=3.0, seed=[0], file_name="a")
    run = common.Run(args, common.make_accelerator())
    with pytest.raises(ZeroDivisionError):
        actgen.draw_variants(args, run, pipe, None, photographs, NAMES, [record], {})
    assert given[0].shape == (1, 3, 32, 32) and given[0][0, 1].mean() > 0.9 > given[0][0, 0].mean() + 0.8


def test_only_guided_images_enter_the_memory_bank(tmp_path):
    rows = [(3, True), (3, False), (5, True), (3, True)]
    records = [dict(label=y, guided=g, file_name=f"{i}.png") for i, (y, g) in enumerate(rows)]
    for i in range(4):
        common.write_file(tmp_path / "latents" / f"{i}.pt", torch.full((4, 2, 2), float(i)))
        common.write_file(tmp_path / "synthetic" / f"{i}.png", torch.full((3, 8, 8), i / 8))
    run, view = SimpleNamespace(path=tmp_path), common.make_transforms(8, "none")[1]
    variants, restored, grey = actgen.Variants(run, view), actgen.Variants(run, view), (0, 32, 64, 96)
    for part in (records[:3], records[3:]):
        variants.add(part)
    restored.load_state_dict(variants.state_dict())
    for each in (variants, restored):
        assert {y: [z[0, 0, 0] for z in bank] for y, bank in each.bank.items()} == {3: [0, 3], 5: [2]}
        pixels = [(round(255 * x[0, 0, 0].item()), y) for x, y, _ in each.images]
        assert pixels == [*zip(grey, (3, 3, 5, 3), strict=True)]


# --- the paper's experiments


SGD, ADAMW = ("sgd", 0.1, 1e-4), ("adamw", 1e-3, 0.05)
EXPERIMENTS = {  # epochs, batch size; optimizer, lr, weight decay; warm-up, smoothing, mixup; images
    "cifar10/resnet50": (300, 128, *SGD, 0, 0.0, False, 9_600),
    "cifar100/vgg16_bn": (300, 128, *SGD, 0, 0.0, False, 9_600),
    "imagenet/resnet152": (130, 256, *SGD, 5, 0.1, False, 133_120),
    "imagenet/vit_small_patch16_224": (300, 1024, *ADAMW, 20, 0.1, True, 76_800),
    "imagenet/deit_base_patch16_224": (300, 1024, *ADAMW, 20, 0.1, True, 76_800),
    "pets/vit_small_patch16_224": (100, 64, "sgd", 0.01, 1e-4, 0, 0.0, False, 3_200),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_classifier_has_the_recipe_of_its_experiment(experiment):
    """The counts of images are the paper's 9.6 K, 0.13 M and 0.08 M."""
    args = actgen.METHOD.arguments(**dict(zip(("dataset", "classifier"), experiment.split("/"), strict=True)))
    told = args.epochs, args.batch_size, args.optimizer, args.lr, args.weight_decay
    told += round(args.warmup * args.epochs), args.label_smoothing, args.mixup
    assert (*told, args.epochs // 2 * args.images_per_epoch) == EXPERIMENTS[experiment]
    assert (args.guidance_scale, args.rho, args.channel_steps, args.square) == (15.0, 200.0, True, "crop")


PARAMETERS = {  # as published by torchvision and timm, at 224 pixels; at 32 by the usual CIFAR code
    ("resnet50", 224): 25_557_032,
    ("vit_small_patch16_224", 224): 22_050_664,
    ("deit_base_patch16_224", 224): 86_567_656,
    ("resnet50", 32): 23_520_842,
    ("resnet152", 32): 58_156_618,
    ("vgg16_bn", 32): 14_728_266,
}


@pytest.mark.parametrize("name, size", PARAMETERS)
def test_the_papers_classifiers_are_the_usual_architectures(name, size):
    args = SimpleNamespace(classifier=name, image_size=size, pretrained=False)
    net = common.build_classifier(args, ["x"] * (1000 if size == 224 else 10))
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name, size]


def test_labels_are_mixed_as_the_images():
    """An image shows the number of its class; MixUp leaves it without edges."""
    y = [i % 5 for i in range(640)]
    pictures = [Image.new("RGB", (32, 32), (50 * k,) * 3) for k in y]
    images, flat = common.Images(pictures, y, common.make_transforms(32)[1]), 0
    args = actgen.METHOD.arguments(mixup=True, batch_size=16)
    batches, count = actgen.batches_of(args, common.make_accelerator(), images, 5, 0)
    for mixed, label, _ in batches:
        assert label.shape == (16, 5) and torch.allclose(label.sum(1), torch.ones(16), atol=1e-5)
        assert torch.allclose(label @ torch.arange(5.0), mixed.mean((1, 2, 3)) * 255 / 50, atol=1e-3)
        flat += mixed.flatten(1).std(1).max().item() < 1e-4
    assert count == 40 and 5 < flat < 35
