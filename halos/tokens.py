"""Encode texts to token ids, and truncate them. halos/token_store.py keeps the ids on disk.

A training sequence is `[BOS] + ids(prompt) + ids(response) + [EOS]`. Prompt and response are encoded separately. BOS is
there only if the tokenizer itself starts texts with one.

**The space that begins a response.** The ids of a response are those it has *after other text*. Byte-level BPE (GPT-2,
NeoX, Llama 3) encodes " Paris" as one token in every position, so it needs no special treatment. SentencePiece (Llama 1
and 2) puts its own space before every text. There " Paris" alone would become "▁▁Paris", a sequence the model never
sees. For such tokenizers a line break is put before the response, and its ids are then removed. For both kinds,
decoding the concatenated ids returns the concatenated texts.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from itertools import chain, takewhile
from typing import NamedTuple

import numpy as np

# Unicode noncharacters, which no text may contain: marks that `halos/chat.py` leaves for the encoder.
LITERAL = "\ufdd0"  # inside a control token that a person has written: it is encoded as characters
TEMPLATED = "\ufdd1"  # in front of what a chat template wrote: a prompt with its own BOS, or a response in segments
ANCHORS = ("\n", ":", "a")  # encoded before a response, if the tokenizer would add its own space there


class Role(StrEnum):
    """The role of a response in a loss."""

    CHOSEN = "chosen"  # or desirable, or to be imitated
    REJECTED = "rejected"  # or undesirable
    UNRELATED = "unrelated"  # a response to another prompt: scored, and not trained on


class TokenizedExample(NamedTuple):
    """A prompt and its responses that a loss sees together: the two of a preference pair, or one.

    Responses to other prompts (Role.UNRELATED) may come in addition.
    """

    prompt: np.ndarray  # (n,) int32, with BOS
    responses: tuple[np.ndarray, ...]  # (m,) int32 each, EOS last unless it was truncated
    roles: tuple[Role, ...]  # one per response
    scores: tuple[float, ...] = ()  # one per response, NaN where unknown; empty if the data has none
    ids: tuple[str, ...] = ()  # one per response: dataset/example/generation
    dataset: str = ""  # the name of the dataset that the prompt is from
    trained: tuple[np.ndarray | None, ...] = ()  # one (m,) bool per response: which tokens count; None or empty: all

    @property
    def n_tokens(self) -> int:
        """Number of tokens in a packed forward pass.

        The prompt counts once. The last token of a response is never an input.
        """
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses)

    def only(self, kept: Sequence[int]) -> "TokenizedExample":
        """Return the example with only the responses at these indices."""
        if len(kept) == len(self.responses):
            return self
        return self._replace(
            responses=tuple(self.responses[i] for i in kept),
            roles=tuple(self.roles[i] for i in kept),
            scores=tuple(self.scores[i] for i in kept) if self.scores else (),
            ids=tuple(self.ids[i] for i in kept) if self.ids else (),
            trained=tuple(self.trained[i] for i in kept) if self.trained else (),
        )

    @property
    def masks(self) -> tuple[np.ndarray | None, ...]:
        """One (m,) bool per response: which of its tokens count; None: all."""
        return self.trained or (None,) * len(self.responses)

    @property
    def n_targets(self) -> list[int]:
        """The number of tokens of each response that count."""
        return [
            len(response) if mask is None else int(mask.sum())
            for response, mask in zip(self.responses, self.masks, strict=True)
        ]


class Encoder:
    """Encodes and decodes for training, evaluation, and sampling. It adds special tokens explicitly, and no others."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        self.special = special_tokens(tokenizer)
        self.reads_characters = False  # whether control tokens in a text are encoded as characters
        self.bos = [tokenizer.bos_token_id] if self._starts_with_bos() else []

    def _starts_with_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos]

    @cached_property
    def anchors(self) -> dict[str, list[int]]:
        """Each anchor and its ids. Empty if the tokenizer does not add a space of its own."""
        first = self.tokenizer.convert_ids_to_tokens(self._encode(["a"])[0])[0]
        return dict(zip(ANCHORS, self._encode(ANCHORS), strict=True)) if first.startswith("▁") else {}

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return [BOS] + ids for each text. A rendered chat has BOS where its template writes it, and nowhere else."""
        n = len(self.bos)
        encoded = self._encode([text.removeprefix(TEMPLATED) for text in texts])
        return [
            ids if text.startswith(TEMPLATED) or (n and ids[:n] == self.bos) else self.bos + ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def prompt_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `prompts` as (n,) int32 arrays, the form that a `TokenStore` returns."""
        return [np.array(ids, np.int32) for ids in self.prompts(texts)]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids + [EOS] for each text, with the ids that the text has after other text.

        A response that a chat template wrote comes in segments: those that are not trained on have the ids ~id, which
        are negative, and EOS follows only if the template ends turns without a control token.
        """
        templated = {i: json.loads(text[1:]) for i, text in enumerate(texts) if text.startswith(TEMPLATED)}
        plain = [i for i in range(len(texts)) if i not in templated]
        encoded = dict(zip(plain, self._after_text([texts[i] for i in plain]), strict=True))
        encoded |= zip(templated, self._segmented(list(templated.values())), strict=True)
        return [
            ids if i in templated and not templated[i]["eos"] else [*ids, self.eos_token_id]
            for i, ids in sorted(encoded.items())
        ]

    def _segmented(self, responses: list[dict]) -> list[list[int]]:
        """Return the ids of responses, each a list of segments (end of the text before, text, is trained on)."""
        segments = [segment for response in responses for segment in response["segments"]]
        befores = list(dict.fromkeys(before for before, _, _ in segments))
        ids_before = dict(zip(befores, self._encode(befores), strict=True))
        ids_of = []
        encoded = self._encode([before + text for before, text, _ in segments])
        for (before, text, is_trained), ids in zip(segments, encoded, strict=True):
            start = ids_before[before]
            merged = ids[: len(start)] != start  # a token spans the boundary: the ids are those after other text
            own = self._after_text([text])[0] if merged else ids[len(start) :]
            ids_of.append(own if is_trained else [~token for token in own])
        in_order = iter(ids_of)
        return [[*chain.from_iterable(next(in_order) for _ in response["segments"])] for response in responses]

    def continuation(self, text: str) -> np.ndarray:
        """Return the (n,) int32 ids that a text has after other text, without EOS."""
        return np.array(self._after_text([text])[0], np.int32)

    def _after_text(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids that each text has after other text."""
        encoded: dict[int, list[int]] = {}
        for anchor, anchor_ids in self.anchors.items():
            left = [i for i in range(len(texts)) if i not in encoded]
            for i, ids in zip(left, self._encode([anchor + texts[i] for i in left]), strict=True):
                # The anchor and the text may merge, for example two line breaks. Then the next anchor is tried.
                if ids[: len(anchor_ids)] == anchor_ids:
                    encoded[i] = ids[len(anchor_ids) :]
        left = [i for i in range(len(texts)) if i not in encoded]
        encoded |= zip(left, self._encode([texts[i] for i in left]), strict=True)
        return [encoded[i] for i in range(len(texts))]

    def decode_response(self, ids: Sequence[int], stop_ids: Sequence[int] | None = None) -> str:
        """Decode a response, including its leading space, up to the first of the stop tokens, EOS by default."""
        stops = set(stop_ids or [self.eos_token_id])
        ids = list(takewhile(lambda token: token not in stops, ids))
        anchor, anchor_ids = next(iter(self.anchors.items()), ("", []))
        text = self.tokenizer.decode(anchor_ids + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(anchor)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        marked = {i: self._encode_literal(text) for i, text in enumerate(texts) if LITERAL in text}
        others = iter(self._encode_batch([text for i, text in enumerate(texts) if i not in marked]))
        return [marked[i] if i in marked else next(others) for i in range(len(texts))]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            options = {"add_special_tokens": False, "split_special_tokens": self.reads_characters}
            return self.tokenizer(texts, **options)["input_ids"] if texts else []
        # Set only where it differs: nothing may be set while another thread encodes.
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        if backend.encode_special_tokens != self.reads_characters:
            backend.encode_special_tokens = self.reads_characters
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_literal(self, text: str) -> list[int]:
        """Encode a text in which some control tokens are marked as characters, and the others are what they are."""
        parts = re.split(f"({self.special.pattern})", text) if self.special else [text]
        strips = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
                continue
            if index > 0 and strips[parts[index - 1]].rstrip:
                part = part.lstrip()
            if index + 1 < len(parts) and strips[parts[index + 1]].lstrip:
                part = part.rstrip()
            ids += self._encode_characters(part.replace(LITERAL, ""), is_first=index == 0)
        return ids

    def _encode_characters(self, text: str, is_first: bool) -> list[int]:
        self.reads_characters = True
        try:
            return (self._encode_batch([text]) if is_first else self._after_text([text]))[0] if text else []
        finally:
            self.reads_characters = False

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes whenever the ids of some text could change."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        name = type(self.tokenizer).__name__
        return hashlib.blake2b(f"{name} {self.bos} {self.eos_token_id} {rules}".encode()).hexdigest()


def special_tokens(tokenizer) -> re.Pattern | None:
    """Return a pattern of the tokenizer's control tokens; None if it has none."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    longest_first = sorted(contents, key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, longest_first))) if contents else None


def truncate(
    prompt: np.ndarray,
    responses: tuple[np.ndarray, ...],
    roles: tuple[Role, ...],
    max_length: int,
    max_prompt_length: int,
    keep: str,
    n_bos: int,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Cut a prompt and its responses, so that the prompt with each response has at most `max_length` tokens.

    The prompt is cut only if the sequence with the longest trained response is too long. It is cut once for all
    responses, so they still share it. BOS is kept. If a sequence is still too long, its response loses its end,
    including EOS.
    """
    trained = [len(response) for response, role in zip(responses, roles, strict=True) if role is not Role.UNRELATED]
    if len(prompt) + max(trained) > max_length:
        prompt = truncate_prompt(prompt, max_prompt_length, keep, n_bos)
    room = max_length - len(prompt)
    return prompt, tuple(response[:room] for response in responses)


def truncate_prompt(prompt: np.ndarray, max_prompt_length: int, keep: str, n_bos: int) -> np.ndarray:
    """Cut a prompt to at most `max_prompt_length` tokens, including BOS. `keep` is keep_start or keep_end."""
    if len(prompt) <= max_prompt_length:
        return prompt
    if keep == "keep_start":
        return prompt[:max_prompt_length]
    return np.concatenate((prompt[:n_bos], prompt[len(prompt) - (max_prompt_length - n_bos) :]))
