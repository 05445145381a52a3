"""What each name of a TrainingArguments, LoraConfig, model or trainer means in a params file: one row a name.

A row is a group, the names (old ones included) and its rules; the first rule whose `only` accepts the value decides.
Without a rule that does, the value is refused.
"""

from typing import Any

from retuner.tutorial_rules import (
    PROJECTIONS,
    Entry,
    Rule,
    already,
    dtype,
    fused,
    instead,
    is_llama,
    keep,
    names_a_repository,
    of_phi3,
    off,
    on,
    one_of,
    only_off,
    only_off_whatever,
    plain_dtype,
    positive,
    refuse,
    row,
)

MAX_TOKENS, PACK_TOKENS = "template.max_tokens", "template.pack_tokens"
WARMUP_STEPS, PACKING, SAMPLING = "warm-up steps", "packing", "sampling"
"""No settings, but turned into some: a fraction, once the number of steps is known, the length of a pack, and how
answers are drawn."""

PINNED = {"microsoft/Phi-3-mini-4k-instruct": "f39ac1d28e925b323eae81227eaba4464caced4e"}
"""Commits of bases whose files say nothing of one."""

GONE = {
    "overwrite_output_dir": "gone from transformers 5",
    "evaluation_strategy": "eval_strategy in transformers 5",
    "warmup_ratio": "gone from transformers 5",
    "logging_dir": "gone from transformers 5",
    "group_by_length": "gone from transformers 5",
    "no_cuda": "use_cpu in transformers 5",
    "max_seq_length": "max_length in TRL 1",
    "num_of_sequences": "gone from TRL 1",
    "chars_per_token": "gone from TRL 1",
    "dataset_batch_size": "gone from TRL 1",
    "tokenizer": "processing_class in TRL 1",
    "torch_dtype": "dtype in transformers 5",
    "use_flash_attention_2": "attn_implementation in transformers 5",
    "load_metric": "gone from datasets 3",
}
"""Names that the tutorial uses and today's libraries refuse: its scripts stop here."""


REMOTE_CODE = (
    already("always so: no code of a model's repository is ever run", off),
    refuse(
        "runs whatever code the model's repository holds; transformers has Phi-3 built in",
        "leave it out: the same model loads without it",
    ),
)
SCALE_OF_MACHINE = instead("how a run is spread over machines is not part of what it is: see RETUNER_DEVICE")
LOG = instead("what is printed is not part of a run: RETUNER_LOG_LEVEL, and `--debug` for tracebacks")
HUB = (already("nothing is uploaded, here neither", off), refuse("nothing is uploaded to a hub",
    "leave it out: versions are kept in MLflow; `retuner export` writes the files to upload"))  # fmt: skip
BY_OTHERS = "rows are token ids by then: `prepare` and `template` made them"
HELD_OUT = "base, production and candidate are scored on held-out prompts after training, in every run"
NO_SETTING = "Retuner has no such setting"
ONE_LENGTH = (
    keep(MAX_TOKENS, only=positive),
    already("the length is decided elsewhere", off),
)

