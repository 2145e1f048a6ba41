"""Reference log-probs on disk: equal to live ones, computed once, shared, checked, and safe against what can happen."""

import os
import random
import threading
import tracemalloc

import numpy as np
import pytest
import torch

import distributed_workers as workers
from halos import loading, locks, logps_store, manifest, metrics, reference_cache, reference_key
from halos.errors import UserError
from halos.launch import launch
from halos.loader import DataLoader
from halos.logps_store import ADDRESS, LogpsStore, addresses, segments
from halos.tokens import Role
from helpers import example, make_config, random_examples
from small_runs import CPU, SMALL, loader_for, make_trainer, one_per_loader, tokenizer


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(metrics, "draw_curves", lambda *args: None)


@pytest.fixture
def passes(monkeypatch):
    """Count what is computed: `responses` in each forward pass over a batch, `loaded` whether reference models were."""
    counted = type("Counted", (), {"responses": [], "loaded": []})()
    forward, load = reference_cache.Forward, loading.load_policy_and_reference

    def counting_forward(model, examples, max_tokens):
        counted.responses.append(sum(len(one.responses) for one in examples))
        return forward(model, examples, max_tokens)

    def counting_load(*args, **kwargs):
        counted.loaded.append(kwargs.get("with_reference", True))
        return load(*args, **kwargs)

    monkeypatch.setattr(reference_cache, "Forward", counting_forward)
    monkeypatch.setattr(loading, "load_policy_and_reference", counting_load)
    monkeypatch.setattr(reference_cache, "LEAST_CHECKED", 0)
    monkeypatch.setattr(reference_cache, "CHECKED", 0)
    return counted


def loaders_for(loss: str, shuffle: int = 0, **settings) -> list[DataLoader]:
    """Return a loader of 12 rows' examples for training, and one of 4 for evaluation, in the order of a seed."""
    loaders = [loader_for(loss, 12, batch_size=4, **settings), loader_for(loss, 4, seed=9, batch_size=4, **settings)]
    for loader in loaders:
        loader.seed = shuffle
    return loaders


def started(folder, loss: str, *words: str, loaders=None, policy_pt: str | None = None):
    """Start as train.py does: the policy, the reference model, the cache."""
    config = make_config(folder, f"loss={loss}", *SMALL, *words)
    return reference_cache.load(config, tokenizer(), loaders or loaders_for(loss), policy_pt)


def store_of(folder) -> LogpsStore:
    (directory,) = (entry for entry in (folder / ".logps").iterdir() if entry.is_dir())
    return LogpsStore(str(directory), segments(str(directory)))


