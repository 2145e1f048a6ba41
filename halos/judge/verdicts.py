"""Verdicts: reading the verdict out of the text of a judge's reply.

A verdict that is read wrongly costs more than one that is not read, since the judge is then asked again. So all forms
are matched narrowly, and a reply that contradicts itself is not read at all. `parse_verdict` works in six steps:

1. Remove the reasoning, which weighs one side after the other. If it never ended, there is no answer yet.
2. If the reply is one JSON object, read its verdict key, and nothing else.
3. Remove quotations. They mostly quote a response, which may contain a verdict of its own.
4. Collect what states a verdict by its form: a label ("Verdict: 1"), a JSON key, [[A]], <answer>1</answer>,
   \\boxed{1}, and a first or last line that is nothing but a verdict ("1", "Output (b)").
5. Collect sentences that compare the two responses as a whole ("I prefer 2 over 1"). A small grammar matches them. It
   allows only known adverbs between subject, verb and comparative, and only known words before them, so that a
   negation, a condition, or somebody else's opinion does not match.
6. All claims of 4 and 5 must agree. The last one wins over earlier ones only if the judge says that it corrects them.

To read a new form of reply, add it to the tables in tests/test_judge_verdicts.py first.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Claim(NamedTuple):
    """A verdict that a sentence states: 1, 2, 0, or None for a verdict that cannot be read. sentence: its index."""

    sentence: int
    verdict: int | None


LONGEST_ANSWER = 20_000  # characters without reasoning; a longer answer repeats itself or copies the responses


def parse_verdict(text: str) -> int | None:
    """Read 1 or 2 for the better response, or 0 for a tie; None if the reply is empty, unclear or contradictory.

    Takes any text, in time linear in its length, and never raises.
    """
    answer = _without_reasoning(text)
    parsed = _json(answer)
    if isinstance(parsed, list):
        return _agreed([Claim(0, _json_value(value)) for key, value in parsed if _is_label(key)])
    if len(answer) > LONGEST_ANSWER:
        return None
    answer = _without_quotations(_plain(parsed if isinstance(parsed, str) else answer))
    sentences = SENTENCE_END.split(answer)
    claims = [*_edge_lines(answer, len(sentences)), *_statements(sentences), *_overall(sentences)]
    return _agreed(claims or _helpful(sentences), sentences)


def _agreed(claims: list[Claim], sentences: list[str] | None = None) -> int | None:
    """Return what all claims say, or the last claim if it corrects all others; None if neither holds."""
    if not claims:
        return None
    sentences = sentences or [""]
    last = max(claims, key=lambda claim: claim.sentence)
    others = [claim.sentence for claim in claims if claim.verdict != last.verdict]
    if others and not _corrects(sentences, last.sentence, others):
        return None
    is_withdrawn = any(CORRECTION.search(sentence) for sentence in sentences[last.sentence + 1 :])
    return None if is_withdrawn else last.verdict


def _corrects(sentences: list[str], last: int, others: list[int]) -> bool:
    """Return whether the judge calls its last claim a correction, or the final one. Arguments are indices."""
    if last in others:
        return False
    since = sentences[max(others) + 1 : last + 1]
    is_final = FINAL.search(sentences[last]) and not any(FINAL.search(sentences[other]) for other in others)
    return bool(is_final) or any(CORRECTION.search(sentence) for sentence in since)


CORRECTION = re.compile(
    r"^(?:wait|actually|correction|hmm|no(?=,)|(?:up)?on (?:(?:a )?second|further|closer|careful|re)[ -]?\w+)\b|"
    r"\bI (?:overlooked|missed|misread|was wrong|take (?:that|it) back|(?:must|have to|need to) (?:revise|change))\b",
    re.IGNORECASE,
)
FINAL = re.compile(r"\b(?:final|overall)\b", re.IGNORECASE)


#### THE ANSWER WITHOUT REASONING AND QUOTATIONS (1 AND 3)

NOUN = "(?:response|answer|assistant|output|option|reply|completion|candidate|model|choice|summary)"

REASONING = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis)"
REASONING_END = re.compile(rf"</{REASONING}>|\[/THINK\]", re.IGNORECASE)
REASONING_START = re.compile(rf"^ ?(?:<{REASONING}>|\[THINK\])", re.IGNORECASE | re.MULTILINE)
FINAL_CHANNEL = re.compile(r"<\|channel\|>\s?final\s?<\|message\|>")
SPECIAL_TOKEN = re.compile(r"<\|[\w ]{1,30}\|>|</s>|<(?:eos|end_of_turn)>|\\[\[\]()]")

PLAIN = str.maketrans(
    "“”„«»‘’‚＂：＝（）［］＞＜１２ＡＢ–—−", '"""""\'\'\'":=()[]><12AB---', "\u200b\u200c\u200d\u2060\ufeff*`"
)
FENCE = re.compile(r"```[^\n`]*\n?(.*?)```", re.DOTALL)
TAG = re.compile(r"<(verdict|answer|final_answer|winner|choice)>\s?([^<>]{1,40}?)\s?</\1>", re.IGNORECASE)
OUR_FENCE = re.compile(r"^==== [0-9a-f]+ ====$", re.MULTILINE)  # of prompts.py; a judge may repeat its prompt
BLOCK_QUOTE = re.compile(r"^ ?>.*$", re.MULTILINE)
# An opening quote comes before a word, and not after one, as in 5". If it is never closed, it quotes all that follows.
QUOTATION = re.compile(r'(?<![\w"\\])"(?=[^\s"])((?:[^"\\]|\\.)*)("?)', re.DOTALL)
# "Response 2 says:", or "This is the end of Response 2:" and a verdict. The end of such a quotation is unknown.
SLOT = rf"(?:{NOUN} ?#?[(\[]?[12AB]|(?:first|second) {NOUN})\b"
ANNOUNCED = re.compile(
    rf"(?:\b(?:says|said|reads|writes|wrote|states|quotes|(?:ends|begins|starts) with)\b[^\n:]{{0,40}}:$|"
    rf"{SLOT}[^\n:]{{0,60}}:\n(?=[\"{{]|(?:final )?verdict\b)).*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")


