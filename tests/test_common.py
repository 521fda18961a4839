"""Data sets in their real file formats, classifiers, scores, pipelines, run folders and the command line."""

import copy
import errno
import gc
import itertools
import json
import math
import os
import pickle
import re
import sys
import warnings
from functools import partial
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from accelerate.state import AcceleratorState
from PIL import Image
from scipy import stats
from sklearn import metrics

import common
import runs
from digits import pretrain

RED, BLUE = (250, 10, 20), (10, 20, 250)


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
    held, rest = (set(split.sources) for split in (data.test, data.train))
    assert len(rest) == 16 and len(held | rest) == 20
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(common.UserError, match="AnnualCrop_"):  # small images are read at once
        common.load_data("eurosat", str(tmp_path), 64, "none")
    with pytest.raises(common.UserError, match="AnnualCrop_"):
        common.load_data("eurosat", str(tmp_path), 96, "none").test[0]


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
@pytest.mark.parametrize(
    "name",
    [
        "small_cnn",
        "resnet50",
        "wide_resnet50_2",
        "vgg16_bn",
        "vit_small_patch16_224",
        "deit_base_patch16_224",
    ],
)
def test_a_classifier_gives_one_logit_per_class(name, size):
    with torch.device("meta"):  # shapes only: the big ones cost nothing
        model = common.build_classifier(name, ["a", "b", "c"], size).eval()
        sides = []
        if "resnet" in name:
            model.model.layer1.register_forward_pre_hook(lambda _, x: sides.append(x[0].shape[-1]))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert sides in ([], [size if size <= 64 else size // 4])
    if name == "vgg16_bn":  # CIFAR's form has one linear layer of 512 features
        assert common.last_linear(model)[1].in_features == (512 if size <= 64 else 4096)


def test_a_classifier_normalises_as_its_weights_were_trained():
    for name in ("resnet18", "vit_small_patch16_224"):
        model = common.build_classifier(name, ["a", "b"], 64).eval()
        x, cfg = torch.rand(2, 3, 64, 64), model.model.pretrained_cfg
        mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        with torch.no_grad():
            assert torch.allclose(model(x), model.model((x - mean) / std), atol=1e-5)


def test_an_unknown_classifier_and_weights_that_cannot_be_loaded_are_named(monkeypatch):
    with pytest.raises(common.UserError, match="unknown classifier 'resnet81'; choose small_cnn, clip or"):
        common.build_classifier("resnet81", ["a"], 32)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(common.UserError, match="resnet18 cannot be loaded for 32 pixels .no network."):
        common.build_classifier("resnet18", ["a"], 32, pretrained=True)


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


def test_the_learning_rate_is_torchs_cosine_and_warms_up_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(21):
        assert common.cosine(step / 20) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert [common.cosine(p, 0.2) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_last_layer_learns_at_its_own_rate(name):
    """Compared with torch's optimizers of the two parts, each with its rate; at 1, with one of the whole."""
    kinds = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam}
    kind = kinds.get(name, torch.optim.AdamW)
    x = torch.randn(16, 5, generator=common.generator(0))
    for head_lr in (1.0, 16.0):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
        net[0].bias.requires_grad_(False)
        twin = copy.deepcopy(net)
        optimizer = common.make_optimizer(name, net, 0.1, 0.05, {net[2]: head_lr})
        body, head = [p for p in twin[:2].parameters() if p.requires_grad], [*twin[2].parameters()]
        parts = [body + head] if head_lr == 1 else [body, head]
        references = [kind(part, 0.1, weight_decay=0.05) for part in parts]
        for lr in (0.01, 0.02, 0.01):
            common.set_lr(optimizer, lr)
            for reference, factor in zip(references, (1.0, head_lr), strict=False):
                reference.param_groups[0]["lr"] = lr * factor
            for model, used in ((net, [optimizer]), (twin, references)):
                model.zero_grad()
                model(x).square().sum().backward()
                for each in used:
                    each.step()
        assert all(map(torch.equal, net.state_dict().values(), twin.state_dict().values()))


def test_averaged_weights_follow_the_model_at_decay_0_and_lag_otherwise():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    follower, laggard = pretrain.averaged(model, 0.0), pretrain.averaged(model, 0.9)
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


def test_batches_of_augmentations_equal_torchvisions():
    from torchvision.transforms.v2 import InterpolationMode, functional

    x, u = torch.rand(6, 3, 20, 20), torch.rand(6, 4)
    shifted, mirrored = common.shift(x, u[:, :2], 3, "constant"), common.flip(x, u[:, :1])
    degrees, scale, right, down = 40 * u[:, 0] - 20, 0.8 + 0.4 * u[:, 1], u[:, 2] / 4, u[:, 3] / 4 - 0.1
    moved, turned = common.affine(x, degrees, scale, right, down), common.turn(x, u[:, 3:])
    for i, image in enumerate(x):
        corner = (7 * u[i, :2]).long().tolist()
        assert torch.equal(shifted[i], functional.crop(functional.pad(image, 3), *corner, 20, 20))
        assert torch.equal(mirrored[i], image.flip(2) if u[i, 0] < 0.5 else image)
        bilinear = dict(interpolation=InterpolationMode.BILINEAR)
        shifts = [20 * right[i].item(), 20 * down[i].item()]
        expected = functional.affine(
            image, -degrees[i].item(), shifts, scale[i].item(), [0.0, 0.0], **bilinear
        )
        assert torch.allclose(moved[i], expected, atol=1e-4)
        angle = 15 * (2 * u[i, 3].item() - 1)
        assert torch.allclose(turned[i], functional.rotate(image, angle, **bilinear), atol=1e-4)


def noise_images(count=24, side=20):
    pixels = np.random.default_rng(0).integers(0, 255, (count, side, side, 3), np.uint8)
    return [Image.fromarray(p) for p in pixels]


def process(index=0, count=1, wait=lambda: None):
    """The accelerator of one of several processes, as far as a loader or a run folder needs it."""
    return SimpleNamespace(
        process_index=index,
        num_processes=count,
        is_main_process=index == 0,
        wait_for_everyone=wait,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("augment", ["digits", "crop+randaugment", "squeezed", "zoomed"])
def test_an_image_is_augmented_alike_in_any_batch_worker_or_process(augment):
    transform = common.make_transforms(16, augment)[0]

    def epoch(images, batch_size, workers=0, processes=1, seed=(3, 1)):
        seen = {}
        for index in range(processes):
            torch.manual_seed(index)
            loader = common.Loader(images, batch_size, process(index, processes), workers, len(images))
            torch.rand(index)
            parts = [(x, y) for x, y in loader.shuffle(*seed)]
            assert [len(y) for _, y in parts] == [batch_size // processes] * (24 // batch_size)
            seen |= {y.item(): x for xs, ys in parts for x, y in zip(xs, ys, strict=True)}
        return torch.stack([seen[y] for y in range(24)])

    images = common.Images(noise_images(), range(24), transform)
    first = epoch(images, 8)
    for other in (epoch(images, 4), epoch(images, 8, workers=2), epoch(images, 8, processes=2)):
        assert torch.equal(first, other)
    assert torch.equal(first, epoch(images.keep(), 8))
    assert (images.kept is None) == (augment == "zoomed")  # a random crop cannot be kept
    assert not torch.equal(first, epoch(images, 8, seed=(3, 2)))


@pytest.mark.parametrize("samples", [24, 40])
def test_processes_share_one_random_order_whatever_each_has_drawn(samples):
    images, shares = common.Images(noise_images(), range(24), common.make_transforms(4, "none")[1]), []
    for index in range(2):
        torch.rand(index)
        loader = common.Loader(images, 8, process(index, 2), samples=samples).shuffle(0, 3)
        shares.append([y.tolist() for _, y in loader])
    batches = [a + b for a, b in zip(*shares, strict=True)]
    assert [len(batch) for batch in batches] == [8] * (samples // 8) and batches != [
        sorted(b) for b in batches
    ]
    drawn = list(itertools.chain(*batches))
    assert sorted(drawn[:24]) == list(range(24)) and len(set(drawn[24:])) == samples - 24


def test_evaluation_does_not_reset_the_callers_generator():
    images = common.Images(noise_images(), [i % 3 for i in range(24)], common.make_transforms(16, "crop")[1])
    net, drawn = common.SmallCNN(3), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        common.predict(net, images, common.make_accelerator())
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)


def test_loading_workers_live_as_long_as_the_loader():
    transform = common.make_transforms(16, "none")[0]
    transform.each = lambda x: torch.full_like(x, os.getpid() % 251)
    images = common.Images(noise_images(side=100), range(24), transform)
    loader = common.Loader(images, 4, process(), workers=2, samples=24)
    pids = [{round(255 * x[0, 0, 0, 0].item()) for x, _ in loader.shuffle(epoch)} for epoch in range(3)]
    assert pids[0] == pids[1] == pids[2] and len(pids[0]) == 2


def test_small_images_are_read_once_and_survive_every_copy(tmp_path):
    for i, image in enumerate(noise_images(4)):
        image.save(tmp_path / f"{i}.png")
    files, (augmented, plain) = sorted(tmp_path.glob("*.png")), common.make_transforms(16, "crop")
    images = common.Images(files, range(4), augmented).keep()
    expected = torch.stack([x for x, _ in common.Images(files, range(4), plain)])
    for file in files:
        file.unlink()
    again = images.transformed(plain)
    assert torch.equal(torch.stack([x for x, _ in again]), expected)
    assert torch.equal((again + again.subset([2]))[4][0], expected[2])
    with pytest.raises(common.UserError, match="0.png"):  # another size is read from the file
        images.transformed(common.make_transforms(8, "none")[1])[0]


def test_generators_reproduce_and_differ_by_key():
    keys = list(itertools.product(range(4), repeat=3))
    first, second = ([torch.rand(4, generator=common.generator(*key)) for key in keys] for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert len(torch.stack(first).unique(dim=0)) == len(keys)


# ----------------------------------------------------------------------------------------------------------
# Pipelines

SCHEDULERS = [
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_never_clipped_whichever_scheduler_the_model_comes_with(name, tmp_path):
    written = getattr(diffusers, name)(**BETAS)
    written.save_pretrained(tmp_path)
    pipe = SimpleNamespace(scheduler=type(written).from_pretrained(tmp_path))
    scheduler, timesteps = common.ddim(pipe, 50, 0.7)
    assert isinstance(scheduler, diffusers.DDIMScheduler) and len(timesteps) == 35
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding

    z, noise = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x = scheduler.add_noise(z, noise, timesteps[:1].repeat(2))
    for t in timesteps:  # img2img by a U-Net that knows the noise
        alpha = scheduler.alphas_cumprod[t]
        x = scheduler.step((x - alpha**0.5 * z) / (1 - alpha) ** 0.5, t, x).prev_sample
    assert z.abs().max() > 5 and torch.allclose(x, z, atol=0.3)


def test_a_loaded_pipeline_does_not_clip_whichever_scheduler_it_was_saved_with(tmp_path):
    sd = Path(common.DIGITS_SD)
    for part in sd.iterdir():
        if part.name not in ("scheduler", "model_index.json"):
            (tmp_path / part.name).symlink_to(part)
    index = json.loads((sd / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    diffusers.EulerDiscreteScheduler(**BETAS).save_pretrained(tmp_path / "scheduler")
    pipe = common.load_pipeline(str(tmp_path))
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler) and not pipe.scheduler.config.clip_sample
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training and not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("steps, strength", [(10, 0.05), (10, 0.0), (2000, 0.5), (10, 1.1)])
def test_a_strength_that_leaves_no_step_is_refused(pipe, steps, strength):
    with pytest.raises(common.UserError, match=f"--steps {steps} with --strength {strength} leaves no step"):
        common.ddim(pipe, steps, strength)


def test_a_folder_that_holds_no_pipeline_is_named_in_one_line(tmp_path):
    for folder, advice in ((tmp_path, "incomplete"), (tmp_path / "none", "no such folder")):
        with pytest.raises(common.UserError, match=f"cannot load the model '{folder}': .*{advice}") as error:
            common.load_pipeline(str(folder))
        assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------
# Run folders


def open_run(path, accelerator=None, free=(), **arguments):
    gc.collect()  # a folder stays locked while the frames of an exception in an earlier run live
    args = SimpleNamespace(**{"out": str(path), "overwrite": False, "seed": 0, "epochs": 4, **arguments})
    return common.Run(args, accelerator or common.make_accelerator(), free)


class Killed(Exception):
    pass


def train(path, titles=("first", "second"), die=None):
    """Trains a classifier for each title as the scripts do; raises in the middle of epoch `die` (title, i).

    Returns the epochs that were done here, the classifiers' weights, and the lines of metrics.jsonl.
    """
    run, done, weights = open_run(path), [], []
    run.begin()
    for title in titles:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        ema, optimizer = pretrain.averaged(net, 0.5), torch.optim.Adam(net.parameters(), 0.1)
        best = common.Best()
        for epoch in run.epochs(title, 4, model=net, ema=ema, nothing=None, optimizer=optimizer, best=best):
            common.seed_everything(common.make_accelerator(), 0, epoch)
            for step in range(3):
                loss = (net(torch.randn(8, 4)) - 1).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update_parameters(net)
                if (title, epoch) == die and step == 1:
                    raise Killed
            run.log(loss=loss.item())
            run.log_scores({"val": {"top1": [0.1, 0.4, 0.4, 0.2][epoch]}})
            best.update(epoch, [0.1, 0.4, 0.4, 0.2][epoch], net)
            done.append((title, epoch))
        assert run.outcome(title)["val"]["top1"] == 0.2 and run.outcome(title)["training"] > 0
        weights.append([*net.state_dict().values(), *ema.state_dict().values(), *best.weights.values()])
        assert best.epoch == 1  # the first of the two highest
    return done, weights, runs.lines_of(path / "metrics.jsonl")


def same(a, b):
    return all(map(torch.equal, itertools.chain(*a), itertools.chain(*b)))


def test_epochs_that_were_interrupted_go_on_to_the_same_lines_and_weights(tmp_path):
    done, weights, lines = train(tmp_path / "whole")
    assert done == [(title, epoch) for title in ("first", "second") for epoch in range(4)]
    assert [(line["classifier"], line["epoch"]) for line in lines] == [(t, e + 1) for t, e in done]
    assert all(line["val"] == line["scores"]["val"]["top1"] for line in lines)
    rest = done
    for die in (("first", 0), ("first", 2), ("second", 3)):
        with pytest.raises(Killed):
            train(tmp_path / "killed", die=die)
        written = runs.lines_of(tmp_path / "killed" / "metrics.jsonl") if die != ("first", 0) else []
        rest = done[done.index(die) :]
        assert written == lines[: done.index(die)]
    again = train(tmp_path / "killed")
    assert again[0] == rest and same(again[1], weights) and again[2] == lines
    done, last, unchanged = train(tmp_path / "killed")  # nothing is left to do
    assert done == [] and same(last, weights) and unchanged == lines


def test_a_value_is_computed_once_and_read_from_its_file_from_then_on(tmp_path):
    calls, values = [], {"a.json": {"n": [1, 2.5, None]}, "b.jsonl": [{"x": 1}, {"y": "é"}], "c.csv": "é\n"}

    def compute(value):
        calls.append(value)
        return value

    for again in range(2):
        run = open_run(tmp_path)
        assert all(run.once(name, compute, value) == value for name, value in values.items())
        assert torch.equal(run.once("plans/d.pt", compute, {"x": torch.arange(3)})["x"], torch.arange(3))
        assert len(calls) == 4, again
        del run


@pytest.mark.parametrize("together", [False, True])
def test_the_other_processes_wait_for_the_value_and_compute_only_together(tmp_path, together):
    calls, barriers = [], []

    def wait():  # the main process, which has the value at the second barrier
        barriers.append(len(calls))
        if len(barriers) == 3:
            common.write_file(tmp_path / "plan.json", "the main process's")

    run = open_run(tmp_path, process(1, 2, wait))
    assert run.once("plan.json", lambda: calls.append(1), together=together) == "the main process's"
    assert len(calls) == together and len(barriers) == 3  # one barrier when the run was opened
    assert not (tmp_path / "config.json").exists()


def draw(run, files, drawn, batch_size=3):
    for batch in run.missing("drawing", files, batch_size):
        drawn.append(batch)
        images = torch.stack([torch.full((3, 4, 4), i / 100) for i in batch])
        run.keep(images, [files[i] for i in batch], images[:, :1])


def test_missing_images_are_shared_by_the_processes_and_a_batch_is_drawn_whole(tmp_path):
    files = [tmp_path / "synthetic" / "a" / f"{i}.png" for i in range(10)]
    shares = [[], [], []]
    for index, share in enumerate(shares):
        draw(open_run(tmp_path, process(index, 3)), files, share)
    assert shares == [[[0, 1, 2], [9]], [[3, 4, 5]], [[6, 7, 8]]]
    assert all(file.exists() for file in files) and not [*tmp_path.rglob("*.tmp")]
    before = [file.read_bytes() for file in files]
    files[4].unlink()
    alone = []
    run = open_run(tmp_path, process(0, 1))
    draw(run, files, alone)
    assert alone == [[3, 4, 5]] and [file.read_bytes() for file in files] == before
    assert run.seconds["drawing"] > 0
    assert common.read_file(tmp_path / "seconds.json") == run.seconds


def test_an_image_appears_after_its_latents_so_neither_is_ever_without_the_other(tmp_path, monkeypatch):
    files, drawn, save_png = [tmp_path / f"{i}.png" for i in range(3)], [], common.save_png

    def die(image, file):
        assert common.read_file(tmp_path / "latents" / f"{file.stem}.pt").shape == (1, 4, 4)
        if file.stem == "1":
            raise Killed
        save_png(image, file)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common, "save_png", die)
        draw(open_run(tmp_path), files, drawn)
    assert files[0].exists() and not files[1].exists()
    draw(open_run(tmp_path), files, drawn)
    assert drawn == [[0, 1, 2]] * 2 and all(file.exists() for file in files)


def test_images_without_latents_leave_no_latents(tmp_path):
    open_run(tmp_path).keep(torch.rand(1, 3, 4, 4), [tmp_path / "synthetic" / "a" / "0.png"])
    assert (tmp_path / "synthetic" / "a" / "0.png").exists() and not (tmp_path / "latents").exists()


def test_a_begun_run_refuses_other_arguments_and_names_the_difference(tmp_path):
    open_run(tmp_path)
    run = open_run(tmp_path, epochs=5, seeds=1, data_dir="a")  # the first was not begun
    run.begin()
    run.write("model.pt", {"x": torch.ones(1)})
    del run
    with pytest.raises(
        common.UserError, match="holds a run with --epochs 5, this one has --epochs 4.*--over"
    ):
        open_run(tmp_path, seeds=1)
    assert open_run(tmp_path, epochs=5, seeds=2, data_dir="b").config["seeds"] == 2  # these two may change
    assert open_run(tmp_path, epochs=5, seed=1, free=("seed",)).config["seed"] == 1  # the caller's own
    config = common.read_file(tmp_path / "config.json")
    assert config["args"]["epochs"] == 5 and config["versions"]["numpy"] == np.__version__
    open_run(tmp_path, epochs=4, seeds=1, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_overwriting_that_is_killed_at_any_deletion_is_made_good_when_it_is_given_again(tmp_path):
    for n in range(4):
        train(path := tmp_path / str(n), ["first"])
        unlink, calls = Path.unlink, itertools.count()

        def die(file, *_, unlink=unlink, calls=calls, n=n):
            if next(calls) == n:
                raise Killed
            unlink(file)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", die)
            patch.setattr(Path, "iterdir", lambda folder: map(folder.joinpath, sorted(os.listdir(folder))))
            open_run(path, overwrite=True, epochs=5)
        open_run(path, overwrite=True, epochs=5)
        assert [file.name for file in path.iterdir()] == [".lock"], n


def test_overwriting_never_empties_a_folder_that_holds_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    open_run(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_folder_in_use_is_refused_and_left_alone(tmp_path, overwrite):
    run = open_run(tmp_path)
    run.begin()
    run.write("model.pt", {"x": torch.ones(1)})
    with pytest.raises(common.UserError, match=f"another process is running in {tmp_path}"):
        open_run(tmp_path, overwrite=overwrite)
    assert common.read_file(tmp_path / "model.pt")["x"] == 1 and (tmp_path / "config.json").exists()
    del run
    assert open_run(tmp_path).result() is None


def test_a_finished_run_has_its_curves_and_says_that_it_is_finished(tmp_path, capsys):
    train(tmp_path, ["first"])
    run = open_run(tmp_path)
    assert run.result() is None
    for _ in run.epochs("first", 4):
        raise AssertionError("nothing is left to do")
    result = {"first": run.outcome("first")}
    assert run.finish(result) == result and (tmp_path / "curves.png").exists()
    again = open_run(tmp_path)  # `run` still lives: a notebook reads a finished run twice
    assert again.result() == open_run(tmp_path).result() == result
    del run
    assert open_run(tmp_path).result() == result
    assert f"{tmp_path} is finished; --overwrite starts it afresh" in capsys.readouterr().out


def test_a_save_that_dies_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path, save = tmp_path / "checkpoint.pt", torch.save
    common.write_file(path, {"x": torch.ones(1000)})

    def die(state, f):
        save(state, tmp_path / "whole")
        f.write((tmp_path / "whole").read_bytes()[:2000])
        raise OSError("gone")

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(OSError, match="gone"):
        common.write_file(path, {"x": torch.zeros(1000)})
    assert common.read_file(path)["x"].eq(1).all()


class Foreign:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_reading_a_checkpoint_never_runs_foreign_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Foreign()}, "model.pt")
    with pytest.raises(common.UserError, match="cannot read model.pt"):
        common.read_file(Path("model.pt"))
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("name", ["model.pt", "plan.json", "lines.jsonl"])
def test_a_truncated_file_is_named_and_a_missing_one_has_a_default(tmp_path, name):
    path = tmp_path / name
    assert common.read_file(path) is None and common.read_file(path, [1]) == [1]
    common.write_file(path, [{"x": 1.0}] * 20)
    assert common.read_file(path) == [{"x": 1.0}] * 20
    path.write_bytes(path.read_bytes()[:-15])
    with pytest.raises(common.UserError, match=f"cannot read {path}.*delete it") as error:
        common.read_file(path)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_title_becomes_a_file_name():
    assert [common.slug(t) for t in ("+ image guidance", "DreamDA, seed labels", "one head's labels")] == [
        "image-guidance",
        "DreamDA-seed-labels",
        "one-head-s-labels",
    ]


def test_any_class_name_gets_a_folder_of_its_own(tmp_path):
    names = ["a/b", "a_b", "a\\b", "a_b 0", 'say "hi"', "baker's", "naïve café", "x" * 300, "x" * 299 + "y"]
    names += ["語" * 300, "", " ", ".", "..", "../up", "a:b*c?", "line\nbreak", "nul\0"]
    folders = common.class_folders(names)
    for folder in folders:
        write(tmp_path / "synthetic" / folder / "x.png")  # fails if a name is taken, too long or has a slash
    assert len(set(folders)) == len(names)
    classes = torchvision.datasets.ImageFolder(tmp_path / "synthetic").classes
    assert classes == sorted(folders)


# ----------------------------------------------------------------------------------------------------------
# The command line

RECIPES = {"digits": dict(lr=0.5, epochs=7), "cifar10": dict(lr=0.25, pretrained=True)}


def parse(monkeypatch, *words, main=None):
    """The arguments that main gets from a command line."""
    got = []
    monkeypatch.setattr(sys, "argv", ["method.py", *words])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__doc__="A method.\n\nMore."))
    common.cli(main or got.append, common.RunArgs, RECIPES)
    return got[0]


@pytest.mark.parametrize(
    "words, lr",
    [("", "0.5"), ("--dataset cifar10", "0.25"), ("--dataset=cifar10", "0.25"), ("--datas cifar10", "0.25")],
)
def test_help_shows_the_values_of_the_data_sets_recipe(words, lr, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, *words.split(), "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and text.startswith("A method. ")
    assert f"peak learning rate (default: {lr})" in text
    args = parse(monkeypatch, *words.split())
    assert str(args.lr) == lr and (args.epochs, args.pretrained) == (
        (7, None) if lr == "0.5" else (None, True)
    )


def test_a_given_argument_wins_over_the_recipe(monkeypatch):
    args = parse(monkeypatch, "--lr", "0.1", "--dataset", "cifar10", "--pretrained", "false")
    assert (args.lr, args.pretrained, args.dataset) == (0.1, False, "cifar10")


@pytest.mark.parametrize(
    "error, message",
    [
        (common.UserError("give  another\nfolder"), "method.py: error: give another folder"),
        (
            OSError(28, "No space left on device", "a.pt"),
            "cannot read or write a.pt: No space left on device",
        ),
        (torch.OutOfMemoryError(), "out of GPU memory; lower --generation_batch_size"),
        (KeyboardInterrupt(), "stopped; the same command goes on from here"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(error, message, monkeypatch, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        parse(monkeypatch, main=main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    def main(args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        parse(monkeypatch, main=main)


def test_an_unknown_argument_is_named(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--learning_rate", "1")
    assert "unknown arguments: --learning_rate 1; --help lists them" in capsys.readouterr().err


def test_require_raises_its_message_unless_the_condition_holds():
    common.require([0], "no")
    for false in (False, [], 0, None):
        with pytest.raises(common.UserError, match="^no$"):
            common.require(false, "no")


def test_a_number_outside_of_its_range_or_an_unknown_choice_is_named():
    with pytest.raises(common.UserError, match=r"^--batch_size 0 must lie in \[1, 1e6\]$"):
        common.check_numbers(common.RunArgs(epochs=1, batch_size=0))
    with pytest.raises(common.UserError, match="unknown dataset 'cats'; choose one of: digits, cifar10$"):
        common.check_choice("dataset", "cats", RECIPES)


# ----------------------------------------------------------------------------------------------------------
# Models of another kind, machines of another kind


def tiny_pipeline(folder, file=None, **unet):
    """Saves an untrained copy of the embedded generator with another U-Net; file: a variant's name."""
    pipe = pretrain.build_pipeline()
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | unet
    pipe.unet = type(pipe.unet)(**config)
    pipe.save_pretrained(folder, variant=file)
    return folder


@pytest.mark.parametrize(
    "unet, words",
    [
        (dict(in_channels=9), "its U-Net takes 9 channels for 4 latent ones, as for inpainting"),
        (dict(addition_embed_type="text"), "its U-Net wants further conditions, as SDXL's does"),
        (dict(cross_attention_dim=64), "its text encoder does not fit its U-Net"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused_at_loading(unet, words, tmp_path):
    with pytest.raises(common.UserError, match=re.escape(words)):
        common.load_pipeline(str(tiny_pipeline(tmp_path / "sd", **unet)))


def test_a_folder_that_has_fp16_variants_only_is_loaded(tmp_path):
    pipe = common.load_pipeline(str(tiny_pipeline(tmp_path / "sd", "fp16")))
    assert not [*(tmp_path / "sd" / "unet").glob("diffusion_pytorch_model.safetensors")]
    assert pipe.unet.dtype == torch.float32


def test_a_single_file_and_a_missing_folder_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "sd.safetensors").write_bytes(b"x")
    with pytest.raises(common.UserError, match="it is a file; convert it by .*from_single_file"):
        common.load_pipeline(str(tmp_path / "sd.safetensors"))
    with pytest.raises(common.UserError, match="no such folder"):
        common.load_pipeline(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_no_other_process(code, tmp_path, monkeypatch, capsys):
    def acquire(self):
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(common.FileLock, "acquire", acquire)
    open_run(tmp_path).begin()
    assert "cannot be locked; start no second run" in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()


def test_a_loading_process_that_dies_for_lack_of_shared_memory_is_one_line(monkeypatch, capsys):
    def main(args):
        raise RuntimeError(
            "DataLoader worker (pid 7) is killed by signal: Bus error. insufficient shared memory"
        )

    monkeypatch.setattr("sys.argv", ["actgen.py"])
    monkeypatch.setitem(sys.modules, "__main__", common)
    with pytest.raises(SystemExit) as stop:
        common.cli(main, common.RunArgs)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--workers" in error and "--shm-size" in error and error.count("\n") == 1


def test_a_full_disk_shows_as_an_oserror_also_while_tensors_are_written(tmp_path):
    """torch.save may hide it in a RuntimeError of its own."""
    (tmp_path / "x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        common.write_file(tmp_path / "x.pt", {"x": torch.zeros(10_000)})


def test_precision_is_the_launchers_if_it_names_one(monkeypatch):
    for named, found in (("bf16", "bf16"), ("no", "no")):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", named)
        assert common.make_accelerator().mixed_precision == found
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert common.native_dtype(torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert common.native_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_photograph_is_squeezed_whole_or_cropped():
    photo = Image.new("RGB", (80, 40), RED)
    photo.paste(BLUE, (0, 0, 20, 40))  # the left quarter, which a crop loses
    whole, crop = (common.make_transforms(16, "none", how)[1](photo) for how in ("squeeze", "crop"))
    assert whole.shape == crop.shape == (3, 16, 16)
    assert whole[2, :, :3].min() > 0.9 and whole[0, :, 5:].min() > 0.9 and crop[0].min() > 0.8


def test_the_class_mean_counts_rare_classes_as_much(tmp_path):
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = F.one_hot(torch.zeros(100, dtype=torch.long), 3).float()
    scores = common.scores(logits, labels)
    assert scores["top1"] == pytest.approx(0.9) and scores["class_mean"] == 0.5


def test_the_last_batch_is_left_out_unless_it_is_the_only_one():
    images = common.Images([Image.new("RGB", (4, 4))] * 10, range(10), common.make_transforms(4, "none")[1])
    accelerator = common.make_accelerator()
    loaders = [common.Loader(images, b, accelerator, samples=10).shuffle(0) for b in (4, 10, 16)]
    assert [[len(y) for _, y in loader] for loader in loaders] == [[4, 4], [10], [10]]
    assert [len(loader) for loader in loaders] == [2, 1, 1]
    assert [len(y) for _, y in common.Loader(images, 4, accelerator)] == [4, 4, 2]  # to evaluate, all


def test_processes_draw_different_augmentations():
    drawn = []
    for index in range(2):
        common.seed_everything(SimpleNamespace(process_index=index), 3, 1)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)
