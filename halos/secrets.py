"""Secrets: keys and passwords are learned when they come in, and replaced in everything that goes out.

`learn`, `learn_environment` and `learn_urls` take note of a secret. From then on `redact` replaces it, in all forms in
which servers and clients repeat one, in whatever is written to a file or shown: replies, errors, addresses, commands.
A secret that was learned stays known until the process ends.

A secret of 8 characters or more is replaced wherever it stands; one of 4 to 7 only as a whole word, since it may be a
part of other words; a shorter one only where an address or a header would have it (`user:pw@`, `Bearer pw`, `key=pw`).
"""

import base64
import html
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

REDACTED = "[redacted]"
ANYWHERE, WHOLE_WORD = 8, 4  # characters from which a secret is replaced anywhere, and as a whole word
# What begins like a known key is one that was cut off. Keys that begin alike in fewer characters are too many.
BEGINNING, LONG = 12, 20
# Given to servers that want any key; replacing these words would harm texts, and protect nothing.
PLACEHOLDERS = frozenset("none any empty null dummy test local key token ollama lm-studio not-needed".split())
SECRET_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|ADMIN_KEY|TOKEN|SECRET|PASSWORD|PASSWD)$")
SECRET_PARAMETER = re.compile(r"key|token|sig|secret|pass|pwd|auth|code|cred|session|jwt", re.IGNORECASE)
ADDRESS = re.compile(r"""[A-Za-z][\w+.-]*://[^\s"'<>]+""")
# user:password@host, with or without a scheme before it; with one, a user alone is a token.
USERINFO = re.compile(r"""(?:://([^\s/:@"']*)|(?<![^\s"'=])([^\s/:@"'=]+)(?=:))(?::([^\s/"']*))?@(?=[\w.\[-])""")

_known: dict[str, str] = {}  # a secret -> the pattern of all its forms
_pattern: re.Pattern | None = None


#### LEARNING


def learn(*values: str | None) -> None:
    """Take note of secrets. Empty values and PLACEHOLDERS are none."""
    global _pattern
    new = {value for value in values if value and value.strip() and value.lower() not in PLACEHOLDERS}
    if not new <= _known.keys():
        _known.update({value: _forms(value) for value in new})
        longest_first = sorted(_known, key=len, reverse=True)
        _pattern = re.compile("|".join(_known[value] for value in longest_first), re.IGNORECASE)


def learn_environment() -> None:
    """Take note of variables that are named like secrets, as OPENAI_API_KEY, and of passwords in addresses."""
    learn(*(value.strip() for name, value in os.environ.items() if SECRET_VARIABLE.search(name.upper())))
    for value in os.environ.values():
        learn_urls(value if "://" in value else "")


def learn_urls(text: str) -> None:
    """Take note of the passwords and keys in all addresses of a text: user:password@host, ?api_key=..., ?sig=..."""
    for address in ADDRESS.findall(text):
        parts = [part.partition("=") for part in address.partition("?")[2].partition("#")[0].split("&")]
        values = [value for name, _, value in parts if SECRET_PARAMETER.search(name)]
        learn(*values, *map(unquote_plus, values))
    for after_scheme, alone, password in USERINFO.findall(text):
        user = after_scheme or alone
        learn(password or user, unquote(password or user), _base64(f"{unquote(user)}:{unquote(password)}"))


@contextmanager
def kept(*texts: str | None) -> Iterator[None]:
    """Inside, the secrets of the environment and of addresses in `texts` are known. No exception carries one out."""
    learn_environment()
    for text in texts:
        learn_urls(text or "")
    try:
        yield
    except BaseException as error:
        cleanse(error)
        raise


#### REPLACING


def redact(text: str) -> str:
    """Replace every secret that is known."""
    return text if _pattern is None else _pattern.sub(REDACTED, text)


def redacted(value: Any) -> Any:
    """Replace every secret in all texts of a value as JSON has them; keys of dictionaries stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def without_urls_secrets(value: Any) -> Any:
    """`redacted`, after learning what the addresses in the value tell: for a configuration that is to be saved."""
    learn_urls(json.dumps(value, default=str, ensure_ascii=False))
    return redacted(value)


def cleanse(error: BaseException) -> None:
    """Replace every secret in the messages of an exception and of those that led to it, which a traceback shows."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redacted(list(one.args)))
        if isinstance(one, OSError):
            one.strerror, one.filename = redacted(one.strerror), redacted(one.filename)
        if notes := getattr(one, "__notes__", None):
            notes[:] = redacted(notes)
        todo += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


#### FORMS


def _forms(value: str) -> str:
    """Make a pattern of the forms of a secret: as it is, escaped, in base64, and cut off."""
    if len(value) < WHOLE_WORD:
        return _where_credentials_stand(value)
    escaped = {json.dumps(value)[1:-1], repr(value)[1:-1], html.escape(value)}
    forms = {value, quote(value, safe=""), quote_plus(value), _base64(value), *escaped}
    patterns = [rf"(?<!\w){re.escape(form)}(?!\w)" if len(form) < ANYWHERE else re.escape(form) for form in forms]
    if len(value) >= LONG:
        patterns.append(re.escape(value[:BEGINNING]) + r"[\w-]*")
    return "|".join(sorted(patterns, key=len, reverse=True))


def _where_credentials_stand(value: str) -> str:
    word = re.escape(value)
    before = r"(?<=:){0}(?=@)|(?<=//){0}(?=@)|(?<=bearer ){0}(?!\w)|(?<=basic ){0}(?!\w)|(?<=key: ){0}(?!\w)"
    return f"{before.format(word)}|(?<==){word}(?=&|#|[\\s\"']|$)"


def _base64(text: str) -> str:
    return base64.b64encode(text.encode("utf-8", "surrogatepass")).decode().rstrip("=")