TABLE: tuple[Entry, ...] = (
    # How the optimizer goes
    row("training", "learning_rate", keep("train.learning_rate")),
    row("training", "lr_scheduler_type", keep("train.schedule")),
    row("training", "lr_scheduler_kwargs", only_off(NO_SETTING)),
    row("training", "warmup_ratio", keep("train.warmup_fraction")),
    row("training", "warmup_steps",
         keep("train.warmup_fraction", weak=True, only=lambda v: isinstance(v, float) and v < 1),
         already("no warm-up but a ratio's", off), keep(WARMUP_STEPS, only=positive)),
    row("training", "num_train_epochs", keep("train.epochs")),
    row("training", "max_steps", keep("train.max_steps", why="epochs decide", value=lambda v: None,
         only=lambda v: not positive(v)), keep("train.max_steps")),
    row("training", "per_device_train_batch_size", keep("train.batch_size")),
    row("training", "gradient_accumulation_steps", keep("train.gradient_accumulation")),
    row("training", "optim",
         Rule("changed", "the name is gone; PyTorch's AdamW takes its place", "train.optimizer",
              lambda v: "adamw_torch", one_of("adamw_hf", "adamw")),
         keep("train.optimizer", do="leave it out: adamw_torch takes its place")),
    row("training", "optim_args optim_target_modules", only_off(NO_SETTING)),
    row("training", "weight_decay", keep("train.weight_decay")),
    row("training", "adam_beta1", already("always so", one_of(0.9)), refuse(f"{NO_SETTING}: it is 0.9")),
    row("training", "adam_beta2", already("always so", one_of(0.999)), refuse(f"{NO_SETTING}: it is 0.999")),
    row("training", "adam_epsilon", already("always so", one_of(1e-8)), refuse(f"{NO_SETTING}: it is 1e-8")),
    row("training", "max_grad_norm", keep("train.max_grad_norm")),
    row("training", "label_smoothing_factor", already("not used, here neither", off),
         keep("train.label_smoothing")),
    row("training trainer", "neftune_noise_alpha", already("not used, here neither", off),
         keep("train.noise_alpha")),
    row("training", "seed", keep("train.seed")),
    row("training", "data_seed", already("the order of rows follows train.seed", off),
         keep("train.seed", weak=True, why="one seed for everything")),
    row("training", "full_determinism", already(
         "always so, flash attention on a GPU aside: the same inputs give the same bytes",
         lambda v: isinstance(v, bool))),
    row("seeding", "seed", Rule("changed", "the Trainer seeds itself again, with its own `seed` or 42: "
         "train.seed is that one", any_value=True)),
    # Precision and memory
    row("training", "bf16", keep("train.precision", value=lambda v: "bfloat16", only=on),
         already("the dtype decides", off)),
    row("training", "fp16 bf16_full_eval fp16_full_eval", already("not used, here neither", off),
         refuse("float16 needs loss scaling, and steps of 1e-4 are lost in it",
                "leave it out; train.precision: bfloat16 is what it is for")),
    row("training", "tf32", only_off(f"{NO_SETTING}: it would change results between machines")),
    row("training", "gradient_checkpointing", keep("train.gradient_checkpointing", only=one_of(True, False))),
    row("training", "gradient_checkpointing_kwargs", already("always non-reentrant",
         lambda v: v is None or v == {"use_reentrant": False}),
         Rule("changed", "always non-reentrant: the other form needs inputs that learn, and a frozen base has none",
              only=lambda v: v == {"use_reentrant": True})),
    row("training", "activation_checkpointing activation_checkpointing_kwargs activation_offloading",
         only_off(NO_SETTING, "leave it out; train.gradient_checkpointing saves memory")),
    row("training", "use_liger use_liger_kernel", keep("train.kernels", value=lambda v: "liger", only=on,
         note="needs EXTRAS=liger"), keep("train.kernels", value=lambda v: "torch", only=off)),
    row("training", "torch_compile torch_compile_backend torch_compile_mode liger_kernel_config "
         "auto_find_batch_size torch_empty_cache_steps", only_off(NO_SETTING)),
    row("training model", "use_cache", already("always so while training: packed rows are kept apart by it", off),
         Rule("changed", "off while training, where it would let packed rows see each other; on for answers",
              only=on)),
    row("model training", "attn_implementation _attn_implementation", keep("train.attention",
         only=one_of("flash_attention_2"), note="sdpa where flash-attn is not installed"),
         keep("train.attention")),
    row("model", "use_flash_attention_2", already("attn_implementation decides", off),
         Rule("changed", "", "train.attention", lambda v: "flash_attention_2", on,
              note="sdpa where flash-attn is not installed")),
    row("model", "torch_dtype dtype", keep("train.precision", value=plain_dtype, weak=True,
         only=dtype("bfloat16", "float32")),
         Rule("changed", "part of what a run is, so not left to the model's files", "train.precision",
              lambda v: "bfloat16", one_of("auto"), weak=True),
         already("bf16 decides", off),
         refuse("no precision of a run here", "leave it out; train.precision is bfloat16 or float32")),
    row("model tokenizer training answering", "trust_remote_code", REMOTE_CODE),
    row("model answering", "device_map low_cpu_mem_usage return_dict offload_folder cache_dir local_files_only",
         SCALE_OF_MACHINE),
    row("model tokenizer data training answering", "token hub_token use_auth_token",
         Rule("changed", "credentials come from the environment (HF_TOKEN), never from a file", any_value=True)),
    row("model", "pretrained_model_name_or_path model_name_or_path model_id base_model_name_or_path "
         "checkpoint_path model_name", keep("base.repo", only=names_a_repository),
         refuse("no name of a hub's repository", "write base: {source: local, path: ...} into the params file "
                "where it is a folder")),
    row("model", "revision model_revision", keep("base.commit")),
    row("model", "quantization_config", only_off(f"{NO_SETTING}: the base is trained on in train.precision")),
    row("model quantization", "load_in_4bit", already("not used, here neither", off),
         keep("train.quantization", value=lambda v: {"kind": "fp4", "double": False}, only=on)),
    row("quantization", "bnb_4bit_quant_type", keep("train.quantization.kind", only=one_of("nf4", "fp4"))),
    row("quantization", "bnb_4bit_use_double_quant", keep("train.quantization.double")),
    row("quantization", "bnb_4bit_compute_dtype", keep("train.precision", value=plain_dtype, weak=True,
         only=dtype("bfloat16", "float32")), refuse("no precision of a run here",
         "leave it out; train.precision decides")),
    row("quantization", "bnb_4bit_quant_storage", only_off(NO_SETTING)),
    row("model quantization", "load_in_8bit", only_off(f"{NO_SETTING}: bases are whole or in 4 bits",
         "leave it out, or ask for load_in_4bit")),
    # The rows
    row("training trainer", "max_length max_seq_length", ONE_LENGTH),
    row("tokenizer", "model_max_length", keep(MAX_TOKENS, weak=True, only=positive)),
    row("training trainer", "packing", keep(PACKING, only=one_of(True, False),
         why="rows share a sequence whole and never see each other; theirs cuts and mixes them")),
    row("training trainer", "packing_strategy", already("whole rows, best fit", one_of("bfd")),
         Rule("changed", "whole rows, best fit: the other ways cut rows or let them see each other",
              any_value=True)),
    row("training trainer", "eval_packing num_of_sequences chars_per_token", instead(
         "held-out rows are scored one by one")),
    row("training", "padding_free", already("not used, here neither", off), Rule("changed",
         "packing does this", PACKING, lambda v: True, on, weak=True)),
    row("training", "pad_to_multiple_of pad_token eos_token", instead("the base's own tokens and template decide")),
    row("training", "truncation_mode", already("the start of a row is kept", one_of("keep_start")),
         refuse("only the end of a row can be cut off")),
    row("training trainer", "dataset_text_field dataset_kwargs dataset_num_proc dataset_batch_size "
         "remove_unused_columns label_names length_column_name data_collator shuffle_dataset",
         instead(BY_OTHERS)),
    row("training", "chat_template_path", only_off("the base's own template decides the layout")),
    row("training", "assistant_only_loss completion_only_loss", already("always so", one_of(True)),
         Rule("changed", "loss is on the assistant's text and the token that ends its turn, never on the prompt",
              only=lambda v: not v)),
    row("training", "loss_type", already("always so", one_of("nll")), refuse(f"{NO_SETTING}: it is nll")),
    row("trainer", "formatting_func", only_off_whatever("a prompt format of one's own, that serving would not use",
         "leave it out: give chats as messages, and the base's own template lays them out")),
    row("trainer", "tokenizer processing_class", instead("the base's own tokenizer")),
    row("tokenizer", "pad_token pad_token_id padding_side padding", instead(
         "padding carries no loss, and packed rows have none")),
    # Data
    row("trainer", "train_dataset eval_dataset", instead(
         "which prompts are held out is decided by their hash: prepare.held_out_fraction")),
    row("data", "path name split data_files data_dir streaming", instead(
         "chats lie in data/, and data.dvc names their bytes: `dvc add data`")),
    row("split", "test_size", keep("prepare.held_out_fraction", only=lambda v: isinstance(v, float) and v <= 0.5,
         why="of the prompts"), refuse("a share of the prompts is held out", "write it as a fraction up to 0.5")),
    row("split", "seed random_state", Rule("changed", "the split is by a hash of the prompt, salted by this: "
         "a row never changes sides when data grows", "prepare.split_salt", str)),
    row("split", "shuffle train_size stratify_by_column", instead("the split is by a hash of the prompt")),
    # Evaluation
    row("training", "do_train do_eval do_predict eval_strategy evaluation_strategy eval_steps eval_delay "
         "eval_on_start eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
         "batch_eval_metrics include_for_metrics prediction_loss_only", instead(HELD_OUT)),
    row("training", "per_device_eval_batch_size", Rule("changed", "prompts that are answered at a time",
         "evaluate.batch_size")),
    row("training", "load_best_model_at_end", only_off("the adapter of the last step is what is scored, unless "
         "train.stop_early says to keep the best", "leave it out, and set train.stop_early in the params file")),
    row("training", "metric_for_best_model greater_is_better", only_off("the gate decides, by register.gate")),
    row("trainer", "compute_metrics preprocess_logits_for_metrics compute_loss_func", only_off_whatever(
         "code cannot be translated", "leave it out; evaluate.metrics names what is measured")),
    row("trainer", "callbacks optimizers optimizer_cls_and_kwargs", only_off_whatever("code cannot be translated")),
    row("early_stopping", "early_stopping_patience early_stopping_threshold", refuse(
         "train.stop_early is one setting of how often to measure, patience and least improvement",
         "leave it out, and set train.stop_early in the params file")),
    row("generation", "max_new_tokens", keep("evaluate.max_new_tokens")),
    row("generation", "do_sample", keep(SAMPLING, only=one_of(True, False))),
    row("generation", "temperature", keep("evaluate.sampling.temperature", only=positive)),
    row("generation", "top_k", keep("evaluate.sampling.top_k", only=positive),
         keep("evaluate.sampling.top_k", value=lambda v: None, only=off)),
    row("generation", "top_p", keep("evaluate.sampling.top_p", only=positive)),
    row("generation", "num_beams", already("always so", one_of(1)), refuse("answers are greedy or drawn, not searched "
         "for")),
    row("generation", "repetition_penalty", already("always so", one_of(1.0)), refuse(
         f"{NO_SETTING}: a penalty hides what the adapter has not learnt")),
    # Records
    row("training", "output_dir overwrite_output_dir", instead(
         "a result lies in .retuner/ under its fingerprint: nothing is overwritten, and what is there is served")),
    row("training", "save_strategy", already("always so", one_of("steps")), Rule("changed",
         "sealed checkpoints every train.checkpoint_every_steps, so that a killed run goes on",
         only=one_of("epoch", "no"))),
    row("training", "save_steps", keep("train.checkpoint_every_steps", only=lambda v: isinstance(v, int))),
    row("training", "save_total_limit", instead(
         "the newest two sealed checkpoints are kept: one may be damaged by what killed the run")),
    row("training", "save_only_model save_on_each_node save_safetensors ignore_data_skip enable_jit_checkpoint "
         "resume_from_checkpoint restore_callback_states_from_checkpoint", instead(
         "a checkpoint holds all that the same bytes need, and the newest whole one is resumed by itself")),
    row("training", "logging_strategy", already("always so", one_of("steps")), Rule("changed",
         "every train.log_every_steps", any_value=True)),
    row("training", "logging_steps", keep("train.log_every_steps", only=lambda v: isinstance(v, int))),
    row("training", "report_to run_name project logging_dir trackio_space_id trackio_bucket_id "
         "trackio_static_space_id", instead("every run is recorded in MLflow: RETUNER_TRACKING_URI says which")),
    row("training", "log_level log_level_replica log_on_each_node disable_tqdm logging_first_step debug "
         "skip_memory_metrics include_num_input_tokens_seen", LOG),
    row("training", "logging_nan_inf_filter", instead("a loss that is not finite stops the run in its step")),
    row("training", "push_to_hub hub_model_id hub_private_repo hub_always_push hub_revision push_to_hub_model_id "
         "push_to_hub_token push_to_hub_organization", HUB),
    row("training", "hub_strategy", instead("nothing is uploaded to a hub")),
    # Machines
    row("training", "use_cpu no_cuda local_rank average_tokens_across_devices accelerator_config "
         "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
         "dataloader_multiprocessing_context dataloader_in_order ddp_backend ddp_timeout ddp_bucket_cap_mb "
         "ddp_broadcast_buffers ddp_static_graph ddp_find_unused_parameters", SCALE_OF_MACHINE),
    row("training", "fsdp fsdp_config deepspeed parallelism_config", only_off("no setting of a run",
         "leave it out: a machine's own configuration says how a run is spread")),
    row("training", "dataloader_drop_last", already("always so: every row is trained on", off),
         refuse("every row is trained on")),
    row("training", "train_sampling_strategy", already("always so", one_of("random")), refuse(NO_SETTING)),
    row("training", "group_by_length", already("not used, here neither", off),
         Rule("changed", "packing does better: nothing is padded", only=on)),
    row("training", "model_init_kwargs router_aux_loss_coef", only_off(NO_SETTING)),
    # The adapter
    row("peft", "r lora_r", keep("train.lora.rank")),
    row("peft", "lora_alpha", keep("train.lora.alpha")),
    row("peft", "lora_dropout", keep("train.lora.dropout")),
    row("peft", "bias", keep("train.lora.bias")),
    row("peft", "use_rslora", keep("train.lora.rslora", only=one_of(True, False))),
    row("peft", "use_dora", keep("train.lora.dora", only=one_of(True, False))),
    row("peft", "target_modules lora_target_modules", keep("train.lora.targets", only=one_of("all-linear")),
         Rule("changed", "Phi-3 has q, k, v in qkv_proj and gate, up in gate_up_proj; PEFT would pass over the "
              "parts' names and adapt the rest only, or nothing", "train.lora.targets", fused,
              lambda v: is_llama(v) and of_phi3(v)),
         keep("train.lora.targets", only=of_phi3),
         refuse("names what Phi-3 does not have, or cannot be adapted",
                f"all-linear, or some of {', '.join(PROJECTIONS)}")),
    row("peft", "task_type lora_task_type", already("always so", lambda v: v in (None, "CAUSAL_LM")),
         refuse("Retuner trains chat models", "task_type: CAUSAL_LM")),
    row("peft", "peft_type", already("always so", lambda v: v in (None, "LORA")), refuse("Retuner trains LoRA")),
    row("peft", "modules_to_save lora_modules_to_save", already("not used, here neither", off),
         keep("train.lora.modules_to_save")),
    row("peft", "rank_pattern", already("not used, here neither", off), keep("train.lora.rank_pattern")),
    row("peft", "alpha_pattern", already("not used, here neither", off), keep("train.lora.alpha_pattern")),
    row("peft", "layers_to_transform", already("not used, here neither", off),
         keep("train.lora.layers", value=lambda v: v if isinstance(v, list) else [v])),
    row("peft", "init_lora_weights", already("as ever: B is zero", one_of(True)),
         keep("train.lora.init", only=one_of("pissa", "olora")), refuse(f"{NO_SETTING}, or none that is safe")),
    row("peft", "inference_mode auto_mapping peft_version runtime_config megatron_core qalora_group_size",
         instead("PEFT's own bookkeeping")),
    row("peft", "base_model_name_or_path", keep("base.repo", weak=True, only=names_a_repository),
         already("the model decides", off)),
    row("peft", "revision", keep("base.commit", weak=True, only=lambda v: isinstance(v, str)),
         already("the model decides", off)),
    row("peft", "exclude_modules layers_pattern fan_in_fan_out loftq_config megatron_config lora_bias "
         "trainable_token_indices eva_config corda_config lora_ga_config velora_config alora_invocation_tokens "
         "use_qalora monteclora_config layer_replication target_parameters use_bdlora arrow_config kasa_config "
         "ensure_weight_tying", only_off(NO_SETTING)),
    # loralib's own layers
    row("loralib", "r", keep("train.lora.rank", weak=True)),
    row("loralib", "lora_alpha", keep("train.lora.alpha", weak=True)),
    row("loralib", "lora_dropout", keep("train.lora.dropout", weak=True)),
    row("loralib", "enable_lora fan_in_fan_out merge_weights bias", refuse(
         "layers are not replaced by hand: PEFT adapts the fused projections whole",
         "leave it out; train.lora.targets names the projections")),
    row("loralib", "in_features out_features num_embeddings embedding_dim in_channels out_channels kernel_size",
         instead("the base's own sizes")),
    # What code does
    row("code", "eos_as_text", refuse("the number of the end token is appended as text, so a model learns to write "
         "it and never to stop", "leave it out: <|end|> ends every answer as a token, and carries loss")),
    row("code", "input_without_input", refuse("\"Input:\" is appended where there is no input too",
         "leave it out: an Alpaca row's input is added where there is one")),
    row("code", "unseeded_split", refuse("without a seed the split is another one in every process, so a model is "
         "evaluated on rows it was trained on", "leave it out: prompts are held out by their hash, for good")),
    row("code", "eval_on_training_rows", refuse("evaluated on the rows it is trained on",
         "leave it out: held-out prompts are never trained on")),
    row("code", "load_metric evaluate.load", refuse("fetches code from a hub and runs it",
         "leave it out: evaluate.metrics has rouge_1, rouge_l and others, kept locally")),
    row("code", "push_to_hub", refuse("nothing is uploaded to a hub",
         "leave it out: versions are kept in MLflow; `retuner export` writes the files to upload")),
    row("code", "merge_and_unload", instead("`retuner export VERSION --to merged`, with a parity check")),
    row("code", "prepare_model_for_kbit_training", instead("done where the base is quantised")),
    row("code", "mark_only_lora_as_trainable", instead("only the adapter learns; the run says how many weights")),
    row("code", "lora_state_dict load_state_dict", instead(
         "checkpoints are sealed safetensors; `retuner import loralib` and `export --to loralib` speak loralib's")),
    row("code", "wandb.init wandb.login", instead("every run is recorded in MLflow: RETUNER_TRACKING_URI says which")),
    row("code", "login notebook_login", instead("nothing here needs an account")),
    row("code", "settings_changed", refuse("changes settings in a way that only running it would tell",
         "write the settings that result")),
    row("code", "unreadable_cell", refuse("what is not Python cannot be read", "mend the cell, or leave it out")),
)  # fmt: skip

