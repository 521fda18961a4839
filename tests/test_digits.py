"""The digits world, its judge, the embedded generator, its training, and the comparison of all methods.

pytest -s -n 0 tests/test_digits.py     prints what it measures of the generator
"""

import dataclasses
import gc
import importlib
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import StableDiffusionPipeline
from scipy import linalg, ndimage
from sklearn import metrics, neighbors
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import actgen
import common
import diagen
import dreamda
from digits import judge, pretrain, world
from digits.experiments import batch_norm, compare, labels, tune
from digits.experiments import map as world_map

# ----------------------------------------------------------------------------------------------------------
# The world


@pytest.fixture(scope="module")
def drawn():
    """300 samples of the train pool, in all, the common and the uncommon settings."""
    train = world.pools()["train"]
    return {s: world.render_pool(train, 300, 7, s) for s in ("all", "common", "uncommon")}


def test_same_seed_renders_the_same_bytes():
    arguments = (3, "red", "flower", (5.0, 1.0, 1.0, -1.0))
    image, mask = world.render(*arguments, seed=4)
    world.sources.cache_clear()
    again, mask_again = world.render(*arguments, seed=4)
    assert image.tobytes() == again.tobytes() and mask.tobytes() == mask_again.tobytes()
    assert image.tobytes() != world.render(*arguments, seed=5)[0].tobytes()


def test_the_pools_are_disjoint_and_cover_all_digits():
    assert sorted(np.concatenate(list(world.pools().values()))) == list(range(1797))


@pytest.mark.parametrize("setting", world.SETTINGS)
def test_the_mask_is_where_the_colour_covers_more_than_half(setting):
    compared = 0
    for seed in range(10):
        geometry = world.draw_geometry(np.random.default_rng(seed))
        samples = [(world.render(seed, c, setting, geometry, seed), v) for c, v in world.COLOURS.items()]
        for ((a, mask), tint_a), ((b, _), tint_b) in itertools.combinations(samples, 2):
            if (a[0] == b[0]).all():  # the same background: the images differ by the digit's colour alone
                difference = np.subtract(tint_a, tint_b)
                share = (a.astype(float) - b) @ difference / (difference @ difference)
                assert ((share > 0.5) == mask)[abs(share - 0.5) > 0.02].all()
                compared += 1
    assert compared >= 20


def test_every_sample_is_legible(drawn):
    contrasts, tints = [], np.array([*world.COLOURS.values()])
    images, masks, colours = (drawn["all"][k].numpy() for k in ("images", "masks", "colours"))
    for image, mask, tint in zip(images, masks, tints[colours], strict=True):
        inner, outer = (ndimage.binary_dilation(mask, np.ones((k, k))) for k in (5, 7))
        distance = np.linalg.norm(image[outer & ~inner] - tint, axis=1) / (255 * math.sqrt(3))
        contrasts.append(np.quantile(distance, 0.1))  # 1: black on white
    assert min(contrasts) > 0.1 and np.quantile(contrasts, 0.05) > 0.25


def test_captions_colours_settings_and_labels_tell_what_is_drawn(drawn):
    samples, targets, forms = drawn["all"], load_digits().target[world.pools()["train"]], set()
    for i, caption in enumerate(samples["captions"]):
        label, colour, setting = (int(samples[k][i]) for k in ("labels", "colours", "settings"))
        (name, tint), setting = [*world.COLOURS.items()][colour], world.SETTINGS[setting]
        parts = re.fullmatch(r"a photo of a (?:(\w+) )?(\w+)(?: on a (\w+) background)?", caption).groups()
        assert label == targets[i] and parts[1] == world.NAMES[label]
        assert parts[0] in (None, name) and parts[2] in (None, setting)
        forms.add((parts[0] is None, parts[2] is None))
        image, mask = samples["images"][i].numpy(), samples["masks"][i].numpy()
        assert (abs(image[mask] - np.array(tint)) <= 1).all(1).any()
        outside = image[~ndimage.binary_dilation(mask, np.ones((5, 5)))]
        assert (np.ptp(outside, axis=0).max() == 0) == (setting == "plain")
    assert len(forms) == 4


