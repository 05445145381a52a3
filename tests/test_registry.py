"""Runs and versions in real MLflow stores: a SQLite file, and a server on loopback."""

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from versions import (
    MODEL,
    MlflowServer,
    a_decision,
    empty_database,
    quickstart,
    register,
    runtime_on_file,
    small_adapter,
    some_base,
    some_data,
    some_run,
)

from retuner import bundle, metric_stream, registry, registry_reads, run_page, tracking
from retuner.artifacts import ReportFacts
from retuner.errors import Refused, Unavailable
from retuner.metric_stream import MetricStream, deliver_unsent, unsent_folder
from retuner.registry_reads import HeldOut, Incumbent
from retuner.runtime import Runtime


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    return empty_database(tmp_path_factory.getbasetemp() / "empty")


@pytest.fixture(scope="module")
def host(tmp_path_factory, database):
    """A server that is not started until someone wants it: starting costs ten seconds."""
    host = MlflowServer(tmp_path_factory.mktemp("server"), database)
    yield host
    host.stop()


@pytest.fixture
def server(host):
    host.start()
    return host


@pytest.fixture
def on_file(tmp_path, database):
    return runtime_on_file(tmp_path / "home", database)


@pytest.fixture(params=["file", "server"])
def runtime(request, tmp_path):
    """Each test sees a registered model name of its own, because the server is shared."""
    if request.param == "file":
        return request.getfixturevalue("on_file")
    return Runtime(home=tmp_path / "home", tracking_uri=request.getfixturevalue("server").uri)


# --- a server that is away; first, because no test has started it yet


def test_a_server_that_is_away_costs_no_point_and_no_training(host, tmp_path, monkeypatch):
    monkeypatch.setattr(metric_stream, "PAUSE_SECONDS", 0.1)
    made = some_run(Runtime(home=tmp_path, tracking_uri=host.database_uri), key="away")
    runtime = Runtime(home=tmp_path / "home", tracking_uri=host.uri)
    run = replace(made, runtime=runtime)
    host.stop()
    said = []
    with MetricStream(run, said.append) as stream:
        for step in range(1, 51):
            stream.metrics(step, {"loss": 1.0 / step})
    assert any("training goes on" in line for line in said)
    assert list(unsent_folder(runtime).glob("*.jsonl"))
    host.start()
    with MetricStream(run, said.append) as stream:  # the next run delivers what the last could not
        stream.metrics(51, {"loss": 1.0})
    assert [step for step, _ in history(runtime, run, "loss")] == list(range(1, 52))
    assert list(unsent_folder(runtime).iterdir()) == []


# --- runs


def test_an_attempt_that_failed_and_its_retry_are_one_run(runtime):
    first = some_run(runtime, key="retried")
    tracking.end_run(first, "FAILED")
    second = some_run(runtime, key="retried")
    assert second.run_id == first.run_id
    client = tracking.mlflow_client(runtime)
    assert client.get_run(second.run_id).info.status == "RUNNING"
    tracking.end_run(second, "FINISHED")
    assert client.get_run(second.run_id).info.status == "FINISHED"
    assert some_run(runtime, key="another").run_id != first.run_id


def test_a_deleted_run_is_not_opened_again(on_file):
    first = some_run(on_file)
    tracking.mlflow_client(on_file).delete_run(first.run_id)
    assert some_run(on_file).run_id != first.run_id


def test_a_run_tells_its_params_flat_and_its_data_by_dvc_hash(runtime):
    run = tracking.mlflow_client(runtime).get_run(some_run(runtime, key="told").run_id)
    assert run.data.params["train.lora.rank"] == "8"
    assert run.data.params["train.epochs"] == "null"
    assert run.data.params["register.model_name"] == "support-emails"
    assert run.data.tags["git_commit"] == "abc"
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("data.dvc", some_data().md5)


def test_one_key_with_other_params_is_refused(on_file):
    some_run(on_file)
    other = quickstart().spelled()
    other["train"]["lora"]["rank"] = 16
    with pytest.raises(Refused, match=r"train\.lora\.rank: 8 -> 16"):
        some_run(on_file, params=other)


def test_a_long_param_is_cut_and_does_not_stop_the_second_attempt(on_file):
    for _ in range(2):
        run = some_run(on_file, params={"note": "x" * 7000})
    logged = tracking.mlflow_client(on_file).get_run(run.run_id).data.params["note"]
    assert len(logged) == run_page.MAX_PARAM_CHARACTERS


