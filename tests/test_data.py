"""Data sets as people have them: folders, class names, strays, damaged files, unusual pixels, the hub."""

import os
import shutil
import struct

import datasets
import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

import actgen
import common
import diagen
import dreamda
from runs import in_this_process, the_error

RED, BLUE = (250, 10, 20), (10, 20, 250)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """An empty place for what is remembered of images."""
    monkeypatch.setattr(common, "CACHE", tmp_path_factory.mktemp("cache"))
    return common.CACHE


def picture(seed=0, size=(12, 12)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def write(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def classes(root, *names, count=5):
    for i, name in enumerate(names):
        for j in range(count):
            write(root / name / f"{j}.png", picture(100 * i + j))
    return root


def load(root, name="folder", size=16, **options):
    return common.load_data(name, str(root), size, "none", **options)


def files(images):
    return sorted(source.name for source in images.sources)


# ----------------------------------------------------------------------------------------------------------
# Layouts


def test_of_class_folders_alone_a_fifth_of_each_class_is_the_test_split(tmp_path, capsys):
    classes(classes(tmp_path, "cat", "dog", count=10), "train", count=5)  # a class that is called train
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog", "train"]
    assert np.bincount(data.train.labels).tolist() == [8, 8, 4] and data.test.labels == [0, 0, 1, 1, 2]
    assert not set(data.train.sources) & set(data.test.sources)
    assert "no test split: a fifth of each class is held out for it, 5 images" in capsys.readouterr().out
    assert load(tmp_path).test.sources == data.test.sources


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_names_of_the_validation_split(tmp_path, name):
    for split in ("Train", name):
        classes(tmp_path / split, "cat", "dog")
    data = load(tmp_path)
    assert data.val.labels == [0] * 5 + [1] * 5 and data.val.name(0).startswith(str(tmp_path / name))
    assert len(data.train) == 8 and len(data.test) == 2  # from train


@pytest.mark.parametrize(
    "made, words",
    [
        (["test/cat", "test/dog"], "/train is missing; .*/train/CLASS"),
        (["train/cat", "val/cat", "valid/cat"], "two folders for val, one is valid"),
        (["cat"], "one class only, 'cat'; a classifier needs two"),
        (["train/cat", "train/dog", "val/cat", "val/owl"], "/val has a class 'owl' that .*/train does not"),
    ],
)
def test_a_layout_that_is_none_is_named(tmp_path, made, words):
    with pytest.raises(common.UserError, match=words):
        load(classes(tmp_path, *made))


def test_many_classes_of_one_image(tmp_path, capsys):
    for split in ("train", "test"):
        for i in range(300):
            write(tmp_path / split / f"word{i:03d}" / "a.png", picture(i, (4, 4)))
    data = load(tmp_path, per_class=1)
    assert data.train.labels == data.test.labels == list(range(300))
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(common.UserError, match="no test split, and too few images"):
        load(tmp_path)


def test_imagenet_without_the_devkit(tmp_path):
    synsets = ["n01440764", "n02012849", "n03126707", "n02113186", "n02963159", "n03710637", "n03710721"]
    for split in ("train", "val"):
        classes(tmp_path / split, *synsets, count=2)
    write(tmp_path / "test" / "ILSVRC2012_test_00000001.png")  # has no labels
    data = load(tmp_path, "imagenet")
    names = "tench, Cardigan Welsh corgi, cardigan, crane bird, crane, maillot, tank suit".split(", ")
    assert dict(zip(sorted(synsets), data.class_names, strict=True)) == dict(
        zip(sorted(synsets), [names[0], names[3], names[1], names[2], names[4], *names[5:]], strict=True)
    )
    assert len(data.train) == len(data.test) == 14 and "val" in data.test.name(0) and data.val is None


def test_imagenet_with_the_devkit_has_the_same_names(tmp_path):
    import torch

    synsets = {"n02012849": ("crane",), "n03126707": ("crane",), "n01440764": ("tench", "Tinca tinca")}
    torch.save((synsets, ["n01440764"]), tmp_path / "meta.bin")
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").touch()
    for split in ("train", "val"):
        classes(tmp_path / split, *synsets, count=2)
    assert load(tmp_path, "imagenet").class_names == ["tench", "crane bird", "crane"]


def test_unequal_classes_are_named(tmp_path, capsys):
    classes(classes(tmp_path, "cat", count=2), "dog", count=40)
    classes(tmp_path / "few", "cat", "dog")
    load(tmp_path / "few")
    assert "unequal classes" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "few")
    load(tmp_path)
    assert "unequal classes: 2 training images of 'cat', 32 of 'dog'" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Class names


@pytest.mark.parametrize(
    "folder, name",
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("n02085620_chihuahua", "chihuahua"),
        ("n01440764", "tench"),
        ("n04554684", "washer"),
        ("Apple___Black_rot", "apple black rot"),
        ("AnnualCrop", "annual crop"),
        ("0_healthy", "healthy"),
        ("guinea pig", "guinea pig"),
        ("7-Eleven", "7-Eleven"),
        ("747-100", "747-100"),
        ("2_door_car", "2 door car"),
        ("猫", "猫"),
    ],
)
def test_class_names_read_as_english(folder, name):
    assert common.english(folder) == name