def close(actual, expected, tolerance=1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


#### CACHED IS LIVE


@pytest.mark.parametrize("packing", ["true", "false"], ids=["packed", "padded"])
@pytest.mark.parametrize("loss", one_per_loader())
def test_cached_is_live(tmp_path, loss, packing):
    """Losses and gradients agree to 1e-5, with a policy that has moved away from the reference model.

    A loss without a reference model has no cache.
    """
    trainer = make_trainer(tmp_path, loss, f"model.packing={packing}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.lm.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))

    def outcome():
        for batch in loaders_for(loss)[0]:
            yield trainer.forward_backward(batch).losses
        yield torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])
        trainer.policy.zero_grad()

    live = list(outcome())
    _, trainer.reference_model, trainer.reference_cache = started(tmp_path, loss, f"model.packing={packing}")
    assert trainer.reference_model is None
    assert (trainer.reference_cache is not None) == trainer.config.loss.use_reference_model
    cached = list(outcome())
    assert len(live) >= 4 and live[-1].norm() > 0.1
    for one, other in zip(cached, live, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_a_first_evaluation_reads_the_cache_too(tmp_path, passes):
    """Log-ratios start at 0, up to the rounding of batches that are composed in another way."""
    loaders = loaders_for("dpo")
    trainer = make_trainer(tmp_path, "dpo", train_loader=loaders[0])
    trainer.eval_loader = loaders[1]
    trainer.reference_model, trainer.reference_cache = None, started(tmp_path, "dpo")[2]
    assert trainer.evaluate()["loss/eval"] == pytest.approx(np.log(2), abs=1e-6)


def test_responses_in_segments_keep_their_trained_tokens_only(tmp_path):
    """Context inside a response is not trained on: another mask is another entry, with as many log-probs as tokens."""
    loaders = loaders_for("sft")
    ids = loaders[0].response_ids
    long = max(range(len(ids)), key=lambda i: len(ids[i]))
    ids[long] = np.where(np.arange(len(ids[long])) % 3 == 1, ~ids[long], ids[long])
    masked = loaders_for("dpo")
    masked[0].response_ids = ids
    _, _, cache = started(tmp_path, "dpo", loaders=masked)
    found = [one for batch in masked[0] for one in batch]
    assert any(mask is not None and not mask.all() for one in found for mask in one.masks)
    assert len(cache.logps(found)) == sum(n for one in found for n in one.n_targets)


#### COMPUTED ONCE


def test_another_loss_lr_seed_of_data_and_batch_size_compute_nothing(tmp_path, passes):
    """The second run never loads a reference model, and makes no forward pass before training."""
    started(tmp_path, "dpo")
    assert sum(passes.responses) == 32
    for loss in ("dpo", "cdpo", "kto", "ppo"):
        words = ("lr=1", "model.batch_size=2", "model.max_tokens_per_forward=50", "loss.beta=0.7" * (loss != "ppo"))
        _, reference, cache = started(tmp_path, loss, *filter(None, words), loaders=loaders_for(loss, shuffle=3))
        assert reference is None and len(cache.store) == 32
    assert sum(passes.responses) == 32 and set(passes.loaded) == {False}


def test_the_policy_computes_for_the_reference_unless_they_differ(tmp_path, passes):
    """The reference in another dtype, or a policy from a checkpoint, needs a reference model, once."""
    started(tmp_path, "dpo", "model.reference_dtype=bfloat16")
    started(tmp_path, "dpo", "model.reference_dtype=bfloat16")
    assert passes.loaded == [True, False]
    trainer = make_trainer(tmp_path, "dpo")
    trainer.save()
    policy_pt = os.path.join(trainer.run_dir, "LATEST", "policy.pt")
    passes.loaded.clear()
    for _ in range(2):
        assert started(tmp_path, "dpo", policy_pt=policy_pt)[1] is None
    assert passes.loaded == [True, False]


def test_mismatched_pairings_are_entries_of_their_own(tmp_path, passes):
    """Unrelated responses of all epochs are computed before training; with another shuffle, only the new pairings."""

    class Mismatched:
        def flatten(self, rng):
            rows = super().flatten(rng)
            return [row.with_unrelated(other) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]

    def loaders(shuffle):
        made = loaders_for("kto", shuffle)
        for loader in made:
            loader.__class__ = type("Loader", (Mismatched, type(loader)), {})
            loader.ordered = None
        made[0].n_epochs = 2
        return made

    _, _, cache = started(tmp_path, "kto", loaders=loaders(0))
    both_epochs = sum(passes.responses)
    examples = [one for loader in loaders(0) for batch in loader for one in batch]
    assert {role for one in examples for role in one.roles} == set(Role)
    assert len(cache.logps(examples)) == sum(n for one in examples for n in one.n_targets)
    passes.responses.clear()
    started(tmp_path, "kto", loaders=loaders(0))
    assert passes.responses == [] and both_epochs > 32 + 24
    started(tmp_path, "kto", loaders=loaders(1))
    assert 0 < sum(passes.responses) <= both_epochs - 32


@pytest.mark.parametrize(
    "words",
    [
        ("seed=2",),
        ("model.policy_dtype=bfloat16",),
        ("model.architecture.hidden_size=64",),
        ("++model.architecture.rms_norm_eps=1e-3",),
    ],
)
def test_another_model_or_dtype_has_other_entries(tmp_path, passes, words):
    started(tmp_path, "dpo")
    started(tmp_path, "dpo", *words)
    assert sum(passes.responses) == 64


def test_another_cut_or_prompt_has_other_entries(tmp_path, passes):
    """With a max_length that cuts some sequences, only those are computed again."""
    started(tmp_path, "dpo")
    cut = loaders_for("dpo", max_length=20, max_prompt_length=8)
    started(tmp_path, "dpo", loaders=cut)
    assert 32 < sum(passes.responses) < 64
    passes.responses.clear()
    templated = loaders_for("dpo")
    templated[1].prompt_ids[0] = np.array([5, *templated[1].prompt_ids[0]], np.int32)
    started(tmp_path, "dpo", loaders=templated)
    assert sum(passes.responses) == 2  # the pair of that prompt


def test_files_count_by_their_content(tmp_path, monkeypatch):
    """Files are read once: a copy or a touched file has the same key, and one with another content has not."""
    config = make_config(tmp_path, "loss=dpo", *SMALL, "model.load_from=a.pt")
    read = []
    hash_file = reference_key._hash
    monkeypatch.setattr(reference_key, "_hash", lambda file: read.append(file) or hash_file(file))
    (tmp_path / "a.pt").write_bytes(b"weights")
    (tmp_path / "b.pt").write_bytes(b"weights")
    key = reference_key.of_run(config, CPU)
    assert reference_key.of_run(config, CPU) == key and len(read) == 1
    os.utime(tmp_path / "a.pt")
    assert reference_key.of_run(config, CPU) == key and len(read) == 2
    config.model.load_from = "b.pt"
    assert reference_key.of_run(config, CPU) == key and len(read) == 3
    (tmp_path / "b.pt").write_bytes(b"Weights")
    assert reference_key.of_run(config, CPU) != key
    (tmp_path / ".logps" / "files.json").write_text("{")
    config.model.load_from = "a.pt"
    assert reference_key.of_run(config, CPU) == key


def test_a_cache_that_is_not_wanted(tmp_path, passes):
    _, reference, cache = started(tmp_path, "dpo", "cache_reference_logps=false")
    assert cache is None and reference is not None and not (tmp_path / ".logps").exists()


@pytest.mark.slow
def test_two_processes_share_with_one(tmp_path, passes):
    """Two ranks compute what one does, to 1e-5; one process after them computes nothing."""
    launch(workers.fill_reference_cache, str(tmp_path), nproc_per_node=2)
    _, _, shared = started(tmp_path, "dpo")
    assert passes.responses == [] and len(shared.store) == 32
    alone = started(tmp_path / "alone", "dpo")[2]
    batch = [one for batch in loaders_for("dpo")[0] for one in batch]
    close(shared.logps(batch), alone.logps(batch))


#### ORDER AND INTERRUPTIONS


def test_responses_of_a_prompt_stand_together(tmp_path, monkeypatch):
    """Ten single rows of two prompts become two examples of five responses, or more where a pack has no room."""
    rows = [example([1, 2, 3] if i % 2 else [4, 5], [6 + i, 7, 8]) for i in range(10)]
    responses = FakeResponses(rows)
    for limit, sizes in ((1000, [5, 5]), (9, [3, 2, 3, 2]), (1, [1] * 10)):
        filling = reference_cache.Pass(None, responses, limit)
        grouped = list(filling._grouped(reference_cache.Responses.by_prompt(responses, np.arange(10))))
        assert [len(one.responses) for one in grouped] == sizes
        assert limit < 9 or all(one.n_tokens <= limit for one in grouped)


class FakeResponses:
    """Responses of given examples, one each."""

    def __init__(self, examples):
        self.examples = examples

    def place(self, response):
        return type("Place", (), {"example": lambda place: self.examples[response]})()


def test_a_pass_that_is_killed_goes_on(tmp_path, passes, monkeypatch):
    """Only the rest is computed, in the same batches, so the log-probs are those of a pass to the end, bit by bit."""
    words = ("model.max_tokens_per_forward=20",)
    monkeypatch.setattr(reference_cache, "FLUSH_SECONDS", 0)
    monkeypatch.setattr(reference_cache, "PACKS", 2)
    batch = [one for batch in loaders_for("dpo")[0] for one in batch]
    expected = started(tmp_path / "whole", "dpo", *words)[2].logps(batch)
    assert len(passes.responses) > 6
    whole, forward = list(passes.responses), reference_cache.Forward
    passes.responses.clear()

    def killed(*args):
        if len(passes.responses) == 3:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(reference_cache, "Forward", killed)
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, "dpo", *words)
    monkeypatch.setattr(reference_cache, "Forward", forward)
    cache = started(tmp_path, "dpo", *words)[2]
    assert passes.responses == whole
    assert torch.equal(cache.logps(batch), expected)


