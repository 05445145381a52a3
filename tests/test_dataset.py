"""open_dataset against real DVC repositories with a local remote."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo

from retuner.dataset import open_dataset
from retuner.errors import Refused, Unavailable

FILES = {
    "a.jsonl": "one\n",
    "b-2.jsonl": "two\r\n",
    "nested/b.jsonl": "three\n",
    "nested/deep/ünï — 数据.jsonl": "vier\n",
    "nested.jsonl": "",
    ".hidden": "yes\n",
    'quote".txt': "it's\n",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose data/ is tracked and pushed to a remote that lies beside .dvc."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = tmp_path / "project"
    for relpath, text in FILES.items():
        path = root / "data" / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    with Repo.init(str(root), no_scm=True) as repo, repo.config.edit() as config:
        config["core"] |= {"remote": "store", "analytics": False}
        config["remote"]["store"] = {"url": str(root / "dvcstore"), "verify": True}
    _add_and_push(root, "data")
    return root


def _add_and_push(root: Path, target: str) -> None:
    with Repo(str(root)) as repo:
        repo.add([str(root / target)])
        repo.push()


def _fresh_clone(project: Path) -> Path:
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc" / "cache")
    return project


def _flip_a_bit(path: Path) -> None:
    """As a failing disk does: DVC looks again at objects that are writable, but not at read-only ones."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    path.chmod(0o444)


def _object(top: Path, md5: str) -> Path:
    return top / "files" / "md5" / md5[:2] / md5[2:]


def test_the_digest_of_nested_folders_and_unicode_names_is_dvcs(project):
    dataset = open_dataset(project / "data.dvc")
    assert f"md5: {dataset.md5}\n" in (project / "data.dvc").read_text()
    assert dataset.md5.endswith(".dir")
    assert {file.relpath: file.path.read_bytes().decode() for file in dataset.files} == FILES


