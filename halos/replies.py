"""From a judge's raw reply to its verdict. A verdict that is read wrongly costs more than one that is not read: the
judge is asked again. So every form is matched narrowly, and what contradicts itself is not read at all.

1. Reasoning goes: it weighs one side after the other, and one that never ended has no answer yet.
2. A reply that is one JSON object says what its verdict key says; its other texts are not looked at.
3. Quotations go, for what is quoted is mostly a response, which may hold a verdict of its own.
4. What states a verdict by its form is collected: a JSON key, a label ("Verdict: 1"), [[A]], <answer>1</answer>,
   \\boxed{1}, and a first or last line that is nothing but a verdict ("1", "Output (b)").
5. Sentences are collected that compare the two responses as a whole ("I prefer 2 over 1"). They are matched by a small
   grammar in which nothing stands between subject, verb and comparative but known adverbs, so that a negation, a
   condition, or somebody else's opinion does not fit. They speak where nothing else does, and must not contradict 4.
6. All statements must agree. The last one stands against earlier ones only where the judge says that it corrects them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Claim(NamedTuple):
    """A verdict, or None for a statement that cannot be read, and the sentence that makes it."""

    sentence: int
    verdict: int | None
    text: str


def parse_verdict(text: str) -> int | None:
    """1 or 2 for the better response, 0 for a tie, None where the reply is empty, unclear, contradictory or no verdict.

    Takes any text, in time linear in its length; never raises.
    """
    answer = _without_reasoning(text)
    try:
        parsed = json.loads(answer, strict=False) if answer[:1] in ("{", '"') else None
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        return _agreed([Claim(0, _json_value(parsed[key]), key) for key in parsed if LABEL.fullmatch(_as_words(key))])
    answer = _without_quotations(_plain(parsed if isinstance(parsed, str) else answer))
    sentences = [sentence.strip() for sentence in SENTENCE_END.split(answer) if sentence.strip()]
    stated = [*_edge_lines(answer, len(sentences)), *_statements(sentences)]
    words = [_slots_marked(sentence) for sentence in sentences]
    overall = [*_comparisons(words, OVERALL), *_ties(words, TIE)]
    if stated or overall:
        return _agreed(stated + overall)
    if any(CONTRAST.search(sentence) for sentence in words):  # more helpful, but ...
        return None
    return _agreed([*_comparisons(words, HELPFUL), *_ties(words, TIE_HELPFUL)])


def _agreed(claims: list[Claim]) -> int | None:
    """What all claims say, or the last one, where it corrects those that say something else."""
    if not claims:
        return None
    claims = sorted(claims, key=lambda claim: claim.sentence)
    last = claims[-1]
    others = [claim for claim in claims if claim.verdict != last.verdict]
    if not others:
        return last.verdict
    return last.verdict if _corrects(last, others) else None


# ---- 1 to 3: what belongs to the answer

REASONING = r"(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis)"
REASONING_END = re.compile(rf"</{REASONING}>|\[/THINK\]", re.IGNORECASE)
REASONING_START = re.compile(rf"^[^\S\n]?(?:<{REASONING}>|\[THINK\])", re.IGNORECASE | re.MULTILINE)
FINAL_CHANNEL = re.compile(r"<\|channel\|>\s?final\s?<\|message\|>")
SPECIAL_TOKEN = re.compile(r"<\|[\w ]{1,30}\|>|</s>|<(?:eos|end_of_turn)>")

PLAIN = str.maketrans(
    "“”„«»‘’‚＂：＝（）［］＞＜１２ＡＢ–—−", '"""""\'\'\'":=()[]><12AB---', "\u200b\u200c\u200d\ufeff*`"
)
FENCE = re.compile(r"```[^\n`]*\n?(.*?)```\s*", re.DOTALL)
# An opening quote stands before a word, a closing one after a word, so that 5" opens nothing; an open one never closes.
QUOTATION = re.compile(r'(?<![\w"\\])"((?=[^\s"])(?:[^"\\]|\\.)*)(?:"|\Z)', re.DOTALL)
BLOCK_QUOTE = re.compile(r"^ ?>.*$", re.MULTILINE)
# Where such a quotation ends is anybody's guess.
ANNOUNCED = re.compile(
    r"^.{0,300}\b(?:says|said|reads|writes|wrote|states|stated|quotes?|(?:end|begin|start)s with)\b.{0,40}:$.*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


def _without_reasoning(text: str) -> str:
    """What follows the reasoning; nothing where that has not ended."""
    if "<|channel|>" in text:
        text = FINAL_CHANNEL.split(text)[-1] if FINAL_CHANNEL.search(text) else ""
    answer = REASONING_END.split(text)[-1]
    return "" if REASONING_START.search(answer) else SPECIAL_TOKEN.sub("", answer).strip()


def _plain(text: str) -> str:
    """One kind of quotes and dashes, single spaces, no markup but quotations; fences of code that may be quoted go."""
    text = FENCE.sub(lambda block: block[1] if _is_answer(block) else "…\n", text)
    text = text.translate(PLAIN).replace("__", "")
    return re.sub(r"\n\s+", "\n", re.sub(r"[^\S\n]+", " ", text)).replace(" \n", "\n").strip()


def _is_answer(fence: re.Match) -> bool:
    return fence.end() == len(fence.string) or fence.start() == 0 and fence[1].lstrip().startswith("{")


def _without_quotations(text: str) -> str:
    """Quoted names and values stay, as in "verdict": "1"."""
    text = ANNOUNCED.sub("…", BLOCK_QUOTE.sub("…", text))
    return QUOTATION.sub(lambda quote: quote[0] if _is_name(quote) else '"…"', text).strip()


def _is_name(quote: re.Match) -> bool:
    closed = quote[0].endswith('"')
    return closed and len(quote[1]) < 40 and (quote[1].isidentifier() or _value(quote[1]) is not None)


# ---- 4: what states a verdict by its form

NOUN = r"(?:response|answer|assistant|output|option|reply|completion|candidate|model|choice|summary)"
NUMBERED = rf"(?:the )?{NOUN} ?(?:#|no\. ?|number )?[(\[]?(?:{{digit}}|{{word}}|{{letter}})[)\]]?"
ORDINAL = rf"(?:the )?(?:{{ordinal}})(?: one| {NOUN})?"
SLOTS = [
    {"digit": "[1①]", "word": "one", "letter": "[aA]", "ordinal": "first|1st"},
    {"digit": "[2②]", "word": "two", "letter": "[bB]", "ordinal": "second|2nd"},
]
BARE = r"[(\[]?(?:{digit}|{letter})[)\]]?"
VALUES = [re.compile(f"(?:{NUMBERED}|{ORDINAL}|{BARE})".format(**slot), re.IGNORECASE) for slot in SLOTS]
TIE_VALUE = re.compile(
    r"(?:a |it's a )?(?:tie|tied|draw)|neither(?: one| is better)?|both|equal|equally good", re.IGNORECASE
)
ORDERING = re.compile(rf"(?:{NOUN} )?([AB12]) ?(>{{1,3}}|<{{1,3}}|={{1,2}}) ?(?:{NOUN} )?([AB12])", re.IGNORECASE)

LABEL_WORDS = (
    rf"(?:(?:the|my|our|a|so|thus|therefore|overall|initial|first|final|revised),? ){{0,4}}(?:"
    rf"verdict|winner|winning {NOUN}|(?:better|best|preferred|preferable|superior|more helpful)(?: {NOUN}| one)?|"
    rf"preference|choice|pick|decision|judge?ment|{{more}})"
)
LABEL = re.compile(LABEL_WORDS.format(more="answer|final answer"))
LABELLED = re.compile(rf"[#\-{{ ]{{0,8}}{LABEL_WORDS.format(more='conclusion')} ?(?:is:?|:|=|-|$) ?(.*)", re.IGNORECASE)
ANSWER = re.compile(r"[#\- ]{0,8}(?:the |my )?(?:final )?answer ?: ?(.*)", re.IGNORECASE)
JSON_KEY = re.compile(
    rf"""["']({LABEL_WORDS.format(more="answer")})["'] ?: ?(["']?)([^"',}}]*)\2 ?([,}}].*)?""".replace(" ", "[ _]")
)
BRACKETS = re.compile(r"\[\[([^\[\]]{1,12})\]\]")
TAG = re.compile(r"<(verdict|answer|final_answer|winner|choice)> ?([^<>]{1,40}?) ?</\1>", re.IGNORECASE)
BOXED = re.compile(r"\\boxed ?\{(?:\\[a-z]{1,8} ?\{)?([^{}]{1,40})\}{1,2}")
