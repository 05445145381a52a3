"""The train or the held-out side of the chats, and what becomes of each row, as arrays."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retuner.chat_lines import Chat, ChatLines
from retuner.coloured import ShownRow
from retuner.describe import Lengths
from retuner.params import TemplateParams
from retuner.row_memo import MISSING, Places, RowMemo

if TYPE_CHECKING:
    from numpy.typing import NDArray

COUNTED_AT_ONCE = 2**16
SHOWN_ROWS = {"train": 16, "held_out": 4}


@dataclass
class Side:
    name: str
    lines: ChatLines
    places: Places = field(init=False)
    """Of each row in the memo."""
    lengths: "NDArray[Any]" = field(init=False)
    """Tokens of every conversation, before it was cut or left out."""
    kept: "NDArray[Any]" = field(init=False)
    """The numbers of the rows that are used."""
    kept_tokens: "NDArray[Any]" = field(init=False)
    """Tokens of those, as they are used."""
    supervised: int = 0
    cut: int = 0
    strips: "NDArray[Any]" = field(init=False)
    """Whether the tokenizer drops white space at the edge of a message, of every conversation."""
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def missing(self) -> int:
        """Rows that the memo does not hold."""
        return int((self.places.file == MISSING).sum())

    @property
    def missing_bytes(self) -> int:
        """Of their lines."""
        import numpy as np

        return int(np.diff(self.lines.bounds)[self.places.file == MISSING].sum())

    def look_again(self, rows: RowMemo) -> None:
        """For rows that the memo did not hold."""
        import numpy as np

        missing = np.flatnonzero(self.places.file == MISSING)
        found = rows.find(self.lines.ids[missing])
        self.places.file[missing], self.places.row[missing] = found.file, found.row

    def measure(self, rows: RowMemo, params: TemplateParams) -> None:
        """Decide which rows are used. A row that is cut keeps loss on whole answers only: an answer without its
        stop token would teach the model to stop in the middle. Without a whole answer it is left out."""
        import numpy as np

        self.lengths = rows.column("tokens", self.places)
        supervised = rows.supervised(self.places, params.max_tokens)
        fits = self.lengths <= params.max_tokens
        if params.too_long == "truncate":
            used = fits | (supervised > 0)
            self.cut = int((used & ~fits).sum())
            self.left_out[f"{self.name}_no_whole_answer"] += int((~used).sum())
        else:
            used = fits
            self.left_out[f"{self.name}_too_long"] += int((~used).sum())
        self.kept = np.flatnonzero(used).astype(np.int32)
        self.kept_tokens = np.minimum(self.lengths[self.kept], params.max_tokens)
        self.supervised = int(supervised[used].sum())
        self.strips = rows.column("stripped", self.places) > 0

    @property
    def stripped(self) -> int:
        return int(self.strips.sum())

    @property
    def rows(self) -> int:
        return len(self.kept)

    @property
    def tokens(self) -> int:
        return int(self.kept_tokens.sum())

    @property
    def longest(self) -> int:
        return int(self.kept_tokens.max(initial=0))

    @property
    def longest_before(self) -> int:
        return int(self.lengths.max(initial=0))

    @property
    def shortest(self) -> Any:
        """The number of a conversation; there must be one."""
        return self.lengths.argmin()

    def name_of(self, number: Any) -> str:
        return chat_name(self.lines.read(number[None])[0])

    def shown(self, rows: RowMemo, max_tokens: int) -> Iterator[ShownRow]:
        """Some rows from all over the side."""
        import numpy as np

        count = SHOWN_ROWS[self.name]
        every = max(1, len(self.lines) // count)
        # Of each stretch of rows the first that is used, and none twice.
        numbers = np.unique(np.searchsorted(self.kept, np.arange(count, dtype=np.int32) * every))
        for number in self.kept[numbers[numbers < len(self.kept)]]:
            row = rows.rows(self.places[number : number + 1], max_tokens)[0]
            yield ShownRow(self.name, self.lines.ids[number].tobytes().hex(), row.input_ids, row.labels)

    def spelled(self) -> dict[str, Any]:
        """As `retuner.data_report.SideTokens`."""
        import numpy as np

        counts: Any = np.zeros(self.longest_before + 1, np.int64)
        for first in range(0, len(self.lengths), COUNTED_AT_ONCE):
            counts += np.bincount(self.lengths[first : first + COUNTED_AT_ONCE], minlength=len(counts))
        histogram = Lengths()
        for tokens in np.flatnonzero(counts).tolist():
            histogram.add(tokens, int(counts[tokens]))
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "longest": self.longest,
            "cut": self.cut,
            "stripped": self.stripped,
            "left_out": {cause: count for cause, count in self.left_out.items() if count},
            "histogram": list(histogram.ranges()),
        }


def chat_name(chat: Chat) -> str:
    asked = next((message for message in chat["messages"] if message["role"] == "user"), chat["messages"][0])
    opening = " ".join(asked["content"].split())
    return f"chat {chat['id']} ({opening[:50]!r}{'…' if len(opening) > 50 else ''})"
