"""The digits world, its judge, the embedded generator, its training, and the experiments.

pytest -s -n 0 tests/test_digits.py     prints what it measures of the generator
"""

import itertools
import math
import os
import re

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import StableDiffusionPipeline
from scipy import linalg, ndimage
from sklearn import metrics, neighbors
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torchvision.transforms.v2.functional import to_pil_image

import common
import dreamda
from digits import judge, pretrain, world
from digits.experiments import compare, sweep
from runs import die_at, in_child

HELD_OUT = np.concatenate([world.pools()["train"], world.pools()["test"]])
ALIKE = torch.tensor([world.LOOK_ALIKE[y] for y in range(10)])


def as_float(images):
    return images.permute(0, 3, 1, 2).float() / 255


def share(x, y):
    return (x == y).float().mean().item()


# --- The world


def test_same_seed_renders_the_same_bytes():
    arguments = (3, "red", "flower", (5.0, 1.0, 1.0, -1.0))
    image, mask = world.render(*arguments, seed=4)
    world.sources.cache_clear()
    again, mask_again = world.render(*arguments, seed=4)
    assert image.tobytes() == again.tobytes() and mask.tobytes() == mask_again.tobytes()
    assert image.tobytes() != world.render(*arguments, seed=5)[0].tobytes()


def test_the_pools_are_disjoint_and_the_generator_may_see_fewer_digits_alike_of_each_class():
    assert sorted(np.concatenate(list(world.pools().values()))) == list(range(1797))
    few, more = (set(world.web_digits(n).tolist()) for n in (30, 100))
    assert few < more < set(world.pools()["web"].tolist())
    assert np.bincount(load_digits().target[[*few]]).tolist() == [3] * 10


def test_only_test_ood_is_uncommon_no_digit_is_in_two_splits_and_all_have_the_style(monkeypatch):
    render, calls = world.render_pool, []

    def record(indices, count, seed, settings, style):
        drawn = render(indices, 120, seed, settings)
        pairs = set(zip(drawn["labels"].tolist(), drawn["settings"].tolist(), strict=True))
        calls.append((set(indices.tolist()), pairs, style))
        return drawn

    monkeypatch.setattr(world, "render_pool", record)
    assert list(world.splits.__wrapped__(0.3)) == ["train", "val", "test", "test_ood"]
    (train, val, test, ood), settings, styles = zip(*calls, strict=True)
    assert not train & val and not (train | val) & test and ood == test and set(styles) == {0.3}
    assert not (train | val | test) & set(world.pools()["web"].tolist())
    assert settings[3] == {(y, y % 3) for y in range(10)}
    every = set(itertools.product(range(10), range(3)))
    assert all(pairs <= every - settings[3] for pairs in settings[:3]) and set.union(*settings) == every


def test_the_mask_is_where_the_colour_covers_more_than_half():
    compared = 0
    for seed, setting in itertools.product(range(10), world.SETTINGS):
        geometry = world.draw_geometry(np.random.default_rng(seed))
        samples = [(world.render(seed, c, setting, geometry, seed), v) for c, v in world.COLOURS.items()]
        for ((a, mask), tint_a), ((b, _), tint_b) in itertools.combinations(samples, 2):
            if (a[0] == b[0]).all():  # the same background: the images differ by the digit's colour alone
                difference, compared = np.subtract(tint_a, tint_b), compared + 1
                cover = (a.astype(float) - b) @ difference / (difference @ difference)
                assert ((cover > 0.5) == mask)[abs(cover - 0.5) > 0.02].all()
    assert compared >= 60


