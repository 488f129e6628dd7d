"""Imported once by a process that forks ranks (`pretrain.ranks`): what takes seconds to import, and starts nothing."""

import os

import torch

from parallel import library

library.import_deepspeed(cuda=os.path.exists("/dev/nvidiactl"))
torch.set_num_threads(1)
