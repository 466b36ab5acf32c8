"""Data sets named in place: three formats, one meaning; classes by name; what is refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from formats import NAMES, make_coco, make_voc, make_yolo
from PIL import Image

from libra_d2.data.checks import check_dataset
from libra_d2.data.images import examine
from libra_d2.data.sources import open_source, register_source

SPLITS = {"train": [1, 2, 3, 4, 5, 6], "val": [7, 8]}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A data set in all three formats, in a folder whose name has a space and an umlaut."""
    folder = tmp_path_factory.mktemp("data") / "möre data"
    content = make_coco(folder / "coco")
    make_voc(folder / "voc", content, folder / "coco" / "images", SPLITS)
    make_yolo(folder / "yolo", content, folder / "coco" / "images", SPLITS)
    return folder


@pytest.fixture
def data(original, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(original, tmp_path / "data")


def objects_of(name, classes=()):
    """Boxes and class names of each image by file name, as detectron2 trains on them."""
    register_source(open_source(name), classes)
    names = MetadataCatalog.get(name).thing_classes
    return {
        record["file_name"].rpartition("/")[2]: sorted(
            (names[a["category_id"]], *np.round(a["bbox"], 2).tolist())
            for a in record["annotations"]
        )
        for record in DatasetCatalog.get(name)
    }


def test_three_formats_say_the_same(original):
    coco = objects_of(f"coco:{original}/coco/annotations.json")
    assert sum(map(len, coco.values())) > 20
    for split, ids in SPLITS.items():
        expected = {f"{i:06d}.jpg": coco[f"{i:06d}.jpg"] for i in ids}
        for name in (f"voc:{original}/voc:{split}", f"yolo:{original}/yolo/data.yaml:{split}"):
            got = objects_of(name)
            assert got.keys() == expected.keys()
            for file, objects in expected.items():
                assert [o[0] for o in got[file]] == [o[0] for o in objects]
                np.testing.assert_allclose(
                    [o[1:] for o in got[file]], [o[1:] for o in objects], atol=0.02
                )


def test_colons_in_paths(original, tmp_path):
    shutil.copytree(original / "coco", tmp_path / "a:b")
    (tmp_path / "a:b" / "images").rename(tmp_path / "c:d")
    name = f"coco:{tmp_path}/a:b/annotations.json:{tmp_path}/c:d"
    assert open_source(name).image_root == tmp_path / "c:d"
    shutil.copytree(original / "voc", tmp_path / "v:w")
    assert len(open_source(f"voc:{tmp_path}/v:w:val").coco.images) == 2


def test_images_are_found_where_people_put_them(original, tmp_path):
    for images in ("images", "train", "images/train"):
        root = tmp_path / images.replace("/", "_")
        (root / "annotations").mkdir(parents=True)
        shutil.copytree(original / "coco" / "images", root / images)
        file = root / "annotations" / "instances_train.json"
        shutil.copy(original / "coco" / "annotations.json", file)
        assert open_source(f"coco:{file}").image_root == root / images
    shutil.rmtree(root / images)
    with pytest.raises(ValueError, match="image '000001.jpg' is neither beside .* name the folder"):
        open_source(f"coco:{file}")


def test_classes_are_matched_by_name(data):
    """Ids in another order, and a class that the data set lacks, change nothing."""
    name = f"coco:{data}/coco/annotations.json"
    expected = objects_of(name)
    file = data / "coco" / "annotations.json"
    content = json.loads(file.read_text())
    new = {c["id"]: 100 - c["id"] for c in content["categories"]}
    for category in content["categories"]:
        category["id"] = new[category["id"]]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
        annotation["kept"] = "too"
    file.write_text(json.dumps(content))
    assert open_source(name).classes == NAMES[::-1]
    classes = [*NAMES[:4], "never seen", *NAMES[4:]]
    assert objects_of(name, classes) == expected
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == classes
    written = json.loads(Path(metadata.json_file).read_text())
    assert written["annotations"][0]["kept"] == "too"
    assert len(written["categories"]) == 11


def test_difficult_objects_are_crowd_and_useless_boxes_left_out(data):
    file = data / "voc" / "Annotations" / "000001.xml"
    text = file.read_text().replace("<difficult>0", "<difficult>1", 1)
    extra = "<object><name>digit 1</name><bndbox>{}</bndbox></object></annotation>"
    for box in ((5, 5, 5, 5), (9000, 5, 9010, 50)):
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
        box = "".join(f"<{k}>{v}</{k}>" for k, v in corners)
        text = text.replace("</annotation>", extra.format(box))
    file.write_text(text)
    name = f"voc:{data}/voc:train"
    source = open_source(name)
    register_source(source)
    annotations = DatasetCatalog.get(name)[0]["annotations"]
    own = [a for a in source.coco.annotations if a.image_id == 1]
    assert [a["iscrowd"] for a in annotations] == [1] + [0] * (len(annotations) - 1)
    assert len(annotations) == len(own) - 2


def test_yolo_poses_give_their_boxes(data):
    folder = data / "yolo"
    content = yaml.safe_load((folder / "data.yaml").read_text())
    (folder / "data.yaml").write_text(yaml.safe_dump({**content, "kpt_shape": [2, 3]}))
    pose = "3 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 0\n"
    for label in (folder / "labels" / "val").iterdir():
        label.write_text(pose)
    (folder / "labels" / "val" / "._000007.txt").write_text("of a Mac")
    coco = open_source(f"yolo:{folder}/data.yaml:val").coco
    image, annotation = coco.images[0], coco.annotations[0]
    expected = (0.4 * image.width, 0.3 * image.height, 0.2 * image.width, 0.4 * image.height)
    np.testing.assert_allclose(annotation.bbox, expected, rtol=1e-6)
    assert annotation.segmentation is None
    label.write_text("3 0.5 0.5 0.2 0.4\n")
    with pytest.raises(ValueError, match="as kpt_shape says, 6 numbers of keypoints; got 5"):
        open_source(f"yolo:{folder}/data.yaml:val")


def test_voc_names_may_have_blanks(data):
    for folder, end in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        for old, new in (("000001", "img"), ("000002", "img 1"), ("000003", "img 2")):
            (data / "voc" / folder / f"{old}{end}").rename(data / "voc" / folder / f"{new}{end}")
    split = data / "voc" / "ImageSets" / "Main" / "train.txt"
    split.write_text("img 1  1\nimg 2 -1\nimg\n")
    images = open_source(f"voc:{data}/voc:train").coco.images
    assert [image.file_name for image in images] == ["img 1.jpg", "img 2.jpg", "img.jpg"]
    split.write_text("img 3\n")
    with pytest.raises(ValueError, match="names 'img 3', which has no file in Annotations"):
        open_source(f"voc:{data}/voc:train")


def test_yolo_polygons(data):
    label = data / "yolo" / "labels" / "val" / "000007.txt"
    label.write_text("3 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6\n")
    source = open_source(f"yolo:{data}/yolo/data.yaml:val")
    image = source.coco.images[0]
    (annotation,) = [a for a in source.coco.annotations if a.image_id == 1]
    width, height = image.width, image.height
    np.testing.assert_allclose(
        annotation.bbox, (0.1 * width, 0.2 * height, 0.4 * width, 0.4 * height), rtol=1e-6
    )
    assert annotation.area == pytest.approx(0.16 * width * height)
    assert len(annotation.segmentation[0]) == 8


@pytest.mark.parametrize("path", ["..", None])
def test_yolo_files_of_exporters(path, data):
    """Lists of names, paths that lead one folder too high, lists of images."""
    folder = data / "yolo"
    content = {"names": NAMES, "nc": 10, "train": "../images/train", "val": "val.txt"}
    if path:
        content |= {"path": f"{path}/yolo", "train": "images/train"}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    (folder / "val.txt").write_text("images/val/000007.jpg\n./images/val/000008.jpg\n")
    assert len(open_source(f"yolo:{folder}/data.yaml:train").coco.images) == 6
    assert len(open_source(f"yolo:{folder}/data.yaml:val").coco.images) == 2


def test_images_are_as_large_as_they_are_seen(data):
    """EXIF turns an image; detectron2 turns it too."""
    file = data / "voc" / "JPEGImages" / "000001.jpg"
    image = Image.open(file)
    exif = Image.Exif()
    exif[274] = 6
    image.resize((64, 32)).save(file, exif=exif)
    image = open_source(f"voc:{data}/voc:train").coco.images[0]
    assert (image.width, image.height) == (32, 64)


def test_a_tiff_that_exif_turns_is_refused(data):
    """Pillow turns it as it is read, and detectron2 once more."""
    folder = data / "coco"
    content = json.loads((folder / "annotations.json").read_text())
    exif = Image.Exif()
    exif[274] = 3  # the other way up
    image = Image.open(folder / "images" / content["images"][0]["file_name"])
    image.save(folder / "images" / "turned.tiff", exif=exif)
    assert examine([folder / "images" / "turned.tiff"]) == [
        "is a TIFF that its EXIF data turn; save it upright"
    ]
    exif[274] = 0  # which means nothing
    image.save(folder / "images" / "upright.tiff", exif=exif)
    assert examine([folder / "images" / "upright.tiff"]) == [image.size[::-1]]


def test_what_pycocotools_wants_is_filled_in(data):
    file = data / "coco" / "annotations.json"
    content = json.loads(file.read_text())
    for category in content["categories"]:
        category["id"] += 10
    for annotation in content["annotations"]:
        annotation["category_id"] += 10
        del annotation["area"], annotation["iscrowd"]
    for image in content["images"]:
        image["width"] = float(image["width"])
    content["annotations"][1]["ignore"] = 1
    file.write_text("\ufeff" + json.dumps(content))
    name = f"coco:{file}"
    register_source(open_source(name))
    DatasetCatalog.get(name)
    ids = MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id
    assert sorted(ids) == [c["id"] for c in content["categories"]]  # the file's
    written = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
    found, ignored, *_ = written["annotations"]
    assert ignored["iscrowd"] == 1 and type(written["images"][0]["width"]) is int
    assert found["iscrowd"] == 0 and found["area"] == found["bbox"][2] * found["bbox"][3]
    check_dataset(name, for_training=False, num_classes=None, num_classes_key="")


def test_annotations_may_be_null(data):
    file = data / "coco" / "annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": None}))
    register_source(open_source(f"coco:{file}"), classes=["more", *NAMES])


