"""Fixtures of several test files: the embedded generator, the digits world, small data sets, quick runs."""

import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Two tests run side by side, so each, and each process that it starts, has one thread. A process with more
# threads could not be forked, either.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("runs")

import common  # noqa: E402
from digits import world  # noqa: E402


@pytest.fixture(scope="session")
def pipe():
    """The embedded Stable Diffusion that knows its digits, frozen, fp32 on the CPU, DDPM sampling."""
    return common.load_pipeline(common.DIGITS_CLEAN)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def few_digits():
    """The splits of the digits world with 100 images of each split but train."""
    render = world.render_pool

    def render_few(digits, count, seed, *options):
        return render(digits, count if seed == 100 else 100, seed, *options)  # seed 100 is train's

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "render_pool", render_few)
        return world.splits.__wrapped__()


@pytest.fixture(scope="module")
def quick(few_digits):
    """For runs in this process: few digits to evaluate on; the embedded generator is loaded once."""
    load = common.load_pipeline
    pipe = load(common.DIGITS_SD)

    def load_once(name, *arguments, **options):
        return load(name, *arguments, **options) if name != common.DIGITS_SD else pipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "splits", lambda *_: few_digits)
        patch.setattr(common, "load_pipeline", load_once)
        yield


@pytest.fixture
def mine(tmp_path):
    """A folder of images of odd sizes and modes, with a space and an apostrophe in the class names."""
    rng, kinds = np.random.default_rng(0), [(40, 30, "L"), (17, 80, "RGB"), (5, 5, "P"), (33, 32, "CMYK")]
    for split, name in itertools.product(("train", "test"), ("guinea pig", "baker's_yeast")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for width, height, mode in [*kinds, (200, 64, "L")]:
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
            image.save(tmp_path / "data" / split / name / f"{width}.{'jpg' if mode == 'CMYK' else 'png'}")
    return {"data_dir": tmp_path / "data", "out": tmp_path / "run"}
