"""DreamDA's properties, against stock diffusers, closed forms and data whose true labels are known."""

import copy
import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy.stats import ttest_rel
from torchvision.transforms.v2.functional import to_pil_image

import common
import dreamda
import runs
from digits import world
from runs import generators, refused

each_place = pytest.mark.parametrize("where", ["bottleneck", "mid_input", "down", "up", "latents"])


def close(a, b):
    """Equal but for rounding, which differs between processors and between batch sizes."""
    return (a - b).abs().max() < 1e-3 * b.abs().max()


@pytest.fixture(scope="module")
def sources():
    """8 held-out digits: images [8, 3, 32, 32] and their prompts."""
    images, _, prompts, _ = runs.held_out(8)
    return images, prompts


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
    """Makes a stock pipeline of pipe's parts with SD 1.5's DDIM, which encodes images without a draw."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, _=None: self.mode())

    def make(kind, **changes):
        config = pipe.scheduler.config | dict(set_alpha_to_one=False) | changes
        return getattr(diffusers, kind).from_pipe(pipe, scheduler=diffusers.DDIMScheduler.from_config(config))

    return make


@pytest.mark.parametrize("prompt, scales", [("", (1.5, 4, 1)), ("a red", (2, 4, 1)), ("a red", (1, 1, 0.5))])
def test_inversion_and_sampling_are_stock_cycle_diffusion(stock, sources, prompt, scales):
    (images, prompts), (source, guidance, eta) = (part[:1] for part in sources), scales
    options = dict(num_inference_steps=12, guidance_scale=guidance, eta=eta, output_type="latent")
    options |= dict(source_guidance_scale=source, generator=common.generator(0, 0))
    expected = stock("CycleDiffusionPipeline")(prompts[0], prompt, images, **options).images
    options = dict(source_prompts=[prompt], source_guidance=source, steps=12, eta=eta)
    inverted = dreamda.invert(pipe := stock("StableDiffusionPipeline"), images, generators(1), **options)
    assert close(sampled(pipe, inverted, prompts, guidance=guidance), expected)


@pytest.mark.parametrize("kind, one", [("epsilon", False), ("v_prediction", True)])
@pytest.mark.parametrize("steps, strength, eta", [(12, 0.8, 1.0), (7, 1.0, 0.3), (25, 0.5, 0.0)])
def test_without_inversion_it_is_stock_img2img(stock, sources, steps, strength, eta, kind, one):
    images, prompts = (part[:3] for part in sources)
    config, both = dict(prediction_type=kind, set_alpha_to_one=one), dict(strength=strength, eta=eta)
    options = dict(num_inference_steps=steps, guidance_scale=4.0, generator=generators(3), **both)
    img2img = stock("StableDiffusionImg2ImgPipeline", **config)
    expected = img2img(prompts, images, output_type="latent", **options).images
    pipe = stock("StableDiffusionPipeline", **config)
    start = dreamda.invert(pipe, images, generators(3), inversion="none", steps=steps, **both)
    assert close(sampled(pipe, start, prompts, 5.0, perturb="none"), expected)


@pytest.mark.parametrize("prompted", [True, False])
def test_zero_noise_reproduces_the_source(pipe, sources, prompted):
    """By every path, each inverted as alone: two share the first image's z_T, two are of other images."""
    (images, prompts), which, starts = (part[:3] for part in sources), [0, 0, 1, 2], [7, 7, 8, 9]
    prompts = prompts if prompted else [""] * 3
    invert = functools.partial(dreamda.invert, pipe, source_guidance=4.0, steps=12)
    options = dict(source_prompts=prompts, start_generators=[common.generator(key) for key in starts])
    batch = invert(images, generators(4), sources=which, **options)
    back = sampled(pipe, batch, [prompts[i] for i in which])
    assert (back - common.encode(pipe, images)[which]).abs().max() < 1e-3
    for k, i in enumerate(which):
        options = dict(source_prompts=[prompts[i]], start_generators=[common.generator(starts[k])])
        alone = invert(images[[i]], generators(4)[k : k + 1], **options)
        assert close(alone.start, batch.start[[k]]) and close(alone.noise, batch.noise[:, [k]])
    assert torch.equal(*batch.start[:2]) and (batch.noise[:-1, 0] - batch.noise[:-1, 1]).abs().max() > 0.1


