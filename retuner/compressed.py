"""Files that are compressed, as streams of what is in them: nothing is unpacked onto the disk or held in memory."""

import gzip
import io
import os
import zlib
from typing import Any, BinaryIO, cast

from retuner.json_rows import CHUNK_BYTES

CODECS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
SKIPPABLE_FRAME = tuple(bytes([0x50 + number]) + b"\x2a\x4d\x18" for number in range(16))
MAX_EXPANSION = 1000
"""Text of chats becomes ten times smaller, seldom a hundred times; gzip can do 1032, zstd more than ten thousand."""
SMALL_BYTES = 2**28
"""A file that unpacks to no more than this may do so from however few bytes."""


class Damaged(Exception):
    """A stream that cannot be unpacked to its end; says how."""


def unpacked(file: io.BufferedReader, codec: str | None) -> BinaryIO:
    """The unpacked bytes of a file; reading may raise Damaged. Errors: Damaged, OSError."""
    if codec is None:
        return file
    head = file.peek(4)[:4]
    if not head:
        raise Damaged(f"is empty, which no {codec} file is")
    if not head.startswith(MAGIC[codec]) and not (codec == "zstd" and head in SKIPPABLE_FRAME):
        raise Damaged(f"is not compressed with {codec}, as its name says: it starts with {head!r}")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(file, codec), CHUNK_BYTES))


class _Unpacked(io.RawIOBase):
    def __init__(self, file: io.BufferedReader, codec: str):
        self._codec = codec
        self._may_read = max(SMALL_BYTES, MAX_EXPANSION * os.fstat(file.fileno()).st_size)
        self._stream: Any
        if codec == "gzip":
            self._stream = gzip.GzipFile(fileobj=file)
        else:
            import pyarrow

            self._stream = pyarrow.CompressedInputStream(file, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._stream.readinto(buffer)
        except EOFError:
            raise self._damaged("ends before its end was marked: it was cut off") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(f"is damaged or has something behind it: {error}") from None
        except OSError as error:
            if error.errno is not None:  # the disk, and not what is on it
                raise
            raise self._damaged(f"is damaged, cut off or has something behind it: {error}") from None
        self._may_read -= count
        if self._may_read < 0:
            raise self._damaged(f"unpacks to more than {MAX_EXPANSION:,} times its size, as no chats do")
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _damaged(self, how: str) -> Damaged:
        return Damaged(f"cannot be unpacked: its {self._codec} stream {how}")
