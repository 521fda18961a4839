"""The samplers' hook on_step, against recomputed values; ActGen's equations by it: test_actgen.py."""

import pytest
import torch

import actgen
import common
import diagen
import dreamda
import runs
from digits import inside, world
from runs import generators

PROMPTS = ["a photo of a two"] * 3


def close(a, b, atol=1e-4):
    return torch.allclose(a, b, atol=atol)


@pytest.fixture(scope="module")
def guides():
    return runs.held_out(3)[:2]


def test_actgens_hook_changes_no_image_and_tells_of_the_guide_while_it_is_mixed_in(pipe, guides):
    oracle, steps = common.load_oracle(), inside.Steps()
    bank = {int(y): [*torch.randn(5, 4, 16, 16)] for y in guides[1]}
    options = dict(prompt="a photo of a {}", guidance_scale=4.0, attention_resolution=8, bank=bank, steps=20)
    options |= dict(gradient_steps=4, guidance_centre=2.0, image_size=32)
    call = pipe, *guides, world.NAMES, lambda x: oracle(x)[:, :10]
    seen = actgen.generate(*call, generators=generators(3), on_step=steps.add, **options)
    unseen = actgen.generate(*call, generators=generators(3), **options)
    assert all(map(torch.equal, seen, unseen)) and torch.equal(steps[-1]["x_tilde"], unseen[1])
    assert [(step["i"], step["t"]) for step in steps] == [*enumerate(pipe.scheduler.timesteps.tolist())]
    mixing = [bool((step["gamma"] > 1e-4).all()) for step in steps]
    assert 4 < sum(mixing) < 20 and mixing == [{"m", "x_g"} <= step.keys() for step in steps]
    assert (steps["gradient_norm"] > 0).all(1).tolist() == [True] * 4 + [False] * 16


@pytest.mark.parametrize("inversion", ["cycle", "ddim"])
def test_dreamdas_hook_gives_the_path_and_its_noise(pipe, guides, inversion):
    path, options = inside.Steps(), dict(inversion=inversion, steps=6)
    inverted = dreamda.invert(pipe, guides[0], generators(3), on_step=path.add, **options)
    unseen = dreamda.invert(pipe, guides[0], generators(3), **options)
    assert torch.equal(inverted.start, unseen.start) and torch.equal(inverted.noise, unseen.noise)
    path.sort(key=lambda step: step["i"])
    z, text, s = path["z"], dreamda.embed(pipe, [""] * 3, 1.0), inverted.steps
    with torch.no_grad():
        assert close(z[-1], common.encode(pipe, guides[0]))
        if inversion == "cycle":  # the sampler goes along the path by the noise
            for i, before in enumerate([inverted.start, *z[:-1]]):
                eps = dreamda.predict_eps(pipe, before, s.t[i], s.alpha[i], text)
                after = dreamda.ddim_mean(before, eps, s.alpha[i], s.previous[i], s.sigma[i])
                assert close(after + path[i]["noise"], z[i])
        else:
            eps = dreamda.predict_eps(pipe, z[0], s.t[0], s.previous[0], text)
            assert close(dreamda.ddim_mean(z[0], eps, s.previous[0], s.alpha[0], 0.0), inverted.start)


def test_dreamdas_hook_gives_the_variations_and_the_size_of_the_perturbation(pipe, guides):
    inverted, steps, seen = dreamda.invert(pipe, guides[0], generators(3), steps=6), inside.Steps(), []
    options = dict(noise_scale=2.0, relative_noise=True, guidance_scale=4.0)
    call = (pipe, inverted, torch.arange(3), PROMPTS)
    unseen = dreamda.vary(*call, generators(3), **options)
    with pipe.unet.mid_block.register_forward_hook(lambda module, inputs, h: seen.append(h[-3:])):
        drawn = dreamda.vary(*call, generators(3), on_step=steps.add, **options)
    assert torch.equal(drawn, unseen) and torch.equal(steps[-1]["y"], unseen)
    assert torch.equal(steps["noise"], inverted.noise)
    for h, step in zip(seen, steps, strict=True):
        assert close(step["h_norm"], h.flatten(1).norm(dim=1))
        size = 2 * h.flatten(1).std(1) * h[0].numel() ** 0.5
        assert torch.allclose(step["perturbation_norm"], size, rtol=0.1)


def test_diagens_hook_gives_the_steps_of_equation_5(pipe, guides):
    steps, options = inside.Steps(), dict(steps=10, strength=0.7, guidance_scale=4.0)
    with torch.no_grad():
        call = (pipe, common.encode(pipe, guides[0]), PROMPTS)
        seen = diagen.img2img(*call, generators(3), on_step=steps.add, **options)
        assert torch.equal(seen, diagen.img2img(*call, generators(3), **options))
        assert torch.equal(common.decode(pipe, steps[-1]["x"]), seen)
    alphas = pipe.scheduler.alphas_cumprod
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        alpha, previous = alphas[step["t"]], alphas[after["t"]]
        eps = (before["x"] - alpha.sqrt() * step["x0"]) / (1 - alpha).sqrt()
        assert close(step["x"], previous.sqrt() * step["x0"] + (1 - previous).sqrt() * eps)


def test_textual_inversions_hook_gives_the_embedding(pipe, guides):
    learned, start = inside.Steps(), diagen.initial_embedding(pipe, "background")
    call, options = (pipe, guides[0], "<hook>", start), dict(steps=3, batch_size=2, lr=0.02)
    S = diagen.textual_inversion(*call, on_step=learned.add, **options)
    assert [step["i"] for step in learned] == [0, 1, 2] and torch.equal(learned[-1]["S"], S)
    assert torch.equal(S, diagen.textual_inversion(*call, **options))
    assert torch.equal(learned[0]["S"], diagen.textual_inversion(*call, **options | {"steps": 1}))
