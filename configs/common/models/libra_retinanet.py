"""RetinaNet with Libra R-CNN's pyramid and loss."""

from detectron2.config import LazyCall as L

from libra_d2.layers import BalancedFeaturePyramid
from libra_d2.modeling import BalancedL1, BalancedPyramid, LibraRetinaNet
from libra_d2.zoo import get_config

model = get_config("common/models/retinanet.py").model
model.backbone = L(BalancedPyramid)(
    pyramid=model.backbone,
    bfp=L(BalancedFeaturePyramid)(in_channels=256, num_levels=5, refine_level=1),
)
model.update(_target_=LibraRetinaNet, box_loss=L(BalancedL1)(beta=0.11))
