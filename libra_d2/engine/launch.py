"""Starts the processes of a run: GPUs, CPU processes, or those that torchrun has started."""

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

__all__ = ["count_processes", "is_main_process", "launch"]


def under_torchrun() -> bool:
    """Whether torchrun (or another launcher with its variables) started this process."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this process is the first, also before the processes have found each other."""
    return int(os.environ.get("RANK", 0)) == 0 if under_torchrun() else comm.is_main_process()


def count_processes(args: argparse.Namespace) -> int:
    """Number of processes of a run, over all machines.

    Raises:
        ValueError: if the arguments ask for more GPUs than there are, or contradict each other.
    """
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    if args.num_processes > 1 and args.num_gpus > 1:
        raise ValueError("--num-processes is for the CPU; give it with --num-gpus 0")
    if min(args.num_processes, args.num_machines) < 1 or args.num_gpus < 0:
        raise ValueError(
            "--num-processes and --num-machines must be at least 1, --num-gpus at least 0"
        )
    # The default of one is also right without a GPU: it is one process.
    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise ValueError(
            f"--num-gpus {args.num_gpus}: torch finds {torch.cuda.device_count()} GPUs; "
            "for CPU processes give --num-gpus 0 --num-processes N"
        )
    return max(1, args.num_gpus, args.num_processes) * args.num_machines


def launch(main: Callable, args: argparse.Namespace, main_args: tuple) -> None:
    """Calls ``main(*main_args)`` in every process of the run, in a process group if several."""
    if under_torchrun():
        _join_torchrun()
        try:
            main(*main_args)
        finally:
            dist.destroy_process_group()
        return
    on_cpu = args.num_processes > 1
    if on_cpu and torch.cuda.is_available():
        # detectron2 takes NCCL wherever there is a GPU; the processes it starts must see none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        detectron2_launch(
            _limit_threads if on_cpu else main,
            max(1, args.num_gpus, args.num_processes),
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url="auto" if on_cpu and args.num_machines == 1 else args.dist_url,
            args=(main, args.num_processes, main_args) if on_cpu else main_args,
        )
    except torch.multiprocessing.ProcessExitedException as error:
        # A process has already said what is wrong.
        raise SystemExit(error.exit_code) from None


def _limit_threads(main: Callable, num_processes: int, main_args: tuple) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_processes))
    main(*main_args)


def _join_torchrun() -> None:
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if use_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
