"""`retuner plan PARAMS`: what a training would take. Base, prepare and template are carried out where they are not
there yet, and stay for the run; nothing is trained and no weight is loaded."""

from pathlib import Path

from retuner.errors import Refused
from retuner.params_file import load
from retuner.plan import Plan
from retuner.planner import SPEEDS
from retuner.planning_aside import plan_aside
from retuner.runtime import Runtime
from tasks.context import RunObserver, open_context
from tasks.fetch_base import fetch_base
from tasks.prepare import prepare
from tasks.step import carry_out
from tasks.template import template


def plan_training(
    params: Path, overrides: tuple[str, ...], runtime: Runtime, observer: RunObserver
) -> tuple[Plan, Refused | None]:
    """The plan, and why it cannot be carried out. Errors: whatever the stages raise."""
    run = open_context(load(params, overrides), runtime, observer)
    base, _ = carry_out(run, fetch_base(run, run.params.base))
    splits, _ = carry_out(run, prepare(run, run.dataset, run.params.prepare))
    chats, _ = carry_out(run, template(run, splits, base, run.params.template))
    several = (runtime.processes, runtime.strategy)
    plan = plan_aside(chats, base, run.params.train, runtime.device, runtime.home / SPEEDS, *several)
    try:
        plan.refuse_what_cannot_fit()
    except Refused as refusal:
        return plan, refusal
    return plan, None
