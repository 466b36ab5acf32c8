"""Training and evaluation runs: config files, checks before a run, processes, the trainer."""

from .checks import check_run
from .config_file import load_config
from .launch import launch
from .lazy_trainer import LazyTrainer
from .run import main, make_parser
from .trainer import LibraTrainer

__all__ = [
    "LazyTrainer",
    "LibraTrainer",
    "check_run",
    "launch",
    "load_config",
    "main",
    "make_parser",
]
