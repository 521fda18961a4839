"""DreamDA's properties, against stock diffusers, closed forms and data whose true labels are known."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    CycleDiffusionPipeline,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy.stats import ttest_rel
from torch import nn

import common
import dreamda
import runs
from digits import world

PLACES = ["bottleneck", "mid_input", "down", "up", "latents"]


def generators(n, key=0):
    return [common.generator(key, i) for i in range(n)]


def prompts_of(labels):
    return [f"a photo of a {world.NAMES[y]}" for y in labels]


def close(a, b):
    """Equal but for rounding, which differs between processors and between batch sizes."""
    return (a - b).abs().max() < 1e-3 * b.abs().max()


@pytest.fixture(scope="module")
def sources():
    """8 held-out digits: images [8, 3, 32, 32] and their labels."""
    r = world.render_pool(world.pools()["test"], 8, seed=5)
    return r["images"].permute(0, 3, 1, 2).float() / 255, r["labels"]


@pytest.fixture(scope="module")
def inverted(pipe, sources):
    return dreamda.invert(pipe, sources[0], generators(8), steps=8)


def sampled(pipe, inverted, prompts, s=0.0, perturb="bottleneck", guidance=4.0):
    """A variation of each inverted image."""
    n = len(prompts)
    options = dict(perturb=perturb, noise_scale=s, relative_noise=True, guidance_scale=guidance)
    return dreamda.vary(pipe, inverted, torch.arange(n), prompts, generators(n, 1), **options)


# --- inversion


@pytest.fixture
def stock(pipe, monkeypatch):
    """Makes a stock pipeline of pipe's parts with DDIM sampling as in SD 1.5, whose last step has noise, too.

    It encodes images as common.encode does, by the posterior's mode, without a draw.
    """
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)

    def make(kind):
        parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"} | {"scheduler": scheduler}
        made = kind(**parts, requires_safety_checker=False)
        made.set_progress_bar_config(disable=True)
        return made

    return make


@pytest.mark.parametrize(
    "source, source_guidance, guidance, eta",
    [
        ("", 1.5, 4.0, 1.0),
        ("a photo of a red one", 2.0, 4.0, 1.0),
        ("a photo of a red one", 1.0, 1.0, 0.5),
    ],
)
def test_inversion_and_sampling_are_stock_cycle_diffusion(
    stock, sources, source, source_guidance, guidance, eta
):
    images, prompts = sources[0][:1], prompts_of(sources[1][:1])
    options = dict(num_inference_steps=12, guidance_scale=guidance, eta=eta, output_type="latent")
    options |= dict(source_guidance_scale=source_guidance, generator=common.generator(0, 0))
    expected = stock(CycleDiffusionPipeline)(prompts[0], source, images, **options).images
    pipe = stock(StableDiffusionPipeline)
    options = dict(source_prompts=[source], source_guidance=source_guidance, steps=12, eta=eta)
    inverted = dreamda.invert(pipe, images, generators(1), **options)
    assert inverted.steps.sigma.min() > 0
    assert close(sampled(pipe, inverted, prompts, guidance=guidance), expected)


def test_without_inversion_it_is_stock_img2img(stock, sources):
    images, prompts = sources[0][:3], prompts_of(sources[1][:3])
    options = dict(num_inference_steps=12, guidance_scale=4.0, eta=1.0, output_type="latent")
    pipe = stock(StableDiffusionImg2ImgPipeline)
    expected = pipe(prompts, images, generator=generators(3), **options).images
    pipe = stock(StableDiffusionPipeline)
    start = dreamda.invert(pipe, images, generators(3), method="none", steps=12)
    assert close(sampled(pipe, start, prompts, 5.0, perturb="none"), expected)


@pytest.mark.parametrize("prompt", ["", "a photo of a {}"])
def test_zero_noise_reproduces_the_source(pipe, sources, prompt):
    images, prompts = sources[0][:4], [prompt.format(world.NAMES[y]) for y in sources[1][:4]]
    options = dict(source_prompts=prompts, source_guidance=4.0, steps=25)
    inverted = dreamda.invert(pipe, images, generators(4), **options)
    assert (sampled(pipe, inverted, prompts) - common.encode(pipe, images)).abs().max() < 1e-3


def test_ddim_inversion_is_deterministic_and_nears_the_source_with_more_steps(pipe, sources):
    images, prompts, errors = sources[0][:2], prompts_of(sources[1][:2]), []

    def invert(steps, key):
        options = dict(method="ddim", source_prompts=prompts, source_guidance=1.0, steps=steps)
        return dreamda.invert(pipe, images, generators(2, key), **options)

    for steps in (6, 18, 54):
        inverted = invert(steps, 0)
        error = sampled(pipe, inverted, prompts, guidance=1.0) - common.encode(pipe, images)
        errors.append(error.square().mean().sqrt().item())
    assert errors[0] > 1.3 * errors[1] > 2 * errors[2] and errors[2] < 0.06
    assert torch.equal(invert(6, 0).start, invert(6, 1).start)
    assert inverted.noise.abs().max() == 0 == inverted.steps.sigma.max()


def test_with_eta_one_the_posterior_is_ddpms(pipe):
    """Ho et al. 2020, equation 7."""
    s = dreamda.ddim_steps(pipe, 10, 1.0, eta=1.0)
    z, z0 = torch.randn(2, 2, 4, 8, 8)
    for i in range(10):
        alpha, previous = s.alpha[i].double(), s.previous[i].double()
        beta = 1 - alpha / previous
        mean = previous**0.5 * beta * z0 + (alpha / previous) ** 0.5 * (1 - previous) * z
        assert torch.allclose(dreamda.posterior_mean(z, z0, s, i), (mean / (1 - alpha)).float(), atol=1e-4)
        variance = (1 - previous) / (1 - alpha) * beta
        assert s.sigma[i].item() == pytest.approx(variance.sqrt().item(), abs=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_guidance_of_at_most_one_is_the_conditional_prediction_alone(pipe, sources, inverted, scale):
    """As in diffusers."""
    prompts, text = prompts_of(sources[1][:2]), dreamda.embed(pipe, prompts_of(sources[1][:2]), scale)
    z, s = inverted.start[:2], inverted.steps
    with torch.no_grad():
        eps = dreamda.predict_eps(pipe, z, s.t[0], s.alpha[0], text, scale)
        conditional = pipe.unet(z, s.t[0], pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample
    assert len(text) == 1 and torch.equal(eps, conditional)
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    options = dict(source_prompts=prompts, source_guidance=scale, steps=2)
    inverted = dreamda.invert(pipe, sources[0][:2], generators(2), **options)
    sampled(pipe, inverted, prompts, guidance=scale)
    handle.remove()
    assert rows == [2 * len(inverted.steps.t)] + [2] * len(inverted.steps.t)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps, strength, eta", [(7, 1.0, 1.0), (25, 0.8, 0.3), (100, 0.5, 0.0)])
def test_a_step_is_the_stock_ddim_schedulers(pipe, to_one, steps, strength, eta):
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    s = dreamda.ddim_steps(SimpleNamespace(scheduler=scheduler, device="cpu"), steps, strength, eta)
    assert torch.equal(s.t, scheduler.timesteps[-int(steps * strength) :])
    for i, t in enumerate(s.t):
        z, eps, xi = torch.randn(3, 2, 4, 16, 16)
        mine = dreamda.ddim_mean(z, eps, s.alpha[i], s.previous[i], s.sigma[i]) + s.sigma[i] * xi
        expected = scheduler.step(eps, t, z, eta=eta, variance_noise=xi).prev_sample
        assert torch.allclose(mine, expected, atol=1e-5)


def test_a_v_prediction_becomes_the_noise_that_the_stock_scheduler_takes_it_for():
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.set_timesteps(10)
    output, z = torch.randn(2, 2, 4, 8, 8)

    class UNet(nn.Module):
        dtype = torch.float32

        def forward(self, z, t, text):
            return SimpleNamespace(sample=output)

    pipe = SimpleNamespace(unet=UNet(), scheduler=scheduler, device="cpu")
    s = dreamda.ddim_steps(pipe, 10, 1.0, eta=0.0)
    for i, t in enumerate(s.t):
        eps = dreamda.predict_eps(pipe, z, t, s.alpha[i], torch.zeros(1, 2, 1, 1))
        expected = scheduler.step(output, t, z)
        z_again = s.alpha[i] ** 0.5 * expected.pred_original_sample + (1 - s.alpha[i]) ** 0.5 * eps
        assert torch.allclose(z_again, z, atol=1e-5)
        mean = dreamda.ddim_mean(z, eps, s.alpha[i], s.previous[i], s.sigma[i])
        assert torch.allclose(mean, expected.prev_sample, atol=1e-5)


def test_a_batch_is_inverted_as_its_images_alone_whatever_the_rows(pipe, sources):
    images, prompts, rows = sources[0][:3], prompts_of(sources[1][:3]), []

    def invert(chosen, **options):
        options |= dict(source_prompts=prompts[chosen], source_guidance=2.0, steps=6)
        return dreamda.invert(pipe, images[chosen], generators(3)[chosen], **options)

    batch = invert(slice(3))
    handle = pipe.unet.register_forward_pre_hook(lambda unet, inputs: rows.append(len(inputs[0])))
    few = invert(slice(3), rows=8)  # of 4 steps x 3 images x 2 guidance rows
    handle.remove()
    assert rows == [8, 8, 8] and torch.equal(few.start, batch.start) and close(few.noise, batch.noise)
    for i in range(3):
        alone = invert(slice(i, i + 1))
        assert close(alone.start, batch.start[i : i + 1])
        assert close(alone.noise, batch.noise[:, i : i + 1])


def test_steps_that_leave_nothing_are_refused(pipe):
    for steps, strength in ((2000, 0.8), (1000, 1.0), (4, 0.2), (10, 1.1), (0, 1.0)):
        with pytest.raises(common.UserError, match=f"--steps {steps} .*--strength {strength}"):
            dreamda.ddim_steps(pipe, steps, strength)


# --- perturbation


def untouched(unet):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@pytest.mark.parametrize("where", PLACES)
def test_distance_to_the_source_grows_with_s_and_no_hook_is_left(pipe, sources, inverted, where):
    x, text, z0 = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 96), common.encode(pipe, sources[0])
    before, distances = pipe.unet(x, 500, text).sample, []
    for s in (0.0, 0.1, 0.5, 2.0):
        z = sampled(pipe, inverted, [""] * 8, s, where)
        distances.append((z - z0).flatten(1).norm(dim=1))
        assert untouched(pipe.unet) and torch.equal(pipe.unet(x, 500, text).sample, before)
    assert distances[0].max() < 1e-3 * z0.flatten(1).norm(dim=1).min()
    for less, more in itertools.pairwise(distances):
        assert ttest_rel(more.log(), less.log(), alternative="greater").pvalue < 1e-3


@pytest.mark.parametrize("where", PLACES)
def test_the_unet_is_restored_also_after_an_exception(pipe, inverted, where, monkeypatch):
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 96)
    before, forward, hooked = pipe.unet(x, 500, text).sample, pipe.unet.up_blocks[-1].forward, []

    def broken(*args, **kwargs):
        hooked.append(not untouched(pipe.unet))
        if len(hooked) == 3:
            raise RuntimeError("out of memory")
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(pipe.unet.up_blocks[-1], "forward", broken)
        sampled(pipe, inverted, [""] * 2, 1.0, where)
    assert hooked == [True] * 3 and untouched(pipe.unet)
    assert torch.equal(pipe.unet(x, 500, text).sample, before)


def test_zero_noise_adds_no_hook_and_an_unknown_place_is_refused(pipe):
    for where, s in (("bottleneck", 0.0), ("none", 3.0)):
        with dreamda.Perturbation(pipe.unet, where, s, generators(1)):
            assert untouched(pipe.unet)
    with pytest.raises(common.UserError, match="--perturb 'head'.* bottleneck, "):
        dreamda.Perturbation(pipe.unet, "head", 1.0, generators(1))


def heard(unet, modules, perturbation, calls=1):
    """Inputs and outputs of `modules` in forward passes of six random rows under a perturbation."""
    x, text = torch.randn(6, 4, 16, 16), torch.randn(6, 16, 96)
    inputs, outputs = [], []

    def hear(module, args, output):
        inputs.append(args[0] if args else None)  # up and down blocks are called by keywords
        outputs.append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), perturbation:
        handles = [m.register_forward_hook(hear) for m in modules]
        for _ in range(calls):
            unet(x, 500, text)
        for handle in handles:
            handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("paired", [False, True])
def test_the_bottleneck_gets_fresh_noise_of_scale_s(pipe, relative, paired):
    """Both guidance rows of an image: the same noise if paired, else independent."""

    def features(s):
        torch.manual_seed(0)
        p = dreamda.Perturbation(pipe.unet, "bottleneck", s, generators(3), relative, paired)
        return torch.stack(heard(pipe.unet, [pipe.unet.mid_block], p, calls=2)[1])

    h = features(0.0)
    n = (features(3.0) - h).reshape(2, 2, 3, -1)  # [call, guidance row, image, features]
    s = 3 * (h[0, 3:].flatten(1).std(1) if relative else torch.ones(3))
    assert torch.allclose(n.std(3), s.expand(2, 2, 3), rtol=0.1)
    assert (n.mean(3).abs() < 4 * s / n.shape[3] ** 0.5).all()
    same = torch.eye(12, dtype=torch.bool).view(2, 2, 3, 2, 2, 3)
    if paired:
        same |= same.flip(1)
    correlation = torch.corrcoef(n.flatten(0, 2)).view(same.shape)
    assert torch.allclose(correlation[same], torch.ones(()), atol=1e-3)
    assert correlation[~same].abs().max() < 5 / n.shape[3] ** 0.5


@pytest.mark.parametrize("where", PLACES)
def test_noise_enters_where_it_is_asked_for(pipe, where, monkeypatch):
    unet, draws, normal = pipe.unet, [], dreamda.normal
    modules = [unet.conv_in, *unet.down_blocks, unet.mid_block, *unet.up_blocks, unet.conv_out]
    monkeypatch.setattr(dreamda, "normal", lambda *arguments: draws.append(1) or normal(*arguments))

    def features(s):
        """The features of the U-Net in the order in which they are computed."""
        torch.manual_seed(0)
        perturbation = dreamda.Perturbation(unet, where, s, generators(3), paired=True)
        inputs, outputs = heard(unet, modules, perturbation)
        middle = 1 + len(unet.down_blocks)
        return {
            "latents": inputs[:1],
            "conv_in": outputs[:1],
            "down": outputs[1:middle],
            "mid_input": [inputs[middle]],
            "bottleneck": [outputs[middle]],
            "up": outputs[middle + 1 : -1],
            "conv_out": outputs[-1:],
        }

    without, with_noise = features(0.0), features(0.5)
    same = [all(map(torch.equal, without[place], with_noise[place])) for place in without]
    assert same == [i < [*without].index(where) for i in range(len(same))]
    assert len(draws) == len(without[where])


def test_a_batch_of_variations_equals_batches_of_one(pipe, sources, inverted):
    which, prompts = torch.tensor([0, 0, 0, 2]), prompts_of(sources[1][[0, 0, 0, 2]])
    options = dict(noise_scale=3.0, guidance_scale=4.0)
    batch = dreamda.vary(pipe, inverted, which, prompts, generators(4), **options)
    for i in range(4):
        one = slice(i, i + 1)
        alone = dreamda.vary(pipe, inverted, which[one], prompts[one], generators(4)[one], **options)
        assert close(alone, batch[one])
    assert not close(batch[1], batch[0])


# --- self-training


def test_the_orthogonality_loss_by_hand():
    heads = [[(1, 0), (0, 1)], [(0, 2), (0, -3)], [(3, 4), (-1, 0)]]
    # class by class: heads 1 and 2: |cos| 0, 1; heads 1 and 3: 0.6, 0; heads 2 and 3: 0.8, 0
    weights = torch.tensor(heads, dtype=torch.float32)
    assert dreamda.orthogonality_loss(weights).item() == pytest.approx(0.5 + 0.3 + 0.4)
    assert dreamda.orthogonality_loss(5 * weights).item() == pytest.approx(1.2)
    assert dreamda.orthogonality_loss(weights[:1].expand(4, -1, -1)).item() == pytest.approx(6)


def test_the_consistency_loss_by_hand_teaches_the_strong_view_alone():
    strong, weak = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]], requires_grad=True), torch.zeros(2, 2)
    loss = dreamda.consistency_loss(strong, weak.requires_grad_().softmax(1))
    assert torch.allclose(loss, torch.tensor([2 * 0.25**2, 0.0]), atol=1e-6)
    loss.sum().backward()
    assert weak.grad is None and strong.grad[0].abs().max() > 0


def test_heads_agree_if_all_vote_alike_and_are_sure_on_average():
    sure, unsure, other = [40.0, 0.0, -40.0], [0.0, 0.0, -99.0], [0.0, 40.0, -40.0]
    logits = torch.tensor([
        [sure, sure, sure, unsure],  # confidences 1, 1, 1, 1/2
        [sure, sure, sure, other],  # one dissents
        [sure, sure, other, other],  # a tie
        [other, other, other, other],
        [unsure, unsure, unsure, unsure],
    ])  # fmt: skip
    for threshold, accepted in [(0.875, [0, 3]), (0.8751, [3]), (1.0, [3]), (0.5, [0, 3, 4]), (1.1, [])]:
        label, agreed = dreamda.agreement(logits, threshold)
        assert agreed.nonzero().flatten().tolist() == accepted
        assert label[[0, 3, 4]].tolist() == [0, 1, 0]


def test_equal_heads_filter_nothing_but_by_the_threshold():
    logits = 2 * torch.randn(200, 1, 10)
    equal = logits.expand(-1, 5, -1)
    for threshold in (0.0, 0.5):
        amst, head = (dreamda.synthetic_targets(k, equal, threshold) for k in ("amst", "head"))
        assert torch.equal(amst[0], head[0]) and torch.equal(amst[1], head[1])
    assert dreamda.agreement(equal, 0.0)[1].all() and 0 < dreamda.agreement(equal, 0.5)[1].sum() < 200
    assert not dreamda.agreement(2 * torch.randn(200, 4, 10), 0.0)[1].all()


def test_targets_by_every_kind_of_label():
    main = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
    agreeing, disagreeing = [[0.1, 0.8, 0.1], [0.2, 0.7, 0.1]], [[0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]
    logits = torch.tensor([[main[0], *agreeing], [main[1], *disagreeing]]).log()
    images = common.Images(*runs.stripes(2, 0), common.make_transforms(16, "none")[1])
    known = [torch.tensor(labels) for labels in ([2, -1], [1, 1], [1, 0])]  # the source's, the truth, CLIP's
    pool, args = dreamda.Pool(images, *known), SimpleNamespace(threshold=0.65, workers=0)

    class Model(nn.Module):
        def forward(self, x):
            return logits

    def targets(kind):
        target, labelled, _ = dreamda.predict_targets(args, common.make_accelerator(), Model(), pool, kind)
        return target[labelled].tolist(), labelled.tolist()

    assert targets("seed") == ([2], [True, False])
    assert targets("truth") == ([1, 1], [True, True])
    assert targets("amst") == ([1], [True, False])
    assert targets("head") == ([0], [True, False])
    assert targets("clip") == ([1, 0], [True, True])
    soft, labelled = targets("soft")
    assert np.allclose(soft, main) and labelled == [True, True]


def test_the_training_loss_equals_its_formula():
    """2 auxiliary heads, 4 real and 4 synthetic images of 5 classes, every term from its definition."""
    real, synthetic = torch.randn(2, 4, 3, 5).double(), torch.randn(4, 3, 5).double()
    head, seen = torch.tensor([1, 2, 2, 1]), {1: (0, 3), 2: (1, 2)}  # which images each head sees
    y, targets = torch.tensor([0, 4, 2, 2]), torch.tensor([1, 0, 3, 3])
    labelled, weak = torch.tensor([True, False, True, False]), torch.randn(4, 5).double().softmax(1)
    auxiliary = torch.randn(2, 5, 7).double()

    def cross_entropy(logits, label, smoothing=0.0):
        log_p = logits.numpy() - math.log(np.exp(logits.numpy()).sum())
        return -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()

    terms = {
        "main": np.mean([cross_entropy(real[0, b, 0], y[b]) for b in range(4)]),
        "w_a": sum(np.mean([cross_entropy(real[1, b, k], y[b]) for b in seen[k]]) for k in (1, 2)),
        "w_o": dreamda.orthogonality_loss(auxiliary).item(),
        "labelled": sum(cross_entropy(synthetic[u, 0], targets[u]) for u in (0, 2)) / 4,
        "w_c": sum((synthetic[u, 0].softmax(0) - weak[u]).square().sum().item() for u in (1, 3)) / 4,
    }
    for w_a, w_o, w_c in itertools.product((0.0, 0.7), repeat=3):
        weights = dict(w_a=w_a, w_o=w_o, w_c=w_c)
        known, guessed = (real, y, head), (synthetic, targets, labelled, weak)
        loss = dreamda.self_training_loss(*known, *guessed, auxiliary, **weights)
        expected = sum(weights.get(name, 1.0) * value for name, value in terms.items())
        assert loss.item() == pytest.approx(expected)
    plain = (real[:1, :, :1], y, head, synthetic[:0], targets[:0], labelled[:0], weak[:0], auxiliary[:0])
    assert dreamda.self_training_loss(*plain).item() == pytest.approx(terms["main"])
    smooth = np.mean([cross_entropy(real[0, b, 0], y[b], 0.3) for b in range(4)])
    assert dreamda.self_training_loss(*plain, smoothing=0.3).item() == pytest.approx(smooth)
    # the labels of synthetic images are smoothed, those of the auxiliary heads are not
    of_pool = sum(cross_entropy(synthetic[u, 0], targets[u], 0.3) for u in (0, 2)) / 4
    loss = dreamda.self_training_loss(*known, *guessed, auxiliary, 0.7, 0.0, 0.0, smoothing=0.3)
    assert loss.item() == pytest.approx(smooth + 0.7 * terms["w_a"] + of_pool)


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vgg16_bn", "vit_small_patch16_224"])
def test_the_main_head_is_the_classifiers_own(name):
    classifier = common.build_classifier(name, [*"abc"], 32).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = classifier(x)
        net = dreamda.MultiHead(classifier, 4).eval()
        logits, features, heads = net(x), net.backbone(x), net.auxiliary_weights()
    assert logits.shape == (2, 5, 3) and torch.allclose(logits[:, 0], expected, atol=1e-5)
    bias = torch.stack([head.bias for head in net.auxiliary])
    assert torch.allclose(logits[:, 1:], torch.einsum("akd,bd->bak", heads, features) + bias, atol=1e-4)


def test_a_main_head_without_bias_starts_without():
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    x = torch.rand(5, 3, 2, 2)
    expected = classifier(x)
    assert torch.allclose(dreamda.MultiHead(classifier, 2)(x)[:, 0], expected, atol=1e-6)


def test_heads_that_learn_the_same_stay_different_by_the_orthogonality_loss_alone():
    features, y, start, end = torch.randn(64, 16), torch.arange(64) % 4, {}, {}
    for weight in (0.0, 0.3):
        net = dreamda.MultiHead(nn.Sequential(nn.Linear(16, 4)), 4)
        optimizer = torch.optim.Adam(net.parameters(), 0.03)
        start[weight] = dreamda.orthogonality_loss(net.auxiliary_weights()).item()
        for _ in range(150):
            logits = net(features)
            loss = sum(F.cross_entropy(logits[:, k], y) for k in range(1, 5))
            loss = loss + weight * dreamda.orthogonality_loss(net.auxiliary_weights())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        end[weight] = dreamda.orthogonality_loss(net.auxiliary_weights()).item()
    assert end[0.3] < 0.5 * start[0.3] and end[0.0] > start[0.0]


@pytest.mark.parametrize("augment", ["digits", "crop", "resized"])
def test_views_are_images_of_the_classifiers_size(augment, sources):
    image = common.to_pil(sources[0][0]).resize((48, 40))
    for transform, shape in zip(
        dreamda.make_views(32, augment, 6), [(7, 3, 32, 32), (3, 32, 32)], strict=True
    ):
        views = torch.stack([transform(image) for _ in range(20)])
        assert views.shape == (20, *shape) and views.dtype == torch.float32
        assert 0 <= views.min() and views.max() <= 1 and len(views.unique(dim=0)) == 20
    assert dreamda.make_views(32, augment, 0)[0](image).shape == (3, 32, 32)


def test_every_head_has_an_augmentation_of_its_own(sources):
    (real, _), x = dreamda.make_views(32, "none", 6), (255 * sources[0][:1]).byte().expand(120, -1, -1, -1)
    views = real.augment(x, torch.rand(120, real.draws))
    assert views.shape == (120, 7, 3, 32, 32) and torch.equal(views[:, 0], x / 255)
    (x, *own) = views.transpose(0, 1)
    assert [*dreamda.HEAD_AUGMENTATIONS] == ["geometry", "colour", "blur", "erase"]
    for one, two in itertools.combinations(range(4), 2):
        assert (own[one] - own[two]).abs().max() > 0.1
    erased = (own[3] == 0).all(1)  # to black, here and there, in about half of the images
    assert torch.equal(own[3], x * ~erased[:, None]) and 0 < erased.float().mean() < 0.1
    assert 35 < erased.any((1, 2)).sum() < 85
    # a mean colour hardly changes by blur; colour keeps every grey image grey
    assert (own[2].mean((2, 3)) - x[0].mean((1, 2))).abs().max() < 0.02
    grey = dreamda.colour(torch.rand(9, 1, 4, 4).expand(-1, 3, -1, -1), torch.rand(9, 3))
    assert (grey.amax(1) - grey.amin(1)).max() < 1e-6
    # beyond four heads they repeat: geometry and colour, drawn anew
    change = [(o - x[0]).abs().mean() for o in own]
    assert not torch.equal(own[4], own[0]) and torch.allclose(
        torch.stack(change[4:]), torch.stack(change[:2]), rtol=0.6
    )


def stripes(count, seed):
    return common.Images(*runs.stripes(count, seed), common.make_transforms(16, "none")[1])


def arguments(out, **values):
    return dreamda.resolve(dreamda.Args(out=str(out), **values))


def test_pseudo_labels_are_right_where_the_sources_are_wrong_and_heads_grow_apart(tmp_path):
    """The true classes are known; two in five sources have another one, and some images have no source."""
    pool, rng = stripes(96, 1), np.random.default_rng(0)
    truth = torch.tensor(pool.labels)
    source_labels = torch.where(torch.from_numpy(rng.random(96) < 0.4), (truth + 1) % 4, truth)
    source_labels[::8] = -1
    training = dict(epochs=6, eval_every=6, batch_size=8, synthetic_ratio=1.0, threshold=0.8)
    training |= dict(lr=0.01, auxiliary_lr=1.0)
    args = arguments(tmp_path, image_size=16, augment="none", **training)
    accelerator, data = common.make_accelerator(), common.Data([*"abcd"], stripes(40, 0), stripes(60, 2))
    run, pool = common.Run(args, accelerator), dreamda.Pool(pool, source_labels, truth)
    scores, targets, labelled = dreamda.train(args, run, accelerator, data, pool, "amst")
    log, right = run.logs["AMST"], (targets == truth)[labelled].float().mean()
    with_source = labelled & (source_labels >= 0)
    assert labelled.float().mean() > 0.5 and (labelled & ~with_source).any()
    assert right > 0.9 > 0.75 > (source_labels == truth)[with_source].float().mean()
    assert log[0]["labelled"] == 0 and "label_accuracy" not in log[0]  # new heads are not sure of anything
    assert log[-1]["label_accuracy"] > log[-1]["seed_accuracy"] and scores["test"]["top1"] > 0.8
    torch.manual_seed(args.seed)
    fresh = dreamda.MultiHead(common.build_classifier("small_cnn", data.class_names, 16), 4)
    assert log[-1]["orthogonality"] < dreamda.orthogonality_loss(fresh.auxiliary_weights()).item()


@pytest.fixture
def steps(monkeypatch):
    """Of each training step: the heads of its real images, and how many real and synthetic ones it takes."""
    loss, shown = dreamda.self_training_loss, []

    def record(real, y, head, synthetic, *others, **weights):
        shown.append((head, (*real.shape[:2], len(synthetic))))
        return loss(real, y, head, synthetic, *others, **weights)

    monkeypatch.setattr(dreamda, "self_training_loss", record)
    return shown


def test_a_step_shows_each_real_image_to_one_auxiliary_head_and_the_steps_to_all(tmp_path, steps):
    """So a step takes 2 B + U images, x, a_k(x) and u, where one with the sources' labels takes B + U."""
    training = dict(epochs=4, eval_every=4, batch_size=8, image_size=16, augment="none", threshold=0.8)
    args = arguments(tmp_path, **training)
    data = common.Data([*"abcd"], stripes(8, 0), stripes(8, 2))
    run, pool = common.Run(args, common.make_accelerator()), stripes(96, 1)
    pool = dreamda.Pool(pool, torch.tensor(pool.labels))
    dreamda.train(args, run, common.make_accelerator(), data, pool, "amst")
    shown, rows = zip(*steps, strict=True)
    assert set(rows) == {(2, 8, 16)} and len(rows) == 24
    # each batch holds the same eight images, so in four steps every one of them has seen every head
    counts = torch.stack([(torch.cat(shown) == k).sum() for k in (1, 2, 3, 4)])
    assert counts.sum() == 24 * 8 and (counts == 48).all()
    assert all((torch.bincount(head, minlength=5)[1:] == 2).all() for head in shown)


