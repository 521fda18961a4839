"""What happens on users' machines, to each of the three scripts: kills, disks, odd classes."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import test_actgen_runs
import test_diagen_runs
import test_dreamda_runs
from PIL import Image
from runs import exit_status, in_child, in_this_process, lines_of, result_and_files, start_child, the_error

import actgen
import diagen
import dreamda

pytestmark = pytest.mark.usefixtures("quick")
TESTS = {actgen: test_actgen_runs, dreamda: test_dreamda_runs, diagen: test_diagen_runs}
each_script = pytest.mark.parametrize("script", TESTS, ids=[script.__name__ for script in TESTS])


@each_script
def test_twenty_kills_at_random_moments_change_nothing(script, tmp_path):
    def run(out):
        return lambda: script.main(script.Args(**TESTS[script].DIGITS, out=str(out)))

    clock = time.time()
    assert in_child(run(tmp_path / "whole")) == 0
    seconds, expected = time.time() - clock, result_and_files(tmp_path / "whole")
    rng, kills, out = random.Random(0), 0, tmp_path / "killed"
    while kills < 20:
        pid = start_child(run(out))
        time.sleep(rng.uniform(0, seconds / 3))
        os.kill(pid, signal.SIGKILL)
        if exit_status(pid) == -signal.SIGKILL:
            kills += 1
        else:  # it was done before
            assert result_and_files(out) == expected
            shutil.rmtree(out)
    assert in_child(run(out)) == 0
    assert result_and_files(out) == expected


@each_script
def test_a_second_run_on_the_folder_is_refused_and_the_first_goes_on(script, tmp_path):
    arguments = TESTS[script].DIGITS | {"out": str(tmp_path)}
    pid = start_child(lambda: script.main(script.Args(**arguments)))
    while not (tmp_path / "config.json").exists():
        time.sleep(0.01)
    assert "another process is running" in the_error(in_this_process(script, **arguments))
    assert exit_status(pid) == 0 and (tmp_path / "result.json").exists()


@each_script
def test_a_truncated_checkpoint_is_named(script, tmp_path):
    arguments = TESTS[script].DIGITS | {"out": tmp_path}
    assert in_this_process(script, **arguments)[0] == 0
    (tmp_path / "result.json").unlink()
    for length in (20_000, 300, 0):
        os.truncate(tmp_path / "checkpoint.pt", length)
        error = the_error(in_this_process(script, **arguments))
        assert f"cannot read {tmp_path / 'checkpoint.pt'}" in error and len(error) < 500


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@each_script
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_space(script, tmp_path):
    (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    arguments = TESTS[script].DIGITS | {"out": tmp_path}
    assert "No space left on device; free some space" in the_error(in_this_process(script, **arguments))
    (tmp_path / "checkpoint.pt.tmp").unlink()
    assert in_this_process(script, **arguments)[0] == 0


@pytest.mark.skipif(not Path("/sys").exists(), reason="needs a folder where even root cannot write")
@each_script
def test_a_folder_that_cannot_be_written_is_named(script):
    error = the_error(in_this_process(script, **TESTS[script].DIGITS, out="/sys/run"))
    assert "cannot write (/sys/run): " in error and "give another --out" in error


@each_script
def test_classes_of_any_name_and_one_of_a_single_image_run(script, tmp_path):
    """255 bytes is all that a folder's name can have."""
    rng, names = np.random.default_rng(0), ['naïve "café"', "漢字 😀", "x" * 250 + ".jpg", "it's; $HOME & co"]
    for split, name in ((split, name) for split in ("train", "val", "test") for name in names):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(1 if split == "train" and name == names[1] else 4):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
                tmp_path / "data" / split / name / f"{i}.png"
            )
    arguments = TESTS[script].FOLDER | {"data_dir": tmp_path / "data", "out": tmp_path / "run"}
    if script is diagen:
        arguments["examples_per_class"] = 1
    status, _, stderr = in_this_process(script, **arguments)
    assert status == 0, stderr
    records = lines_of(tmp_path / "run" / "synthetic" / "metadata.jsonl")
    assert all((tmp_path / "run" / "synthetic" / r["file_name"]).exists() for r in records)
    drawn = {r["class_name"] for r in records}
    if script is actgen:  # the classes its classifier errs on
        assert drawn <= set(names)
    else:
        assert drawn == set(names)