def test_data_that_matches_is_opened_without_importing_dvc(project):
    code = (
        "import sys; from pathlib import Path; from retuner.dataset import open_dataset; "
        f"open_dataset(Path({str(project / 'data.dvc')!r})); sys.exit('dvc' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_fresh_clone_pulls_from_the_remote(project):
    before = open_dataset(project / "data.dvc")
    assert open_dataset(_fresh_clone(project) / "data.dvc") == before


def test_a_missing_file_is_pulled_back(project):
    before = open_dataset(project / "data.dvc")
    (project / "data" / "nested" / "b.jsonl").unlink()
    assert open_dataset(project / "data.dvc") == before


def test_an_edited_file_is_refused_by_name_with_both_digests(project):
    named = open_dataset(project / "data.dvc").md5
    (project / "data" / "nested" / "b.jsonl").write_text("edited\n")
    (project / "data" / "new.jsonl").write_text("new\n")
    with pytest.raises(Refused) as refused:
        open_dataset(project / "data.dvc")
    assert named in refused.value.expected
    assert "changed: nested/b.jsonl" in refused.value.found
    assert "added: new.jsonl" in refused.value.found
    assert "dvc add data" in refused.value.do
    assert "dvc checkout data" in refused.value.do
    assert (project / "data" / "nested" / "b.jsonl").read_text() == "edited\n"


def test_a_missing_file_beside_an_edited_one_pulls_nothing(project):
    (project / "data" / "a.jsonl").unlink()
    (project / "data" / "nested" / "b.jsonl").write_text("edited\n")
    with pytest.raises(Refused, match=r"missing: a\.jsonl"):
        open_dataset(project / "data.dvc")
    assert not (project / "data" / "a.jsonl").exists()


def test_accepting_an_edit_with_dvc_add_makes_it_the_data(project):
    before = open_dataset(project / "data.dvc")
    (project / "data" / "a.jsonl").write_text("edited\n")
    _add_and_push(project, "data")
    after = open_dataset(project / "data.dvc")
    assert after.md5 != before.md5


def test_files_that_dvc_ignores_are_not_data(project):
    before = open_dataset(project / "data.dvc")
    (project / ".dvcignore").write_text("*.swp\n")
    (project / "data" / ".a.jsonl.swp").write_text("editor\n")
    assert open_dataset(project / "data.dvc") == before


def test_a_flipped_bit_in_the_cache_is_caught_though_dvc_serves_it(project):
    md5 = open_dataset(project / "data.dvc").files[1].md5
    _flip_a_bit(_object(project / ".dvc" / "cache", md5))
    shutil.rmtree(project / "data")
    with pytest.raises(Unavailable, match=r"cache holds corrupt bytes for a\.jsonl"):
        open_dataset(project / "data.dvc")
    # And again, now that the corrupt bytes lie in data/: it is no edit of the user's.
    with pytest.raises(Unavailable, match=r"cache holds corrupt bytes for a\.jsonl"):
        open_dataset(project / "data.dvc")


def test_a_flipped_bit_on_the_remote_is_caught_and_named(project):
    md5 = open_dataset(project / "data.dvc").files[1].md5
    _flip_a_bit(_object(project / "dvcstore", md5))
    with pytest.raises(Unavailable, match=r"`store`.* holds corrupt bytes for a\.jsonl"):
        open_dataset(_fresh_clone(project) / "data.dvc")


@pytest.mark.parametrize("store", ["dvcstore", ".dvc/cache"])
def test_a_flipped_bit_in_the_list_of_files_is_caught(project, store):
    md5 = open_dataset(project / "data.dvc").md5
    _flip_a_bit(_object(project / store, md5))
    shutil.rmtree(project / "data")
    if store == "dvcstore":
        shutil.rmtree(project / ".dvc" / "cache")
    with pytest.raises(Unavailable, match="corrupt bytes for the list of files of"):
        open_dataset(project / "data.dvc")


def test_a_file_that_the_remote_lacks_is_named(project):
    md5 = open_dataset(project / "data.dvc").files[1].md5
    _object(project / "dvcstore", md5).unlink()
    with pytest.raises(Unavailable, match=r"`store`.* does not have a\.jsonl"):
        open_dataset(_fresh_clone(project) / "data.dvc")


def test_a_remote_that_is_gone_is_unavailable(project):
    shutil.rmtree(project / "dvcstore")
    with pytest.raises(Unavailable, match=r"`store`.* does not have the list of files"):
        open_dataset(_fresh_clone(project) / "data.dvc")


def test_a_remote_that_refuses_connections_is_unavailable(project):
    with Repo(str(project)) as repo, repo.config.edit() as config:
        config["remote"]["store"] = {"url": "http://127.0.0.1:9/nothing"}
    with pytest.raises(Unavailable, match="remote cannot be used"):
        open_dataset(_fresh_clone(project) / "data.dvc")


def test_a_project_without_a_remote_says_so(project):
    with Repo(str(project)) as repo, repo.config.edit() as config:
        del config["core"]["remote"]
        del config["remote"]["store"]
    with pytest.raises(Unavailable, match="no remote specified"):
        open_dataset(_fresh_clone(project) / "data.dvc")


def test_outside_a_dvc_project_missing_data_is_unavailable_and_edited_data_refused(project, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(project / "data.dvc", alone)
    with pytest.raises(Unavailable, match="DVC cannot be asked"):
        open_dataset(alone / "data.dvc")
    shutil.copytree(project / "data", alone / "data")
    open_dataset(alone / "data.dvc")
    (alone / "data" / "a.jsonl").write_text("edited\n")
    with pytest.raises(Refused, match="has the digest"):
        open_dataset(alone / "data.dvc")


def test_one_tracked_file_is_a_dataset(project):
    (project / "chats.jsonl").write_text("hello\n")
    _add_and_push(project, "chats.jsonl")
    dataset = open_dataset(project / "chats.jsonl.dvc")
    assert [file.relpath for file in dataset.files] == ["chats.jsonl"]
    assert dataset.md5 == dataset.files[0].md5

    (project / "chats.jsonl").unlink()
    assert open_dataset(project / "chats.jsonl.dvc") == dataset

    (project / "chats.jsonl").write_text("edited\n")
    with pytest.raises(Refused, match=r"changed: chats\.jsonl"):
        open_dataset(project / "chats.jsonl.dvc")


@pytest.mark.parametrize("place", ["data", "data/nested", "data/nested/b.jsonl", "data/new.jsonl"])
def test_links_are_refused_wherever_they_are(project, tmp_path, place):
    """Also one whose target has the right bytes: it could have others by the time they are used."""
    link, target = project / place, tmp_path / "elsewhere"
    if link.exists():
        link.rename(target)
    else:
        target.write_text("secret\n")
    link.symlink_to(target)
    with pytest.raises(Refused, match="symbolic link"):
        open_dataset(project / "data.dvc")


def test_an_empty_folder_is_refused(project):
    (project / "empty").mkdir()
    _add_and_push(project, "empty")
    with pytest.raises(Refused, match="holds no files"):
        open_dataset(project / "empty.dvc")


@pytest.mark.parametrize("path", ["../data", "/etc", "a/../../data", ".", "data\\..\\x", "", 7, None])
def test_paths_that_leave_the_folder_are_refused(project, path):
    out = {"md5": "0" * 32 + ".dir", "hash": "md5", "path": path}
    (project / "x.dvc").write_text(json.dumps({"outs": [out]}))
    with pytest.raises(Refused, match="names the path"):
        open_dataset(project / "x.dvc")


def test_a_list_of_files_that_leads_out_of_the_folder_writes_nothing(project, tmp_path):
    from hashlib import md5

    listing = json.dumps([{"md5": md5(b"evil\n").hexdigest(), "relpath": "../../evil"}], sort_keys=True)
    for content, suffix in ((b"evil\n", ""), (listing.encode(), ".dir")):
        place = _object(project / "dvcstore", md5(content).hexdigest() + suffix)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    out = {"md5": md5(listing.encode()).hexdigest() + ".dir", "hash": "md5", "path": "data"}
    _fresh_clone(project)
    (project / "data.dvc").write_text(json.dumps({"outs": [out]}))
    with pytest.raises(Refused, match=r"\.\./\.\./evil"):
        open_dataset(project / "data.dvc")
    assert not (project.parent / "evil").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<<<<<<< ours\nouts: [\n", "is not YAML"),
        ("", "no list of `outs`"),
        ("outs: data\n", "no list of `outs`"),
        ("outs: []\n", "0 outs"),
        ("outs: [{path: a, md5: x}, {path: b, md5: y}]\n", "2 outs"),
        ("outs: [{path: data}]\n", "names the digest None"),
        ("outs: [{path: data, hash: md5, md5: abc}]\n", "names the digest 'abc'"),
        (f"outs: [{{path: data, md5: {'a' * 32}}}]\n", "DVC 2"),
        (f"wdir: ..\nouts: [{{path: data, hash: md5, md5: {'a' * 32}}}]\n", "wdir"),
    ],
)
def test_a_dvc_file_that_cannot_be_understood_is_refused(tmp_path, text, complaint):
    (tmp_path / "data.dvc").write_text(text)
    with pytest.raises(Refused, match=complaint):
        open_dataset(tmp_path / "data.dvc")


def test_a_missing_dvc_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="there is no"):
        open_dataset(tmp_path / "data.dvc")


