"""Reads pickles of numbers without running code that they may hold."""

import pickle
from typing import Any

__all__ = ["read_pickle"]

# What a pickle of lists and arrays is made of. Anything else could run code.
_HARMLESS = {
    ("_codecs", "encode"),
    ("detectron2.structures.boxes", "BoxMode"),
    *(
        (f"numpy.{core}multiarray", name)
        for core in ("core.", "_core.")
        for name in ("_reconstruct", "scalar")
    ),
    *((f"numpy.{core}numeric", "_frombuffer") for core in ("core.", "_core.")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _HARMLESS:
            raise ValueError(f"holds {module}.{name}, not only lists and numpy arrays")
        return super().find_class(module, name)


def read_pickle(file: str) -> Any:
    """The content of a pickle of lists, dicts, strings, numbers and numpy arrays.

    Raises:
        ValueError: if it is none, or holds anything else, which could run any code.
    """
    try:
        with open(file, "rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError("is not a pickle") from error
