"""What is known of the data when it is rendered: the report of `prepare` and the token counts of `template`.

What an older result does not tell reads as nothing found.
"""

from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from retuner.describe import Description


class Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Begun(Part):
    """A row by its id and its beginning."""

    id: str
    start: str


class Cluster(Part):
    size: int
    rows: tuple[Begun, ...]
    """Some of them."""


class Duplicates(Part):
    exact: int = 0
    """Rows dropped because an equal one stays."""
    folded: int = 0
    """Dropped because one stays that differs in case and white space alone."""
    near: int = 0
    """Rows that are nearly another one."""
    near_policy: str | None = None
    """`report`, or `remove`; None when they were not looked for."""
    clusters: tuple[Cluster, ...] = ()


class LeakExample(Part):
    train: str
    """Its id."""
    held_out: str
    start: str
    """How the train row begins."""
    held_out_start: str = ""
    """How the held-out row begins, where that is told."""
    against: str
    """`held-out`, or the earlier version whose held-out set it is."""
    shared: str = ""
    """How the longest run of words begins that both have, of kinds that look for runs."""


class StockPhrases(Part):
    rows: int = 0
    """Train rows that share stock phrases with held-out rows and nothing rarer; they are no leaks."""
    examples: tuple[LeakExample, ...] = ()


class Leak(Part):
    rows: int
    """Train rows that share something with a held-out row."""
    policy: str
    removed: int
    examples: tuple[LeakExample, ...] = ()
    stock_phrases: StockPhrases = StockPhrases()


LEAKS = {
    "exact": "the whole conversation, but for case, white space and system prompt, is held out too",
    "same_prompt": "a held-out row asks the same, but for case, white space and system prompt",
    "near": "nearly the whole conversation is held out too",
    "ngram_13": "13 words in a row are those of a held-out row",
    "ngram_8": "8 words in a row are those of a held-out row",
}
"""What holds of a train row with a leak of this kind, the gravest first."""


class SideReport(Part):
    rows: int = 0
    groups: int = 0
    """Different prompts."""
    set: str | None = None
    """The frozen set that picked it."""


class DataReport(Part):
    """aside/report.json of `prepare`."""

    formats: dict[str, str] = {}
    rows_by_file: dict[str, int] = {}
    rows_read: int = 0
    rejected: dict[str, int] = {}
    redacted: dict[str, int] = {}
    duplicates: Duplicates = Duplicates()
    leaks: dict[str, Leak] = {}
    train: SideReport = SideReport()
    held_out: SideReport = SideReport()
    description: dict[str, Any] = Field(default_factory=lambda: Description().spelled())

    @field_validator("leaks")
    @classmethod
    def _gravest_first(cls, leaks: dict[str, Leak]) -> dict[str, Leak]:
        return {kind: leaks[kind] for kind in [*LEAKS, *leaks] if kind in leaks}

    @property
    def described(self) -> Description:
        return Description.from_spelled(self.description)

    @property
    def dropped(self) -> int:
        """Rows that are not used because another one says the same."""
        near = self.duplicates.near if self.duplicates.near_policy == "remove" else 0
        return self.duplicates.exact + self.duplicates.folded + near

    @property
    def leaked(self) -> int:
        """Rows taken out of train because they share something with a held-out row."""
        return sum(leak.removed for leak in self.leaks.values())


class SideTokens(Part):
    rows: int
    """That are used, after what is too long was left out."""
    tokens: int
    supervised: int
    """Tokens with loss."""
    longest: int
    cut: int = 0
    stripped: int = 0
    """Conversations of which the tokenizer drops white space at the edge of a message."""
    left_out: dict[str, int] = {}
    """By cause."""
    histogram: tuple[tuple[int, int, int], ...] = ()
    """`(low, high, rows)` by tokens, before anything was cut or left out; `high` is not in it."""

    @field_validator("histogram")
    @classmethod
    def _in_order(cls, bins: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        if any(low >= high for low, high, _ in bins) or any(
            before[1] > after[0] for before, after in pairwise(bins)
        ):
            raise ValueError("bins must be in order and not overlap")
        return bins


class Packs(Part):
    count: int
    fill: float
    """Of their tokens, how many are not padding."""
    rows_too_long: int = 0


class TokenReport(Part):
    """Lengths and loss in tokens of the base's tokenizer."""

    max_tokens: int
    train: SideTokens
    held_out: SideTokens
    packs: Packs | None = None