def test_a_stat_cache_spares_reading_and_still_notices_every_edit(project, tmp_path, monkeypatch):
    import retuner.dataset as module

    stat_cache = tmp_path / "stat.json"
    later = module.time.time_ns() + 3_600_000_000_000
    monkeypatch.setattr(module.time, "time_ns", lambda: later)
    first = open_dataset(project / "data.dvc", stat_cache)

    read = []
    digest = module.hashlib.file_digest
    monkeypatch.setattr(
        module.hashlib, "file_digest", lambda file, kind: read.append(Path(file.name)) or digest(file, kind)
    )
    assert open_dataset(project / "data.dvc", stat_cache) == first
    assert read == []

    # Same size, and the modification time put back: the change time still tells.
    victim = project / "data" / "a.jsonl"
    times = victim.stat()
    victim.write_text("onE\n")
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Refused, match=r"changed: a\.jsonl"):
        open_dataset(project / "data.dvc", stat_cache)
    assert read == [victim]


def test_a_stat_cache_does_not_trust_files_written_just_now(project, tmp_path):
    stat_cache = tmp_path / "stat.json"
    (project / "data" / "a.jsonl").write_text("new\n")
    _add_and_push(project, "data")
    open_dataset(project / "data.dvc", stat_cache)
    assert str(project / "data" / "a.jsonl") not in json.loads(stat_cache.read_text())


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 1', "null", "{PATH: 1}"])
def test_a_broken_stat_cache_is_only_ignored(project, tmp_path, content):
    stat_cache = tmp_path / "stat.json"
    stat_cache.write_text(content.replace("PATH", json.dumps(str(project / "data" / "a.jsonl"))))
    assert open_dataset(project / "data.dvc", stat_cache) == open_dataset(project / "data.dvc")