@pytest.mark.parametrize("confusion", [0.0, 0.45])
def test_every_sample_is_legible_and_its_caption_colour_and_setting_tell_what_is_drawn(confusion):
    """But for the look-alikes, whose names are told as often as the dial says."""
    samples = world.render_pool(world.pools()["train"], 300, 7, confusion=confusion)
    contrasts, forms, named = [], set(), []
    for i, caption in enumerate(samples["captions"]):
        image, mask = samples["images"][i].numpy(), samples["masks"][i].numpy()
        colour, setting = [*world.COLOURS][samples["colours"][i]], world.SETTINGS[samples["settings"][i]]
        parts = re.fullmatch(r"a photo of a (?:(\w+) )?(\w+)(?: on a (\w+) background)?", caption).groups()
        assert parts[0] in (None, colour) and parts[2] in (None, setting)
        forms.add((parts[0] is None, parts[2] is None))
        named.append(world.NAMES.index(parts[1]))
        inner, outer = (ndimage.binary_dilation(mask, np.ones((k, k))) for k in (5, 7))
        assert (abs(image[mask] - np.array(world.COLOURS[colour])) <= 1).all(1).any()
        assert (np.ptp(image[~inner], axis=0).max() == 0) == (setting == "plain")
        distance = np.linalg.norm(image[outer & ~inner] - world.COLOURS[colour], axis=1) / math.sqrt(3)
        contrasts.append(np.quantile(distance, 0.1) / 255)  # 1: black on white
    assert min(contrasts) > 0.1 and np.quantile(contrasts, 0.05) > 0.25 and len(forms) == 4
    labels, named = samples["labels"], torch.tensor(named)
    assert labels.tolist() == load_digits().target[world.pools()["train"][:300]].tolist()
    assert ((named == labels) | (named == ALIKE[labels])).all() and ALIKE[ALIKE].tolist() == [*range(10)]
    assert abs(share(named, ALIKE[labels]) - confusion) <= 3 * math.sqrt(confusion * (1 - confusion) / 300)


def test_style_is_another_hand_and_another_camera():
    """A stronger style slants and thins the digit, and takes colour and contrast; 0 changes no byte."""
    arguments = (3, "red", "temple", (0.0, 1.0, 0.0, 0.0), 4)
    images, masks = zip(*(world.render(*arguments, style=style) for style in (0.0, 0.5, 1.0)), strict=True)
    assert images[0].tobytes() == world.render(*arguments)[0].tobytes()

    def upright(mask):  # how far the digit leans to the left from its lower to its upper half
        rows, columns = np.nonzero(mask)
        return columns[rows > rows.mean()].mean() - columns[rows < rows.mean()].mean()

    for falling in ([m.sum() for m in masks], [x.std() for x in images], [*map(upright, masks)]):
        assert falling[0] > falling[1] > falling[2]
    grey = world.photograph(np.full((32, 32, 3), 0.6, np.float32), 1.0, np.random.default_rng(0))
    assert grey[..., 0].mean() - grey[..., 2].mean() > 0.05 and 0.01 < grey[..., 0].std() < 0.03


# --- The judge


def test_distances_equal_their_formulas_and_leave_the_callers_random_draws_alone():
    real, fake = torch.randn(300, 6), 0.8 * torch.randn(300, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0.5])
    before = torch.get_rng_state()
    ours, x, y = judge.distribution_distances(real, fake), real.double().numpy(), fake.double().numpy()
    assert torch.equal(torch.get_rng_state(), before)
    cx, cy = np.cov(x.T), np.cov(y.T)
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * linalg.sqrtm(cx @ cy).real)
    assert ours["fid"] == pytest.approx(fid, rel=1e-4)
    xx, yy, xy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    kid = sum((k.sum() - np.trace(k)) / (300 * 299) for k in (xx, yy)) - 2 * xy.mean()
    assert ours["kid"] == pytest.approx(kid, rel=1e-3) and ours["kid"] > 0

    def covered(points, manifold):  # inside a ball that reaches to its centre's third neighbour
        radius = neighbors.NearestNeighbors(n_neighbors=3).fit(manifold).kneighbors()[0][:, -1]
        return np.mean((metrics.pairwise_distances(points, manifold) <= radius).any(1))

    assert ours["precision"] == pytest.approx(covered(y, x)) and 0 < ours["precision"] < 1
    assert ours["recall"] == pytest.approx(covered(x, y)) != ours["precision"]


