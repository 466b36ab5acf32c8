"""Batches that travel between processes in one piece.

torch passes each tensor of a batch by a file descriptor of its own, which costs the process that
trains more time the more images a batch has, and runs out of descriptors where many are allowed to
wait. Here all tensors of a batch lie in one block of shared memory.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedBatch", "pack"]

_ALIGNMENT = 64  # bytes; of any dtype, and of what CPUs load at once


@dataclass
class PackedBatch:
    """What :func:`pack` gives.

    Args:
        content: the batch without its tensors, pickled.
        places: of each tensor, where it begins in the block, its dtype and its shape.
        block: uint8, in shared memory or, once it has arrived, pinned.
    """

    content: bytes
    places: list[tuple[int, torch.dtype, torch.Size]]
    block: Tensor

    def pin_memory(self) -> "PackedBatch":
        """The same in memory that a GPU copies from at once; torch's loader calls it."""
        return PackedBatch(self.content, self.places, self.block.pin_memory())

    def unpack(self) -> Any:
        """The batch; its tensors are views of the block, not copies."""
        return _Unpickler(self.content, [_view(self.block, *place) for place in self.places]).load()


def pack(batch: Any) -> PackedBatch:
    """Puts the tensors of a batch into one block of shared memory.

    Args:
        batch: whatever can be pickled. Tensors that are not dense and contiguous on a CPU, or need
            gradients, travel as torch sends them.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(batch)
    places, size = [], 0
    for tensor in pickler.tensors:
        places.append((size, tensor.dtype, tensor.shape))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    # As torch's own collation does it: made in shared memory, a block need not be copied there.
    block = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    for place, tensor in zip(places, pickler.tensors, strict=True):
        _view(block, *place).copy_(tensor)
    return PackedBatch(stream.getvalue(), places, block)


def _view(block: Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return block[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Pickler(ForkingPickler):
    """Leaves plain tensors out, and has them in a list."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Tensor or not _is_plain(value):
            return None
        if id(value) not in self._numbers:  # ids stay as long as the list has the tensors
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, tensors: Sequence[Tensor]):
        super().__init__(io.BytesIO(content))
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.requires_grad or tensor.is_quantized)
    )
