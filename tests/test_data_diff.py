"""What changed in the data between two revisions, and the `data` verbs of the command line that tell it."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from dvc.repo import Repo
from hypothesis import given
from hypothesis import strategies as st
from projects import add_to_dvc, chats, make_project, write_chats

from flows.cli import main
from flows.data_console import show_diff
from retuner.chats import read_chats
from retuner.data_diff import Source, diff, jensen_shannon
from retuner.dataset import DataFile
from retuner.describe import describe
from retuner.dvc_revision import open_revision
from retuner.errors import Refused, Unavailable

read = partial(read_chats, format="auto")


def asked(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def source(folder: Path, name: str, files: dict[str, list[dict | str]], side=None) -> Source:
    """A state of the data; texts among the rows are lines as they are."""
    made = []
    for relpath, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = folder / name / relpath
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        made.append(DataFile(relpath, path, path.stat().st_size, md5))
    return Source(name, f"md5 of {name}", tuple(made), side)


@pytest.fixture
def compare(tmp_path):
    def compared(a: dict, b: dict, format="auto"):
        return diff(source(tmp_path, "a", a), source(tmp_path, "b", b), partial(read_chats, format=format))

    return compared


def test_rows_that_came_went_or_were_answered_anew_are_told_apart(compare):
    stays = [asked(f"Stay {n}?", "yes") for n in range(3)]
    found = compare(
        {"x.jsonl": [*stays, asked("Old?", "gone"), asked("Why?", "So.")]},
        {"x.jsonl": [asked("Why?", "Because."), *stays[::-1], asked("New?", "here"), asked("Newer?", "too")]},
    )
    assert (found.kept, found.added, found.removed, found.changed) == (3, 2, 1, 1)
    assert {row.prompt for row in found.examples_added} == {"New?", "Newer?"}
    assert [(row.prompt, row.answer) for row in found.examples_removed] == [("Old?", "gone")]
    [anew] = found.examples_changed
    assert (anew.prompt, anew.before, anew.after) == ("Why?", "So.", "Because.")
    assert (found.moved, found.added_by_side) == (None, {})


def test_what_keeps_its_answers_is_asked_differently_not_answered_anew(compare):
    kind = {"role": "system", "content": "Be kind."}
    found = compare(
        {
            "x.jsonl": [
                asked("What is it?", "A cat."),
                {"messages": [kind, *asked("Hi", "Hello")["messages"]]},
            ]
        },
        {
            "x.jsonl": [
                asked("what  is it?", "A cat."),
                {"messages": [{**kind, "content": "be kind."}, *asked("Hi", "Hello")["messages"]]},
            ]
        },
    )
    assert (found.added, found.removed, found.changed, found.asked_differently) == (0, 0, 0, 2)
    assert {(each.before, each.after) for each in found.examples_asked_differently} == {
        ("What is it? / A cat.", "what is it? / A cat."),
        ("Be kind. / Hi / Hello", "be kind. / Hi / Hello"),
    }


def pair(chosen: str, rejected: str) -> dict:
    return {"prompt": "Q?", "chosen": chosen, "rejected": rejected}


LATER = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (asked("Q?", "a" * 400 + "1"), asked("Q?", "a" * 400 + "2"), "…" + "a" * 80 + "2"),
        (asked("Q?", "字" * 400 + "甲"), asked("Q?", "字" * 400 + "乙" * 99), "…" + "字" * 80 + "乙" * 80 + "…"),
        (pair("yes", "no"), pair("yes", "never"), "yes / never"),
        (pair("y" * 300, "no"), pair("y" * 300, "never"), "…" + "y" * 76 + " / never"),
        (asked("Q?", "y " * 200), {"messages": [*asked("Q?", "y " * 200)["messages"], *LATER]}, None),
        (asked("Q?", "two words"), asked("Q?", "two  words\n"), "two  words\n"),
    ],
)  # fmt: skip
def test_an_example_of_what_was_answered_anew_shows_where_the_answers_differ(compare, before, after, shown):
    format = "preference" if "chosen" in before else "auto"
    found = compare({"x.jsonl": [before]}, {"x.jsonl": [after]}, format)
    [change] = found.examples_changed
    assert found.changed == 1 and change.before != change.after
    if shown:
        assert change.after == shown


@given(st.text("ab \n", min_size=1, max_size=400), st.text("ab \n", min_size=1, max_size=400))
def test_two_different_answers_are_never_shown_as_the_same(tmp_path_factory, then, now):
    folder = tmp_path_factory.mktemp("answers")
    a, b = (
        source(folder, name, {"x.jsonl": [asked("Q?", f"{'a' * 99}{said}")]})
        for name, said in (("a", then), ("b", now))
    )
    for change in diff(a, b, read).examples_changed:
        assert change.before != change.after


def test_of_many_conversations_with_one_prompt_each_is_paired_with_what_it_became(compare):
    stays, old, new = (
        asked("hello", "stays"),
        "The weather is fine in the north.",
        "The weather is foul in the north.",
    )
    found = compare(
        {"x.jsonl": [asked("hello", "a cat"), asked("hello", old), asked("hello", "some dog"), stays]},
        {
            "x.jsonl": [
                asked("Hello", "a cat"),
                stays,
                stays,
                asked("hello", "nothing at all"),
                asked("hello", new),
            ]
        },
    )
    assert (found.kept, found.added, found.removed) == (1, 1, 0)
    assert (found.changed, found.asked_differently) == (2, 1)
    [anew], [differently] = found.examples_changed, found.examples_asked_differently
    assert (anew.before, anew.after) == (old, new)
    assert (differently.before, differently.after) == ("hello / a cat", "Hello / a cat")


def test_a_row_that_only_went_to_another_file_neither_came_nor_went(compare):
    rows = [asked(f"Row {n}?", "yes") for n in range(4)]
    found = compare({"x.jsonl": rows, "y.jsonl": rows[:1]}, {"x.jsonl": rows[1:], "z.jsonl": rows[:1] * 2})
    assert (found.kept, found.added, found.removed, found.changed) == (5, 0, 0, 0)
    assert (found.files_added, found.files_removed, found.files_changed) == (
        ("z.jsonl",), ("y.jsonl",), ("x.jsonl",)
    )  # fmt: skip


def test_a_copy_more_of_a_row_is_one_row_added(compare):
    found = compare({"x.jsonl": [asked("Q?", "a")]}, {"x.jsonl": [asked("Q?", "a")] * 3})
    assert (found.kept, found.added, found.removed, found.changed) == (1, 2, 0, 0)


def test_files_that_are_the_same_in_both_are_read_once(tmp_path):
    opened = []

    def watched(files):
        files = list(files)
        opened.extend(file.relpath for file in files)
        return read(files)

    rows = [asked(f"Row {n}?", "yes") for n in range(5)]
    a = source(tmp_path, "a", {"same.jsonl": rows, "x.jsonl": rows[:1]})
    b = source(tmp_path, "b", {"same.jsonl": rows, "x.jsonl": rows[:2]})
    found = diff(a, b, watched)
    assert opened.count("same.jsonl") == 1
    assert (found.a.rows, found.b.rows, found.kept, found.added) == (6, 7, 6, 1)


def test_the_sides_of_what_changed_are_told_and_prompts_that_moved_are_counted(tmp_path):
    rows = [asked(f"Row {n}?", "yes") for n in range(8)]
    held = {"a": "train", "b": "train"}

    def side_in(name: str):
        return lambda group: held[name] if int(group, 16) % 2 else "held_out"

    a = source(tmp_path, "a", {"x.jsonl": rows[:6]}, side_in("a"))
    b = source(tmp_path, "b", {"x.jsonl": rows}, side_in("b"))
    found = diff(a, b, read)
    assert found.moved == 0
    assert sum(found.added_by_side.values()) == found.added == 2
    assert {row.side for row in found.examples_added} == {s for s, n in found.added_by_side.items() if n}
    held["b"] = "held_out"
    assert 0 < diff(a, b, read).moved < 6


def test_shifts_in_length_roles_and_words_are_those_of_the_whole(compare):
    a = [asked("What colour is it?", "red")] * 2
    b = [
        *a,
        {"messages": [{"role": "system", "content": "Be kind."}, *asked("Où?", "Ici, l’été")["messages"]]},
    ]
    found = compare({"x.jsonl": a}, {"x.jsonl": [*b, "{broken"]})
    assert (found.a.rows, found.b.rows, found.b.rejected) == (2, 3, {"truncated": 1})
    told = describe(row["messages"] for row in b)
    assert found.b.characters["longest"] == told.lengths["all"].longest == 21
    assert found.b.roles["system"] == {"messages": 1, "characters": 8, "median": 8}
    assert "system" not in found.a.roles
    assert {word.word for word in found.words_came} == {"be", "kind", "où", "ici", "l’été"}
    assert found.words_went == ()
    assert (found.a.words, found.a.distinct_words, found.b.words) == (10, 5, 15)
    assert 0 < found.vocabulary_shift < 0.5


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ("So be it.", "So be it!", ["- So be it.", "+ So be it!"]),
        ("two words", "two  words\n", ["- two·words", "+ two··words\\n"]),
        ("é 好", "e\u0301 好", ["- é·好", "+ e\\u0301·好"]),
        ("\u2764", "\u2764\ufe0f", ["- \u2764", "+ \u2764\\ufe0f"]),
    ],
)
def test_the_terminal_never_shows_two_answers_that_look_the_same(compare, capsys, before, after, shown):
    show_diff(compare({"x.jsonl": [asked("Q?", before)]}, {"x.jsonl": [asked("Q?", after)]}))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[lines.index("examples") + 1 :] == ["answered anew Q?", *shown]


def test_what_steers_a_terminal_is_shown_as_an_escape_there_and_exact_in_json(compare, capsys):
    found = compare(
        {"x.jsonl": [asked("Old\x1b[2J?", "no\u202eway"), asked("Why?", "So.\x9b")]},
        {
            "evil\x1b]0;owned\x07\n.jsonl": [asked("Why?", "\u2066Because\u2069")],
            "x.jsonl": [asked("Family?", "\U0001f469\u200d\U0001f467 می\u200cخواهم [bold]")],
        },
    )
    show_diff(found)
    out = capsys.readouterr().out
    for told in (
        r"files added: evil\x1b]0;owned\x07\n.jsonl",
        r"Old\x1b[2J?",
        r"no\u202eway",
        r"- So.\x9b",
        r"+ \u2066Because\u2069",
        "\U0001f469\u200d\U0001f467 می\u200cخواهم [bold]",
    ):
        assert told in out
    assert not set(out) & set("\x1b\x07\x9b\u202e\u2066\u2069")
    assert found.examples_removed[0].prompt == "Old\x1b[2J?"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("请" * 500, "请" * 160 + "…"),
        ("https://example.org/" + "a" * 300, "https://example.org/" + "a" * 140 + "…"),
        ("two  words\n\nhere", "two words here"),
        ("字" * 160, "字" * 160),
        ("x" * 159 + "e\u0301" * 9, "x" * 159 + "…"),
        ("न" + "मि" * 200, "न" + "मि" * 79 + "…"),
        ("x" * 157 + "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 2, "x" * 157 + "…"),
        ("e" + "\u0301" * 900, "e" + "\u0301" * 159 + "…"),
    ],
)
def test_a_long_text_is_cut_between_characters_whether_it_has_spaces_or_not(compare, text, shown):
    [row] = compare({"x.jsonl": []}, {"x.jsonl": [asked(text, text)]}).examples_added
    assert (row.prompt, row.answer) == (shown, shown)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("It's l’été, x_1!", {"it's", "l’été", "x_1"}),
        ("请问‘好’吗", {"请", "问", "好", "吗"}),
        ("हिन्दी में", {"हिन्दी", "में"}),
        ("مُحَمَّد", {"مُحَمَّد"}),
        ("cafe\u0301s", {"cafe\u0301s"}),
        ("ที่นี่", {"ที่", "นี่"}),
        ("❤️", set()),
    ],
)
def test_words_of_every_script_keep_their_marks_and_those_without_spaces_are_characters(compare, said, words):
    found = compare({"x.jsonl": [asked("q", "q")]}, {"x.jsonl": [asked("q", "q"), asked("q", f"q {said}")]})
    assert {word.word for word in found.words_came} == words


@pytest.mark.parametrize(
    ("a", "b", "empty"),
    [([], [asked("Q?", "a")], "a"), ([asked("Q?", "a")], [], "b"), ([], ["{broken"], "a and b")],
)
def test_words_of_an_empty_side_are_not_compared(compare, capsys, a, b, empty):
    found = compare({"x.jsonl": a}, {"y.jsonl": b})
    assert found.vocabulary_shift is None
    show_diff(found)
    assert f"words: nothing to compare, there are none in {empty}\n" in capsys.readouterr().out


def test_one_is_told_of_in_the_singular(tmp_path, capsys):
    sides = {"a": "train", "b": "held_out"}
    for rows, told in (
        ([asked("Q?", "a")], "1 prompt changed"),
        ([asked(q, "a") for q in "QR"], "2 prompts"),
    ):
        a, b = (source(tmp_path, name, {"x.jsonl": rows}, lambda _, name=name: sides[name]) for name in sides)
        show_diff(diff(a, b, read))
        assert told in capsys.readouterr().out


def test_data_of_another_kind_is_refused_with_the_revision_it_stands_in(compare):
    with pytest.raises(Refused, match=r"^b: x\.jsonl:1 .*preference"):
        compare({"x.jsonl": [asked("Q?", "a")]}, {"x.jsonl": [{"chosen": "a", "rejected": "b"}]})


counts = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), max_size=6)


@given(counts, counts)
def test_the_distance_of_words_is_a_number_of_bits_between_the_same_and_nothing_in_common(a, b):
    found = jensen_shannon(a, b)
    assert 0 <= found <= 1 and math.isclose(found, jensen_shannon(b, a), abs_tol=1e-12)
    assert jensen_shannon(a, a) == pytest.approx(0, abs=1e-12)
    if a and b and not a.keys() & b.keys():
        assert found == pytest.approx(1)


def test_the_distance_is_what_a_word_tells_about_where_it_is_from():
    """Half of A's words are in B too: seeing one of the others tells all, seeing that one tells a part."""
    a, b = Counter(x=1, y=1), Counter(x=2)
    expected = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)) + 0.5 * math.log2(1 / 0.75)
    assert jensen_shannon(a, b) == pytest.approx(expected)