@pytest.fixture(scope="module")
def oracle():
    return common.load_oracle()


def answers(oracle, images):
    """The digit, the colour and the setting that the oracle reads in each image."""
    return [logits.argmax(1) for logits in oracle(images).split(judge.HEADS, 1)]


@pytest.mark.parametrize("style", [0.0, 0.65, 1.0])
def test_the_oracle_names_held_out_real_samples_of_every_style(style, oracle):
    real = world.render_pool(HELD_OUT, 899, seed=2, style=style)
    x, labels = as_float(real["images"]), real["labels"]
    read = answers(oracle, x)
    right = [share(a, real[key]) for a, key in zip(read, judge.KEYS, strict=True)]
    print("\noracle, style {}: digit {:.3f}, colour {:.3f}, setting {:.3f}".format(style, *right))
    assert min(right) >= 0.98
    pictures = common.Images(
        [to_pil_image((255 * image).round().byte()) for image in x], labels, common.make_transforms(32)[1]
    )
    features, digits = judge.read(pictures, common.make_accelerator())
    assert features.shape == (899, 128) and torch.equal(digits, read[0])


# --- The embedded generator, judged by the oracle


def sample(pipe, prompts, seed, guidance_scale=4.0):
    options, images = dict(guidance_scale=guidance_scale, num_inference_steps=15, output_type="pt"), []
    for part in torch.arange(len(prompts)).split(40):
        generators = [common.generator(seed, int(j)) for j in part]
        images.append(pipe([prompts[j] for j in part], generator=generators, **options).images)
    return torch.cat(images)


def told_distances(oracle, images, style):
    """Distances of images to held-out real ones, and those between two halves of these; prints both."""
    real = oracle.features(as_float(world.render_pool(HELD_OUT, 899, seed=2, style=style)["images"]))
    pairs = {"images": (real, oracle.features(images)), "two halves": (real[:450], real[450:])}
    found = {name: judge.distribution_distances(*pair) for name, pair in pairs.items()}
    for name, distances in found.items():
        print(f"{name}:", {k: round(v, 3) for k, v in distances.items()})
    return found.values()


