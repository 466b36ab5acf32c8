"""What the docs say of switches is so: their names, and the examples, which are run."""

import importlib
import re

from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY
from toys import BASELINE, CONFIGS, small_config, train_step

from libra_d2 import modeling

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
