"""What a training must know of the processes that train beside it: its share of a batch, and what all agree on.

Each process holds the whole model (ddp) or its part of it (fsdp) and learns from other sequences of the same optimizer
step; torch.distributed, through accelerate, adds the gradients up. The sequences of a step are those of one process.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from retuner.errors import Refused
from retuner.packing import NO_LOSS, PAD_ID
from retuner.train_params import TrainParams


@dataclass(frozen=True)
class Rank:
    """Which of so many processes this one is. That of rank 0 writes and talks."""

    number: int = 0
    of: int = 1
    strategy: str = "ddp"

    @property
    def leads(self) -> bool:
        return self.number == 0


ALONE = Rank()


def share(params: TrainParams, processes: int) -> tuple[int, int]:
    """Sequences at a time, and how often a step, of each process: together what the params say.

    Errors: Refused when that cannot be.
    """
    together = params.batch_size * params.gradient_accumulation
    if together % processes:
        raise Refused(
            f"train.batch_size x gradient_accumulation is {together} sequences a step, for {processes} processes",
            f"a multiple of {processes}: with other params it would be another training",
            "change RETUNER_PROCESSES or --processes",
        )
    mine = together // processes
    at_once = max(size for size in range(1, params.batch_size + 1) if mine % size == 0)
    return at_once, mine // at_once


class EvenOrder:
    """The order in which one process would take the sequences of an epoch; after it `blank` as often as it takes to
    give each process as many batches. A sampler; accelerate would begin again from the first sequences instead."""

    def __init__(self, sequences: int, seed: int, together: int):
        from accelerate.data_loader import SeedableRandomSampler

        self.shuffled = SeedableRandomSampler(range(sequences), data_seed=seed)
        self.blank, self.lacking = sequences, -sequences % together

    def set_epoch(self, epoch: int) -> None:
        self.shuffled.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self.shuffled
        yield from [self.blank] * self.lacking

    def __len__(self) -> int:
        return self.blank + self.lacking


def with_blank(sequences: Any) -> Any:
    """And after the last a sequence of one token, from which nothing is learned."""
    from datasets import Dataset, concatenate_datasets

    blank = {"input_ids": [[PAD_ID]], "labels": [[NO_LOSS]], "seq_lengths": [[1]]}
    columns = {name: blank[name] for name in sequences.column_names}
    return concatenate_datasets([sequences, Dataset.from_dict(columns, features=sequences.features)])


@contextmanager
def forward_is(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """For what must go through a wrapper's own forward, which is how the wrapper knows that a pass began."""
    before = module.forward
    module.forward = lambda **given: forward(
        {name: value for name, value in given.items() if value is not None}
    )
    try:
        yield
    finally:
        module.forward = before


def agreed(rank: Rank, decide: Callable[[], Any]) -> Any:
    """What the leading process decides, which alone does so, for all."""
    from accelerate.utils import broadcast_object_list

    if rank.of == 1:
        return decide()
    return broadcast_object_list([decide() if rank.leads else None])[0]


def summed(rank: Rank, number: int) -> int:
    """Over all processes."""
    import torch
    from accelerate.utils import reduce

    if rank.of == 1:
        return number
    from accelerate import PartialState

    return int(reduce(torch.tensor(number, device=PartialState().device), reduction="sum"))