@pytest.mark.parametrize("labels", ["amst", "head", "soft", "seed"])
def test_before_it_labels_images_the_classifier_learns_from_as_many_real_ones(tmp_path, steps, labels):
    """In the burn-in it does not see the pool, whose images may be any. Given labels need no burn-in."""
    losses = []
    for seed in (1, 3):
        training = dict(epochs=4, eval_every=4, batch_size=8, image_size=16, augment="none", burn_in=0.6)
        args = arguments(tmp_path / str(seed), labels=labels, **training)
        data = common.Data([*"abcd"], stripes(40, 0), stripes(8, 2))
        run, pool = common.Run(args, common.make_accelerator()), stripes(32, seed)
        pool = dreamda.Pool(pool, torch.tensor(pool.labels))
        dreamda.train(args, run, common.make_accelerator(), data, pool, labels)
        (log,) = run.logs.values()
        losses.append([line["loss"] for line in log])
        assert [line["pool"] for line in log] == ([32] * 4 if labels == "seed" else [0, 0, 32, 32])
    rows = [row for _, row in steps]
    burning, after = ((2, 16, 0), (2, 8, 16)) if labels == "amst" else ((1, 24, 0), (1, 8, 16))
    assert rows == ([after] * 16 if labels == "seed" else ([burning] * 4 + [after] * 4) * 2)
    first, second = losses
    assert [a == b for a, b in zip(first, second, strict=True)][:2] == [labels != "seed"] * 2
    assert first[3] != second[3]


