"""What the docs say of switches is so: their names, and the examples, which are run."""

import csv
import importlib
import inspect
import re

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from toys import BASELINE, CONFIGS, load_tool, small_config, train_step

from libra_d2 import config, modeling
from libra_d2.config import add_libra_config, list_keys
from libra_d2.engine.run import make_parser

TEXT = (CONFIGS.parent / "docs" / "extending.md").read_text()


def test_the_table_has_all_names():
    rows = re.findall(r"^\| `(\w+)` \| .* \| (`.*`) \|$", TEXT, flags=re.MULTILINE)
    assert len(rows) == 5
    for name, listed in rows:
        names = set(re.findall(r"`(\w+)`", listed))
        own = {
            n
            for n, switch in getattr(modeling, name)
            if switch is type(None) or switch.__module__.startswith("libra_d2.")
        }
        assert names == own, name


def test_the_examples_train(tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "my_parts.py").write_text("\n".join(examples))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("my_parts")  # stays, as its classes stay in the registries
    opts = ["MODEL.ROI_HEADS.NEGATIVE_SAMPLER", "nearest", "MODEL.RPN.NEGATIVE_SAMPLER", "nearest"]
    opts += ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "huber"]
    opts += ["MODEL.ROI_HEADS.NAME", "MyBalancedROIHeads"]
    losses, _, _, model = train_step(small_config(BASELINE, *opts))
    assert type(model.roi_heads) is ROI_HEADS_REGISTRY.get("MyBalancedROIHeads")
    assert type(model.roi_heads.box_predictor.box_loss).__name__ == "Huber"
    assert all(loss.isfinite() for loss in losses.values())
    assert build_model(small_config(BASELINE))


@pytest.fixture(scope="module")
def tool():
    return load_tool("config_reference.py")


def test_what_others_are_told_is_there():
    """The keys of docs/migrating.md, and the options of its programs."""
    text = (CONFIGS.parent / "docs" / "migrating.md").read_text()
    cfg = get_cfg()
    add_libra_config(cfg)
    keys, found = dict(list_keys(cfg)), []
    for cell in re.findall(r"\|([^|]*)\|$", text, flags=re.MULTILINE):
        for key in re.findall(r"`\.?([A-Z][A-Z0-9_.]*)(?=[` ])", cell):
            if "." not in key and key not in keys:  # beside the one before it
                key = f"{found[-1].rpartition('.')[0]}.{key}"
            assert key in keys, key
            found.append(key)
    assert len(found) > 40
    programs = [load_tool(name).make_parser() for name in ("predict.py", "export_model.py")]
    helps = [program.format_help() for program in (make_parser(), *programs)]
    spans = re.findall(r"`([^`]*)`", text)
    options = {option for span in spans for option in re.findall(r"--[a-z-]+", span)}
    assert len(options) > 10
    for option in options:
        assert any(re.search(rf"{option}(?![\w-])", told) for told in helps), option


class TestConfigReference:
    """docs/config.md is what config.py says."""

    def test_it_is_up_to_date(self, tool):
        assert tool.make_reference() == (CONFIGS.parent / "docs" / "config.md").read_text()

    def test_it_has_every_key_with_its_default_and_meaning(self):
        plain, ours = get_cfg(), get_cfg()
        add_libra_config(ours)
        known = {key for key, _ in list_keys(plain)}
        added = {k: v for k, v in list_keys(ours) if k not in known and not isinstance(v, dict)}
        text = (CONFIGS.parent / "docs" / "config.md").read_text()
        rows = re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| (.+) \|$", text, flags=re.MULTILINE)
        assert {key: default for key, default, _ in rows} == {k: repr(v) for k, v in added.items()}
        assert len(rows) == len(added) and all(len(meaning) > 10 for *_, meaning in rows)

    def test_a_key_without_a_comment_is_refused(self, tool, monkeypatch):
        source = inspect.getsource(config).replace(
            '    # "non_local", "conv" or "none" (no', "    # ("
        )
        bare = source.replace("    # False for the plain pyramid of FPN_BUILDER.\n", "")
        assert bare != source
        monkeypatch.setattr(tool.inspect, "getsource", lambda module: bare)
        with pytest.raises(ValueError, match=r"config.py says nothing about MODEL.BFP.ENABLED"):
            tool.make_reference()


@pytest.mark.parametrize(
    "page", sorted((CONFIGS.parent / "docs").glob("*.md")), ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for address in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not address.startswith("http"):
            assert (page.parent / address).exists(), address


def test_the_numbers_of_the_pictures():
    folder = CONFIGS.parent / "docs"
    text = " ".join((folder / "pictures.md").read_text().split())
    with open(folder / "pictures" / "sampling.csv") as file:
        lowest = next(csv.DictReader(file))  # of an IoU up to 0.05
    above = {name: f"{100 - 100 * float(share):.0f} %" for name, share in lowest.items()}
    assert f"csv) {above['OHEM: the hardest']} and of random ones {above['random']} lie" in text
    assert f"The balanced sampler's {above['IoU-balanced']} are" in text
    with open(folder / "pictures" / "matching.csv") as file:
        *_, last = csv.DictReader(file)
    assert f"in the end {last['both guided']} of {last['IoU']} for both tasks" in text
