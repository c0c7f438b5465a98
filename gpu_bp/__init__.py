"""gpu_bp: backpropagation for dense networks, on CuPy (CUDA) or NumPy.

import gpu_bp
result = gpu_bp.train("configs/double-moon.toml")
result.summary["test"]["errors"]
"""

from gpu_bp import registry
from gpu_bp.backends import NumpyBackend, select
from gpu_bp.config import Config
from gpu_bp.config_file import dump_config, load_config, parse_config
from gpu_bp.data import Dataset, load_data
from gpu_bp.data.batches import Batches
from gpu_bp.data.source import Batch, Source
from gpu_bp.data.sources import ResidentSource
from gpu_bp.data.task import Task
from gpu_bp.errors import UserError
from gpu_bp.gradcheck import check_gradients
from gpu_bp.model import Model
from gpu_bp.network import Layer, Layout, Network, Signals
from gpu_bp.objective import Objective
from gpu_bp.optimizer import Optimizer
from gpu_bp.runs import Result, evaluate, resume, train
from gpu_bp.sharding import Sharding
from gpu_bp.step import Step
from gpu_bp.trainer import Trainer

__all__ = [
    "Batch",
    "Batches",
    "Config",
    "Dataset",
    "Layer",
    "Layout",
    "Model",
    "Network",
    "NumpyBackend",
    "Objective",
    "Optimizer",
    "ResidentSource",
    "Result",
    "Sharding",
    "Signals",
    "Source",
    "Step",
    "Task",
    "Trainer",
    "UserError",
    "check_gradients",
    "dump_config",
    "evaluate",
    "load_config",
    "load_data",
    "parse_config",
    "registry",
    "resume",
    "select",
    "train",
]