def test_numbers_before_all_names_are_left_out(capsys):
    assert common.name_classes(["1_cat", "2-dog", "10 owl"], None, "{}") == ["cat", "dog", "owl"]
    assert common.name_classes(["1_cat", "ox"], None, "{}") == ["1 cat", "ox"]
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "folder, name", [("class_0", "class 0"), ("0", "0"), ("c7", "c7"), ("n99999999",) * 2]
)
def test_a_name_that_is_a_number_warns_with_its_prompt(capsys, folder, name):
    assert common.name_classes([folder, "kid"], None, "a {} here") == [name, "kid"]
    (line,) = capsys.readouterr().out.splitlines()
    assert f"the prompt of class '{folder}' will read \"a {name} here\", a number or an id" in line
    assert "--class_names FILE" in line


def test_names_that_read_alike_warn(capsys):
    assert common.name_classes(["Owl", "owl", "cat"], None, "{}") == ["Owl", "owl", "cat"]
    assert "class 'Owl' will read \"Owl\", another class's, too (2 of 3 classes)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "0,tabby cat\n1,guide dog\n",
        "\ufeff0: tabby cat\r\n\r\n1: guide_dog\r\n",
        "1\tguide dog\n0 tabby cat",
        "tabby_cat\nguide dog\n",
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_file_names_the_classes(tmp_path, capsys, text, given):
    classes(tmp_path / "data", "0", "1")
    file = tmp_path / ("names.csv" if given else "data/classes.txt")
    file.write_bytes(text.encode())
    data = load(tmp_path / "data", class_names=str(file) if given else "")
    assert data.class_names == ["tabby cat", "guide dog"] and "warning" not in capsys.readouterr().out


def test_some_names_may_be_given(tmp_path):
    classes(tmp_path, "guinea pig", "n01440764", "owl")
    (tmp_path / "classes.txt").write_text("owl\nguinea pig, cavy\n")
    assert load(tmp_path).class_names == ["cavy", "tench", "owl"]


@pytest.mark.parametrize(
    "text, words", [("9,cat\n", "no class '9,cat'; give lines"), (None, "cannot read .*c.txt")]
)
def test_a_bad_file_of_class_names_is_named(tmp_path, text, words):
    classes(tmp_path, "0", "1")
    if text:
        (tmp_path / "c.txt").write_text(text)
    with pytest.raises(common.UserError, match=words):
        load(tmp_path, class_names=str(tmp_path / "c.txt"))


# ----------------------------------------------------------------------------------------------------------
# Strays


