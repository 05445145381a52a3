"""A stage as a Prefect task: named, shown as `Cached` where it was, retried where that can help."""

from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from retuner.artifacts import Artifact, Facts
from retuner.errors import Unavailable
from tasks.context import RunContext
from tasks.step import Step, carry_out

F = TypeVar("F", bound=Facts)

RETRIES = {"fetch_base": 2, "register": 2}
"""Stages that talk to a hub or a registry, both idempotent, so a passing failure is worth another try."""


def run_task(run: RunContext, step: Step[F]) -> Artifact[F]:
    """Carry a stage out inside the current flow run. Errors: whatever the stage raises."""

    # Prefect's own result cache is not used: it hashes paths as text, forgets helpers, and serves
    # results whose files are gone. The store decides, and Prefect shows what it decided.
    @task(
        name=step.stage,
        task_run_name=step.stage,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES.get(step.stage, 0),
        retry_delay_seconds=5,
        retry_condition_fn=_is_passing,
    )
    def stage(*inputs: Artifact[Any]) -> Artifact[F] | State:
        made, cached = carry_out(run, step)
        return Completed(name="Cached", message="served from the store", data=made) if cached else made

    return stage(*step.uses, return_state=True).result()


def _is_passing(task: Any, task_run: Any, state: State) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unavailable)
