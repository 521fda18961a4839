"""The digits world, data sets in their real file formats, classifiers, scores and run folders."""

import itertools
import json
import math
import pickle
import re
import warnings
from hashlib import md5
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image
from scipy import linalg, ndimage, stats
from sklearn import metrics, neighbors
from sklearn.datasets import load_digits

import common

RED, BLUE = (250, 10, 20), (10, 20, 250)


@pytest.fixture(scope="module")
def world():
    train = common.digit_pools()["train"]
    return {s: common.render_pool(train, 300, 7, s) for s in ("all", "common", "uncommon")}


def test_same_seed_renders_the_same_bytes():
    arguments = (3, "red", "flower", (5.0, 1.0, 1.0, -1.0))
    image, mask = common.render(*arguments, seed=4)
    common._sources.cache_clear()
    again, mask_again = common.render(*arguments, seed=4)
    assert image.tobytes() == again.tobytes() and mask.tobytes() == mask_again.tobytes()
    assert image.tobytes() != common.render(*arguments, seed=5)[0].tobytes()


def test_the_pools_are_disjoint_and_cover_all_digits():
    assert sorted(np.concatenate(list(common.digit_pools().values()))) == list(range(1797))


@pytest.mark.parametrize("setting", common.SETTINGS)
def test_the_mask_is_where_the_colour_covers_more_than_half(setting):
    compared = 0
    for seed in range(10):
        geometry = common.draw_geometry(np.random.default_rng(seed))
        drawn = [(common.render(seed, c, setting, geometry, seed), v) for c, v in common.COLOURS.items()]
        for ((a, mask), tint_a), ((b, _), tint_b) in itertools.combinations(drawn, 2):
            if (a[0] == b[0]).all():  # the same background: the images differ by the digit's colour alone
                difference = np.subtract(tint_a, tint_b)
                share = (a.astype(float) - b) @ difference / (difference @ difference)
                assert ((share > 0.5) == mask)[abs(share - 0.5) > 0.02].all()
                compared += 1
    assert compared >= 20


def test_every_sample_is_legible(world):
    contrasts, tints = [], np.array([*common.COLOURS.values()])
    images, masks, colours = (world["all"][k].numpy() for k in ("images", "masks", "colours"))
    for image, mask, tint in zip(images, masks, tints[colours], strict=True):
        inner, outer = (ndimage.binary_dilation(mask, np.ones((k, k))) for k in (5, 7))
        distance = np.linalg.norm(image[outer & ~inner] - tint, axis=1) / (255 * math.sqrt(3))
        contrasts.append(np.quantile(distance, 0.1))  # 1: black on white
    assert min(contrasts) > 0.1 and np.quantile(contrasts, 0.05) > 0.25


def test_captions_colours_settings_and_labels_tell_what_is_drawn(world):
    drawn, targets, forms = world["all"], load_digits().target[common.digit_pools()["train"]], set()
    for i, caption in enumerate(drawn["captions"]):
        label, colour, setting = (int(drawn[k][i]) for k in ("labels", "colours", "settings"))
        (name, tint), setting = [*common.COLOURS.items()][colour], common.SETTINGS[setting]
        parts = re.fullmatch(r"a photo of a (?:(\w+) )?(\w+)(?: on a (\w+) background)?", caption).groups()
        assert label == targets[i] and parts[1] == common.DIGIT_NAMES[label]
        assert parts[0] in (None, name) and parts[2] in (None, setting)
        forms.add((parts[0] is None, parts[2] is None))
        image, mask = drawn["images"][i].numpy(), drawn["masks"][i].numpy()
        assert (abs(image[mask] - np.array(tint)) <= 1).all(1).any()
        outside = image[~ndimage.binary_dilation(mask, np.ones((5, 5)))]
        assert (np.ptp(outside, axis=0).max() == 0) == (setting == "plain")
    assert len(forms) == 4


def test_a_class_has_two_common_settings_and_a_third_uncommon_one(world):
    common_ones, uncommon = (
        set(zip(world[k]["labels"].tolist(), world[k]["settings"].tolist(), strict=True))
        for k in ("common", "uncommon")
    )
    assert common_ones | uncommon == {(y, s) for y in range(10) for s in range(3)}
    assert not common_ones & uncommon and len(uncommon) == 10


