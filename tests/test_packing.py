"""Batches in one block of shared memory: the same as those that torch sends tensor by tensor."""

import multiprocessing

import pytest
import torch
from torch import Tensor

from libra_d2.data.packing import pack


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            assert_equal(x, y)
    else:
        assert one == other


BATCHES = {
    "nothing": [],
    "no tensors": [{"file_name": "a", "numbers": (1, 2.5, None)}],
    "empty tensors": [torch.zeros(0, 4), torch.zeros(3, 0, dtype=torch.int64)],
    "a scalar": [torch.tensor(7)],
    "dtypes": [
        torch.arange(1, 6).to(dtype)
        for dtype in (torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64)
    ],
    "images": [
        {
            "image": torch.arange(30, dtype=torch.uint8).view(3, 2, 5),
            "boxes": torch.arange(4.0 * n).view(n, 4),
        }
        for n in (1, 3, 0)
    ],
    "other tensors": [
        torch.arange(12).view(3, 4).T,  # not contiguous
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(1).expand(3),
    ],
}


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_packed_comes_out(name):
    assert_equal(pack(BATCHES[name]).unpack(), BATCHES[name])


def test_tensors_lie_in_one_shared_block():
    packed = pack([torch.ones(3, dtype=torch.uint8), torch.ones(2, 5), torch.ones(1)])
    assert packed.block.is_shared()
    tensors = packed.unpack()
    assert {t.untyped_storage().data_ptr() for t in tensors} == {packed.block.data_ptr()}
    starts = [t.data_ptr() - packed.block.data_ptr() for t in tensors]
    assert starts == [0, 64, 128]  # aligned, and none over another


def test_they_can_be_written_to():
    one, other = pack([torch.zeros(3), torch.zeros(3)]).unpack()
    one += 1
    assert torch.equal(one, torch.ones(3)) and torch.equal(other, torch.zeros(3))


def test_a_tensor_that_is_there_twice_stays_one():
    boxes = torch.ones(5, 4)
    packed = pack([boxes, {"again": boxes}])
    assert len(packed.places) == 1
    first, second = packed.unpack()
    assert first is second["again"]


def send(connection):
    for batch in BATCHES.values():
        connection.send(pack(batch))
    connection.recv()


def test_from_another_process():
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=send, args=(there,))
    process.start()
    try:
        for batch in BATCHES.values():
            assert here.poll(60)
            assert_equal(here.recv().unpack(), batch)
    finally:
        here.send("done")
        process.join()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned():
    batch = pack(BATCHES["images"]).pin_memory().unpack()
    assert_equal(batch, BATCHES["images"])
    assert all(image["image"].is_pinned() for image in batch)
