from pathlib import Path

from retuner import splits
from retuner.artifacts import SplitsFacts
from retuner.dataset import Dataset
from retuner.params import PrepareParams
from tasks.context import RunContext
from tasks.step import Step


def prepare(run: RunContext, dataset: Dataset, params: PrepareParams) -> Step[SplitsFacts]:
    """Read, validate, de-duplicate and split the chats."""

    def build(out: Path, work: Path) -> SplitsFacts:
        return splits.prepare(out, dataset, params, run.observer)

    return Step(
        stage="prepare",
        code=("retuner.splits:prepare",),
        params=params.model_dump(mode="json"),
        inputs={"dataset": dataset.md5, **run.held_out_sets.inputs},
        facts=SplitsFacts,
        build=build,
    )