def test_several_writers(tmp_path):
    """Four writers add overlapping entries while others read: each entry is found, and no half segment is seen."""
    logps = {i.to_bytes(16, "little"): np.full(i % 5 + 1, float(i), np.float32) for i in range(60)}
    directory = str(tmp_path / "store")
    os.makedirs(directory)

    def write(start):
        for i in range(start, start + 24, 8):
            own = [*logps.items()][i : i + 12]
            logps_store.add_segment(directory, b"".join(key for key, _ in own), [value for _, value in own])
            LogpsStore(directory, segments(directory))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 12, 24, 36)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(segments(directory)) == 12
    store = LogpsStore(directory, segments(directory))
    for entry, value in zip(store.find(np.frombuffer(b"".join(logps), ADDRESS)), logps.values(), strict=True):
        assert np.array_equal(store[entry], value)
    assert store.find(np.frombuffer(b"x" * 16, ADDRESS)) == [-1]


def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_stay(tmp_path):
    for name in ("dead", "living"):
        (tmp_path / f"{name}.unfinished").mkdir()
    with locks.take(str(tmp_path / "living")):
        assert segments(str(tmp_path)) == []
        assert (tmp_path / "living.unfinished").exists() and not (tmp_path / "dead.unfinished").exists()


#### DAMAGE


