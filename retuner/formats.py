"""The formats in which people keep chats: what a row is known by, and the conversation that it means."""

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unicodedata import category

from retuner.errors import Refused
from retuner.json_rows import Problem, kind_of

SYSTEM = "system"
MATERIAL = ("input", "context")
"""Under either lies what a question is about: a text to sum up, a passage that holds the answer."""


@dataclass(frozen=True, slots=True)
class Format:
    """By `keys` a row is known to be of it; it may have `more`; the objects of a list of turns have `turn_keys`."""

    name: str
    keys: tuple[str, ...]
    more: tuple[str, ...] = (SYSTEM, *MATERIAL)
    turn_keys: tuple[str, ...] = ()

    @property
    def is_pairs(self) -> bool:
        """Two answers to one prompt; see `retuner.preferences`."""
        return "rejected" in self.keys


FORMATS = (
    Format("messages", ("messages",), (SYSTEM,), ("role", "content")),
    Format("sharegpt", ("conversations",), (SYSTEM,), ("from", "value")),
    Format("alpaca", ("instruction", "output")),
    Format("instruction_response", ("instruction", "response")),
    Format("prompt_completion", ("prompt", "completion"), turn_keys=("role", "content")),
    Format("prompt_completion", ("prompt", "response"), turn_keys=("role", "content")),
    Format("question_answer", ("question", "answer")),
)
PAIRS = ("chosen", "rejected")
PREFERENCE = "preference"
PAIR_FORMATS = (
    Format("preference_prompt", ("prompt", *PAIRS), turn_keys=("role", "content")),
    Format("preference_question", ("question", *PAIRS)),
    Format("preference_alpaca", ("instruction", *PAIRS)),
    Format("preference_sharegpt", ("conversations", *PAIRS), (SYSTEM,), ("from", "value")),
    Format("preference_implicit", PAIRS, (SYSTEM,), ("role", "content")),
)
"""What `preference` stands for."""
OTHER_KEYS = ("chosen", "rejected", "label", "kto_tag", "text")
"""By which a row of another kind is known."""
SHOWN_BESIDE = ("documents", "image", "images", "audio", "audios", "video", "videos")
MEANING = frozenset({SYSTEM, *MATERIAL, "system_prompt", "history", "tools", "functions", *SHOWN_BESIDE})
"""Keys beside a conversation of which a model was told or shown something: read, or refused, and never passed over."""
TURN_MEANING = ("reasoning_content", "reasoning", "thinking", "images", "audio")
"""Likewise in a turn."""
NOT_LEARNT = ("weight", "train", "training")
"""Keys by which OpenAI's and Axolotl's turns say, with 0 or false, that they are read and not learnt."""
VALUES_DECIDE = {"label", "kto_tag", "text"}
"""Keys of which more than their being there says what kind of row it is."""
UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Categories of Unicode."""
MOST_RECOGNISED = 64
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")
# https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md and OpenAI's chat API.
TOOL_ROLES = {"function_call", "observation", "tool", "function", "function_response", "tool_call", "ipython"}

Turn = tuple[str, Any, str]  # role, content as found, what to call its place
Messages = tuple[dict[str, str], ...]


class Wanted:
    """The formats that may be read: one, `auto` for all with one answer, `preference` for all with two, with the
    data's own names for some of their keys."""

    def __init__(self, format: str, columns: Mapping[str, str | None] | None = None):
        """A key that `columns` maps to None is not read, whatever it says. Errors: Refused for a mapping that fits no
        format."""
        self.format = format
        self._own = {key: own for key, own in (columns or {}).items() if own is not None}
        self._passed_over = {key for key, own in (columns or {}).items() if own is None}
        self.fixed = None if format in ("auto", PREFERENCE) else format
        """The one format of every file; None where each file's first row decides."""
        self._formats = PAIR_FORMATS if format == PREFERENCE else FORMATS
        asked = [known for known in self._formats if self.fixed in (None, known.name)]
        may_be = [known for known in asked if self._own.keys() <= set(_all_keys(known))]
        if not may_be:
            raise _no_such_mapping(format, asked, self._own)
        if strangers := sorted(self._passed_over - MEANING):
            raise Refused(
                f"prepare.columns maps {strangers[0]!r} to null, which is no key that would be read",
                f"a key that is not to be read ({', '.join(sorted(MEANING))})",
                "correct prepare.columns",
            )
        if len(set(self._own.values())) < len(self._own):
            raise Refused(
                f"prepare.columns gives one column to several keys: {_pairs(self._own)}",
                "another column for each key",
                "correct prepare.columns",
            )
        self._recognised: dict[tuple[str | None, ...], Format] = {}
        self._keys = [(known, frozenset(map(self.own, known.keys))) for known in self._formats]
        self._may_be = {id(known) for known in may_be}
        turn_keys = {key for known in self._formats for key in known.turn_keys}
        self._must_have = {key: own for key, own in self._own.items() if key not in turn_keys}
        self._unread = {
            id(known): MEANING
            - self._passed_over
            - {self.own(key) for key in known.more}
            - set(self._own.values())
            for known in self._formats
        }

    def own(self, key: str) -> str:
        """What the data calls `key`."""
        return self._own.get(key, key)

    def columns(self) -> set[str]:
        """The names that decide anything about a row; others need not be read."""
        keys = {key for known in (*FORMATS, *PAIR_FORMATS) for key in (*known.keys, *known.more)}
        return {self.own(key) for key in keys} | set(OTHER_KEYS) | MEANING | keys

    def recognise(self, row: Mapping[str, Any], found: str | None) -> Format:
        """The format of a row, whose file's is `found` where that is known. Errors: Problem, Refused."""
        keys = (*row, found)
        if (known := self._recognised.get(keys)) is None:
            known = self._recognise(row, found)
            if len(self._recognised) < MOST_RECOGNISED and not VALUES_DECIDE & row.keys():
                self._recognised[keys] = known
        return known

    def _recognise(self, row: Mapping[str, Any], found: str | None) -> Format:
        self._refuse_other_kinds(row)
        for key, own in self._must_have.items():
            if own not in row:
                close = difflib.get_close_matches(own, row, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                message = f"there is no {own!r}, which prepare.columns names for {key}{hint}; the keys are {shown(row)}"
                raise Problem("missing_column", message)
        fitting = [(known, keys) for known, keys in self._keys if keys <= row.keys()]
        # Pairs of conversations may have their prompt beside them too.
        fits = [known for known, keys in fitting if not any(keys < more for _, more in fitting)]
        if not fits and isinstance(row.get("text"), str):
            raise Refused(
                "has text and nothing that answers it: this is plain text",
                "chats, where it is known which words are the assistant's",
                "leave the file out of prepare.files, or write each text as a prompt and its completion",
            )
        candidates = [known for known in fits if id(known) in self._may_be]
        if len(candidates) == 1 and found in (None, candidates[0].name):
            return candidates[0]
        named = [f"{known.name} ({'/'.join(map(self.own, known.keys))})" for known in candidates or fits]
        names, keys = " and ".join(named), shown(row)
        if len(candidates) > 1:
            do = (
                "drop keys"
                if len({known.name for known in candidates}) == 1
                else "set prepare.format or drop keys"
            )
            raise Problem("ambiguous_format", f"the keys {keys} fit {names}: {do}")
        if fits:
            expected = found or self.fixed or "what prepare.columns says"
            raise Problem("mixed_format", f"the row is {names}, but its file is read as {expected}")
        known = "; ".join(
            f"{one.name}: {'/'.join(map(self.own, one.keys))}"
            for one in self._formats
            if id(one) in self._may_be
        )
        cause = "missing_key" if self.fixed else "unknown_format"
        has = f"the keys {keys} are not" if row else "the row has no keys, and so not"
        raise Problem(cause, f"{has} those of {known}")

    def check_header(self, names: Iterable[str]) -> Format:
        """The format of a table with these columns. Errors: Refused where its rows could be of none."""
        try:
            return self.recognise(dict.fromkeys(names, ""), None)
        except Problem as problem:
            raise Refused(
                f"cannot be read by its columns: {problem.message}",
                "columns named as the keys of one format",
                "name them so, or give them in prepare.columns, e.g. {prompt: question_text, completion: reply}",
            ) from None

    def conversation(self, row: Mapping[str, Any], format: Format) -> Messages:
        """(system) user assistant user assistant ... assistant, texts unchanged. Errors: Problem, Refused."""
        return conversation(self._turns(row, format))

    def _refuse_other_kinds(self, row: Mapping[str, Any]) -> None:
        # TRL's and LLaMA-Factory's marks of good and bad answers: training would teach the bad ones too.
        marked = isinstance(row.get("label", row.get("kto_tag")), bool)
        if self.format == PREFERENCE:
            self._refuse_no_pairs(row, marked)
            return
        pairs = set(PAIRS) <= row.keys() and not set(PAIRS) & set(self._own.values())
        if marked or pairs:
            found = "grades its answer" if marked else "has chosen and rejected"
            do = "leave the file out of prepare.files, or write rows with the good answers alone"
            if pairs and not marked:
                has_answer = {"completion", "response"} & row.keys()
                if "prompt" in row and isinstance(row["chosen"], str) and not has_answer:
                    do += "; prepare.columns: {completion: chosen} reads these"
                do += (
                    "; to learn from both answers, set prepare.format: preference and train.recipe: dpo, as "
                    "params/quickstart_dpo.yaml does"
                )
            raise Refused(
                f"{found}: this is preference data",
                "chats with one good answer each, for supervised training (preferences are for DPO and KTO)",
                do,
            )

    def _refuse_no_pairs(self, row: Mapping[str, Any], marked: bool) -> None:
        has = {self.own(key) for key in PAIRS} & row.keys()
        one_answer = [known for known in FORMATS if set(known.keys) <= row.keys()]
        if not has and (marked or one_answer):
            what = "a single answer and a grade" if marked else f"one good answer ({one_answer[0].name})"
            for known in one_answer:
                with suppress(Problem):
                    Wanted("auto").conversation(row, known)  # a tool transcript is told as what it is
            raise Refused(
                f"has {what} and no second one: these are no preference pairs",
                "a prompt with a chosen and a rejected answer in every row, for train.recipe dpo",
                "leave the file out of prepare.files"
                + ("" if marked else ", or set prepare.format: auto and train.recipe: sft to learn from it"),
            )

    def _turns(self, row: Mapping[str, Any], format: Format) -> list[Turn]:
        """The turns of a row, their contents not yet looked at. Errors: Problem, Refused."""
        self.refuse_unread(row, format)
        if format.name in ("messages", "sharegpt"):
            key = self.own(format.keys[0])
            if not isinstance(row[key], list):
                raise Problem("not_a_list", f"{key} is {kind_of(row[key])}, not a list of turns")
            roles = ROLES if format.name == "messages" else SHAREGPT_ROLES
            return self.with_system(row, self.turns(row[key], format, roles))
        asks, answers = map(self.own, format.keys)
        if not any(self._are_turns(row[key], format) for key in (asks, answers)):
            question: Turn = ("user", self.question(row, format), asks)
            return self.with_system(row, [question, ("assistant", row[answers], answers)])
        self.refuse_material(row)
        turns: list[Turn] = []
        for key, role in ((asks, "user"), (answers, "assistant")):
            listed = self._are_turns(row[key], format)
            turns += self.turns(row[key], format, ROLES, f"{key} ") if listed else [(role, row[key], key)]
        return self.with_system(row, turns)

    def _are_turns(self, value: Any, format: Format) -> bool:
        first = value[0] if format.turn_keys and isinstance(value, list) and value else None
        return isinstance(first, dict) and self.own(format.turn_keys[0]) in first

    def refuse_unread(self, row: Mapping[str, Any], format: Format) -> None:
        """Errors: Problem for a key that says what the conversation is about and is not read, Refused for tools."""
        for key in sorted(self._unread[id(format)] & row.keys()):
            if _blank(row[key]) or row[key] in ([], {}, "[]"):
                continue
            if key in ("tools", "functions"):
                raise _tool_transcript("offers tools")
            if key == "history":
                raise Problem("history", "earlier turns under history are not read: use the messages format")
            do = f"{{{key}: null}} does without it"
            if key == "system_prompt":
                do = f"{{system: {key}}} reads it, {do}"
            raise Problem("unread_key", f"{format.name} does not read what {key} says; prepare.columns: {do}")

    def question(self, row: Mapping[str, Any], format: Format) -> Any:
        """What the first key of a format without turns asks, with the material that it is about. Errors: Problem."""
        asks, materials = self.own(format.keys[0]), self._materials(row)
        if not materials:
            return row[asks]
        if len(materials) > 1:
            message = f"{' and '.join(materials)} both say what {asks} is about: drop one, or map it to null"
            raise Problem("ambiguous_format", f"{message} in prepare.columns")
        return text(row[asks], asks) + "\n\n" + text(row[materials[0]], materials[0])

    def refuse_material(self, row: Mapping[str, Any]) -> None:
        """Errors: Problem where there is some beside a prompt of turns, in which it has no known place."""
        for key in self._materials(row):
            message = f"{key} says something, and the prompt is a list of turns: put it into one of them"
            raise Problem("unread_key", message)

    def _materials(self, row: Mapping[str, Any]) -> list[str]:
        taken = set(self._own.values())
        keys = [key for key in MATERIAL if key in self._own or key not in taken | self._passed_over]
        return [self.own(key) for key in keys if not _blank(row.get(self.own(key)))]

    def with_system(self, row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
        """The turns behind the system prompt that has a key of its own, where there is one. Errors: Problem."""
        key = self.own(SYSTEM)
        if SYSTEM in self._passed_over or _blank(row.get(key)):
            return turns
        if turns and turns[0][0] == "system":
            if turns[0][1] == row[key]:
                return turns
            raise Problem("two_systems", f"{key} and {turns[0][2]} are two system prompts, and they differ")
        return [("system", row[key], key), *turns]

    def turns(
        self, listed: Iterable[Any], format: Format, roles: Mapping[str, str], within: str = ""
    ) -> list[Turn]:
        """Turns as objects of a format; `within` begins what their places are called. Errors: Problem, Refused."""
        role_key, text_key = map(self.own, format.turn_keys)
        turns = []
        for number, turn in enumerate(listed, 1):
            place = f"{within}turn {number}"
            # Nearly all are like this, and nothing more has to be looked at.
            if type(turn) is dict and len(turn) == 2 and role_key in turn and text_key in turn:
                role = turn[role_key]
                if type(role) is str and role in roles:
                    turns.append((roles[role], turn[text_key], place))
                    continue
            if not isinstance(turn, dict):
                raise Problem("not_an_object", f"{place} is {kind_of(turn)}, not an object")
            role = turn.get(role_key)
            if isinstance(role, str) and role in TOOL_ROLES:
                raise _tool_transcript(f"has the role {role} in {place}")
            if turn.get("tool_calls") or turn.get("function_call"):
                raise _tool_transcript(f"calls a tool in {place}")
            if role_key not in turn or text_key not in turn:
                needs = f"{place} needs {role_key} and {text_key}, has {shown(turn)}"
                raise Problem("missing_key", needs)
            if not isinstance(role, str) or role not in roles:
                raise Problem("wrong_role", f"{place} is {ascii(role)[:40]}, not {' or '.join(roles)}")
            for key in TURN_MEANING:
                if turn.get(key):
                    raise Problem("unread_key", f"{place} has {key}, which is not read: drop the key")
            for key in NOT_LEARNT if roles[role] == "assistant" else ():
                if turn.get(key) not in (None, 1):
                    message = (
                        f"{place} is not to be learnt by its {key}, and would be: cut it off or drop the key"
                    )
                    raise Problem("not_learnt", message)
            turns.append((roles[role], turn[text_key], place))
        return turns


def _all_keys(known: Format) -> tuple[str, ...]:
    return (*known.keys, *known.more, *known.turn_keys)


def _no_such_mapping(format: str, asked: list[Format], own: dict[str, str]) -> Refused:
    keys = sorted({key for known in asked for key in _all_keys(known)})
    strangers = [key for key in own if key not in keys]
    of_what = "any format" if format == "auto" else f"the format {format}"
    found = f"prepare.columns maps {', '.join(own)}, which are not keys of one format"
    if strangers:
        close = difflib.get_close_matches(strangers[0], keys, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        found = f"prepare.columns maps {strangers[0]!r}, which is no key of {of_what}{hint}"
    known = "; ".join(f"{one.name}: {', '.join(_all_keys(one))}" for one in asked)
    return Refused(
        found, f"the format's key first, then the data's own name for it ({known})", "correct prepare.columns"
    )


def _pairs(own: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {name}" for key, name in own.items())


def _tool_transcript(found: str) -> Refused:
    return Refused(
        f"{found}: this is a tool transcript",
        "system, user and assistant turns; the chat template would drop tool turns without a word",
        "leave the file out of prepare.files, or write calls and results as text in assistant and user turns",
    )


def conversation(turns: list[Turn]) -> Messages:
    """Optional system, then user and assistant in turn up to an assistant, in their order. Errors: Problem."""
    messages: list[dict[str, str]] = []
    expected = "user"
    for role, said, place in turns:
        if role != expected and (role != "system" or messages):
            raise Problem("wrong_order", f"{place} is {role}, where {expected} should speak")
        messages.append({"role": role, "content": text(said, place)})
        if role == "assistant" and len(messages) > 3 and messages[-2:] == messages[-4:-2]:
            raise Problem(
                "duplicate_turn", f"{place} and the question before it repeat the two turns before them"
            )
        expected = "assistant" if role == "user" else "user"
    if expected == "assistant":
        raise Problem("wrong_order", "the last turn is user: there is no answer to learn")
    if not messages or messages[-1]["role"] == "system":
        raise Problem("no_turns", "the conversation has no turns")
    return tuple(messages)


def text(value: Any, place: str) -> str:
    """`value` unchanged, or its text parts joined. Errors: Problem."""
    if type(value) is str and "!" <= value[:1] <= "~" and value.isascii() and "\0" not in value:
        return value
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(texts) != len(value):
            raise Problem("not_text", f"{place} has a part that is not text")
        value = "".join(texts)
    if not isinstance(value, str):
        raise Problem("not_text", f"{place} is {kind_of(value)}, not text")
    if _blank(value):
        raise Problem("empty_turn", f"{place} is empty")
    if "\0" in value:
        raise Problem("nul", f"{place} has a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise Problem("lone_surrogate", f"{place} has {half}, half of a character") from None
    return value


def _blank(value: Any) -> bool:
    """Nothing, or a text of which nothing is seen: white space, controls, what has no width."""
    if not isinstance(value, str):
        return value is None
    return not any(category(character) not in UNSEEN for character in value)


def shown(row: Mapping[str, Any]) -> str:
    return ", ".join(ascii(key)[:40] for key in sorted(row)[:8]) or "none"
