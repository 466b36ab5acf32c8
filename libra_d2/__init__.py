"""libra_d2: balanced learning for object detection, for detectron2.

Importing ``libra_d2`` needs torch alone: ``add_libra_config`` and ``Detector`` are imported when
they are first used. ``libra_d2.modeling`` and ``libra_d2.data`` register what they hold with
detectron2 when they are imported.
"""

import importlib
from typing import Any

__all__ = ["Detector", "add_libra_config"]
__version__ = "0.1.0"

_PUBLIC = {"Detector": "libra_d2.inference.detector", "add_libra_config": "libra_d2.config"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'libra_d2' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
