"""Personal data and secrets, replaced in texts by marks such as [EMAIL]. The original stays in the source only.

What is found must look like nothing else: an order number, a price or a date that lost its digits would spoil the
data, so numbers count as phones or cards only when their form or their check digit says so.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

KINDS = ("secret", "email", "card", "phone")
"""In the order in which they are looked for: a password in an address, then the address, then numbers."""
MARKS = {kind: f"[{kind.upper()}]" for kind in KINDS}

# Markdown's _ and a list's - are no part of it, nor is the b of b'jo@example.com', unlike the o of o'brien@example.com.
# The number of a version or of a picture's size is no host (x@2x.png).
_EMAIL = re.compile(
    r"(?<![^\W_])([^\W_][\w.%+-]{0,31}['\u2019])?[^\W_][\w.%+-]{0,63}@(?!v?\d+\.\d|\dx\.)"
    r"(?>(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+(?:[Xx][Nn]--[\w-]{0,58}[^\W_]|[^\W\d_]{2,24}(?![^\W\d_])))(?(1)(?!'))"
)
# The lengths that issuers use (ISO/IEC 7812 and their own pages), in groups as on the card or in none. A space may be
# one that breaks no line.
_CARD = re.compile(
    r"(?<![\w.,$€£-])(?:"
    r"(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|35(?:2[89]|[3-8]\d)|6\d{3})"
    r"(?:([ \u00a0\u202f-])\d{4}\1\d{4}\1\d{4}|\d{12}(?:\d{3})?)"
    r"|3[47]\d\d(?:([ \u00a0\u202f-])\d{6}\2\d{5}|\d{11})"
    r"|3[068]\d\d(?:([ \u00a0\u202f-])\d{6}\3\d{4}|\d{10})"
    r")(?![\w-]|[.,]\d)"
)
# With a country's code, or in the groups in which people write numbers inside their country.
_PHONE = re.compile(
    r"(?<![\w.,$€£#/+-])(?:"
    r"(?:\+|00[ -]?(?=[1-9]))\d[\d ().\-/]{5,22}\d"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[.-]\d{4}"
    r"|\(?0\d{1,4}\)?(?:[ /-]{1,3}\d{2,8}){1,4}"
    r")(?![\w-]|[.,]\d)"
)
_DATE = re.compile(r"\d{1,2}[ /.-]\d{1,2}[ /.-](?:\d\d\Z|\d{4}(?!\d))")
# A US social security number, as the Social Security Administration writes it.
_SSN = re.compile(r"\(?\d{3}-\d\d-\d{4}(?!\d)")
_BEGIN_OF_NUMBER = re.compile(r"(?:\A|(?<= ))[+0(]")
_LEAST_DIGITS = 9
# Where a number inside the country begins with 0.
_REGIONS = ("DE", "GB", "FR", "NL", "BE", "AT", "CH", "IT", "SE", "AU", "NZ", "IN", "JP", "ZA")
# detect-secrets finds the first line of a private key and the first half of a JSON Web Token (RFC 7519): these
# take the whole, and pass over what only begins like a token, or each eyJ in it would be read to its end. Then
# RFC 6750's header, and what .npmrc holds.
_OWN_SECRETS = (
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----[\s\S]*?"
    r"(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|\Z)",
    r"(?<![^\W_])(?:(eyJ[\w-]{8,}=*\.eyJ[\w-]{8,}=*(?:\.[\w+/=-]*)?)|eyJ[\w-]*)",
    r"(?i)\bbearer ([\w.~+/-]{20,}=*)",
    r"/:_authToken=\s*(npm_\w+|[0-9A-Fa-f-]{36})",
)
# Tokens with a beginning of their own, by what their issuers and the rules of gitleaks document.
_TOKENS = (
    r"sk-(?:ant-[\w-]{20,}|[\w-]{40,})",  # Anthropic; OpenAI and those who follow it
    r"AIza[\w-]{35}\b",  # Google
    r"hf_[A-Za-z0-9]{34,}",  # Hugging Face
    r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59,}",
    r"gl(?:pat|rt|rtr|cbt|ffct|wt)-[\w-]{20,}(?:\.(?:\d\d\.)?[0-9a-z]{9})?",  # GitLab, with where it is routed
    r"npm_[A-Za-z0-9]{36,}",
    r"ya29\.(?:[a-z]\.)?[\w-]{20,}",  # Google's OAuth; its clients' secrets are the next
    r"GOCSPX-[\w-]{28,}",
    r"do[opr]_v1_[0-9a-f]{64}",  # DigitalOcean
    r"xapp-\d-[A-Z0-9]+-\d+-[0-9a-z]{32,}",  # Slack: of an app, then of its configuration
    r"xoxe(?:\.xox[bp])?-\d-[A-Za-z0-9]{100,}",
    r"[rs]k_(?:live|test)_[A-Za-z0-9]{24,}",  # Stripe: keys, then the secrets of webhooks
    r"whsec_[A-Za-z0-9+/]{32,}=*",
    r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",  # Shopify
    r"dapi[0-9a-f]{32}(?:-\d)?",  # Databricks
    r"gsk_[A-Za-z0-9]{52,}",  # Groq
    r"xai-\w{80,}",
    r"r8_[A-Za-z0-9]{37,}",  # Replicate
    r"pplx-[A-Za-z0-9]{48,}",  # Perplexity
    r"hv[sb]\.[\w-]{90,}",  # HashiCorp Vault
    r"gl(?:sa_[A-Za-z0-9]{32}_[0-9A-Fa-f]{8}|c_eyJ[A-Za-z0-9+/]{32,}=*)",  # Grafana
    r"ntn_\d{11}[A-Za-z0-9]{35}",  # Notion
    r"lin_api_[A-Za-z0-9]{40,}",  # Linear
    r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}",  # Postman
    r"dckr_[po]at_[\w-]{27,}",  # Docker Hub
)
# Of detect-secrets those whose pattern has a beginning of its own. Left out are those that need the name of a
# variable beside the value, or measure entropy: in prose they take words for secrets; and those of npm and OpenAI,
# whose time grows with the square of the text's length.
_DETECTORS = {
    "artifactory": "ArtifactoryDetector",
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "basic_auth": "BasicAuthDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "mailchimp": "MailchimpDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
_GROUP_IS_SECRET = {"AWSKeyDetector", "BasicAuthDetector"}


class Span(NamedTuple):
    begin: int
    end: int


def redacted(
    messages: Sequence[dict[str, str]], kinds: Sequence[str]
) -> tuple[tuple[dict[str, str], ...], Counter[str]]:
    """The messages with marks for what `kinds` name, and how many of each were set."""
    counts: Counter[str] = Counter()
    made = []
    for turn in messages:
        text = turn["content"]
        for kind in KINDS:
            if kind in kinds:
                text, count = _marked(text, FINDERS[kind](text), MARKS[kind])
                counts[kind] += count
        made.append({**turn, "content": text})
    return tuple(made), +counts


def _marked(text: str, spans: Iterator[Span], mark: str) -> tuple[str, int]:
    pieces, at, count = [], 0, 0
    for begin, end in sorted(spans):
        if begin >= at:
            pieces += [text[at:begin], mark]
            count += 1
        at = max(at, end)
    return "".join([*pieces, text[at:]]), count


def _emails(text: str) -> Iterator[Span]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Span(*match.span())


def _cards(text: str) -> Iterator[Span]:
    for match in _CARD.finditer(text):
        if _passes_luhn(match[0]):
            yield Span(*match.span())


def _passes_luhn(text: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B."""
    digits = [int(sign) for sign in text if sign.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _phones(text: str) -> Iterator[Span]:
    at = 0
    while match := _PHONE.search(text, at):
        span = _number_in(match)
        if span:
            yield span
        at = span.end if span else match.end()


def _number_in(match: re.Match[str]) -> Span | None:
    """The match, or the first number in it: two may stand side by side, which as a whole are none."""
    if _is_phone(match[0]):
        return Span(*match.span())
    begins = [match.start() + place.start() for place in _BEGIN_OF_NUMBER.finditer(match[0])]
    for number, begin in enumerate(begins):
        for end in [*(other - 1 for other in begins[number + 1 :]), match.end()]:
            if _is_phone(match.string[begin:end]):
                return Span(begin, end)
    return None


def _is_phone(text: str) -> bool:
    import phonenumbers

    digits = re.sub(r"\D", "", text)
    if _DATE.match(text) or _SSN.match(text) or len(digits) < _LEAST_DIGITS:
        return False
    if text.startswith(("+", "00")):
        return _valid("+" + digits.removeprefix("00"), None)
    if text.startswith(("0", "(0")):
        return any(_valid(text, region) for region in _REGIONS)
    # 555 numbers are nobody's and still look like somebody's, so here the form is enough.
    return phonenumbers.is_possible_number(phonenumbers.parse(text, "US"))


def _valid(text: str, region: str | None) -> bool:
    import phonenumbers

    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, region))
    except phonenumbers.NumberParseException:
        return False


def _secrets(text: str) -> Iterator[Span]:
    for pattern, group in _secret_patterns():
        for match in pattern.finditer(text):
            if match[group]:
                yield Span(*match.span(group))


@cache
def _secret_patterns() -> tuple[tuple[re.Pattern[str], int], ...]:
    """Patterns, and which group of each is the secret. They alone are used: nothing asks whether a key is live."""
    from importlib import import_module

    own = (*_OWN_SECRETS, rf"(?<![^\W_])(?:{'|'.join(_TOKENS)})")
    found = [(pattern, pattern.groups) for pattern in map(re.compile, own)]
    for module, name in _DETECTORS.items():
        for pattern in getattr(import_module(f"detect_secrets.plugins.{module}"), name).denylist:
            found.append((pattern, pattern.groups if name in _GROUP_IS_SECRET else 0))
    return tuple(found)


FINDERS: dict[str, Callable[[str], Iterator[Span]]] = {
    "secret": _secrets,
    "email": _emails,
    "card": _cards,
    "phone": _phones,
}
