"""Train: python train.py loss=kto model=llama7b datasets=[shp,hh,oasst] exp_name=kto_llama7b

All keys are in config/config.yaml, config/loss/ and config/model/; `python train.py --help` prints them. The losses are
in trainers.py, the data in dataloaders.py, the loop in halos/trainer.py.
"""

import json
import os

from omegaconf import DictConfig

from halos.commands import hydra_main, importing
from halos.config import validate
from halos.files import finished


@hydra_main("config", "config")
def main(config: DictConfig) -> None:
    with importing():
        import dataloaders
        import trainers
        from halos import distributed, loading, resume, run_dir
        from halos.launch import joined, launch

    validate(config, trainers, dataloaders)
    with joined(), run_dir.locked(config) as lock:
        distributed.on_main(resume.check_same, config)
        loading.check_positions(config)
        loading.check_adapter(config)
        loading.check_load_from(config)
        launch(run, config, nproc_per_node=config.nproc_per_node, held=lock)


def run(config: DictConfig) -> None:
    """Train or evaluate, in each process of the run."""
    with importing():  # again, for processes that `launch` has started
        import dataloaders
        import trainers
        from halos import (
            adapters,
            checkpoint,
            components,
            distributed,
            loading,
            records,
            reference_cache,
            resume,
            run_dir,
        )
        from utils import rank0_print

    tokenizer = loading.load_tokenizer(config)

    #### DATA
    training = config.mode == "train"
    splits = ["train"] * training + ["test"]
    with distributed.first_on_each_node():
        loaders = {split: dataloaders.make_loader(config, tokenizer, split) for split in splits}
    counts = {split: dataloaders.describe(loader, split) for split, loader in loaders.items()}
    state_path = resume.newest_state(config)
    directory = run_dir.path_of(config) if state_path else run_dir.create(config)
    if distributed.is_main():
        with finished(os.path.join(directory, "data.json")) as unfinished, open(unfinished, "w") as file:
            json.dump(counts, file, indent=1)

    #### MODELS
    trainer_class = components.find(trainers, config.loss.trainer)
    needs_model = trainer_class.uses_reference_kl
    policy, reference, cache = reference_cache.load(config, tokenizer, list(loaders.values()), needs_model=needs_model)
    parameters = f"{type(policy.lm).__name__}, {policy.lm.num_parameters():,} parameters{adapters.describe(policy.lm)}"
    rank0_print(f"{parameters}; {policy.description}; {distributed.describe()}")

    #### TRAINING
    trainer = trainer_class(policy, reference, tokenizer, config, loaders.get("train"), loaders["test"], directory)
    trainer.reference_cache = cache
    if training:
        if state_path:
            trainer.load_state(state_path)
            done, total = trainer.state.examples, loaders["train"].total_examples
            rank0_print(f"resumed from {state_path}: {done} of {total} examples are done")
        for line in trainer.advice():
            rank0_print(line)
        trainer.train()
        rank0_print(f"saved to {os.path.join(directory, 'LATEST', checkpoint.POLICY)}")
    else:
        for name, value in trainer.evaluate().items():
            rank0_print(f"{name}: {value:.6g}")
        if distributed.is_main() and trainer.records:
            trainer.records.write(records.path_of(directory, step=0))


if __name__ == "__main__":
    from train import main  # so that `run` has a name in jobs of other machines, whose __main__ is another program

    main()
