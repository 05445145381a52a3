"""What became of one stage. On its own, because a fully cached run needs it and little else."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StageRecord:
    name: str
    state: Literal["computed", "cached"]
    seconds: float
    fingerprint: str

    def spelled(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 3)}
