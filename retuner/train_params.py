"""The settings of training: the adapter, how it learns, and by which recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from retuner.strict import AboveZero, Fraction, Positive, Strict


class LoraParams(Strict):
    """The adapter. A name is that of a module (`o_proj`) or the end of its path (`layers.0.mlp.down_proj`)."""

    rank: Positive
    alpha: AboveZero
    dropout: Fraction
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)]
    """`all-linear`, or names such as qkv_proj, o_proj, gate_up_proj, down_proj, embed_tokens; parts of fused
    layers as qkv_proj.q or, by Llama's name, q_proj."""
    layers: (
        Literal["all"]
        | Annotated[str, Field(pattern=r"^\d+-\d+$")]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    )
    """`all`, a range such as 16-31, or a list; the others stay as they are."""
    rank_pattern: dict[str, Positive]
    """Other ranks for some layers, by name; the longest name that fits counts."""
    alpha_pattern: dict[str, AboveZero]
    modules_to_save: tuple[str, ...]
    """Modules that learn in full and are saved beside the adapter, e.g. embed_tokens, lm_head, norm."""
    bias: Literal["none", "all", "lora_only"]
    rslora: bool
    dora: bool
    init: Literal["default", "pissa", "pissa_fast", "olora"]
    """What A and B start as. Only `default` leaves the base as it is while training; the adapter is written as
    plain LoRA of twice the rank, for the unchanged base, in any case."""
    learning_rate_ratio: Annotated[float, Field(ge=1)] | None
    """LoRA+: how many times the learning rate of A that of B is; null for the same."""


class QuantizationParams(Strict):
    """The base's linear layers while training: in 4 bits (QLoRA), or in float8, see `retuner.float8`."""

    kind: Literal["nf4", "fp4", "float8"]
    double: bool
    """Quantise the scales of 4 bits too: 0.4 bits a weight less."""

    @model_validator(mode="after")
    def _scales_that_there_are(self):
        if self.kind == "float8" and self.double:
            raise ValueError("kind float8 has a scale for each row, too few to quantise: set double to false")
        return self


class StopEarlyParams(Strict):
    """Stop when the held-out loss stops falling; the adapter is that of the step with the lowest one."""

    every_steps: Positive
    patience: Positive
    """How many measurements in a row may bring no improvement."""
    min_improvement: Annotated[float, Field(ge=0)]
    """Nats a token that count as one."""


class TrainParams(Strict):
    """LoRA training over pre-tokenised rows: what all recipes have."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    precision: Literal["float32", "bfloat16"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    kernels: Literal["torch", "liger"]
    """Liger's fused RMSNorm, RoPE, SwiGLU and, for sft, head with loss, on a GPU; the base is a Phi-3."""
    max_steps: Positive | None
    epochs: Annotated[float, Field(gt=0)] | None
    batch_size: Positive
    """Sequences (packed where `template.pack_tokens` is a number) at a time. A step takes these times
    gradient_accumulation, however many processes share them."""
    gradient_accumulation: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_fraction: Fraction
    optimizer: Literal[
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "paged_adamw_8bit", "paged_adamw_32bit"
    ]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    warm_start: Literal["none", "production"]
    quantization: QuantizationParams | None
    gradient_checkpointing: bool | Literal["auto"]
    """Activations are computed a second time and not kept: a third slower. `auto`: where they would not fit, see
    `retuner.planner`. The adapter is the same."""
    checkpoint_every_steps: Positive
    log_every_steps: Positive
    lora: LoraParams

    @model_validator(mode="after")
    def _one_length(self):
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("exactly one of max_steps and epochs must be a number, the other null")
        return self

    @model_validator(mode="after")
    def _float8_beside_bfloat16(self):
        if self.quantization and self.quantization.kind == "float8":
            if self.precision != "bfloat16":
                raise ValueError(
                    f"precision is {self.precision}: float8 products come out in bfloat16, set that"
                )
            if self.lora.dora:
                raise ValueError("lora.dora needs the base's weights as numbers: no float8 with it")
        return self

    @model_validator(mode="after")
    def _one_beginning(self):
        if self.lora.init != "default" and self.warm_start != "none":
            raise ValueError(
                f"warm_start is {self.warm_start} and lora.init is {self.lora.init}: an adapter begins once"
            )
        if self.lora.init != "default" and self.quantization:
            raise ValueError(
                f"lora.init is {self.lora.init}, which takes its share out of the base's weights, and "
                "quantization would round what is left: use init default"
            )
        return self


class SftParams(TrainParams):
    """To answer as the rows do: TRL's SFTTrainer, packed as the template stage planned."""

    recipe: Literal["sft"]
    label_smoothing: Fraction
    """Share of the target that is spread evenly over the vocabulary."""
    noise_alpha: AboveZero | None
    """NEFTune: uniform noise of ±alpha/√(tokens·width) on a row's embeddings while training."""
    stop_early: StopEarlyParams | None


class DpoSettings(Strict):
    """Rafailov et al., "Direct Preference Optimization" (2023). The reference is what training begins as."""

    beta: AboveZero
    """How dear it is to leave the reference: the reward of an answer is beta times what its log-probability gained."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"]
    """By TRL's names; `robust` is `sigmoid` where a share of the pairs is known to be the wrong way round."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)]
    """That share, for `robust`."""

    @model_validator(mode="after")
    def _smoothing_that_is_used(self):
        if (self.loss_type == "robust") != (self.label_smoothing > 0):
            raise ValueError(
                f"loss_type is {self.loss_type} and label_smoothing {self.label_smoothing:g}: robust needs a share "
                "above 0, the other losses know none"
            )
        return self


class DpoParams(TrainParams):
    """To prefer chosen to rejected answers: TRL's DPOTrainer."""

    recipe: Literal["dpo"]
    dpo: DpoSettings

    @model_validator(mode="after")
    def _the_reference_can_be_kept(self):
        for setting, found, needed in (
            ("lora.init", self.lora.init, "default"),
            ("lora.bias", self.lora.bias, "none"),
            ("quantization", self.quantization, None),
        ):
            if found != needed:
                raise ValueError(
                    f"{setting} must be {'null' if needed is None else needed} with recipe dpo, whose reference is the "
                    "base as it is, or with the adapter that training begins as"
                )
        return self
