"""A run, or several, on one page of HTML."""

from .page import write_report

__all__ = ["write_report"]