def test_class_prompts_draw_the_digit_and_words_for_colour_and_setting_are_obeyed(pipe, oracle):
    labels, colours, wanted = torch.arange(200) % 10, list(world.COLOURS), torch.arange(120)
    images = sample(pipe, [world.caption(y) for y in labels], seed=3)
    right = share(answers(oracle, images)[0], labels)
    print(f"\nsd_clean/, class prompts: {right:.3f} right")
    distances, _ = told_distances(oracle, images, style=0.0)
    assert right >= 0.95
    assert distances["fid"] < 12 and distances["precision"] > 0.8 and distances["recall"] > 0.8
    wanted = [wanted % 10, wanted // 10 % 6, wanted // 40]
    prompts = [world.caption(y, colours[c], world.SETTINGS[s]) for y, c, s in zip(*wanted, strict=True)]
    read = answers(oracle, sample(pipe, prompts, seed=4))
    obeyed = [share(a, b) for a, b in zip(read, wanted, strict=True)]
    print("sd_clean/, full prompts: digit {:.3f}, colour {:.3f}, setting {:.3f} right".format(*obeyed))
    assert min(obeyed) >= 0.95


def test_the_default_world_has_what_the_papers_start_from(oracle):
    """Its generator confuses look-alikes, differs in style from the target, and its images vary less."""
    labels, pipe = torch.arange(240) % 10, common.load_pipeline(common.DIGITS_SD)
    images = sample(pipe, [world.caption(y) for y in labels], seed=3, guidance_scale=7.5)
    read = answers(oracle, images)[0]
    right, wrong = share(read, labels), share(read, ALIKE[labels])
    print(f"\nsd/, class prompts: {right:.3f} right, the look-alike {wrong:.3f}")
    distances, halves = told_distances(oracle, images, world.STYLE)
    assert 0.55 < right < 0.75 and right + wrong > 0.97
    assert distances["precision"] < halves["precision"] - 0.1 and distances["recall"] < halves["recall"] - 0.1


def test_stock_diffusers_loads_the_generator_and_it_is_small():
    for name in ("sd", "sd_clean"):
        stock = StableDiffusionPipeline.from_pretrained(judge.FOLDER / name)
        image = stock("a photo of a red seven on a flower background", num_inference_steps=2).images[0]
        assert image.size == (32, 32)
    for name in ("sd", "sd_clean", "oracle", "backbone"):
        assert sum(f.stat().st_size for f in (judge.FOLDER / name).rglob("*") if f.is_file()) < 8e6


def test_a_few_images_suffice_to_read_digits_off_the_pretrained_features():
    train, test = (world.render_pool(world.pools()[k], n, 3) for k, n in (("train", 300), ("test", 500)))
    few, accuracy = common.draw_per_class(train["labels"].numpy(), lambda n: 4, seed=0), {}
    for pretrained in (False, True):
        args = dreamda.METHOD.arguments(classifier="small_cnn", pretrained=pretrained)
        net = common.build_classifier(args, world.NAMES).eval().requires_grad_(False)
        x, y = (net.features(as_float(r["images"])).numpy() for r in (train, test))
        probe = LogisticRegression(max_iter=2000).fit(x[few], train["labels"][few])
        accuracy[pretrained] = probe.score(y, test["labels"])
    assert accuracy[True] > 0.6 and accuracy[True] > accuracy[False] + 0.2


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_training_killed_in_every_stage_ends_in_the_same_weights_which_load(tmp_path, monkeypatch):
    """In backbone, oracle, autoencoder, U-Net (a step, a checkpoint), spoiling, and the final writing."""
    few = {name: pool[:32] for name, pool in world.pools().items()}
    monkeypatch.setattr(world, "pools", lambda: few)
    tiny = dict(images=64, backbone_copies=2, backbone_steps=3, oracle_epochs=2, vae_steps=3, steps=5)
    tiny |= dict(spoil_steps=3, save_every=2, batch_size=4)

    def train(name):
        folder = tmp_path / name
        pretrain.train(pretrain.Args(**tiny, folder=str(folder), out=f"{folder}-out"))
        return files_of(folder)

    whole, kills = train("whole"), "batch_of 2, train_oracle 1, batch_of 4, noise_errors 4, save_pipeline 1, "
    for name, n in [kill.split() for kill in (kills + "spoil 1, save_classifier 2").split(", ")]:
        assert not (tmp_path / "killed").exists()
        assert in_child(lambda name=name, n=int(n): (die_at(pretrain, name, n), train("killed"))) == 9
    assert train("killed") == whole
    assert whole.keys() == {f for f in files_of(judge.FOLDER) if f.startswith(("sd", "oracle", "backbone"))}
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "sd_clean")
    latents = common.encode(stock, as_float(world.render_pool(few["web"], 64, seed=1)["images"]))
    assert latents.std().item() == pytest.approx(1, abs=0.01)  # by the scaling factor


# --- The experiments


