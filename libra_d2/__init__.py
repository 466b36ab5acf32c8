"""libra_d2: balanced learning for object detection, for detectron2.

Importing ``libra_d2`` needs torch alone. ``libra_d2.modeling`` and ``libra_d2.data`` register what
they hold with detectron2 when they are imported.
"""

__version__ = "0.1.0"
