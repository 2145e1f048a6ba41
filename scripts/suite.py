"""Which loss is best, honestly compared: python scripts/suite.py model=tiny seeds=5

Trains every row (SFT, each loss alone, each after SFT) under an equal budget and with equally many settings tried, at
several sizes and seeds; samples and judges each; and writes one table and one picture. Run it again to go on after a
stop. Its own words, all optional; other key=value words go to every training command:

    model=tiny       a file in config/model/
    seeds=5          runs of each row
    losses=[...]     losses to compare: dpo is two rows, alone and after SFT; sft+ipo is that row only
    sizes=[...]      sizes of the settings, or files in config/model/
    aa=sft+kto       also train this row under two names, which must not differ
    settings=FILE    other settings than halos/suite/settings/{model}.yaml (or default.yaml)
    out=DIR          where everything goes; .cache/suite_{model}
    --print          print the commands instead, for other machines; with hydra/launcher=submitit_slurm they submit
    --prompts        write the prompts that all rows answer, and stop

    python scripts/suite.py model=tiny seeds=5 losses=[dpo,kto,sft+ipo]
    python scripts/suite.py --print model=llama13b seeds=3
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos import dataset_specs  # noqa: E402
from halos.commands import hydra_message, importing, report_user_errors, take_words  # noqa: E402
from halos.errors import UserError  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

OWN = {"model": "tiny", "seeds": "5", "losses": "", "sizes": "", "aa": "", "settings": "", "out": ""}
FLAGS = ("--print", "--prompts")


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    with report_user_errors():
        flags = [word for word in sys.argv[1:] if word in FLAGS]
        words = sys.argv[1:] = [word for word in sys.argv[1:] if word not in FLAGS]
        own = take_words(OWN)
        if unknown := [word for word in sys.argv[1:] if word.startswith("-") or "=" not in word]:
            raise UserError(f"{unknown[0]} is not key=value; --help lists the words")
        dataset_specs.register(os.path.join(PROJECT, "config"))
        from halos.suite import settings

        suite = settings.load(own, sys.argv[1:])
        programs = imported(suite.losses)
        from halos.suite import commands, stages

        if "--print" in flags:
            print(commands.as_text(suite, words, programs.formats))
        elif "--prompts" in flags:
            stages.write_data(suite, programs)
        elif any(map(commands.is_of_launcher, words)):
            raise UserError("hydra/launcher is for --print; the suite itself trains one run after the other, here")
        else:
            stages.whole(suite, programs)


def imported(losses: list[str]):
    """Import what the commands of the suite import, once for all workers."""
    with importing():
        import matplotlib.figure  # noqa: F401
        import torch.distributed.checkpoint.state_dict  # noqa: F401
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        import compare
        import dataloaders
        import eval as sampling
        import train
        import trainers
        from halos import components, curves, launch, samplers, token_store  # noqa: F401
        from halos.suite.runner import Programs

    try:
        with initialize_config_dir(os.path.join(PROJECT, "config"), version_base="1.3"):
            names = {loss: compose("config", [f"loss={loss}"]).loss.trainer for loss in losses}
    except HydraException as error:
        raise UserError(hydra_message(error)) from None
    formats = {loss: components.find(trainers, name).data_format for loss, name in names.items()}
    return Programs(train.main, sampling.main, compare.main, trainers, dataloaders, formats)


if __name__ == "__main__":
    main()