def test_runs_and_artifacts_lie_in_the_home_and_nothing_in_the_current_folder(on_file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    register(on_file, tmp_path, 1.0)
    assert list(elsewhere.iterdir()) == []
    assert list(on_file.mlflow_artifacts.rglob("adapter_model.safetensors"))


def test_publishing_twice_is_publishing_once(runtime, tmp_path):
    (tmp_path / "sample.html").write_text("<p>")
    run = some_run(runtime, key="published")
    client = tracking.mlflow_client(runtime)
    table = {"prompt": ["a", "b"], "candidate": ["x", None]}
    for _ in range(2):
        tracking.publish(
            run,
            files={"template/sample.html": tmp_path / "sample.html"},
            tables={"answers.json": table},
            metrics={"candidate/loss": 1.5},
            tags={"gate": "passed"},
            note="**passed**",
        )
    written = client.download_artifacts(run.run_id, "answers.json", tmp_path)
    read = client._read_from_file(written)  # as MLflow's load_table does
    assert read.astype(object).where(read.notna(), None).to_dict("list") == table
    assert [f.path for f in client.list_artifacts(run.run_id, "template")] == ["template/sample.html"]
    assert len(client.get_metric_history(run.run_id, "candidate/loss")) == 1
    shown = client.get_run(run.run_id).data.tags
    assert shown["mlflow.note.content"] == "**passed**"
    assert json.loads(shown["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]


def experiment_id(client):
    return client.get_experiment_by_name(MODEL).experiment_id


def test_the_page_says_scores_gains_and_answers(tmp_path):
    scores = {"base": {"loss": 2.0, "exact_match": 0.0}, "candidate": {"loss": 1.5, "exact_match": 0.75}}
    report = ReportFacts(scores=scores, prompts=4, rows=9)
    metrics = run_page.comparable_metrics(report)
    assert metrics["candidate/exact_match"] == 0.75
    assert metrics["gain/loss_over_base"] == 0.5
    note = run_page.note(report, a_decision(), {"data": "data.dvc"})
    assert "passed" in note
    assert "| loss | 2 | 1.5 |" in note
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "references": ["ho"],
        "answers": {"base": "?", "candidate": "ho"},
        "scores": {"base": {"exact_match": 0.0}, "candidate": {"exact_match": 1.0}},
    }
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    assert run_page.answers_table(tmp_path / "answers.jsonl") == {
        "prompt": ["user: hi"],
        "expected": ["ho"],
        "base": ["?"],
        "candidate": ["ho"],
        "base exact match": [0.0],
        "candidate exact match": [1.0],
    }


def test_an_mlflow_that_cannot_be_used_is_said_at_once(tmp_path):
    nowhere = Runtime(home=tmp_path, tracking_uri="http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9 does not answer"):
        tracking.check_reachable(nowhere)
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be used"):
        tracking.check_reachable(Runtime(home=tmp_path / "file" / "home"))
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_text("not a database, but longer than a header")
    with pytest.raises(Unavailable, match="not a SQLite file"):
        tracking.check_reachable(Runtime(home=tmp_path))


def test_a_usable_mlflow_is_reachable(runtime):
    tracking.check_reachable(runtime)


# --- step metrics


def history(runtime, run, key):
    points = tracking.mlflow_client(runtime).get_metric_history(run.run_id, key)
    return sorted((point.step, point.value) for point in points)


def test_step_metrics_arrive(runtime):
    run = some_run(runtime, key="metrics")
    with MetricStream(run, print) as stream:
        for step in range(1, 1201):
            stream.metrics(step, {"loss": 2.0 / step, "nothing": float("nan")})
    assert len(history(runtime, run, "loss")) == 1200
    assert len(history(runtime, run, "nothing")) == 1200
    assert list(unsent_folder(runtime).iterdir()) == []


def test_points_that_are_sent_twice_are_there_once(runtime):
    run = some_run(runtime, key="twice")
    point = {"run_id": run.run_id, "key": "loss", "value": 1.25, "timestamp": 1_700_000_000_000, "step": 3}
    for _ in range(2):
        spool = unsent_folder(runtime) / "killed.jsonl"
        spool.parent.mkdir(parents=True, exist_ok=True)
        spool.write_text(json.dumps(point) + '\n{"torn')
        deliver_unsent(runtime)
    assert history(runtime, run, "loss") == [(3, 1.25)]
    assert list(unsent_folder(runtime).glob("*.jsonl")) == []


def test_points_of_a_deleted_run_do_not_hold_up_the_others(runtime):
    gone, alive = some_run(runtime, key="gone"), some_run(runtime, key="alive")
    tracking.mlflow_client(runtime).delete_run(gone.run_id)
    spool = unsent_folder(runtime) / "old.jsonl"
    spool.parent.mkdir(parents=True)
    points = [
        {"run_id": run.run_id, "key": "loss", "value": 1.0, "timestamp": 1_700_000_000_000, "step": 1}
        for run in (gone, alive)
    ]
    spool.write_text("".join(json.dumps(point) + "\n" for point in points))
    deliver_unsent(runtime)
    assert history(runtime, alive, "loss") == [(1, 1.0)]
    assert gone.run_id in spool.with_name("old.jsonl.refused").read_text()


def test_the_spool_of_a_live_run_is_left_to_it(on_file):
    run = some_run(on_file)
    stream = MetricStream(run, print)
    stream.spool.parent.mkdir(parents=True)
    stream._owned.acquire()
    stream.metrics(1, {"loss": 1.0})
    deliver_unsent(on_file)
    assert stream.spool.exists()
    stream._owned.release()
    deliver_unsent(on_file)
    assert not stream.spool.exists()


# --- versions


def test_registering_again_gives_the_same_version(runtime, tmp_path):
    first = register(runtime, tmp_path, 1.25)
    assert register(runtime, tmp_path, 1.25) == first
    assert register(runtime, tmp_path, 1.5) != first
    assert registry_reads.read_alias(runtime, MODEL, "candidate") != first
    assert register(runtime, tmp_path, 1.25) == first
    assert registry_reads.read_alias(runtime, MODEL, "candidate") == first


def test_concurrent_registrations_leave_one_version(runtime, tmp_path):
    run = some_run(runtime, key="together")
    adapter = small_adapter(tmp_path / "adapter", 3.5)
    start = threading.Barrier(4)

    def one(_):
        start.wait()
        return registry.register_version(
            run, MODEL, adapter, some_base(), quickstart(), a_decision(), None, tags={}, lineage={}
        )

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
    [version] = registry.versions_of(runtime, MODEL, adapter.facts.sha256)
    assert registry_reads.read_alias(runtime, MODEL, "candidate") == version
    registry.fetch_bundle(runtime, MODEL, version, tmp_path / "bundle")


def test_a_version_that_was_made_but_not_answered_for_is_found_and_surplus_ones_go(on_file, tmp_path):
    client = tracking.mlflow_client(on_file)
    first = register(on_file, tmp_path, 1.0)
    whole = client.get_model_version(MODEL, str(first))
    for _ in range(2):  # the client asked again, because two answers were lost
        client.create_model_version(MODEL, whole.source, run_id=whole.run_id, tags=whole.tags)
    said = []
    assert register(on_file, tmp_path, 1.0, say=said.append) == first
    assert len(registry.versions_of(on_file, MODEL, whole.tags["adapter_sha256"])) == 1
    assert len(said) == 2
    registry.fetch_bundle(on_file, MODEL, first, tmp_path / "bundle")


def test_of_surplus_versions_the_one_in_production_stays(on_file, tmp_path):
    client = tracking.mlflow_client(on_file)
    whole = client.get_model_version(MODEL, str(register(on_file, tmp_path, 1.0)))
    second = client.create_model_version(MODEL, whole.source, run_id=whole.run_id, tags=whole.tags)
    client.set_registered_model_alias(MODEL, "production", second.version)
    assert register(on_file, tmp_path, 1.0) == int(second.version)
    assert registry_reads.read_alias(on_file, MODEL, "production") == int(second.version)


def test_a_crash_after_the_upload_uploads_nothing_again(on_file, tmp_path, monkeypatch):
    client = tracking.mlflow_client(on_file)
    with monkeypatch.context() as patch:
        patch.setattr(client, "create_model_version", lambda *a, **k: sys.exit("killed"))
        with pytest.raises(SystemExit):
            register(on_file, tmp_path, 1.0)
    register(on_file, tmp_path, 1.0)
    experiment = experiment_id(client)
    assert len(client.search_logged_models([experiment])) == 1


def test_another_decision_on_the_same_adapter_is_told_by_the_same_version(on_file, tmp_path):
    version = register(on_file, tmp_path, 1.0, passed=False)
    assert registry.tags_of(on_file, MODEL, version)["gate_passed"] == "false"
    assert register(on_file, tmp_path, 1.0, passed=True) == version
    tags = registry.tags_of(on_file, MODEL, version)
    assert tags["gate_passed"] == "true"
    assert json.loads(tags["decision"]) == a_decision(True).model_dump(mode="json")


def test_the_bundle_holds_the_adapter_alone_and_names_its_base(runtime, tmp_path):
    version = register(runtime, tmp_path, 2.25)
    whole = registry.fetch_bundle(runtime, MODEL, version, tmp_path / "bundle")
    settings = json.loads((whole / bundle.SETTINGS).read_text())
    assert settings["base"]["weights_sha256"] == "b" * 64
    assert settings["max_new_tokens"] == quickstart().evaluate.max_new_tokens
    assert settings["sampling"] is None
    assert sorted(p.name for p in (whole / bundle.ADAPTER).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    names = [p.name for p in whole.rglob("*")]
    assert not [name for name in names if name.endswith((".pkl", ".pyc", ".bin"))]
    assert str(tmp_path) not in (whole / "MLmodel").read_text().replace(str(runtime.mlflow_artifacts), "")
    assert "mlflow==" in (whole / "requirements.txt").read_text()
    assert registry.fetch_lineage(runtime, MODEL, version) == {"fingerprints": {"train": "f" * 64}}


def test_a_fetched_adapter_is_the_registered_one_or_refused(on_file, tmp_path):
    version = register(on_file, tmp_path, 1.0)
    folder = registry.fetch_adapter(on_file, MODEL, version, tmp_path / "into", some_base())
    adapter = small_adapter(tmp_path / "adapter-1.0", 1.0)
    assert (folder / "adapter_config.json").read_text() == '{"r": 2}\n'
    assert bundle.sha256_file(folder / "adapter_model.safetensors") == adapter.facts.sha256
    with pytest.raises(Refused, match="trained on another base"):
        registry.fetch_adapter(on_file, MODEL, version, tmp_path / "into", some_base("0" * 64))
    [stored] = on_file.mlflow_artifacts.rglob("adapter_model.safetensors")
    stored.write_bytes(stored.read_bytes()[:-1] + b"!")
    with pytest.raises(Refused, match="damaged"):
        registry.fetch_adapter(on_file, MODEL, version, tmp_path / "into", some_base())
    stored.unlink()
    with pytest.raises(Refused, match="damaged"):
        registry.fetch_adapter(on_file, MODEL, version, tmp_path / "into", some_base())
    with pytest.raises(Refused, match="does not exist"):
        registry.fetch_adapter(on_file, MODEL, 99, tmp_path / "into", some_base())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole: (whole / "MLmodel").write_text("x"), "the bytes of MLmodel changed"),
        (lambda whole: (whole / "more.py").write_text("x"), "more.py was added"),
        (lambda whole: (whole / bundle.LINEAGE).unlink(), "lineage.json is gone"),
        (lambda whole: (whole / bundle.MANIFEST).write_text("{}"), "manifest.json changed"),
    ],
)
def test_any_changed_file_of_a_bundle_is_refused(on_file, tmp_path, damage, said):
    version = register(on_file, tmp_path, 1.0)
    [manifest] = on_file.mlflow_artifacts.rglob(bundle.MANIFEST)
    damage(manifest.parent)
    with pytest.raises(Refused, match=said):
        registry.fetch_bundle(on_file, MODEL, version, tmp_path / "bundle")


