"""The sentence that a retrain is. Whoever says it decides how a stage is carried out."""

from typing import Any, Protocol

from retuner.artifacts import Artifact, ModelVersion
from tasks.context import RunContext
from tasks.evaluate import evaluate
from tasks.fetch_base import fetch_base
from tasks.prepare import prepare
from tasks.register import register
from tasks.step import Step
from tasks.template import template
from tasks.train import train

STAGES = ("fetch_base", "prepare", "template", "train", "evaluate", "register")


class Do(Protocol):
    def __call__(self, step: Step[Any]) -> Artifact[Any]: ...


def pipeline(run: RunContext, do: Do) -> ModelVersion:
    params = run.params
    base = do(fetch_base(run, params.base))
    splits = do(prepare(run, run.dataset, params.prepare))
    chats = do(template(run, splits, base, params.template))
    adapter = do(train(run, chats, base, params.train))
    report = do(evaluate(run, adapter, chats, base, params.evaluate))
    return do(register(run, adapter, report, base, splits, chats, params.register_))
