"""A data file's bytes, hashed on their way to whoever parses them.

A file may be written to after it was hashed, and what is read then must not be kept under the old hash.
"""

import io
from typing import Any

from retuner.dataset import DataFile
from retuner.dvc_file import md5_of
from retuner.errors import Refused
from retuner.json_rows import CHUNK_BYTES


class Checked(io.BufferedReader):
    """The file as a stream, to be read from its start."""

    def __init__(self, file: DataFile):
        """Errors: OSError."""
        self._file, self._bytes = file, _Hashed(file)
        super().__init__(self._bytes, CHUNK_BYTES)

    def check(self) -> None:
        """Read what is left. Errors: Refused when the bytes are not those that the dataset was opened with; OSError."""
        while self.read(CHUNK_BYTES):
            pass
        if self._bytes.md5.hexdigest() != self._file.md5:
            raise Refused(
                f"{self._file.relpath} is not what it was when the run began",
                f"data at rest: bytes with the md5 {self._file.md5}",
                "run again when nothing writes to it; if nothing did, it is damaged: `dvc checkout` brings it back",
            )


class _Hashed(io.FileIO):
    def __init__(self, file: DataFile):
        super().__init__(file.path)
        self.md5 = md5_of()

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.md5.update(memoryview(buffer)[:count])
        return count
