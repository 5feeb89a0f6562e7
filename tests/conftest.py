"""One thread per test process: the suite runs on as many processes as there are cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch as th

th.set_num_threads(1)
