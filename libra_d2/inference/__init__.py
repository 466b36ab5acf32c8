"""A trained model at work: predictions from Python and from the command line."""

from .detector import Detector
from .result import Result

__all__ = ["Detector", "Result"]
