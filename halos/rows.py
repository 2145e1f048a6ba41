"""One row of data: its columns under our names, and the values that they can hold, checked.

Every mistake in a row raises a UserError that names the place and the column. Null and [] count as absent.
"""

import difflib
import json
import math
from typing import Any

from halos.datafiles import from_json
from halos.errors import UserError
from halos.turns import messages_of_turns

PROMPTS_AS = ("text", "user", "turns")
LABELS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "-1": False}
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool", "bot": "assistant"}
CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
FORMS_IN_WORDS = "prompt, chosen, rejected (pairs) or prompt, response, desirable (binary feedback)"

Messages = list[dict[str, Any]]
Text = str | Messages  # a prompt or a response


class Row:
    """The columns of one row, under our names. Remembers which of them were read."""

    def __init__(self, where: str, columns: dict[str, Any], prompt_as: str = "text"):
        self.where = where
        self.columns = columns
        self.prompt_as = prompt_as
        self.read: set[str] = set()

    def has(self, *names: str) -> bool:
        """Return True if all these columns are there and hold something."""
        return all(self.columns.get(name) not in (None, []) for name in names)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> Any:
        """Return the value of a column, which must be there."""
        if name not in self.columns:
            others = sorted(set(self.columns) - self.read)
            nearest = difflib.get_close_matches(name, others, n=1, cutoff=0.6)
            remedy = f"did you mean {nearest[0]!r}?" if nearest else f"a row has {FORMS_IN_WORDS}"
            raise self.error(f"no column {name!r} (it has: {', '.join(sorted(self.columns))}); {remedy}")
        self.read.add(name)
        return self.columns[name]

    def first(self, *names: str) -> str:
        """Return the first of these names that holds something, else the first that is there, else the first."""
        there = [name for name in names if self.has(name)] + [name for name in names if name in self]
        return (there or names)[0]

    def get(self, name: str) -> Any:
        return self[name] if self.has(name) else None

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {problem}")

    def wrong(self, name: str, remedy: str) -> UserError:
        return self.error(f"column {name!r} is {shown(self.columns[name])}; give {remedy}")


#### VALUES


def shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def messages_in(row: Row, name: str) -> Messages:
    """Return a column's chat messages, as {role, content, ...} without nulls; ShareGPT's {from, value} become these."""
    value = row[name]
    if not is_messages(value):
        raise row.wrong(name, 'text, or a list of messages {"role": ..., "content": ...}')
    return [_message(row, name, one) for one in value]


def _message(row: Row, name: str, given: dict) -> dict:
    message = {key: value for key, value in given.items() if value is not None and value != []}
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None)
    content = message.pop("value", "") if content is None else content
    if is_messages(content):  # parts, as multimodal datasets write them
        if any(part.get("type") != "text" or not isinstance(part.get("text"), str) for part in content):
            raise row.error(f"column {name!r} has a message with parts that are not text; leave such rows out")
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise row.wrong(name, 'text, or a list of messages {"role": ..., "content": ...}')
    role = ROLES.get(role, role)
    if role not in CHAT_ROLES:
        raise row.error(f"column {name!r} has a message of role {role!r}; give one of {', '.join(CHAT_ROLES)}")
    return {"role": role, "content": content, **message}


def prompt_in(row: Row, name: str = "prompt") -> Text:
    """Return a prompt: messages, or text in the way that `prompt_as` says; with the column `system` put before it."""
    value = row[name]
    if isinstance(value, str) and not row.has("system"):
        if row.prompt_as == "turns":
            return messages_of_turns(value)
        return [{"role": "user", "content": value}] if row.prompt_as == "user" and value.strip() else value
    prompt = [{"role": "user", "content": value}] if isinstance(value, str) else messages_in(row, name)
    return with_system(row, prompt)


def with_system(row: Row, messages: Messages) -> Messages:
    """Return messages with the column `system` before them, unless they begin with a system message."""
    system = row.get("system")
    if system is None or messages[0]["role"] == "system":
        return messages
    if not isinstance(system, str):
        raise row.wrong("system", "text")
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def response_in(row: Row, name: str) -> Text:
    """Return a response: text, or its messages if they are several or hold more than text. Null is empty text."""
    value = row[name]
    if value is None or value == [] or isinstance(value, str):
        return value or ""
    messages = messages_in(row, name)
    if messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise row.error(
            f"column {name!r} has the messages [{roles}]; give one assistant message, "
            "and put the turns before it in 'prompt'"
        )
    return as_response(messages)


def as_response(messages: Messages) -> Text:
    """Return the text of a single plain assistant message, else the messages up to the last assistant's."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    plain = len(messages) == 1 and messages[0].keys() == {"role", "content"}
    return messages[0]["content"] if plain else messages


def label_in(row: Row, name: str) -> bool:
    value = row[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    key = str(value).strip().lower()
    if not isinstance(value, bool | int | str) or key not in LABELS:
        raise row.wrong(name, "true or false, 1 or 0, or 1 or -1")
    return LABELS[key]


def number_in(row: Row, name: str) -> float:
    return parsed_number(row, name, row[name])


def parsed_number(row: Row, name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise row.wrong(name, "numbers")
    return number


def tools_in(row: Row) -> list[dict] | None:
    """Return the column `tools`: a list of descriptions, or the JSON text of one."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = from_json(value) or None
        except json.JSONDecodeError:
            raise row.wrong("tools", "a list, or the JSON text of one") from None
    if value is not None and not is_messages(value):
        raise row.wrong("tools", "a list of descriptions of tools")
    return value
