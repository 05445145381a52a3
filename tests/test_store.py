import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from retuner.artifacts import Facts
from retuner.errors import Refused, Unavailable
from retuner.fingerprint import fingerprint
from retuner.store import LARGE_BYTES, Store


class Told(Facts):
    rows: int


IDENTITY = {"stage": "train", "params": {"rank": 8}, "inputs": {}, "code": "c1", "libraries": {}}
NAME = fingerprint(IDENTITY)


def build(out: Path, work: Path) -> Told:
    (out / "rows.txt").write_text("one\ntwo\n")
    (out / "large.bin").write_bytes(bytes(LARGE_BYTES + 1))
    (out / "aside").mkdir()
    (out / "aside" / "plot.txt").write_text("for people")
    return Told(rows=2)


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    return Store(tmp_path / "store", said.append)


@pytest.fixture
def made(store):
    return store.make("train", IDENTITY, Told, build)


def test_what_was_made_is_found_with_its_facts(store, made):
    found = store.find("train", NAME, Told)
    assert found == made
    assert found.facts.rows == 2
    assert not list((store.root / "drafts").iterdir())


def test_what_is_for_people_is_not_in_the_digest(store, made):
    def other(out: Path, work: Path) -> Told:
        facts = build(out, work)
        (out / "aside" / "plot.txt").write_text("another day")
        return facts

    assert store.make("train", {**IDENTITY, "code": "c2"}, Told, other).digest == made.digest


def flip(path: Path, keep_mtime: bool) -> None:
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    if keep_mtime:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


DAMAGE = {
    "a file deleted": lambda f: (f / "rows.txt").unlink(),
    "a bit flipped": lambda f: flip(f / "rows.txt", False),
    "a bit flipped in a large file, its mtime restored": lambda f: flip(f / "large.bin", True),
    "a file for people changed": lambda f: (f / "aside" / "plot.txt").write_text("x"),
    "a file truncated": lambda f: os.truncate(f / "large.bin", 10),
    "a file replaced by a link": lambda f: (
        (f / "rows.txt").rename(f / "x"),
        (f / "rows.txt").symlink_to("x"),
    ),
    "the manifest deleted": lambda f: (f / "manifest.json").unlink(),
    "the manifest truncated": lambda f: os.truncate(f / "manifest.json", 20),
    "a fact in the manifest changed": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"rows": 2', '"rows": 3')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_quarantined_said_and_never_served(store, made, said, damage):
    damage(made.path)
    assert store.find("train", NAME, Told) is None
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert "set aside" in said[-1]
    assert store.make("train", IDENTITY, Told, build).digest == made.digest


def test_before_use_every_byte_is_hashed_even_where_a_file_looks_untouched(store, made):
    flip(made.path / "large.bin", True)
    stat = (made.path / "large.bin").stat()
    looks = {"large.bin": [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]}
    (store.root / "seen" / f"{NAME}.json").write_text(json.dumps(looks))  # as if the disk had rotted
    assert store.find("train", NAME, Told)
    with pytest.raises(Unavailable, match=r"large\.bin"):
        store.verify(made)


def test_a_failed_stage_leaves_no_draft_and_no_result_but_keeps_its_work(store):
    def fails(out: Path, work: Path) -> Told:
        (work / "checkpoint").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError):
        store.make("train", IDENTITY, Told, fails)
    assert store.find("train", NAME, Told) is None
    assert not list((store.root / "drafts").iterdir())
    assert (store.root / "work" / NAME / "checkpoint").read_text() == "half"


def test_a_code_change_can_be_accepted_once_and_the_acceptance_is_kept(store, made):
    edited = {**IDENTITY, "code": "c2"}
    assert store.accept("train", edited, "renamed a variable") == NAME
    found = store.find("train", fingerprint(edited), Told)
    assert found and found.digest == made.digest
    accepted = store.manifest(fingerprint(edited))["accepted"]
    assert (accepted["made_under"], accepted["because"]) == (NAME, "renamed a variable")
    assert store.find("train", NAME, Told)


def test_nothing_else_can_be_accepted(store, made):
    with pytest.raises(Refused, match="code alone"):
        store.accept("train", {**IDENTITY, "code": "c2", "params": {"rank": 9}}, "it is the same")


@pytest.fixture
def other(tmp_path, said):
    """The store of another machine that shares results with the first."""
    return Store(tmp_path / "other", said.append, f"file://{tmp_path}/shared")


def test_a_result_made_on_one_machine_is_a_hit_on_another(tmp_path, other):
    first = Store(tmp_path / "first", shared_url=f"file://{tmp_path}/shared")
    made = first.make("train", IDENTITY, Told, build)
    found = other.find("train", NAME, Told)
    assert found and found.digest == made.digest
    assert (found.path / "large.bin").read_bytes() == (made.path / "large.bin").read_bytes()