@pytest.mark.parametrize("k", [8, 16, 32])
def test_every_method_trains_for_as_many_steps_on_as_many_images(k, tmp_path, monkeypatch):
    """And by the same rule, in the same world; DA-Fusion and DIAGen share their tokens."""
    runs, real = {}, 10 * k

    def record(method, args, accelerator):
        runs[args.out.removeprefix(f"{tmp_path}/")] = args
        return {"a title": {}}

    monkeypatch.setattr(common, "run_once", record)
    comparison = compare.Comparison(k, pretrain.CONFUSION, 0.3, 7, tmp_path)
    for name, (method, changes) in compare.METHODS.items():
        method(comparison, name, **changes)
        args = runs[name]
        size, made = args.batch_size, real * getattr(args, "variations", 0)
        if name == "ActGen":
            half, made = args.epochs // 2, args.images_per_epoch * args.epochs // 2
            seen = [real + args.images_per_epoch * e for e in range(half)] + [real + made] * half
            steps = sum(images // size for images in seen)
        elif name == "DIAGen":
            steps = args.epochs * args.iterations
        else:
            steps, size = args.epochs * (made // dreamda.pool_batch(args)), size + dreamda.pool_batch(args)
        assert size == 8 and made == pytest.approx(960, rel=0.05) and steps == pytest.approx(4800, rel=0.1)
    keys = "diffusion style seed examples_per_class classifier pretrained optimizer lr warmup weight_decay"
    assert len({tuple(getattr(args, key) for key in keys.split()) for args in runs.values()}) == 1
    assert (args.diffusion, args.style, args.examples_per_class) == (common.DIGITS_SD, 0.3, k)
    assert runs["DIAGen"].embeddings == runs["DA-Fusion, images"].out == runs["DA-Fusion"].synthetic
    assert {runs[f"DreamDA, {x}"].synthetic for x in ("AMST", "true labels")} == {runs[compare.SOURCES].out}


def test_two_processes_share_the_runs_of_a_comparison_whose_gains_are_paired(tmp_path, monkeypatch):
    """None is repeated; the second begins in the midst of the first one's first run."""
    args, log = compare.Args(per_class=[4], seeds=3, out=str(tmp_path)), tmp_path / "log"

    def numbers(comparison, name):
        first = not log.exists()
        with log.open("a") as file:
            file.write(f"{comparison.out.name}, {name}, by {os.getpid()}\n")
        assert not first or in_child(lambda: compare.main(args)) == 0
        accuracies = np.random.default_rng([int(comparison.out.name[-1]), len(name)]).uniform(0, 100, 2)
        return dict(zip(("test", "test_ood"), accuracies, strict=True), training=1.0)

    monkeypatch.setattr(compare.Comparison, "numbers", numbers)
    for _ in range(2):  # the second time nothing is left to do
        compare.main(args)
        made = [line.split(", by ") for line in log.read_text().splitlines()]
        assert len(made) == len({run for run, _ in made}) == 3 * len(compare.METHODS)
        assert len({(run.split(",")[0], process) for run, process in made}) == 3  # a seed by one
        rows = [line.split(" | ") for line in (tmp_path / "compare.md").read_text().splitlines()]
        assert len(rows) == 3 + len(compare.METHODS) and rows[1][:2] == ["| cell 0.45/0.65", "4 per class"]
    kept, paired = common.read_file(tmp_path / "results.json"), []
    for split in ("test", "test_ood"):
        base, ours = (
            [kept[f"4800 0.45/0.65 4 {s} {m}"][split] for s in range(3)] for m in (compare.BASE, "ActGen")
        )
        low, high = scipy.stats.ttest_rel(ours, base).confidence_interval(0.95)
        paired.append(f"{np.mean(ours) - np.mean(base):+.1f} ± {(high - low) / 2:.1f}")
    assert rows[-1][:2] == ["| ActGen", " / ".join(paired)]


def test_labels_are_counted_by_what_the_oracle_reads(tmp_path, capsys):
    """Of the pseudo-labels half are missing, a quarter wrong; in uncommon settings all sources are wrong."""
    records = []
    for settings in ("common", "uncommon"):
        samples = world.render_pool(world.pools()["web"], 40, 5, settings)
        for i, (image, digit) in enumerate(zip(samples["images"], samples["labels"].tolist(), strict=True)):
            label = digit if settings == "common" else world.LOOK_ALIKE[digit]
            record = common.record(world.NAMES, label, f"{settings}{i}", [])
            records.append(record | {"pseudo_label": [None, digit, None, (digit + 1) % 10][i % 4]})
            common.write_file(tmp_path / "synthetic" / record["file_name"], image.permute(2, 0, 1) / 255)
    common.write_file(tmp_path / "synthetic" / "metadata.jsonl", records)
    sweep.judge_labels([tmp_path])
    found = [*map(int, re.findall(r"(\d+) % \|", capsys.readouterr().out))]
    assert found == pytest.approx([50, 100, 50, 50, 100, 50, 0, 50, 50, 0], abs=7)
