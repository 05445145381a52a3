"""`train` from preference pairs: TRL's DPOTrainer over pairs that are token ids already.

The reference is what training begins as: the adapter of a warm start on its base, else the base alone. Its
log-probabilities are computed once, before the first step, without dropout, and never change: from the first whole
epoch on that is less work than asking a frozen copy in every step, and a resumed run computes the very same ones.
The policy has the dropout that `lora.dropout` says, and is noisy against the reference from the first step on unless
that is 0, which is TRL's habit for DPO. The rest is as for chats: seeds, checkpoints, resuming, the step log and the
files of the adapter.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retuner import training
from retuner.artifacts import AdapterFacts, Base, Chats, PreferenceFacts
from retuner.files import sha256_file
from retuner.generation import batches
from retuner.lora import WEIGHTS
from retuner.observe import Observer
from retuner.packing import NO_LOSS, PAD_ID, RowCounts
from retuner.ranks import Rank
from retuner.row_trainer import lora_plus, trainer_arguments, watched
from retuner.step_log import StepLog
from retuner.stopping import Stopping
from retuner.train_params import DpoParams

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
"""TRL's names: beta times what log-probabilities gained over the reference, how often more so for the chosen answer,
and by how much."""


def train(
    out: Path,
    work: Path,
    chats: Chats,
    base: Base,
    params: DpoParams,
    device: str,
    observer: Observer,
    start: Path | None = None,
) -> AdapterFacts:
    """As `retuner.training.train`."""
    observer.say(f"train: the reference is {'the adapter that training begins as' if start else 'the base'}")
    recipe = training.Recipe(count_pairs, lay_out_pairs, pair_trainer, REWARDS)
    with supervised_positions_alone():
        facts = training.train(out, work, chats, base, params, device, observer, start, recipe)
    reference = sha256_file(start / WEIGHTS) if start else None
    return facts.model_copy(update={"preference": PreferenceFacts(beta=params.dpo.beta, reference=reference)})


@contextmanager
def supervised_positions_alone() -> Iterator[None]:
    """Inside, TRL makes log-probabilities only where they count. By itself TRL 1.16 does so on GPUs; on a CPU, where
    logits over 49,152 words cost a 135M model more than the rest of it, it makes them of prompts and padding too."""
    from trl.trainer import utils

    before = utils._use_triton
    utils._use_triton = lambda device: True  # decides this and nothing else; the kernels ask one of their own
    try:
        yield
    finally:
        utils._use_triton = before


def count_pairs(chats: Path) -> RowCounts:
    """Tokens of both conversations of each pair; those of answers count as supervised."""
    prompts, chosen, rejected = _lengths(_read(chats / "train.arrow"))
    if not len(prompts):
        return RowCounts(0, 0, 0, 0)
    supervised = int(chosen.sum() + rejected.sum())
    longest = int(_longer(prompts, chosen, rejected).max())
    return RowCounts(len(prompts), int(2 * prompts.sum()) + supervised, supervised, longest)


def longer_conversations(chats: Path) -> Any:
    """Tokens of the longer conversation of each pair (pairs,)."""
    return _longer(*_lengths(_read(chats / "train.arrow")))


def lay_out_pairs(chats: Path, copy: Path) -> tuple[Any, int]:
    """The pairs, and how many tokens their two conversations may have together."""
    # What datasets derives from a file it writes beside it, and the chats belong to the store.
    shutil.copyfile(chats / "train.arrow", copy)
    return _read(copy), 2 * count_pairs(chats).longest_tokens


def pair_trainer(
    model: Any,
    pairs: Any,
    packed: bool,
    params: DpoParams,
    steps: int,
    device: str,
    staging: Path,
    log: StepLog,
    stopping: Stopping | None,
    rank: Rank,
) -> Any:
    """As `retuner.row_trainer.row_trainer`, in one process; pairs are not packed."""
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class PairTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            """TRL 1.16 would tokenise."""
            return dataset

        def _precompute_ref_logps(self, dataset, name, batch_size):
            """TRL's own shows no progress but a bar, and pads each pair to its neighbours in the file."""
            return _with_reference(self, dataset, batch_size, log)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            log.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def create_optimizer(self, model=None):
            self.optimizer = lora_plus(self, model, params) or super().create_optimizer(model)
            return self.optimizer

        def create_model_card(self, *args, **kwargs):
            """TRL writes one beside every checkpoint."""

    own = {
        "beta": params.dpo.beta,
        "loss_type": [params.dpo.loss_type],
        "label_smoothing": params.dpo.label_smoothing,
        "precompute_ref_log_probs": True,
        "disable_dropout": False,  # `train.lora.dropout` says what there is; the reference is computed without
        "max_length": None,
    }
    arguments = trainer_arguments(DPOConfig, params, steps, device, staging, rank, **own)
    collate = DataCollatorForPreference(pad_token_id=PAD_ID)
    trainer = watched(PairTrainer, arguments, collate, model, pairs, steps, staging, log, stopping)
    # TRL's copy of the adapter to compute the reference with; checkpoints would carry it on.
    model.delete_adapter("ref")
    return trainer


def _with_reference(trainer: Any, pairs: Any, batch_size: int, log: StepLog) -> Any:
    """The pairs with the reference's log-probabilities of both answers, as TRL names the columns.

    The reference is the model as it is before the first step, not TRL's copy of its adapter: that lacks what an adapter
    of embeddings has learned.
    """
    import numpy as np
    import torch

    found = np.zeros((2, len(pairs)))
    trainer.model.eval()
    done = 0
    for members in batches(_longer(*_lengths(pairs)).tolist(), batch_size):
        batch = trainer.data_collator([pairs[row] for row in members])
        batch = {name: value.to(trainer.accelerator.device) for name, value in batch.items()}
        labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, NO_LOSS)
        with torch.no_grad(), trainer.accelerator.autocast():
            logs = trainer.model(**batch, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        found[:, members] = logs.float().sum(dim=1).view(2, -1).cpu().numpy()
        done += len(members)
        log.observer.progress("reference", done, len(pairs), "log-probabilities of both answers")
    trainer.model.train()
    for name, values in zip(("ref_chosen_logps", "ref_rejected_logps"), found.tolist()):
        pairs = pairs.add_column(name, values)
    return pairs


def _read(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path)).select_columns(list(COLUMNS))


def _lengths(pairs: Any) -> list[Any]:
    """Tokens of prompts, chosen and rejected answers."""
    import pyarrow.compute as pc

    return [pc.list_value_length(pairs.data.column(name)).to_numpy() for name in COLUMNS]


def _longer(prompts: Any, chosen: Any, rejected: Any) -> Any:
    """Tokens of the longer conversation of each pair."""
    import numpy as np

    return prompts + np.maximum(chosen, rejected)
