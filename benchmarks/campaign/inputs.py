"""Malformed inputs: what each command says of a damaged config, override, row, file of weights, sample or state.

A command may do its work all the same, or end with one line and exit code 2. Nothing else.
"""

import csv
import io
import json
import os
import resource
import shutil
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf

from benchmarks.campaign import forks, runs
from benchmarks.campaign.commands import Commands, write_judge
from benchmarks.campaign.mutations import ODD_VALUES, contents, each, jsons, structures, texts
from benchmarks.campaign.tally import Case, Tally

MEMORY = 6 << 30  # bytes that a command may ask for beyond what it has
MOST_DRAWN = 4  # inputs that are drawn for each that is used, since hypothesis repeats itself
METRICS = "run/metrics.jsonl"
SHARES = {  # of all cases
    "configs": 0.22,
    "overrides": 0.15,
    "rows": 0.18,
    "weights": 0.1,
    "sample files": 0.15,
    "journals": 0.1,
    "partial samples": 0.03,
    "states": 0.05,
    "token caches": 0.02,
}
PAIRS = [{"prompt": f"How much is {i}?", "chosen": f"{i}.", "rejected": f"No {i}."} for i in range(16)]
FEEDBACK = [{"prompt": f"How much is {i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(16)]
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": f"How much is {i}?"}, {"role": "assistant", "content": f"{i}."}]}
    for i in range(16)
]


def light() -> None:
    """In a child: leave out what costs time and has cases of its own, and start no further processes."""
    from halos import checkpoint, launch, metrics

    checkpoint.save = lambda *args, **kwargs: None
    metrics.draw_curves = lambda *args: None
    launch._run_processes = lambda *args: None
    os.environ.pop("WANDB_API_KEY", None)
    os.environ["WANDB_MODE"] = "disabled"
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)


