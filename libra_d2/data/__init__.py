"""Data sets. Importing this package registers the embedded ones with detectron2."""

from .digits import register_digits

register_digits()
