"""A run on one page: its numbers, and what a browser makes of it."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import yaml
from runs import LIBRA
from toys import run_tool

from libra_d2.metrics import split_score
from libra_d2.report.errors import confusion_matrix, error_kinds
from libra_d2.report.page import _shown
from libra_d2.report.run import read_run
from libra_d2.report.scored import Image, average_precision, precision_recall

BOX = np.array([10.0, 10, 50, 50])


def image(truths, found, name="a.jpg", crowds=None):
    """Of (class, box) and (class, box, score)."""
    return Image(
        file=name,
        truth_boxes=np.array([box for _, box in truths]).reshape(-1, 4),
        truth_classes=np.array([c for c, _ in truths], int),
        crowds=np.array(crowds or [False] * len(truths), bool),
        boxes=np.array([box for _, box, _ in found]).reshape(-1, 4),
        classes=np.array([c for c, *_ in found], int),
        scores=np.array([score for *_, score in found], float),
    )


def shifted(x):
    return BOX + np.array([x, 0, x, 0])


class TestNumbers:
    def test_ap50_is_cocos(self, tmp_path):
        """Of random detections, crowds among the ground truths."""
        import contextlib
        import io

        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        rng = np.random.default_rng(0)
        images, truths, results = [], [], []
        for i in range(20):
            corner = rng.uniform(0, 60, (6, 2))
            boxes = np.concatenate([corner, corner + rng.uniform(10, 40, (6, 2))], axis=1)
            classes, crowds = rng.integers(0, 3, 6), rng.random(6) < 0.15
            n = 25
            near = boxes[rng.integers(0, 6, n)] + rng.normal(0, 4, (n, 4))
            near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 2)
            labels, scores = rng.integers(0, 3, n), rng.random(n)
            images.append(Image("x", boxes, classes, crowds, near, labels, scores))
            for box, c, crowd in zip(boxes, classes, crowds, strict=True):
                x1, y1, x2, y2 = box.tolist()
                truths.append(
                    {
                        "id": len(truths) + 1,
                        "image_id": i,
                        "category_id": int(c),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": int(crowd),
                    }
                )
            for (x1, y1, x2, y2), c, s in zip(near.tolist(), labels, scores, strict=True):
                own = {"image_id": i, "category_id": int(c), "score": float(s)}
                results.append({**own, "bbox": [x1, y1, x2 - x1, y2 - y1]})
        file = tmp_path / "truth.json"
        categories = [{"id": k, "name": str(k)} for k in range(3)]
        content = {"images": [{"id": i, "width": 100, "height": 100} for i in range(20)]}
        file.write_text(json.dumps({**content, "annotations": truths, "categories": categories}))
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(file))
            evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        curves = precision_recall(images, 3)
        assert curves.mean() == pytest.approx(evaluation.stats[1], abs=1e-9)
        expected = evaluation.eval["precision"][0, :, :, 0, -1].T
        assert np.allclose(curves, expected)

    @pytest.mark.parametrize(
        ("kind", "found"),
        [
            ("classification", [(1, BOX, 0.9)]),
            ("localization", [(0, shifted(20), 0.9)]),  # an IoU of 1/3
            ("both", [(1, shifted(20), 0.9)]),
            ("duplicate", [(0, BOX, 0.9), (0, shifted(1), 0.8)]),
            ("background", [(0, shifted(200), 0.9), (0, BOX, 0.5)]),
            ("missed", []),
        ],
    )
    def test_each_kind_of_error(self, kind, found):
        kinds = {k.name: k for k in error_kinds([image([(0, BOX)], found)], 2)}
        others = {"missed"} if kind == "both" else set()
        assert {name for name, k in kinds.items() if k.number} == {kind} | others
        if kind in ("classification", "localization"):
            assert kinds[kind].cost == pytest.approx(100)
        if kind == "background":
            assert kinds[kind].cost == pytest.approx(50)
        if kind == "duplicate":
            assert kinds[kind].cost == pytest.approx(0)

    def test_a_crowd_is_no_error(self):
        one = image([(0, BOX)], [(0, BOX, 0.9), (0, BOX, 0.8)], crowds=[True])
        assert all(kind.number == 0 for kind in error_kinds([one], 1))

    def test_confusion(self):
        one = image(
            [(0, BOX), (1, shifted(100)), (1, shifted(300))],
            [(1, BOX, 0.9), (1, shifted(100), 0.8), (0, shifted(500), 0.7), (0, BOX, 0.1)],
        )
        expected = [[0, 1, 0], [0, 1, 1], [1, 0, 0]]
        assert confusion_matrix([one], 2, 0.5).tolist() == expected

    def test_nothing_to_find(self):
        assert math.isnan(average_precision(np.array([0.5]), np.array([False]), 0))
        assert average_precision(np.array([]), np.array([], bool), 3) == 0


EVIL = '<script>alert("x")</script>&'


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, request):
    """A run whose folder, classes and images have names that are no names."""
    from formats import make_coco
    from toys import CONFIGS, SMALL, toy_opts

    from libra_d2.engine import main

    folder = tmp_path_factory.mktemp("report")
    make_coco(folder)
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = EVIL
    content["categories"][1]["name"] = "car/truck"
    for record in content["images"][:2]:
        name = f"<img src=x onerror=alert({record['id']})>.jpg"
        source = next(folder.rglob(record["file_name"]))
        source.rename(source.with_name(name))
        record["file_name"] = record["file_name"].replace(source.name, name)
    file.write_text(json.dumps(content))
    opts = toy_opts(*SMALL, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2)
    drop = opts.index("MODEL.ROI_HEADS.NUM_CLASSES")
    del opts[drop : drop + 2]
    out = folder / "a & <b>"
    data = ["--train", f"coco:{file}", "--val", f"coco:{file}"]
    main(["--config-file", str(CONFIGS / LIBRA), "--output", str(out), *data, *opts])
    return out


@pytest.fixture(scope="module")
def page(run_folder):
    result = run_tool("report.py", run_folder)
    assert result.returncode == 0, result.stderr
    return run_folder / "report.html"


def test_names_are_text(page):
    text = page.read_text()
    assert "<script" not in text and "<img src=x" not in text and "<b>" not in text.split("<h1>")[0]
    assert "&lt;script&gt;" in text and "a &amp; &lt;b&gt;" in text


def test_it_asks_for_nothing(page):
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page.read_text())
    assert len(addresses) > 10
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "@import" not in page.read_text() and "url(http" not in page.read_text()


def test_its_parts(page, run_folder):
    text = page.read_text()
    anchors = set(re.findall(r'href="#([a-z]+)"', text))
    assert anchors and all(f'id="{anchor}"' in text for anchor in anchors)
    assert {"pr", "errors", "confusion", "images"} <= anchors
    for part in ("SOLVER.MAX_ITER", "sys.platform", "train_net.py --config-file", "Most conf"):
        assert part in text, part
    last = json.loads((run_folder / "metrics.json").read_text().splitlines()[-1])
    assert "<td>car/truck (bbox)</td>" in text
    assert f"<td>bbox/AP50</td><td>{last['bbox/AP50']:.1f}</td>" in text


def test_several(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    (other / "inference" / "coco_instances_results.json").unlink()
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("MAX_ITER: 4", "MAX_ITER: 5"))
    out = tmp_path / "page.html"
    result = run_tool("report.py", run_folder, other, "--output", out, "--images", 1)
    assert result.returncode == 0, result.stderr
    text = out.read_text()
    assert "<tr><td>SOLVER.MAX_ITER</td>" in text and "TEST.EVAL_PERIOD</td>" not in text
    assert "<b>other</b>: There are no predictions to look at" in text
    again = run_tool("report.py", run_folder, other, "--output", out)
    assert again.returncode == 2 and "exists; give --overwrite" in again.stderr


def test_of_several_data_sets_the_predictions_are_the_lasts(run_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["DATASETS"]["TEST"] = ["digits_val", *config["DATASETS"]["TEST"]]
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(other, "x").dataset == config["DATASETS"]["TEST"][1]
    assert read_run(other, "x").images
    problem = read_run(other, "x", "digits_val").problem
    assert not problem or "are not of 'digits_val'" in problem
    predictions = other / "inference" / "coco_instances_results.json"
    content = json.loads(predictions.read_text())
    content[0]["image_id"] = 10**6
    predictions.write_text(json.dumps(content))
    assert "are not of" in read_run(other, "x").problem
    predictions.write_text('{"a": 1}')
    assert "There are no predictions" in read_run(other, "x").problem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bbox/AP", ("", "bbox", "AP")),
        ("a/b/bbox/AP-car/truck", ("a/b", "bbox", "AP-car/truck")),
        ("bbox_TTA/AP50", ("", "bbox_TTA", "AP50")),
        ("box_proposals/AR@100", ("", "box_proposals", "AR@100")),
        ("validation/total_loss", None),
        ("roi_head/negative_iou_bin0", None),
    ],
)
def test_parts_of_a_score(name, expected):
    assert split_score(name) == expected


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["nothing", "--output", "x.html"], "'nothing' is no run's folder"),
        (["a", "b"], "give the page of several runs a name with --output"),
        (["a", "--output", "x.pdf"], "--output must end in .html, got 'x.pdf'"),
        (["a", "--output", "x.html", "--images", "-1"], "--images must not be negative, got -1"),
    ],
)
def test_bad_input(args, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_tool("report.py", *args)
    assert result.returncode == 2 and match in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (420, "dark")])
def test_in_a_browser(page, width, scheme, tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as browser:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        assert browser.get_log("browser") == []
        sizes = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
        assert len(sizes) >= 8 and all(sizes)
        requests = browser.execute_script(
            "return performance.getEntriesByType('resource').map(e => e.name)"
        )
        assert all(name.startswith("data:") for name in requests)
        overflow = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert overflow <= 0
        targets = browser.execute_script(
            "return [...document.querySelectorAll('nav a')]"
            ".every(a => document.querySelector(a.getAttribute('href')))"
        )
        assert targets
        color = browser.execute_script("return getComputedStyle(document.body).color")
        bright = sum(map(int, re.findall(r"\d+", color)[:3])) > 380
        assert bright == (scheme == "dark")


def test_a_tuple_and_the_list_that_yaml_makes_of_it_are_no_difference():
    assert _shown(((10.0, 5.0), ())) == _shown([[10.0, 5.0], []]) == "[[10.0, 5.0], []]"
