"""Upload the model of a run to the Hugging Face hub, with its model card.

    python scripts/push_to_hub.py .cache/kto_tiny --repo me/kto_tiny --dry_run
    python scripts/push_to_hub.py .cache/kto_tiny --repo me/kto_tiny --private

The first argument is a run, whose LATEST is taken, or a checkpoint in it (RUN/step-640). Its files are compared with
its manifest first. What goes up is the Hugging Face export: config, safetensors, tokenizer and model card. What stays
here is everything else: policy.pt and v_head.pt, which are pickles, config.yaml, which has paths of this machine, and
the states of the run. The token is that of `hf auth login`, or HF_TOKEN; a dry run needs neither token nor network.
"""

import os
import sys
from fnmatch import fnmatch
from functools import partial

import yaml

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from halos import manifest, secrets  # noqa: E402
from halos.commands import FlagParser, report_user_errors  # noqa: E402
from halos.errors import UserError, first_line  # noqa: E402

CARD = "README.md"
# Files of an export; whatever else lies in a checkpoint stays here.
UPLOADED = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt", CARD)
TEXTS = (".json", ".jinja", ".txt", ".md")


def parser() -> FlagParser:
    flags = FlagParser(description=__doc__)
    flags.add_argument("run", metavar="RUN", help="a run directory, or a checkpoint in it")
    flags.add_argument("--repo", required=True, metavar="OWNER/NAME", help="of the model on the hub")
    flags.add_argument("--dry_run", action="store_true", help="check and list the files, and upload nothing")
    flags.add_argument("--private", action="store_true", help="make the new repository private")
    flags.add_argument("--update", action="store_true", help="add a commit to a repository that exists")
    return flags


def main() -> None:
    with report_user_errors():
        args = parser().parse_args()
        check_name(args.repo)
        if args.update and args.private:
            raise UserError("--private is for a new repository; leave it out, or leave out --update")
        directory = checkpoint_of(args.run)
        manifest.check(directory)
        sizes = manifest.sizes(directory)
        files = [name for name in sorted(sizes) if is_uploaded(name)]
        check_export(directory, files)
        card = card_of(directory, args.repo)
        check_secrets(directory, files)
        print(listing(directory, sizes, files, args.repo, card))
        if args.dry_run:
            print("dry run: nothing was uploaded")
        else:
            print(f"uploaded: {upload(directory, files, card, args)}")


#### WHAT GOES UP


def checkpoint_of(path: str) -> str:
    """Return the directory of the checkpoint: the given one, or LATEST of a run."""
    for directory in (os.path.normpath(path), os.path.join(path, "LATEST")):
        if manifest.is_complete(directory):
            return directory
    raise UserError(
        f"{path} has no {manifest.NAME} and no LATEST with one; give a run directory, or a checkpoint in it"
    )


def is_uploaded(name: str) -> bool:
    return name != manifest.NAME and any(fnmatch(name, pattern) for pattern in UPLOADED)


def check_export(directory: str, files: list[str]) -> None:
    """Raise UserError if the files are not a model with its card."""
    missing = [name for name in ("config.json", CARD) if name not in files]
    if not any(name.endswith(".safetensors") for name in files):
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"{directory} has no {', '.join(missing)}, so it is not an export; give another checkpoint")


def card_of(directory: str, repo: str) -> str:
    """Return the model card, with the name on the hub in its example."""
    with open(os.path.join(directory, CARD), encoding="utf-8") as file:
        return file.read().replace("from_pretrained(DIRECTORY)", f'from_pretrained("{repo}")')


def check_secrets(directory: str, files: list[str]) -> None:
    """Raise UserError if a text that is to be uploaded has a key of this environment, or a password in an address."""
    secrets.learn(token())
    for name in files:
        if name.endswith(TEXTS):
            with open(os.path.join(directory, name), encoding="utf-8") as file:
                text = file.read()
            secrets.learn_urls(text)
            if secrets.redact(text) != text:
                raise UserError(f"{os.path.join(directory, name)} has a key or a password in it; nothing was uploaded")


def listing(directory: str, sizes: dict[str, int], files: list[str], repo: str, card: str) -> str:
    """Return what goes up and what stays, with sizes in bytes, and what the card says of the model."""
    total = sum(sizes[name] for name in files)
    lines = [f"{directory} -> {repo}: {len(files)} files, {total:,} bytes, as its manifest says"]
    lines += [f"  {sizes[name]:>16,}  {name}" for name in files]
    lines += [f"  {'stays here':>16}  {name}" for name in sorted(sizes) if name not in files]
    _, header, text = card.split("---\n", 2)
    facts = [f"{key}: {value}" for key, value in yaml.safe_load(header).items()]
    about = text.split("\n## ")[0].strip().splitlines()
    return "\n".join([*lines, f"model card ({CARD}):", *(f"  {line}" for line in [*facts, *about] if line)])


#### THE HUB


def token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {first_line(error)}") from None
    if "/" not in repo:
        raise UserError(f"--repo {repo} has no owner; write --repo OWNER/{repo}")


def upload(directory: str, files: list[str], card: str, args) -> str:
    """Make the repository, upload the files in one commit, and return the address of the model."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: of the client library it uses

    if token() is None:
        raise UserError("there is no token; run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi(token=token())
    contents = {name: os.path.join(directory, name) for name in files} | {CARD: card.encode()}
    commit = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        if not args.update:
            create(partial(api.create_repo, args.repo, private=args.private), args.repo)
        api.create_commit(args.repo, commit, commit_message=f"Upload {os.path.basename(os.path.abspath(directory))}")
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise UserError(f"--repo {args.repo}: the hub could not be written ({first_line(error)})") from error
    return f"{api.endpoint}/{args.repo}"


def create(create_repo, repo: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        create_repo()
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        raise UserError(f"{repo} exists on the hub; --update adds a commit to it, and its history stays") from None


if __name__ == "__main__":
    main()
