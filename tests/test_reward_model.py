"""The reward model: its loss, where it reads a score, its export, and its use as judge and in best-of-n sampling."""

import json
import math
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import dataloaders
import eval as eval_program
from comparing import compare, journal, kept, last_line, results
from halos import base, checkpoint, demo, loading, metrics, reward_model
from halos.engine import Batch, Forward
from halos.errors import UserError
from halos.models import PerToken
from halos.packing import pack, pad
from halos.reward_model import RewardHead, RewardModel
from halos.scoring import Scorer
from helpers import example, make_config, random_examples, tiny_lm
from losses.reward import RewardTrainer
from small_runs import CPU, SMALL, loader_for, make_trainer, tokenizer

close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


#### THE LOSS


def outcome_of(values: list[float], scores: tuple[float, ...] = (), **hyper):
    """The outcome of one pair of two tokens and one token, whose scores are `values`; and the leaf."""
    leaf = torch.tensor(values, requires_grad=True)
    pair = example([5], [6, 7], [8])._replace(scores=scores)
    stub = SimpleNamespace(config=SimpleNamespace(loss=SimpleNamespace(**({"margin": 0.0, "centering": 0.0} | hyper))))
    return RewardTrainer.batch_loss(stub, Batch([pair], PerToken(torch.empty(0), leaf, None), None)), leaf


def test_the_loss_of_a_pair():
    """The last tokens have the scores 2 and 1: -log sigmoid(1) = 0.3133, with the gradient -+(1 - sigmoid(1))."""
    outcome, leaf = outcome_of([9.0, 2.0, 1.0])
    close(outcome.losses, torch.tensor([0.3132617]))
    assert (outcome.chosen_rewards.item(), outcome.rejected_rewards.item()) == (2.0, 1.0)
    assert not len(outcome.chosen_logps) and not len(outcome.rejected_logps)
    outcome.losses.sum().backward()
    close(leaf.grad, torch.tensor([0.0, -0.2689414, 0.2689414]))


def test_margin_and_centering():
    """With scores 3 and 1 in the data and margin 0.5, 1 is asked for: -log sigmoid(0) = ln 2; without scores nothing.

    Centering 0.1 adds 0.1 * (2 + 1)^2, whose gradient is 0.6 for both.
    """
    margin, _ = outcome_of([9.0, 2.0, 1.0], scores=(3.0, 1.0), margin=0.5)
    close(margin.losses, torch.tensor([math.log(2)]))
    without, _ = outcome_of([9.0, 2.0, 1.0], margin=0.5)
    close(without.losses, torch.tensor([0.3132617]))
    centered, leaf = outcome_of([9.0, 2.0, 1.0], centering=0.1)
    close(centered.losses, torch.tensor([1.2132617]))
    centered.losses.sum().backward()
    close(leaf.grad, torch.tensor([0.0, 0.6 - 0.2689414, 0.6 + 0.2689414]))


#### WHERE THE SCORE IS READ


# Shared prompts, equal prompts of two examples, a response of one token, one whose last turn is not trained on.
PAD = 0  # ends no response here
EXAMPLES = [
    *random_examples(3, (2, 3)),
    example([5, 6, 7], [11], [12, 13, 14]),
    example([5, 6, 7], [15, 16, 17, 18])._replace(trained=(np.array([True, True, False, False]),)),
]


def test_the_state_of_each_token_is_read_at_the_token():
    """Prompt 5 6, responses 7 8 and 9: the pack is 5 6 7 8 9, the rows are 5 6 7 8 and 5 6 9 with padding.

    For log-probs, a token is read one place earlier, and the last tokens are no inputs.
    """
    pair = [example([5, 6], [7, 8], [9])]
    packed = pack(pair, at_targets=True)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9]] and packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.layout.segments == [(0, 4, 0, 0), (4, 5, 0, 2)]
    assert packed.target_positions.tolist() == [2, 3, 4] and packed.targets.tolist() == [7, 8, 9]
    padded = pad(pair, PAD, at_targets=True)
    assert padded.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, PAD]]
    assert padded.target_positions.tolist() == [2, 3, 6]
    assert pack(pair).input_ids.tolist() == [[5, 6, 7]] and pack(pair).target_positions.tolist() == [1, 2, 1]