def test_heads_that_learn_alone_to_the_end_learn_as_without_a_pool(tmp_path):
    training = dict(epochs=2, eval_every=2, batch_size=8, image_size=16, augment="none", variations=4)
    data = common.Data([*"abcd"], stripes(8, 0), stripes(8, 2))
    pool = dreamda.Pool(stripes(32, 1), torch.zeros(32, dtype=torch.long))
    found = []
    for name, burn_in, images in (("alone", 1.0, pool), ("without", 0.0, None), ("after", 0.5, pool)):
        args = arguments(tmp_path / name, burn_in=burn_in, **training)
        run = common.Run(args, common.make_accelerator())
        scores, targets, _ = dreamda.train(args, run, common.make_accelerator(), data, images, "amst")
        assert len(targets) == (32 if images else 0)
        found.append(([line["loss"] for line in run.logs["AMST"]], scores["test"]["nll"]))
    alone, without, after = found
    assert alone == without != after


def test_beside_given_labels_there_is_no_consistency_loss_even_with_heads(tmp_path):
    training = dict(epochs=1, eval_every=1, batch_size=8, image_size=16, augment="none", labels="seed_heads")
    data, losses = common.Data([*"abcd"], stripes(8, 0), stripes(8, 2)), []
    pool = dreamda.Pool(stripes(32, 1), torch.arange(32) % 5 - 1)  # some have no label
    for weight in (0.0, 5.0):
        args = arguments(tmp_path / str(weight), consistency_weight=weight, **training)
        run = common.Run(args, common.make_accelerator())
        dreamda.train(args, run, common.make_accelerator(), data, pool, "seed_heads")
        ((line,),) = run.logs.values()
        losses.append((line["loss"], line["orthogonality"]))
    assert losses[0] == losses[1]