def test_strays_are_skipped_and_counted_in_one_line(tmp_path, capsys):
    train, test = classes(tmp_path / "train", "cat", "dog.jpg"), classes(tmp_path / "test", "cat", "dog.jpg")
    for folder in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        write(train / folder / "0.png")
        write(train / "cat" / folder / "0.png")
    write(tmp_path / "__MACOSX" / "train" / "cat" / "._0.png")
    (train / "cat" / "._0.png").write_bytes(b"no image")
    (train / "cat" / ".DS_Store").touch()
    (train / "cat" / "Thumbs.db").touch()
    (train / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (train / "cat" / "notes.txt").touch()
    (train / "cat" / "features.h5").touch()
    (train / "cat" / "README").touch()
    write(train / "loose.png")
    write(train / "cat" / "folder.png" / "deeper" / "IMG.JPG", format="JPEG")
    (train / "cat" / "up").symlink_to(tmp_path)
    (train / "cat" / "self").symlink_to(train / "cat")
    (train / "cat" / "other").symlink_to(train / "dog.jpg")
    (train / "cat" / "again.png").symlink_to(train / "cat" / "0.png")
    (train / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (train / "cat" / "loop.png").symlink_to(train / "cat" / "loop.png")
    elsewhere = classes(tmp_path / "elsewhere", "more", count=2)
    (train / "cat" / "linked").symlink_to(elsewhere / "more")
    (train / "kitty").symlink_to(train / "cat")
    (tmp_path / "val").symlink_to(test)
    (tmp_path / "annotations").mkdir()
    data = load(tmp_path)
    assert data.class_names == ["cat", "dog.jpg"]
    assert np.bincount(data.train.labels).tolist() == [5 + 1 + 2, 5] and data.val.labels == data.test.labels
    assert {"IMG.JPG", "1.png"} <= set(files(data.train)) and len(data.val) == 10
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped in"))
    for words in (
        "2 folders that are no split",
        "9 hidden",
        "5 links to what was there already",
        "2 broken links",
        "1 files outside of class folders",
        "1 .heic files (convert them to JPEG)",
        "1 .txt files",
        "1 .h5 files",
        "1 nameless files",
    ):
        assert words in line


def test_a_class_of_strays_alone_says_so(tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "IMG_1.heic").touch()
    with pytest.raises(
        common.UserError, match="owl has no images; skipped: 1 .heic files .convert them to JPEG"
    ):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# Damaged and blank images


def damage(root, *names):
    for name in names:
        path = root / name
        path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("script", [actgen, dreamda, diagen])
def test_all_unreadable_images_are_listed_at_once_before_anything_starts(tmp_path, script):
    damage(classes(tmp_path / "data", "cat", "dog"), "cat/1.png", "cat/3.png", "dog/0.png")
    out = in_this_process(
        script, dataset="folder", data_dir=tmp_path / "data", out=tmp_path / "run", workers=0
    )
    line = the_error(out)
    assert "3 of 10 images: " in line and "--skip_bad_images" in line
    assert all(
        f"cannot read the image {tmp_path}/data/{name}: " in line for name in ("cat/1.png", "dog/0.png")
    )
    assert not (tmp_path / "run" / "config.json").exists()


def test_of_many_unreadable_images_ten_are_shown(tmp_path):
    damage(
        classes(tmp_path, "cat", "dog", count=8),
        *(f"cat/{i}.png" for i in range(8)),
        *(f"dog/{i}.png" for i in range(4)),
    )
    with pytest.raises(common.UserError) as error:
        load(tmp_path)
    assert str(error.value).count("cannot read the image") == 10 and "12 of 16 images" in str(error.value)
    assert "; and 2 more" in str(error.value)


def test_bad_images_are_left_out_before_the_draw(tmp_path, capsys):
    for split in ("train", "test"):
        damage(classes(tmp_path / split, "cat", "dog"), "cat/1.png", "dog/3.png")
    data = load(tmp_path, skip_bad_images=True, per_class=4)
    assert data.train.labels == data.test.labels == [0] * 4 + [1] * 4
    assert "1.png" not in files(data.train.subset(range(4))) and [data.train[i] for i in range(8)]
    assert "left out 4 of 20 images" in capsys.readouterr().out
    damage(tmp_path, *(f"train/cat/{i}.png" for i in range(5)))
    with pytest.raises(common.UserError, match="no training images of the class 'cat'"):
        load(tmp_path, skip_bad_images=True)


def test_good_images_are_opened_once_and_changed_ones_again(tmp_path, monkeypatch, cache):
    opened, open_image = [], common.open_image
    monkeypatch.setattr(
        common, "open_image", lambda source: (opened.append(source.name), open_image(source))[1]
    )
    classes(tmp_path, "cat", "dog")
    for expected in (10, 0):
        load(tmp_path, size=80)
        assert len(opened) == expected
        opened.clear()
    write(tmp_path / "cat" / "new.png")
    os.utime(tmp_path / "dog" / "3.png", (1, 1))
    load(tmp_path, size=80)
    assert sorted(opened) == ["3.png", "new.png"]
    damage(tmp_path, "cat/new.png")
    for _ in range(2):
        with pytest.raises(common.UserError, match="1 of 11 images: .*new.png"):
            load(tmp_path, size=80)


def test_without_a_place_to_remember_images_are_still_checked(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "CACHE", tmp_path / "file" / "below")
    assert len(load(classes(tmp_path / "data", "cat", "dog")).train) == 8


def test_blank_images_are_counted(tmp_path, capsys):
    classes(tmp_path, "cat", "dog", count=10)
    write(tmp_path / "cat" / "1.png", Image.new("RGB", (20, 20), "white"))
    dark = np.random.default_rng(0).integers(0, 6, (20, 20), np.uint8)
    write(tmp_path / "cat" / "2.png", Image.fromarray(dark))
    ink = Image.new("L", (300, 300), 255)  # a thin line is a picture
    ink.paste(0, (150, 0, 152, 300))
    write(tmp_path / "dog" / "1.png", ink)
    for _ in range(2):
        load(tmp_path)
        assert "2 images are nearly black or of one colour, such as " in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# Pixels


def opened(path, image, **options):
    image = common.open_image(write(path, image, **options))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB"])
def test_transparency_is_white_below_the_ink(tmp_path, mode):
    ink = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (2, 2, 6, 6))
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = 0
    options, name = {}, "a.png"
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([90, 90, 90, 0, 0, 0])
        image.paste(1, (2, 2, 6, 6))
        options["transparency"] = 0
    elif mode in ("L", "RGB"):  # one colour counts as transparent
        image = Image.new(mode, (8, 8), 7 if mode == "L" else (7, 7, 7))
        image.paste(0 if mode == "L" else (0, 0, 0), (2, 2, 6, 6))
        options["transparency"] = 7 if mode == "L" else (7, 7, 7)
    elif mode == "PA":
        image, name = ink.convert("LA"), "a.webp"
        options["lossless"] = True
    else:
        image = ink.convert(mode)
    assert (opened(tmp_path / name, image, **options) == expected).all()


def test_half_transparent_ink_is_grey(tmp_path):
    assert abs(opened(tmp_path / "a.png", Image.new("RGBA", (4, 4), (0, 0, 0, 128))) - 127).max() <= 1


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


@pytest.mark.parametrize(
    "values, suffix",
    [
        (RAMP.astype(np.float32), "tiff"),
        ((RAMP * 1.04 - 0.02).astype(np.float32), "tiff"),  # resampled
        ((RAMP * 255).astype(np.float32), "tiff"),
        ((RAMP * 2 - 1).astype(np.float32), "tiff"),
        ((RAMP * 65535).round().astype(np.uint16), "png"),
        ((RAMP * 65535).round().astype(np.uint16), "tiff"),
        ((RAMP * 65535).round().astype(">u2"), "tiff"),
        ((RAMP * 4095).round().astype(np.uint16), "png"),
        ((RAMP * 4095).round().astype(np.uint16), "tiff"),
        ((RAMP * 1023).round().astype(np.uint16), "png"),
        ((RAMP * 255).round().astype(np.uint16), "png"),
        ((RAMP * (2**31 - 1)).round().astype(np.int32), "tiff"),
        ((RAMP * 65535).round().astype(np.int32), "tiff"),
        ((RAMP * 4000 - 1000).round().astype(np.int32), "tiff"),  # Hounsfield units
    ],
    ids=lambda value: f"{value.dtype}-{value.max():.0f}" if isinstance(value, np.ndarray) else value,
)
def test_values_of_more_than_8_bits_are_scaled_by_their_range(tmp_path, values, suffix):
    assert abs(opened(tmp_path / f"a.{suffix}", Image.fromarray(values)) - 255 * RAMP[..., None]).max() <= 6


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_values_that_are_no_numbers_are_black(tmp_path, value):
    values = np.full((8, 8), value, np.float32)
    values[0, :2] = np.nan, np.inf
    pixels = opened(tmp_path / "a.tiff", Image.fromarray(values))
    assert (pixels[0, :2] == 0).all() and abs(pixels[1:] - 255 * value).max() <= 1


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


def test_an_orientation_that_cannot_be_read_leaves_the_image_as_it_is(tmp_path, monkeypatch):
    def broken(image):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    Image.new("RGB", (16, 8)).save(tmp_path / "a.bmp")
    assert common.open_image(tmp_path / "a.bmp").size == (16, 8)


# ----------------------------------------------------------------------------------------------------------
# The hub's formats


FEATURES = {
    "image": datasets.Image(),
    "label": datasets.ClassLabel(names=["Black_cat", "n02085620-dog", "none"]),
}


def hub_data(counts=(5, 5), features=FEATURES, label=lambda y: y, **extra):
    labels = [y for y, n in enumerate(counts) for _ in range(n)]
    rows = {"image": [picture(i) for i in range(len(labels))], "label": [label(y) for y in labels]}
    rows |= {name: values for name, (_, values) in extra.items()}
    kinds = features | {name: kind for name, (kind, _) in extra.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def parquet(root, **splits):
    (root / "data").mkdir(parents=True, exist_ok=True)
    for split, data in splits.items():
        data.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("form", ["parquet", "file", "saved", "saved dict", "imagefolder"])
def test_the_hubs_local_formats_are_read(tmp_path, form):
    data, folder = hub_data(), tmp_path / "d"
    if form == "parquet":
        parquet(folder, train=data, test=hub_data((2, 2)))
    elif form == "file":
        data.to_parquet(folder := tmp_path / "d.parquet")
    elif form == "saved":
        data.save_to_disk(folder)
    elif form == "saved dict":
        datasets.DatasetDict({"train": data, "test": hub_data((2, 2))}).save_to_disk(folder)
    else:
        classes(folder / "train", "Black_cat", "n02085620-dog")
        classes(folder / "test", "Black_cat", "n02085620-dog", count=2)
    read = load(folder, "hf")
    assert read.class_names == ["Black cat", "dog"]  # no image is of the third class
    both = form in ("parquet", "saved dict", "imagefolder")
    assert (len(read.train), len(read.test)) == ((10, 4) if both else (8, 2))
    assert read.train[0][0].shape == (3, 16, 16) and read.train.name(3).startswith("#")
    if both and form != "imagefolder":
        for i in range(10):
            assert np.array_equal(common.open_image(read.train.sources[i]), picture(i))


@pytest.mark.parametrize(
    "names, sizes", [(("train", "validation"), (10, 4, None)), (("train", "valid", "test"), (10, 6, 4))]
)
def test_splits_are_found_by_name(tmp_path, names, sizes):
    read = load(
        parquet(tmp_path, **dict(zip(names, [hub_data(), hub_data((2, 2)), hub_data((3, 3))], strict=False))),
        "hf",
    )
    assert (len(read.train), len(read.test), read.val and len(read.val)) == sizes


def test_a_test_split_without_labels_is_none(tmp_path):
    unlabelled = hub_data((2, 2), label=lambda y: -1)
    read = load(parquet(tmp_path, train=hub_data(), validation=hub_data((3, 3)), test=unlabelled), "hf")
    assert len(read.test) == 6 and read.val is None


@pytest.mark.parametrize(
    "kind, label, names",
    [
        ("int64", lambda y: 3 - y, ["2", "3"]),
        ("string", "ba".__getitem__, ["a", "b"]),
        ("bool", bool, ["False", "True"]),
    ],
)
def test_labels_of_other_types(tmp_path, kind, label, names):
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    data = hub_data(features=features, label=label, id=(datasets.Value("int64"), list(range(10))))
    read = load(parquet(tmp_path, train=data, test=data), "hf")
    assert read.class_names == names
    assert read.train.labels == [names.index(str(label(y))) for y in [0] * 5 + [1] * 5]


def test_columns_are_named_where_they_are_unclear(tmp_path):
    kind = datasets.ClassLabel(names=["old", "new"])
    data = (
        hub_data((5, 5, 0))
        .rename_column("label", "fine")
        .add_column("coarse", [0, 1] * 5)
        .cast_column("coarse", kind)
    )
    root = parquet(tmp_path / "two", train=data, test=data)
    with pytest.raises(
        common.UserError, match="could be fine, coarse; choose one, as in --data_dir .*/two#fine"
    ):
        load(root, "hf")
    assert load(f"{root}#coarse", "hf").class_names == ["old", "new"]
    for columns, words in ((["fine"], "no column of images, but fine"), (["image"], "no column of labels")):
        root = parquet(tmp_path / columns[0], train=data.select_columns(columns))
        with pytest.raises(common.UserError, match=words):
            load(root, "hf")
    with pytest.raises(common.UserError, match="no column of labels shape"):
        load(f"{tmp_path}/two#shape", "hf")


def test_images_of_the_hub_follow_the_same_rules(tmp_path, capsys):
    rows = [write(tmp_path / "images" / f"{i}.png", picture(i)).read_bytes() for i in range(20)]
    rows[3] = write(tmp_path / "a.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0))).read_bytes()
    rows[5], rows[7] = rows[5][:60], b""
    features = datasets.Features(FEATURES)
    images = [{"bytes": row, "path": None} for row in rows]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 10}, features=features)
    root = parquet(tmp_path / "d", train=data, test=hub_data())
    with pytest.raises(
        common.UserError, match="2 of 30 images: cannot read the image #5: .*; cannot read the image #7"
    ):
        load(root, "hf")
    read = load(root, "hf", skip_bad_images=True)
    assert len(read.train) == 18 and (np.asarray(common.open_image(read.train.sources[3])) == 255).all()
    assert "1 images are nearly black or of one colour, such as #3" in capsys.readouterr().out


def test_images_of_the_hub_are_opened_once(tmp_path, monkeypatch):
    opened, open_image = [], common.open_image
    monkeypatch.setattr(
        common, "open_image", lambda source: (opened.append(source[1]), open_image(source))[1]
    )
    parquet(tmp_path, train=hub_data(), test=hub_data((2, 2)))
    for expected in (14, 0):
        load(tmp_path, "hf", size=80)
        assert len(opened) == expected
        opened.clear()
    parquet(tmp_path, train=hub_data((6, 6)))
    load(tmp_path, "hf", size=80)
    assert len(opened) >= 12


def test_a_data_set_of_the_hub_that_cannot_be_had_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nobody/nothing/config"):
        with pytest.raises(common.UserError, match=f"cannot load the data set '{name}' .*; give OWNER/NAME"):
            load(name, "hf")
    with pytest.raises(common.UserError, match=f"there is no data set '{tmp_path}/none'; give OWNER/NAME"):
        load(tmp_path / "none", "hf")


# ----------------------------------------------------------------------------------------------------------
# torchvision's


def make_flowers102(root):
    ids = {"trnid": [1, 2, 3, 4], "tstid": [5, 6], "valid": [7, 8]}
    for i in range(1, 9):
        write(root / "flowers-102" / "jpg" / f"image_{i:05d}.jpg", picture(i))
    scipy.io.savemat(root / "flowers-102" / "setid.mat", ids)
    scipy.io.savemat(root / "flowers-102" / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2, 1, 2]})


