"""TRL's SFTTrainer, told to train on packed rows as they are, to seal its checkpoints and to keep quiet."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retuner import checkpoints
from retuner.fused_kernels import has_fused_head, head_nats
from retuner.lora import refuse_not_finite
from retuner.noise import EmbeddingNoise
from retuner.packing import NO_LOSS, PAD_ID, collator, take_token_count
from retuner.quantized import adapter_stays_float32
from retuner.ranks import ALONE, EvenOrder, Rank, forward_is, share, summed, with_blank
from retuner.sharded import SETTINGS, sharding
from retuner.step_log import StepLog
from retuner.stopping import Stopping
from retuner.train_params import SftParams, TrainParams

PAD = "<pad>"


def row_trainer(
    model: Any,
    sequences: Any,
    packed: bool,
    params: SftParams,
    steps: int,
    device: str,
    staging: Path,
    log: StepLog,
    stopping: Stopping | None = None,
    rank: Rank = ALONE,
) -> Any:
    """A Trainer that is ready to `train(resume_from_checkpoint=...)`; it seals checkpoints beside `staging`.

    Its `train` raises RetunerError in the step in which a number stops being finite, and returns before the last
    step where `stopping` says so.
    """
    from transformers import set_seed
    from trl import SFTConfig, SFTTrainer

    noise = EmbeddingNoise(model, params.noise_alpha) if params.noise_alpha else None
    fused = has_fused_head(model, params)
    ours = fused or makes_logits(model, params, device) or rank.of > 1
    order = None
    if rank.of > 1:
        order = EvenOrder(len(sequences), params.seed, share(params, rank.of)[0] * rank.of)
        sequences = with_blank(sequences)

    class RowTrainer(sharding(SFTTrainer) if rank.strategy == "fsdp" else SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            log.tokens += take_token_count(inputs)
            if noise:
                noise.expect(inputs)
            if not ours:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            base = self.model.get_base_model()

            def loss(batch):
                # Gradients are averaged over the processes, and their sum is meant.
                return rank.of * supervised_loss(
                    base, batch, num_items_in_batch, params.label_smoothing, fused
                )

            with self.accelerator.autocast():
                if rank.of == 1:
                    return loss(inputs)
                with forward_is(base, loss):
                    return model(**inputs)

        def _get_train_sampler(self, *args):
            return order or super()._get_train_sampler(*args)

        def _load_rng_state(self, checkpoint):
            if checkpoints.processes(Path(checkpoint)) == rank.of:
                super()._load_rng_state(checkpoint)
            else:
                set_seed(params.seed + self.state.global_step + rank.number)

        def create_optimizer(self, model=None):
            self.optimizer = lora_plus(self, model, params) or super().create_optimizer(model)
            return self.optimizer

        def create_model_card(self, *args, **kwargs):
            """TRL writes one beside every checkpoint."""

    # Packed and masked already; left to itself TRL would cut rows to 1024 tokens.
    own = {"packing": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    arguments = trainer_arguments(SFTConfig, params, steps, device, staging, rank, **own)
    collate = collator(packed, model.config._attn_implementation)
    trainer = watched(
        RowTrainer,
        arguments,
        collate,
        model,
        sequences,
        steps,
        staging,
        log,
        stopping,
        rank,
        order,
    )
    if rank.number:
        set_seed(params.seed + rank.number)  # Other sequences, other noise.
    return trainer


def watched(
    kind: Any,
    arguments: Any,
    collate: Any,
    model: Any,
    sequences: Any,
    steps: int,
    staging: Path,
    log: StepLog,
    stopping: Stopping | None,
    rank: Rank = ALONE,
    order: EvenOrder | None = None,
) -> Any:
    """A trainer of a TRL class, which says its steps to `log` and seals its checkpoints; `order` is that in which it
    takes sequences, where not the Trainer's own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            # accelerate's own way does not reach the order where batches are skipped in one of several processes.
            if order:
                order.set_epoch(int(state.epoch or 0))

        def on_train_begin(self, args, state, control, **kwargs):
            log.begin(state.log_history)
            if stopping:
                stopping.begin(state.log_history)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == steps:
                # The Trainer, resumed from its last step, would take one more.
                control.should_save = False

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:  # There is a summary at the end too.
                log.tokens = summed(rank, log.tokens)
                log.take(state.log_history[-1])
                if stopping and stopping.is_due(state.global_step):
                    self.consider(stopping, state, control)

        def consider(self, stopping, state, control):
            """Before the Trainer saves, so that a checkpoint knows what was measured at its own step."""
            step = state.global_step
            state.log_history.append(
                stopping.measure(model.get_base_model(), step, trainer.accelerator.autocast)
            )
            if stopping.is_time and step < steps:
                control.should_training_stop = True
                log.end(step)
            ends = stopping.is_time or step == steps
            control.should_save = not ends and (control.should_save or stopping.best_step == step)

        def on_save(self, args, state, control, **kwargs):
            refuse_not_finite(model, state.global_step)
            staged = staging / f"checkpoint-{state.global_step}"
            best = stopping.best_step if stopping else None
            # Each process has written its generators' state there.
            trainer.accelerator.wait_for_everyone()
            if rank.leads:
                checkpoints.seal(staging.parent, staged, state.global_step, keep=best)
            trainer.accelerator.wait_for_everyone()

    # The rows need no tokenizer, only TRL's constructors do.
    stub = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({PAD: PAD_ID}, unk_token=PAD)),
        pad_token=PAD,
        eos_token=PAD,
    )
    with adapter_stays_float32(model):
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=sequences,
            data_collator=collate,
            processing_class=stub,
            callbacks=[Watch()],
        )
    # Kept, it would be saved in every checkpoint and its token ids written into the model's config.
    trainer.processing_class = None
    trainer.remove_callback(PrinterCallback)
    return trainer


