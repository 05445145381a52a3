"""What is exported: an adapter, the base it was trained on, and prompts that neither has seen."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retuner import bundle, registry
from retuner.answering import DIGESTS, base_folder
from retuner.artifacts import Base, BaseFacts
from retuner.base import base_identity, fetch_base
from retuner.errors import Refused
from retuner.fingerprint import fingerprint
from retuner.observe import Observer
from retuner.params import BaseParams, Params
from retuner.runtime import Runtime
from retuner.store import Store

FIXED_PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Translate to German: good morning",
    "What is 17 + 25?",
    "Give the plural of mouse.",
    'Answer as JSON with the key "city": I live in Oslo.',
    "Why is the sky blue?",
)

Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Source:
    name: str
    """`support-emails version 3`, say; stands in the certificate."""
    adapter: Path
    base: Path
    base_facts: dict[str, Any]
    """`source` and the digests."""
    stop_token_ids: tuple[int, ...]
    max_new_tokens: int
    prompts: Sequence[Messages]
    prompts_from: str


def source_of_version(runtime: Runtime, model: str, version: int, work: Path) -> Source:
    """A registered version, every byte of it checked, below the folder `work`; its base from the store, else fetched.

    Errors: Unavailable; Refused when there is no such version or a byte differs from what was registered.
    """
    whole = registry.fetch_bundle(runtime, model, version, work / "bundle")
    settings = json.loads((whole / bundle.SETTINGS).read_bytes())
    name = f"{model} version {version}"
    prompts, prompts_from = _fixed()
    try:
        report = registry.fetch_report(runtime, model, version, work / "report")
        with (report / "answers.jsonl").open(encoding="utf-8") as lines:
            prompts = [json.loads(line)["prompt"] for line in lines]
        prompts_from = f"the held-out prompts of {name}"
    except Refused as gone:
        prompts_from += f", because {gone.found}"
    return Source(
        name=name,
        adapter=whole / bundle.ADAPTER,
        base=base_folder(settings["base"], runtime),
        base_facts={key: settings["base"][key] for key in ("source", *DIGESTS)},
        stop_token_ids=tuple(settings["stop_token_ids"]),
        max_new_tokens=settings["max_new_tokens"],
        prompts=prompts,
        prompts_from=prompts_from,
    )


def source_of_folder(folder: Path, params: Params, base: Base) -> Source:
    """An adapter that is not registered, such as an imported one. Errors: Refused."""
    for file in (bundle.WEIGHTS, "adapter_config.json"):
        if not (folder / file).is_file():
            raise Refused(f"{folder} has no {file}", "an adapter folder, as `retuner import` writes it")
    prompts, prompts_from = _fixed()
    return Source(
        name=folder.name,
        adapter=folder,
        base=base.path,
        base_facts={key: getattr(base.facts, key) for key in ("source", *DIGESTS)},
        stop_token_ids=base.facts.stop_token_ids,
        max_new_tokens=params.evaluate.max_new_tokens,
        prompts=prompts,
        prompts_from=prompts_from,
    )


def base_of(params: BaseParams, runtime: Runtime, observer: Observer) -> Base:
    """The base that params name, from the store, else fetched into it. Errors: Unavailable, Refused."""
    store = Store(runtime.store, observer.say, runtime.store_remote)
    named = base_identity(params)
    identity = {"stage": "fetch_base", "params": named}
    with store.lock(fingerprint(identity), "fetch_base"):
        # Whatever code fetched it: the bytes are checked, and named by their digests from here on.
        for manifest in store.manifests() if runtime.store.is_dir() else ():
            if manifest["stage"] != "fetch_base" or manifest["identity"].get("params") != named:
                continue
            if found := store.find("fetch_base", manifest["fingerprint"], BaseFacts):
                store.verify(found)
                return found
        return store.make(
            "fetch_base", identity, BaseFacts, lambda out, work: fetch_base(out, params, observer)
        )


def _fixed() -> tuple[list[Messages], str]:
    return [[{"role": "user", "content": text}] for text in FIXED_PROMPTS], "a fixed set"
