"""Texts of Human / Assistant turns as chat messages, such that today's rendering of the messages is the text again.

HH, SHP, Open Assistant and the embedded data are written as `\\n\\nHuman: ...\\n\\nAssistant:`. As messages they go
through a tokenizer's chat template where it has one, and through that very form where it has none.
"""

import re

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
NAMES = {"user": HUMAN, "assistant": ASSISTANT}
BLANKS = re.compile(r"[ \t]+")
TURN = re.compile(r"\n\n(Human|Assistant): ")


def messages_of_turns(text: str) -> str | list[dict]:
    """Return the messages of a prompt, as `\\n\\nHuman: Hi.\\n\\nAssistant:` has one. Other text is returned as it is.

    Two turns of one speaker in a row become one message that holds both, with the second one's name inside.
    """
    body = text.rstrip(" ")
    if not body.endswith(ASSISTANT):
        return text
    before, *parts = TURN.split(body[: -len(ASSISTANT)])
    if before:
        return text
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [(names[name], content) for name, content in zip(parts[::2], parts[1::2], strict=True)]
    return messages_of(turns) or text


def messages_of(turns: list[tuple[str, str]]) -> list[dict] | None:
    """Return (role, content) turns as messages that alternate, the user first and last; None if they cannot."""
    messages: list[dict] = []
    for role, content in turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"{NAMES[role]} {content}"
        else:
            messages.append({"role": role, "content": content})
    return messages if messages and messages[0]["role"] == messages[-1]["role"] == "user" else None


def text_of(turns: list[tuple[str, str]]) -> str:
    """Return (role, content) turns as the text of a prompt."""
    return "".join(f"{NAMES[role]} {content}" for role, content in turns) + ASSISTANT


def split_reply(conversation: str) -> tuple[str | None, str]:
    """Split a conversation after its last `\\n\\nAssistant:` into (prompt, reply). Without a reply, prompt is None."""
    before, marker, reply = conversation.rpartition(ASSISTANT)
    if not marker or HUMAN in reply:
        return None, reply
    return before + marker, reply


def same_but_blanks(text: str, other: str) -> bool:
    """Return whether two texts differ in repeated blanks at most, as prompts and replies of HH pairs sometimes do."""
    return BLANKS.sub(" ", text) == BLANKS.sub(" ", other)