def test_ddim_inversion_is_deterministic_and_nears_the_source_with_more_steps(pipe, sources):
    images, prompts = (part[:2] for part in sources)
    options = dict(inversion="ddim", source_prompts=prompts, source_guidance=1.0)
    found = [dreamda.invert(pipe, images, generators(2), steps=n, **options) for n in (6, 18, 54)]
    errors = [sampled(pipe, each, prompts, guidance=1.0) - common.encode(pipe, images) for each in found]
    errors = [error.square().mean().sqrt().item() for error in errors]
    assert errors[0] > 1.3 * errors[1] > 2 * errors[2] and errors[2] < 0.06
    again = dreamda.invert(pipe, images, generators(2, 1), steps=6, **options)
    assert torch.equal(again.start, found[0].start)
    assert again.noise.abs().max() == 0 == again.steps.sigma.max()


# --- perturbation


@each_place
def test_distance_grows_with_s_no_hook_is_left_and_a_unet_that_bypasses_them_is_refused(
    pipe, sources, inverted, where, monkeypatch
):
    """A compiled U-Net may bypass its hooks, silently without noise. Zero noise adds no hook at all."""
    z0, distances = common.encode(pipe, sources[0]), []
    for s in (0.0, 0.1, 0.5, 2.0):
        distances.append((sampled(pipe, inverted, [""] * 8, s, where) - z0).flatten(1).norm(dim=1))
    assert distances[0].max() < 1e-3 * z0.flatten(1).norm(dim=1).min()
    for less, more in itertools.pairwise(distances):
        assert ttest_rel(more.log(), less.log(), alternative="greater").pvalue < 1e-3
    monkeypatch.setattr(pipe.unet, "forward", copy.deepcopy(pipe.unet).forward)
    for s, place in ((0.0, where), (1.0, "none")):
        assert sampled(pipe, inverted, [""] * 2, s, place).isfinite().all()
    with refused("the U-Net bypasses its hooks; is it compiled"):
        sampled(pipe, inverted, [""] * 2, 1.0, where)
    for module in pipe.unet.modules():  # also after an exception
        assert not module._forward_hooks and not module._forward_pre_hooks


def features(unet, s, where="bottleneck", relative=False):
    """Those of two passes of three images, twice as for guidance, in the order in which they are computed."""
    torch.manual_seed(0)
    unet, x, text = copy.deepcopy(unet), torch.randn(6, 4, 16, 16).cumsum(0), torch.randn(6, 16, 96)
    found, modules = {}, {"conv_in": [unet.conv_in], "down": unet.down_blocks, "bottleneck": [unet.mid_block]}
    modules |= {"up": unet.up_blocks, "conv_out": [unet.conv_out]}

    def hear(name, module, inputs, output):
        if before := {"conv_in": "latents", "bottleneck": "mid_input"}.get(name):
            found.setdefault(before, []).append(inputs[0])
        found.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    with torch.no_grad(), dreamda.Perturbation(unet, where, s, generators(3), relative):
        for name, module in ((name, module) for name, several in modules.items() for module in several):
            module.register_forward_hook(functools.partial(hear, name))
        unet(x, 500, text), unet(x, 500, text)
    return found


@pytest.mark.parametrize("relative", [False, True])
def test_the_bottleneck_gets_fresh_noise_of_scale_s(pipe, relative):
    """In every pass, for every image and for both of its guidance rows independently."""
    h, noisy = (torch.stack(features(pipe.unet, s, relative=relative)["bottleneck"]) for s in (0.0, 3.0))
    n = (noisy - h).reshape(2, 2, 3, -1)  # [call, guidance row, image, features]
    s = 3 * (h[0, 3:].flatten(1).std(1) if relative else torch.ones(3))
    assert torch.allclose(n.std(3), s.expand(2, 2, 3), rtol=0.1)
    assert (n.mean(3).abs() < 4 * s / n.shape[3] ** 0.5).all()
    correlation = torch.corrcoef(n.flatten(0, 2)) - torch.eye(12)
    assert correlation.abs().max() < 5 / n.shape[3] ** 0.5