def test_only_test_ood_is_uncommon_and_no_digit_is_in_two_splits(monkeypatch):
    calls = []

    def record(indices, count, seed, settings):
        calls.append((set(indices.tolist()), settings))
        return {"images": torch.zeros(0, 32, 32, 3, dtype=torch.uint8), "labels": torch.zeros(0)}

    monkeypatch.setattr(common, "render_pool", record)
    assert list(common._digit_splits.__wrapped__()) == ["train", "val", "test", "test_ood"]
    (train, a), (val, b), (test, c), (ood, d) = calls
    assert (a, b, c, d) == ("common", "common", "common", "uncommon") and ood == test
    assert not train & val and not (train | val) & test
    assert not (train | val | test) & set(common.digit_pools()["web"].tolist())


def test_a_few_shot_draw_has_k_per_class_and_reproduces_with_its_seed():
    def draw(seed):
        train = common.load_data("digits", "", 32, "digits", per_class=3, seed=seed).train
        assert np.bincount(train.labels).tolist() == [3] * 10
        return [image.tobytes() for image in train.sources]

    assert draw(1) == draw(1) != draw(2)


def write(path, colour=RED, size=(40, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def colour_of(images, i):
    """An image's mean colour, as the evaluation transform gives it."""
    return (255 * images[i][0].mean((1, 2))).round().int().tolist()


@pytest.mark.parametrize("kind, n", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_archives_are_read(tmp_path, monkeypatch, kind, n):
    cifar = getattr(torchvision.datasets, kind)
    names = ["aquarium_fish", *(f"thing{i}" for i in range(1, n))]
    folder = tmp_path / cifar.base_folder
    folder.mkdir()

    def dump(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return md5((folder / name).read_bytes()).hexdigest()

    def batch(name):  # rows of 1,024 red, 1,024 green, 1,024 blue values; the label is the red value
        rows, y = np.repeat(np.array([[c, 200, 7] for c in range(n)], np.uint8), 1024, 1), list(range(n))
        labels = {"fine_labels": y, "coarse_labels": [0] * n} if n == 100 else {"labels": y}
        return [name, dump(name, {"data": rows, "filenames": [""] * n, **labels})]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, attribute, [batch(name) for name, _ in getattr(cifar, attribute)])
    meta = cifar.meta | {"md5": dump(cifar.meta["filename"], {cifar.meta["key"]: names})}
    monkeypatch.setattr(cifar, "meta", meta)
    data = common.load_data(kind.lower(), str(tmp_path), 32, "crop")
    assert data.class_names == ["aquarium fish", *names[1:]]
    assert (len(data.train), len(data.test)) == (n if n == 100 else 5 * n, n)
    assert [colour_of(data.test, i) for i in range(n)] == [[y, 200, 7] for y in data.test.labels]
    assert data.train[0][0].shape == (3, 32, 32)


def test_stl10s_binary_files_are_read_with_the_unlabelled_part_if_asked_for(tmp_path, monkeypatch):
    stl10 = torchvision.datasets.STL10
    folder, names = tmp_path / stl10.base_folder, ["airplane", "bird"]
    folder.mkdir()

    def dump(name, content):
        (folder / name).write_bytes(content)
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    def part(name, reds):  # planes of 96 columns, red, green, blue; labels from 1
        pixels = np.repeat(np.array([[red, 200, 7] for red in reds], np.uint8), 96 * 96, 1)
        labels = bytes(red // 10 for red in reds)
        return [dump(f"{name}_X.bin", pixels.tobytes()), dump(f"{name}_y.bin", labels)]

    monkeypatch.setattr(stl10, "test_list", part("test", [20, 10]))
    unlabelled = part("unlabeled", [50, 60, 70, 80])[:1]
    monkeypatch.setattr(stl10, "train_list", part("train", [10, 20, 10]) + unlabelled)
    (folder / stl10.class_names_file).write_text("\n".join(names))
    data = common.load_data("stl10", str(tmp_path), 32, "none", per_class=1, unlabelled=True)
    assert data.class_names == names and data.train.labels == [0, 1] and data.test.labels == [1, 0]
    assert [colour_of(data.test, i) for i in range(2)] == [[20, 200, 7], [10, 200, 7]]
    extra = data.unlabelled.subset(range(4), data.test.transform)
    assert [colour_of(extra, i)[0] for i in range(4)] == [50, 60, 70, 80] and set(extra.labels) == {-1}
    few = common.load_data("stl10", str(tmp_path), 32, "none", per_class=1)  # what the draw has left
    assert len(few.unlabelled) == 1 and few.unlabelled[0][1] == 0


def test_eurosat_folders_are_read_a_fifth_is_held_out_and_a_bad_file_is_named(tmp_path):
    for name, colour in {"AnnualCrop": RED, "SeaLake": BLUE}.items():
        for i in range(10):
            write(tmp_path / "eurosat" / "2750" / name / f"{name}_{i}.jpg", colour, (64, 64))
    data = common.load_data("eurosat", str(tmp_path), 64, "none")
    assert data.class_names == ["annual crop", "sea lake"] and data.test.labels == [0, 0, 1, 1]
    assert np.allclose([colour_of(data.test, i) for i in range(4)], [RED, RED, BLUE, BLUE], atol=4)
    held, rest = ({i for _, i in split.sources} for split in (data.test, data.train))
    assert len(rest) == 16 and len(held | rest) == 20
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(common.UserError, match="AnnualCrop_"):
        data.test[0]


def test_a_folder_with_val_and_test_ood_is_read(tmp_path):
    for split in ("train", "test", "val", "test_ood"):
        for name, colour in {"guinea_pig": RED, "owl": BLUE}.items():
            write(tmp_path / split / name / "deeper" / "A.JPG", colour)
            write(tmp_path / split / name / "b.webp", colour, lossless=True)
            (tmp_path / split / name / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    data = common.load_data("folder", str(tmp_path), 16, "none")
    assert data.class_names == ["guinea pig", "owl"]
    for split in (data.train, data.test, data.val, data.test_ood):
        assert split.labels == [0, 0, 1, 1]
        assert np.allclose([colour_of(split, i) for i in range(4)], [RED, RED, BLUE, BLUE], atol=4)


def test_a_coco_label_is_the_largest_objects_category(tmp_path):
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}, {"id": 3, "name": "car"}]
    for year in ("train2017", "val2017"):
        images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (5, 2, 9)]
        boxes = [(5, 7, 10.5), (5, 90, 20.0), (5, 7, 15.0), (2, 7, 1.0)]  # image, category, area; 9: empty
        annotations = [{"image_id": i, "category_id": c, "area": a} for i, c, a in boxes]
        content = {"images": images, "annotations": annotations, "categories": categories}
        for i, colour in {5: RED, 2: BLUE}.items():
            write(tmp_path / year / f"{i:012d}.jpg", colour)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{year}.json").write_text(json.dumps(content))
    data = common.load_data("coco", str(tmp_path), 16, "none")
    assert data.class_names == ["train", "toothbrush"]  # by id; no image is mainly a car
    labelled = {tuple(round(c, -1) for c in colour_of(data.test, i)): data.test.labels[i] for i in range(2)}
    assert labelled == {(250, 10, 20): 1, (10, 20, 250): 0} and len(data.train) == 2


def test_unusual_images_open_upright_in_rgb(tmp_path):
    def opened(name, image, **options):
        image.save(tmp_path / name, **options)
        image = common.open_image(tmp_path / name)
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)

    assert abs(opened("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))) - (255, 0, 0)).max() < 10
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert abs(opened("deep.png", Image.fromarray(ramp))[..., 0] - ramp / 257).max() <= 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert (opened("palette.png", palette, transparency=0) == RED).all()
    frames = [Image.new("RGB", (8, 8), c) for c in (RED, BLUE)]
    assert (opened("moving.gif", frames[0], save_all=True, append_images=frames[1:]) == RED).all()
    exif, picture = Image.Exif(), Image.new("RGB", (16, 8), RED)
    exif[0x0112] = 6  # to be turned clockwise: the left side comes up
    picture.paste(BLUE, (0, 0, 8, 8))
    turned = opened("turned.jpg", picture, exif=exif)
    assert turned.shape == (16, 8, 3) and abs(turned[2, 4] - BLUE).max() < 10 > abs(turned[-2, 4] - RED).max()


def test_a_huge_image_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (13, 13)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80)
    with pytest.raises(common.UserError, match="cannot read the image .*huge.png: .*169 pixels"):
        common.open_image(tmp_path / "huge.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_an_empty_or_truncated_file_is_named(tmp_path, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"bad.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)).save(whole)
    data = whole.read_bytes()
    for length in {0, 1, 4, 9, 20, len(data) // 4, len(data) // 2}:
        path.write_bytes(data[:length])
        with pytest.raises(common.UserError) as error:
            common.open_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [32, 64, 96, 224])
@pytest.mark.parametrize("name", [n for n in common.CLASSIFIERS if n != "clip"])
def test_a_classifier_gives_one_logit_per_class(name, size):
    with torch.device("meta"):  # shapes only: the big ones cost nothing
        model = common.build_classifier(name, ["a", "b", "c"], size).eval()
        sides = []
        if "resnet" in name:
            model.model.layer1.register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-1]))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert sides in ([], [size if size <= 64 else size // 4])


def test_clip_starts_as_its_own_zero_shot_classifier(tmp_path):
    names = ["cat", "guinea pig"]
    clip, tokenizer = runs.tiny_clip(tmp_path, "cat guinea pig")
    x = torch.rand(5, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in common.CLIP_MEAN_STD)
    words = tokenizer([f"a photo of a {n}" for n in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(**words, pixel_values=(x - mean) / std).logits_per_image
        logits = common.build_classifier("clip", names, 32, clip=str(tmp_path)).eval()(x)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_given_word_is_one_token_and_other_text_survives():
    words = "a photo of on background".split() + common.DIGIT_NAMES + [*common.COLOURS] + common.SETTINGS
    text = 'A "quick" brown_fox, #7 (50 %) ~ it\'s {x|y} <z> \\ /usr/bin & a+b=c; ^_^ `ok`? @home $5!'
    for known in (words, ["even", "seven", "eleven", "ven"]):
        tokenizer = common.build_tokenizer(known)
        assert {w: len(tokenizer.tokenize(w)) for w in known} == dict.fromkeys(known, 1)
        decoded = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_the_learning_rate_is_torchs_cosine_and_warms_up_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(21):
        assert common.cosine(step / 20) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert [common.cosine(p, 0.2) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_averaged_weights_follow_the_model_at_decay_0_and_lag_otherwise():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    follower, laggard = common.averaged(model, 0.0), common.averaged(model, 0.9)
    for value in (1.0, 2.0, 3.0):
        model(torch.randn(8, 3))
        torch.nn.init.constant_(model[0].weight, value)
        follower.update_parameters(model)
        laggard.update_parameters(model)
        assert all(map(torch.equal, follower.module.state_dict().values(), model.state_dict().values()))
    assert laggard.module[0].weight.tolist() == [pytest.approx([0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3] * 3)] * 3


def test_scores_are_scikit_learns():
    labels, logits = torch.arange(400) % 9, 2 * torch.randn(400, 10)  # class 9 never occurs
    ours, p = common.scores(logits, labels), logits.softmax(1).double().numpy()
    p, y = p / p.sum(1, keepdims=True), labels.numpy()
    for k in (1, 5):
        assert ours[f"top{k}"] == pytest.approx(metrics.top_k_accuracy_score(y, p, k=k, labels=range(10)))
    assert ours["nll"] == pytest.approx(metrics.log_loss(y, p, labels=range(10)), rel=1e-5)
    recall = metrics.recall_score(y, p.argmax(1), average=None, labels=range(9))
    assert ours["per_class"] == pytest.approx([*recall, None])
    bins, right, sure = np.ceil(15 * p.max(1)), p.argmax(1) == y, p.max(1)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * np.mean(bins == b) for b in set(bins)]
    assert ours["ece"] == pytest.approx(sum(gaps), rel=1e-4)


def test_distances_equal_their_formulas():
    real, fake = torch.randn(300, 6), 0.8 * torch.randn(300, 6) + torch.tensor([1.0, 0, 0, 0, 0, 0.5])
    ours, x, y = common.distribution_distances(real, fake), real.double().numpy(), fake.double().numpy()
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
    same, far = (common.distribution_distances(features, features + shift) for shift in (0, 100))
    assert abs(same["fid"]) < 1e-3 and same["kid"] < 1e-3 and same["precision"] == same["recall"] == 1
    assert far["fid"] == pytest.approx(6 * 100**2, rel=1e-3) and far["precision"] == far["recall"] == 0


def test_the_confidence_interval_is_students():
    values = [71.0, 74.5, 69.0, 73.0, 70.5]
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert common.confidence_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert math.isnan(common.confidence_interval([3.0])[1])
    assert common.interval_text(values) == f"71.6 ± {(high - low) / 2:.1f}"
    assert (common.interval_text([3.0]), common.interval_text([3.0], "+")) == ("3.0", "+3.0")


def test_curves_show_accuracies_that_are_measured_now_and_then(tmp_path):
    lines = [{"epoch": e, "loss": 1.0 / e} | ({"test": 0.5} if e % 5 == 0 else {}) for e in range(1, 11)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Matplotlib warns of a legend without curves
        common.save_curves({"real only": lines}, tmp_path / "curves.png")


@pytest.mark.parametrize("augment", ["digits", "crop", "resized", "none"])
def test_randaugment_comes_on_top_of_an_augmentation(augment, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))

    def views(name):
        train, evaluation = common.make_transforms(16, name)
        torch.manual_seed(0)
        return torch.stack([train(image) for _ in range(20)]), evaluation(image)

    plain, more = views(augment), views(f"{augment}+randaugment")
    assert torch.equal(plain[1], more[1])  # in training only
    assert more[0].shape == (20, 3, 16, 16) and more[0].min() >= 0 and more[0].max() <= 1
    assert not torch.equal(plain[0], more[0]) and len(more[0].unique(dim=0)) > 10
    monkeypatch.setattr(torchvision.transforms.v2.RandAugment, "forward", lambda self, image: image)
    assert torch.equal(views(f"{augment}+randaugment")[0], plain[0])


@pytest.mark.parametrize("samples", [0, 24])
def test_processes_share_one_random_order_whatever_each_has_drawn(samples):
    images, shares = common.Images([Image.new("RGB", (1, 1), (i, 0, 0)) for i in range(24)], range(24)), []
    images.transform = common.make_transforms(1, "none")[1]
    for index in range(2):
        torch.manual_seed(0)
        process = SimpleNamespace(num_processes=2, process_index=index, device=torch.device("cpu"))
        loader = common.make_loader(images, 8, process, True, samples=samples)
        torch.rand(index)  # augmentation
        shares.append([y.tolist() for _, y in loader])
    batches = [a + b for a, b in zip(*shares, strict=True)]
    assert [len(batch) for batch in batches] == [8] * 3 and batches != [sorted(b) for b in batches]
    assert sorted(itertools.chain(*batches)) == list(range(24))


def open_run(path, overwrite=False, **arguments):
    args = SimpleNamespace(**{"overwrite": overwrite, "seed": 0, "epochs": 4, **arguments})
    return common.Run(path, args, common.make_accelerator())


def test_a_save_that_dies_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path, save = tmp_path / "checkpoint.pt", torch.save
    common.save_atomically({"x": torch.ones(1000)}, path)

    def die(state, f):
        save(state, tmp_path / "whole")
        f.write((tmp_path / "whole").read_bytes()[:2000])
        raise OSError("gone")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="gone"):
        common.save_atomically({"x": torch.zeros(1000)}, path)
    assert torch.load(path, weights_only=True)["x"].eq(1).all()


def test_a_run_folder_refuses_other_arguments_and_names_the_difference(tmp_path):
    run = open_run(tmp_path / "run")
    run.save("checkpoint.pt", {"x": torch.ones(1)})
    del run
    with pytest.raises(common.UserError, match="--epochs 4.*--epochs 5.*--overwrite"):
        open_run(tmp_path / "run", epochs=5)
    assert open_run(tmp_path / "run").load("checkpoint.pt")["x"] == 1
    assert open_run(tmp_path / "run", overwrite=True, epochs=5).load("checkpoint.pt") is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path, overwrite):
    run = open_run(tmp_path / "run")
    run.save("checkpoint.pt", {"x": torch.ones(1)})
    with pytest.raises(common.UserError, match="another process"):
        open_run(tmp_path / "run", overwrite)
    assert run.load("checkpoint.pt")["x"] == 1


def test_generators_reproduce_and_differ_by_key():
    keys = list(itertools.product(range(4), repeat=3))
    first, second = ([torch.rand(4, generator=common.generator(*key)) for key in keys] for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert len(torch.stack(first).unique(dim=0)) == len(keys)


def test_any_class_name_gets_a_folder_of_its_own(tmp_path):
    names = ["a/b", "a_b", "a\\b", "a_b 0", 'say "hi"', "baker's", "naïve café", "x" * 300, "x" * 299 + "y"]
    names += ["語" * 300, "", " ", ".", "..", "../up", "a:b*c?", "line\nbreak", "nul\0"]
    folders = common.class_folders(names)
    for folder in folders:
        write(tmp_path / "synthetic" / folder / "x.png")  # fails if a name is taken, too long or has a slash
    assert len(set(folders)) == len(names)
    classes = torchvision.datasets.ImageFolder(tmp_path / "synthetic").classes
    assert classes == sorted(folders)
