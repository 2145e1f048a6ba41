"""Functions that run in the processes of tests/test_distributed.py; each is called once in every process."""

import os
import shutil
import time

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

import trainers
from halos import checkpoint, ches, distributed, loading, metrics, reference_cache, sampling, sharding, states, weights
from halos.models import PolicyModel
from halos.tokens import Encoder
from helpers import judged, make_config, random_examples
from small_runs import CPU, FEW, SMALL, batches_for, data_format, loader_for, make_trainer, state_of, tokenizer


def ragged_batches(loss: str) -> list:
    """Make four batches of 8 examples, and one of a single example, which leaves every rank but one without any.

    In the second batch the two longest examples are desirable, so that some of 3 or 4 ranks have no desirable response.
    """
    batches = [*batches_for(loss, 4), batches_for(loss, 1, n=2, seed=1)[0][:1]]
    if data_format(loss) == "unpaired":
        longest = sorted(range(8), key=lambda i: -batches[1][i].n_tokens)[:2]
        batches[1] = [judged(one, i in longest) for i, one in enumerate(batches[1])]
    return batches


SAVED = ("dpo", "ppo", "tied", "lora")  # cases whose checkpoints are looked at


def train(folder: str, cases: dict[str, str]) -> None:
    """Train once per case, {name: words}, with evaluations, and save the weights before and after in folder/name.pt.

    Losses beyond the few have three batches instead of five.
    """
    metrics.draw_curves = lambda *args: None  # drawing would take longer than everything else
    for name, words in cases.items():
        loss, *rest = words.split()
        batches = ragged_batches(loss)
        batches = batches if loss in FEW else [batches[1], *batches[3:]]
        trainer = make_trainer(os.path.join(folder, name), loss, *rest, batches=batches, eval_batches=batches[-2:])
        trainer.save = trainer.save if name in SAVED else lambda: None
        before = state_of(trainer)
        trainer.train()
        after, critic = state_of(trainer), trainer.policy.v_head
        critic = {} if critic is None else checkpoint.full_state(critic, torch.float32)
        scores = torch.stack(ches.scores(trainer.policy, random_examples(5), 40))
        if distributed.is_main():
            saved = {"before": before, "after": after, "critic": critic, "ches": scores}
            torch.save(saved, os.path.join(folder, f"{name}.pt"))


def load_architectures(folder: str, directories: dict[str, str]) -> None:
    """Fill sharded models from Hugging Face directories, and save their packed log-probs and gathered weights."""
    found = {}
    mesh = distributed.device_mesh("cpu")
    for name, directory in directories.items():
        lm = weights.empty_lm(AutoConfig.from_pretrained(directory), torch.float32, trust_remote_code=False)
        policy = PolicyModel(lm)
        sharding.prepare_policy(policy, torch.float32, mesh=mesh)
        opened = weights.find_safetensors(directory, lm)
        assert opened is not None, f"{name}: read through the main process"
        weights.fill([lm], opened, CPU)
        policy.use_packing(True)
        with torch.no_grad():
            logps = policy(policy.inputs(random_examples(4, (2, 1)))).logps
        found[name] = {"logps": logps, "state": checkpoint.full_state(lm, torch.float32)}
    if distributed.is_main():
        torch.save(found, os.path.join(folder, "architectures.pt"))


def load_checkpoints(folder: str, cache_dir: str, sources: dict[str, str]) -> None:
    """Load policy and reference from each `model.load_from`; save their gathered weights and each rank's share."""
    found = {}
    for name, words in sources.items():
        config = make_config(cache_dir, "loss=dpo", *SMALL, *words.split())
        policy, reference = loading.load_policy_and_reference(config, tokenizer(), CPU)
        shards = [p.to_local().numel() if sharding.is_sharded(policy) else p.numel() for p in policy.parameters()]
        found[name] = {
            "policy": checkpoint.full_state(policy.lm, torch.float32),
            "reference": checkpoint.full_state(reference.lm, torch.float32),
            "held": distributed.gather_objects(sum(shards)),
            "packs": policy.packs,
            "generation": policy.lm.generation_config.to_dict(),
        }
    if distributed.is_main():
        torch.save(found, os.path.join(folder, "checkpoints.pt"))


def sample_texts(folder: str) -> None:
    """Sample responses to 11 prompts of ragged lengths, two of them equal, in batches of 3.

    Then do it again with four of them given, as after an interruption: the other seven are recorded on all ranks.
    """
    lm = loading.load_lm(make_config(folder, "loss=sft", *SMALL, "seed=5"), torch.float32)
    prompts = [example.prompt for example in random_examples(10)]
    settings = {"max_length": 24, "batch_size": 3, "top_p": 0.95, "temperature": 1.0, "seed": 1}
    prompts = [*prompts, prompts[0]]
    texts = sampling.sample(lm, Encoder(tokenizer()), prompts, **settings)
    recorded: dict[int, str] = {}
    done = {i: texts[i] for i in (1, 2, 5, 10)}
    assert sampling.sample(lm, Encoder(tokenizer()), prompts, **settings, done=done, record=recorded.update) == texts
    assert recorded == {i: text for i, text in enumerate(texts) if i not in done}
    everyone = distributed.gather_objects(texts)
    assert all(others == texts for others in everyone)
    if distributed.is_main():
        torch.save(texts, os.path.join(folder, "texts.pt"))


