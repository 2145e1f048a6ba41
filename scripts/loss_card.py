"""Is this loss what it should be? Check it without a model, in seconds: python scripts/loss_card.py loss=dpo

Takes the words of the training command, of which those of the loss count, and one of its own:

    output=FILE      the picture; without it, loss_cards/NAME.png

    python scripts/loss_card.py loss=kto loss.beta=0.3
    python scripts/loss_card.py loss=[dpo,kto]                     several losses in one picture
    python scripts/loss_card.py loss=all                           all files of config/loss/
    python scripts/loss_card.py -m loss=dpo loss.beta=0.05,0.1,0.5 one loss with several values

Prints a line per check of values and gradients, and draws loss and gradient weight against the implied reward. An
earlier picture is renamed to FILE.bak-N. Exit code 1 if a check fails. What each check means: docs/loss_card.md. How
the numbers are computed is in halos/loss_card/.
"""

import os
import re
import sys
from glob import glob

from omegaconf import DictConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.commands import hydra_main, importing, report_user_errors, take_words  # noqa: E402
from halos.config_keys import command_words  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

CONFIG_DIR = os.path.join(PROJECT, "config")
MOST_NAMED = 6  # losses whose names the name of a picture has


def main() -> None:
    if len(sys.argv) == 1 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    with report_user_errors():
        output = take_words({"output": ""})["output"]
        sys.argv[1:] = one_job_per_loss(sys.argv[1:])
    cards: dict = {}
    hydra_main(CONFIG_DIR, "config")(lambda config: examine(config, output, cards))()
    with report_user_errors():
        finish(cards, output)


def one_job_per_loss(words: list[str]) -> list[str]:
    """Turn loss=all and loss=[a,b] into the several runs of Hydra's -m."""
    everything = sorted(os.path.basename(path).removesuffix(".yaml") for path in glob(f"{CONFIG_DIR}/loss/*.yaml"))
    values = dict(word.split("=", 1) for word in words if "=" in word)
    names = {"all": ",".join(everything)}.get(values.get("loss", ""), values.get("loss", ""))
    names = names[1:-1] if names.startswith("[") and names.endswith("]") else names
    words = [f"loss={names}" if word.startswith("loss=") else word for word in words]
    if "," not in names:
        return words
    # Hydra looks for loss.beta in the default loss, unless its values, too, are those of a sweep.
    words = [re.sub(r"^(loss\.\w+)=(.*[^)])$", r"\1=choice(\2)", word) for word in words]
    return words if {"-m", "--multirun"} & set(words) else ["-m", *words]


def examine(config: DictConfig, output: str, cards: dict) -> None:
    """Print the card of one loss, and keep its findings and curves for the end."""
    with importing():
        import dataloaders
        import trainers
        from halos import components
        from halos.config import validate
        from halos.files import require_file
        from halos.loss_card import terminal
        from halos.loss_card.card import Status, card
        from halos.loss_card.subject import Subject
        from halos.loss_card.sweep import sweep

    validate(config, trainers, dataloaders)
    if output:
        require_file(os.path.expanduser(output), "output")
    classes = components.find(trainers, config.loss.trainer), components.find(dataloaders, config.loss.dataloader)
    loss = Subject(config.loss.name, config.loss, *classes)
    findings = card(loss)
    label = " ".join([loss.name, *(word for word in command_words() if word.lstrip("+").startswith("loss."))])
    print(terminal.text(label, loss, findings, terminal.has_colors()), end="\n\n", flush=True)
    fails = {one.check for one in findings if one.status is Status.FAILED}
    cards[label] = findings, loss.name, [] if fails & {"shapes", "start"} else sweep(loss)


def finish(cards: dict, output: str) -> None:
    """Print a line per loss if there are several, draw the picture, and exit with 1 if a check has failed."""
    from halos.files import make_room
    from halos.loss_card import picture, terminal
    from halos.loss_card.card import Status

    if len(cards) > 1:
        width = max(map(len, cards))
        print("\n".join(f"{label:{width}}  {terminal.counts(card[0])}" for label, card in cards.items()), "\n")
    if curves := {label: curves for label, (_, _, curves) in cards.items() if curves}:
        path = os.path.expanduser(output) or picture_path([name for _, name, _ in cards.values()])
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        make_room(path)
        picture.draw(path, curves)
        print(f"the picture: {path}")
    if any(one.status is Status.FAILED for findings, _, _ in cards.values() for one in findings):
        sys.exit(1)


def picture_path(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    name = "+".join(names) if len(names) <= MOST_NAMED else f"{len(names)}_losses"
    return os.path.join("loss_cards", f"{name}.png")


if __name__ == "__main__":
    main()
