"""What holds for every test."""

import os

import torch as th

from support.mpi import clean_environment


def test_tests_see_no_gpu():
    """Nor do the programs that they start."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == clean_environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert not th.cuda.is_available()
