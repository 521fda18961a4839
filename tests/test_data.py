"""Data sets as people have them: layouts, class names, strays, damaged files, unusual pixels, the hub."""

import itertools
import json
import pickle
import re
import shutil
import struct
import unicodedata
from hashlib import md5

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common
from runs import refused

RED, BLUE = (250, 10, 20), (10, 20, 250)


def picture(seed=0, size=(12, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def plain(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def write(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [path.name, md5(content).hexdigest()]


def classes(root, *names, count=5):
    for i, name in enumerate(names):
        for j in range(count):
            write(root / name / f"{j}.png", picture(100 * i + j))
    return root


def load(root, name="folder", size=16, **options):
    return common.load_data(name, str(root), size, "none", **options)


def colours(images):
    """The images' mean colours, as the evaluation transform gives them."""
    return [(255 * x.mean((1, 2))).round().int().tolist() for x, _, _ in images]


def names(images):
    return [images.name(i) for i in range(len(images))]


# --- layouts


def test_of_class_folders_alone_a_fifth_of_each_class_is_the_test_split(tmp_path, capsys):
    classes(tmp_path, "cat", "dog", count=10)
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog"] and data.test.labels == [0, 0, 1, 1]
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert not set(names(data.train)) & set(names(data.test))
    assert "no test split: a fifth of each class is held out for it, 4 images" in capsys.readouterr().out
    assert names(load(tmp_path).test) == names(data.test)


def test_a_folder_with_val_and_test_ood_is_read(tmp_path):
    splits, names = ("Train", "test", "Validation", "test_ood"), [("guinea_pig", RED), ("owl", BLUE)]
    for split, (name, colour) in itertools.product(splits, names):
        write(tmp_path / split / name / "deeper" / "A.JPG", plain(colour))
        write(tmp_path / split / name / "b.webp", plain(colour), lossless=True)
    data = load(tmp_path)
    assert data.class_names == ["guinea pig", "owl"]
    for split in (data.train, data.test, data.val, data.test_ood):
        assert split.labels == [0, 0, 1, 1] and np.allclose(colours(split), [RED, RED, BLUE, BLUE], atol=4)
    assert data.val.name(0).startswith(str(tmp_path / "Validation"))


TWO = ["train/cat", "train/dog"]
FAULTS = [  # class folders, other files, words of the error
    (["test/cat", "test/dog"], {}, "/train is missing; .*/train/CLASS"),
    (["cat"], {}, "has 1 classes; a classifier needs two"),
    ([*TWO, "val/cat", "val/owl"], {}, "val of .* has a class 'owl' that train does not"),
    (["cat", "dog"], {"owl/IMG_1.heic": b""}, "owl has no images, only 1 other files"),
    (["0", "1"], {"classes.txt": "0,cat".encode("utf-16")}, "cannot read .*classes.txt.*UTF-8"),
    (["0", "1"], {"classes.txt": b"cat\ndog"}, "classes.txt, line 1: 'cat' must be FOLDER,NAME"),
    (["0", "1"], {"classes.txt": b"0,cat\n1 001.Owl\n"}, "line 2: '1 001.Owl' must be FOLDER,NAME"),
    (["0", "1"], {"classes.txt": b"0,cat\n\nCat,lynx\n"}, "line 3: 'Cat,lynx' must be"),
    (["0", "1"], {"classes.txt": b"0: cat\n"}, "line 1: '0: cat' must be"),
    (["0", "1"], {"classes.txt": b"0,\n"}, "line 1: '0,' must be"),
    (["0", "1"], {"classes.txt": b",cat\n"}, "line 1: ',cat' must be"),
]


@pytest.mark.parametrize("folders, others, words", FAULTS)
def test_a_fault_of_a_folder_is_named(tmp_path, folders, others, words):
    classes(tmp_path, *folders)
    for name, content in others.items():
        dump(tmp_path / name, content)
    with refused(words):
        load(tmp_path)


def test_many_classes_of_one_image(tmp_path):
    for split, i in itertools.product(("train", "test"), range(300)):
        write(tmp_path / split / f"word{i:03d}" / "a.png", picture(i, (4, 4)))
    data = load(tmp_path, examples_per_class=1)
    assert data.train.labels == data.test.labels == list(range(300))
    with refused("has a split without images"):
        load(tmp_path / "train")


def test_imagenets_synsets_have_names_and_val_is_the_test_split(tmp_path):
    for split in ("train", "val"):
        classes(tmp_path / split, "n01440764", "n02012849", "n02963159", count=2)
    data = load(tmp_path, "imagenet")
    assert data.folders[0] == "n01440764" and data.class_names == ["tench", "crane", "cardigan"]
    assert len(data.train) == len(data.test) == 6 and "val" in data.test.name(0) and data.val is None


def test_a_class_that_is_too_small_is_named(tmp_path):
    classes(classes(tmp_path / "a", "cat", count=2), "dog", count=40)
    with refused("has 1 training images of 'cat', 5 are needed"):
        load(tmp_path / "a", examples_per_class=5)


@pytest.mark.parametrize("seed", range(4))
def test_images_are_drawn_and_split_class_by_class(seed):
    labels = (np.random.default_rng(seed).integers(0, 9, 200) ** 2).tolist()  # some classes do not occur
    rng = np.random.default_rng(seed)
    expected = [rng.permutation(np.flatnonzero(np.asarray(labels) == c)) for c in np.unique(labels)]
    assert common.draw_per_class(labels, lambda n: 3, seed).tolist() == [i for c in expected for i in c[:3]]
    others, held = common.split_per_class(labels, 0.25, seed)
    assert held.tolist() == sorted(i for c in expected for i in c[: round(0.25 * len(c))])
    assert sorted([*others, *held]) == [*range(200)]


def test_a_rare_class_is_on_both_sides_of_a_split():
    labels = np.repeat(range(4), [30, 4, 2, 1])
    others, held = (np.bincount(labels[part], minlength=4) for part in common.split_per_class(labels, 0.1, 0))
    assert held.tolist() == [3, 1, 1, 0] and others.tolist() == [27, 3, 1, 1]


# --- class names


READ_AS = """001.Black_footed_Albatross: Black footed Albatross; n02085620-Dog: Dog; n01440764: tench
n99999999: n99999999; Apple___Black_rot: Apple Black rot; AnnualCrop: annual crop; 0_healthy: healthy
guinea pig: guinea pig; 747-100: 747-100; 3D_printer: 3D printer; 猫: 猫; 7-Eleven: 7-Eleven"""


def test_class_names_read_as_english():
    for folder, name in (pair.split(": ") for pair in re.split("; |\n", READ_AS)):
        assert common.english(folder) == name


@pytest.mark.parametrize("odd", ["0 kid", "747-100 cat", "Owl cat owl", "1.cat 02_cat", "cat dog 大"])
def test_names_that_say_little_in_a_prompt_or_read_alike_warn(capsys, odd):
    names = common.name_classes(odd.split(), None)
    count = {"0": 1, "7": 1, "O": 2, "1": 2, "c": 0}[odd[0]]
    said = f"warning: {count} class names are unclear or alike, such as '{names[0]}'; see --class_names\n"
    assert capsys.readouterr().out == (said if count else "")


@pytest.mark.parametrize("text", ["1,guide dog\n0,tabby cat\n", "\ufeff0 , tabby cat\r\n\r\n1, guide dog"])
@pytest.mark.parametrize("given", [True, False])
def test_a_file_names_the_classes_by_their_folders(tmp_path, capsys, text, given):
    classes(tmp_path / "data", "0", "1", "owl")
    file = tmp_path / ("names.csv" if given else "data/classes.txt")
    file.write_bytes(text.encode())
    data = load(tmp_path / "data", class_names=str(file) if given else "")
    assert data.class_names == ["tabby cat", "guide dog", "owl"] and data.folders == ["0", "1", "owl"]
    assert "warning" not in capsys.readouterr().out
    with refused("cannot read .*missing.txt.*UTF-8"):
        load(tmp_path / "data", class_names=str(tmp_path / "missing.txt"))


def test_accented_names_are_one_class_in_either_unicode_form(tmp_path):
    for split, form in (("train", "NFD"), ("test", "NFC")):
        classes(tmp_path / split, *(unicodedata.normalize(form, name) for name in ("café", "naïve")))
    for form in ("NFD", "NFC"):
        (tmp_path / "classes.txt").write_text(unicodedata.normalize(form, "café,Café"), encoding="utf-8")
        data = load(tmp_path)
        assert data.class_names == ["Café", "naïve"] and data.test.labels == data.train.labels


def test_strays_are_passed_over(tmp_path):
    train = classes(tmp_path / "train", "cat", "dog.jpg")
    classes(tmp_path / "test", "cat", "dog.jpg")
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        write(train / folder / "0.png")
        write(train / "cat" / folder / "0.png")
    write(tmp_path / "__MACOSX" / "train" / "cat" / "._0.png")
    (train / "cat" / "._0.png").write_bytes(b"no image")
    for name in (".DS_Store", "Thumbs.db", "IMG_1.HEIC", "notes.txt", "more.txt"):
        (train / "cat" / name).touch()
    write(train / "loose.png")
    write(train / "cat" / "folder.png" / "deeper" / "IMG.JPG", format="JPEG")
    write(train / "cat" / "still.GIF", format="GIF")
    (train / "kitty").symlink_to(classes(tmp_path / "elsewhere", "more", count=2) / "more")
    classes(tmp_path / "test", "kitty")
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog.jpg", "kitty"]
    assert np.bincount(data.train.labels).tolist() == [5 + 2, 5, 2]
    assert names(data.train)[5].endswith("IMG.JPG")


# --- images in memory, and damaged ones


def test_images_are_decoded_once_unless_they_take_more_than_2_gib(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    classes(tmp_path / "test", "cat", "dog")
    data, files = load(tmp_path), sorted((tmp_path / "train").rglob("*.png"))
    assert names(data.train) == [*map(str, files)]
    shutil.rmtree(tmp_path)
    assert len([*data.train]) == len(files) and names(data.train.subset([3])) == [str(files[3])]
    large = common.Images([write(tmp_path / "a.jpg", picture(0, (300, 300)))] * 9000, [0] * 9000)
    assert large.decoded() is large and isinstance(large.subset([0]).decoded().sources[0], Image.Image)


def test_a_large_photograph_is_decoded_at_half_its_size_or_less_but_not_below_1024_pixels(tmp_path):
    for sides, decoded in (((2400, 2100), (1200, 1050)), ((2400, 1600), (2400, 1600)), ((90, 60), (90, 60))):
        path = write(tmp_path / "a.jpg", picture(0, sides[::-1]))
        assert common.open_image(path).size == decoded


def damage(root, *names):
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:60])


def test_bad_images_are_left_out_before_the_draw(tmp_path, capsys):
    for split in ("train", "test"):
        damage(classes(tmp_path / split, "cat", "dog", count=8), "cat/1.png", "dog/3.png")
    data = load(tmp_path, skip_bad_images=True, examples_per_class=7)
    assert data.train.labels == data.test.labels == [0] * 7 + [1] * 7
    assert str(tmp_path / "train" / "cat" / "1.png") not in names(data.train) and [*data.train]
    assert "left out 4 of 32 images" in capsys.readouterr().out
    damage(tmp_path, *(f"train/cat/{i}.png" for i in range(8)), *(f"train/dog/{i}.png" for i in range(7)))
    with pytest.raises(common.UserError) as error:
        load(tmp_path)
    assert str(error.value).count("cannot read the image") == 10 and "17 of 32 images" in str(error.value)
    with refused("0 training images of 'cat', 1 are needed"):
        load(tmp_path, skip_bad_images=True)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff", "bmp"])
def test_an_empty_or_truncated_file_is_named(tmp_path, suffix):
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"bad.{suffix}"
    picture(0, (9, 13)).save(whole)
    data = whole.read_bytes()
    for length in {0, 1, 4, 9, 20, len(data) // 4, len(data) // 2}:
        path.write_bytes(data[:length])
        with pytest.raises(common.UserError) as error:
            common.open_image(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- pixels


def opened(path, image, **options):
    image = common.open_image(write(path, image, **options))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_unusual_images_open_upright_in_rgb(tmp_path):
    red = opened(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)))
    assert abs(red - (255, 0, 0)).max() < 10
    frames = [plain(c, (8, 8)) for c in (RED, BLUE)]
    assert (opened(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:]) == RED).all()
    exif, photo = Image.Exif(), plain(RED, (16, 8))
    exif[0x0112] = 6  # to be turned clockwise: the left side comes up
    photo.paste(BLUE, (0, 0, 8, 8))
    turned = opened(tmp_path / "turned.jpg", photo, exif=exif)
    assert turned.shape == (16, 8, 3) and abs(turned[2, 4] - BLUE).max() < 10 > abs(turned[-2, 4] - RED).max()


INK = {"RGBA": ((0, 0, 0, 0), (0, 0, 0, 255)), "LA": ((0, 0), (0, 255))}  # what is transparent, and black
INK |= {"P": (0, 1), "L": (7, 0), "RGB": ((7, 7, 7), (0, 0, 0))}  # one colour counts as transparent


@pytest.mark.parametrize("mode, suffix", [*((mode, "png") for mode in INK), ("LA", "webp")])
def test_transparency_is_white_below_the_ink(tmp_path, mode, suffix):
    (clear, black), expected = INK[mode], np.full((8, 8, 3), 255)
    image = Image.new(mode, (8, 8), clear)
    image.paste(black, (2, 2, 6, 6))
    expected[2:6, 2:6] = 0
    if mode == "P":
        image.putpalette([90, 90, 90, 0, 0, 0])
    options = dict(lossless=True) if mode in ("RGBA", "LA") else dict(transparency=clear)
    assert (opened(tmp_path / f"a.{suffix}", image, **options) == expected).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(opened(tmp_path / "half.png", half) - 127).max() <= 1


DEEP = {("uint16", "png"): (65535, 4095, 255), ("uint16", "tiff"): (1023,), (">u2", "tiff"): (65535,)}
DEEP |= {("int32", "tiff"): (2**31 - 1, 65535), ("float32", "tiff"): (1, 255)}  # what is white


@pytest.mark.parametrize("kind, suffix", DEEP)
def test_values_of_more_than_8_bits_are_scaled_by_the_bits_that_they_use(tmp_path, kind, suffix):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    for white in DEEP[kind, suffix]:
        values = (ramp * white).round() if "float" not in kind else ramp * white
        pixels = opened(tmp_path / f"a.{suffix}", Image.fromarray(values.astype(kind)))
        assert abs(pixels - 255 * ramp[..., None]).max() <= 1
    if "float" in kind:
        values.flat[5] = np.nan
        assert opened(tmp_path / "b.tiff", Image.fromarray(values.astype(kind)))[0, 5].tolist() == [0, 0, 0]
        pixels = opened(tmp_path / "c.tiff", Image.fromarray((1.3 * ramp).astype(kind)))  # over-exposed
        assert abs(pixels - 255 * (1.3 * ramp[..., None]).clip(max=1)).max() <= 1


@pytest.mark.parametrize("seed", range(8))
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, seed):
    exif, rng = Image.Exif(), np.random.default_rng(seed)
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2020:01:01 00:00:00"}
    whole = write(tmp_path / "whole.jpg", picture(1, (16, 24)), exif=exif).read_bytes()
    start = whole.index(b"Exif\0\0") + 6
    length = struct.unpack(">H", whole[4:6])[0] - 8 if whole[2:4] == b"\xff\xe1" else 60
    spoilt = bytearray(whole)
    for place in start + rng.integers(0, length, 30):
        spoilt[place] = rng.integers(256)
    (tmp_path / "a.jpg").write_bytes(spoilt)
    assert set(common.open_image(tmp_path / "a.jpg").size) == {16, 24}


def test_a_photograph_is_squeezed_whole_or_cropped():
    photo = plain(RED, (80, 40))
    photo.paste(BLUE, (0, 0, 20, 40))  # the left quarter, which a crop loses
    whole, crop = (common.make_transforms(16, "none", how)[1](photo) for how in ("squeeze", "crop"))
    assert whole.shape == crop.shape == (3, 16, 16)
    assert whole[2, :, :3].min() > 0.9 and whole[0, :, 5:].min() > 0.9 and crop[0].min() > 0.8

    def blue(view):
        return (view[2] > view[0]).float().mean().item()

    for kind, share in (("squeezed", 0.23), ("zoomed", 0.11)):  # DIAGen's see the whole one at evaluation
        train, evaluated = common.make_transforms(16, kind)
        assert np.mean([blue(train(photo)) for _ in range(30)]) == pytest.approx(share, abs=0.04)
        assert blue(evaluated(photo)) == 0.25


@pytest.mark.parametrize("augment", ["digits", "crop", "resized", "squeezed", "zoomed", "none"])
def test_randaugment_comes_on_top_of_an_augmentation(augment, monkeypatch):
    def views(name):
        train, evaluated = common.make_transforms(16, name)
        images = common.Images([picture(0, (24, 24))], [0], train)
        return torch.stack([images[0, seed][0] for seed in range(20)]), evaluated(picture(0, (24, 24)))

    plain, more = views(augment), views(f"{augment}+randaugment")
    assert torch.equal(plain[1], more[1])  # in training only
    assert more[0].shape == (20, 3, 16, 16) and more[0].min() >= 0 and more[0].max() <= 1
    assert not torch.equal(plain[0], more[0]) and len(more[0].unique(dim=0)) > 10
    monkeypatch.setattr(torchvision.transforms.v2.RandAugment, "forward", lambda self, image: image)
    assert torch.equal(views(f"{augment}+randaugment")[0], plain[0])
    with refused(f"unknown --augment '{augment}x'; choose one of: digits, "):
        common.make_transforms(16, f"{augment}x")


# --- the hub's data sets


FEATURES = {"image": datasets.Image()}
FEATURES |= {"label": datasets.ClassLabel(names=["Black_cat", "n02085620-dog", "none"])}


def hub_data(counts=(5, 5), features=FEATURES, label=lambda y: y):
    labels = [y for y, n in enumerate(counts) for _ in range(n)]
    rows = {"image": [picture(i) for i in range(len(labels))], "label": [label(y) for y in labels]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def saved(root, **splits):
    datasets.DatasetDict(splits).save_to_disk(root)
    return root


@pytest.mark.parametrize("form", ["saved", "saved dict", "hub"])
def test_data_sets_of_the_hub_are_read(tmp_path, form, monkeypatch):
    both, folder = {"train": hub_data(), "test": hub_data((2, 2))}, tmp_path / "d"
    if form == "saved":
        hub_data().save_to_disk(folder)
    elif form == "saved dict":
        saved(folder, **both)
    else:
        monkeypatch.setattr(datasets, "load_dataset", {"me/d": both}.__getitem__)
        folder = "me/d"
    data = load(folder, "hf")
    assert data.class_names == ["Black cat", "dog"]  # no image is of the third class
    assert (len(data.train), len(data.test)) == ((8, 2) if form == "saved" else (10, 4))
    assert data.train[0][0].shape == (3, 16, 16) and data.train.name(3).startswith("#")
    if form != "saved":
        assert all(np.array_equal(common.open_image(s), picture(i)) for i, s in enumerate(data.train.sources))


def test_splits_are_found_by_name_and_those_without_labels_are_none(tmp_path):
    data = {"train": hub_data(), "validation": hub_data((3, 3))}
    for i, test in enumerate(({}, {"test": hub_data((2, 2), label=lambda y: -1)})):
        read = load(saved(tmp_path / str(i), **data, **test), "hf")
        assert (len(read.train), len(read.test), read.val) == (10, 6, None)
    read = load(saved(tmp_path / "all", **data, test=hub_data((2, 2))), "hf")
    assert (len(read.test), len(read.val)) == (4, 6)


def test_labels_of_other_types_are_read_from_a_column_that_is_named(tmp_path):
    types = {"int64": [3, 2], "string": ["b", "a"], "bool": [True, False]}
    for kind, labels in types.items():
        data = hub_data(features=FEATURES | {"label": datasets.Value(kind)}, label=labels.__getitem__)
        read = load(saved(tmp_path / kind, train=data, test=data), "hf", label_column="label")
        assert read.class_names == sorted(map(str, labels)) and read.train.labels == [1] * 5 + [0] * 5


def test_columns_that_are_unclear_are_listed(tmp_path):
    data = hub_data().rename_column("label", "fine").add_column("coarse", [0, 1] * 5)
    two = data.cast_column("coarse", datasets.ClassLabel(names=["old", "new"]))
    saved(tmp_path / "two", train=two, test=two)
    saved(tmp_path / "none", train=data.select_columns(["image"]))
    for name, column in (("two", ""), ("none", ""), ("two", "shape"), ("two", "image")):
        with refused("no image or label in image.*: see --label_column"):
            load(tmp_path / name, "hf", label_column=column)
    assert load(tmp_path / "two", "hf", label_column="coarse").class_names == ["old", "new"]
    saved(tmp_path / "half", train=two, test=data.remove_columns("coarse"))  # a test split without labels
    assert len(load(tmp_path / "half", "hf", label_column="coarse").test) == 2


def test_class_folders_are_no_data_set_of_the_hub(tmp_path, monkeypatch):
    """`datasets` would take the images of a class `train` in test/ for training."""
    for split in ("train", "test"):
        classes(tmp_path / "d" / split, "bus", "train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with refused("--dataset folder"):
        load(tmp_path / "d", "hf")
    for name in ("nobody/nothing", "nobody/nothing/config", str(tmp_path / "none")):
        with refused(f"'{name}' is "):
            load(name, "hf")


# --- COCO's, and torchvision's


def test_a_coco_label_is_the_largest_objects_category(tmp_path):
    categories = [{"id": 90, "name": "toothbrush"}, {"id": 7, "name": "train"}, {"id": 3, "name": "car"}]
    for year in ("train2017", "val2017"):
        images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (5, 2, 9)]
        boxes = [(5, 7, 10.5), (5, 90, 20.0), (5, 7, 15.0), (2, 7, 1.0)]  # image, category, area; 9: empty
        annotations = [{"image_id": i, "category_id": c, "area": a} for i, c, a in boxes]
        content = {"images": images, "annotations": annotations, "categories": categories}
        for i, colour in {5: RED, 2: BLUE}.items():
            write(tmp_path / year / f"{i:012d}.jpg", plain(colour))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{year}.json").write_text(json.dumps(content))
    data = load(tmp_path, "coco")
    assert data.class_names == ["train", "toothbrush"]  # by id; no image is mainly a car
    labelled = dict(zip(data.test.labels, colours(data.test), strict=True))
    assert np.allclose(labelled[1], RED, atol=4) and np.allclose(labelled[0], BLUE, atol=4)
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content)[:-9])  # cut short
    with refused("cannot read .*instances_val2017.json: .*; give a whole text file"):
        load(tmp_path, "coco")


