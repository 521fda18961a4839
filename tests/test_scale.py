"""What grows with a data set grows linearly: counted, not timed. tests/bench.py --scale measures it."""

import functools
import sys
import tracemalloc
from collections import Counter

import bench
import numpy as np
import pytest
import torch

import actgen
import common


@pytest.mark.parametrize("name, limit", [("planning", 5e3), ("metadata", 10e3), ("memory bank", 10e3)])
def test_a_task_of_the_benchmark_takes_few_bytes_per_image(name, limit):
    n = 10_000
    assert bench.cost(bench.SCALE[name], n)[1] < limit * n + 50e6


def test_targets_take_the_memory_of_one_heads_probabilities_in_half_precision():
    """Twice while they are put together; the logits of all five heads would be 20 KB per image, and twice."""
    more, fewer = (bench.cost(bench.SCALE["AMST's targets"], n)[1] for n in (12_000, 4_000))
    assert more - fewer < 8_000 * 10e3


def draws(labels, seed):
    """The classes' indices in random order, drawn one class after the other."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(np.asarray(labels) == c)) for c in np.unique(labels)]


@pytest.mark.parametrize("seed", range(4))
def test_images_are_drawn_class_by_class(seed):
    labels = (np.random.default_rng(seed).integers(0, 9, 200) ** 2).tolist()  # some classes do not occur
    expected = draws(labels, seed)
    assert common.draw_per_class(labels, 3, seed).tolist() == [i for c in expected for i in c[:3]]
    others, held = common.split_per_class(labels, 0.25, seed, at_least=2)
    assert held.tolist() == sorted(i for c in expected for i in c[: max(2, round(0.25 * len(c)))])
    assert sorted([*others, *held]) == [*range(200)]


@functools.total_ordering
class Label(int):
    """A class index that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Label.compared += 1
        return int(self) == int(other)

    def __lt__(self, other):
        Label.compared += 1
        return int(self) < int(other)

    __hash__ = int.__hash__


def test_splitting_classes_sorts_the_labels_instead_of_comparing_all_with_every_class():
    labels = np.array([Label(i % 100) for i in range(800)], object)
    common.split_per_class(labels, 0.1, seed=0)
    common.draw_per_class(labels, 1, seed=0)
    assert Label.compared < 800 * 100 / 2


def test_folders_of_many_classes_look_at_each_name_once():
    calls, names = Counter(), [f"Class {i}" for i in range(300)]
    sys.setprofile(lambda frame, event, what: event == "c_call" and calls.update([what.__name__]))
    try:
        folders = common.class_folders(names)
    finally:
        sys.setprofile(None)
    assert folders == names and 0 < calls["lower"] <= 3 * len(names)


class Names(list):
    """Class names that count how many are copied."""

    copied = 0

    def __getitem__(self, i):
        got = super().__getitem__(i)
        Names.copied += len(got) if isinstance(i, slice) else 1
        return got


def test_records_are_written_line_by_line_and_read_without_copying_the_class_names(tmp_path):
    names = Names(f"class {i}" for i in range(100))
    records = [dict(file_name="one.png", label=i % 100, class_name=f"class {i % 100}") for i in range(5000)]
    (tmp_path / "one.png").touch()
    tracemalloc.start()
    common.write_file(tmp_path / "metadata.jsonl", records)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "metadata.jsonl").stat().st_size / 2
    assert common.read_records(tmp_path, names) == records and Names.copied <= len(records)
    common.write_file(tmp_path / "metadata.jsonl", [records[0] | {"class_name": "class 1"}])
    with pytest.raises(common.UserError, match="another data set's class 'class 1'"):
        common.read_records(tmp_path, names)


def test_the_memory_bank_copies_no_latents_when_it_grows(tmp_path):
    run, synthetic = common.argparse.Namespace(path=tmp_path), actgen.Synthetic(None)
    for i in range(4):
        common.write_file(tmp_path / "latents" / f"{i}.pt", torch.full((1,), float(i)))
        synthetic.add(run, [dict(file_name=f"{i}.png", label=i % 2, guided=True)])
        if i == 1:
            first = [synthetic.bank[y][0] for y in (0, 1)]
    assert [len(synthetic.bank[y]) for y in (0, 1)] == [2, 2]
    assert all(synthetic.bank[y][0] is first[y] for y in (0, 1))


def test_a_batch_draws_at_most_1024_latents_of_its_class():
    bank = {0: [torch.tensor([float(i)]) for i in range(1500)], 1: [torch.tensor([7.0])]}
    generators = [common.generator(i) for i in range(4)]
    labels, wanted = torch.tensor([0, 1, 0, 2]), torch.tensor([True, True, False, True])
    many, one, unwanted, none = actgen.draw_banks(bank, labels, wanted, generators, "cpu")
    assert many.shape == (1024, 1) and len(many.unique()) == 1024 and one.tolist() == [[7.0]]
    assert unwanted is None and none is None
    stacked = {0: torch.stack(bank[0])}  # a tensor [N, ...] does as well as a list
    (again,) = actgen.draw_banks(stacked, labels[:1], wanted[:1], [common.generator(0)], "cpu")
    assert torch.equal(many, again)


def test_a_run_writes_its_metadata_once_and_its_latents_in_half_precision(tmp_path, monkeypatch, quick):
    written, write = [], common.write_file

    def spy(path, value):
        written.append(path.name)
        write(path, value)

    monkeypatch.setattr(common, "write_file", spy)
    actgen.main(
        actgen.Args(
            out=str(tmp_path), epochs=6, images_per_epoch=4, steps=4, generation_batch_size=4,
            examples_per_class=4, eval_every=6, genval_share=0.5, baseline=False,
        )
    )  # fmt: skip
    records = common.read_file(tmp_path / "synthetic" / "metadata.jsonl")
    assert written.count("metadata.jsonl") == 1 and len(records) == 12
    assert all((tmp_path / "synthetic" / record["file_name"]).exists() for record in records)
    assert common.read_file(next((tmp_path / "latents").iterdir())).dtype == torch.float16
