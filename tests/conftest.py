"""Fixtures: the embedded generator, loaded once, small data sets in the real file formats, runs in-process.

A module that runs a script names it in SCRIPT, and the arguments of a run on a folder of images in FOLDER.
"""

import gc
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
def in_this_process(request, monkeypatch, capsys):
    """Runs a command line without paying for imports again: (status, stdout, stderr)."""
    script = request.module.SCRIPT

    def run(*words):
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *words])
        monkeypatch.setitem(sys.modules, "__main__", script)
        try:
            status = common.cli(script.main, script.Args) or 0
        except SystemExit as stop:
            status = stop.code
        gc.collect()  # a run folder stays locked while an exception's frames live
        return status, *capsys.readouterr()

    return run


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
def digit_folder(tmp_path):
    """20 training and 20 test images of each digit, as a folder data set."""
    for split, seed in (("train", 1), ("test", 2)):
        world = common.render_pool(common.digit_pools()[split], 1000, seed)
        for c, name in enumerate(common.DIGIT_NAMES):
            (tmp_path / "digits" / split / name).mkdir(parents=True)
            for i, image in enumerate(world["images"][world["labels"] == c][:20].numpy()):
                Image.fromarray(image).save(tmp_path / "digits" / split / name / f"{i:02d}.png")
    return tmp_path / "digits"
