"""Silences warnings of libraries that are known, harmless and not for the user to act on.

To be called before detectron2 is imported; needs torch alone. Each is named by its own words, so
that no other warning is lost.
"""

import functools
import logging
import warnings

__all__ = ["silence_known_warnings"]

_WARNINGS = (
    r".*torch\.jit\.script.* is deprecated",  # detectron2, at import
    r".*torch\.meshgrid: in an upcoming release",  # detectron2's anchors
    r".*This DataLoader will create \d+ worker processes",
    r".*broadcast_buffers.* is deprecated",  # detectron2's way to make DDP
    r".*torch\.cuda\.amp\.(GradScaler|autocast)\(.*is deprecated",  # detectron2's AMPTrainer
    r"Importing from timm\.models\.layers is deprecated",  # detectron2's ViT and Swin
    r".*'pin_memory' argument is set as true but no accelerator is found",
)
_LOG_MESSAGES = {
    "torch.fx._symbolic_trace": "is_fx_tracing will return true",  # detectron2's checks of tracing
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


@functools.cache  # filters would pile up
def silence_known_warnings() -> None:
    """Filters exactly the known warnings, in this process and those it forks."""
    for pattern in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for logger, beginning in _LOG_MESSAGES.items():
        logging.getLogger(logger).addFilter(
            lambda record, beginning=beginning: beginning not in record.getMessage()
        )
