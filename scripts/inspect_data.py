"""What will training read? Inspect the data before any GPU hour: python scripts/inspect_data.py loss=kto datasets=[hh]

Takes the words of the training command, and four of its own:

    split=both       train, test, or both: only both finds prompts that training and test share
    examples=8       training rows whose tokens are shown
    show=ID          show the rows of this example instead, as hh/3f2a91c0b7de, or the row of this number
    output=FILE      the page; without it, {cache_dir}/{exp_name}.data.html

    python scripts/inspect_data.py loss=dpo model=llama7b datasets=[shp,hh] model.max_length=1024

Opens an evaluation of a run as well, with the texts of its worst examples where the data are at hand. Of the words
above it takes examples and output:

    python scripts/inspect_data.py evaluation=.cache/kto/evaluations/step-100.parquet

Prints a report and writes it as one HTML page, with coloured tokens: context, trained on, end of turn, cut. Only the
tokenizer and the data are read, by the code that training uses; no weights. An earlier page is renamed to FILE.bak-N.
How the numbers are computed is in halos/inspection/.
"""

import os
import shlex
import sys

from omegaconf import DictConfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos.commands import hydra_main, report_user_errors, take_words, whole_number  # noqa: E402
from halos.errors import UserError, did_you_mean  # noqa: E402
from halos.project_dir import PROJECT  # noqa: E402

OWN = {"split": "both", "examples": "8", "show": "", "output": "", "evaluation": ""}
SPLITS = {"both": ["train", "test"], "train": ["train"], "test": ["test"]}


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    command = shlex.join(["python", *sys.argv])
    with report_user_errors():
        own = take_words(OWN)
        n_shown = whole_number("examples", own["examples"], OWN["examples"], least=0)
        if own["split"] not in SPLITS:
            raise UserError(f"split={own['split']} is not a split; {did_you_mean(own['split'], SPLITS)}")
        if own["evaluation"]:
            inspect_evaluation(own["evaluation"], n_shown, own["output"], command)
            return

    @hydra_main(os.path.join(PROJECT, "config"), "config")
    def run(config: DictConfig) -> None:
        import dataloaders
        import trainers
        from halos.config import validate

        validate(config, trainers, dataloaders)
        path = page_path(config, own["output"])
        inspect(config, SPLITS[own["split"]], n_shown, own["show"], path, command)

    run()


def page_path(config: DictConfig, output: str) -> str:
    """Return where the page of the data goes; its folder must exist if the user has named it."""
    return checked(os.path.expanduser(output) or os.path.join(config.cache_dir, f"{config.exp_name}.data.html"), output)


def checked(path: str, output: str) -> str:
    """Return the path of a page. Raises UserError if it cannot be one."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or (output and not os.path.isdir(folder)):
        raise UserError(
            f"output={output or path} is a folder, or its folder does not exist; name a file of an existing one"
        )
    return path


def inspect(config: DictConfig, splits: list[str], n_shown: int, wanted: str, path: str, command: str) -> None:
    """Build the loaders as train.py does, print the report, and write the page."""
    import dataloaders
    from halos import loading
    from halos.dataset_specs import spec_of
    from halos.files import make_room
    from halos.inspection import page, terminal
    from halos.inspection.report import make_report

    tokenizer = loading.load_tokenizer(config)
    loaders = {split: dataloaders.make_loader(config, tokenizer, split, keep_texts=True) for split in splits}
    weights = {name: spec_of(config, name).weight for name in config.datasets}
    report = make_report(loaders, weights, n_shown, wanted)
    make_room(path)
    page.write(path, report, f"Data of {config.exp_name}", command)
    print(terminal.text(report, terminal.has_colors()))
    print(f"\nthe page with all of this: {path}")


def inspect_evaluation(path: str, n_shown: int, output: str, command: str) -> None:
    """Write the page of an evaluation beside it, and print loss and mean rewards of its datasets."""
    from halos.files import make_room
    from halos.inspection import evaluation, evaluation_page
    from halos.records import Records

    page = checked(os.path.expanduser(output) or f"{path.removesuffix('.parquet')}.html", output)
    rows = Records.read(path)
    evaluation.check_some(rows, path)
    ids = {rows.id[i] for case in evaluation.worst(rows, n_shown) for i in case}
    make_room(page)
    evaluation_page.write(page, rows, known_texts(path, ids), n_shown, f"Evaluation {path}", command)
    for row in evaluation.datasets(rows):
        chosen, rejected = (evaluation_page.number(reward) or "none" for reward in (row.chosen, row.rejected))
        print(f"{row.name}: {row.responses:,} responses, loss {row.loss:.4g}, rewards {chosen} and {rejected}")
    print(f"\nthe page with the worst examples: {page}")


def known_texts(path: str, ids: set[str]) -> dict[str, tuple[str, str]]:
    """Return the texts of responses of a run's test data; none, with the reason, where these cannot be read."""
    import dataloaders
    import trainers
    from halos import loading, saved_config
    from halos.config import validate
    from halos.inspection.evaluation import texts_of

    beside = os.path.dirname(os.path.abspath(path))  # eval.parquet has its config there, evaluations/ above
    folder = beside if os.path.isfile(os.path.join(beside, "config.yaml")) else os.path.dirname(beside)
    config_path = os.path.join(folder, "config.yaml")
    try:
        config = saved_config.read(config_path)
        saved_config.locate_cache(config, config_path)
        validate(config, trainers, dataloaders)
        loader = dataloaders.make_loader(config, loading.load_tokenizer(config), "test")
    except UserError as error:
        print(f"warning: the page has no texts: {error}")
        return {}
    return texts_of(loader, ids)


if __name__ == "__main__":
    main()
