"""How often a step would make the host wait for a GPU: counted on a device that only pretends.

``tools/benchmark.py gpu`` counts on a GPU what CUDA says.
"""

from collections import Counter

import pytest
import torch
from detectron2.modeling import build_model
from pretended import DEVICE, needs_pretence
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import BASELINE, LIBRA, PLAIN, RETINANET, make_inputs, toy_config, train_step

pytestmark = needs_pretence

# Their outcome's size, or what follows, depends on values.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "nms", "bincount"),
    *("unique_dim", "_unique2", "unique_consecutive", "unique_dim_consecutive"),
    *("repeat_interleave", "_to_sparse", "_coalesce"),
}
INDEXING = {"index", "index_put", "index_put_"}


class Waits(TorchDispatchMode):
    """Counts operators on the device, forward and backward, and copies to it and from it.

    Not seen: tensors made there of Python's numbers.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        result = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors}
        waits = DEVICE in devices and name in WAITING and kwargs.get("output_size") is None
        if name in INDEXING:
            is_mask = any(i is not None and i.dtype == torch.bool for i in args[1])
            waits = is_mask and (name == "index" or args[2].numel() > 1)  # else masked_fill
        if name in {"copy_", "_to_copy"}:
            waits = len(devices) > 1
        self.counts[name] += waits
        return result


def count_waits(config, opts, num_objects):
    cfg, inputs = toy_config(config, *opts), make_inputs(num_objects)
    model = build_model(cfg).to(DEVICE)
    train_step(cfg, inputs, build=lambda cfg: model)  # what is made once
    with Waits() as waits:
        train_step(cfg, inputs, build=lambda cfg: model)
    return +waits.counts


class TestTheCount:
    @pytest.mark.parametrize(
        ("function", "waits"),
        [
            (lambda x: x[x > 0], True),
            (lambda x: x[(x > 0).nonzero(as_tuple=True)], True),
            (lambda x: x.sum().item(), True),
            (lambda x: x.tolist(), True),
            (lambda x: x.cpu(), True),
            (lambda x: x.sum().cpu(), True),
            (lambda x: x + torch.tensor(1.0), False),
            (lambda x: x + torch.ones(3).to(x), True),
            (lambda x: bool((x > 0).all()), True),
            (lambda x: x.unique(), True),
            (lambda x: x.to_sparse(), True),
            (lambda x: x.cpu().tolist(), True),
            (lambda x: x.masked_fill(x > 0, 0.0).sort(), False),
            (lambda x: x.new_zeros(3) + torch.arange(3, device=x.device), False),
            (lambda x: torch.ones(3).sum().item(), False),
            (lambda x: torch.repeat_interleave(x, 2, output_size=6), False),
            (lambda x: x.index_fill(0, x.new_zeros(1, dtype=torch.int64), 1.0), False),
        ],
    )
    def test_of_operators(self, function, waits):
        x = torch.tensor([1.0, -1.0, 2.0]).to(DEVICE)
        with Waits() as seen:
            function(x)
        assert (seen.counts.total() > 0) is waits, seen.counts


PISA = "COCO-Detection/pisa_faster_rcnn_R_50_FPN_1x.yaml"
GUIDED = "COCO-Detection/mutual_guidance_retinanet_R_50_FPN_1x.yaml"
LIBRA_PISA = "COCO-Detection/libra_pisa_faster_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize("num_objects", [(3,), (3, 2), (3, 2, 1, 4)])
@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (LIBRA, BASELINE),
        ("COCO-Detection/ohem_faster_rcnn_R_50_FPN_1x.yaml", BASELINE),
        (PISA, BASELINE),
        (LIBRA_PISA, BASELINE),
        (RETINANET, RETINANET),
        ("Base-Libra-RetinaNet.yaml", RETINANET),
        (GUIDED, RETINANET),
    ],
)
def test_no_more_than_detectron2s(config, plain, num_objects):
    own = count_waits(config, (), num_objects)
    opts = PLAIN if plain == BASELINE else ("MODEL.META_ARCHITECTURE", "RetinaNet")
    theirs = count_waits(plain, opts, num_objects)
    more = 0
    if config == GUIDED:
        # The matching's, for a batch as a whole; each image saves some.
        more = max(0, 7 - 3 * len(num_objects))
    assert own.total() <= theirs.total() + more, (own, theirs)
