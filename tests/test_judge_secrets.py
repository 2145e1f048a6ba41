"""Keys and passwords: none lands in a file or in the terminal, whatever a server repeats and wherever it stands.

Before, 8 of 9 ways in which a server repeats a key ended with the key in the journal, in the page, or in the terminal.
"""

import base64
import json
import subprocess
import time
import traceback

import hydra
import pytest
from omegaconf import OmegaConf

import completions_server
from comparing import at, command, compare, environment, journal, kept, results, write_samples
from halos import run_dir, secrets, serving
from halos.errors import UserError
from halos.judge import run
from halos.judge.servers import check_address, find_key
from helpers import PROJECT
from judge_server import Settings, serve

KEY = "sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8xYz1BcD4fGh7jKm0nPq"
PASSWORD = "hunter2/pass+word"


@pytest.fixture(scope="module")
def running():
    with serve() as server:
        yield server


@pytest.fixture
def start(running, monkeypatch):
    """start(**settings): the server, which repeats the credentials of every request in every answer."""
    monkeypatch.setattr(run, "BACKOFF", (0.001, 0.002))
    monkeypatch.setattr(secrets, "_known", {})
    monkeypatch.setattr(secrets, "_pattern", None)

    def set_up(**settings):
        running.reset(**vars(Settings(**{"delay": 0.0, "echo": True, "verdict": "longer", **settings})))
        return running

    return set_up


@pytest.fixture
def samples(tmp_path):
    write_samples(tmp_path, 12)
    return tmp_path


FORMS = {
    KEY,
    KEY[:24],  # of an answer that was cut off
    base64.b64encode(KEY.encode()).decode(),
    PASSWORD,
    "hunter2%2Fpass%2Bword",
    base64.b64encode(f"me:{PASSWORD}".encode()).decode().rstrip("="),
    "s3cr3tsignature",
    "qvalue%3D123",
    "qvalue=123",
}


def leaks(directory, done) -> list[str]:
    """List where a form of a secret stands: in the output, or in a file but the samples."""
    texts = {"stdout": done.stdout, "stderr": done.stderr}
    for path in directory.rglob("*"):
        if path.is_file() and path.suffix != ".py":
            texts[path.name] = path.read_text(errors="replace")
    return [f"{form} in {name}" for name, text in texts.items() for form in FORMS if form in text]


REPORT = ("--report", "page.html", "--verbose", "--max_fail", "1")
ADDRESSES = {
    "key": "{}",
    "userinfo": "http://me:hunter2%2Fpass%2Bword@127.0.0.1:{port}/v1",
    "query": "{}?api_key=qvalue%3D123&sig=s3cr3tsignature",
    "azure": "http://127.0.0.1:{port}/openai?api-version=2024-10-21&sig=s3cr3tsignature",
}
ANSWERS = {
    "reply": {},
    "401": {"error": "invalid_api_key"},
    "403": {"error": "forbidden"},
    "404": {"error": "model_not_found"},
    "quota": {"error": "insufficient_quota"},
    "400": {"error": "content_filter"},
    "418": {"script": [418] * 99},
    "500": {"error": "server_error"},
    "429": {"error": "rate_limit_exceeded", "retry_after": 9999.0},
    "cut off": {"rate_malformed": 1.0, "broken_share": 1.0},
    "no verdict": {"message": {"role": "assistant", "content": "I cannot decide."}},
    "refusal": {"message": {"role": "assistant", "content": None, "refusal": "No."}},
}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_no_secret_is_left_anywhere(samples, start, monkeypatch, answer, address):
    monkeypatch.setattr(run, "MAX_TRIES", 2)
    server = start(**ANSWERS[answer])
    url = ADDRESSES[address].format(server.url, port=server.port)
    done = compare(samples, "--judge", "m", "--base_url", url, "-mc", "2", *REPORT, OPENAI_API_KEY=KEY)
    assert server.stats()["requests"] > 0
    assert leaks(samples, done) == []
    if answer == "reply":
        assert done.returncode == 0 and secrets.REDACTED in (samples / "page.html").read_text(), done.stderr
        assert results(samples)[0]["wins"] + results(samples)[0]["losses"] == 2
        assert all(secrets.REDACTED in record["text"] for record in kept(journal(samples), "got"))


