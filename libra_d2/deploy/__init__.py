"""Exports trained detectors to files that run without this project."""

from .bundle import bundle_files, export_detector
from .export import FORMATS

__all__ = ["FORMATS", "bundle_files", "export_detector"]