@each_place
def test_noise_enters_where_it_is_asked_for(pipe, where):
    without, noisy = (features(pipe.unet, s, where) for s in (0.0, 0.5))
    same = {place: [*map(torch.equal, without[place], noisy[place])] for place in without}
    assert not any(same[where]) and len(same) == 7
    for place in itertools.takewhile(lambda place: place != where, same):
        assert all(same[place])
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config | {"mid_block_type": None})
    lacks = where in ("bottleneck", "mid_input")
    with refused(f"--perturb '{where}': .* has none") if lacks else nullcontext():
        dreamda.Perturbation(unet, where, 1.0, generators(1))


def test_a_batch_of_variations_equals_batches_of_one(pipe, sources, inverted):
    which, prompts = torch.tensor([0, 0, 0, 2]), [sources[1][i] for i in (0, 0, 0, 2)]
    options = dict(noise_scale=3.0, guidance_scale=4.0)
    batch = dreamda.vary(pipe, inverted, which, prompts, generators(4), **options)
    for one in (slice(i, i + 1) for i in range(4)):
        alone = dreamda.vary(pipe, inverted, which[one], prompts[one], generators(4)[one], **options)
        assert close(alone, batch[one])
    assert not close(batch[1], batch[0])


# --- self-training


def test_the_orthogonality_and_the_consistency_loss_by_hand():
    # class by class: heads 1 and 2: |cos| 0, 1; heads 1 and 3: 0.6, 0; heads 2 and 3: 0.8, 0
    weights = torch.tensor([[(1.0, 0), (0, 1)], [(0, 2), (0, -3)], [(3, 4), (-1, 0)]])
    assert dreamda.orthogonality_loss(weights).item() == pytest.approx(0.5 + 0.3 + 0.4)
    assert dreamda.orthogonality_loss(5 * weights).item() == pytest.approx(1.2)
    assert dreamda.orthogonality_loss(weights[:1].expand(4, -1, -1)).item() == pytest.approx(6)
    strong, weak = torch.tensor([[1.0, 3.0], [1, 1]]).log().requires_grad_(), torch.zeros(2, 2)
    loss = dreamda.consistency_loss(strong, weak.requires_grad_().softmax(1))
    assert torch.allclose(loss, torch.tensor([2 * 0.25**2, 0.0]), atol=1e-6)
    loss.sum().backward()
    assert weak.grad is None and strong.grad[0].abs().max() > 0  # it teaches the strong view alone


def test_heads_that_vote_alike_and_are_sure_agree_and_equal_heads_filter_by_the_threshold_alone():
    sure, unsure, other = [40.0, 0.0, -40.0], [0.0, 0.0, -99.0], [0.0, 40.0, -40.0]
    logits = [[sure] * 3 + [unsure], [sure] * 3 + [other], [sure, sure, other, other], [other] * 4]
    for threshold, accepted in [(0.875, [0, 3]), (0.8751, [3]), (1.0, [3]), (0.5, [0, 3, 4]), (1.1, [])]:
        label, agreed = dreamda.agreement(torch.tensor([*logits, [unsure] * 4]), threshold)
        assert agreed.nonzero().flatten().tolist() == accepted and label[[0, 3, 4]].tolist() == [0, 1, 0]
    equal = 2 * torch.randn(200, 1, 10).expand(-1, 5, -1)
    for threshold in (0.0, 0.5):
        amst, head = (dreamda.synthetic_targets(k, equal, threshold) for k in ("amst", "head"))
        assert torch.equal(amst[0], head[0]) and torch.equal(amst[1], head[1])
        assert amst[1].all() if threshold == 0 else 0 < amst[1].sum() < 200