def test_the_address_itself_is_written_without_its_secrets(samples, start):
    """Before, the password of --base_url stood in the results file, and in the command on the page."""
    server = start(echo=False)
    url = f"http://me:hunter2%2Fpass%2Bword@127.0.0.1:{server.port}/v1?sig=s3cr3tsignature"
    for words in (["--base_url", url], [f"--base_url={url}", "--dry_run"], ["--base_url", url, "--moed", url]):
        assert not leaks(samples, compare(samples, "--judge", "m", *words, "--report", "page.html"))
    (line,) = results(samples)
    assert line["settings"]["base_url"] == f"http://me:[redacted]@127.0.0.1:{server.port}/v1?sig=[redacted]"
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert server.stats()["headers"]["authorization"] == f"Basic {basic}"
    assert server.stats()["path"] == "/v1/chat/completions?sig=s3cr3tsignature"


def test_a_traceback_has_no_secret(samples, start):
    """HYDRA_FULL_ERROR=1 shows an error with all that led to it, the client's own message included."""
    server = start(error="invalid_api_key")
    variables = environment(OPENAI_API_KEY=KEY, HYDRA_FULL_ERROR="1")
    words = command(samples, *at(server))
    done = subprocess.run(words, env=variables, cwd=samples, capture_output=True, text=True)
    assert "Traceback" in done.stderr and "AuthenticationError" in done.stderr and not leaks(samples, done)


def test_a_function_that_says_the_key(samples):
    (samples / "mine.py").write_text(
        "import os\n\ndef judge(prompt, first, second):\n"
        "    raise RuntimeError('x' * 60 + ' 401 for ' + os.environ['MY_API_KEY'])\n"
        "def other(prompt, first, second):\n    return 'x' * 28 + os.environ['MY_API_KEY']\n"
    )
    for name in ("judge", "other"):
        done = compare(samples, "--judge", f"mine:{name}", *REPORT, MY_API_KEY=KEY)
        assert not leaks(samples, done) and KEY[:8] not in done.stderr
    assert all("401 for [redacted]" in record["reason"] for record in kept(journal(samples), "error")[:1])


def test_a_page_of_an_older_journal(samples, start):
    """Journals that were written before may hold a key; the page does not."""
    server = start()
    words = at(server, "--report", "page.html")
    compare(samples, *words, OPENAI_API_KEY=KEY)
    path = samples / "judgments" / "journal.jsonl"
    path.write_text(path.read_text().replace(secrets.REDACTED, KEY))
    compare(samples, *words, "--stats_only", OPENAI_API_KEY=KEY)
    assert KEY not in (samples / "page.html").read_text()


#### THE REDACTOR


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(secrets, "_known", {})
    monkeypatch.setattr(secrets, "_pattern", None)


def test_short_secrets_do_not_harm_texts(fresh):
    """A word of 4 to 7 letters is replaced as a whole word, a shorter one only where a header or address has it."""
    secrets.learn("tie", "1", "better", "correcthorse")
    said = 'tie 1 betterment better correcthorses {"verdict": "1"} Bearer tie http://me:1@h/?key=tie&a=1'
    assert secrets.redact(said) == (
        'tie 1 betterment [redacted] [redacted]s {"verdict": "1"} Bearer [redacted] '
        "http://me:[redacted]@h/?key=[redacted]&a=[redacted]"
    )


def test_placeholders_are_no_secrets(fresh):
    secrets.learn("none", "EMPTY", "", None, "  ", "local")
    assert secrets.redact("none of the empty local answers") == "none of the empty local answers"


def test_the_environment(fresh, monkeypatch):
    """Variables are known by their names, and proxies by their addresses. PATH, say, is no secret."""
    values = {"WANDB_API_KEY": "w" * 40, "HF_TOKEN": "hf_abcdefgh", "MY_PASSWORD": "pa55word!", "MONKEY": "bananas123"}
    for name, value in {**values, "HTTPS_PROXY": "http://me:proxypass@h:1"}.items():
        monkeypatch.setenv(name, value)
    secrets.learn_environment()
    said = secrets.redact(" ".join(values.values()) + " proxypass")
    assert said == "[redacted] [redacted] [redacted] bananas123 [redacted]"


def test_names_with_an_at_are_no_addresses(fresh):
    secrets.learn_urls("samples@v2.json --judge=llama3:70b@q4 me@example.com http://host/v1?api-version=2024-10-21")
    assert secrets.redact("samples llama3 me host 2024-10-21") == "samples llama3 me host 2024-10-21"


