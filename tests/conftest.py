"""Fixtures: the embedded generator, loaded once, and small data sets in the real file formats."""

import sys
from pathlib import Path

import pytest
import torch

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
