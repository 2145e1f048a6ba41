"""Conversations as the text that a model reads: one renderer for training, evaluation, sampling and inspection.

A prompt is messages, or text that is used as it is. Messages are rendered by the tokenizer's chat template if it has
one, and otherwise in the form of the named datasets: `\\n\\nHuman: ...\\n\\nAssistant: ...`. A response is the rest of
the rendered conversation, up to the end of its last turn. `halos/tokens.py` encodes what is rendered here.

**Text is text.** Where a person has written a control token such as `</s>` into a message or a response, `literal`
puts the mark LITERAL inside of it. The encoder removes the mark and encodes the characters.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from halos.errors import UserError
from halos.examples import Example
from halos.tokens import LITERAL, TEMPLATED, special_tokens

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
NAMES = {"user": "Human", "assistant": "Assistant", "system": "System"}

PROBE = "halosprobe"  # stands for a reply while the end of a turn is looked for
TAIL = 256  # characters of a prompt that decide how the text behind it is encoded, at most
NOT_TEXT = ("role", "type", "id", "name")  # keys of a message whose values a template compares with its own words

Messages = list[dict[str, Any]]


class Ending(NamedTuple):
    """The text that a template writes behind a reply."""

    kept: str  # up to its first control token, or to its last character that is not white space
    dropped: str  # the rest
    is_token: bool  # whether `kept` ends in a control token; if not, EOS follows it


class Renderer:
    """Renders the examples of a run for one tokenizer, and counts what it had to do for them.

    counts: examples with control tokens in their texts, and responses of which the rendered conversation does not
        begin with its prompt
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self.counts: Counter[str] = Counter()
        self.last: tuple[Example, Messages, str] | None = None  # whose prompt was rendered last, the prompt, its text

    #### WHAT IS RENDERED

    def prompt(self, example: Example) -> str:
        """Return a prompt as `Encoder.prompts` takes it: text as it is, messages with the call for a reply."""
        if isinstance(example.prompt, str):
            return example.prompt
        text = self._rendered_prompt(example, self.literal(example.prompt))
        return TEMPLATED + text if self.tokenizer.chat_template else text

    def responses(self, example: Example) -> list[str]:
        """Return the responses as `Encoder.responses` takes them."""
        marked = [self.literal(generation) for generation in example.generations]
        is_text = isinstance(example.prompt, str)  # the user's own rendering, which stays as it is
        prompt: Any = example.prompt if is_text else self.literal(example.prompt)
        if marked != example.generations or prompt != example.prompt:
            self.counts["examples with control tokens in their texts"] += 1
        if is_text:
            return [str(generation) for generation in marked]
        before = self._rendered_prompt(example, prompt)
        return [self._response(example, prompt, before, generation) for generation in marked]

    def _rendered_prompt(self, example: Example, prompt: Messages) -> str:
        """Render a prompt with the call for a reply. The last one is kept: its responses are rendered next."""
        if self.last is None or self.last[0] is not example or self.last[1] != prompt:
            self.last = example, prompt, self.conversation(prompt, example, calls_for_reply=True)
        return self.last[2]

    def has_control_tokens(self, example: Example) -> bool:
        """Return whether control tokens are written in the messages or the responses, and encoded as characters."""
        texts = example.generations if isinstance(example.prompt, str) else [*example.prompt, *example.generations]
        return self.literal(texts) != texts

    def text(self, example: Example, index: int) -> str:
        """Return a response for people: as it was given, or the text of its last turn."""
        generation = example.generations[index]
        if not isinstance(generation, str):
            return str(generation[-1].get("content") or "")
        is_plain = isinstance(example.prompt, str) or self.tokenizer.chat_template or self.continues(example.prompt)
        return generation if is_plain else f" {generation.lstrip(' ')}"

    def _response(self, example: Example, prompt: Messages, before: str, generation: str | Messages) -> str:
        """Return a response to messages: with the named datasets' form one text, else the segments of its turns."""
        if isinstance(generation, str) and not self.tokenizer.chat_template:
            return generation if self.continues(prompt) else f" {generation.lstrip(' ')}"
        segments = list(self._segments(example, prompt, before, generation))
        return TEMPLATED + json.dumps({"segments": segments, "eos": not self.end_of_turn.is_token}, ensure_ascii=False)

    def _segments(self, example: Example, prompt: Messages, before: str, generation: str | Messages) -> Iterator[tuple]:
        """Yield (end of the text before, text, is trained on): the assistant's turns, and what stands between them.

        before: the rendered prompt
        """
        so_far = before
        for turns in _up_to_replies(prompt, generation):
            if len(turns) > len(prompt) + 1:
                before = self.conversation(turns[:-1], example, calls_for_reply=True)
                if not before.startswith(so_far):
                    raise UserError(
                        f"{example.id}: the chat template changes earlier turns of a conversation, so its replies "
                        "cannot be told apart; train on the last turn alone, or use another chat_template=FILE"
                    )
                yield self.tail(so_far), before[len(so_far) :], False
            reply = self._reply(example, turns, before)
            yield self.tail(before), reply, True
            so_far = before + reply

    def _reply(self, example: Example, turns: Messages, before: str) -> str:
        """Return the rendered text of the last turn behind `before`: to the end of the turn, and nothing after it."""
        ending = self.end_of_turn
        whole = self.conversation(turns, example, calls_for_reply=False)
        if not whole.startswith(before):
            self.counts["replies of a conversation that does not begin with its prompt"] += 1
            return str(turns[-1].get("content") or "") + ending.kept
        reply = whole[len(before) :].removesuffix(ending.dropped)
        return reply if reply.endswith(ending.kept) else reply + ending.kept

    #### TEMPLATES

    def conversation(self, messages: Messages, example: Example, calls_for_reply: bool) -> str:
        """Render messages. calls_for_reply: end with what comes before a reply, or inside a last assistant message"""
        if not self.tokenizer.chat_template:
            return _as_human_and_assistant(messages, calls_for_reply)
        is_continued = calls_for_reply and self.continues(messages)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=getattr(example, "tools", None) or None,
                tokenize=False,
                add_generation_prompt=calls_for_reply and not is_continued,
                continue_final_message=is_continued,
            )
        except Exception as error:  # a template is a program: it can raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"{example.id or 'a conversation'}: the chat template refuses the roles "
                f"{', '.join(str(message.get('role')) for message in messages)} ({reason}); change the data, or use "
                "another chat_template=FILE"
            ) from error

    @cached_property
    def end_of_turn(self) -> "Ending":
        """The text that the template writes behind a reply."""
        if not self.tokenizer.chat_template:
            return Ending("", "", False)
        messages: Messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        behind = self.conversation(messages, Example(messages), calls_for_reply=False).rpartition(PROBE)[2]
        found = self.special.search(behind) if self.special else None
        if found:
            return Ending(behind[: found.end()], behind[found.end() :], True)
        return Ending(behind.rstrip(), behind[len(behind.rstrip()) :], False)

    @cached_property
    def stop_ids(self) -> list[int]:
        """Token ids that end a response: the template's end of turn, if it is a token, and the tokenizer's EOS."""
        ending = self.end_of_turn
        tokens = [self.tokenizer.convert_tokens_to_ids(ending.kept.strip())] if ending.is_token else []
        return list(dict.fromkeys([*tokens, self.tokenizer.eos_token_id]))

    def continues(self, messages: Messages) -> bool:
        """Return whether a response continues the last message, which is the assistant's."""
        return bool(messages) and messages[-1].get("role") == "assistant"

    #### TEXT IS TEXT

    def literal(self, value: Any) -> Any:
        """Mark the control tokens in the texts of messages or of a response. Text prompts stay as they are."""
        if isinstance(value, str):
            return self.special.sub(_marked, value) if self.special else value
        if isinstance(value, list):
            return [self.literal(part) for part in value]
        if isinstance(value, dict):
            return {key: part if key in NOT_TEXT else self.literal(part) for key, part in value.items()}
        return value

    def tail(self, text: str) -> str:
        """Return the end of a text, from its last control token on or from a space: it decides how text behind it is
        encoded."""
        near = text[-TAIL:]
        found = [match.start() for match in self.special.finditer(near)] if self.special else []
        if found:
            return near[found[-1] :]
        return near if len(text) <= TAIL else near[max(near.find(" "), 0) :]