def diverge(folder: str) -> None:
    """Train with a loss that is infinite on its second training batch, on every rank, because losses are global."""

    class Overflowing(trainers.SFTTrainer):
        def loss(self, *logps):
            losses, *rewards = super().loss(*logps)
            return losses * (float("inf") if self.policy.training and self.state.updates == 1 else 1.0), *rewards

    metrics.draw_curves = lambda *args: None
    trainer = make_trainer(folder, "sft")
    trainer.__class__ = Overflowing
    trainer.train()


def stop_early(folder: str) -> None:
    """Train on three batches, with a `should_stop` that is True on the last rank only, after the second update."""
    trainer = make_trainer(os.path.join(folder, "stopped"), "sft", "eval_every=800")
    is_last = distributed.rank() == distributed.world_size() - 1
    trainer.should_stop = lambda: is_last and trainer.state.updates == 2
    trainer.train()


RESUMED = ("keep_checkpoints=2", "optimizer=AdamW", "lr=0.001", "eval_every=1000")


def _resumable(folder: str, name: str, loss: str, *words: str):
    loader = loader_for(loss, 36, batch_size=8, n_epochs=2)
    batches = batches_for(loss, 1, seed=1)
    where = os.path.join(folder, loss, name)
    return make_trainer(where, loss, *RESUMED, *words, train_loader=loader, eval_batches=batches)


def resume_runs(folder: str, losses: tuple[str, ...]) -> None:
    """Train with each loss at one go, and in two parts, the first of two steps. Save the weights of each."""
    metrics.draw_curves = lambda *args: None
    checkpoint.save = lambda *args, **kwargs: None
    for loss in losses:
        whole = _resumable(folder, "whole", loss)
        save(state_of(whole), folder, loss, "start")
        whole.train()
        save(state_of(whole), folder, loss, "whole")
        first = _resumable(folder, "first", loss)
        first.should_stop = lambda trainer=first: trainer.state.examples >= 16
        first.train()
        go_on(folder, "several", loss)


def go_on(folder: str, name: str, loss: str) -> None:
    """Train from the state of the first part to the end, in a copy of its directory."""
    if distributed.is_main():
        shutil.copytree(os.path.join(folder, loss, "first"), os.path.join(folder, loss, name))
    distributed.barrier()
    trainer = _resumable(folder, name, loss, "resume=true")
    trainer.load_state(states.complete(trainer.run_dir)[0])
    trainer.train()
    save(state_of(trainer), folder, loss, name)


def save(state: dict, folder: str, loss: str, name: str) -> None:
    if distributed.is_main():
        torch.save(state, os.path.join(folder, f"{loss}-{name}.pt"))


def everything(folder: str, cases: dict[str, str], directories: dict[str, str], cache_dir: str, sources: dict) -> None:
    """Call the functions above one after the other, so that the processes start only once."""
    torch.set_num_threads(1)
    train(folder, cases)
    sample_texts(folder)
    stop_early(folder)
    if directories:
        load_architectures(folder, directories)
        load_checkpoints(folder, cache_dir, sources)


def fill_reference_cache(folder: str) -> None:
    """Start a run whose reference log-probs are not on disk yet, in small batches, and again when they are."""
    config = make_config(folder, "loss=dpo", *SMALL, "model.max_tokens_per_forward=60")
    for _ in range(2):
        loaders = [loader_for("dpo", 12, batch_size=4), loader_for("dpo", 4, seed=9, batch_size=4)]
        policy, reference, cache = reference_cache.load(config, tokenizer(), loaders)
        assert reference is None and len(cache.store) == 32 and sharding.is_sharded(policy)
        assert all(isinstance(parameter, DTensor) for parameter in policy.parameters())


def load_large(folder: str, words: str) -> None:
    """Load a policy while the test watches the memory of all processes: idle, loading, and loaded."""
    config = make_config(folder, *words.split())
    device = distributed.default_device()
    distributed.device_mesh("cpu")
    loading.load_lm(make_config(folder, "model=tiny"), torch.float32)  # imports count as idle memory
    report(folder, "idle")
    policy, _ = loading.load_policy_and_reference(config, tokenizer(), device)
    report(folder, "loaded")
    assert sharding.is_sharded(policy)


def report(folder: str, state: str) -> None:
    """Write this process's id to a file, and wait until the test has seen the ids of all processes."""
    with open(os.path.join(folder, f"{state}-{distributed.rank()}"), "w") as file:
        file.write(str(os.getpid()))
    while not os.path.exists(os.path.join(folder, f"{state}-seen")):
        time.sleep(0.01)
    distributed.barrier()
