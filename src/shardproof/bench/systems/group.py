"""The process group that peers expect to find."""

import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """This process's place in the default group; where it is alone, a group of its own is made."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()