def write(path):
    return lambda data, text: (data / path).write_text(text)


XML, LABEL = "voc/Annotations/000001.xml", "yolo/labels/train/000001.txt"


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("voc:", None, "must be voc:ROOT:SPLIT"),
        ("coco:", None, "must be coco:ANNOTATIONS.json"),
        ("coco:{}/none.json", None, "none.json does not exist"),
        ("coco:{}/coco/annotations.json:{}/none", None, "none does not exist or is not a folder"),
        ("voc:{}/none:train", None, "none must be a folder with Annotations"),
        ("voc:{}/voc:trian", None, r"no split 'trian' \(did you mean 'train'\?\); there is train"),
        ("voc:{}/voc:train", (XML, "<annotation>"), "000001.xml is not valid xml"),
        ("voc:{}/voc:train", (XML, "<a><object/></a>"), "object 1 has no name"),
        (
            "voc:{}/voc:train",
            (XML, "<a><object><name>a</name><bndbox><xmin>z</xmin></bndbox></object></a>"),
            "000001.xml: object 1 has xmin 'z', no number",
        ),
        ("voc:{}/voc:train", ("voc/ImageSets/Main/train.txt", "9\n8"), "'9', which has no .*1 oth"),
        ("voc:{}/voc:train", ("voc/ImageSets/Main/train.txt", ""), "names no image"),
        ("yolo:{}/yolo/none.yaml:train", None, "none.yaml does not exist"),
        ("yolo:{}/yolo/data.yaml:test", None, "no split 'test'.*there is train, val"),
        ("yolo:{}/yolo/data.yaml:train", ("yolo/data.yaml", "a: ["), "is not valid yaml"),
        ("yolo:{}/yolo/data.yaml:train", ("yolo/data.yaml", "train: x"), "must have names"),
        ("yolo:{}/yolo/data.yaml:train", ("yolo/data.yaml", "{names: [a], nc: 2}"), "has nc 2"),
        (
            "yolo:{}/yolo/data.yaml:train",
            ("yolo/data.yaml", "{names: [a], train: none}"),
            "'none' does not exist; looked for it at",
        ),
        (
            "yolo:{}/yolo/data.yaml:path",
            ("yolo/data.yaml", "{names: [a], path: .}"),
            "no split 'pa",
        ),
        ("yolo:{}/yolo/data.yaml:train", ("yolo/data.yaml", "names: [a, no]"), "has False among"),
        ("voc:{}/voc:train", (XML, "<?xml version='1.0' encoding='foo'?><a/>"), "not valid xml"),
        ("coco:{}/coco/annotations.json", ("coco/annotations.json", "\ufeff{"), "not valid json"),
        ("yolo:{}/yolo/data.yaml:train", (LABEL, "a b"), "txt, line 1: 'a b' must be numbers"),
        ("yolo:{}/yolo/data.yaml:train", (LABEL, "10 .5 .5 .1 .1"), "class 10 must be in 0 to 9"),
        ("yolo:{}/yolo/data.yaml:train", (LABEL, "1 .5 .5 .1"), "got 4 numbers"),
        ("yolo:{}/yolo/data.yaml:train", (LABEL, "1 50 50 9 9"), r"must be fractions .*\[0, 1\]"),
        (
            "yolo:{}/yolo/data.yaml:train",
            ("yolo/labels/train/stray.txt", "1 .5 .5 .1 .1"),
            "stray.txt has no image",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name, damage, match, data):
    if damage:
        write(damage[0])(data, damage[1])
    with pytest.raises(ValueError, match=match) as error:
        open_source(name.format(data, data))
    assert "\n" not in str(error.value) and str(error.value).startswith("data set '")


def test_no_labels_at_all(data):
    shutil.rmtree(data / "yolo" / "labels")
    with pytest.raises(ValueError, match=r"no image of split 'val' has a file of labels; that of"):
        open_source(f"yolo:{data}/yolo/data.yaml:val")


def test_two_images_of_one_name(data):
    for name, folder in (
        (f"voc:{data}/voc:train", data / "voc" / "JPEGImages"),
        (f"yolo:{data}/yolo/data.yaml:train", data / "yolo" / "images" / "train"),
    ):
        Image.open(folder / "000001.jpg").save(folder / "000001.png")
        with pytest.raises(ValueError, match="two images"):
            open_source(name)


def test_a_class_that_is_not_trained_on(original):
    source = open_source(f"voc:{original}/voc:val")
    classes = [re.sub("digit 3", "digit3", name) for name in NAMES]
    with pytest.raises(ValueError, match=r"has the class 'digit 3'.*did you mean 'digit3'"):
        register_source(source, classes)