# --- revisions of git


def git(project: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Two commits: 48 chats; then 3 more, one gone and one answered anew. The remote has both, the cache the last."""
    project = make_project(tmp_path_factory.mktemp("history") / "project")
    git(project, "init", "-q")
    (project / ".gitignore").write_text("/data\n/.retuner\n/dvcstore\n")
    with Repo(str(project)) as repo, repo.config.edit() as config:
        config["core"] = {"remote": "store"}  # and no longer `no_scm`
        config["remote"]["store"] = {"url": str(project / "dvcstore")}
    commit(project, "one")
    rows = chats(51)
    rows[5]["messages"][1]["content"] = "no colour at all"
    write_chats(project / "data", rows[:10] + rows[11:])
    add_to_dvc(project)
    commit(project, "two")
    shutil.rmtree(project / ".dvc" / "cache")
    return project


def commit(project: Path, message: str) -> None:
    with Repo(str(project)) as repo:
        repo.push()
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", message)


@pytest.fixture
def project(history, tmp_path, monkeypatch):
    made = Path(shutil.copytree(history, tmp_path / "project"))
    # The remote lies beside the copy.
    config = made / ".dvc" / "config"
    config.write_text(config.read_text().replace(str(history), str(made)))
    git(made, "commit", "-qam", "here")
    monkeypatch.chdir(made)
    return made


def cli(capsys, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["retuner", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def snapshot(project: Path) -> dict[str, tuple[bytes, int]]:
    found = (path for path in project.rglob("*") if path.is_file())
    kept = (path for path in found if not {".dvc", ".git"} & set(path.relative_to(project).parts))
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}


def test_two_revisions_are_compared_and_the_workspace_is_left_as_it_is(project, capsys, monkeypatch):
    before, status = snapshot(project), git(project, "status", "--porcelain")
    code, out, err = cli(capsys, monkeypatch, "data", "diff", "HEAD~2", "HEAD", "params.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["added"], found["removed"], found["changed"], found["kept"]) == (3, 1, 1, 46)
    assert found["moved"] == 0
    assert sum(found["added_by_side"].values()) == 3
    assert found["examples_changed"][0]["after"] == "no colour at all"
    assert snapshot(project) == before and git(project, "status", "--porcelain") == status


def test_what_params_redact_is_redacted_before_rows_are_compared_and_given_sides(
    project, capsys, monkeypatch
):
    def told(*arguments: str) -> dict:
        redact = ("params.yaml", "--set", "prepare.redact=[email]", "--json")
        code, out, err = cli(capsys, monkeypatch, "data", *arguments, *redact)
        assert code == 0, err
        return json.loads(out)

    def write(host: str, count: int) -> None:
        rows = [asked(f"I am u{n}@{host}: {n}?", f"Well, u{n}@{host}") for n in range(count)]
        write_chats(Path("data"), rows)
        add_to_dvc(Path())

    write("old.org", 40)
    commit(Path(), "addresses")
    before = told("check")
    write("new.org", 90)
    now = told("check")
    found = told("diff", "HEAD", "workspace")
    assert (found["kept"], found["added"], found["removed"], found["changed"]) == (40, 50, 0, 0)
    assert found["moved"] == 0
    assert found["added_by_side"] == {
        side: now[f"{side}_rows"] - before[f"{side}_rows"] for side in ("train", "held_out")
    }
    assert all(example["prompt"].startswith("I am [EMAIL]:") for example in found["examples_added"])


def test_a_revision_the_workspace_and_another_dvc_file_name_the_same_data(project):
    dvc_file = Path("data.dvc")
    head, here = open_revision("HEAD", dvc_file), open_revision("workspace", dvc_file)
    shutil.copy("data.dvc", "copy.dvc")
    other = open_revision("copy.dvc", dvc_file)
    for revision in (head, here, other):
        assert [(f.relpath, f.md5) for f in revision.dataset.files] == [
            (f.relpath, f.md5) for f in here.dataset.files
        ]
    assert head.commit and here.commit is None
    assert head.dataset.files[0].path.read_bytes() == Path("data/chats.jsonl").read_bytes()


def test_the_terminal_says_what_changed_in_words(project, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, "data", "diff", "HEAD~2", "workspace", "params.yaml")
    assert code == 0, err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "files changed: chats.jsonl" in lines
    assert "answered anew 1" in lines and "kept 46" in lines
    assert "no prompt changed sides" in lines
    assert any(line.startswith("words: 0.0") and "no word in common" in line for line in lines)
    assert any(line.startswith("came: ") and "colour" not in line.split(";")[0] for line in lines)
    code, out, _ = cli(capsys, monkeypatch, "data", "diff", "HEAD", "workspace")
    assert code == 0 and "the same data, byte for byte" in out


def test_a_file_without_chats_is_refused_with_the_advice_to_give_params(project, capsys, monkeypatch):
    Path("data/LICENSE").write_text("Do as you like.")
    add_to_dvc(Path())
    code, out, _ = cli(capsys, monkeypatch, "data", "diff", "HEAD", "workspace", "--json")
    error = json.loads(out)["error"]
    assert code == 2 and error["found"].startswith("workspace: LICENSE is none of")
    assert "give PARAMS" in error["do"]
    code, out, err = cli(capsys, monkeypatch, "data", "diff", "HEAD", "workspace", "params.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["kept"] == 50


@pytest.mark.parametrize(
    ("arguments", "found", "do"),
    [
        (("no-such-branch", "HEAD"), "there is no revision no-such-branch", "git log"),
        (("HEAD", "HEAD~9"), "there is no revision HEAD~9", "git log"),
        (("HEAD", "HEAD", "--data", "other.dvc"), "there is no other.dvc at HEAD", "git log"),
        (("HEAD", "HEAD", "--data", "../data.dvc"), "DVC", ""),
        (("workspace", "gone.dvc"), "there is no revision gone.dvc", "git log"),
        (("HEAD", "HEAD", "--set", "prepare.files=*"), "--set without PARAMS", ""),
    ],
)
def test_what_is_not_there_is_one_clear_error(project, capsys, monkeypatch, arguments, found, do):
    code, out, err = cli(capsys, monkeypatch, "data", "diff", *arguments, "--json")
    assert code == (4 if found == "DVC" else 2), err
    error = json.loads(out)["error"]
    assert found in error["found"] and do in (error["do"] or "")
    assert "Traceback" not in err


def test_data_that_is_gone_from_cache_and_remote_is_unavailable(project, capsys, monkeypatch):
    shutil.rmtree(project / "dvcstore")
    code, out, _ = cli(capsys, monkeypatch, "data", "diff", "HEAD~2", "HEAD", "--json")
    assert code == 4
    error = json.loads(out)["error"]
    assert "at HEAD~2" in error["expected"] or "not complete here" in error["found"]
    assert "remote `store`" in error["found"]


def test_a_damaged_object_of_the_cache_is_never_compared(project):
    dataset = open_revision("HEAD~2", Path("data.dvc")).dataset
    victim = dataset.files[0].path
    content = bytearray(victim.read_bytes())
    content[3] ^= 1
    victim.chmod(0o644)
    victim.write_bytes(content)
    victim.chmod(0o444)
    with pytest.raises(Unavailable, match="corrupt"):
        open_revision("HEAD~2", Path("data.dvc"))


def test_data_of_the_workspace_that_was_not_added_is_compared_as_it_is_and_told_so(
    project, capsys, monkeypatch
):
    with Path("data/chats.jsonl").open("a") as file:
        file.write(json.dumps(asked("New?", "Yes.")) + "\n")
    Path("data/more.jsonl").write_text(json.dumps(asked("More?", "Yes.")) + "\n")
    before, status = snapshot(project), git(project, "status", "--porcelain")
    code, out, err = cli(capsys, monkeypatch, "data", "diff", "HEAD", "workspace", "params.yaml", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["added"], found["removed"], found["kept"]) == (2, 0, 50)
    assert found["b"]["name"] == "workspace (not what data.dvc names)"
    assert snapshot(project) == before and git(project, "status", "--porcelain") == status
    add_to_dvc(project)
    code, out, err = cli(capsys, monkeypatch, "data", "diff", "HEAD", "workspace", "params.yaml", "--json")
    assert code == 0, err
    b = json.loads(out)["b"]
    assert (b["name"], b["md5"]) == ("workspace", found["b"]["md5"])


def test_a_link_in_the_workspace_is_refused_whether_the_rest_was_added_or_not(project):
    Path("data/more.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match=r"more\.jsonl is a symbolic link"):
        open_revision("workspace", Path("data.dvc"))


def test_outside_a_git_repository_only_the_workspace_has_a_name(tmp_path, monkeypatch):
    project = make_project(tmp_path / "project", rows=4)
    monkeypatch.chdir(project)
    assert open_revision("workspace", Path("data.dvc")).commit is None
    with pytest.raises(Refused, match="not in a git repository"):
        open_revision("HEAD", Path("data.dvc"))


# --- the other verbs


def test_check_reads_and_splits_and_keeps_no_result(project, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, "data", "check", "params.yaml", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["md5"] in Path("data.dvc").read_text() and told["rows_read"] == 50
    assert not (Path(os.environ["RETUNER_HOME"]) / "store" / "objects").exists()
    with Path("data/chats.jsonl").open("a") as file:
        file.write("{}\n")
    code, out, _ = cli(capsys, monkeypatch, "data", "check", "params.yaml", "--json")
    assert code == 2 and "data.dvc names" in json.loads(out)["error"]["expected"]


def test_check_says_what_it_sets_aside_and_which_files_it_leaves_out(project, capsys, monkeypatch):
    with Path("data/chats.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    Path("data/a\x1b[31m.txt").write_text("no chats")
    add_to_dvc(project)
    verb = ("data", "check", "params.yaml", "--set", "prepare.max_bad_rows=1")
    code, out, err = cli(capsys, monkeypatch, *verb)
    assert code == 0, err
    assert "set aside: chats.jsonl:51 no_turns: the conversation has no turns" in out
    assert "leaves out: a\\x1b[31m.txt" in out
    code, out, _ = cli(capsys, monkeypatch, *verb, "--json")
    (bad,) = json.loads(out)["set_aside"]
    assert (bad["file"], bad["line"], bad["cause"], bad["start"]) == (
        "chats.jsonl",
        51,
        "no_turns",
        '{"messages": []}',
    )
    code, _, err = cli(capsys, monkeypatch, "data", "check", "params.yaml", "--set", "prepare.files=**/*")
    assert code == 2 and "a\\x1b[31m.txt is none of" in err


def test_stats_describe_in_tokens_and_write_the_page(project, capsys, monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = cli(capsys, monkeypatch, "data", "stats", "params.yaml", "--json", "--html", str(page))
    assert code == 0, err
    told = json.loads(out)
    assert told["report"]["rows_read"] == 50
    rows = told["tokens"]["train"]["rows"] + told["tokens"]["held_out"]["rows"]
    assert rows == 50 and told["tokens"]["max_tokens"] == 128
    assert "What the model learns from" in page.read_text() and 'class="y"' in page.read_text()
    code, out, _ = cli(capsys, monkeypatch, "data", "stats", "params.yaml")
    assert code == 0
    assert "Latin 100 %" in out and "of 128" in out and "with loss" in out
    assert "1 file, messages" in out


def test_stats_without_the_base_count_characters_and_say_so(project, capsys, monkeypatch, tmp_path):
    hub = "base={source: hub, repo: nobody/nothing, commit: " + "a" * 40 + "}"
    page = tmp_path / "page.html"
    arguments = ("data", "stats", "params.yaml", "--set", hub, "--html", str(page))
    code, out, err = cli(capsys, monkeypatch, *arguments)
    assert code == 0, err
    assert "lengths are in characters" in out
    assert "because the base's tokenizer is not here" in page.read_text()


def test_freeze_names_the_held_out_prompts_once(project, capsys, monkeypatch):
    code, out, err = cli(capsys, monkeypatch, "data", "freeze", "first", "params.yaml", "--json")
    assert code == 0, err
    told = json.loads(out)
    lines = Path("params/held_out/first.txt").read_text().splitlines()
    assert told["prompts"] == len(lines) - 1 > 0
    assert "data.dvc" in lines[0] and "split rule: 1 0.2" in lines[0]
    code, out, _ = cli(capsys, monkeypatch, "data", "freeze", "first", "params.yaml", "--json")
    assert code == 2 and "never changed" in json.loads(out)["error"]["found"]
    code, _, err = cli(capsys, monkeypatch, "data", "freeze", "second", "params.yaml", "--from", "1")
    assert code == 2 and "there is no registered model 'smoke'" in err
