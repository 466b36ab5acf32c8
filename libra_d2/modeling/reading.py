"""Which class of a model reads which switches: a switch that none reads would be ignored."""

from detectron2.config import CfgNode
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    ProposalNetwork,
    SemanticSegmentor,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from libra_d2.config import get_key

from .retinanet import LibraRetinaNet
from .roi_heads import LibraROIHeads
from .rpn import LibraRPN

__all__ = ["check_switches_are_read"]

_META, _HEADS = "MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"
_RPN = "MODEL.PROPOSAL_GENERATOR.NAME"
# Where a config names the classes that may read switches, and this project's.
_READERS = {
    _META: (META_ARCH_REGISTRY, LibraRetinaNet),
    _HEADS: (ROI_HEADS_REGISTRY, LibraROIHeads),
    _RPN: (PROPOSAL_GENERATOR_REGISTRY, LibraRPN),
}
# Those that a kind of model has.
_PLACES = {
    DenseDetector: (_META,),
    GeneralizedRCNN: (_HEADS, _RPN),
    ProposalNetwork: (_RPN,),
    SemanticSegmentor: (),
}


def check_switches_are_read(cfg: CfgNode) -> None:
    """Refuses a switch that asks for something and that no class of the model reads.

    Raises:
        ValueError: naming the switch and the class that would read it.
    """
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    places = next((own for kind, own in _PLACES.items() if issubclass(model, kind)), None)
    if places is None:
        return  # a user's own model may read anything
    present = []
    for place in places:
        registry, name = _READERS[place][0], get_key(cfg, place)
        if name in registry:
            present.append(registry.get(name))
        elif name != "PrecomputedProposals":
            return  # which is said when the model is built
    # A user's own class may read anything.
    if not all(hasattr(c, "switches") or c.__module__.startswith("detectron2.") for c in present):
        return
    read = {key for c in present for key in getattr(c, "switches", ())}
    # First the readers that this kind of model can have: PISA's switches have two.
    for place in sorted(_READERS, key=lambda place: place not in places):
        reader = _READERS[place][1]
        for key, nothing_new in reader.switches.items():
            if key not in read and get_key(cfg, key) not in nothing_new:
                kind = "" if place in (*places, _META) else " of a two-stage detector"
                own = get_key(cfg, place if place in places else _META)
                raise ValueError(
                    f"{key} {get_key(cfg, key)} needs {place} {reader.__name__}{kind}, got {own}"
                )