def tiny_reward_model(architecture: str) -> RewardModel:
    lm = tiny_lm(architecture)
    torch.manual_seed(0)
    return RewardModel(lm, v_head=RewardHead(32))


def scores_of(model: RewardModel, packs: bool, max_tokens: int = 1000) -> torch.Tensor:
    model.use_packing(packs)
    batch = Batch(EXAMPLES, Forward(model, EXAMPLES, max_tokens).tokens, None)
    return batch.at_last_token(batch.policy.values)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2", "qwen2", "gemma2"])
def test_packed_padded_and_exported_scores_are_equal(tmp_path, architecture):
    """All are the scores that transformers' classifier reads at the last token that is not padding."""
    model = tiny_reward_model(architecture)
    packed = scores_of(model, packs=True).detach()
    close(scores_of(model, packs=False), packed)
    close(scores_of(model, packs=True, max_tokens=12), packed)

    classifier = reward_model.classifier(model.lm.config, PAD)
    state = checkpoint.full_state(model.lm, torch.float32) | model.v_head.state_dict()
    state = {name: state[name] for name in classifier.state_dict()}
    checkpoint.export(tmp_path, classifier, state, tokenizer(), torch.float32)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    sequences = [
        [*one.prompt, *(response if mask is None else response[mask])]
        for one in EXAMPLES
        for response, mask in zip(one.responses, one.masks, strict=True)
    ]
    width = max(map(len, sequences))
    input_ids = torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in sequences])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    with torch.no_grad():
        theirs = opened(input_ids, attention_mask=attention_mask).logits[:, 0]
    assert len(packed) == 10 and packed.std() > 0.1
    close(packed, theirs)


def test_the_gradient_reaches_the_body_and_not_the_unused_head():
    model = tiny_reward_model("llama")
    model.use_packing(True)
    model(model.inputs(EXAMPLES)).values.sum().backward()
    assert model.lm.model.layers[0].self_attn.q_proj.weight.grad.norm() > 1e-3
    assert model.lm.lm_head.weight.grad is None and not model.lm.lm_head.weight.requires_grad
    tied = RewardModel(tiny_lm("llama", tie_word_embeddings=True), v_head=RewardHead(32))
    assert tied.lm.lm_head.weight.requires_grad  # it is the table of embeddings


def test_an_architecture_without_a_classifier_is_refused(tmp_path):
    words = ("model.architecture.model_type=cohere", "++model.architecture.num_key_value_heads=2")
    with pytest.raises(UserError, match="no sequence classifier with a linear score for cohere"):
        loading.check_load_from(make_config(tmp_path, "loss=reward", *SMALL, *words))


@pytest.mark.parametrize(
    ("special", "vocabulary", "found"),
    [
        ({"pad": 7, "unk": None, "bos": 1}, {}, 7),
        ({"pad": 2, "unk": 3, "bos": 1}, {}, 3),  # the pad token is EOS: transformers would read the token before it
        ({"pad": 2, "unk": None, "bos": 1}, {}, 1),
        ({"pad": 2, "unk": 2, "bos": 2}, {5: "<|padding|>"}, 5),  # GPT-NeoX
        ({"pad": 2, "unk": 2, "bos": 2}, {"\u0100": 188}, 188),  # GPT-2: the token of byte 0
        ({"pad": 2, "unk": 2, "bos": 2}, {}, None),
    ],
)
def test_the_pad_token_ends_no_response(special, vocabulary, found):
    fake = SimpleNamespace(
        **{f"{name}_token_id": token for name, token in special.items()},
        eos_token_id=2,
        chat_template=None,
        added_tokens_decoder={
            id: SimpleNamespace(content=text, special=True) for id, text in vocabulary.items() if isinstance(id, int)
        },
        get_vocab=lambda: vocabulary,
    )
    if found is None:
        with pytest.raises(UserError, match="no token to pad with"):
            reward_model.pad_token_id(fake)
    else:
        assert reward_model.pad_token_id(fake) == found


