"""Evaluate a run: sample from it (-m sample), or compute its closed-form metrics on the test split (-m eval).

    python eval.py -c /data/models/kto_llama7b/config.yaml -m sample -n 512 -b 32

`-c RUN/config.yaml` evaluates the run's latest checkpoint, `-c RUN/step-N/config.yaml` the checkpoint of step N.
key=value arguments change the run's config, for example top_p=0.9 temperature=0.7 seed=2. If sampling was stopped, run
the command again to go on: docs/sampling.md.
"""

import argparse
import json
import os

from omegaconf import DictConfig, OmegaConf

from halos import locks, rules, saved_config, secrets
from halos.commands import FlagParser, boolean, importing, report_user_errors
from halos.config import NAME_SPARE, validate
from halos.config_keys import short
from halos.errors import UserError
from halos.files import finished, make_room, require_file

MOST = 10**6  # of what a flag counts


def arguments() -> argparse.Namespace:
    parser = FlagParser(description=__doc__)
    parser.add_argument("-c", "--config", required=True, help="config.yaml of a run or of one of its checkpoints")
    parser.add_argument("-m", "--mode", choices=["sample", "eval"], default="sample")
    parser.add_argument("-n", "--n_samples", type=int, help="prompts to sample for (default: n_samples)")
    parser.add_argument("--n_per_prompt", type=int, default=1, help="responses per prompt, a row each (default: 1)")
    parser.add_argument("-b", "--batch_size", type=int, help="responses at a time (default: model.eval_batch_size)")
    parser.add_argument(
        "-u", "--sample_reference", type=boolean, default=True, help="sample the reference model too (default: true)"
    )
    parser.add_argument(
        "-s",
        "--hub_reference",
        type=boolean,
        default=True,
        help="the reference is the model before any training; false: what model.load_from names (default: true)",
    )
    parser.add_argument(
        "--format",
        choices=["rows", "alpaca_eval"],
        default="rows",
        help="rows for compare.py, or the policy's outputs as AlpacaEval reads them (default: rows)",
    )
    parser.add_argument("-o", "--output", help="the file to write (default: {samples_dir}/{exp_name}.json)")
    parser.add_argument("-f", "--file", help="sample for the prompts of this .jsonl, .json or .parquet file instead")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change the run's config")
    return parser.parse_intermixed_args()


def load_run(args: argparse.Namespace) -> tuple[DictConfig, str]:
    """Return the run's config with the command's changes, and the path of the policy.pt to evaluate."""
    import dataloaders
    import trainers
    from halos import distributed, run_dir, samplers

    if not os.path.isfile(args.config):  # or its directory was about to be replaced when its run was killed
        run_dir.recover_if_dead(os.path.dirname(os.path.dirname(os.path.abspath(args.config))))
    if not os.path.isfile(args.config):
        raise UserError(f"-c {args.config} does not exist; give the config.yaml of a run, as in -c RUN/config.yaml")
    for name in ("n_samples", "batch_size", "n_per_prompt"):
        if getattr(args, name) is not None and not 1 <= getattr(args, name) <= MOST:
            raise UserError(f"--{name} {getattr(args, name)} is not a number from 1 to {MOST}")
    if args.format == "alpaca_eval" and args.n_per_prompt > 1:
        reason = "AlpacaEval reads one output per instruction"
        raise UserError(f"--n_per_prompt {args.n_per_prompt} --format alpaca_eval: {reason}; leave one of them out")
    config = saved_config.read(args.config)
    locate_cache(config, args.config)
    config = saved_config.overrides(config, args.overrides)
    validate(config, trainers, dataloaders)
    config.model.eval_batch_size = args.batch_size or config.model.eval_batch_size
    if args.mode == "sample":
        samplers.check(config, args.sample_reference and args.format == "rows")
        check_output(args, config)
    return config, distributed.from_main(distributed.on_main(find_policy_pt, args.config))


def find_policy_pt(config_path: str) -> str:
    """Return the checkpoint beside a config, or the newest whole one of a run. Raises UserError if it is damaged."""
    from halos import checkpoint

    directory = os.path.dirname(os.path.abspath(config_path))
    beside = os.path.join(directory, checkpoint.POLICY)
    if os.path.isfile(beside):
        checkpoint.check_source(beside)
        return beside
    return os.path.join(checkpoint.newest_whole(directory), checkpoint.POLICY)


def check_output(args: argparse.Namespace, config: DictConfig) -> None:
    """Raise UserError if the samples could not be written at the end."""
    is_given = args.output is not None
    path = args.output if is_given else os.path.join(config.samples_dir, f"{config.exp_name}.json")
    key = "--output" if is_given else "samples_dir"
    if not os.path.basename(path):
        raise UserError(f"--output={path} names no file; give the path of a file")
    if problem := rules.problem_of_path(path, spare=NAME_SPARE):
        raise UserError(f"{key}={short(path)!r} {problem}; give another")
    require_file(path, key)


