"""Starts the processes of a run: GPUs, CPU processes, or those that torchrun has started."""

import argparse
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from .speed import amp_dtype
from .stopping import STATUSES, StoppedError, how_to_resume

__all__ = ["check_processes", "count_processes", "is_main_process", "launch", "settle_device"]


# What MODEL.DEVICE is until a file or an override says otherwise.
AUTO = "auto"


def settle_device(cfg: CfgNode) -> None:
    """Sets ``MODEL.DEVICE`` where it is not given: to a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    has_gpu = torch.cuda.is_available()
    if cfg.MODEL.DEVICE == AUTO:
        cfg.MODEL.DEVICE = "cuda" if has_gpu else "cpu"
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError:
        raise ValueError(
            f"MODEL.DEVICE must be a device of torch such as cuda or cpu, got '{cfg.MODEL.DEVICE}'"
        ) from None
    if device.type == "meta":
        raise ValueError("MODEL.DEVICE meta holds no numbers; use cuda or cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE} but torch finds {torch.cuda.device_count()} GPUs; "
            "use MODEL.DEVICE cpu where there is none"
        )
    amp_dtype(cfg)


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher with its variables) started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()


def is_main_process() -> bool:
    """Whether this process is the first, also before the processes have found each other."""
    return int(os.environ.get("RANK", 0)) == 0 if under_torchrun() else comm.is_main_process()


def count_processes(args: argparse.Namespace) -> int:
    """Number of processes of a run, over all machines.

    Raises:
        ValueError: if the arguments contradict each other.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if min(args.num_processes, args.num_machines) < 1 or args.num_gpus < 0:
        raise ValueError(
            "--num-processes and --num-machines must be at least 1, --num-gpus at least 0"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank must be in [0, {args.num_machines - 1}] of {args.num_machines} "
            f"machines, got {args.machine_rank}"
        )
    if args.num_processes > 1 and args.num_gpus > 0:
        raise ValueError("--num-processes is for the CPU; give --num-gpus 0 with it")
    return max(1, args.num_gpus, args.num_processes) * args.num_machines


def check_processes(args: argparse.Namespace, device: str) -> None:
    """Checks that each process of this machine can have the device it needs.

    Raises:
        ValueError: if there are too few GPUs, one for several, or GPUs are asked for and not.
    """
    on_gpu = torch.device(device).type == "cuda"
    num_gpus = int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else args.num_gpus
    index, num_processes = torch.device(device).index, count_processes(args)
    if on_gpu and index is not None and num_processes > 1:
        raise ValueError(
            f"MODEL.DEVICE {device} is one GPU and there are {num_processes} processes; give "
            "MODEL.DEVICE cuda"
        )
    if on_gpu and args.num_gpus == 0:
        raise ValueError(f"--num-gpus 0 and MODEL.DEVICE {device} contradict each other")
    # One GPU is the default, which also without a GPU means one process.
    if num_gpus > max(1, torch.cuda.device_count()) and (on_gpu or not under_torchrun()):
        raise ValueError(
            f"{num_gpus} GPUs are asked for and torch finds {torch.cuda.device_count()}; "
            "for CPU processes give --num-gpus 0 --num-processes N"
        )
    if not on_gpu and args.num_gpus > 1 and not under_torchrun():
        raise ValueError(
            f"--num-gpus {args.num_gpus} and MODEL.DEVICE {device} contradict each other; for CPU "
            "processes give --num-gpus 0 --num-processes N"
        )


def launch(main: Callable, args: argparse.Namespace, device: str, main_args: tuple) -> None:
    """Calls ``main(*main_args)`` in every process of the run, in a process group if several."""
    on_gpu = torch.device(device).type == "cuda"
    if under_torchrun():
        _join_torchrun(on_gpu)
        main(*main_args)
        # Not where it fails: NCCL would wait there for processes that do not know.
        dist.destroy_process_group()
        return
    if on_gpu and (index := torch.device(device).index) is not None:
        torch.cuda.set_device(index)  # of which random states are kept, and memory is told
    on_cpu, num_processes = args.num_processes > 1, max(1, args.num_gpus, args.num_processes)
    if on_cpu and torch.cuda.is_available():
        # detectron2 takes NCCL wherever there is a GPU; the processes it starts must see none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    starts_processes = num_processes * args.num_machines > 1
    # detectron2's default is one port for all runs of a user.
    is_named = not on_cpu and args.dist_url != default_argument_parser().get_default("dist_url")
    with _as_parent() if starts_processes else contextlib.nullcontext():
        detectron2_launch(
            _limit_threads if on_cpu else main,
            num_processes,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url="auto" if args.num_machines == 1 and not is_named else args.dist_url,
            args=(main, args.num_processes, main_args) if on_cpu else main_args,
        )


@contextlib.contextmanager
def _as_parent() -> Iterator[None]:
    """Hands signals on to the processes that are started, and ends as the first of them to fail.

    Raises:
        StoppedError: if one was killed.
    """
    parent, received = os.getpid(), []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if os.getpid() == parent:
            received.append(number)
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)

    before = {number: signal.signal(number, hand_on) for number in STATUSES}
    try:
        yield
    except ProcessExitedException as error:
        if error.signal_name and received:
            name = signal.Signals(received[0]).name
            raise StoppedError(f"stopped by {name}", STATUSES[received[0]]) from None
        if error.signal_name:
            what = f"process {error.error_index} of the run was ended by {error.signal_name}"
            raise StoppedError(f"{what}; go on with:\n  {how_to_resume()}", 1) from None
        raise SystemExit(error.exit_code) from None  # which has said why
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _limit_threads(main: Callable, num_processes: int, main_args: tuple) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    main(*main_args)


def _join_torchrun(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, num_processes = next(dist.rendezvous("env://"))
    # torchrun's store still has what processes left there that were started before.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"start{start}", store),
        rank=rank,
        world_size=num_processes,
        timeout=DEFAULT_TIMEOUT,  # processes wait while the first one scores
    )
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
