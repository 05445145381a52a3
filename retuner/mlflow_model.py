"""How MLflow loads a registered version: `mlflow.pyfunc.load_model("models:/NAME@production")`.

MLflow copies this file into the bundle and runs it where the model is loaded; nothing is pickled. The base
is not in the bundle: it is found by its digest in the store of RETUNER_HOME, or fetched and checked.
"""

import json
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from retuner.answering import Answering
from retuner.errors import Refused
from retuner.runtime import load_runtime


class AdapterOnBase(PythonModel):
    """Conversations to answers, greedy."""

    def load_context(self, context: Any) -> None:
        self.answering = Answering(Path(context.artifacts["settings"]).parent, load_runtime())

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """An answer a row. A row has `messages` (a list of role and content, or its JSON) or `prompt`."""
        return [self.answering.answer(_messages(row)).text for row in model_input.to_dict("records")]


def _messages(row: dict[Any, Any]) -> list[dict[str, str]]:
    messages: Any = row.get("messages")
    prompt = row.get("prompt")
    if isinstance(messages, str):
        messages = json.loads(messages)
    if hasattr(messages, "tolist"):  # an array, where the table came from Parquet
        messages = messages.tolist()
    if isinstance(messages, list) and messages:
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    raise Refused(f"a row with neither: {row!r:.200}", "`messages`, a list of role and content, or `prompt`")


set_model(AdapterOnBase())
