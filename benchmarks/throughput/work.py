"""The batches that all ways run, their lengths, and the FLOPs that they need at least."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import dataloaders
from benchmarks.workload import pairs_like
from halos import components, loading
from halos.config_keys import CONFIG_DIR
from halos.errors import UserError
from halos.examples import merge
from halos.packing import pack
from halos.tokens import Role, TokenizedExample

Batch = list[TokenizedExample]
POOL = 8  # times the rows that are needed: so many examples are tokenized, and rows drawn from them


def config_of(loss: str, cache_dir: str, *words: str) -> DictConfig:
    """Return the config of `python train.py` with the settings that all ways share."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return compose(
            "config",
            [
                f"loss={loss}",
                f"cache_dir='{cache_dir}'",
                "optimizer=AdamW",
                "+optimizer_kwargs.weight_decay=0",
                "lr=1e-6",
                "warmup_steps=0",
                "model.activation_checkpointing=false",
                *words,
            ],
        )


#### BATCHES


def write(batches: list[Batch], path: str) -> None:
    """Write token ids and roles, which is what a way reads."""
    rows = [
        [
            {"prompt": one.prompt.tolist(), "responses": [r.tolist() for r in one.responses], "roles": one.roles}
            for one in b
        ]
        for b in batches
    ]
    with open(path, "w") as file:
        json.dump(rows, file)


def read(path: str) -> list[Batch]:
    with open(path) as file:
        return [[_example(**one) for one in batch] for batch in json.load(file)]


def _example(prompt: list[int], responses: list[list[int]], roles: list[str]) -> TokenizedExample:
    ids = tuple(np.array(response, np.int32) for response in responses)
    return TokenizedExample(np.array(prompt, np.int32), ids, tuple(map(Role, roles)))


def synthetic(shape: str, loss: str, n_batches: int, batch_size: int, vocab_size: int) -> list[Batch]:
    pairs = pairs_like(shape, n_batches * batch_size, vocab_size)
    return batches_of(pairs if loss == "dpo" else halves(pairs), n_batches, batch_size)


def halves(pairs: list[TokenizedExample]) -> list[TokenizedExample]:
    """Return single responses, chosen and rejected in turn, the two of a pair half of the data apart."""
    lag = len(pairs) // 2
    lagged = pairs[lag:] + pairs[:lag]
    return [one for pair, other in zip(pairs, lagged, strict=True) for one in (pair.only([0]), other.only([1]))]


def real(
    loss: str, model: str, data: str, n_batches: int, batch_size: int, most_characters: int | None, cache_dir: str
) -> list[Batch]:
    """Return batches of rows that this project's own loader has made of real texts.

    data: a file, a folder or a hub dataset whose rows have a known form, or NAME=PATH with a NAME of config/dataset/
    most_characters: of a prompt with its longest response; longer examples are left out
    """
    name, _, path = data.rpartition("=")
    words = [f"datasets=[{name}]", f"dataset.{name}.source='{path}'"] if name else [f"datasets=['{path}']"]
    model_words = ["model=base_model", "model.name=benchmark", f"model.name_or_path='{model}'"]
    config = config_of(loss, cache_dir, *model_words, *words)
    examples = merge(dataloaders.read_datasets(config, "train"))
    if most_characters is not None:
        examples = [example for example in examples if characters(example) <= most_characters]
    random.Random(0).shuffle(examples)
    loader = components.find(dataloaders, config.loss.dataloader)(
        examples[: POOL * n_batches * batch_size],
        loading.load_tokenizer(config),
        batch_size=batch_size,
        max_length=config.model.max_length,
        max_prompt_length=config.model.max_prompt_length,
        cache_dir=cache_dir,
        description="benchmark",
    )
    rows = [example._replace(trained=()) for batch in loader for example in batch]  # all response tokens count
    return batches_of(rows, n_batches, batch_size)


def characters(example) -> int:
    prompt = example.prompt if isinstance(example.prompt, str) else "".join(turn["content"] for turn in example.prompt)
    return len(prompt) + max(map(text_length, example.generations))


def text_length(generation) -> int:
    return len(generation) if isinstance(generation, str) else sum(len(turn["content"]) for turn in generation)


