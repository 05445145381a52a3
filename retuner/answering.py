"""A registered version at work: its base found by digest, its adapter put on, conversations answered.

MLflow's pyfunc and `retuner serve` both answer through here, with the layout and the decoding of the
evaluation, so that what was measured is what is served.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner import bundle
from retuner.errors import RetunerError, Unavailable
from retuner.params import Sampling
from retuner.runtime import Runtime

DIGESTS = ("weights_sha256", "tokenizer_sha256", "template_sha256")


@dataclass(frozen=True)
class Answer:
    text: str
    prompt_tokens: int
    answer_tokens: int
    """Without the stop token."""
    finished: bool
    """The model ended its turn; False when it ran out of tokens."""


class Answering:
    """An adapter on its base, in memory. Not for several threads at once."""

    def __init__(self, parts: Path, runtime: Runtime):
        """`parts` is a bundle's `artifacts/` folder, or one laid out like it.

        Errors: Unavailable when the base cannot be had; Refused when the adapter does not fit it.
        """
        from retuner.generation import Answerer

        self.settings = json.loads((parts / Path(bundle.SETTINGS).name).read_bytes())
        drawn = self.settings["sampling"]
        self.sampling = Sampling.model_validate(drawn) if drawn else None
        base = base_folder(self.settings["base"], runtime)
        self._answerer = Answerer(
            base,
            parts / Path(bundle.ADAPTER).name,
            self.settings["precision"],
            self.settings["attention"],
            runtime.device,
        )

    def answer(self, messages: Sequence[dict[str, str]], max_new_tokens: int | None = None) -> Answer:
        """Greedy or drawn as in the evaluation, whose `max_new_tokens` it is unless given.

        Errors: Refused for roles the template does not know, empty messages, and too long conversations.
        """
        from retuner.generation import decode, generate, pad_token_id

        limit = max_new_tokens or self.settings["max_new_tokens"]
        prompt = self._answerer.renderer.encode_prompt(messages)
        stops = self.settings["stop_token_ids"]
        tokenizer, model = self._answerer.tokenizer, self._answerer.model
        [tokens] = generate(
            model,
            [prompt],
            stops,
            pad_token_id(tokenizer, stops),
            limit,
            batch_size=1,
            sampling=self.sampling,
        )
        room = min(limit, model.config.max_position_embeddings - len(prompt))
        return Answer(decode(tokenizer, [tokens])[0], len(prompt), len(tokens), finished=len(tokens) < room)


def base_folder(wanted: dict[str, Any], runtime: Runtime) -> Path:
    """The base an adapter was trained on, by digest: from the store, else fetched again into it.

    Errors: Unavailable when it is in neither place, or what can be had is another base.
    """
    from pydantic import TypeAdapter

    from retuner.artifacts import BaseFacts
    from retuner.base import fetch_base
    from retuner.fingerprint import fingerprint
    from retuner.observe import Silent
    from retuner.params import BaseParams
    from retuner.store import Store

    if found := find_base(runtime.store, wanted):
        return found
    do = "set RETUNER_HOME to the .retuner folder of the project that trained it, on this machine"
    missing = f"the base {wanted['source']} is not in the store {runtime.store}"
    if wanted["params"]["source"] == "local":
        raise Unavailable(missing, f"weights with sha256 {wanted['weights_sha256']}", do)

    def build(out: Path, work: Path) -> BaseFacts:
        params = TypeAdapter(BaseParams).validate_python(wanted["params"])
        try:
            facts = fetch_base(out, params, Silent())
        except RetunerError as error:
            raise Unavailable(
                f"{missing}, and cannot be fetched: {error.found}", error.expected, do
            ) from error
        if differing := [name for name in DIGESTS if getattr(facts, name) != wanted[name]]:
            raise Unavailable(
                f"{missing}, and what can be fetched differs in {', '.join(differing)}",
                "the very bytes that the adapter was trained on",
                do,
            )
        return facts

    store = Store(runtime.store)
    identity = {"stage": "fetch_base", "fetched_to_serve": wanted}
    with store.lock(fingerprint(identity), "fetch_base"):
        return find_base(runtime.store, wanted) or store.make("fetch_base", identity, BaseFacts, build).path


def find_base(store: Path, wanted: dict[str, str]) -> Path | None:
    """The folder of a stored base with these digests, every byte of it hashed just now."""
    from retuner.artifacts import BaseFacts
    from retuner.store import Store

    if not store.is_dir():
        return None
    opened = Store(store)
    for manifest in opened.manifests():
        if manifest["stage"] != "fetch_base" or any(manifest["facts"][n] != wanted[n] for n in DIGESTS):
            continue
        if found := opened.find("fetch_base", manifest["fingerprint"], BaseFacts):
            opened.verify(found)
            return found.path
    return None