@pytest.mark.parametrize("p", [0.0, 0.45])
def test_captions_name_the_look_alike_as_often_as_the_dial_says(p):
    drawn = world.render_pool(world.pools()["web"], 600, seed=3, confusion=p)
    named = [next(w for w in c.split() if w in world.NAMES) for c in drawn["captions"]]
    truth = drawn["labels"].tolist()
    assert all(
        n in (world.NAMES[y], world.NAMES[world.LOOK_ALIKE[y]]) for n, y in zip(named, truth, strict=True)
    )
    confused = np.mean([n != world.NAMES[y] for n, y in zip(named, truth, strict=True)])
    assert abs(confused - p) < 3 * math.sqrt(0.25 / 600) if p else confused == 0
    assert all(world.LOOK_ALIKE[world.LOOK_ALIKE[y]] == y for y in range(10))  # pairs


def test_style_is_another_hand_and_another_camera(monkeypatch):
    """A stronger style slants and thins the digit, and takes colour and contrast; 0 changes no byte."""
    geometry, arguments = (0.0, 1.0, 0.0, 0.0), (3, "red", "temple")
    plain, mask = world.render(*arguments, geometry, 4)
    assert world.render(*arguments, geometry, 4, style=0.0)[0].tobytes() == plain.tobytes()
    masks, spreads = [mask], []
    for style in (0.0, 0.5, 1.0):
        image, mask = world.render(*arguments, geometry, 4, style=style)
        masks.append(mask)
        spreads.append(image.astype(float).std())
    sizes = [m.sum() for m in masks[1:]]
    assert sizes[0] > sizes[1] > sizes[2] and spreads[0] > spreads[1] > spreads[2]
    grey = world.photograph(np.full((32, 32, 3), 0.6, np.float32), 1.0, np.random.default_rng(0))
    assert (
        grey[..., 0].mean() - grey[..., 2].mean() > 0.05 and 0.01 < grey[..., 0].std() < 0.03
    )  # warm, grainy

    def slant(mask):  # how far the digit leans to the right from its lower to its upper half
        rows, columns = np.nonzero(mask)
        upper = rows < rows.mean()
        return columns[upper].mean() - columns[~upper].mean()

    assert slant(masks[1]) < slant(masks[2]) < slant(masks[3])
    render = world.render_pool
    monkeypatch.setattr(world, "render_pool", lambda digits, count, *options: render(digits, 1, *options))
    for split in ("train", "val", "test", "test_ood"):
        weak, strong = (world.splits.__wrapped__(style)[split][0][0].tobytes() for style in (0.0, 1.0))
        assert weak != strong


def test_a_class_has_two_common_settings_and_a_third_uncommon_one(drawn):
    common_ones, uncommon = (
        set(zip(drawn[k]["labels"].tolist(), drawn[k]["settings"].tolist(), strict=True))
        for k in ("common", "uncommon")
    )
    assert common_ones | uncommon == {(y, s) for y in range(10) for s in range(3)}
    assert not common_ones & uncommon and len(uncommon) == 10


def test_only_test_ood_is_uncommon_and_no_digit_is_in_two_splits(monkeypatch):
    calls = []

    def record(indices, count, seed, settings, style):
        calls.append((set(indices.tolist()), settings))
        return {"images": torch.zeros(0, 32, 32, 3, dtype=torch.uint8), "labels": torch.zeros(0)}

    monkeypatch.setattr(world, "render_pool", record)
    assert list(world.splits.__wrapped__()) == ["train", "val", "test", "test_ood"]
    (train, a), (val, b), (test, c), (ood, d) = calls
    assert (a, b, c, d) == ("common", "common", "common", "uncommon") and ood == test
    assert not train & val and not (train | val) & test
    assert not (train | val | test) & set(world.pools()["web"].tolist())


@pytest.mark.usefixtures("quick")
def test_a_few_shot_draw_has_k_per_class_and_reproduces_with_its_seed():
    def draw(seed):
        train = common.load_data("digits", "", 32, "digits", per_class=3, seed=seed).train
        assert np.bincount(train.labels).tolist() == [3] * 10
        return [image.tobytes() for image in train.sources]

    assert draw(1) == draw(1) != draw(2)


# ----------------------------------------------------------------------------------------------------------
# The judge


