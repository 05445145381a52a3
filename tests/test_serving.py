"""A registered adapter at work: through MLflow in another process, and behind the endpoint."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from versions import MODEL, a_decision, empty_database, quickstart, runtime_on_file, small_adapter, some_run

from retuner import bundle, registry, tracking
from retuner.answering import Answering, base_folder, find_base
from retuner.artifacts import BaseFacts
from retuner.base import fetch_base, load_model
from retuner.errors import Refused, Unavailable
from retuner.files import sha256_file
from retuner.observe import Silent
from retuner.params import TinyBase
from retuner.promotion import promote
from retuner.runtime import Runtime
from retuner.serving import MAX_BODY_BYTES, Production, build_app, serve
from retuner.store import Store

TINY = TinyBase(source="tiny", seed=7)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A home with a tiny base in its store and two adapters on it, registered as versions 1 and 2."""
    import torch
    from peft import LoraConfig, get_peft_model

    home = tmp_path_factory.mktemp("project") / ".retuner"
    runtime = runtime_on_file(home, empty_database(tmp_path_factory.getbasetemp() / "empty"))
    runtime = replace(runtime, device="cpu", serve_token=None)
    base = Store(runtime.store).make(
        "fetch_base",
        {"stage": "fetch_base", "test": "tiny"},
        BaseFacts,
        lambda out, work: fetch_base(out, TINY, Silent()),
    )
    params = quickstart().model_copy(update={"base": TINY})
    for number in (1, 2):
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules=["qkv_proj", "o_proj"], init_lora_weights=False)
        folder = home / f"adapter-{number}"
        get_peft_model(load_model(base.path, "float32", "sdpa", "cpu"), config).save_pretrained(folder)
        (folder / "README.md").unlink()
        sample = small_adapter(home / "sample", number)
        sha = sha256_file(folder / "adapter_model.safetensors")
        adapter = sample.model_copy(
            update={"path": folder, "facts": sample.facts.model_copy(update={"sha256": sha})}
        )
        run = some_run(runtime, key=str(number))
        made = registry.register_version(
            run, MODEL, adapter, base, params, a_decision(), None, tags={}, lineage={}
        )
        assert made == number
    return runtime


@pytest.fixture(scope="module")
def texts(project, tmp_path_factory):
    """What each version answers to hello, in 8 tokens."""
    answers = {}
    for version in (1, 2):
        whole = registry.fetch_bundle(project, MODEL, version, tmp_path_factory.mktemp("bundle") / "b")
        answers[version] = Answering(whole / "artifacts", project).answer(HELLO, 8).text
    assert answers[1] != answers[2]
    return answers


def point(runtime, version):
    registry.set_alias(runtime, MODEL, "production", version)


# --- through MLflow