#### A RUN, AND WHO USES IT


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directories of a reward run and of an SFT run, each of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    draw, metrics.draw_curves = metrics.draw_curves, lambda *args: None
    for loss in ("reward", "sft"):
        words = ("lr=0.1", "model.max_length=28", "model.max_prompt_length=20")
        make_trainer(folder / loss, loss, *words, train_loader=loader_for(loss, 16, batch_size=8)).train()
    metrics.draw_curves = draw
    return folder / "reward" / "run", folder / "sft" / "run"


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(demo, "N_PROMPTS", {"train": 30, "test": 30})


def test_scores_of_texts_are_those_of_training(runs):
    """The same texts through the loader and the trained policy, and through `Scorer`: same cuts, and same scores."""
    directory, _ = runs
    config = base.OmegaConf.load(directory / "config.yaml")
    words = base.load_tokenizer(config)
    loader = dataloaders.make_loader(config, words, "test")
    policy, _ = loading.load_policy_and_reference(config, words, CPU, str(directory / "LATEST" / "policy.pt"))
    batch = [one for part in loader for one in part]
    with torch.no_grad():
        seen = Batch(batch, Forward(policy, batch, 1000).tokens, None)
    examples = {one.id: one for one in dataloaders.merge(dataloaders.read_datasets(config, "test"))}
    names = [name.rpartition("/") for name in seen.ids]
    conversations = [(examples[one].prompt, examples[one].generations[int(index)]) for one, _, index in names]
    scorer = Scorer(str(directory), "--reward_model=")
    scores = torch.tensor(scorer.scores(conversations))
    close(scores, seen.at_last_token(seen.policy.values))
    assert scores.std() > 0.01 and min(scorer.truncated[what] for what in ("prompts", "responses")) > 0
    assert "responses cut to 28 tokens" in scorer.describe()
    assert scorer.scores([]) == []


def test_transformers_gives_the_scores_of_a_rendered_conversation(runs):
    """The prompt, the response and the end of turn as one text, padded by the export's own tokenizer."""
    directory, _ = runs
    scorer = Scorer(str(directory / "LATEST"), "")
    opened = AutoModelForSequenceClassification.from_pretrained(directory / "LATEST")
    prompt = "\n\nHuman: Sort: KAMI\n\nAssistant:"
    responses = [" AIKM", " The answer is A.", ""]
    rows = [prompt + response + scorer.tokenizer.eos_token for response in responses]
    with torch.no_grad():
        theirs = opened(**scorer.tokenizer(rows, padding=True, return_tensors="pt")).logits[:, 0]
    close(torch.tensor(scorer.scores([(prompt, response) for response in responses])), theirs)
    messages = [{"role": "user", "content": "Sort: KAMI"}]
    close(torch.tensor(scorer.scores([(messages, "AIKM")])), theirs[:1])


