"""Statistics of repeated trainings, and the tables and pictures that are made of them."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import stats
from tables import results

from libra_d2.engine.comparison import compare, make_table, plot, read_results, write_csv
from libra_d2.statistics import Difference, bootstrap_images, paired_difference


class TestStatistics:
    def test_students_interval_by_hand(self):
        values, baseline = [51.0, 49.0, 50.5, 48.0], [50.0, 48.5, 48.0, 48.2]
        found = paired_difference(values, baseline)
        d = np.array([1.0, 0.5, 2.5, -0.2])
        half = stats.t.ppf(0.975, 3) * d.std(ddof=1) / 2
        assert found.mean == pytest.approx(0.95)
        assert (found.low, found.high) == pytest.approx((0.95 - half, 0.95 + half))
        assert not found.excludes_zero
        assert paired_difference([2.0, 2.1, 1.9], [0.0, 0.0, 0.0]).excludes_zero

    def test_one_pair_has_no_interval(self):
        found = paired_difference([2.0], [1.0])
        assert found.mean == 1.0 and np.isnan(found.low) and not found.excludes_zero

    def test_pairs_must_be_complete(self):
        with pytest.raises(ValueError, match="got 2 and 1"):
            paired_difference([1.0, 2.0], [1.0])

    def test_an_interval_holds_the_truth_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(400):
            base = rng.normal(50, 2, 5)
            found = paired_difference(base + rng.normal(1.0, 0.7, 5), base)
            hits += found.low <= 1.0 <= found.high
        assert 0.92 <= hits / 400 <= 0.98

    def test_bootstrap(self, tmp_path):
        """A model that finds two thirds of the objects against one that finds all, and nothing."""
        rng = np.random.default_rng(0)
        images = [{"id": i, "height": 100, "width": 100, "file_name": "x"} for i in range(1, 31)]
        annotations = [
            {
                "id": i,
                "image_id": 1 + i % 30,
                "category_id": 1 + i % 2,
                "bbox": [*rng.uniform(0, 50, 2), 30, 30],
                "area": 900,
                "iscrowd": 0,
            }
            for i in range(1, 91)
        ]
        truth = {"images": images, "annotations": annotations}
        truth["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        results = [
            {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for a in annotations
        ]
        most = [r for i, r in enumerate(results) if i % 3]
        files = [tmp_path / f"{name}.json" for name in ("truth", "all", "most", "none")]
        for file, content in zip(files, (truth, results, most, []), strict=True):
            file.write_text(json.dumps(content))
        found = bootstrap_images(*files[:3], num_resamples=50)
        assert 20 < found.mean < 50 and found.low < found.mean < found.high
        assert found.excludes_zero and found.over == "images"
        same = bootstrap_images(files[0], files[1], files[1], num_resamples=10)
        assert (same.mean, same.low, same.high) == (0, 0, 0)
        assert bootstrap_images(files[0], files[1], files[3], num_resamples=2).low == 100

        drawn = [average_precision_of_copies(truth, most, range(30))]
        rng = np.random.default_rng(7)
        drawn += [
            average_precision_of_copies(truth, most, rng.integers(30, size=30)) for _ in range(3)
        ]
        found = bootstrap_images(files[0], files[2], files[3], num_resamples=3, seed=7)
        assert found.mean == pytest.approx(drawn[0])
        assert (found.low, found.high) == pytest.approx(np.quantile(drawn[1:], (0.025, 0.975)))


def average_precision_of_copies(truth, results, images):
    """pycocotools' AP on a data set of copies of these images."""
    content = {"categories": truth["categories"], "images": [], "annotations": []}
    found = []
    for new, old in enumerate(images, start=1):
        content["images"].append(truth["images"][old] | {"id": new})
        for kind, copies in ((truth["annotations"], content["annotations"]), (results, found)):
            copies += [a | {"image_id": new} for a in kind if a["image_id"] == old + 1]
    content["annotations"] = [a | {"id": i} for i, a in enumerate(content["annotations"], start=1)]
    coco = COCO()
    coco.dataset = content
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[0]


def test_tables_are_made_from_the_csv(tmp_path):
    write_csv(results(base=[50.0, 48.0, 49.0], better=[52.0, 50.1, 50.9]), tmp_path / "a.csv")
    records = read_results(tmp_path / "a.csv")
    write_csv(records, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert records[0]["code"] == "1e5" and records[0]["config"] == "002"  # hashes are no numbers
    base, better = compare(records, "bbox/AP", "base")
    assert base.difference is None and base.means["bbox/AP"] == 49.0
    assert base.deviations["bbox/AP"] == pytest.approx(1.0)
    assert better.difference == paired_difference([52.0, 50.1, 50.9], [50.0, 48.0, 49.0])
    table = make_table([base, better], "bbox/AP")
    assert "| base | 3 | 49.0 ± 1.0 | 69.0 ± 1.0 |  |" in table
    assert "| **+2.0 [+1.8, +2.2]** |" in table
    plot([base, better], "bbox/AP", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not Difference(1.0, -0.5, 2.5).excludes_zero


def test_any_metric_can_be_compared(tmp_path):
    records = [{**r, "bbox/AP-cat": r["bbox/AP"] / 2} for r in results(base=[50.0], better=[52.0])]
    lines = compare(records, "bbox/AP-cat", "base")
    table = make_table(lines, "bbox/AP-cat")
    assert "| AP-cat |" in table and "| better | 1 | 52.0 | 72.0 | 26.0 | +1.0 |" in table
    plot(lines, "bbox/AP-cat", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no metric 'bbox/AP-cot' \(did you mean 'bbox/AP-cat'"):
        compare(records, "bbox/AP-cot", "base")
    records[0]["logs/loss_cls"] = 1.0
    with pytest.raises(
        ValueError, match=r"it has bbox/AP, .*, and logs/\.\.\. of what training logs"
    ):
        compare(records, "loss", "base")


def test_what_training_logs_has_three_digits_that_count(tmp_path):
    records = results(base=[50.0, 50.0], row=[51.0, 52.0])
    for record, loss in zip(records, (0.0038, 0.0042, 0.0051, 0.0050), strict=True):
        record["logs/loss_rpn_cls"] = loss
    lines = compare(records, "logs/loss_rpn_cls", "base")
    table = make_table(lines, "logs/loss_rpn_cls").splitlines()
    assert table[2:] == [
        "| base | 2 | 0.00400 ± 0.00028 |  |",
        "| row | 2 | 0.00505 ± 0.00007 | +0.00105 [-0.00213, +0.00423] |",
    ]
