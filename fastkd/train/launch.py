"""Check the trainer's settings against the environment variables of a launcher.

``accelerate launch`` passes its options and config file on as environment variables; only this module reads them. The
trainer uses its own settings and raises an error if the environment contradicts them, so the settings in a log are the
ones in effect.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fastkd._runtime import pick_device, pick_precision
from fastkd.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import PartialState

_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sharded parallelism",
}


def requested(config: TrainConfig, environ: Mapping[str, str] = os.environ) -> tuple[torch.device, str]:
    """Return the configured device and precision; "auto" follows the environment.

    Raises:
        ValueError: the environment contradicts the configuration or requests a feature that the trainer lacks; the
            message names the variable.
    """
    for variable, strategy in _SHARDED.items():
        if _flag(environ, variable):
            raise ValueError(
                f"{variable}={environ[variable]} requests {strategy}; the trainer is data-parallel only: start it with "
                "torchrun or accelerate launch --multi_gpu (shard_teacher=True shards a large teacher), or use the "
                "Distiller in your own loop"
            )
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no") and not (backend.lower() == "inductor" and config.compile_student):
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend} contradicts compile_student={config.compile_student} of the "
            "configuration: set compile_student=True, which compiles with inductor, and start it without "
            "--dynamo_backend, or unset the variable"
        )
    steps = environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1", str(config.accumulate)):
        raise ValueError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} contradicts accumulate={config.accumulate} of the "
            "configuration: make them equal, or unset the variable (batch_size is the total per step)"
        )
    device = pick_device(_device(config.device, environ))
    return device, pick_precision(_precision(config.precision, environ), device)


def join(config: TrainConfig) -> tuple[PartialState, torch.device, str]:
    """Join the other processes of this run, if any; return the process state, this process's device and the precision.

    Raises:
        ValueError: as in `requested`; also processes that cannot be joined or use another device type.
    """
    from accelerate import PartialState

    device, precision = requested(config)
    state = PartialState(cpu=device.type == "cpu")
    distributed = str(getattr(state.distributed_type, "value", state.distributed_type))
    if distributed in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):  # the caller made an Accelerator
        raise ValueError(f"accelerate was set up for {distributed} in this process; the trainer is data-parallel only")
    if state.num_processes == 1:
        world_size = os.environ.get("WORLD_SIZE", "1")
        if world_size.isdigit() and int(world_size) > 1:
            raise ValueError(
                f"WORLD_SIZE={world_size}, but this process joined no others (LOCAL_RANK is "
                f"{os.environ.get('LOCAL_RANK', 'not set')}), so each would train alone: start them with torchrun or "
                "accelerate launch, or unset WORLD_SIZE"
            )
        return state, device, precision
    if torch.device(state.device).type != device.type:
        raise ValueError(
            f"the {state.num_processes} processes were joined on {state.device}, but the configuration has "
            f"device={config.device!r}: do not create an Accelerator first, or set device='auto'"
        )
    if config.device != "auto" and torch.device(config.device).index is not None:
        raise ValueError(
            f"device={config.device!r} with {state.num_processes} processes: each needs its own device; set "
            "device='auto'"
        )
    return state, torch.device(state.device), precision


def _device(name: str, environ: Mapping[str, str]) -> str:
    variable = "ACCELERATE_USE_CPU" if _flag(environ, "ACCELERATE_USE_CPU") else "ACCELERATE_TORCH_DEVICE"
    requested_device = "cpu" if variable == "ACCELERATE_USE_CPU" else environ.get(variable)
    if not requested_device or name == "auto":
        return requested_device or name
    if name.partition(":")[0] != requested_device.partition(":")[0]:
        raise ValueError(
            f"{variable}={environ[variable]} contradicts device={name!r} of the configuration: set device='auto', or "
            "unset the variable"
        )
    return name


def _precision(name: str, environ: Mapping[str, str]) -> str:
    mixed = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed in ("", "no"):  # the default of accelerate launch
        return name
    if mixed not in ("bf16", "fp16"):
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={mixed}: the trainer computes in fp32, bf16 or fp16; start it with "
            "--mixed_precision no, bf16 or fp16, or unset the variable"
        )
    if name not in ("auto", mixed):
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={mixed} contradicts precision={name!r} of the configuration: set "
            f"precision={mixed!r} or 'auto', or start it with --mixed_precision no"
        )
    return mixed


def _flag(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")