def test_a_run_that_was_promoted_is_still_compared_with_what_it_replaced(on_file, tmp_path):
    client = tracking.mlflow_client(on_file)
    one = register(on_file, tmp_path, 1.0)
    first, second = (small_adapter(tmp_path / f"adapter-{v}", v).facts.sha256 for v in (1.0, 2.0))
    assert registry_reads.incumbent(on_file, MODEL, first) is None
    client.set_registered_model_alias(MODEL, "production", str(one))
    assert registry_reads.incumbent(on_file, MODEL, first) is None
    assert registry_reads.incumbent(on_file, MODEL, second) == Incumbent(one, first)
    two = register(on_file, tmp_path, 2.0, compared_with=Incumbent(one, first))
    client.set_registered_model_alias(MODEL, "production", str(two))
    assert registry_reads.incumbent(on_file, MODEL, second) == Incumbent(one, first)
    # The first was decided on when nothing was in production, and is not decided on again.
    assert registry_reads.incumbent(on_file, MODEL, first) is None
    assert registry_reads.incumbent(on_file, MODEL, "0" * 64) == Incumbent(two, second)


# --- reads without mlflow


def test_reads_are_what_mlflow_says(runtime, tmp_path):
    client = tracking.mlflow_client(runtime)
    versions = [register(runtime, tmp_path, value) for value in (5.0, 6.0, 7.0)]
    client.set_registered_model_alias(MODEL, "production", str(versions[0]))
    client.set_registered_model_alias(MODEL, "previous", str(versions[1]))
    client.delete_model_version(MODEL, str(versions[1]))
    shas = [small_adapter(tmp_path / f"adapter-{v}", v).facts.sha256 for v in (5.0, 6.0, 7.0)]
    for name in (MODEL, "no-such-model"):
        for alias in ("production", "previous", "candidate", "nobody"):
            read = registry_reads.read_alias(runtime, name, alias)
            assert read == registry.alias(runtime, name, alias), alias
        for version in (*versions, 99):
            read = registry_reads.read_version(runtime, name, version)
            assert read == registry.version_tags(runtime, name, version), version
        for sha in (*shas, "0" * 64):
            found = registry.versions_of(runtime, name, sha)
            assert registry_reads.find_version(runtime, name, sha) == min(found, default=None)
    assert registry_reads.read_alias(runtime, MODEL, "production") == versions[0]
    assert registry_reads.read_alias(runtime, MODEL, "previous") is None
    assert registry_reads.find_version(runtime, MODEL, shas[1]) is None


