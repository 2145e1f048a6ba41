"""Chat messages as the text that a model reads: with the tokenizer's template, or as Human / Assistant turns."""

from collections.abc import Sequence

from halos.examples import Example

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def render_prompt(prompt: str | list[dict], tokenizer) -> str:
    """Return text as it is; chat messages through the tokenizer's chat template, or in the Human / Assistant form."""
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"\n\n{names.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt]
    return "".join(turns) + "\n\nAssistant:"


def render_responses(example: Example, tokenizer) -> list[str]:
    """Return text as it is; after chat messages in the Human / Assistant form, one space before each response."""
    if isinstance(example.prompt, str) or tokenizer.chat_template:
        return example.generations
    return [f" {generation.lstrip(' ')}" for generation in example.generations]


def stop_token_ids(tokenizer, of_base: int | Sequence[int] | None = None, turn_ends: Sequence[int] = ()) -> list[int]:
    """Return all ids that end a response, each once: the ends of a turn, then the tokenizer's EOS, then the base's.

    of_base: eos_token_id of the base's generation settings
    turn_ends: ids with which the chat template ends a turn
    """
    of_base = [of_base] if isinstance(of_base, int) else of_base or ()
    return list(dict.fromkeys([*turn_ends, tokenizer.eos_token_id, *of_base]))
