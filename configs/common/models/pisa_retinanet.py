"""RetinaNet with PISA: ISR-P and CARL."""

from detectron2.config import LazyCall as L

from libra_d2.modeling import Carl, IsrPositive, LibraRetinaNet
from libra_d2.zoo import get_config

model = get_config("common/models/retinanet.py").model
model.update(
    _target_=LibraRetinaNet, smooth_l1_beta=0.11, isr_positive=L(IsrPositive)(), carl=L(Carl)()
)