def locate_cache(config: DictConfig, path: str) -> None:
    """Make a relative cache_dir absolute. It is relative to the directory where the run was started.

    That directory is found from the place of the config file.
    """
    cache_dir, name = str(config.get("cache_dir")), str(config.get("exp_name"))
    if os.path.isabs(cache_dir):
        return
    directory = os.path.dirname(os.path.abspath(path))
    ending = os.path.join(os.sep, os.path.normpath(cache_dir), name)
    for run_dir in (directory, os.path.dirname(directory)):  # the latter for RUN/step-N/config.yaml
        if run_dir.endswith(ending):
            config.cache_dir = run_dir.removesuffix(os.sep + name)


def sample(args: argparse.Namespace, config: DictConfig, policy_pt: str) -> None:
    """Write samples/{exp_name}.json, a list of rows. Samples that an earlier command left are not made again."""
    import dataloaders
    from halos import distributed, loading
    from halos.sample_files import PartialFile, alpaca_rows, rows_of
    from halos.samplers import Sampler
    from halos.tokens import Encoder, truncate_prompt

    tokenizer = loading.load_tokenizer(config)
    encoder = Encoder(tokenizer)
    with distributed.first_on_each_node():
        prompts = dataloaders.read_prompts(config, tokenizer, args.file, args.n_samples)
    ids = [
        truncate_prompt(ids, config.model.max_prompt_length, prompt.truncation_mode, len(encoder.bos))
        for prompt, ids in zip(prompts, encoder.prompt_arrays([prompt.text for prompt in prompts]), strict=True)
    ]
    copies = ids * args.n_per_prompt  # the first sample of every prompt, then the second of every prompt, and so on
    weights = {"policy": {"policy_pt": policy_pt}}
    if args.sample_reference and args.format == "rows":
        weights["reference"] = {"use_load_from": not args.hub_reference}
    samplers = {name: Sampler(config, encoder, name, **which) for name, which in weights.items()}
    keys = {name: sampler.keys(copies) for name, sampler in samplers.items()}
    run_name = sample_name(config, policy_pt)
    ending = ".json" if args.format == "rows" else f".{args.format}.json"
    path = args.output or os.path.join(config.samples_dir, run_name + ending)
    with PartialFile(f"{path.removesuffix(ending)}.partial.jsonl", sum(keys.values(), [])) as partial:
        texts = {
            name: sampler.sample(copies, partial.known(keys[name]), partial.recorder(keys[name]))
            for name, sampler in samplers.items()
        }
        if args.format == "rows":
            rows = rows_of(prompts, texts["policy"], texts.get("reference"))
        else:
            rows = alpaca_rows(prompts, texts["policy"], run_name)
        if distributed.is_main():
            write_json(path, rows)
            partial.remove()
            print(f"{len(rows)} samples written to {path}")


def sample_name(config: DictConfig, policy_pt: str) -> str:
    checkpoint = os.path.basename(os.path.dirname(policy_pt))
    return config.exp_name if checkpoint == "LATEST" else f"{config.exp_name}_{checkpoint}"


def evaluate(args: argparse.Namespace, config: DictConfig, policy_pt: str) -> None:
    """Write eval.json beside the config: {"metadata": config, "results": {metric: mean}}."""
    import dataloaders
    import trainers
    from halos import components, distributed, loading, reference_cache

    tokenizer = loading.load_tokenizer(config)
    with distributed.first_on_each_node():
        loader = dataloaders.make_loader(config, tokenizer, "test")
    dataloaders.describe(loader, "test")
    policy, reference, cache = reference_cache.load(config, tokenizer, [loader], policy_pt)
    directory = os.path.dirname(os.path.abspath(args.config))
    trainer = components.find(trainers, config.loss.trainer)(
        policy, reference, tokenizer, config, None, loader, directory
    )
    trainer.reference_cache = cache
    results = trainer.evaluate()
    if not distributed.is_main():
        return
    for name, value in results.items():
        print(f"{name}: {value:.6g}")
    path = os.path.join(directory, "eval.json")
    metadata = secrets.without_urls_secrets(OmegaConf.to_container(config, resolve=True))
    write_json(path, {"metadata": metadata, "results": results})
    print(f"written to {path}")


def write_json(path: str, content) -> None:
    """Write to a temporary file and rename it. An existing file is kept as NAME.bak-N."""
    with locks.take(path, on_wait=lambda who: None), finished(path) as unfinished:  # others who write it come next
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
        make_room(path)


def main() -> None:
    with report_user_errors():
        args = arguments()
        with importing():
            import dataloaders  # noqa: F401  imported here, once, for the functions above
            import trainers  # noqa: F401
            from halos import loading, samplers  # noqa: F401
            from halos.launch import joined, launch

        with joined():
            config, policy_pt = load_run(args)
            loading.check_positions(config)
            loading.check_policy_pt(config, policy_pt, with_value_head=args.mode == "eval")
            if args.mode == "sample" and args.sample_reference and args.format == "rows":
                loading.check_reference(config, use_load_from=not args.hub_reference)
            command = {"sample": sample, "eval": evaluate}[args.mode]
            n = config.nproc_per_node if args.mode == "eval" or config.sampler == "hf" else 1
            launch(command, args, config, policy_pt, nproc_per_node=n)


if __name__ == "__main__":
    main()