@pytest.mark.parametrize("kind, n", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_archives_are_read(tmp_path, monkeypatch, kind, n):
    cifar = getattr(torchvision.datasets, kind)
    names, folder = ["aquarium_fish", *(f"thing{i}" for i in range(1, n))], tmp_path / cifar.base_folder

    def batch(name):  # rows of 1,024 red, 1,024 green, 1,024 blue values; the label is the red value
        rows, y = np.repeat(np.array([[c, 200, 7] for c in range(n)], np.uint8), 1024, 1), list(range(n))
        labels = {"fine_labels": y, "coarse_labels": [0] * n} if n == 100 else {"labels": y}
        return dump(folder / name, pickle.dumps({"data": rows, "filenames": [""] * n, **labels}, protocol=2))

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, attribute, [batch(name) for name, _ in getattr(cifar, attribute)])
    meta = dump(folder / cifar.meta["filename"], pickle.dumps({cifar.meta["key"]: names}, protocol=2))
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": meta[1]})
    data = load(tmp_path, kind.lower(), size=32)
    assert data.class_names == ["aquarium fish", *names[1:]]
    assert (len(data.train), len(data.test)) == (n if n == 100 else 5 * n, n)
    assert colours(data.test) == [[y, 200, 7] for y in data.test.labels]