OTHERWISE = {
    "answering": instead("a finished adapter is loaded by `retuner serve` or as an MLflow model; no setting of a run"),
    "generation": instead("no setting of a run: the model that is served takes requests, OpenAI-style"),
    "data": instead("chats lie in data/, and data.dvc names their bytes"),
    "tokenizer": instead("the base's own tokenizer and chat template are used as they are"),
}  # fmt: skip
"""For groups whose every other name means the same."""

THEIR_DEFAULTS: dict[str, Any] = {
    "train.seed": 42,
    "train.precision": "float32",
    "train.attention": "sdpa",
    "train.kernels": "torch",
    "train.max_steps": None,
    "train.epochs": 3.0,
    MAX_TOKENS: 1024,
    "train.batch_size": 8,
    "train.gradient_accumulation": 1,
    "train.learning_rate": 5e-5,
    "train.schedule": "linear",
    "train.warmup_fraction": 0.0,
    "train.optimizer": "adamw_torch",
    "train.weight_decay": 0.0,
    "train.max_grad_norm": 1.0,
    "train.gradient_checkpointing": False,
    "train.checkpoint_every_steps": 500,
    "train.log_every_steps": 500,
    "train.lora.rank": 8,
    "train.lora.alpha": 8,
    "train.lora.dropout": 0.0,
    "train.lora.targets": "all-linear",
    "train.lora.bias": "none",
    "train.lora.rslora": False,
    "train.lora.dora": False,
}
"""What a run of theirs does where its file is silent."""

SFT_DEFAULTS: dict[str, Any] = {
    "train.precision": "bfloat16",
    "train.learning_rate": 2e-5,
    "train.gradient_checkpointing": True,
    "train.log_every_steps": 10,
}
"""Where SFTConfig's defaults are others."""
