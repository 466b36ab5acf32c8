"""A trained model at work: predictions from Python and from the command line."""

from libra_d2.quiet import silence_known_warnings

silence_known_warnings()

from .detector import Detector
from .result import Result

__all__ = ["Detector", "Result"]