def test_stl10s_binary_files_are_read_with_the_unlabelled_part_if_asked_for(tmp_path, monkeypatch):
    stl10, names = torchvision.datasets.STL10, ["airplane", "bird"]
    folder = tmp_path / stl10.base_folder

    def part(name, reds):  # planes of 96 columns, red, green, blue; labels from 1
        pixels = np.repeat(np.array([[red, 200, 7] for red in reds], np.uint8), 96 * 96, 1)
        labels = bytes(red // 10 for red in reds)
        return [dump(folder / f"{name}_X.bin", pixels.tobytes()), dump(folder / f"{name}_y.bin", labels)]

    monkeypatch.setattr(stl10, "test_list", part("test", [20, 10]))
    unlabelled = part("unlabeled", [50, 60, 70, 80])[:1]
    monkeypatch.setattr(stl10, "train_list", part("train", [10, 20, 10]) + unlabelled)
    dump(folder / stl10.class_names_file, "\n".join(names).encode())
    data = load(tmp_path, "stl10", size=32, examples_per_class=1, unlabelled=True)
    assert data.class_names == names and data.train.labels == [0, 1] and data.test.labels == [1, 0]
    assert colours(data.test) == [[20, 200, 7], [10, 200, 7]]
    assert [red for red, _, _ in colours(data.unlabelled)] == [50, 60, 70, 80]
    few = load(tmp_path, "stl10", size=32, examples_per_class=1)  # what the draw has left
    assert len(few.unlabelled) == 1 and few.unlabelled[0][1] == 0


def make_fgvc_aircraft(root):
    data, shown = root / "fgvc-aircraft-2013b" / "data", ["707-320", "707-320", "DC-10", "DC-10"]
    for i in range(6):
        write(data / "images" / f"{i}.jpg")
    (data / "variants.txt").write_text("707-320\nDC-10\n")
    lines = [f"{i} {name}\n" for i, name in enumerate([*shown, *shown[1:3]])]
    (data / "images_variant_trainval.txt").write_text("".join(lines[:4]))
    (data / "images_variant_test.txt").write_text("".join(lines[4:]))


def make_dtd(root):
    for split, numbers in {"train": (0, 1), "test": (2,)}.items():
        lines = [f"{name}/{i}.jpg\n" for name in ("banded", "dotted") for i in numbers]
        dump(root / "dtd" / "dtd" / "labels" / f"{split}1.txt", "".join(lines).encode())
        for line in lines:
            write(root / "dtd" / "dtd" / "images" / line.strip())


def make_caltech101(root):
    folder = root / "caltech101" / "101_ObjectCategories"
    for name, i in itertools.product(("BACKGROUND_Google", "ant", "crab"), range(1, 4)):
        write(folder / name / f"image_{i:04d}.jpg")
    (root / "caltech101" / "Annotations").mkdir()


MADE = {make_fgvc_aircraft: ["707-320", "DC-10"], make_dtd: ["banded", "dotted"]}
MADE |= {make_caltech101: ["ant", "crab"]}


@pytest.mark.parametrize("make", MADE)
def test_torchvisions_data_sets_are_read(tmp_path, make):
    make(tmp_path)
    data = load(tmp_path, make.__name__.removeprefix("make_"))
    assert data.class_names == MADE[make] and np.bincount(data.train.labels).tolist() == [2, 2]
    assert sorted(data.test.labels) == [0, 1] and data.train[3][0].shape == (3, 16, 16)


def test_a_data_set_that_is_not_there_is_named(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.dtd, "download_and_extract_archive", offline)
    with refused(f"dtd is not in {tmp_path} and cannot be .* .no network"):
        load(tmp_path, "dtd")