def make_food101(root):
    meta = root / "food-101" / "meta"
    meta.mkdir(parents=True)
    for split, count in {"train": 2, "test": 1}.items():
        paths = {c: [f"{c}/{split}{i}" for i in range(count)] for c in ("apple_pie", "ramen")}
        (meta / f"{split}.json").write_text(str(paths).replace("'", '"'))
        for path in sum(paths.values(), []):
            write(root / "food-101" / "images" / f"{path}.jpg")


def make_fgvc_aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    for i in range(6):
        write(data / "images" / f"{i}.jpg")
    (data / "variants.txt").write_text("707-320\nDC-10\n")
    (data / "images_variant_trainval.txt").write_text("0 707-320\n1 707-320\n2 DC-10\n3 DC-10\n")
    (data / "images_variant_test.txt").write_text("4 707-320\n5 DC-10\n")


def make_dtd(root):
    for name in ("banded", "dotted"):
        for i in range(3):
            write(root / "dtd" / "dtd" / "images" / name / f"{i}.jpg")
    (root / "dtd" / "dtd" / "labels").mkdir()
    for split, numbers in {"train": (0, 1), "test": (2,)}.items():
        lines = [f"{name}/{i}.jpg\n" for name in ("banded", "dotted") for i in numbers]
        (root / "dtd" / "dtd" / "labels" / f"{split}1.txt").write_text("".join(lines))