def batches_of(rows: list[TokenizedExample], n_batches: int, batch_size: int) -> list[Batch]:
    if len(rows) < n_batches * batch_size:
        raise UserError(
            f"the data have {len(rows)} rows of the wanted length, but {n_batches} batches of {batch_size} are asked "
            "for; lower --steps or --batch_size, or raise --most_characters"
        )
    return [rows[i * batch_size : (i + 1) * batch_size] for i in range(n_batches)]


def warm_up(batch: Batch) -> Batch:
    """Return the batch cut to 8 tokens per text: everything is allocated and imported by a step of it."""
    return [one._replace(prompt=one.prompt[:8], responses=tuple(r[:8] for r in one.responses)) for one in batch]


def mismatched(batch: Batch) -> Batch:
    """Return the batch with the response of the row before (the last for the first) beside each row's own."""
    return [
        one._replace(
            responses=(*one.responses, other.responses[0]),
            roles=(*one.roles, Role.UNRELATED),
            scores=(),
            ids=(*one.ids, *other.ids[:1]),
        )
        for one, other in zip(batch, batch[-1:] + batch[:-1], strict=True)
    ]


#### SIZES


@dataclass(frozen=True)
class Sizes:
    """Counts of tokens of some batches, or of one.

    unique: tokens of a packed forward pass, without padding, equal prompts of a batch once
    targets: response tokens that are trained on
    unrelated: tokens of responses that are scored only
    real: tokens of all sequences, prompt and response, without padding
    padded: the same with the padding of a batch with one sequence per response
    """

    unique: int
    targets: int
    unrelated: int
    real: int
    padded: int

    @property
    def padding(self) -> float:
        """Share of the padded positions that hold padding."""
        return 1 - self.real / self.padded


def sizes_of(batch: Batch) -> Sizes:
    trained = [one.only([i for i, role in enumerate(one.roles) if role is not Role.UNRELATED]) for one in batch]
    unrelated = [
        len(response)
        for one in batch
        for response, role in zip(one.responses, one.roles, strict=True)
        if role is Role.UNRELATED
    ]
    lengths = [len(one.prompt) + len(response) for one in trained for response in one.responses]
    return Sizes(
        unique=pack(trained).input_ids.numel(),
        targets=sum(len(response) for one in trained for response in one.responses),
        unrelated=sum(unrelated),
        real=sum(lengths),
        padded=len(lengths) * max(lengths),
    )


def total(sizes: Iterable[Sizes]) -> Sizes:
    listed = list(sizes)
    return Sizes(*(sum(getattr(one, name) for one in listed) for name in Sizes.__dataclass_fields__))


def floor_flops(sizes: Sizes, body: int, head: int, is_live: bool) -> int:
    """FLOPs of the dense layers at least: 6 N_body T_unique + 6 V d T_response for the step.

    Per weight and token a forward pass takes 2 and a backward pass 4. An unrelated response takes a forward pass, and a
    live reference one for everything. Attention's own products are not counted.

    body, head: weights that every token, and every response token, is multiplied with
    """
    trained = body * sizes.unique + head * sizes.targets
    scored = (body + head) * sizes.unrelated
    return 6 * trained + 2 * scored + (2 * (trained + scored) if is_live else 0)


def lengths_text(batches: list[Batch]) -> str:
    """One line of the lengths of the data."""
    prompts = [len(one.prompt) for batch in batches for one in batch]
    responses = [len(response) for batch in batches for one in batch for response in one.responses]
    sizes = total(map(sizes_of, batches))

    def spread(lengths: list[int]) -> str:
        return f"{np.median(lengths):.0f} ({min(lengths)} to {max(lengths)})"

    return (
        f"{len(batches)} batches of {len(batches[0])}; tokens, median and range: prompts {spread(prompts)}, responses "
        f"{spread(responses)}; {sizes.unique:,} unique tokens, of them {sizes.targets:,} of responses; padded, "
        f"{sizes.padding:.0%} of the positions hold padding, and there are {sizes.padded / sizes.unique:.2f} positions "
        "for a unique token"
    )