def test_a_reward_model_is_a_judge(runs, tmp_path):
    """The higher score wins. A second command asks nothing, and another model, under the same name, judges anew."""
    directory = tmp_path / "model"
    shutil.copytree(runs[0] / "LATEST", directory)
    messages = [{"role": "user", "content": "Sort: KAMI"}]
    rows = [{"prompt": "", "messages": messages, "chosen": "AIKM", "policy": "The answer is KAMI.", "sample": 0}]
    rows += [{"prompt": f"\n\nHuman: {n}\n\nAssistant:", "chosen": f" {n}", "policy": f" {n + 5}."} for n in range(9)]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    scorer = Scorer(str(directory), "")
    pairs = [
        scorer.scores([(row.get("messages") or row["prompt"], row[key]) for key in ("policy", "chosen")])
        for row in rows
    ]
    for _ in range(2):
        done = compare(tmp_path, "--judge", f"reward:{directory}")
        assert done.returncode == 0, done.stderr
    (first, again) = results(tmp_path)
    assert first["wins"] == again["wins"] == sum(one > other for one, other in pairs)
    replies = kept(journal(tmp_path), "got")
    assert len(replies) == len(rows)
    close(torch.tensor(sorted(json.loads(r["text"]) for r in replies)), torch.tensor(sorted(pairs)), rtol=1e-4)
    (directory / "manifest.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert compare(tmp_path, "--judge", f"reward:{directory}").returncode == 0
    assert len(kept(journal(tmp_path), "got")) == 2 * len(rows)


@pytest.mark.parametrize(
    ("directory", "problem"),
    [("none", "no reward model is there"), ("sft", "LlamaForCausalLM with 2 labels is no reward model")],
)
def test_a_judge_that_is_no_reward_model(runs, tmp_path, directory, problem):
    where = runs[1] if directory == "sft" else tmp_path / directory
    (tmp_path / "samples.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "policy": "c"}]))
    done = compare(tmp_path, "--judge", f"reward:{where}")
    assert done.returncode == 2 and last_line(done).startswith(f"error: --judge reward:{where}: {problem}")


def evaluated(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    eval_program.main()


def test_the_best_of_several_samples(runs, tmp_path, monkeypatch, capsys):
    """The kept response is the one of `--n_per_prompt` with the highest score. All scores are in the row."""
    reward, sft = runs
    common = ("-c", sft / "config.yaml", "-n", 5, "-u", "false", f"samples_dir={tmp_path}", "model.max_length=64")
    evaluated(monkeypatch, *common, "--n_per_prompt", 3)
    evaluated(monkeypatch, *common, "--best_of", 3, "--reward_model", reward)
    everything = json.loads((tmp_path / "run.json").read_text())
    best = json.loads((tmp_path / "run_best3.json").read_text())
    assert len(everything) == 15 and len(best) == 5 and "sample" not in best[0]
    scorer = Scorer(str(reward), "")
    for number, row in enumerate(best):
        texts = [one["policy"] for one in everything[3 * number : 3 * number + 3]]
        scores = scorer.scores([(row["messages"], text) for text in texts])
        assert row["policy"] == texts[int(np.argmax(scores))]
        assert row["scores"] == pytest.approx(scores, rel=1e-4, abs=1e-5)
    assert any(row["policy"] != everything[3 * number]["policy"] for number, row in enumerate(best))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--best_of", "2"), "--best_of is given without --reward_model DIR"),
        (("--reward_model", "x"), "--reward_model is given without --best_of N"),
        (("--best_of", "2", "--reward_model", "x", "--n_per_prompt", "2"), "one response is kept"),
        (("--best_of", "2", "--reward_model", "x"), "--reward_model=x: no reward model is there"),
        (("--best_of", "0", "--reward_model", "x"), "--best_of 0 is not a number from 1"),
    ],
)
def test_flags_that_do_not_fit(runs, monkeypatch, capsys, words, problem):
    with pytest.raises(SystemExit) as stop:
        evaluated(monkeypatch, "-c", runs[1] / "config.yaml", *words)
    assert stop.value.code == 2 and problem in capsys.readouterr().err


def test_nothing_is_sampled_from_a_reward_model(runs, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluated(monkeypatch, "-c", runs[0] / "config.yaml")
    assert stop.value.code == 2 and "is a reward model, which scores responses" in capsys.readouterr().err


def test_a_reward_run_goes_on_from_its_head(runs):
    """A run that starts from a reward model has its head, not a new one."""
    directory, _ = runs
    config = make_config(directory.parent, "loss=reward", *SMALL, "model.load_from=run/LATEST/policy.pt")
    head = loading.load_value_head(config, base.meta_lm(config))
    stored = checkpoint.load_state(str(directory / "LATEST" / "v_head.pt"))
    assert torch.equal(head.score.weight, stored["score.weight"])