def test_what_versions_were_scored_on_is_read_as_mlflow_tells_it(runtime, monkeypatch):
    model = f"scored-{'server' if runtime.tracking_uri else 'file'}"
    client = tracking.mlflow_client(runtime)
    client.create_registered_model(model)
    for number in ("1", "2", "3", "4"):
        told = {"held_out_digest": f"digest {number}", "split_rule": f"{number} 0.05 "}
        prints = {"held_out_splits": f"print {number}"}
        tags = (
            {"adapter_sha256": number} | ({} if number == "4" else told) | ({} if number == "3" else prints)
        )
        client.create_model_version(model, "s3://bucket/nowhere", tags=tags)
    client.delete_model_version(model, "2")
    expected = [
        HeldOut(1, "digest 1", "1 0.05 ", "print 1"),
        HeldOut(3, "digest 3", "3 0.05 ", ""),
    ]
    assert registry_reads.held_out_sets(runtime, model) == expected
    monkeypatch.setattr(registry_reads, "PAGE", 1)
    assert registry_reads.held_out_sets(runtime, model) == expected, "page by page"
    rules = {version: tags.get("split_rule") for version, tags in registry.all_tags(runtime, model).items()}
    assert rules == {1: "1 0.05 ", 3: "3 0.05 ", 4: None}
    assert registry_reads.held_out_sets(runtime, "nobody") == []


