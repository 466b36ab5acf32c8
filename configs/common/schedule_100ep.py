"""100 epochs of COCO at 64 images a step, with AdamW and mixed precision: ViTDet's."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from libra_d2.zoo import get_config

train = get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 184375
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=184375
    ),
    warmup_length=250 / 184375,
    warmup_factor=0.001,
)
optimizer = get_config("common/optim.py").AdamW
