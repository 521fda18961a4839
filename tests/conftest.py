"""Fixtures: the embedded generator, loaded once, small data sets in the real file formats.

A module that runs a script has in FOLDER the arguments of a run on a folder of images.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("runs")

import runs  # noqa: E402

import common  # noqa: E402


@pytest.fixture(scope="session")
def pipe():
    """digits_sd, frozen, fp32 on the CPU, DDPM sampling."""
    return common.load_pipeline(str(ROOT / "digits_sd"))


@pytest.fixture(scope="session")
def digits():
    """The digits world, 20 training images per class."""
    return common.load_data("digits", "", 32, "digits", per_class=20)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def quick(pipe):
    """In this process: 100 digits to evaluate on, and digits_sd loaded once."""
    few = {k: v if k == "train" else (v[0][:100], v[1][:100]) for k, v in common._digit_splits().items()}
    digits_sd, load = str(ROOT / "digits_sd"), common.load_pipeline
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "_digit_splits", lambda: few)
        patch.setattr(common, "load_pipeline", lambda name, *a: pipe if name == digits_sd else load(name, *a))
        yield


@pytest.fixture
def mine(request, tmp_path):
    """Arguments of a run on one's own images: odd sizes and modes, a space and an apostrophe in the names."""
    rng, kinds = np.random.default_rng(0), [(40, 30, "L"), (17, 80, "RGB"), (5, 5, "P"), (33, 32, "CMYK")]
    for split, name in itertools.product(("train", "test"), ("guinea pig", "baker's_yeast")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for width, height, mode in [*kinds, (200, 64, "L")]:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
            image.save(tmp_path / "data" / split / name / f"{width}.{'jpg' if mode == 'CMYK' else 'png'}")
    return request.module.FOLDER | {"data_dir": tmp_path / "data", "out": tmp_path / "run"}


@pytest.fixture
def striped(request, tmp_path):
    """Arguments of a run on 48 training and 60 test images of stripes; see runs.stripes."""
    for split, count in (("train", 48), ("test", 60)):
        for i, (image, y) in enumerate(zip(*runs.stripes(count, len(split)), strict=True)):
            folder = tmp_path / "stripes" / split / common.DIGIT_NAMES[y]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return request.module.FOLDER | {"data_dir": tmp_path / "stripes", "image_size": 16, "augment": "none"}
