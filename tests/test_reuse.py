"""Another project uses the methods: README's example, run as it stands."""

import re

import torch

import common

README = common.ROOT / "README.md"


def test_the_example_of_the_readme_runs_and_its_images_and_weights_are_right(tmp_path, monkeypatch, digits):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "digits_sd").symlink_to(common.ROOT / "digits_sd")
    for i in range(0, 200, 10):  # two images of each of ten classes
        folder = tmp_path / "mydata" / "train" / common.DIGIT_NAMES[digits.train.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        digits.train.sources[i].save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)

    assert names["names"] == sorted(common.DIGIT_NAMES) and len(names["y"]) == 20
    assert names["u"].shape == (60, 3, 32, 32) and 0 <= names["u"].min() and names["u"].max() <= 1
    truth = torch.tensor([common.DIGIT_NAMES.index(names["names"][y]) for y in names["seed"]])
    shown = common.Images([common.to_pil(u) for u in names["u"]], truth, digits.test.transform)
    _, read = common.judge_digits(shown, common.make_accelerator())
    assert ((read == truth).view(3, 20).float().mean(1) >= 0.7).all()
    for made, other in ((0, 1), (1, 2), (0, 2)):
        one, two = names["u"].view(3, 20, -1)[[made, other]]
        assert (one - two).abs().mean(1).min() > 0.01
    assert names["weights"].shape == (20, 3)
    assert torch.allclose(names["weights"].sum(1), torch.ones(20))
    with torch.no_grad():
        heads = names["net"].eval()(torch.cat([names["x"], names["u"]]))
    right = heads[:, 0].argmax(1) == torch.cat([names["y"], names["seed"]])
    assert right[:20].float().mean() > 0.9 and right[20:].float().mean() > 0.5
