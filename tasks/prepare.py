import sys
from pathlib import Path

from retuner import splits
from retuner.artifacts import SplitsFacts
from retuner.code_digest import code_digest
from retuner.dataset import Dataset
from retuner.fingerprint import fingerprint, library_versions
from retuner.memo import Memo
from retuner.params import PrepareParams
from tasks.context import RunContext
from tasks.step import Step


def prepare(run: RunContext, dataset: Dataset, params: PrepareParams) -> Step[SplitsFacts]:
    """Read, validate, redact, de-duplicate and split the chats, and keep train and held-out apart."""
    libraries = (
        "numpy",
        "pyarrow",
        "pydantic-core",
        *(("detect-secrets", "phonenumbers") if params.redact else ()),
    )
    sets = run.held_out_sets

    def build(out: Path, work: Path) -> SplitsFacts:
        memo = Memo(run.runtime.store / "memo", _memo_key(run, libraries))
        return splits.prepare(out, work, dataset, params, run.observer, sets.frozen, sets.earlier, memo)

    return Step(
        stage="prepare",
        code=("retuner.splits:prepare",),
        libraries=libraries,
        params=params.model_dump(mode="json"),
        inputs={"dataset": dataset.md5, **sets.inputs},
        facts=SplitsFacts,
        build=build,
    )


def _memo_key(run: RunContext, libraries: tuple[str, ...]) -> str:
    """What decides how rows are read and sketched, so that a change of code never meets rows of the old one."""
    return fingerprint(
        {
            "code": code_digest("retuner.intake:Reading", run.code_notes),
            "libraries": library_versions(libraries),
            "python": ".".join(map(str, sys.version_info[:2])),
        }
    )
