"""What the command line says on stdout, and what becomes of it where nobody can have it."""

import codecs
import io
import json
import os
import sys
import unicodedata

from retuner.errors import Unavailable

READER_GONE = 141
"""Exit code of shells for SIGPIPE: 128 and the signal's number. SIGPIPE itself would end servers, too."""

ESCAPE = "retuner.escape"

JOINERS = "\u200c\u200d"
"""Of these, emoji and words of some languages are made."""
STEERS = ("Cc", "Cf", "Cs")
"""Categories of Unicode: controls, what formats without being seen, halves of characters."""


def visible(text: str) -> str:
    """With escapes such as \\x1b and \\u202e for what would steer the terminal, or the order in which it writes."""
    return "".join(
        escaped(each) if unicodedata.category(each) in STEERS and each not in JOINERS else each
        for each in text
    )


def visible_lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


def escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def take_stdout() -> None:
    """Print through a stdout that a full disk, a reader who left and another encoding than UTF-8 are no defects of.

    What the encoding cannot spell is escaped as in JSON, so that what is printed as JSON still is that.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            # It was closed: without this, the next file that is opened would be the one that others print to.
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    given = sys.__stdout__
    if given is None or sys.stdout is not given:
        return  # nobody listens, or in another way
    codecs.register_error(ESCAPE, _escaped)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(given.fileno(), "w", closefd=False)),
        encoding=given.encoding,
        errors=ESCAPE,
        line_buffering=given.line_buffering or given.write_through,
    )


class _Stdout(io.FileIO):
    def write(self, data):
        """Errors: Unavailable where there is no room; SystemExit where the reader of a pipe has left."""
        try:
            return super().write(data)
        except OSError as error:
            failed = error
        # Raised outside of `except`, so that nobody takes it for a full disk of their own; and what is printed
        # from now on goes nowhere, or it would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if isinstance(failed, BrokenPipeError):
            raise SystemExit(READER_GONE)
        raise Unavailable(
            f"stdout cannot be written to: {failed}",
            "a place with room for what is printed",
            "free some space or send it elsewhere, then run the same command again",
        )


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end