def test_damage_in_the_shared_store_is_never_served(tmp_path, other, said):
    Store(tmp_path / "first", shared_url=f"file://{tmp_path}/shared").make("train", IDENTITY, Told, build)
    flip(next((tmp_path / "shared").rglob("large.bin")), keep_mtime=True)
    assert other.find("train", NAME, Told) is None
    assert "damaged" in said[-1]
    assert not list((other.root / "drafts").iterdir())


def test_an_upload_that_was_cut_off_is_no_result(tmp_path, other):
    Store(tmp_path / "first", shared_url=f"file://{tmp_path}/shared").make("train", IDENTITY, Told, build)
    next((tmp_path / "shared").rglob("manifest.json")).unlink()
    assert other.find("train", NAME, Told) is None


def test_what_is_gone_or_torn_in_the_shared_store_is_made_again_and_shared(tmp_path, other, said):
    shared = f"file://{tmp_path}/shared"
    Store(tmp_path / "first", shared_url=shared).make("train", IDENTITY, Told, build)
    next((tmp_path / "shared").rglob("rows.txt")).unlink()
    assert other.find("train", NAME, Told) is None and "rows.txt is gone" in said[-1]
    manifest = next((tmp_path / "shared").rglob("manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:100])
    assert other.find("train", NAME, Told) is None and "its manifest" in said[-1]
    other.make("train", IDENTITY, Told, build)
    assert Store(tmp_path / "third", shared_url=shared).find("train", NAME, Told)


def test_what_another_process_published_meanwhile_stands(tmp_path, store):
    shared = f"file://{tmp_path}/shared"
    Store(tmp_path / "first", shared_url=shared).make("train", IDENTITY, Told, build)

    def late(out: Path, work: Path) -> Told:
        assert Store(store.root, shared_url=shared).find("train", NAME, Told)
        build(out, work)
        return Told(rows=3)

    assert store.make("train", IDENTITY, Told, late).facts.rows == 2
    assert store.find("train", NAME, Told).facts.rows == 2
    assert not list((store.root / "drafts").iterdir())


def test_what_was_published_meanwhile_and_is_damaged_gives_way(tmp_path, store, said):
    def late(out: Path, work: Path) -> Told:
        store.folder(NAME).mkdir(parents=True)
        (store.folder(NAME) / "manifest.json").write_text("{}")
        return build(out, work)

    assert store.make("train", IDENTITY, Told, late).facts.rows == 2
    assert store.find("train", NAME, Told) and "set aside" in said[-1]


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from retuner.store import Store
from test_store import IDENTITY, NAME, Told, build
store = Store(Path({root!r}), lambda line: print(line, flush=True))
def slow(out, work):
    (out / "half").write_text("x")
    print("building", flush=True)
    while not Path({go!r}).exists(): time.sleep(0.05)
    (out / "half").unlink()
    with open({count!r}, "a") as file: file.write("x")
    return build(out, work)
with store.lock(NAME, "train"):
    if not store.find("train", NAME, Told):
        store.make("train", IDENTITY, Told, slow)
"""


def writer(store: Store, folder: Path) -> subprocess.Popen:
    """A process that computes the result once `folder/go` is there, and counts that in `folder/count`."""
    code = WRITER.format(
        tests=str(Path(__file__).parent),
        root=str(store.root),
        count=str(folder / "count"),
        go=str(folder / "go"),
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_a_killed_writer_leaves_no_lock_and_its_draft_is_swept(store, tmp_path):
    process = writer(store, tmp_path)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((store.root / "drafts").iterdir())
    with store.lock(NAME, "train"):
        assert store.find("train", NAME, Told) is None
        store.make("train", IDENTITY, Told, build)
    assert not list((store.root / "drafts").iterdir())


def test_two_processes_that_need_the_same_compute_it_once(store, tmp_path):
    first = writer(store, tmp_path)
    assert first.stdout.readline() == "building\n"
    second = writer(store, tmp_path)
    assert "another run is busy" in second.stdout.readline()
    (tmp_path / "go").touch()
    assert (first.wait(), second.wait()) == (0, 0)
    assert (tmp_path / "count").read_text() == "x"


def test_a_full_disk_is_one_message_and_loses_nothing(store, tmp_path):
    code = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from retuner.errors import Unavailable
        from retuner.store import Store
        from test_store import IDENTITY, Told, build
        try:
            Store(Path({str(store.root)!r})).make("train", IDENTITY, Told, build)
        except Unavailable as error:
            print(error); sys.exit(error.exit_code)
    """)
    limit = LARGE_BYTES // 2
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4, done.stderr
    assert "no room to write" in done.stdout and "free some space" in done.stdout
    assert not list((store.root / "drafts").iterdir())
    assert store.find("train", NAME, Told) is None
