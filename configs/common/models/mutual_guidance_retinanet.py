"""RetinaNet with Mutual Guidance and its authors' losses."""

from detectron2.config import LazyCall as L

from libra_d2.modeling import BalancedL1, FocalLoss, LibraRetinaNet, MutualGuidanceMatcher
from libra_d2.zoo import get_config

model = get_config("common/models/retinanet.py").model
for argument in ("focal_loss_alpha", "focal_loss_gamma"):
    del model[argument]
model.update(
    _target_=LibraRetinaNet,
    prediction_matcher=L(MutualGuidanceMatcher)(),
    cls_loss=L(FocalLoss)(gamma=1.0),
    box_loss=L(BalancedL1)(beta=0.11),
    box_reg_loss_weight=0.25,
)