class Inputs:
    """The cases of one seed. Each kind is a strategy, and a function from one of its values to a command's end."""

    def __init__(self, commands: Commands, seed: int, keep: str | None = None):
        self.commands = commands
        self.seed = seed
        self.keep = keep
        self.cache_dir = commands.whole_run("kto", 1).folder
        self.run_dir = os.path.join(self.cache_dir, "run")
        self.kinds: dict[str, tuple[st.SearchStrategy, Callable[[Any], forks.Ended]]] = {
            "configs": (self.configs(), self.of_config),
            "overrides": (self.overrides(), self.of_overrides),
            "rows": (self.rows(), self.of_rows),
            "weights": (self.weights(), self.of_weights),
            "sample files": (self.sample_files(), self.of_sample_file),
            "journals": (self.journals(), self.of_journal),
            "partial samples": (self.partial_samples(), self.of_partial_samples),
            "states": (self.states(), self.of_state),
            "token caches": (self.token_caches(), self.of_token_cache),
        }

    def all(self, kind: str, n: int, only: int | None = None) -> Tally:
        """Run n different cases of a kind. only: just this one"""
        tally = Tally(f"malformed {kind}")
        strategy, command = self.kinds[kind]

        seen: set[str] = set()

        def run_case(value: Any) -> None:
            number = len(seen)
            if repr(value) in seen or number == n:
                return
            seen.add(repr(value))
            if only in (None, number):
                self.folder = self.commands.folder()
                ended = command(value)
                more = f" --malformed-cases {n}; input: {repr(value)[:300]}"
                case = Case(tally, number, self.seed, more)
                codes = (0, 2, 4) if kind in ("sample files", "journals") else (0, 2)
                if not case.check_end(ended, codes) and self.keep:
                    shutil.copytree(self.folder, f"{self.keep}/{kind}-{number}", dirs_exist_ok=True)
                tally.notes["refused"] += ended.code == 2

        each(strategy, MOST_DRAWN * n, self.seed, run_case)
        return tally

    def copy_of_run(self) -> str:
        """Copy the run of this seed into the folder of the case; files that are replaced are not shared."""
        path = os.path.join(self.folder, "cache")
        shutil.copytree(self.cache_dir, path, copy_function=os.link)
        return path

    def write(self, path: str, data: bytes) -> str:
        path = os.path.join(self.folder, path)
        if os.path.exists(path):
            os.remove(path)  # it is linked
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        return path

    def read(self, *path: str) -> bytes:
        with open(os.path.join(self.cache_dir, *path), "rb") as file:
            return file.read()

    #### CONFIGS AND OVERRIDES

    def configs(self):
        text = self.read("run", "config.yaml").decode()
        dumped = structures(yaml.safe_load(text)).map(lambda value: yaml.safe_dump(value, allow_unicode=True))
        return st.one_of(dumped, dumped, texts(text))

    def of_config(self, text: str) -> forks.Ended:
        self.copy_of_run()
        path = self.write("cache/run/config.yaml", text.encode("utf-8", "surrogatepass"))
        words = ["-c", path, "-n", "2", "-b", "2", "-u", "false"]
        return forks.run(self.commands.eval, words, self.folder, light)

    def overrides(self):
        from halos.config import flat

        config = OmegaConf.load(os.path.join(self.run_dir, "config.yaml"))
        keys = [key for key in flat(config) if key not in ("n_examples", "exp_name")]
        values = st.one_of([st.sampled_from(ODD_VALUES)] * 2 + [st.integers(-3, 9), st.floats(), st.text(max_size=8)])
        signs = st.sampled_from(["", "", "", "++", "+", "~"])
        words = st.tuples(signs, st.sampled_from(keys), values).map(
            lambda word: f"{word[0]}{word[1]}={_as_word(word[2])}"
        )
        return st.tuples(
            st.lists(st.one_of([words] * 9 + [st.text(max_size=12)]), min_size=1, max_size=2), st.booleans()
        )

    def of_overrides(self, value: tuple[list[str], bool]) -> forks.Ended:
        words, trains = value
        fixed = ["n_examples=8", "keep_checkpoints=0", "do_first_eval=false", f"mode={'train' if trains else 'eval'}"]
        words = [word.replace("\0", "").encode("utf-8", "replace").decode() for word in words]  # no command has NUL
        return forks.run(self.commands.train, [*runs.words_of(self.folder, "kto", *fixed), *words], self.folder, light)

    #### DATA

    def rows(self):
        forms = {"kto": PAIRS, "sft": CONVERSATIONS, "dpo": PAIRS, "ppo": FEEDBACK}
        each_form = [
            st.tuples(st.just(loss), st.just(suffix), strategy)
            for loss, valid in forms.items()
            for suffix, strategy in (
                (".json", jsons(valid)),
                (".jsonl", jsons(valid, lines=True)),
                (".csv", st.one_of(structures(valid).map(_as_csv), contents(_as_csv(valid)))),
                (".parquet", st.one_of(structures(valid).map(_as_parquet), contents(_as_parquet(valid)))),
            )
        ]
        return st.one_of(each_form)

    def of_rows(self, value: tuple[str, str, bytes]) -> forks.Ended:
        loss, suffix, data = value
        path = self.write(f"rows{suffix}", data)
        fixed = ["n_examples=8", "keep_checkpoints=0", "do_first_eval=false", f"datasets=[{path}]"]
        return forks.run(self.commands.train, runs.words_of(self.folder, loss, *fixed), self.folder, light)

    #### WEIGHTS

    def weights(self):
        latest = "policy.pt", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"
        each_file = [(name, self.read("run", "LATEST", name)) for name in latest]
        damaged = [st.tuples(st.just(name), contents(data)) for name, data in each_file]
        damaged += [st.tuples(st.just(name), jsons(json.loads(data))) for name, data in each_file[2:4]]
        damaged += [st.tuples(st.just("model.safetensors"), _headers(each_file[1][1]))]
        return st.tuples(st.one_of(damaged), st.booleans())

    def of_weights(self, value: tuple[tuple[str, bytes], bool]) -> forks.Ended:
        (name, data), has_manifest = value
        self.copy_of_run()
        latest = os.path.join(self.folder, "cache", "run", "LATEST")
        self.write(os.path.join(latest, name), data)
        if not has_manifest:
            os.remove(os.path.join(latest, "manifest.json"))
        if name == "policy.pt":
            return forks.run(self.commands.eval, ["-c", f"{latest}/config.yaml", "-m", "eval"], self.folder, light)
        words = ["mode=eval", "exp_name=other", f"model.load_from={latest}"]
        tokenizer = [f"model.tokenizer_name_or_path={latest}"] if name == "tokenizer.json" else []
        words = runs.words_of(os.path.join(self.folder, "cache"), "kto", *words, *tokenizer)
        return forks.run(self.commands.train, words, self.folder, light)

    #### SAMPLES AND VERDICTS

    def sample_files(self):
        rows = [{"prompt": f"{i}?", "chosen": "c" * i, "policy": "p" * 5, "reference": "r"} for i in range(1, 9)]
        rows[0]["messages"] = [{"role": "user", "content": "1?"}]
        files = {".json": jsons(rows), ".jsonl": jsons(rows, lines=True)}
        files[".parquet"] = st.one_of(structures(rows).map(_as_parquet), contents(_as_parquet(rows)))
        return st.one_of([st.tuples(st.just(suffix), data) for suffix, data in files.items()])

    def of_sample_file(self, value: tuple[str, bytes]) -> forks.Ended:
        suffix, data = value
        write_judge(self.folder)
        return self.judge(self.write(f"odd{suffix}", data))

    def judge(self, file: str = "samples.json") -> forks.Ended:
        words = ["-f", file, "-bk", "chosen", "--judge", "judge:longer"]
        return forks.run(self.commands.compare, words, self.folder)

    def journals(self):
        folder = self.commands.whole_verdicts().folder
        with open(os.path.join(folder, "judgments", "journal.jsonl")) as file:
            rows = [json.loads(line) for line in file]
        return jsons(rows, lines=True)

    def of_journal(self, data: bytes) -> forks.Ended:
        write_judge(self.folder)
        self.write("judgments/journal.jsonl", data)
        return self.judge()

    def partial_samples(self):
        rows = [{"key": f"{i:032x}", "text": f"text {i}"} for i in range(6)]
        return jsons(rows, lines=True)

    def of_partial_samples(self, data: bytes) -> forks.Ended:
        self.write("samples/run.partial.jsonl", data)
        words = ["-c", os.path.join(self.run_dir, "config.yaml"), "-n", "2", "-b", "2", "-u", "false"]
        return forks.run(self.commands.eval, words, self.folder)

    #### STATES AND CACHES

    def states(self):
        newest = runs.states.complete(self.run_dir)[0]
        paths = [os.path.relpath(os.path.join(newest, name), self.cache_dir) for name in os.listdir(newest)]
        paths += [METRICS] * 4 + ["run/config.yaml"]
        damaged = [st.tuples(st.just(path), contents(self.read(path))) for path in paths]
        manifest = next(path for path in paths if path.endswith("manifest.json"))
        damaged += [st.tuples(st.just(manifest), jsons(json.loads(self.read(manifest))))]
        rows = runs.rows_of(self.cache_dir)
        return st.one_of([*damaged, st.tuples(st.just(METRICS), jsons(rows, lines=True))])

    def of_state(self, value: tuple[str, bytes]) -> forks.Ended:
        path, data = value
        cache_dir = self.copy_of_run()
        self.write(os.path.join("cache", path), data)
        if path != METRICS:
            self.write(os.path.join("cache", METRICS), self.read(METRICS))  # it grows in place: not linked
        words = runs.words_of(cache_dir, "kto", "resume=true")
        return forks.run(self.commands.train, words, self.folder, light)

    def token_caches(self):
        root = os.path.join(self.cache_dir, ".tokens")
        names = [
            os.path.join(entry, name) for entry in os.listdir(root) for name in os.listdir(os.path.join(root, entry))
        ]
        return st.one_of([st.tuples(st.just(name), contents(self.read(".tokens", name))) for name in sorted(names)])

    def of_token_cache(self, value: tuple[str, bytes]) -> forks.Ended:
        name, data = value
        cache_dir = self.copy_of_run()
        self.write(os.path.join("cache", ".tokens", name), data)
        words = runs.words_of(cache_dir, "kto", "exp_name=other", "mode=eval")
        ended = forks.run(self.commands.train, words, self.folder, light)
        return ended if ended.code == 0 else forks.Ended(1, ended.out, f"a damaged cache ends the run: {ended.err}")


