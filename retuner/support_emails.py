"""The sample data: customers' support e-mails, each turned into one strict line of JSON.

    python -m retuner.support_emails data        # writes data/support_emails.jsonl, always the same bytes

Everything here is invented. An answer has these keys, in this order, and no white space between them:

- `product`: what was ordered or asked about, in small letters. In a mix-up it is what the customer wanted, not
  what came.
- `category`: the first of these that fits
    `billing`     a wrong charge, price, discount or invoice
    `wrong_item`  something else came than was ordered: another thing, size, colour or model
    `damaged`     it came broken or stopped working
    `delivery`    it has not come
    `return`      nothing is wrong with it, but the customer does not want to keep it
    `question`    nothing is wrong, the customer only wants to know something
- `priority`: `high` when the writer says it is urgent; `low` when the writer says there is no hurry; `normal`
  when neither is said. Anger alone is not urgency.
- `order_number`: two letters, a dash and five digits, without a leading `#`; null when the writer has none.
- `name`: the writer's, letter for letter as written; null for a customer without a name.

A follow-up e-mail that corrects something is answered with the whole corrected object.
"""

import json
import random
import re
import sys
from pathlib import Path

from retuner import support_email_texts as texts

FILE_NAME = "support_emails.jsonl"
ROWS = 1500
SEED = 20


def conversations(rows: int, seed: int) -> list[dict]:
    """`rows` conversations, no two with the same prompt; the same ones for the same seed on every machine."""
    rng = random.Random(seed)
    made: dict[str, dict] = {}
    while len(made) < rows:
        messages = _conversation(rng)
        prompt = json.dumps(messages[:-1])
        made.setdefault(prompt, {"messages": messages})
    return list(made.values())


def answer_line(labels: dict) -> str:
    """The expected answer: one line, fixed key order, no white space outside the values."""
    return json.dumps({key: labels[key] for key in texts.KEYS}, ensure_ascii=False, separators=(",", ":"))


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in conversations(ROWS, SEED)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def _conversation(rng: random.Random) -> list[dict]:
    labels = _labels(rng)
    email = _email(rng, labels)
    if rng.random() < 0.55:
        messages = [_turn("system", rng.choice(texts.SYSTEMS)), _turn("user", email)]
    else:
        instruction = rng.choice(texts.INSTRUCTIONS)
        gap = rng.choice(("\n", "\n\n"))
        text = email + gap + instruction if rng.random() < 0.1 else instruction + gap + email
        messages = [_turn("user", text)]
    messages.append(_turn("assistant", answer_line(labels)))
    if rng.random() < 0.08:
        follow_up, corrected = _correction(rng, labels, email)
        messages += [_turn("user", follow_up), _turn("assistant", answer_line(corrected))]
    return messages


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _labels(rng: random.Random) -> dict:
    category = rng.choice(tuple(texts.PROBLEMS))
    nameless, orderless = rng.random() < 0.12, rng.random() < 0.2
    return {
        "product": rng.choice(texts.PRODUCTS),
        "category": category,
        "priority": rng.choice(("high", "normal", "normal", "low")),
        "order_number": None if orderless else _order_number(rng),
        "name": None if nameless else _name(rng),
    }


def _order_number(rng: random.Random) -> str:
    number = str(rng.randrange(10_000, 100_000))
    return rng.choice("ABDKLMRT") + rng.choice("CFNPSWX") + "-" + number


def _name(rng: random.Random) -> str:
    first = rng.choice(texts.FIRST_NAMES)
    return first if rng.random() < 0.5 else f"{first} {rng.choice(texts.LAST_NAMES)}"