def make_sun397(root):
    for name in ("a/abbey", "l/library/indoor"):
        for i in range(3):
            write(root / "SUN397" / name / f"sun_{i}.jpg")
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/l/library/indoor\n")


def make_country211(root):
    for split, count in {"train": 2, "test": 1}.items():
        classes(root / "country211" / split, "AD", "ZW", count=count)


@pytest.mark.parametrize(
    "make, names",
    [
        (make_flowers102, ["pink primrose", "hard-leaved pocket orchid"]),
        (make_food101, ["apple pie", "ramen"]),
        (make_fgvc_aircraft, ["707-320", "DC-10"]),
        (make_dtd, ["banded", "dotted"]),
        (make_sun397, ["abbey", "library/indoor"]),
        (make_country211, ["AD", "ZW"]),
    ],
)
def test_torchvisions_few_shot_standards_are_read(tmp_path, monkeypatch, make, names):
    make(tmp_path)
    if make is make_flowers102:
        flowers = torchvision.datasets.Flowers102
        monkeypatch.setattr(flowers, "_check_integrity", lambda self: True)
        monkeypatch.setattr(flowers, "classes", flowers.classes[:2])
    name = make.__name__.removeprefix("make_")
    data = load(tmp_path, name)
    assert data.class_names == names and np.bincount(data.train.labels).tolist() == [2, 2]
    assert sorted(data.test.labels) == [0, 1] and all(source.exists() for source in data.train.sources)
    for script in (actgen, dreamda, diagen):
        assert {name, "hf"} <= script.RECIPES.keys()


def test_caltech101s_images_are_checked_too(tmp_path):
    for name in ("BACKGROUND_Google", "ant", "crab"):
        for i in range(1, 6):
            write(tmp_path / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg")
    (tmp_path / "caltech101" / "Annotations").mkdir()
    data = load(tmp_path, "caltech101")
    assert data.class_names == ["ant", "crab"] and (len(data.train), len(data.test)) == (8, 2)
    damage(tmp_path / "caltech101" / "101_ObjectCategories" / "crab", "image_0002.jpg")
    with pytest.raises(common.UserError, match="1 of 10 images: .*crab/image_0002.jpg"):
        load(tmp_path, "caltech101")