def test_distances_equal_their_formulas():
    real, fake = torch.randn(300, 6), 0.8 * torch.randn(300, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0.5])
    ours, x, y = judge.distribution_distances(real, fake), real.double().numpy(), fake.double().numpy()
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


def test_identical_sets_have_no_distance_and_far_sets_nothing_in_common():
    features = torch.randn(200, 6)
    same, far = (judge.distribution_distances(features, features + shift) for shift in (0, 100))
    assert abs(same["fid"]) < 1e-3 and same["kid"] < 1e-3 and same["precision"] == same["recall"] == 1
    assert far["fid"] == pytest.approx(6 * 100**2, rel=1e-3) and far["precision"] == far["recall"] == 0


def test_the_random_draws_of_a_distance_leave_the_callers_generator_alone():
    features, before = torch.randn(50, 3), torch.get_rng_state()
    judge.distribution_distances(features, features + 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def oracle():
    return judge.load_oracle()


@pytest.fixture(scope="module")
def real():
    """Held-out digits, of the train and test pools, in all colours and settings."""
    pools = world.pools()
    return world.render_pool(np.concatenate([pools["train"], pools["test"]]), 899, seed=2)


def as_float(images):
    return images.permute(0, 3, 1, 2).float() / 255


def answers(oracle, images):
    """The digit, the colour and the setting that the oracle reads in each image."""
    return [logits.argmax(1) for logits in oracle(images).split(judge.HEADS, 1)]


def share(x, y):
    return (x == y).float().mean().item()


@pytest.mark.parametrize("style", [0.0, 0.65, 1.0])
def test_the_oracle_names_held_out_real_samples_of_every_style(style, oracle):
    digits = np.concatenate([world.pools()["train"], world.pools()["test"]])
    real = world.render_pool(digits, 899, seed=2, style=style)
    read = answers(oracle, as_float(real["images"]))
    right = [share(a, real[key]) for a, key in zip(read, judge.KEYS, strict=True)]
    print(f"\noracle, style {style}: digit {right[0]:.3f}, colour {right[1]:.3f}, setting {right[2]:.3f}")
    assert min(right) >= 0.98


def test_the_oracles_reading_is_that_of_the_whole_network(oracle, real):
    labels = real["labels"][:70]
    pictures = common.Images([common.to_pil(x) for x in as_float(real["images"][:70])], labels)
    pictures.transform = common.make_transforms(32, "none")[1]
    features, digits = judge.read(pictures, common.make_accelerator())
    assert features.shape == (70, 128) and torch.equal(
        digits, answers(oracle, as_float(real["images"][:70]))[0]
    )


# ----------------------------------------------------------------------------------------------------------
# The embedded generator, judged by the oracle

STEPS = 15


def sample(pipe, prompts, seed, guidance_scale=4.0):
    parts = []
    for i in range(0, len(prompts), 20):
        some = prompts[i : i + 20]
        generators = [common.generator(seed, j) for j in range(i, i + len(some))]
        options = {"guidance_scale": guidance_scale, "num_inference_steps": STEPS, "output_type": "pt"}
        parts.append(pipe(some, generator=generators, **options).images)
    return torch.cat(parts)


def test_class_prompts_draw_the_digit(pipe, oracle, real):
    labels = torch.arange(200) % 10
    images = sample(pipe, [world.caption(y) for y in labels], seed=3)
    right = share(answers(oracle, images)[0], labels)
    features = [oracle.features(2 * x - 1) for x in (as_float(real["images"]), images)]
    distances = judge.distribution_distances(*features)
    halves = judge.distribution_distances(features[0][:450], features[0][450:])
    print(f"\nclass prompts: {right:.3f} right;", {k: round(v, 3) for k, v in distances.items()})
    print("two halves of the real samples:", {k: round(v, 3) for k, v in halves.items()})
    assert right >= 0.95
    assert distances["fid"] < 12 and distances["precision"] > 0.8 and distances["recall"] > 0.8


def test_the_default_world_has_what_the_papers_start_from(oracle):
    """Its generator confuses look-alikes, differs in style from the target, and its images vary less."""
    labels, pipe = torch.arange(240) % 10, common.load_pipeline(common.DIGITS_SD)
    images = sample(pipe, [world.caption(y) for y in labels.tolist()], seed=3, guidance_scale=7.5)
    read, alike = answers(oracle, images)[0], torch.tensor([world.LOOK_ALIKE[y] for y in labels.tolist()])
    right, wrong = share(read, labels), share(read, alike)
    digits = np.concatenate([world.pools()["train"], world.pools()["test"]])
    target = as_float(world.render_pool(digits, 899, seed=2, style=world.STYLE)["images"])
    features = [oracle.features(2 * x - 1) for x in (target, images)]
    distances = judge.distribution_distances(*features)
    halves = judge.distribution_distances(features[0][:450], features[0][450:])
    rounded = [{k: round(v, 3) for k, v in found.items()} for found in (distances, halves)]
    print(f"\nsd/: right {right:.3f}, look-alike {wrong:.3f};", *rounded, sep="\n")
    assert 0.55 < right < 0.75 and right + wrong > 0.97
    assert distances["precision"] < halves["precision"] - 0.1 and distances["recall"] < halves["recall"] - 0.1


def test_colour_and_setting_words_are_obeyed(pipe, oracle):
    n, colours = 120, list(world.COLOURS)
    wanted = [torch.arange(n) % 10, torch.arange(n) // 10 % 6, torch.arange(n) // 40]
    prompts = [world.caption(y, colours[c], world.SETTINGS[s]) for y, c, s in zip(*wanted, strict=True)]
    read = answers(oracle, sample(pipe, prompts, seed=4))
    obeyed = [share(a, b) for a, b in zip(read, wanted, strict=True)]
    print("\nfull prompts: digit {:.3f}, colour {:.3f}, setting {:.3f} right".format(*obeyed))
    assert min(obeyed) >= 0.95


def test_stock_diffusers_loads_the_generator_and_it_is_small():
    stock = StableDiffusionPipeline.from_pretrained(common.DIGITS_CLEAN)
    stock.set_progress_bar_config(disable=True)
    image = stock("a photo of a red seven on a flower background", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    for name in ("sd", "sd_clean", "oracle", "backbone"):
        assert sum(f.stat().st_size for f in (judge.FOLDER / name).rglob("*") if f.is_file()) < 8e6


def test_the_autoencoder_keeps_the_image(pipe, real):
    images = as_float(real["images"][:64])
    error = (common.decode(pipe, common.encode(pipe, images)) - images).square().mean().item()
    assert -10 * math.log10(error) > 28  # dB


def test_a_given_word_is_one_token_and_other_text_survives():
    words = ["a", "photo", "of", "on", "background", *world.NAMES, *world.COLOURS, *world.SETTINGS]
    text = 'A "quick" brown_fox, #7 (50 %) ~ it\'s {x|y} <z> \\ /usr/bin & a+b=c; ^_^ `ok`? @home $5!'
    for known in (words, ["even", "seven", "eleven", "ven"]):
        tokenizer = pretrain.build_tokenizer(known)
        assert {w: len(tokenizer.tokenize(w)) for w in known} == dict.fromkeys(known, 1)
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_every_caption_fits_into_the_prompt(pipe, drawn):
    longest = world.caption(7, "purple", "flower")
    ids = pipe.tokenizer([longest, *drawn["all"]["captions"]]).input_ids
    assert max(map(len, ids)) <= pipe.tokenizer.model_max_length


# ----------------------------------------------------------------------------------------------------------
# The backbone


def features_of(pretrained, images):
    torch.manual_seed(0)
    model = common.build_classifier("small_cnn", world.NAMES, 32, pretrained=pretrained).eval()
    with torch.no_grad():
        return common.split_head(model)[0](images).numpy()


def test_a_few_images_suffice_to_read_digits_off_the_pretrained_features():
    pools = world.pools()
    train, test = (world.render_pool(pools[k], n, 3) for k, n in (("train", 300), ("test", 500)))
    few = common.draw_per_class(train["labels"], 4, seed=0)
    accuracy = {}
    for pretrained in (False, True):
        x, y = (features_of(pretrained, as_float(r["images"])) for r in (train, test))
        probe = LogisticRegression(max_iter=2000).fit(x[few], train["labels"][few])
        accuracy[pretrained] = probe.score(y, test["labels"])
    assert accuracy[True] > 0.6 and accuracy[True] > accuracy[False] + 0.2


def test_the_backbone_learns_from_the_web_pool_without_class_labels(monkeypatch):
    def render(indices, count, seed):
        assert set(indices) == set(world.pools()["web"])
        rng = np.random.default_rng(seed)
        return {"images": torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), np.uint8))}  # no labels

    monkeypatch.setattr(world, "render_pool", render)
    args = pretrain.Args(backbone_copies=1, backbone_steps=2)
    outputs = []
    monkeypatch.setattr(
        pretrain.F, "cross_entropy", lambda logits, _: outputs.append(logits) or logits.mean()
    )
    weights = pretrain.train_backbone(args, torch.device("cpu"))
    assert outputs[0].shape[1] == 898  # an output for each digit of the web pool
    assert weights.keys() == common.SmallCNN(3).features.state_dict().keys()


