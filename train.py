"""Train: python train.py loss=kto model=llama7b datasets=[shp,hh,oasst] exp_name=kto_llama7b

Every key is in config/config.yaml, config/loss/ and config/model/; `python train.py --help` prints them. What a loss
is, and the loop, are in trainers.py; the data is in dataloaders.py.
"""

import json
import os

from omegaconf import DictConfig

from halos.commands import hydra_main
from halos.config import validate


@hydra_main("config", "config")
def main(config: DictConfig) -> None:
    import dataloaders
    import trainers

    validate(config, trainers, dataloaders)
    from halos import checkpoint, models
    from halos.distributed import default_device
    from utils import rank0_print

    checkpoint.refuse_existing(config)
    models.check_load_from(config)
    tokenizer = models.load_tokenizer(config)

    #### DATA
    training = config.mode == "train"
    loaders = {split: dataloaders.make_loader(config, tokenizer, split) for split in ["train"] * training + ["test"]}
    counts = {split: dataloaders.describe(loader, split) for split, loader in loaders.items()}
    run_dir = checkpoint.create_run_directory(config)
    with open(os.path.join(run_dir, "data.json"), "w") as file:
        json.dump(counts, file, indent=1)

    #### MODELS
    policy, reference = models.load_policy_and_reference(config, tokenizer, default_device())
    rank0_print(f"{type(policy.lm).__name__}, {policy.lm.num_parameters():,} parameters; {policy.description}")

    #### TRAINING
    trainer_class = getattr(trainers, config.loss.trainer)
    trainer = trainer_class(policy, reference, tokenizer, config, loaders.get("train"), loaders["test"], run_dir)
    if training:
        trainer.train()
        rank0_print(f"saved to {os.path.join(run_dir, 'LATEST', checkpoint.POLICY)}")
    else:
        for name, value in trainer.evaluate().items():
            rank0_print(f"{name}: {value:.6g}")


if __name__ == "__main__":
    main()
