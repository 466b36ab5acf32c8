"""A device of torch that only pretends: its tensors lie on the CPU, and mix with no others.

What code would do on a GPU can so be tried without one: a tensor made on the wrong device is an
error, as it is there, and what would let the host wait can be counted. torch can't make tensors of
Python's numbers there (``torch.tensor``, ``new_tensor``): it fails with an internal error.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils import _mode_utils, backend_registration
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["DEVICE", "needs_pretence"]

DEVICE = "pretended"
# Not beside a GPU, whose place as torch's accelerator it would take.
HAS_PRETENCE = not torch.cuda.is_available() and hasattr(
    backend_registration, "_setup_privateuseone_for_python_backend"
)
needs_pretence = pytest.mark.skipif(
    not HAS_PRETENCE, reason="needs torch's backends in Python, and no GPU"
)

# Where an index may lie on the CPU.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# What torch makes by giving an empty tensor its size, which a wrapper's would not follow.
_RESIZED = ("arange", "arange.start", "arange.start_step", "linspace", "randperm")


class _Pretended(Tensor):
    """A tensor of the device around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE, 0),
        )
        self.held = held
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, *args, **kwargs or {})

    def __repr__(self):
        return f"{self.held!r} on {DEVICE}"

    def __reduce_ex__(self, protocol):  # as checkpoints are read: onto the CPU
        return self.held.__reduce_ex__(protocol)

    def tolist(self):  # which torch does not have of subclasses
        return self.cpu().tolist()


def _compute(func, *args, **kwargs):
    """What an operator gives, computed on the CPU and put where a GPU would have it."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    own = [x for x in tensors if isinstance(x, _Pretended)]
    name, device = func.overloadpacket.__name__, kwargs.get("device")
    stays = bool(own) if device is None else torch.device(device).type == DEVICE
    if name == "copy_":
        stays = isinstance(args[0], _Pretended)
    elif name != "_to_copy" and own:
        one_place = [args[0]] if name in _INDEXING else tensors
        others = [x for x in one_place if not isinstance(x, _Pretended)]
        if any(x.dim() > 0 for x in others):
            raise RuntimeError(f"{func} of tensors of two devices, some of {others}")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held = tree_map(lambda x: x.held if isinstance(x, _Pretended) else x, (args, kwargs))
    result = func(*held[0], **held[1])
    if torch.Tag.inplace_view in func.tags:  # the wrapper has a new shape too
        with _mode_utils.no_dispatch():
            func(*args, **kwargs)
    wrappers = {id(x.held): x for x in own}

    def put(x):
        if not isinstance(x, Tensor) or id(x) in wrappers:
            return wrappers.get(id(x), x)
        return _Pretended(x) if stays else x

    return tree_map(put, result)


class _Backend(backend_registration._DummyBackendModule if HAS_PRETENCE else object):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


if HAS_PRETENCE:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Backend())
    _fallback = torch.library.Library("_", "IMPL")
    _fallback.fallback(_compute, "PrivateUse1")
    _operators = torch.library.Library("aten", "IMPL")
    for _name in _RESIZED:
        _packet, _, _overload = _name.partition(".")
        _operator = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _operators.impl(_name, partial(_compute, _operator), "PrivateUse1")