# ----------------------------------------------------------------------------------------------------------
# The training

TINY = dict(
    images=64,
    backbone_copies=2,
    backbone_steps=3,
    oracle_epochs=2,
    vae_steps=3,
    steps=5,
    spoil_steps=3,
    save_every=2,
)


def train(folder, **changes):
    """A tiny training that writes to `folder`; its --out is beside it."""
    options = TINY | dict(batch_size=4, folder=str(folder), out=f"{folder}-out") | changes
    pretrain.main(pretrain.Args(**options))


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Killed(Exception):
    pass


def kill_at(monkeypatch, name, n, folder):
    """Trains until the n-th call of pretrain.name, which raises."""
    function, calls = getattr(pretrain, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == n:
            raise Killed
        return function(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain, name, dying)
        train(folder)
    gc.collect()  # the folder stays locked while the exception's frames live


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):  # digits first: later they would be of these 32
    """The folder of a tiny training that nothing interrupts, on 32 digits."""
    few = {name: pool[:32] for name, pool in world.pools().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "pools", lambda: few)
        folder = tmp_path_factory.mktemp("trained") / "digits"
        train(folder)
        yield folder


def test_a_training_killed_in_every_stage_ends_in_the_same_weights(trained, tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    kill_at(monkeypatch, "batch_of", 2, folder)  # in the backbone
    kill_at(monkeypatch, "train_oracle", 1, folder)
    kill_at(monkeypatch, "batch_of", 4, folder)  # in the autoencoder: the oracle takes two calls
    kill_at(monkeypatch, "noise_errors", 4, folder)  # in the second part of the U-Net's training
    kill_at(monkeypatch, "save_pipeline", 1, folder)  # before the second checkpoint
    kill_at(monkeypatch, "spoil", 1, folder)
    assert not folder.exists()
    kill_at(monkeypatch, "save_classifier", 2, folder)  # in the midst of the final writing
    train(folder)
    assert files_of(folder) == files_of(trained)


def test_the_trained_folder_loads_in_stock_diffusers_and_as_classifiers(trained):
    stock = StableDiffusionPipeline.from_pretrained(trained / "sd_clean")
    stock.set_progress_bar_config(disable=True)
    images = stock(["a photo of a seven"] * 2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32)
    latents = common.encode(stock, as_float(world.render_pool(world.pools()["web"], 64, seed=1)["images"]))
    assert latents.std().item() == pytest.approx(1, abs=0.01)  # by the scaling factor
    assert judge.load_oracle(trained)(images).shape == (2, 19)
    backbone = common.load_file(trained / "backbone" / "model.safetensors")
    common.SmallCNN(10).features.load_state_dict(backbone)
    embedded = {
        str(f.relative_to(judge.FOLDER))
        for n in ("sd", "sd_clean", "oracle", "backbone")
        for f in (judge.FOLDER / n).rglob("*.*")
    }
    assert set(files_of(trained)) == embedded


def test_a_training_with_other_lengths_is_refused(trained):
    gc.collect()
    before = files_of(trained)
    with pytest.raises(common.UserError, match="--vae_steps 3, this one has --vae_steps 4"):
        train(trained, vae_steps=4)
    assert files_of(trained) == before


def test_the_timesteps_of_a_batch_are_spread_over_the_schedule_and_a_tenth_of_the_captions_is_dropped(pipe):
    texts, encode = [], pipe.text_encoder.forward
    latents, captions, empty = torch.randn(8, 4, 16, 16), torch.full((8, 16), 5), torch.full((1, 16), 6)

    def listen(ids, **options):
        texts.append(ids)
        return encode(ids, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pipe.text_encoder, "forward", listen)
        for step in range(10):
            errors, t = pretrain.noise_errors(pipe, latents, captions, empty, step, 50)
            assert errors.shape == (50,) and (t // 20).tolist() == list(range(50))
    assert 0.06 < (torch.cat(texts)[:, 1] == 6).float().mean() < 0.14


# ----------------------------------------------------------------------------------------------------------
# The experiments


@pytest.mark.parametrize("name", sorted(p.stem for p in (common.ROOT / "digits/experiments").glob("*.py")))
def test_an_experiment_can_be_imported(name):
    assert importlib.import_module(f"digits.experiments.{name}").main


def test_a_gain_is_paired_with_standard_augmentation_seed_by_seed():
    rng, rows = np.random.default_rng(0), {}
    for k, n, name in ((4, 640, compare.BASE), (4, 640, "ActGen"), (16, 640, "ActGen"), (4, 40, "ActGen")):
        runs = [dict(test=a, test_ood=b, generation=c, training=d) for a, b, c, d in 100 * rng.random((5, 4))]
        if name != compare.BASE:
            for run, values in zip(runs, rng.random((5, 4)), strict=True):
                run |= dict(zip(("fid", "precision", "recall", "oracle"), values, strict=True))
        rows[k, n, name] = runs
    title, header, _, base, of_actgen = compare.table(rows, 4, 640)
    assert "4 real images per class, 640 synthetic ones, 5 seeds" in title
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    base, of_actgen = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (base, of_actgen))
    assert len(columns) == len(base) == len(of_actgen)
    assert (base[0], of_actgen[0]) == (compare.BASE, "ActGen")
    assert base[2] == base[4] == base[5] == base[8] == ""
    for column, split in ((1, "test"), (3, "test_ood")):
        assert columns[column : column + 2] == [split, "gain"]
        ours, theirs = ([run[split] for run in rows[4, 640, name]] for name in ("ActGen", compare.BASE))
        paired = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        gain = f"{np.subtract(ours, theirs).mean():+.1f} ± {(paired.high - paired.low) / 2:.1f}"
        assert of_actgen[column].split(" ± ")[0] == f"{np.mean(ours):.1f}" and of_actgen[column + 1] == gain
    runs = rows[4, 640, "ActGen"]
    assert of_actgen[5:9] == [
        f"{np.mean([r['fid'] for r in runs]):.1f}",
        *(f"{np.mean([r[key] for r in runs]):.2f}" for key in ("precision", "recall", "oracle")),
    ]
    assert of_actgen[9:] == [f"{np.median([r[key] for r in runs]):.0f}" for key in ("generation", "training")]


@pytest.mark.parametrize("k, images", [(4, 640), (16, 640), (64, 640), (4, 40)])
def test_every_method_trains_for_about_600_steps_on_as_many_images(k, images, tmp_path, monkeypatch):
    runs, real = {}, 10 * k

    def record(args, accelerator):
        runs[args.out.removeprefix(f"{tmp_path}/")] = args
        (tmp_path / args.out / "embeddings").mkdir(parents=True)
        result = {"seed labels": {"generation": 1.0, "training": 1.0}}
        common.write_file(Path(args.out) / "result.json", result)
        return result

    for script in (actgen, diagen, dreamda):
        monkeypatch.setattr(script, "run_once", record)
    for name in ("train_with_cutmix", "train_heads"):
        monkeypatch.setattr(compare, name, lambda *args, **arguments: {"training": 1.0})
    comparison = compare.Comparison(k, images, 0, tmp_path, label_smoothing=0.2, head_lr=4.0)
    for name in compare.METHODS:
        assert comparison.run(name)[0]["training"] == 1.0
    names = [name for name in compare.METHODS if name in runs]
    assert len(names) == 16 and {*compare.METHODS} - {*names} == {"CutMix", compare.HEADS}
    smoothing = {name: runs[name].label_smoothing for name in names}
    assert smoothing == dict.fromkeys(names, 0.2) | {compare.SMOOTHING: 0.1}
    head = {name: runs[name].head_lr for name in names}
    assert head == dict.fromkeys(names, 4.0) | {compare.HEAD: 16.0}
    assert names[:2] == compare.WITHOUT_IMAGES[:2] == [compare.PLAIN, compare.BASE]
    assert all((args.examples_per_class, args.seed) == (k, 0) for args in runs.values())
    for name in names:
        args = runs[name]
        if name == "ActGen":
            half = args.epochs // 2
            seen = [real + args.images_per_epoch * e for e in range(half)]
            seen += [real + args.images_per_epoch * half] * half
            steps, made = sum(math.ceil(n / args.batch_size) for n in seen), args.images_per_epoch * half
        elif name == "DIAGen":
            steps, made = args.epochs * args.iterations, real * args.variations
        else:
            made = real * args.variations
            steps = args.epochs * math.ceil(made / (args.batch_size * args.synthetic_ratio))
        size = args.batch_size + (0 if name in ("ActGen", "DIAGen") else dreamda.pool_batch(args))
        assert made == pytest.approx(images, abs=real - 1)
        expected = 8 if "8 images" in name else 24
        rounded = 2 if (name, k) == ("ActGen", 64) else 1  # its epochs are whole
        assert size == pytest.approx(expected, abs=rounded) or (name, images) == (
            "ActGen",
            40,
        )  # one an epoch
        assert steps == pytest.approx(600, rel=0.11), name


@pytest.fixture
def compared(monkeypatch):
    """The runs of compare.METHODS that an experiment makes, as (method, its settings); none trains."""
    calls = []

    def run(comparison, name, **changes):
        seen = dict(folder=comparison.out.name, splits=world.splits)
        calls.append((name, comparison.draw | changes | seen))
        gain = len(calls) / 1000 if name != compare.BASE else 0.0
        scores = {split: {"top1": 0.5 + gain} for split in ("test", "test_ood")} | {"training": 1.0}
        return scores, None if name in compare.WITHOUT_IMAGES else "images", 2.0

    monkeypatch.setattr(compare.Comparison, "run", run)
    monkeypatch.setattr(compare, "distances", lambda *_: dict(fid=1.0, precision=0.5, recall=0.5, oracle=0.6))
    return calls


def test_the_map_has_a_cell_for_each_world_and_repeats_no_run(compared, tmp_path, monkeypatch):
    trained = []

    def train(args):
        trained.append((args.start, args.confusion, args.variety))
        (Path(args.folder) / "sd").mkdir(parents=True)
        (Path(args.folder) / "sd" / "model_index.json").write_text("{}")

    monkeypatch.setattr(pretrain, "main", train)
    dials = dict(confusions=[0.0, 0.4], styles=[0.0, 0.65], varieties=[30])
    args = world_map.Args(**dials, seeds=2, out=str(tmp_path))
    world_map.main(args)
    assert trained == [(common.DIGITS_CLEAN, 0.4, 898), (common.DIGITS_CLEAN, 0.45, 30)]
    made = [(name, found["folder"]) for name, found in compared]
    assert len(set(made)) == len(made) == 5 * 2 * len(world_map.METHODS) + 2 * 2 * 3  # worlds, styles
    worlds = {found["folder"]: (Path(found["diffusion"]).name, found["style"]) for _, found in compared}
    assert worlds["p0-g0.65-v898-s1"] == ("sd_clean", 0.65) and (tmp_path / "map.png").exists()
    rows = (tmp_path / "map.md").read_text("utf-8").splitlines()[2:]
    assert len(rows) == 5 * (2 + len(world_map.METHODS))
    assert rows[0].startswith("| 0.0 | 0.0 | label smoothing | +") and rows[0].endswith(" |  |  |")
    # from the numbers alone, without generators
    world_map.main(
        dataclasses.replace(args, out=str(tmp_path / "new"), results=str(tmp_path / "results.json"))
    )
    assert len(compared) == len(made) and len(trained) == 2 and (tmp_path / "new" / "map.png").exists()
    # with another rate of the last layers all classifiers are trained anew
    world_map.main(dataclasses.replace(args, head_lr=4.0))
    rates = [(found["head_lr"], "-head4-" in found["folder"]) for _, found in compared]
    assert rates == [(1.0, False)] * len(made) + [(4.0, True)] * len(made) and len(trained) == 2


def test_the_comparison_trains_no_baseline_twice(compared, tmp_path):
    for dials, equal in (
        ({}, ""),
        (dict(head_lr=16.0), compare.HEAD),
        (dict(label_smoothing=0.1), compare.SMOOTHING),
    ):
        compared.clear()
        compare.main(compare.Args(per_class=[4], seeds=1, out=str(tmp_path), **dials))
        assert [name for name, _ in compared] == [name for name in compare.METHODS if name != equal]
        rows = (tmp_path / "compare.md").read_text("utf-8").splitlines()
        assert len([row for row in rows if row.startswith("| ")]) == 1 + len(compared)


@pytest.mark.parametrize("source", [batch_norm.WHOLE, "groups of 4", batch_norm.FIXED])
def test_batch_norm_takes_its_statistics_from_there(source):
    stock, ours = torch.nn.BatchNorm2d(3), batch_norm.batch_norm(source)(3)
    x = torch.randn(24, 3, 5, 5) * 2 + 1
    stock.running_mean += 1  # what a pretrained network remembers
    ours.load_state_dict(stock.state_dict())
    if source == batch_norm.FIXED:
        expected = stock.eval()(x)
    else:
        groups = 6 if "4" in source else 1
        expected = torch.stack([stock(x[i::groups]) for i in range(groups)], 1).flatten(0, 1)
    torch.testing.assert_close(ours(x), expected)
    assert torch.equal(ours.running_var, stock.running_var)
    torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


def test_labels_are_counted_by_what_an_image_shows(tmp_path):
    """Of the pseudo-labels half are missing, a quarter wrong; in uncommon settings all sources are wrong."""
    records = []
    for settings in ("common", "uncommon"):
        samples = world.render_pool(world.pools()["web"], 40, 5, settings)
        for i, (image, digit) in enumerate(zip(samples["images"], samples["labels"].tolist(), strict=True)):
            label = (digit + (settings == "uncommon")) % 10
            record = {"file_name": f"{world.NAMES[label]}/{settings}{i}.png", "label": label}
            record["pseudo_label"] = [None, digit, None, (digit + 1) % 10][i % 4]
            common.save_png(image.permute(2, 0, 1) / 255, tmp_path / "synthetic" / record["file_name"])
            records.append(record | {"class_name": world.NAMES[label]})
    common.write_file(tmp_path / "synthetic" / "metadata.jsonl", records)
    found = labels.shares(tmp_path)
    assert found["common"] == pytest.approx([0.5, 1, 0.5, 0.5, 1], abs=0.06)
    assert found["uncommon"] == pytest.approx([0.5, 0, 0.5, 0.5, 0], abs=0.06)


def test_settings_are_tried_on_validation_digits_alone(compared, tmp_path, monkeypatch):
    methods, splits = [compare.TEXT, "ActGen", "DreamDA"], {name: ([name], [0]) for name in ("val", "test")}
    monkeypatch.setattr(tune, "REAL_SPLITS", lambda style: splits)
    tune.main(tune.Args(methods=methods, seeds=1, out=str(tmp_path)))
    tried = [(name, found) for name, found in compared if name in methods]
    assert [name for name, _ in tried] == [name for name in methods for _ in tune.TRIALS[name]]
    for name, found in tried:
        assert found["seed"] == 100 and found["splits"] is tune.validation_splits
        assert name != "DreamDA" or found["synthetic"].endswith("DreamDA, seed labels")
    drawn = []

    def render(digits, count, seed, settings, style):
        drawn.append((digits, settings, style))
        return {"images": torch.zeros(count, 32, 32, 3, dtype=torch.uint8), "labels": torch.zeros(count)}

    monkeypatch.setattr(world, "render_pool", render)
    judged = tune.validation_splits(0.65)
    assert judged["test"] is splits["val"] and [len(part) for part in judged["test_ood"]] == [596, 596]
    ((digits, settings, style),) = drawn
    assert (settings, style) == ("uncommon", 0.65)
    assert not {*digits.tolist()} & {*world.pools()["train"][:300].tolist(), *world.pools()["test"].tolist()}
    assert len((tmp_path / "tune.md").read_text("utf-8").splitlines()) == 2 + len(tried)