def test_the_training_loss_equals_its_formula():
    """2 auxiliary heads, 4 real and 4 synthetic images of 5 classes, every term from its definition."""
    real, u, auxiliary = torch.randn(4, 2, 3, 5), torch.randn(4, 3, 5), torch.randn(2, 5, 7)
    y, targets, head = torch.tensor([[0, 4, 2, 2], [1, 0, 3, 3], [1, 2, 2, 1]])
    labelled, weak = torch.tensor([True, False, True, False]), torch.randn(4, 5).softmax(1)

    def total(w_a, w_o, w_c, smoothing=0.0):
        main, pool = (functools.partial(F.cross_entropy, label_smoothing=e) for e in (smoothing, 0.0))
        loss = main(real[:, 0, 0], y) + main(u[[0, 2], 0], targets[[0, 2]]) / 2
        loss = loss + w_a * sum(pool(real[b, 1, k], y[b]) for k, b in ((1, [0, 3]), (2, [1, 2])))
        loss = loss + w_c * (u[[1, 3], 0].softmax(1) - weak[[1, 3]]).square().sum() / 4
        return loss + w_o * dreamda.orthogonality_loss(auxiliary)

    batch = real, y, head, u, targets, labelled, weak, auxiliary
    for weights in itertools.product((0.0, 0.7), (0.0, 0.7), (0.0, 0.7), (0.0, 0.3)):
        assert torch.allclose(dreamda.self_training_loss(*batch, *weights), total(*weights))
    plain = real[:, :1, :1], y, head, *(part[:0] for part in batch[3:])
    assert torch.allclose(dreamda.self_training_loss(*plain), F.cross_entropy(real[:, 0, 0], y))


@pytest.mark.parametrize("name", ["small_cnn", "resnet18", "vgg16_bn", "vit_small_patch16_224", "no bias"])
def test_the_main_head_is_the_classifiers_own(name):
    classifier = common.Classifier(torch.nn.Flatten(), torch.nn.Linear(3072, 3, bias=False))
    if name != "no bias":
        args = SimpleNamespace(classifier=name, image_size=32, pretrained=False)
        classifier = common.build_classifier(args, [*"abc"])
    net, x = dreamda.MultiHead(classifier, 4).eval(), torch.rand(2, 3, 32, 32)
    features, bias = net.features(x), torch.stack([head.bias for head in net.auxiliary])
    assert net(x).shape == (2, 5, 3) and close(net(x)[:, 0], classifier.eval()(x))
    assert close(net(x)[:, 1:], torch.einsum("akd,bd->bak", net.auxiliary_weights(), features) + bias)


def test_every_head_has_an_augmentation_of_its_own(sources, monkeypatch):
    x, augmentations = sources[0][0], dreamda.HEAD_AUGMENTATIONS
    own = {name: torch.stack([augment(x) for _ in range(120)]) for name, augment in augmentations.items()}
    assert [*own] == ["geometry", "colour", "blur", "erase"]
    assert all((one - two).abs().max() > 0.1 for one, two in itertools.combinations(own.values(), 2))
    erased = (own["erase"] == 0).all(1)  # to black, here and there, in about half of the images
    assert torch.equal(own["erase"], x * ~erased[:, None]) and 35 < erased.any((1, 2)).sum() < 85
    # head k has the k-th; beyond four heads they repeat
    monkeypatch.setattr(dreamda, "HEAD_AUGMENTATIONS", {n: lambda x, n=n: x + n for n in range(4)})
    views, heads = zip(*(dreamda.head_views(x, 6) for _ in range(120)), strict=True)
    assert {*heads} == {*range(1, 7)} and max(map(heads.count, heads)) < 40
    assert all(torch.equal(v, torch.stack([x, x + (k - 1) % 4])) for v, k in zip(views, heads, strict=True))


def stripes(count, seed):
    return common.Images(*runs.stripes(count, seed), common.make_transforms(16, "none")[1])


