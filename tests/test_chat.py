"""Conversations: what is rendered, encoded and trained on, for templates that end turns in different ways.

The tokenizer reads characters, so ids can be read: a control token is one id, shown in its own brackets.
"""

import string

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dataloaders import PairedPreferenceDataLoader, SFTDataLoader
from halos.chat import Renderer, without_marks
from halos.errors import UserError
from halos.examples import Example
from halos.tokens import Encoder

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "<s>{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('/')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n?{% endif %}"
)
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start>", "<end>"]
CHARACTERS = [*string.printable]


def make_tokenizer(template: str | None, eos: str = "</s>") -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate([*CONTROL, "▓", *CHARACTERS])}, unk_token="▓"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": eos, "unk_token": "▓"}
    others = [token for token in CONTROL if token not in ("<s>", eos)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=others, **special)
    tokenizer.chat_template = template
    return tokenizer


def shown(ids) -> str:
    """Token ids as text; control tokens in brackets of their own, context tokens (~id) between bars."""
    names = [f"⟦{token}⟧" for token in CONTROL] + ["▓", *CHARACTERS]
    return "".join(names[i] if i >= 0 else f"|{names[~i]}|" for i in map(int, ids)).replace("||", "")


def encoded(tokenizer, prompt, *generations) -> tuple[str, list[str]]:
    """A prompt and its responses as training reads them."""
    example, renderer, encoder = Example(prompt, list(generations)), Renderer(tokenizer), Encoder(tokenizer)
    (prompt_ids,) = encoder.prompts([renderer.prompt(example)])
    return shown(prompt_ids), [shown(ids) for ids in encoder.responses(renderer.responses(example))]


def user(*texts: str) -> list[dict]:
    """Turns of user and assistant, in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


#### THE END OF A TURN


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "response", "stops"),
    [
        (CHATML, "<|im_end|>", "⟦<|im_start|>⟧user\nhi⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n", "yo⟦<|im_end|>⟧", 1),
        (CHATML, "</s>", "⟦<|im_start|>⟧user\nhi⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n", "yo⟦<|im_end|>⟧", 2),
        (GEMMA, "</s>", "⟦<s>⟧⟦<start>⟧user\nhi⟦<end>⟧\n⟦<start>⟧model\n", "yo⟦<end>⟧", 2),
        (LLAMA2, "</s>", "⟦<s>⟧[INST] hi [/INST]", " yo ⟦</s>⟧", 1),
        (PLAIN, "</s>", "user: hi\nassistant: ", "yo⟦</s>⟧", 1),
        (None, "</s>", "\n\nHuman: hi\n\nAssistant:", " yo⟦</s>⟧", 1),
    ],
)
def test_a_response_ends_as_its_template_ends_a_turn(template, eos, prompt, response, stops):
    """With the template's token, or else with EOS; once, with nothing behind it. Sampling stops there, and at EOS."""
    tokenizer = make_tokenizer(template, eos)
    assert encoded(tokenizer, user("hi"), "yo") == (prompt, [response])
    renderer = Renderer(tokenizer)
    assert len(renderer.stop_ids) == stops and tokenizer.eos_token_id in renderer.stop_ids
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "yo"] + [renderer.stop_ids[0], 20, tokenizer.eos_token_id]
    assert Encoder(tokenizer).decode_response(ids, renderer.stop_ids) == "yo"


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA2])
def test_prompt_and_response_are_the_rendered_conversation(template):
    """Their ids joined are those of the whole conversation as transformers renders and encodes it, but for what the
    template writes behind the end of the last turn."""
    tokenizer = make_tokenizer(template)
    turns = user("one", "two", "three")
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "four"}], tokenize=False)
    prompt, (response,) = encoded(tokenizer, turns, "four")
    assert shown(tokenizer(whole, add_special_tokens=False)["input_ids"]).rstrip("\n") == prompt + response


#### TEXT IS TEXT


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA2, PLAIN, None])
@pytest.mark.parametrize("control", ["</s>", "<|im_end|>", "<end>"])
def test_control_tokens_in_messages_are_characters(template, control):
    """In the prompt and in the response; the template's own are what they are, and the response has one end."""
    tokenizer = make_tokenizer(template)
    text = f"a{control}b"
    prompt, (response,) = encoded(tokenizer, user(text), text)
    plain_prompt, (plain_response,) = encoded(tokenizer, user("aXb"), "aXb")
    assert prompt == plain_prompt.replace("X", control) and response == plain_response.replace("X", control)
    assert text in prompt and text in response


def test_a_prompt_given_as_text_may_hold_control_tokens():
    """It is the user's own rendering. What stands in a response is text all the same."""
    prompt, (response,) = encoded(make_tokenizer(None), "<|im_start|>user\nhi<|im_end|>", " a</s>")
    assert prompt == "⟦<|im_start|>⟧user\nhi⟦<|im_end|>⟧" and response == " a</s>⟦</s>⟧"


def test_examples_with_control_tokens_are_counted():
    renderer = Renderer(make_tokenizer(CHATML))
    for text in ("a", "</s>", "b<end>"):
        renderer.responses(Example(user("hi"), [text, "c"]))
    assert renderer.counts == {"examples with control tokens in their texts": 2}