def test_another_process_answers_alike_by_alias_offline_and_with_the_base_made_again(
    project, tmp_path, texts
):
    point(project, 1)
    code = """
import sys, json, mlflow, pandas
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@production")
hello = [{"role": "user", "content": "hello"}]
table = pandas.DataFrame({"messages": [hello, json.dumps(hello)]})
print(json.dumps([*model.predict(table), *model.predict([{"prompt": "hello"}, {"messages": hello}])]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"RETUNER_HOME": str(tmp_path / "empty"), "RETUNER_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, project.mlflow_uri, MODEL],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(set(answers)) == 1
    assert answers[0].startswith(texts[1])
    # What MLflow and Python left beside the version does not keep it out of production.
    point(project, None)
    assert promote(project, MODEL, 1, None, "", "ann").version == 1


def test_a_version_draws_its_answers_as_it_was_evaluated(project, tmp_path, texts):
    parts = fetched(project, tmp_path) / "artifacts"
    settings = json.loads((parts / "retuner.json").read_text())
    drawn = {"temperature": 2.0, "top_k": None, "top_p": 1.0, "seed": 0}
    (parts / "retuner.json").write_text(json.dumps(settings | {"sampling": drawn}))
    answers = [Answering(parts, project).answer(HELLO, 8).text for _ in range(2)]
    assert answers[0] == answers[1] != texts[1]


def test_a_base_that_cannot_be_had_is_named_with_what_to_do(project, tmp_path):
    wanted = json.loads((fetched(project, tmp_path) / bundle.SETTINGS).read_text())["base"]
    nowhere = Runtime(home=tmp_path / "elsewhere")
    with pytest.raises(Unavailable, match="set RETUNER_HOME"):
        base_folder({**wanted, "params": {"source": "local"}}, nowhere)
    with pytest.raises(Unavailable, match="differs in weights_sha256"):
        base_folder({**wanted, "weights_sha256": "0" * 64}, nowhere)
    assert find_base(nowhere.store, wanted) is None


def test_a_base_whose_bytes_changed_is_not_served(project, tmp_path):
    wanted = json.loads((fetched(project, tmp_path) / bundle.SETTINGS).read_text())["base"]
    runtime = Runtime(home=tmp_path / "copy")
    weights = base_folder(wanted, runtime) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = base_folder(wanted, runtime)
    assert sha256_file(again / "model.safetensors") == sha256_file(
        find_base(project.store, wanted) / "model.safetensors"
    )


def fetched(project, tmp_path) -> Path:
    return registry.fetch_bundle(project, MODEL, 1, tmp_path / "fetched")


# --- the endpoint


@pytest.fixture
def production(project):
    point(project, 1)
    followed = Production(project, MODEL, print)
    followed.look()
    return followed


@pytest.fixture
def client(production):
    from starlette.testclient import TestClient

    app = build_app(production, None, check_host=True)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


def ask(client, **changes):
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 8, **changes}
    return client.post("/v1/chat/completions", json=body)


def test_a_chat_is_answered_as_openai_would_spell_it(client, texts):
    reply = ask(client, temperature=0).json()
    assert reply["object"] == "chat.completion"
    assert reply["model"] == f"{MODEL}@1"
    [choice] = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": texts[1], "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = reply["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert ask(client, messages=parts, model=f"{MODEL}@1").json()["choices"] == [choice]


def test_a_stream_holds_the_same_text_and_ends_as_streams_end(client, texts):
    reply = ask(client, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, last = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == texts[1]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"temperature": 0.7}, 400, "temperature"),
        ({"n": 2}, 400, "n:"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"stop": ["x"]}, 400, "stop"),
        ({"logit_bias": {}}, 400, "logit_bias: not supported"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "no text"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "tokens"),
        ({"model": "another"}, 404, "not served here"),
        ({"model": f"{MODEL}@2"}, 404, f"{MODEL}@1"),
    ],
)
def test_what_is_not_supported_is_said_in_openais_error_shape(client, changes, status, said):
    reply = ask(client, **changes)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]


def test_bad_json_other_kinds_and_unknown_paths_are_errors_in_that_shape_too(client):
    headers = {"content-type": "application/json"}
    assert client.post("/v1/chat/completions", content=b"{", headers=headers).json()["error"]["message"]
    # A form on a web page may post text/plain anywhere.
    plain = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    assert client.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    assert client.get("/v1/chat/completions").status_code == 405


def test_a_body_that_is_too_long_is_refused_with_and_without_its_length(client):
    headers = {"content-type": "application/json"}
    long = b" " * (MAX_BODY_BYTES + 1)
    assert client.post("/v1/chat/completions", content=long, headers=headers).status_code == 413
    pieces = (b" " * 100_000 for _ in range(20))
    assert client.post("/v1/chat/completions", content=pieces, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[evil]"]
)
def test_another_host_name_is_turned_away(client, host):
    assert client.get("/v1/models", headers={"host": host}).status_code == 421
    assert client.get("/healthz", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_loopback_names_are_answered(client, host):
    listed = client.get("/v1/models", headers={"host": host}).json()
    assert [model["id"] for model in listed["data"]] == [f"{MODEL}@1", MODEL]


def test_with_a_token_nothing_is_answered_without_it(production):
    from starlette.testclient import TestClient

    app = build_app(production, "secret", check_host=False)
    with TestClient(app, base_url="http://models.example") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/healthz").json()["status"] == "ok"


def test_nobody_listens_beyond_loopback_without_a_token(project):
    with pytest.raises(Refused, match="there is no token"):
        serve(project, MODEL, "0.0.0.0", 0)


def test_there_must_be_something_in_production_to_serve(project):
    point(project, None)
    with pytest.raises(Refused, match="no version in production"):
        serve(project, MODEL, "127.0.0.1", 0)


def test_promotion_changes_what_answers_and_a_version_that_cannot_be_loaded_does_not(
    project, production, client, texts
):
    assert ask(client).json()["choices"][0]["message"]["content"] == texts[1]
    point(project, 2)
    production.look()
    reply = ask(client).json()
    assert reply["model"] == f"{MODEL}@2"
    assert reply["choices"][0]["message"]["content"] == texts[2]

    whole = tracking.mlflow_client(project).get_model_version(MODEL, "2")
    tags = {**whole.tags, "adapter_sha256": "0" * 64}
    broken = tracking.mlflow_client(project).create_model_version(
        MODEL, whole.source, tags=tags, run_id=whole.run_id
    )
    point(project, int(broken.version))
    production.look()
    assert ask(client).json()["model"] == f"{MODEL}@2"
    health = client.get("/healthz").json()
    assert (health["status"], health["model"]) == ("behind", f"{MODEL}@2")
    assert "damaged" in health["problem"]

    point(project, 1)
    production.look()
    assert ask(client).json()["model"] == f"{MODEL}@1"
    assert client.get("/healthz").json() == {"status": "ok", "model": f"{MODEL}@1"}


def test_serve_answers_on_a_real_socket_and_follows_the_alias(project, monkeypatch, texts):
    monkeypatch.setattr("retuner.serving.LOOK_SECONDS", 0.05)
    point(project, 1)
    said = []
    thread = threading.Thread(target=serve, args=(project, MODEL, "127.0.0.1", 0, said.append), daemon=True)
    thread.start()
    line = until(lambda: next((line for line in said if "answers at" in line), None))
    url = line.rpartition(" ")[2]

    def answer():
        body = json.dumps({"model": MODEL, "messages": HELLO, "max_tokens": 8}).encode()
        request = urllib.request.Request(
            f"{url}/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)["choices"][0]["message"]["content"]

    assert answer() == texts[1]
    point(project, 2)
    until(lambda: answer() == texts[2])


def until(what, seconds=60):
    """What `what` gives once it gives something true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")
