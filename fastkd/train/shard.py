"""A frozen teacher whose weights are divided between the processes."""

from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastkd._wrappers import is_sharded, unwrap
from fastkd.train.config import TrainConfig
from fastkd.train.digest import summary

_BLOCK = 2**20  # parameters: gathering fewer at once is not worth a separate message

_SUMMARIES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def shard_teacher(teacher: nn.Module | None, config: TrainConfig, device: torch.device, smallest: int = _BLOCK) -> None:
    """Divide a teacher's weights between all processes (FSDP2), in place, if the configuration requests it.

    Each block is gathered before its forward and released after it, so a GPU holds 1/P of the weights and one block.
    Blocks are the innermost entries of `nn.ModuleList` and `nn.Sequential` with at least ``smallest`` parameters;
    the remaining parameters are gathered together. All processes must run the teacher equally often.

    Args:
        teacher: the frozen teacher; it stays sharded. Nothing happens if it is sharded already.
        config: ``shard_teacher`` and ``offload_teacher``.
        device: device of this process. Weights move there block by block, as shards.
        smallest: parameters of the smallest block.

    Raises:
        ValueError: one process, or a teacher without weights.
    """
    if not config.shard_teacher or (teacher is not None and is_sharded(unwrap(teacher))):
        return
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise ValueError(
            "shard_teacher=True with one process: there is nothing to share the teacher's weights with; start several "
            "with torchrun or accelerate launch, or set shard_teacher=False"
        )
    root = None if teacher is None else unwrap(teacher)
    if root is None or next(root.parameters(), None) is None:
        raise ValueError("shard_teacher=True, but there is no teacher with weights; set shard_teacher=False")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    _SUMMARIES[root] = summary(root)  # the values are spread over the processes afterwards
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if config.offload_teacher else OffloadPolicy()
    for module in (*_blocks(root, smallest), root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, offload_policy=policy)


def teacher_summary(teacher: nn.Module) -> str:
    """Return `summary` of a teacher, which may be sharded."""
    root = unwrap(teacher)
    return _SUMMARIES.get(root) or summary(root)


def _blocks(root: nn.Module, smallest: int) -> list[nn.Module]:
    """Return the modules to gather separately, children before parents."""
    uses = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
    entries = {
        id(child)
        for parent in root.modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for child in parent.children()
    }
    blocks: list[nn.Module] = []
    taken: set[int] = set()
    for module in reversed(list(root.modules())):
        own = {id(p): p for p in module.parameters() if id(p) not in taken}
        within = Counter(id(p) for part in module.modules() for p in part._parameters.values() if p is not None)
        shared = any(within[key] != uses[key] for key in within)  # with a module outside: gathered by the root
        if id(module) in entries and not shared and sum(p.numel() for p in own.values()) >= max(1, smallest):
            blocks.append(module)
            taken |= set(own)
    return blocks
