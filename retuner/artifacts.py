"""The typed facts that stages exchange.

An artifact is a sealed folder of the store (`path`), the fingerprint it was made under, the digest
of its contents, and the facts that later stages and people want without opening a file.
"""

from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseFacts(Facts):
    """`fetch_base`: config.json, generation_config.json, model*.safetensors, tokenizer files, chat template."""

    source: str
    """`smollm2`, `tiny`, `local` or `REPO@COMMIT`."""
    architecture: str
    parameters: int
    weights_sha256: str
    """Digest over the weight files, in name order."""
    tokenizer_sha256: str
    template_sha256: str
    stop_token_ids: tuple[int, ...]


class SplitsFacts(Facts):
    """`prepare`: train.jsonl and held_out.jsonl, a conversation a line
    `{"id", "group", "messages": [{"role", "content"}, ...]}`, of preference pairs also `"rejected"`, the other answer
    than the last message; aside/quarantine.jsonl, aside/report.json."""

    formats: dict[str, str]
    rows_read: int
    rejected: dict[str, int]
    redacted: dict[str, int]
    duplicates: dict[str, int]
    """`exact` and `folded` (but for case and white space), which are dropped, and `near` within train."""
    leaks: dict[str, int]
    """Train rows that share something with held-out ones, by kind, those that were removed included."""
    removed: dict[str, int]
    """From train, by the kind of leak, or `near_duplicate`."""
    train_rows: int
    held_out_rows: int
    train_groups: int
    held_out_groups: int
    pairs: bool = False
    """Rows are preference pairs."""


class PacksFacts(Facts):
    """How rows share sequences of `template.pack_tokens` tokens."""

    count: int
    fill: float
    """Of their tokens, how many are not padding."""
    rows_too_long: int
    """Train rows that were left out because no sequence, or no row, may be so long."""


class ChatsFacts(Facts):
    """`template`: train.arrow and held_out.arrow (Arrow streams of id and group: string, input_ids and labels:
    list<int32>, label -100 where there is no loss), prompts.jsonl (a held-out prompt a line: `{"group",
    "prompt_ids", "messages", "references"}`, in group-hash order), packs.arrow where rows are packed (see
    `retuner.pack_plan`); aside/report.html, and aside/tokens.json
    as `retuner.data_report.TokenReport`. Of preference pairs the streams have `prompt_ids`, `chosen_ids` and
    `rejected_ids` instead, and tokens are counted of prompt and answer of both sides."""

    train_rows: int
    held_out_rows: int
    held_out_prompts: int
    train_tokens: int
    supervised_tokens: int
    longest_row_tokens: int
    left_out: dict[str, int]
    """Rows not used, by cause."""
    packs: PacksFacts | None
    pairs: bool = False
    """Rows are preference pairs."""


class PreferenceFacts(Facts):
    """What an adapter that learned from pairs was held against."""

    beta: float
    reference: str | None
    """sha256 of the adapter that it began as; None for the base alone."""


class AdapterFacts(Facts):
    """`train`: adapter_model.safetensors, adapter_config.json; aside/metrics.jsonl
    (`{"step", "metrics": {...}}` a line), aside/effective.json, aside/plan.json (see `retuner.planner`)."""

    sha256: str
    """Of adapter_model.safetensors."""
    trained_steps: int
    """Those that the adapter learned from; where it stopped early, up to its best step."""
    final_loss: float
    trainable_parameters: int
    total_parameters: int
    adapted_modules: dict[str, int]
    """Module kind (e.g. qkv_proj) to how many of them carry an adapter."""
    trainable_by_module: dict[str, int]
    """Module kind to how many of the trainable parameters are its own."""
    packing_fill: float
    effective: dict[str, str]
    """What the model really ran with: attention, dtype, use_cache, gradient_checkpointing, device type, processes;
    `requested_...` what was asked; and by which held-out rows its step was `chosen`, where it stopped early."""
    preference: PreferenceFacts | None = None


class ReportFacts(Facts):
    """`evaluate`: report.json (`scores`, as here), answers.jsonl (a prompt a line: `{"group", "prompt",
    "references", "answers": {model: text}, "scores": {model: {metric: number}}}`), losses.jsonl (a held-out row
    a line: `{"id", "group", "tokens", "loss": {model: mean nats a supervised token}}`, of preference pairs the loss on
    the chosen answer, and `"preference": {model: {metric: number}}`). Models are named `base`, `production` (when there
    is one) and `candidate`."""

    scores: dict[str, dict[str, float]]
    """Model to metric (`loss`, `perplexity`, and those asked for) to number over all held-out."""
    prompts: int
    rows: int


class GateVerdict(Facts):
    metric: str
    against: str
    gain: float | None
    """Paired mean difference, more is better; None when there is nothing to compare with."""
    low: float | None
    high: float | None
    required: float
    holds: bool
    note: str


class Decision(Facts):
    passed: bool
    confidence: float
    verdicts: tuple[GateVerdict, ...]
    notes: tuple[str, ...] = ()
    """What makes the comparison less than fair, such as production having seen held-out rows."""


class VersionFacts(Facts):
    """`register`: version.json, lineage.json."""

    model_name: str
    model_version: int
    run_id: str
    experiment_id: str
    """Of the MLflow run."""
    adapter_sha256: str
    decision: Decision


F = TypeVar("F", bound=Facts)


class Artifact(BaseModel, Generic[F]):
    model_config = ConfigDict(frozen=True)

    stage: str
    fingerprint: str
    digest: str
    path: Path
    facts: F


Base = Artifact[BaseFacts]
Splits = Artifact[SplitsFacts]
Chats = Artifact[ChatsFacts]
Adapter = Artifact[AdapterFacts]
Report = Artifact[ReportFacts]
ModelVersion = Artifact[VersionFacts]