def test_reading_a_registry_that_is_not_there_makes_none(tmp_path):
    runtime = Runtime(home=tmp_path / "none")
    assert registry_reads.read_alias(runtime, MODEL, "production") is None
    assert registry_reads.read_version(runtime, MODEL, 1) is None
    assert registry_reads.incumbent(runtime, MODEL, "0" * 64) is None
    assert registry_reads.held_out_sets(runtime, MODEL) == []
    assert not (tmp_path / "none").exists()


def test_a_database_without_tables_holds_nothing_and_a_damaged_one_is_said(tmp_path):
    runtime = Runtime(home=tmp_path)
    database = tmp_path / "mlflow" / "mlflow.db"
    database.parent.mkdir()
    sqlite3.connect(database).close()
    assert registry_reads.read_alias(runtime, MODEL, "production") is None
    database.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    with pytest.raises(Unavailable, match="cannot be read"):
        registry_reads.read_alias(runtime, MODEL, "production")


def test_reads_import_no_mlflow(tmp_path):
    import subprocess

    code = (
        "import sys; from retuner import registry_reads, runtime\n"
        "registry_reads.incumbent(runtime.Runtime(), 'm', '0')\n"
        "assert not {'mlflow', 'pydantic', 'pandas'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- what else is asked of the registry


def test_the_report_that_decided_is_fetched_or_refused(on_file, tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    for name in ("report.json", "answers.jsonl", "losses.jsonl"):
        (report / name).write_text(f"{name}\n")
    digest = bundle.digest_of({path.name: bundle.sha256_file(path) for path in report.iterdir()})
    run = some_run(on_file, key="decided")
    files = {f"{registry.REPORT}/{path.name}": path for path in report.iterdir()}
    tracking.publish(run, files, tables={}, metrics={}, tags={}, note="")
    adapter = small_adapter(tmp_path / "adapter", 1.0)
    version = registry.register_version(
        *(run, MODEL, adapter, some_base(), quickstart(), a_decision(), None),
        tags={"report_digest": digest},
        lineage={},
    )
    found = registry.fetch_report(on_file, MODEL, version, tmp_path / "found")
    assert {p.name: p.read_text() for p in found.iterdir()} == {
        p.name: p.read_text() for p in report.iterdir()
    }
    [stored] = (on_file.mlflow_artifacts / run.run_id).rglob("answers.jsonl")
    stored.write_text("better answers\n")
    with pytest.raises(Refused, match="not the one that decided"):
        registry.fetch_report(on_file, MODEL, version, tmp_path / "found")


def test_models_are_named_and_a_home_without_runs_has_none(on_file, tmp_path):
    assert registry.model_names(Runtime(home=tmp_path / "none")) == []
    assert not (tmp_path / "none").exists()
    register(on_file, tmp_path, 1.0)
    assert registry.model_names(on_file) == [MODEL]


def test_the_newest_versions_and_those_with_an_alias_are_kept(on_file, tmp_path):
    versions = [register(on_file, tmp_path, value) for value in (1.0, 2.0, 3.0, 4.0)]
    registry.set_alias(on_file, MODEL, "production", versions[0])
    shas = [small_adapter(tmp_path / f"adapter-{v}", v).facts.sha256 for v in (1.0, 2.0, 3.0, 4.0)]
    kept = {tags["adapter_sha256"] for tags in registry.tags_to_keep(on_file, MODEL, 2)}
    assert kept == {shas[0], shas[2], shas[3]}


def test_a_version_still_stands_until_it_is_deleted_or_holds_another_adapter(on_file, tmp_path):
    version = register(on_file, tmp_path, 1.0)
    sha = small_adapter(tmp_path / "adapter-1.0", 1.0).facts.sha256
    assert registry_reads.still_registered(on_file, MODEL, version, sha)
    assert not registry_reads.still_registered(on_file, MODEL, version, "0" * 64)
    tracking.mlflow_client(on_file).delete_model_version(MODEL, str(version))
    assert not registry_reads.still_registered(on_file, MODEL, version, sha)


def test_only_a_run_that_still_runs_is_killed(on_file):
    client = tracking.mlflow_client(on_file)
    running, ended = some_run(on_file, key="running"), some_run(on_file, key="ended")
    tracking.end_run(ended, "FINISHED")
    for run_id in (running.run_id, ended.run_id, "0" * 32):
        tracking.kill_if_running(on_file, run_id)
    assert client.get_run(running.run_id).info.status == "KILLED"
    assert client.get_run(ended.run_id).info.status == "FINISHED"


MAKES_A_DATABASE = """
import sys
from pathlib import Path
from retuner.tracking import make_database
make_database(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("growth", [1, 30_000, 300_000])
def test_a_database_whose_making_was_killed_is_made_anew(tmp_path, growth):
    path = tmp_path / "mlflow" / "mlflow.db"
    making = subprocess.Popen([sys.executable, "-c", MAKES_A_DATABASE, str(path)])
    while not any(draft.stat().st_size >= growth for draft in path.parent.glob("*/mlflow.db")):
        assert making.poll() is None
    making.kill()
    assert making.wait() == -signal.SIGKILL and not path.exists()
    assert registry.alias(Runtime(home=tmp_path), MODEL, "production") is None
    assert sorted(left.name for left in path.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


LEAVES_A_JOURNAL = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")
connection.execute("UPDATE registered_model_aliases SET version = 7")
connection.executemany("INSERT INTO tags VALUES (?, ?, ?)", [(f"k{n}", "v" * 900, "r") for n in range(3000)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_half_done_is_rolled_back_when_it_is_read(on_file, tmp_path):
    version = register(on_file, tmp_path, 1.0)
    registry.set_alias(on_file, MODEL, "production", version)
    path = registry_reads.sqlite_path(on_file.mlflow_uri)
    subprocess.run([sys.executable, "-c", LEAVES_A_JOURNAL, str(path)], check=False)
    assert path.with_name(f"{path.name}-journal").exists()
    assert registry_reads.read_alias(on_file, MODEL, "production") == version