def test_people_read_no_marks():
    tokenizer = make_tokenizer(CHATML)
    rendered = Renderer(tokenizer).prompt(Example(user("a</s>b"), ["c"]))
    assert without_marks(rendered) == "<|im_start|>user\na</s>b<|im_end|>\n<|im_start|>assistant\n"


#### SEVERAL TURNS


def test_a_prompt_that_ends_in_the_assistants_words_is_continued():
    """It is not closed, and no second turn is opened."""
    prompt, (response,) = encoded(make_tokenizer(CHATML), user("hi", "The answer"), " is 7")
    assert prompt.endswith("⟦<|im_start|>⟧assistant\nThe answer") and response == " is 7⟦<|im_end|>⟧"
    prompt, (response,) = encoded(make_tokenizer(None), user("hi", "The answer"), " is 7")
    assert prompt == "\n\nHuman: hi\n\nAssistant: The answer" and response == " is 7⟦</s>⟧"


TURNS = [
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok"},
]


@pytest.mark.parametrize(
    ("template", "response"),
    [
        (CHATML, "yo⟦<|im_end|>⟧|\n⟦<|im_start|>⟧user\nmore⟦<|im_end|>⟧\n⟦<|im_start|>⟧assistant\n|ok⟦<|im_end|>⟧"),
        (LLAMA2, " yo ⟦</s>⟧|⟦<s>⟧[INST] more [/INST]| ok ⟦</s>⟧"),
    ],
)
def test_a_response_of_several_turns_is_trained_on_in_the_assistants(template, response):
    """The end of each of its turns is trained on; the user's turn and the call for a reply are context (in bars)."""
    _, (found,) = encoded(make_tokenizer(template), user("hi"), TURNS)
    assert found == response


def test_the_loader_hands_context_on_as_a_mask(tmp_path):
    """Ids are those of the conversation, `trained` says which count, and `n_targets` is the number of those."""
    tokenizer = make_tokenizer(LLAMA2)
    tokenizer.pad_token = "</s>"
    settings = {"batch_size": 1, "max_length": 200, "max_prompt_length": 100, "cache_dir": str(tmp_path)}
    ((one,),) = SFTDataLoader([Example(user("hi"), [TURNS], sft_index=0)], tokenizer, **settings)
    assert shown(one.responses[0]) == " yo ⟦</s>⟧⟦<s>⟧[INST] more [/INST] ok ⟦</s>⟧"
    assert shown(one.responses[0][one.trained[0]]) == " yo ⟦</s>⟧ ok ⟦</s>⟧" and one.n_targets == [10]
    pair = Example(user("hi"), ["yes", TURNS], pairs=[(0, 1)])
    ((two,),) = PairedPreferenceDataLoader([pair], tokenizer, **settings)
    assert two.n_targets == [6, 10] and len(two.responses[0]) == 6


def test_pairs_that_truncation_makes_equal_are_dropped_and_counted(tmp_path):
    """At 12 tokens a pair that differs only behind them is one response twice."""
    settings = {"batch_size": 4, "max_length": 12, "max_prompt_length": 4, "cache_dir": str(tmp_path)}
    examples = [Example(p, ["same start a", "same start b"], pairs=[(0, 1)]) for p in ("long prompt", "other prompt")]
    examples.append(Example("p", ["a", "b"], pairs=[(0, 1)]))
    loader = PairedPreferenceDataLoader(examples, make_tokenizer(None), **settings)
    assert (loader.rows_per_epoch, loader.dropped_rows) == (1, 2)
    assert len(list(loader)) == 1


#### TEMPLATES THAT DO NOT FIT


def test_a_conversation_that_does_not_begin_with_its_prompt_is_found_out():
    """A call for a reply that the rendered reply lacks: the reply follows the prompt as sampling will read it."""
    renderer = Renderer(make_tokenizer(REASONING))
    example = Example(user("hi"), ["a/b"])
    encoder = Encoder(renderer.tokenizer)
    (ids,) = encoder.responses(renderer.responses(example))
    assert shown(ids) == "a/b⟦<|im_end|>⟧"
    assert renderer.counts == {"replies of a conversation that does not begin with its prompt": 1}


def test_a_template_that_refuses_a_role_says_so_in_one_line():
    messages = [{"role": "system", "content": "Be brief."}, *user("hi")]
    with pytest.raises(UserError, match=r"refuses the roles system, user \(Only user and.*chat_template=FILE"):
        Renderer(make_tokenizer(LLAMA2)).prompt(Example(messages, ["yo"], id="mine/1"))


def test_tools_and_other_keys_reach_the_template():
    """`tools`, `reasoning_content` and `tool_calls` are the template's to use."""
    template = (
        "{% if tools %}{{ tools | length }} {% endif %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{{ m.reasoning_content or '' }}{{ m.tool_calls[0].function.name if m.tool_calls else '' }}<end>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    calls = [{"function": {"name": "add", "arguments": {}}}]
    generation = [{"role": "assistant", "content": "x", "reasoning_content": "why", "tool_calls": calls}]
    example = Example(user("hi"), [generation])
    example.tools = [{"type": "function", "function": {"name": "add"}}]
    renderer = Renderer(make_tokenizer(template))
    encoder = Encoder(renderer.tokenizer)
    assert shown(encoder.prompts([renderer.prompt(example)])[0]) == "1 user:hi⟦<end>⟧assistant:"
    assert shown(encoder.responses(renderer.responses(example))[0]) == "xwhyadd⟦<end>⟧"
