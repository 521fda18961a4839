"""The table that compares all methods, against SciPy's paired t-test."""

import compare
import numpy as np
import scipy.stats


def test_a_gain_is_paired_with_standard_augmentation_seed_by_seed():
    rng, rows = np.random.default_rng(0), {}
    for k, n, name in ((4, 640, compare.BASE), (4, 640, "ActGen"), (16, 640, "ActGen"), (4, 40, "ActGen")):
        runs = [dict(test=a, test_ood=b, generation=c, training=d) for a, b, c, d in 100 * rng.random((5, 4))]
        if name != compare.BASE:
            for run, (x, y, z) in zip(runs, rng.random((5, 3)), strict=True):
                run |= dict(fid=x, precision=y, recall=z)
        rows[k, n, name] = runs
    title, header, _, base, actgen = compare.table(rows, 4, 640)
    assert "4 real images per class, 640 synthetic ones, 5 seeds" in title
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    base, actgen = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (base, actgen))
    assert len(columns) == len(base) == len(actgen) and (base[0], actgen[0]) == (compare.BASE, "ActGen")
    assert base[2] == base[4] == base[5] == ""
    for column, split in ((1, "test"), (3, "test_ood")):
        assert columns[column : column + 2] == [split, "gain"]
        ours, theirs = ([run[split] for run in rows[4, 640, name]] for name in ("ActGen", compare.BASE))
        paired = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        gain = f"{np.subtract(ours, theirs).mean():+.1f} ± {(paired.high - paired.low) / 2:.1f}"
        assert actgen[column].split(" ± ")[0] == f"{np.mean(ours):.1f}" and actgen[column + 1] == gain
    runs = rows[4, 640, "ActGen"]
    assert actgen[5:8] == [
        f"{np.mean([r['fid'] for r in runs]):.1f}",
        *(f"{np.mean([r[key] for r in runs]):.2f}" for key in ("precision", "recall")),
    ]
    assert actgen[8:] == [f"{np.median([r[key] for r in runs]):.0f}" for key in ("generation", "training")]