def stop_token_ids(tokenizer, of_base: int | Sequence[int] | None = None) -> list[int]:
    """Return all ids that end a response, each once: the template's end of a turn, the tokenizer's EOS, the base's.

    of_base: eos_token_id of the base's generation settings
    """
    of_base = [of_base] if isinstance(of_base, int) else of_base or ()
    return list(dict.fromkeys([*Renderer(tokenizer).stop_ids, *of_base]))


def without_marks(text: str) -> str:
    """Return a rendered text as people read it."""
    return text.replace(LITERAL, "").removeprefix(TEMPLATED)


def _marked(match: re.Match) -> str:
    return match[0][0] + LITERAL + match[0][1:]


def _up_to_replies(prompt: Messages, generation: str | Messages) -> Iterator[Messages]:
    """Yield the conversation up to each of the assistant's turns in a response."""
    if isinstance(generation, str):
        if prompt and prompt[-1].get("role") == "assistant":
            last = prompt[-1] | {"content": str(prompt[-1].get("content") or "") + generation}
            yield [*prompt[:-1], last]
        else:
            yield [*prompt, {"role": "assistant", "content": generation}]
        return
    for index, turn in enumerate(generation):
        if turn.get("role") == "assistant":
            yield [*prompt, *generation[: index + 1]]


def _as_human_and_assistant(messages: Sequence[dict], calls_for_reply: bool) -> str:
    """Render messages as the named datasets write them."""
    text = "".join(f"\n\n{NAMES.get(m['role'], m['role'])}: {m.get('content') or ''}" for m in messages)
    is_open = not messages or messages[-1]["role"] != "assistant"
    return text + ASSISTANT if calls_for_reply and is_open else text