def test_a_flipped_bit_is_found_and_computed_again(tmp_path, passes, capsys):
    started(tmp_path, "dpo")
    before = store_of(tmp_path)
    values = [before[i].copy() for i in range(len(before))]
    path = before.logps[0].filename
    del before
    content = bytearray(open(path, "rb").read())
    content[len(content) // 2] ^= 1
    open(path, "wb").write(content)
    capsys.readouterr()
    started(tmp_path, "dpo")
    said = capsys.readouterr().out
    assert f"{path} is not what was written" in said and "32 computed" in said
    after = store_of(tmp_path)
    assert all(np.array_equal(after[i], value) for i, value in enumerate(values))


def test_a_wrong_value_is_an_error_that_names_the_entry(tmp_path, monkeypatch):
    """The checksum is right, the value is not: off by 0.01 nats in one token. Every entry is drawn here."""
    started(tmp_path, "dpo")
    store = store_of(tmp_path)
    path, wrong = store.logps[0].filename, store.logps[0].copy()
    wrong[7] += 0.01 * max(1, abs(wrong[7]))
    wrong.tofile(path)
    manifest.write(os.path.dirname(path))
    monkeypatch.setattr(reference_cache, "CHECKED", 1.0)
    with pytest.raises(UserError, match=r"log-prob of token \d+ of drawn/\d+/\d \(entry [0-9a-f]{32}\) .* remove .*"):
        started(tmp_path, "dpo")


def test_a_random_sample_is_checked(tmp_path, capsys, monkeypatch):
    """1 % of them, at least 4, others at every start."""
    started(tmp_path, "dpo")
    capsys.readouterr()
    drawn = []
    check = reference_cache.Pass.check
    monkeypatch.setattr(
        reference_cache.Pass,
        "check",
        lambda self, store, sample, tolerance: drawn.append(tuple(sample)) or check(self, store, sample, tolerance),
    )
    for _ in range(3):
        started(tmp_path, "dpo")
    assert "reference log-probs: 32 of 32 responses on disk, 4 of them checked" in capsys.readouterr().out
    assert [len(sample) for sample in drawn] == [4] * 3 and len(set(drawn)) > 1


def test_examples_from_elsewhere_are_an_error(tmp_path):
    cache = started(tmp_path, "dpo")[2]
    with pytest.raises(UserError, match="cache_reference_logps=false"):
        cache.logps(random_examples(1, seed=77))


#### ADDRESSES AND MEMORY


def test_addresses_know_prompt_response_and_mask():
    """Where the prompt ends counts, and so does each mask; a mask of all tokens is none."""
    whole, halves = np.ones(2, bool), np.array([True, False])
    base = example([1, 2], [3, 4])
    others = [example([1], [2, 3, 4]), example([1, 2, 3], [4]), example([1, 2], [3, 4, 0]), example([2, 1], [3, 4])]
    others.append(base._replace(trained=(halves,)))
    found = [next(addresses(one)) for one in (base, *others)]
    assert len(set(found)) == 6 and next(addresses(base._replace(trained=(whole,)))) == found[0]
    pair = example([1, 2], [9], [3, 4], chosen=(True, None))
    assert list(addresses(pair))[1] == found[0]


def test_memory_and_disk_per_entry(tmp_path):
    """In memory 28 bytes per entry, and no Python object; on disk 24 bytes per entry and 4 per token."""
    n, n_tokens = 20_000, 50
    draw = random.Random(0)
    name = logps_store.add_segment(str(tmp_path), draw.randbytes(16 * n), [np.zeros(n_tokens, np.float32)] * n)
    files = sum(entry.stat().st_size for entry in os.scandir(tmp_path / name))
    assert files / n == pytest.approx(24 + 4 * n_tokens, rel=0.01)
    tracemalloc.start()
    store = LogpsStore(str(tmp_path), [name])
    assert tracemalloc.get_traced_memory()[0] / n < 32
    tracemalloc.stop()
    assert len(store) == n and len(store[n - 1]) == n_tokens