def _without_reasoning(text: str) -> str:
    """Return what follows the reasoning; nothing if the reasoning has not ended."""
    if "<|channel|>" in text:
        text = FINAL_CHANNEL.split(text)[-1] if FINAL_CHANNEL.search(text) else ""
    answer = REASONING_END.split(text)[-1]
    return "" if REASONING_START.search(answer) else SPECIAL_TOKEN.sub("", answer).strip()


def _plain(text: str) -> str:
    """Normalise quotes, dashes and white space, and remove emphasis and code, unless the code is the answer."""
    text = TAG.sub(r"\nVerdict: \2\n", OUR_FENCE.split(text)[-1])
    text = FENCE.sub(lambda block: f"{block[1]}\n" if _is_answer(block) else "…", text)
    text = text.translate(PLAIN).replace("__", "")
    return re.sub(r" ?\n\s*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def _is_answer(block: re.Match) -> bool:
    return block.end() == len(block.string) or (block.start() == 0 and block[1].lstrip().startswith("{"))


def _without_quotations(text: str) -> str:
    """Remove quoted texts; names and values stay, as in "verdict": "1"."""
    text = ANNOUNCED.sub("…", BLOCK_QUOTE.sub("…", text))
    return QUOTATION.sub(lambda quote: quote[0] if _is_name(quote) else '"…"', text)


def _is_name(quote: re.Match) -> bool:
    return bool(quote[2]) and len(quote[1]) < 40 and (quote[1].isidentifier() or _value(quote[1]) is not None)


#### VERDICTS BY THEIR FORM (2 AND 4)

NUMBERED = rf"(?:the )?{NOUN} ?(?:#|no\. ?|number )?"
FIRST = rf"(?:{NUMBERED}[(\[]?(?:1|one|a)[)\]]?|(?:the )?(?:first|1st)(?: one| {NOUN})?|[(\[]?[1a][)\]]?)"
SECOND = rf"(?:{NUMBERED}[(\[]?(?:2|two|b)[)\]]?|(?:the )?(?:second|2nd)(?: one| {NOUN})?|[(\[]?[2b][)\]]?)"
TIE = r"(?:(?:a |it's a )?(?:tie|tied|draw)|neither(?: one)?(?: is better)?|both|equal|equally good)"
VALUES = [re.compile(value, re.IGNORECASE) for value in (TIE, FIRST, SECOND)]  # index = verdict
ORDERING = re.compile(rf"(?:{NOUN} )?([12ab]) ?([<>=])\2{{0,2}} ?(?:{NOUN} )?([12ab])", re.IGNORECASE)
HEADING = re.compile(r" ?[.:)(-]")
REASON = re.compile(r",? (?:because|since|as it|as the) | ?[,;:(-] ?", re.IGNORECASE)
UNDECIDED = re.compile(
    r"^\W*(?:\d|or|if|unless|when|means|hmm|wait|actually)|\b(?:maybe|perhaps|not sure|unsure|"
    r"or (?:[12ab]|both|neither|either|tie|response|the (?:first|second|other)))\b",
    re.IGNORECASE,
)

VIRTUE = "(?:helpful|harmless|concise|accurate|informative|relevant|complete|clear|honest)"
QUALIFIER = r"(?:(?:the|my|our|so|thus|therefore|overall|initial|first|final|revised),? ){0,4}"
LABEL = (
    rf"(?:verdict|winner|winning {NOUN}|(?:better|best|preferred|preferable|superior|more {VIRTUE})(?: {NOUN}| one)?|"
    r"preference|choice|pick|decision|judge?ment"
)
LABELLED = re.compile(rf"[#\-{{ ]{{0,8}}{QUALIFIER}({LABEL}|conclusion)) ?(is:?|[:=-]|$) ?(.*)", re.IGNORECASE)
# If a label of these has a value that cannot be read, no other statement may overrule it.
BINDING = re.compile("verdict|winner|decision|judg", re.IGNORECASE)
# "The answer is 2" may answer the prompt's own question, unless the reply ends with it. So may a box.
ANSWER = re.compile(r"[#\- ]{0,8}(?:the |my )?(?:final )?answer ?: ?(.*)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed ?\{(?:\\[a-z]{1,8} ?\{)?([^{}]{1,40})\}")
JSON_LABEL = re.compile(rf"{QUALIFIER}{LABEL}|(?:final )?answer)", re.IGNORECASE)
JSON_KEY = re.compile(r"""["'](\w{1,30})["'] ?: ?(["']?)([^"',}]*)\2 ?(?:[,}]|$)|["'](\w{1,30})["'] ?:""")
# A judge that reports a manipulation may quote it. Then only the end of the reply counts.
SWAYED = re.compile(r"\b(?:inject|manipulat|forg(?:ed|es|ing)\b|hijack|tamper)", re.IGNORECASE)
BRACKETS = re.compile(r"(?<!rating: )(?<!score: )\[\[([^\[\]]{1,20})\]\]", re.IGNORECASE)


def _json(text: str) -> Any:
    """Parse a JSON object into (key, value) pairs, repeated keys included, or a JSON string; None if it is neither."""
    try:
        return json.loads(text, strict=False, object_pairs_hook=list) if text.startswith(("{", '"')) else None
    except (ValueError, RecursionError):  # cut off, or not JSON
        return None


def _is_label(key: str) -> bool:
    return bool(JSON_LABEL.fullmatch(key.replace("_", " ")))


def _json_value(value: Any) -> int | None:
    if isinstance(value, str):
        return _stated(value)
    return value if type(value) is int and value in (1, 2) else None


def _value(text: str) -> int | None:
    """Read a text that is a verdict and nothing more."""
    text = text[:80].strip(" \"'!}").removesuffix(".").rstrip(" \"'")
    for verdict, value in enumerate(VALUES):
        if value.fullmatch(text):
            return verdict
    ordering = ORDERING.fullmatch(text)
    if ordering is None:
        return None
    slots = ["1a".find(slot.lower()) < 0 for slot in ordering.group(1, 3)]
    if slots[0] == slots[1]:
        return None
    return 0 if ordering[2] == "=" else 1 + slots[ordering[2] == "<"]


def _stated(text: str) -> int | None:
    """Read the verdict with which the text after a label begins, or at which it arrives."""
    text = BRACKETS.sub(r"\1", BOXED.sub(r"\1", text))
    if _value(text) is not None:
        return _value(text)
    compared = [*_comparisons([text], OVERALL)] or [*_comparisons([text], HELPFUL)]
    for verdict, value in enumerate(VALUES):
        head = value.match(text)
        reason = head and REASON.match(text, head.end())
        if reason:
            rest = text[reason.end() :]
            decided = not UNDECIDED.search(rest) and _value(rest) in (None, verdict)
            return _agreed([Claim(0, verdict), *compared]) if decided else None
    return _agreed(compared)


def _edge_lines(answer: str, n: int) -> Iterator[Claim]:
    """Find a first or last line that is nothing but a verdict. n: number of sentences.

    In longer replies "1." may begin a list, and "Response 1" a section, above all if other lines begin with "2".
    """
    lines = [line.strip("# ") for line in answer.split("\n")]
    for number, sentence in {0: 0, len(lines) - 1: n - 1}.items():
        line, verdict = lines[number], _value(lines[number])
        is_list = len(lines) > 1 and len(line) == 2 and line[1] in ".)"
        is_section = number == 0 and len(lines) > 1 and len(line) > 3 and verdict != 0
        if verdict is None or is_list or is_section:
            continue
        if all(_value(HEADING.split(other, maxsplit=1)[0]) in (None, verdict) for other in lines):
            yield Claim(sentence, verdict)


def _statements(sentences: list[str]) -> Iterator[Claim]:
    """Find labels, JSON keys, brackets and boxes that state a verdict."""
    only_last = any(SWAYED.search(sentence) for sentence in sentences)
    for index, sentence in enumerate(sentences):
        is_last = index == len(sentences) - 1
        if only_last and not is_last:
            continue
        label = LABELLED.match(sentence)
        if label:
            verdict = _stated(label[3] or ("" if is_last else sentences[index + 1]))
            if verdict is not None or (BINDING.search(label[1]) and label[3] and label[2] in ":="):
                yield Claim(index, verdict)
        for key in JSON_KEY.finditer(sentence):
            if _is_label(key[1] or key[4]):
                yield Claim(index, _value(key[3] or ""))
        marked = [match[1] for match in BRACKETS.finditer(sentence)]
        if is_last:
            marked += [match[1] for match in (ANSWER.match(sentence), BOXED.search(sentence)) if match]
        for text in marked:
            verdict = 0 if text == "C" else _stated(text)  # [[C]] is a tie in MT-bench
            if verdict is not None:
                yield Claim(index, verdict)


#### SENTENCES THAT COMPARE THE TWO RESPONSES (5)

# In a sentence, ① and ② stand for all names of the two responses. 1, A and the like alone are names only at the end of
# a phrase, or before a word that compares. A small "a" is a name only after a noun; elsewhere it is an article.
ENDS = r"(?=[.,;!)]*$|[,;] | (?:is|wins|beats|outperforms|over|to|than|because|since|as)\b)"
NAME = (
    rf"\b(?i:{NUMBERED})(?:[{{bare}}]|[(\[](?i:[{{bare}}])[)\]]|(?i:{{number}})|(?i:[{{bare}}]){ENDS})"
    r"(?:'s (?:response|answer|reply|output)\b)?(?!\w|%|/|[.,-]\d|'s)|"
    rf"\b(?i:(?:the )?(?:{{ordinal}}) (?:one|{NOUN}))\b(?!'s)|(?<![\w./-])[{{bare}}]{ENDS}"
)
NAMES = {
    "①": re.compile(NAME.format(bare="1A", number="one", ordinal="first|1st")),
    "②": re.compile(NAME.format(bare="2B", number="two", ordinal="second|2nd")),
}
PAIR = re.compile(rf"① and [②2]\b|② and [①1]\b|\b{NOUN}s (?:1 and 2|2 and 1|a and b|b and a)\b")

ADVERBS = (
    r"(?:(?:clear(?:ly)?|slightly|much|far|significantly|substantially|considerably|noticeably|marginally|somewhat|"
    r"a bit|a little|definitely|overall|generally|ultimately|therefore|thus|still|also|even|just|simply|by far|about|"
    r"roughly|nearly|almost|both|essentially|basically|strongly|personally|the|a),? ){0,3}"
)
FORMS = (
    "{won} (?:is|was|remains|seems|appears to be) {adverbs}{better}{noun}(?: (?:than|to|over) {lost})?",
    "(?:i|we) (?:find|found|consider) {won} (?:to be )?{adverbs}{better}(?: than {lost})?",
    "{lost} (?:is|was|seems|appears to be) {adverbs}{worse}{noun}(?: (?:than|to) {won})?",
    "{lost} (?:is not|isn't) (?:quite |nearly )?as {good} as {won}",
    "the {adverbs}{better}{noun}(?: here| overall| of the two)? (?:is|would be):? {adverbs}{won}",
    "the {worse}{noun} (?:is|would be):? {adverbs}{lost}",
    "{won} {adverbs}(?:wins|(?:outperforms|beats|surpasses) {lost})",
    "(?:i|we)(?:'d| would| will)? {adverbs}(?:prefer|choose|pick|select|favou?r|go with|vote for|recommend) "
    "{won}(?: (?:over|to|instead of|rather than) {lost})?",
    "(?:both|both {nouns}|they|the two|the (?:two )?{nouns})(?: are| were|'re) {adverbs}{equal}",
    "neither(?: of (?:them|the two)| ① nor ②| ② nor ①)?{noun} (?:is|was) {adverbs}{better}(?: than the other)?{noun}",
    "(?:it is|it's|this is|i(?: would|'d)? (?:call|consider|declare) (?:it|this)) a (?:tie|draw)",
    "there is no (?:clear )?(?:winner|preference)",
)
# What may follow a form: "better written", "better at small talk" and "better than nothing" must not match.
END = (
    r"(?=$|[.,;:!)]| -| (?:because|since|as (?:it|the|①|②)|due to|for (?:its|these|several|being|the following)|"
    r"overall|here|in my opinion|by far|of the two|to (?:this|the) (?:question|prompt)|"
    r"so|and|but|while|whereas|though|although)\b)"
)


def _grammar(better: str, worse: str, good: str, equal: str) -> list[re.Pattern]:
    """Compile FORMS for these words. The groups won and lost are ① or ②; in a tie both are None."""
    words = {"better": better, "worse": worse, "good": good, "equal": equal, "adverbs": ADVERBS}
    words |= {"noun": f"(?: one| choice| {NOUN})?", "nouns": f"{NOUN}s"}
    slots = {"won": "(?P<won>[①②])", "lost": f"(?:(?P<lost>[①②])|the other(?: one| {NOUN})?)"}
    return [re.compile(rf"(?<!\w)(?:{form.format(**words, **slots)}){END}") for form in FORMS]


OVERALL = _grammar(
    better="(?:better|best|superior|preferable|preferred|stronger|the winner|winner)",
    worse="(?:worse|inferior|weaker)",
    good="good",
    equal="(?:equally good|equally bad|equal|tied|equivalent|of equal quality|equally matched)",
)
HELPFUL = _grammar(
    better=rf"more (?:{VIRTUE}(?:,? and |, )){{0,3}}helpful(?:(?:,? and |, )(?:more )?{VIRTUE}){{0,3}}",
    worse="less helpful",
    good="helpful",
    equal=rf"equally helpful(?:(?:,? and |, ){VIRTUE}){{0,3}}",
)

SUMMARY = re.compile(
    r"\b(?:in (?:conclusion|summary|short|my opinion|my view|the end)|on (?:balance|the whole)|all in all|"
    r"all things considered|for (?:this reason|these reasons)|based on (?:this|the above)|as a result|"
    r"(?:of|between) the two|after careful consideration|after weighing both),? "
)
# What may come before a form: words that sum up, or a clause that concedes or concludes.
OPENING = re.compile(
    r"(?:^|^(?:(?:and|but) )?(?:although|though|even though|while|despite|since|because|given|considering)\b.*, |"
    r"; |\b(?:but|yet|so|and|thus|therefore|hence),? )"
    r"(?:(?:and|but|yet|however|so|then|thus|therefore|hence|overall|finally|ultimately|clearly|personally|"
    r"consequently|still|(?:which|this) means that|"
    r"(?:i (?:think|believe|find|feel)|i(?:'d| would) (?:say|argue))(?: that)?|"
    r"(?:overall|explanation|comparison|conclusion|reasoning|verdict|winner):),? ){0,4}$"
)
# What may not come after a form: "better, but I prefer the other".
RESERVED = re.compile(
    r"\b(?:however|but|yet|(?:al)?though|nevertheless|despite|that said|on the other hand)\b", re.IGNORECASE
)
RIVAL = re.compile(r"[①②]|\b(?:other|i|latter|former)\b")
COMPARED = re.compile(
    rf"{RESERVED.pattern}|\b(?:while|whereas|more|less|better|worse|\w+er than|"
    r"(?:short|long|clear|simpl|saf|brief|kind|friendli)e?r)\b",
    re.IGNORECASE,
)
# Words of a sentence that speaks of one aspect only, under a condition, or for somebody else.
DOUBTFUL = re.compile(
    r"\b(?:if|unless|whether|when|maybe|perhaps|possibly|might|may|could|arguably|depends|depending|in terms of|"
    r"in some|first glance|says?|said|kidding|or so|hard to|difficult to|or (?:①|②|both)|not sure|unsure)\b|\?$"
)
CAUSE = re.compile(r"\b(?:because|since|as|due to|for its)\b")
LENGTHS = range(6, 600)  # characters of a sentence that is trusted


def _comparisons(sentences: list[str], grammar: list[re.Pattern]) -> Iterator[Claim]:
    for index, sentence in enumerate(sentences):
        yield from (Claim(index, _winner(match)) for match in _matches(sentence, grammar))


def _overall(sentences: list[str]) -> list[Claim]:
    """Find which response is better; nothing if a later sentence begins with a reservation."""
    claims = [*_comparisons(sentences, OVERALL)]
    rest = sentences[claims[-1].sentence + 1 :] if claims else []
    return [] if any(RESERVED.match(sentence) for sentence in rest) else claims


def _helpful(sentences: list[str]) -> list[Claim]:
    """Find which response is more helpful; nothing if they differ otherwise, as in "more helpful, but less concise"."""
    claims = []
    for index, sentence in enumerate(sentences):
        matches = list(_matches(sentence, HELPFUL))
        rest = _with_names(sentence) if matches else sentence
        for match in matches:
            claims.append(Claim(index, _winner(match)))
            rest = CAUSE.split(rest.replace(match[0], ""))[0]
        if COMPARED.search(rest):
            return []
    return claims


def _matches(sentence: str, grammar: list[re.Pattern]) -> Iterator[re.Match]:
    if len(sentence) in LENGTHS:
        marked = _with_names(sentence)
        yield from (match for form in grammar for match in form.finditer(marked) if _is_meant(match))


def _with_names(sentence: str) -> str:
    """Write a sentence in lower case, with ① and ② for the names of the two responses."""
    sentence = sentence.replace('"', "")
    for mark, name in NAMES.items():
        sentence = name.sub(mark, sentence)
    return SUMMARY.sub("", PAIR.sub("both", sentence.lower()))


def _winner(match: re.Match) -> int | None:
    won, lost = (match.groupdict().get(slot) for slot in ("won", "lost"))
    if won == lost:
        return 0 if won is None else None
    return 1 if won == "①" or lost == "②" else 2


def _is_meant(match: re.Match) -> bool:
    """Return whether the sentence asserts the form, without doubt, condition or reservation."""
    sentence = match.string
    cause = CAUSE.search(sentence, match.end())
    if DOUBTFUL.search(sentence[: cause.start()] if cause else sentence):
        return False
    reservation = RESERVED.search(sentence, match.end())  # "better, but I prefer the other one"
    if reservation and (not cause or reservation.start() < cause.start() or RIVAL.search(sentence, reservation.end())):
        return False
    return OPENING.search(sentence[: match.start()]) is not None