def prepare(out, **changes):
    """Arguments, run and data of four kinds of stripes."""
    quick = dict(image_size=16, augment="none", batch_size=8, epochs=4, eval_every=4, burn_in=0.0)
    quick |= dict(synthetic_ratio=2.0, lr=1e-3, out=str(out))
    args = dreamda.METHOD.arguments(**quick | changes)
    data = common.Data([*"abcd"], stripes(40, 0), stripes(60, 2), class_names=[*"abcd"])
    return args, common.Run(args, common.make_accelerator()), data


def train(out, pool, given, labels="amst", steps=4, **changes):
    """What dreamda.train logs and returns: the lines of metrics.jsonl, the scores, the pool's labels."""
    args, run, data = prepare(out, **changes)
    scores, found = dreamda.train(args, run, data, pool, given, labels, steps)
    return run.logs[dreamda.LABELS[labels]], scores, found


def test_targets_by_every_kind_of_label(tmp_path):
    main, (args, run, _) = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], prepare(tmp_path, threshold=0.65)
    heads = [[[0.1, 0.8, 0.1], [0.2, 0.7, 0.1]], [[0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]]  # they agree, disagree
    model, logits = torch.nn.Module(), torch.cat([torch.tensor(main)[:, None], torch.tensor(heads)], 1).log()
    model.forward = lambda x: logits
    given = dict(seed=torch.tensor([2, -1]), truth=torch.tensor([1, 1]), clip=torch.tensor([1, 0]))
    expected = dict(seed=[2], amst=[1], head=[0], truth=[1, 1], clip=[1, 0], soft=main)
    for kind in expected:
        target, labelled, *_ = dreamda.predict_targets(args, run, model, stripes(2, 0), given, kind)
        assert labelled.tolist() == [True, len(expected[kind]) == 2]
        assert np.allclose(target[labelled], expected[kind])


def test_pseudo_labels_are_right_where_the_sources_are_wrong_and_heads_grow_apart(tmp_path):
    """The true classes are known; two in five sources have another one, and some images have no source."""
    truth, rng = torch.tensor((pool := stripes(96, 1)).labels), np.random.default_rng(0)
    wrong = torch.where(torch.from_numpy(rng.random(96) < 0.4), (truth + 1) % 4, truth)
    wrong[::8] = -1
    training = dict(epochs=6, eval_every=6, synthetic_ratio=1.0, threshold=0.8, lr=0.01, auxiliary_lr=1.0)
    training |= dict(pool=pool, given=dict(seed=wrong, truth=truth), steps=12)
    log, scores, (targets, labelled, _, report) = train(tmp_path, **training)
    sourced = labelled & (wrong >= 0)
    assert labelled.float().mean() > 0.5 and (labelled & ~sourced).any() and scores["test"]["top1"] > 0.8
    right = (targets == truth)[labelled].float().mean().item()
    of_sources = (wrong == truth)[sourced].float().mean().item()
    assert right > 0.9 > 0.75 > of_sources
    assert (report["label_accuracy"], report["seed_accuracy"]) == pytest.approx((right, of_sources))
    assert log[0]["labelled"] == 0 and "label_accuracy" not in log[0]  # new heads are not sure of anything
    alike, *_ = train(tmp_path / "alike", **training, orthogonality_weight=0.0)
    assert log[-1]["orthogonality"] < log[0]["orthogonality"] < alike[-1]["orthogonality"]


@pytest.mark.parametrize("heads", [0, 4])
def test_a_batch_shows_each_real_image_as_it_is_and_to_one_head_and_the_pools_strongly(tmp_path, heads):
    (args, run, data), pool, shown, changed = prepare(tmp_path), stripes(24, 1), [], []
    batches = dreamda.load_batches(args, run.accelerator, data, pool, heads, 20, 0)
    for ((views, k), _, i), (u, _, j) in batches:
        assert views.shape[:2] == (8, 1 + (heads > 0)) and len(u) == 16
        assert all(torch.equal(v[0], data.train[n][0]) for v, n in zip(views, i, strict=True))
        changed += [not torch.equal(v, pool[n][0]) for v, n in zip(u, j, strict=True)]
        shown += k.tolist()
    assert np.bincount(shown)[1:].min() > 25 if heads else shown == [0] * 160
    assert np.mean(changed) > 0.75  # half of the erasing views erase nothing


def test_a_batch_of_the_baseline_has_as_many_images_all_real(tmp_path):
    args, run, data = prepare(tmp_path)
    batches = [*dreamda.load_batches(args, run.accelerator, data, None, 0, 4, 0)]
    sizes = [(*views.shape[:2], len(u)) for ((views, _), *_), (u, *_) in batches]
    assert sizes == [(8 + 16, 1, 0)] * 4


@pytest.mark.parametrize("labels", ["amst", "head", "soft", "seed", "seed_heads"])
def test_before_it_labels_images_the_classifier_learns_from_the_sources_labels(tmp_path, labels, monkeypatch):
    """In the burn-in, and with given labels always, images without a source train nothing."""
    loss, rows, given = dreamda.self_training_loss, [], labels in ("seed", "seed_heads")

    def record(real, synthetic, targets, labelled, w_c, **others):
        assert w_c == (labels == "amst")  # given labels have no consistency loss, also beside heads
        assert (*real.shape[:2], len(synthetic)) == (8, 1 + (labels in ("amst", "seed_heads")), 16)
        rows.append(bool(labelled.all() and (targets == 3).all()))
        others |= dict(targets=targets, labelled=labelled)
        return loss(real=real, synthetic=synthetic, w_c=w_c, **others)

    monkeypatch.setattr(dreamda, "self_training_loss", record)
    known, pool = torch.full((32,), 3), stripes(32, 1)
    known[24:] = -1
    train(tmp_path, pool, dict.fromkeys(("seed", "seed_heads"), known), labels, steps=2, burn_in=0.6)
    assert rows == [True] * 4 + [given] * 4


@pytest.mark.parametrize("labels, count", [("amst", 0), ("seed", 32), ("truth", 40)])
def test_the_note_says_how_many_of_the_pool_are_labelled_and_rightly(tmp_path, labels, count):
    """Of 32 synthetic images, 8 with a source of another class, and 8 of 20 real ones without labels."""
    changes = dict(synthetic=str(tmp_path), unlabelled=8, labels=labels, threshold=1.0, baseline=False)
    args, run, data = prepare(tmp_path / "run", epochs=1, **changes)
    images, records, data.unlabelled = stripes(32, 1), [], stripes(20, 3)
    for x, y, i in images:
        records.append(common.record([*"abcd"], (y + (i < 8)) % 4, str(i), [i]))
        common.write_file(tmp_path / "synthetic" / records[i]["file_name"], x)
    common.write_file(tmp_path / "synthetic" / "metadata.jsonl", records)
    data.truth = lambda pool, _: torch.tensor(images.labels + pool.labels[32:])
    result = dreamda.experiment(args, run, data, None)[dreamda.LABELS[labels]]
    right = {"seed": 75, "truth": 100}.get(labels)
    rightly = f"; {right} % of these labels are right; of the variations' source labels, 75 %" * bool(count)
    assert result["note"] == f"{count} of the 40 images of the pool have a label{rightly}"
    pool, _ = dreamda.make_pool(args, run, data, tmp_path / "synthetic", records, None)
    assert all(hasattr(source, "getpixel") for source in pool.sources)  # decoded


@pytest.mark.parametrize("inversion, starts", [("cycle", 3), ("none", 6)])  # img2img shares no z_T
def test_images_are_encoded_once_a_batch_and_paths_taken_in_turn_whatever_the_batch_size(
    pipe, sources, tmp_path, monkeypatch, inversion, starts
):
    """Two paths of three images: the first and third variations are equal."""
    wide = [to_pil_image((255 * x).round().byte()).resize((64, 32)) for x in sources[0][:3]]
    pictures = common.Images(wide, range(3))
    data = common.Data([*"abc"], pictures, class_names=world.NAMES)
    once, found, encoded = {2: [1, 2, 1, 1, 1], 3: [1, 1, 1], 8: [3, 1]}, [], []  # by batch size
    drawing = dict(variations=3, paths=2, perturb="none", steps=5, inversion=inversion)
    invert, encode = dreamda.invert, common.encode
    spy = functools.wraps(invert)(lambda *a, **k: found.append(invert(*a, **k)) or found[-1])
    monkeypatch.setattr(dreamda, "invert", spy)
    monkeypatch.setattr(common, "encode", lambda p, x: encoded.append(x) or encode(p, x))

    def draw(size):
        found.clear(), encoded.clear()
        args, run, _ = prepare(tmp_path / str(size), generation_batch_size=size, **drawing)
        dreamda.draw_variations(args, run, pipe, data, dreamda.plan_variations(args, data))
        z_T = torch.cat([each.start for each in found]).flatten(1)
        alike = (torch.cdist(z_T, z_T) < 0.1).unique(dim=0)
        assert [*map(len, encoded)] == once[size] and len(alike) == starts
        files = sorted(run.path.glob("synthetic/*/*.png"))
        return np.stack([np.asarray(common.open_image(file), int) for file in files]).reshape(3, 3, -1)

    drawn = np.stack([*map(draw, once)])
    assert (encoded[0] - sources[0][:3]).abs().mean() < 0.05  # squeezed, not cropped
    assert np.ptp(drawn, axis=0).max() <= 2 and np.abs(drawn[:, :, 0] - drawn[:, :, 2]).max() <= 2
    assert (np.abs(drawn[:, :, 0] - drawn[:, :, 1]).max(2) > 20).all()


def test_the_recipe_is_the_released_scripts_and_pets_are_called_cats_or_dogs():
    args = dreamda.METHOD.arguments(dataset="pets", variations=1)
    sampler = args.steps, args.strength, args.eta, args.guidance_scale, args.noise_scale, args.paths
    assert sampler == (100, 0.8, 1.0, 7.5, 3.0, 0) and args.perturb == "bottleneck"
    training = args.optimizer, args.lr, args.warmup, args.epochs, args.batch_size, args.pretrained
    assert training == ("sgd", 0.01, 0.05, 100, 32, False) and args.square == "squeeze"
    data = common.Data([*"ab"], common.Images(["x", "y"], [1, 0]), class_names=["Boxer", "Persian"])
    for record, name in zip(dreamda.plan_variations(args, data), ("Persian", "Boxer"), strict=True):
        assert all(word in record["prompt"] for word in (name, "cat", "dog"))


def test_prompts_of_a_file_take_turns_within_a_class_and_other_lines_are_refused(tmp_path):
    train = common.Images([torch.zeros(3, 8, 8)] * 3, [0, 1, 0])
    data, file = common.Data(["001.cat", "002.dog"], train, class_names=["cat", "dog"]), tmp_path / "p.csv"
    file.write_text('class_name;class_idx;prompt\ncat;0;A {}\n\n 001.cat;0;"a ""tabby""; asleep"\n')
    args = dreamda.METHOD.arguments(prompts=str(file), variations=3, prompt="a photo of a {}")
    prompts = [record["prompt"] for record in dreamda.plan_variations(args, data)]
    assert prompts[:3] == ["A cat", 'a "tabby"; asleep', "A cat"]
    assert prompts[3:] == ["a photo of a dog"] * 3 + ['a "tabby"; asleep', *prompts[:2]]
    data.class_names = ["cat", "cat"]  # both get it
    assert [row["prompt"] for row in dreamda.plan_variations(args, data)[:4]] == [*prompts[:3], "A cat"]
    for line in ("cow;0;a {name}", "cat;a {name}", "a photo of a cat", "cat;0;", "cat;0;a cat; asleep"):
        file.write_text(line)
        with refused(f"p.csv: .'{line[:3]}.* is not CLASS;INDEX;PROMPT"):
            dreamda.plan_variations(args, data)
    file.write_text("class_name;class_idx;prompt\n\n")
    with refused("p.csv has no prompts"):
        dreamda.plan_variations(args, data)
