"""What a training will take, and what is to say of it: whether it fits, and what would."""

from dataclasses import asdict, dataclass
from typing import Any

from retuner.errors import Refused

SAFE = 0.9
"""Of what there is, as much as activations may fill before they are checkpointed: plans are right to within a tenth."""
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    machine: str
    rows: int
    tokens: int
    left_out: dict[str, int]
    """Rows that are not trained on, by cause."""
    rows_cut: int
    """Rows that lost their end."""
    packing_fill: float
    steps: int
    processes: int
    """What takes memory is that of each."""
    batch_size: int
    """Sequences that a process takes at a time."""
    step_sequences: int
    """Sequences of a step, of all processes and batches."""
    trainable_parameters: int
    total_parameters: int
    weight_bytes: int
    loading_bytes: int
    """What weights take at the most before training begins; float8's are rounded where they were loaded."""
    adapter_bytes: int
    """With gradients and what the optimizer keeps."""
    activation_bytes: int
    """With checkpoints or without, as `gradient_checkpointing` is."""
    other_activation_bytes: int
    """The other way."""
    logit_bytes: int
    process_bytes: int
    """What the process holds already."""
    memory_bytes: int
    """What there is."""
    gradient_checkpointing: bool
    """As the params say, or as was decided for `auto`."""
    decided: bool
    savings: list[str]
    """What else would take less memory."""
    tokens_per_second: float
    """Of all processes."""
    speed_from: str
    """`an earlier run` or `a probe`."""
    seconds: float
    """Of the steps."""
    reference_seconds: float
    """Before the first step, for the reference of preference pairs."""
    speed_key: str

    @property
    def peak_bytes(self) -> int:
        return self._peak(self.activation_bytes)

    @property
    def other_peak_bytes(self) -> int:
        """With `gradient_checkpointing` the other way."""
        return self._peak(self.other_activation_bytes)

    @property
    def must_checkpoint(self) -> bool:
        """Whether only checkpointed activations fit."""
        peaks = self.peak_bytes, self.other_peak_bytes
        checkpointed, kept = peaks if self.gradient_checkpointing else reversed(peaks)
        return checkpointed <= self.memory_bytes < kept

    @property
    def wants_checkpoints(self) -> bool:
        """Of activations that are kept: whether they leave too little room, and checkpointed ones more."""
        return self.peak_bytes > SAFE * self.memory_bytes and self.other_peak_bytes < self.peak_bytes

    @property
    def largest_batch_size(self) -> int | None:
        """Sequences at a time that fit and divide a step; None where not even one fits. Where it was decided that
        activations are kept, those with which they still would be."""
        mine = self.step_sequences // self.processes
        room = self.memory_bytes * (SAFE if self.decided and not self.gradient_checkpointing else 1)
        fit = (size for size in range(mine, 0, -1) if mine % size == 0 and self.peak_with(size) <= room)
        return next(fit, None)

    def peak_with(self, batch_size: int) -> int:
        """With so many sequences at a time."""
        return self._peak(self.activation_bytes, batch_size / self.batch_size)

    def _peak(self, activations: int, batches: float = 1.0) -> int:
        batch = round((activations + self.logit_bytes) * batches)
        training = self.weight_bytes + self.adapter_bytes + batch
        return self.process_bytes + max(self.loading_bytes, training)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "peak_bytes": self.peak_bytes,
            "other_peak_bytes": self.other_peak_bytes,
            "must_checkpoint": self.must_checkpoint,
            "largest_batch_size": self.largest_batch_size,
        }

    def lines(self) -> list[str]:
        left = ", ".join(f"{count:,} {cause}" for cause, count in self.left_out.items()) or "none"
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        before = (
            f", after {_duration(self.reference_seconds)} for the reference" if self.reference_seconds else ""
        )
        return [
            f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters learn",
            f"{self.rows:,} rows of {self.tokens:,} tokens, {self.rows_cut:,} cut short, left out: {left}; "
            f"sequences are {100 * self.packing_fill:.1f} % full",
            f"{self.peak_bytes / GIB:.1f} of {self.memory_bytes / GIB:.1f} GiB at the most{each}: weights "
            f"{self.weight_bytes / GIB:.1f}, adapter {self.adapter_bytes / GIB:.2f}, activations "
            f"{self.activation_bytes / GIB:.1f}, logits {self.logit_bytes / GIB:.1f}",
            self._advice(),
            f"{self.steps:,} steps at {self.tokens_per_second:,.0f} tokens/s, by {self.speed_from}: "
            f"{_duration(self.seconds)} on {self.machine}{before}",
        ]

    def _advice(self) -> str:
        """On checkpoints and the size of a batch."""
        advice = f"activations are {'checkpointed' if self.gradient_checkpointing else 'kept'}"
        if self.must_checkpoint and self.gradient_checkpointing:
            advice += f", as {self.other_peak_bytes / GIB:.1f} GiB would be needed otherwise"
        elif self.must_checkpoint:
            advice += ", and would fit only checkpointed"
        elif self.peak_bytes > self.memory_bytes:
            advice += ", and fit neither way"
        elif self.gradient_checkpointing and self.decided:
            advice += f": {self.other_peak_bytes / GIB:.1f} GiB otherwise would leave too little room"
        elif self.gradient_checkpointing:
            advice += f", and need not be to fit: {self.other_peak_bytes / GIB:.1f} GiB without, and faster"
        sizes = f"; {self.batch_size} of a step's {self.step_sequences} sequences at a time"
        largest = self.largest_batch_size
        return advice + sizes + (f", {largest} would fit" if largest and largest > self.batch_size else "")

    def summary(self) -> str:
        checkpointed = ", activations checkpointed" if self.decided and self.gradient_checkpointing else ""
        return (
            f"{_duration(self.seconds)} for {self.steps:,} steps at {self.tokens_per_second:,.0f} tokens/s, by "
            f"{self.speed_from}, and {self.peak_bytes / GIB:.1f} of {self.memory_bytes / GIB:.1f} GiB{checkpointed}"
        )

    def refuse_what_cannot_fit(self) -> None:
        """Errors: Refused."""
        if self.peak_bytes <= self.memory_bytes:
            return
        size = self.largest_batch_size
        each = f" for each of {self.processes} processes" if self.processes > 1 else ""
        if self.must_checkpoint:
            do = "set train.gradient_checkpointing: auto"
        elif size:
            do = (
                f"set train.batch_size: {size} and train.gradient_accumulation: {self.step_sequences // size}: "
                f"the same step in {self.peak_with(size) / GIB:.1f} GiB"
            )
        else:
            do = " or ".join(self.savings)
        raise Refused(
            f"this training would need {self.peak_bytes / GIB:.1f} GiB{each}",
            f"at most the {self.memory_bytes / GIB:.1f} GiB of {self.machine}{each}",
            do,
        )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
