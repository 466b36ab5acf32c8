"""Exports trained detectors to files that run without this project."""

from .export import FORMATS, check_exportable, export_model, open_exported

__all__ = ["FORMATS", "check_exportable", "export_model", "open_exported"]
