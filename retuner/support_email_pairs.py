"""The sample preference pairs: support e-mails with the right line of JSON and one with a mistake that readers dislike.

    python -m retuner.support_email_pairs preferences   # writes preferences/support_email_pairs.jsonl, the same bytes

The e-mails are some of those of `retuner.support_emails`: all that params/quickstart.yaml holds out, and some that it
trains on. The rejected answer is one of

- a guess: an order number or a name where the writer gave none, or none where there is one,
- a slip: an order number with one digit changed, the priority or the category of another e-mail,
- talk: the right JSON with a sentence before it.
"""

import json
import random
import sys
from pathlib import Path

from retuner import support_email_texts as texts
from retuner.naming import draw_of, group_of
from retuner.support_emails import ROWS, SEED, answer_line, conversations

FILE_NAME = "support_email_pairs.jsonl"
PAIRS = 200
SALT = "1"
"""The split_salt of params/quickstart.yaml."""
TALK = (
    "Sure! Here is the JSON you asked for: ",
    "Here are the details from the e-mail:\n",
    "I read the e-mail carefully. The result is ",
)


def pairs(count: int = PAIRS) -> list[dict]:
    """TRL's conversational form with an explicit prompt; the same ones on every machine."""
    rng = random.Random(SEED)
    chats = [row["messages"] for row in conversations(ROWS, SEED)]
    chats.sort(key=lambda messages: draw_of(group_of(messages), SALT))
    return [_pair(rng, messages) for messages in chats[:count]]


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pairs()]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def _pair(rng: random.Random, messages: list[dict]) -> dict:
    *prompt, answer = messages
    rejected = {"role": "assistant", "content": _rejected(rng, answer["content"])}
    return {"prompt": prompt, "chosen": [answer], "rejected": [rejected]}


def _rejected(rng: random.Random, right: str) -> str:
    labels = json.loads(right)
    match rng.choice(("talk", "category", "priority", "order_number", "order_number", "name")):
        case "talk":
            return rng.choice(TALK) + right
        case "category":
            labels["category"] = rng.choice([name for name in texts.PROBLEMS if name != labels["category"]])
        case "priority":
            labels["priority"] = rng.choice([name for name in texts.PRIORITIES if name != labels["priority"]])
        case "order_number":
            labels["order_number"] = _other_number(rng, labels["order_number"])
        case "name":
            labels["name"] = None if labels["name"] else rng.choice(texts.FIRST_NAMES)
    return answer_line(labels)


def _other_number(rng: random.Random, number: str | None) -> str | None:
    if number is None:
        return f"AC-{rng.randrange(10_000, 100_000)}"
    at = rng.randrange(3, len(number))
    changed = number[:at] + str((int(number[at]) + rng.randrange(1, 10)) % 10) + number[at + 1 :]
    return rng.choice((changed, changed, None))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m retuner.support_email_pairs FOLDER")
    sys.stdout.write(f"{write(Path(sys.argv[1]))}\n")
