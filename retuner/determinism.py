"""What makes numbers come out alike, and libraries keep quiet, while something is computed."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SAID_ALREADY = (
    "Setting `save_embedding_layers` to `True`",  # in checkpoints; the adapter's file has them not
    "Using Rank-Stabilized LoRA with rank_pattern",  # about a conversion of PEFT's that is not used
    "Careful, disabling adapter layers with bias",
    "Paged optimizers are not supported on CPU",
)
"""Beginnings of what PEFT and bitsandbytes warn of, that is known here and provided for."""


@contextmanager
def reproducible() -> Iterator[None]:
    """Deterministic algorithms, and as many threads as there are cores to use: sums of floats depend on both.

    Where torch has no deterministic algorithm it only warns, and on a GPU flash attention's backward pass then adds up
    in no fixed order either. Raising instead would give it one, and has not been tried there: one operation without
    such an algorithm would end a training, as would matrix products made before CUBLAS_WORKSPACE_CONFIG was set.
    """
    import psutil
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for bugs that costs time
    if "OMP_NUM_THREADS" not in os.environ:
        usable = len(os.sched_getaffinity(0))
        torch.set_num_threads(min(psutil.cpu_count(logical=False) or usable, usable))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.set_num_threads(before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and advice from transformers and datasets; errors pass."""
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 sets it by the name that transformers 5.23 has just renamed.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            for known in SAID_ALREADY:
                warnings.filterwarnings("ignore", known)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