def stop_when(trainer: Any, asked: Callable[[], bool], steps: int, rank: Rank) -> None:
    """From now on its `train` returns, with the step under way sealed, once `asked` is true in any process."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < steps and summed(rank, asked()):
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stop())


def trainer_arguments(
    kind: Any, params: TrainParams, steps: int, device: str, staging: Path, rank: Rank, **own: Any
) -> Any:
    """The arguments of a TRL class, of which `own` are those that others do not have."""
    per_device, accumulation = share(params, rank.of)
    # `auto` that no plan has decided means what needs less memory.
    checkpointed = bool(params.gradient_checkpointing)
    arguments = kind(
        output_dir=str(staging),
        seed=params.seed,
        use_cpu=device == "cpu",
        bf16=params.precision == "bfloat16",
        max_steps=steps,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        ddp_find_unused_parameters=False,
        fsdp=True if rank.strategy == "fsdp" else None,
        fsdp_config=dict(SETTINGS) if rank.strategy == "fsdp" else None,
        learning_rate=params.learning_rate,
        lr_scheduler_type=params.schedule,
        warmup_steps=math.ceil(steps * params.warmup_fraction),
        optim=params.optimizer,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        gradient_checkpointing=checkpointed,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointed else None,
        dataloader_pin_memory=device == "cuda",
        save_strategy="steps",
        save_steps=params.checkpoint_every_steps,
        # Every step is logged to StepLog, which averages. A NaN must show, not be averaged away.
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **own,
    )
    # Where several GPUs are visible to one process, TRL refuses; one is what a run asks for.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def makes_logits(model: Any, params: SftParams, device: str) -> bool:
    """Whether one process makes the logits of a whole batch at once. TRL's own loss on a GPU makes them in small
    parts, but knows no smoothing that would not cost it a second pass, and takes the head for frozen; Liger's makes
    them so too, and knows smoothing."""
    if has_fused_head(model, params):
        return False
    head = model.get_output_embeddings()
    head_learns = any(weight.requires_grad for weight in head.parameters())
    return device == "cpu" or params.label_smoothing > 0 or head_learns


def lora_plus(trainer: Any, model: Any, params: TrainParams) -> Any:
    """PEFT's LoRA+ optimizer, where params ask for it: B, biases and magnitudes learn `learning_rate_ratio` times as
    fast."""
    from peft.optimizers import create_loraplus_optimizer

    if params.lora.learning_rate_ratio is None:
        return None
    model = model or trainer.model
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    return create_loraplus_optimizer(
        model,
        kind,
        loraplus_lr_ratio=params.lora.learning_rate_ratio,
        loraplus_weight_decay=params.weight_decay,
        # Left to itself PEFT takes 1e-6 for adapters of embeddings, whatever the learning rate is.
        loraplus_lr_embedding=params.learning_rate,
        **settings,
    )


def mean_loss(model: Any, sequences: Any, packed: bool) -> float:
    """Nats a supervised token of a few sequences, one after another, without dropout."""
    import torch

    was_training = model.training
    model.eval()
    collate = collator(packed, model.config._attn_implementation)
    enabled, nats, tokens = model.dtype == torch.bfloat16, 0.0, 0
    for sequence in sequences:
        batch = collate([sequence])
        take_token_count(batch)
        batch = {
            name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()
        }
        tokens += int((batch["labels"][:, 1:] != NO_LOSS).sum())
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=enabled):
            nats += float(supervised_loss(model.get_base_model(), batch, items=1))
    model.train(was_training)
    return nats / max(tokens, 1)


def supervised_loss(
    causal: Any, inputs: dict[str, Any], items: Any, label_smoothing: float = 0.0, fused: bool = False
) -> Any:
    """Nats summed over the batch's supervised tokens, divided by `items`. `label_smoothing` is torch's; `fused` is
    whether by Liger's kernel, see `retuner.fused_kernels`.

    Logits are made for supervised positions only. TRL does so on GPUs; on a CPU it makes them for every
    position, three times over, which with a vocabulary of 49 152 costs a 135M model more than the rest of it.
    """
    import torch

    targets = inputs.pop("labels")[:, 1:]
    supervised = targets != NO_LOSS
    hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    head, hidden, targets = causal.get_output_embeddings(), hidden[supervised], targets[supervised]
    if fused and len(targets):  # A blank has none.
        nats = head_nats(head, hidden, targets, label_smoothing)
    else:
        nats = torch.nn.functional.cross_entropy(
            head(hidden).float(), targets, reduction="sum", label_smoothing=label_smoothing
        )
    return nats / torch.as_tensor(items).clamp(min=1)
