"""Another project uses the methods: README's example, then self-training and weights on its images."""

import itertools
import re

import torch

import actgen
import common
import diagen
import dreamda
from digits import world
from runs import in_this_process


def test_readmes_example_draws_digits_for_self_training_and_weights(pipe, tmp_path, monkeypatch):
    """With the generator that knows its digits, and real images in its style."""
    monkeypatch.setattr(common, "load_pipeline", lambda *_, **__: pipe)
    monkeypatch.setattr(world, "STYLE", 0.0)
    readme = (common.ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    run = in_this_process(actgen, "--real_only", epochs=2, examples_per_class=5, eval_every=2)
    assert run[0] == 0, run
    exec(compile(code, "README.md", "exec"), names := {})
    x, y, oracle = names["x"], names["y"], common.load_oracle()
    for images in (names["guided"], names["varied"], names["edited"]):
        assert images.shape == (20, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
        assert (oracle(images)[:, :10].argmax(1) == y).float().mean() >= 0.8
    with torch.no_grad():
        assert names["classifier"](x).shape == (20, len(names["names"]))
    u, seed = torch.cat([names["guided"], names["varied"], names["edited"]]), y.repeat(3)
    classifier = common.build_classifier(dreamda.METHOD.arguments(pretrained=True), names["names"])

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

    for one, two in itertools.combinations(u.reshape(3, 20, -1), 2):
        assert (one - two).abs().mean(1).min() > 0.01
    assert weights.shape == (20, 3) and torch.allclose(weights.sum(1), torch.ones(20))
    assert labelled.float().mean() > 0.4 and (targets == seed)[labelled].float().mean() > 0.9
    with torch.no_grad():
        right = net.eval()(torch.cat([x, u]))[:, 0].argmax(1) == torch.cat([y, seed])
    assert right[:20].float().mean() > 0.9 and right[20:].float().mean() > 0.7
