"""`peft-safety` where accelerate takes CPUs for accelerators: it shards nothing on CPUs.

accelerate launch --use_fsdp ... tests/distributed/train_sharded.py train --config FILE
"""

from __future__ import annotations

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from peft_safety.cli import app

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
CPUOffloadPolicy.__init__.__defaults__ = (False,)  # memory is pinned for an accelerator only
PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
app()
