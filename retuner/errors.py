"""What can go wrong, said in three parts: what was found, what was expected, what to do.

Every error a user can cause or meet is one of these; the command line prints the message and
leaves with `exit_code`. Anything else that escapes is a defect and leaves with 1.
"""

import errno

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RetunerError(Exception):
    """Base of the errors that are shown without a traceback."""

    exit_code = 1

    def __init__(self, found: str, expected: str | None = None, do: str | None = None):
        self.found, self.expected, self.do = found, expected, do
        super().__init__(found)

    def __str__(self) -> str:
        parts = [self.found]
        if self.expected:
            parts.append(f"  expected: {self.expected}")
        if self.do:
            parts.append(f"  do: {self.do}")
        return "\n".join(parts)

    def __reduce__(self):
        return type(self), (self.found, self.expected, self.do)

    def spelled(self) -> dict[str, str | None]:
        """For another process, see `from_spelled`."""
        return {"kind": type(self).__name__, "found": self.found, "expected": self.expected, "do": self.do}


class Refused(RetunerError):
    """The input (params, data, arguments) cannot be used as it is."""

    exit_code = 2


class GateSaidNo(RetunerError):
    """The candidate is registered but did not pass its gate."""

    exit_code = 3


class Unavailable(RetunerError):
    """Something the run depends on (hub, MLflow, Prefect, disk, DVC remote) cannot be used now."""

    exit_code = 4


def from_spelled(told: dict[str, str | None]) -> RetunerError:
    """The error that another process met."""
    kinds = {each.__name__: each for each in (RetunerError, Refused, Unavailable)}
    return kinds[told["kind"]](told["found"], told["expected"], told["do"])  # type: ignore[index,arg-type]
