"""The last rank raises while the others wait for it."""

import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("the last rank gives up")
    dist.barrier()
