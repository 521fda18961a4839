"""Another project uses the methods: README's example, and a longer one with self-training and weights."""

import re

import pytest
import torch
import torchvision

import actgen
import common
import diagen
import dreamda
from digits import judge, world
from runs import in_this_process


def share_read(images, digits_shown) -> float:
    """The share of images in which the oracle reads the digit."""
    pictures, to_tensor = [*map(common.to_pil, images)], common.make_transforms(32)[1]
    _, read = judge.read(common.Images(pictures, digits_shown, to_tensor), common.make_accelerator())
    return (read == torch.as_tensor(digits_shown)).float().mean().item()


def test_readmes_example_runs_on_a_runs_classifier_and_each_method_draws_digits(quick, tmp_path, monkeypatch):
    readme = (common.ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    run = in_this_process(actgen, "--real_only", epochs=2, examples_per_class=5, eval_every=2)
    assert run[0] == 0, run
    exec(compile(code, "README.md", "exec"), names := {})
    for images in (names["guided"], names["varied"], names["edited"]):
        assert images.shape == (20, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
        assert share_read(images, names["y"].tolist()) >= 0.7
    with torch.no_grad():
        assert names["classifier"](names["x"]).shape == (20, len(names["names"]))


@pytest.fixture
def folder(digits, tmp_path):
    """Two images of each of ten classes, as class folders."""
    for i in range(0, 200, 10):
        path = tmp_path / "mydata" / world.NAMES[digits.train.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        digits.train.sources[i].save(path)
    return tmp_path / "mydata"


def test_self_training_and_weights_work_on_images_of_all_three_methods(folder):
    pipe = common.load_pipeline(common.DIGITS_CLEAN)  # or any Stable Diffusion, by model id or folder
    real = torchvision.datasets.ImageFolder(folder, common.make_transforms(common.resolution(pipe))[1])
    x, y, names = torch.stack([image for image, _ in real]), torch.tensor(real.targets), real.classes
    prompts = [f"a photo of a {names[label]}" for label in y]
    generators = [common.generator(0, i) for i in range(len(y))]
    args = dreamda.METHOD.arguments(guidance_scale=4.0, steps=25)
    classifier = common.build_classifier(args, names)  # small_cnn, pretrained

    # an image by each method for every real one, all [N, 3, H, W] in [0, 1]
    options = common.options(actgen.generate, actgen.METHOD.arguments(guidance_scale=4.0, steps=25))
    guided, *_ = actgen.generate(pipe, x, y, names, **options | {"generators": generators})
    inverted = dreamda.invert(pipe, x, generators, **common.options(dreamda.invert, args))
    sources, options = torch.arange(len(y)), common.options(dreamda.vary, args)
    varied = common.decode(pipe, dreamda.vary(pipe, inverted, sources, prompts, generators, **options))
    edited = diagen.img2img(pipe, common.encode(pipe, x), prompts, generators, steps=25, guidance_scale=4)
    u, seed = torch.cat([guided, varied, edited]), y.repeat(3)

    # asymmetric multi-head self-training on them
    net = dreamda.MultiHead(classifier, heads=4)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for step in range(80):
        with torch.no_grad():
            weak = net.eval()(u)
        targets, labelled = dreamda.synthetic_targets("amst", weak, threshold=0.5)
        head = 1 + (torch.arange(len(x)) + step) % 4  # of each image
        logits = net.train()(torch.cat([x, x, u]))  # put your augmentations in the second place
        of_real = dict(real=logits[: 2 * len(x)].unflatten(0, (2, -1)).transpose(0, 1), y=y, head=head)
        of_pool = dict(synthetic=logits[2 * len(x) :], targets=targets, labelled=labelled)
        weights = dict(weak=weak[:, 0].softmax(1), auxiliary=net.auxiliary_weights())
        loss = dreamda.self_training_loss(**of_real | of_pool | weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # DIAGen's weights: how sure a classifier is of each image, among the three of a real one
    with torch.no_grad():
        q = net.eval()(u)[:, 0].softmax(1)[torch.arange(len(u)), seed]
    weights = diagen.weights_of(q.view(3, -1).T)  # [N, 3]

    assert names == sorted(world.NAMES) and u.shape == (60, 3, 32, 32)
    shown = [world.NAMES.index(names[label]) for label in seed]
    for k, other in ((0, 1), (1, 2), (2, 0)):
        assert share_read(u[20 * k : 20 * k + 20], shown[20 * k : 20 * k + 20]) >= 0.7
        one, two = u.reshape(3, 20, -1)[[k, other]]
        assert (one - two).abs().mean(1).min() > 0.01
    assert weights.shape == (20, 3) and torch.allclose(weights.sum(1), torch.ones(20))
    assert labelled.float().mean() > 0.3 and (targets == seed)[labelled].float().mean() > 0.9
    with torch.no_grad():
        right = net.eval()(torch.cat([x, u]))[:, 0].argmax(1) == torch.cat([y, seed])
    assert right[:20].float().mean() > 0.9 and right[20:].float().mean() > 0.5