def test_exceptions_and_what_led_to_them(fresh):
    secrets.learn(KEY)
    try:
        try:
            raise KeyError(f"no {KEY}", {"body": [KEY]})
        except KeyError as error:
            error.add_note(f"with {KEY}")
            group = ExceptionGroup("several", [ValueError(KEY), OSError(2, KEY, KEY)])
            group.__cause__ = error
            raise RuntimeError(f"about {KEY}") from group
    except RuntimeError as error:
        group.__cause__.__context__ = error  # a circle
        secrets.cleanse(error)
        shown = "".join(traceback.format_exception(error))
        assert KEY not in shown and shown.count(secrets.REDACTED) >= 6


def test_a_saved_configuration(fresh):
    config = {"sampler_url": "http://user:pw@h:1/v1?token=abc", "list": ["http://h/v1"], "n": 1, "none": None}
    saved = secrets.without_urls_secrets(config)
    assert saved == {**config, "sampler_url": "http://user:[redacted]@h:1/v1?token=[redacted]"}


#### THE OTHER COMMANDS


@pytest.mark.parametrize(("errors", "said"), [([], "Bearer [redacted]"), ([400], "the test says no Bearer [redacted]")])
def test_samples_of_a_server_that_repeats_the_key(fresh, monkeypatch, errors, said):
    """Before, the key was in the sample and in its partial file, or in the message of the error."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with completions_server.serve(errors, echo=True) as other:
        url = f"{other.url}?sig=s3cr3tsignature"
        try:
            text = dict(serving.from_server(url, [serving.Request(0, [1], 4, 7)], 1, 1.0, 1.0))[0]
        except UserError as error:
            text = str(error)
    assert said in text and "/v1/completions?sig=[redacted]" in text and KEY not in text and "s3cr3t" not in text


def test_a_run_is_saved_without_the_password_of_its_server(fresh, tmp_path):
    """All else of config.yaml is as it was."""
    with hydra.initialize_config_dir(f"{PROJECT}/config", version_base="1.3"):
        words = [f"cache_dir={tmp_path}", "exp_name=run", "loss=dpo", "datasets=[demo]", "model=tiny"]
        config = hydra.compose("config", [*words, "sampler_url='http://me:pw@host:1/v1?token=abc&n=1'"])
    path = run_dir.create(config)
    saved = OmegaConf.to_container(OmegaConf.load(f"{path}/config.yaml"))
    assert saved.pop("sampler_url") == "http://me:[redacted]@host:1/v1?token=[redacted]&n=1"
    expected = OmegaConf.to_container(config, resolve=True)
    del expected["sampler_url"]
    assert saved == expected and list(saved) == list(expected)


#### ADDRESSES AND KEYS


@pytest.mark.parametrize(
    ("url", "path", "header"),
    [
        ("http://127.0.0.1:{}/openai/deployments/mine?api-version=1", "/openai/deployments/mine/{}", "api-key"),
        ("http://127.0.0.1:{}/openai?api-version=1", "/openai/deployments/m/{}", "api-key"),
        ("http://127.0.0.1:{}/openai/v1/?api-version=1", "/openai/v1/{}", "authorization"),
    ],
)
def test_the_versions_of_azure(samples, start, url, path, header):
    """Before, the path was appended to the query, and the key went into a header that Azure does not read."""
    server = start(echo=False)
    words = ["--judge", "m", "--base_url", url.format(server.port), "-mc", "2"]
    done = compare(samples, *words, AZURE_OPENAI_API_KEY=KEY, OPENAI_API_KEY="sk-another-key")
    assert done.returncode == 0, done.stderr
    stats = server.stats()
    assert stats["path"] == path.format("chat/completions?api-version=1")
    assert stats["headers"][header] == (KEY if header == "api-key" else f"Bearer {KEY}")
    assert header == "authorization" or "authorization" not in stats["headers"]


@pytest.mark.parametrize("url", ["http://[::1", "http://h:x/v1", "http://h h/v1", "http://ü..x", "http://h/\n", "h:1"])
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="is not an address"):
        check_address(url)


def test_what_is_no_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert find_key("http://h/v1") == KEY  # as of $(cat file)
    monkeypatch.setenv("OPENAI_API_KEY", "käse-und-brot")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has characters") as error:
        find_key("http://h/v1")
    assert "brot" not in str(error.value)


def test_what_a_secret_costs():
    """A reply of 8192 tokens takes less than 10 ms."""
    secrets.learn(KEY, PASSWORD)
    text = json.dumps({"text": "The response is better, and sk is a prefix. " * 800})
    began = time.perf_counter()
    secrets.redact(text)
    assert time.perf_counter() - began < 0.1