def _email(rng: random.Random, labels: dict) -> str:
    """An e-mail from which a careful reader gets exactly `labels`. Who writes in small letters only signs so
    too, and a name is copied as written: then `labels["name"]` is changed."""
    lower_case = rng.random() < 0.2
    if lower_case and labels["name"]:
        labels["name"] = labels["name"].lower()
    buyer = labels["category"] != "question"
    small_talk = texts.SMALL_TALK + (texts.BUYER_TALK if buyer else ())

    def say(choices: tuple[str, ...]) -> str:
        return _fill(rng, rng.choice(choices), labels)

    problem = say(texts.PROBLEMS[labels["category"]])
    if rng.random() < 0.08:
        problem = problem.rstrip(".") + "!!"
    sentences = [problem, say(texts.PRIORITIES[labels["priority"]])]
    if rng.random() < 0.25:
        sentences.insert(rng.choice((1, len(sentences))), say(small_talk))

    subject = ""
    if labels["order_number"] and rng.random() < 0.08:
        subject = say(texts.ORDER_SUBJECTS)
    else:
        mentions = texts.ORDER_MENTIONS if labels["order_number"] else texts.NO_ORDER_NUMBER
        sentences.insert(rng.randrange(len(sentences) + 1), say(mentions))
        subject = say(texts.SUBJECTS) if rng.random() < 0.08 else ""

    if not labels["name"]:
        ending = say(texts.UNNAMED_ENDINGS)
    elif rng.random() < 0.2:
        sentences.insert(0, say(texts.NAMED_OPENINGS))
        ending = say(texts.PLAIN_ENDINGS)
    else:
        ending = say(texts.NAMED_ENDINGS)
    body = rng.choice((" ", " ", " ", "\n")).join(sentence for sentence in sentences if sentence)
    body = _misspelt(rng, body, labels) if rng.random() < 0.2 else body
    opening = say(texts.GREETINGS) + rng.choice(("\n", " "))
    text = "\n".join(part for part in (subject, (opening + body).strip(), ending) if part)
    return _in_small_letters(rng, text, labels) if lower_case else text


def _correction(rng: random.Random, labels: dict, email: str) -> tuple[str, dict]:
    """A second e-mail that changes one thing, and the labels after it."""
    possible = ["order_number", "product"]
    possible += ["priority"] if labels["priority"] != "high" else []
    possible += ["name"] if labels["name"] is None else []
    key = rng.choice(possible)
    new = {
        "order_number": _order_number(rng),
        "product": rng.choice([product for product in texts.PRODUCTS if product not in email.lower()]),
        "priority": "high",
        "name": _name(rng),
    }[key]
    corrected = {**labels, key: new}
    return _fill(rng, rng.choice(texts.FOLLOW_UPS[key]), corrected), corrected


def _fill(rng: random.Random, text: str, labels: dict) -> str:
    """`text` with its choices made and its places filled."""
    text = re.sub(r"\[([^]]*)\]", lambda found: rng.choice(found[1].split("|")), text)
    product, writer = labels["product"], labels["name"] or ""
    places = {
        "{p}": product,
        "{q}": rng.choice([other for other in texts.PRODUCTS if other != product]),
        "{o}": labels["order_number"] or "",
        "{n}": writer,
    }
    for place, filling in places.items():
        text = text.replace(place, filling)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text if text.startswith(writer or " ") else text[:1].upper() + text[1:]


def _misspelt(rng: random.Random, text: str, labels: dict) -> str:
    """`text` with two letters swapped, or one lost, in one or two words that no label is copied from."""
    copied = set(f"{labels['product']} {labels['name']}".lower().split())
    words = [found for found in re.finditer(r"[A-Za-z]{5,}", text) if found[0].lower() not in copied]
    for found in sorted(rng.sample(words, min(len(words), rng.choice((1, 2)))), key=lambda f: -f.start()):
        at = found.start() + rng.randrange(1, len(found[0]) - 2)
        pair = text[at : at + 2]
        text = text[:at] + rng.choice((pair[::-1], pair[0])) + text[at + 2 :]
    return text


def _in_small_letters(rng: random.Random, text: str, labels: dict) -> str:
    """As typed on a phone: no capitals but in the order number, some words cut short."""
    words = texts.CHAT_WORDS if rng.random() < 0.5 else {}
    text = re.sub(r"\b[a-z]+\b", lambda found: words.get(found[0], found[0]), text.lower())
    number = labels["order_number"] or ""
    return text.replace(number.lower(), number) if number else text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m retuner.support_emails FOLDER")
    sys.stdout.write(f"{write(Path(sys.argv[1]))}\n")