def test_a_pretrained_classifier_labels_from_the_first_epoch_on(tmp_path):
    assert arguments(tmp_path).burn_in == 0 < arguments(tmp_path, pretrained=False).burn_in
    assert arguments(tmp_path, dataset="pets").burn_in > 0
    assert (
        arguments(tmp_path, burn_in=0.3).burn_in == arguments(tmp_path, pretrained=False, burn_in=0.3).burn_in
    )


def test_paths_share_z_T_and_each_reproduces_the_image_by_noise_of_its_own(pipe, digits):
    x = digits.test[3][0][None].expand(2, -1, -1, -1)
    starts, own = ([common.generator(0, key) for key in keys] for keys in ((7, 7), (1, 2)))
    inverted = dreamda.invert(pipe, x, own, steps=10, start_generators=starts)
    assert (
        torch.equal(*inverted.start) and (inverted.noise[:-1, 0] - inverted.noise[:-1, 1]).abs().max() > 0.1
    )
    nothing = dict(perturb="none", guidance_scale=1)
    back = dreamda.vary(pipe, inverted, torch.tensor([0, 1]), [""] * 2, own, **nothing)
    assert (back - common.encode(pipe, x)).abs().max() < 1e-3


# --- the images of a run


@pytest.mark.parametrize("size, batches", [(2, 3), (8, 2)])
def test_variations_use_the_paths_in_turn_whatever_the_batch_size(
    pipe, digits, tmp_path, monkeypatch, size, batches
):
    """Three variations and two paths of each of three images: the first and the third are equal."""
    calls, invert = [], dreamda.invert
    monkeypatch.setattr(dreamda, "invert", lambda *a, **k: calls.append(len(a[1])) or invert(*a, **k))
    data = common.Data(digits.class_names, digits.train.subset([0, 70, 140]), digits.test)
    drawing = dict(variations=3, paths=2, perturb="none", steps=5)
    drawn = []
    for batch in (3, size):
        args = arguments(tmp_path / str(batch), generation_batch_size=batch, **drawing)
        run, records = common.Run(args, common.make_accelerator()), dreamda.records_of(args, data)
        dreamda.draw_variations(args, run, pipe, data, records)
        files = [run.path / "synthetic" / record["file_name"] for record in records]
        drawn.append(np.stack([np.asarray(common.open_image(file), int) for file in files]))
    assert np.abs(drawn[0] - drawn[1]).max() <= 2
    assert len(calls) == 3 + batches and sum(calls) == 2 * 3 * 2  # every image is inverted twice, no more
    first, second, third = drawn[1].reshape(3, 3, -1).swapaxes(0, 1)
    assert np.abs(first - third).max() <= 2
    assert (np.abs(first - second).max(1) > 20).all()
    assert [record["guide_index"] for record in records] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