#### FORMATS


def _as_word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return (
        {None: "null", True: "true", False: "false"}.get(value, value)
        if not isinstance(value, list | dict)
        else (json.dumps(value))
    )


def _as_csv(rows: Any) -> bytes:
    rows = rows if isinstance(rows, list) else [rows]
    rows = [row if isinstance(row, dict) else {"odd": row} for row in rows]
    names = sorted({str(name) for row in rows for name in row})
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([names, *([row.get(name, "") for name in names] for row in rows)])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: Any) -> bytes:
    """Return the rows as a parquet file. Columns whose values have no common type become texts."""
    rows = rows if isinstance(rows, list) else [rows]
    rows = [row if isinstance(row, dict) else {"odd": row} for row in rows]
    columns = {}
    for name in sorted({name for row in rows for name in row}):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            columns[name] = pyarrow.array([repr(value) for value in values])
    file = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    except pyarrow.ArrowException:  # an empty structure, which parquet has no form for
        return b"PAR1"
    return file.getvalue()


def _headers(data: bytes) -> st.SearchStrategy[bytes]:
    """A file of safetensors with another header, of the right length: other types, shapes, offsets and names."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    types = st.sampled_from(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "C64", "F8_E4M3", "XX"])

    def packed(value: Any) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    def retyped(value: tuple[str, str]) -> Any:
        name, kind = value
        return {**header, name: {**header[name], "dtype": kind}}

    return st.one_of(structures(header).map(packed), st.tuples(st.sampled_from(names), types).map(retyped).map(packed))
