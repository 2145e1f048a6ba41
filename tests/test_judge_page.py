"""The picture and the page: their contents, hostile texts in them, and the behaviour of the page in Chromium."""

import json
import math
import re
import shutil
import tracemalloc
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from halos.judge import figure
from halos.judge import page as page_room
from halos.judge.judges import JudgeScores
from halos.judge.samples import Pair
from halos.judge.statistics import pair_scores, summarize

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<!-- <script> --!> ]]> <svg onload=window.pwned=3>",
    "<!--TITLE--><!--NUMBERS--><!--DATA--><!--POLICY-->",
    "a & b &amp; &lt;b&gt; &#x3c;",
    "separators \u2028 and \u2029, \x00 null, \x1b escape, tab\t, return\r\nend",
    "lone surrogates \ud800 and \udfff",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and accents e" + "\u0301" * 40,
    "x" * 10_000,
    "שלום עולם, مرحبا بالعالم \u202e overridden",
    "${window.pwned = 4} {{7*7}} `\\\"'",
    "  leading spaces\n\n\nand lines\n",
    "",
]
FILTERS = ["win", "tie", "loss", "disagreement", "failure"]


def make_pairs(n: int) -> list[Pair]:
    """Make pairs of random words, the hostile texts first. Row numbers have gaps, as those of a sample have."""
    rng = np.random.default_rng(0)
    words = "water Number people (first) sound time called [down] find long part over new work".split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high)))

    pairs = [Pair(3 * i + 2, text(5, 20), text(10, 120), text(10, 100), [None, "tie"][i % 2]) for i in range(n)]
    pairs[: len(HOSTILE)] = [Pair(3 * i + 2, h, f"{h}{h}", f"baseline {h}", None) for i, h in enumerate(HOSTILE)]
    return pairs


def make_judges(n: int) -> list[JudgeScores]:
    """Make a judge that prefers the first slot, asked in both orders, and a rule that scores; both fail at times."""
    rng = np.random.default_rng(1)
    both = rng.choice([0.0, 0.5, 1.0], n)[:, None] * np.ones(2)
    both[rng.random(n) < 0.2] = (1.0, 0.0)
    both[rng.random((n, 2)) < 0.05] = np.nan
    single = np.stack([np.where(rng.random(n) < 0.6, both[:, 0], 0.25), np.full(n, np.nan)], axis=1)
    columns = np.zeros((n, 2), bool)
    columns[:, 0] = True
    return [JudgeScores("model <b>&", both, np.ones((n, 2), bool)), JudgeScores("rule", single, columns, False)]


def reply_of(judge: int, pair: int, order: int) -> str:
    return f"judge {judge}, pair {pair}, order {order}: {HOSTILE[pair % len(HOSTILE)]}"


def summary_of(pairs: list[Pair], judges: list[JudgeScores]) -> dict:
    lengths = [np.array([len(getattr(pair, side)) for pair in pairs]) for side in ("candidate", "baseline")]
    return summarize(judges, *lengths, [pair.human for pair in pairs])


def write(path, pairs: list[Pair], judges: list[JudgeScores], reply=reply_of) -> None:
    title, command = "policy </title><script>window.pwned = 5</script> \udead", "compare.py -f '<img>' && \ud801"
    page_room.write_html(str(path), title, summary_of(pairs, judges), pairs, judges, reply, command)


def sign(score: float) -> int:
    return int(score > 0.5) - int(score < 0.5)


def filters_in_words(judges: list[JudgeScores], i: int) -> set[str]:
    """Compute the filters of pair i in plain Python."""
    units = [[judge.scores[i, k] for k in (0, 1) if judge.asked[i, k]] for judge in judges]
    complete = [scores for scores in units if not any(map(math.isnan, scores))]
    orders = [{sign(score) for score in scores if not math.isnan(score)} for scores in units]
    means = [sum(scores) / len(scores) for scores in complete]
    names = set()
    if len(complete) == len(judges):
        names.add({1: "win", 0: "tie", -1: "loss"}[sign(sum(means) / len(means))])
    else:
        names.add("failure")
    if any(len(signs) > 1 for signs in orders) or len({sign(mean) for mean in means}) > 1:
        names.add("disagreement")
    return names


PAIRS = make_pairs(57)
JUDGES = make_judges(57)
WORDS = [filters_in_words(JUDGES, i) for i in range(57)]


#### WITHOUT A BROWSER


def test_filters_of_single_pairs():
    """The pairs: won twice; won when shown first only; won and tied; lost and failed; failed twice."""
    nan = np.nan
    scores = np.array([[1, 1], [1, 0], [1, 0.5], [0, nan], [nan, nan]])
    masks = page_room.filters([JudgeScores("a", scores, np.ones((5, 2), bool))])
    assert list(masks) == FILTERS
    expected = {"win": [0, 2], "tie": [1], "loss": [], "disagreement": [1, 2], "failure": [3, 4]}
    assert {name: mask.nonzero()[0].tolist() for name, mask in masks.items()} == expected


def test_two_judges_disagree_though_each_is_sure():
    """Judge a: win, win; judge b: win, loss. The second pair's mean is a tie."""
    a, b = (
        JudgeScores(name, np.array([[1.0, 1.0], [x, x]]), np.ones((2, 2), bool)) for name, x in (("a", 1), ("b", 0))
    )
    masks = page_room.filters([a, b])
    assert masks["disagreement"].tolist() == [False, True] and masks["tie"].tolist() == [False, True]


def test_an_order_that_was_not_asked_is_no_failure():
    """With --order one, each pair has one verdict, in either column."""
    scores, asked = np.array([[1, np.nan], [np.nan, 0]]), np.array([[True, False], [False, True]])
    masks = page_room.filters([JudgeScores("a", scores, asked)])
    assert masks["win"].tolist() == [True, False] and masks["loss"].tolist() == [False, True]
    assert not masks["failure"].any() and not masks["disagreement"].any()


def test_filters_count_what_the_summary_counts():
    masks, summary = page_room.filters(JUDGES), summary_of(PAIRS, JUDGES)
    counts = [int(masks[name].sum()) for name in ("win", "tie", "loss", "failure")]
    assert counts == [summary[key] for key in ("wins", "ties", "losses", "failures")] and min(counts) > 0
    for name, mask in masks.items():
        assert mask.tolist() == [name in words for words in WORDS]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)


def islands(page: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page)]


def test_texts_come_back_from_the_page_as_they_were(tmp_path, monkeypatch):
    """The page is written in islands of 20 pairs. No text became markup."""
    monkeypatch.setattr(page_room, "CHUNK", 20)
    write(tmp_path / "page.html", PAIRS, JUDGES)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    index, *chunks = islands(page)
    assert [len(chunk) for chunk in chunks] == [20, 20, 17]
    texts = [pair for chunk in chunks for pair in chunk]
    for key in ("row", "prompt", "candidate", "baseline", "human"):
        assert [text[key] for text in texts] == [getattr(pair, key) for pair in PAIRS]
    assert [text["judges"][0][1]["reply"] for text in texts] == [reply_of(0, i, 1) for i in range(57)]
    assert all(text["judges"][1][1] is None for text in texts)
    scores = np.array(index["scores"], dtype=float)
    np.testing.assert_allclose(scores, pair_scores(JUDGES), atol=1e-6)
    tags = Tags()
    tags.feed(page)
    assert tags.names.count("script") == 5 and "img" not in tags.names and tags.names.count("title") == 1


def test_page_shows_the_numbers(tmp_path):
    """45 wins, 30 losses, 25 ties are 57.5 % [49.0, 65.5]; derived in test_judge_statistics.py."""
    scores = np.repeat([1, 0, 0.5], [45, 30, 25])[:, None] * np.ones(2)
    judges = [JudgeScores("a", scores, np.ones((100, 2), bool))]
    write(tmp_path / "page.html", make_pairs(100), judges)
    text = re.sub(r"<[^>]+>", "|", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "57.5\u00a0% [49.0, 65.5]" in text and "45 / 25 / 30" in text
    assert "effective sample size 134.4" in text and "sign test p = 0.105" in text and "100 of 100" in text


def nothing(names: tuple[str, ...] = ()) -> dict:
    """Make a summary of no pairs, with None wherever a summary can have it."""
    reason = "no pair was judged"
    keys = ("win_rate", "interval", "n_eff", "decided_rate", "decided_interval", "sign_test_p", "bounds")
    counts = ("n_pairs", "n_judged", "failures", "failed_units", "wins", "losses", "ties")
    positions = ("first_slot_share", "inconsistent", "consistent", "first_twice", "second_twice", "mcnemar_p")
    summary: dict = dict.fromkeys(keys) | dict.fromkeys(counts, 0)
    fit = dict.fromkeys(("win_rate", "interval", "intercept", "slope")) | {"reason": reason}
    summary |= {"length_controlled": fit, "position": dict.fromkeys(positions) | {"reason": reason}}
    judges = [{"name": name, **nothing()} for name in names]
    agreement = {"kind": None, "kappa": None, "n": None, "reason": reason}
    human = {"n": 0, "agreement": None, "interval": None, "kappa": None, "reason": reason}
    return summary | {"judges": judges, "agreement": agreement, "human": human}


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_nothing_but_nulls(tmp_path, names):
    judges = [JudgeScores(name, np.empty((0, 2)), np.empty((0, 2), bool)) for name in names]
    page_room.write_html(str(tmp_path / "page.html"), "none", nothing(names), [], judges, reply_of, "compare.py")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert islands(page)[0]["counts"] == dict.fromkeys(FILTERS, 0)
    assert (
        "no pair was judged" in page
        and "None" not in page.split("<script")[0]
        and "nan" not in page.split("<script")[0]
    )
    figure.plot(str(tmp_path / "plot.png"), "none", nothing(names), np.empty(0), np.empty(0))
    assert image.imread(tmp_path / "plot.png").shape[1] == 1950


def test_summaries_with_all_units_failed(tmp_path):
    """Here the summary is made by `summarize`."""
    failed = [JudgeScores("a", np.full((57, 2), np.nan), np.ones((57, 2), bool))]
    write(tmp_path / "page.html", PAIRS, failed)
    summary = summary_of(PAIRS, failed)
    figure.plot(str(tmp_path / "plot.png"), "none", summary, pair_scores(failed), np.zeros(57))
    assert islands((tmp_path / "page.html").read_text(encoding="utf-8"))[0]["counts"]["failure"] == 57


def pixels_of(path) -> np.ndarray:
    """Read an image as (height, width) integers 0xRRGGBB."""
    return (255 * image.imread(path)[..., :3]).round().astype(int) @ [1 << 16, 1 << 8, 1]


@pytest.mark.parametrize("n_judges", [1, 2])
def test_plot_is_a_figure_with_the_colours_of_its_panels(tmp_path, n_judges):
    judges = JUDGES[:n_judges]
    differences = np.array([len(pair.candidate) - len(pair.baseline) for pair in PAIRS])
    path = tmp_path / "plot.png"
    title = "policy against $chosen, \\frac \ud800 100 %"  # which must not be read as a formula
    figure.plot(str(path), title, summary_of(PAIRS, judges), pair_scores(judges), differences)
    pixels = pixels_of(path)
    assert pixels.shape[1] == 1950 and 450 < pixels.shape[0] < 800
    colors = {f"#{color:06x}" for color in np.unique(pixels)}
    assert {figure.BLUE, figure.ORANGE, figure.GREY, figure.PURPLE, figure.INK} <= colors
    assert [name.name for name in tmp_path.iterdir()] == ["plot.png"]


def test_length_panel_draws_the_scores_and_the_fit(tmp_path, monkeypatch):
    """60 pairs in 5 bins of 12: the points average to the win rate, and the curve at 0 is the length-controlled one."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    pairs, rng = make_pairs(60), np.random.default_rng(2)
    differences = np.array([len(pair.candidate) - len(pair.baseline) for pair in pairs])
    won = rng.random(60) < 1 / (1 + np.exp(-differences / 300))
    judges = [JudgeScores("a", won[:, None] * np.ones(2), np.ones((60, 2), bool))]
    summary = summary_of(pairs, judges)
    figure.plot(str(tmp_path / "plot.png"), "lengths", summary, pair_scores(judges), differences)
    lines = [line.get_xydata() for line in figures[0].axes[1].lines]
    points = np.concatenate([xy for xy in lines if len(xy) == 1])
    (curve,) = (xy for xy in lines if len(xy) > 2)
    assert len(points) == 5 and points[:, 1].mean() == pytest.approx(100 * summary["win_rate"])
    assert np.interp(0, *curve.T) == pytest.approx(100 * summary["length_controlled"]["win_rate"], abs=0.05)


def test_a_page_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "page.html").write_text("older")

    def reply(judge, pair, order):
        if pair == 50:
            raise KeyError("journal")
        return "1"

    with pytest.raises(KeyError, match="journal"):
        write(tmp_path / "page.html", PAIRS, JUDGES, reply)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "older"


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """5000 pairs of 2 kB with two replies of 200 characters make a page of 12 MB. It takes less than 4 MB."""
    text = "water number " * 77
    pairs = [Pair(i + 1, "prompt", text, text) for i in range(5000)]
    judges = [JudgeScores("a", np.ones((5000, 2)), np.ones((5000, 2), bool))]
    summary = nothing(("a",))
    tracemalloc.start()
    page_room.write_html(
        str(tmp_path / "page.html"), "big", summary, pairs, judges, lambda *unit: "r" * 200, "compare.py"
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size > 12e6 and peak < 4e6


#### IN CHROMIUM


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    quiet = ("quic", "background-networking", "component-update", "sync")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=Service(executable_path=chromedriver), options=options)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The file of PAIRS in islands of 20, so that 20 sorted rows come from several islands."""
    path = tmp_path_factory.mktemp("report") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_room, "CHUNK", 20)
        write(path, PAIRS, JUDGES)
    return path


@pytest.fixture
def page(browser, path):
    """The page, loaded anew, 1280 x 900, light. At the end, no script in a text has run, and the console is empty."""
    resize(browser, 1280, 900)
    browser.get(path.as_uri())
    yield browser
    assert browser.execute_script("return window.pwned === undefined")
    assert browser.get_log("browser") == []


def resize(browser, width: int, height: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(page, selector: str):
    return page.find_element("css selector", selector)


def rows_on_page(page) -> list[int]:
    return page.execute_script("return Array.from(document.querySelectorAll('article'), a => Number(a.dataset.row))")


def all_rows(page) -> list[int]:
    """Collect the rows of all pages by clicking Next. Each page but the last is full."""
    pages = page.execute_script("""
        const rows = () => Array.from(document.querySelectorAll("article"), article => Number(article.dataset.row));
        const pages = [rows()];
        while (!document.querySelector("#next").disabled && pages.length < 9) {
            document.querySelector("#next").click();
            pages.push(rows());
        }
        return pages;
    """)
    assert all(len(rows) == 20 for rows in pages[:-1])
    return sum(pages, [])


def texts_of_articles(page, selector: str) -> list[list[str]]:
    """Read the texts of the matching elements, per pair on the page. As JSON, because of lone surrogates."""
    texts = f"Array.from(article.querySelectorAll('{selector}'), found => found.textContent)"
    articles = f"Array.from(document.querySelectorAll('article'), article => {texts})"
    return json.loads(page.execute_script(f"return JSON.stringify({articles})"))


def search(page, text: str) -> None:
    """Type into the search box, and wait for the new list."""
    page.execute_script("document.querySelector('#pairs').replaceChildren()")
    box = find(page, "#search")
    box.clear()
    box.send_keys(text)
    wait(page, "return document.querySelector('#pairs').children.length > 0")


def wait(page, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 5, poll_frequency=0.02).until(lambda driver: driver.execute_script(script))


def test_filters_show_their_rows(page):
    for name in ["all", *FILTERS, "all"]:
        expected = [pair.row for pair, words in zip(PAIRS, WORDS, strict=True) if name == "all" or name in words]
        button = find(page, f"[data-filter={name}]")
        button.click()
        assert button.text.split() == [name, str(len(expected))] and button.get_attribute("aria-pressed") == "true"
        assert all_rows(page) == expected


def test_filter_and_search_together(page):
    find(page, "[data-filter=win]").click()
    search(page, "(FIRST) sound")
    texts = [f"{pair.prompt}\n{pair.candidate}\n{pair.baseline}" for pair in PAIRS]
    found = ["(first) sound" in text for text in texts]
    expected = [pair.row for pair, hit, words in zip(PAIRS, found, WORDS, strict=True) if hit and "win" in words]
    assert 0 < len(expected) < sum(found) and all_rows(page) == expected
    marks = page.execute_script("return Array.from(document.querySelectorAll('mark'), mark => mark.textContent)")
    assert set(marks) == {"(first) sound"}
    search(page, "no such words")
    assert rows_on_page(page) == [] and "0 pairs" in find(page, "#status").text


def test_escape_clears_the_search(page):
    search(page, "window.pwned")
    assert len(rows_on_page(page)) == sum("window.pwned" in text for text in HOSTILE)
    find(page, "#search").send_keys("\ue00c")
    assert len(rows_on_page(page)) == 20 and find(page, "#search").get_attribute("value") == ""


def test_sorting(page):
    """Sort up and down: equal pairs stay in the file's order, and pairs without a score are last both times."""
    scores = pair_scores(JUDGES)
    differences = [len(pair.candidate) - len(pair.baseline) for pair in PAIRS]
    keys = {"rows": [pair.row for pair in PAIRS], "scores": scores, "differences": differences}
    for name, key in keys.items():
        find(page, f"#sort option[value={name}]").click()
        for sign in (1, -1):
            order = sorted(range(57), key=lambda i, k=key, s=sign: (np.isnan(k[i]), 0 if np.isnan(k[i]) else s * k[i]))
            assert all_rows(page) == [PAIRS[i].row for i in order]
            find(page, "#direction").click()


def test_replies_unfold(page):
    article = find(page, "article[data-row='5']")
    labels = [verdict.text for verdict in article.find_elements("css selector", ".verdict")]
    assert len(labels) == 3 and labels[0].startswith("candidate first: ") and labels[1].startswith("baseline first: ")
    reply = article.find_elements("css selector", "details")[1]
    box = reply.find_element("css selector", ".text")
    assert not box.is_displayed()
    reply.find_element("css selector", "summary").click()
    assert box.is_displayed() and box.text == reply_of(0, 1, 1)


def test_verdicts_say_who_won(page):
    """For both orders of the first judge and the one of the second, on all pairs of a page."""
    names = {1: "candidate", 0: "tie", -1: "baseline"}
    shown = texts_of_articles(page, ".verdict b")
    for i, verdicts in enumerate(shown):
        units = [JUDGES[0].scores[i, 0], JUDGES[0].scores[i, 1], JUDGES[1].scores[i, 0]]
        assert verdicts == ["no verdict" if math.isnan(score) else names[sign(score)] for score in units]
    assert len(shown) == 20


def test_hostile_texts_are_shown_as_they_are(page):
    """Character for character, as text and not as elements, and not wider than their boxes or the window."""
    shown = texts_of_articles(page, ".prompt .text, .sides .text")
    for pair, texts in zip(PAIRS[: len(HOSTILE)], shown[: len(HOSTILE)], strict=True):
        assert texts == [text or "(empty)" for text in (pair.prompt, pair.candidate, pair.baseline)]
    assert page.find_elements("css selector", "img, svg:not(.bar), #pairs script, b b") == []
    page.execute_script("for (const reply of document.querySelectorAll('details')) reply.open = true")
    for width in (1280, 400):
        resize(page, width, 900)
        wide = "Array.from(document.querySelectorAll('html, .text')).filter(box => box.scrollWidth > box.clientWidth)"
        assert page.execute_script(f"return {wide}.length") == 0, width


def test_policy_stops_a_script_that_got_in(browser, path):
    """If a text became markup, its scripts would not run and its images would not load."""
    browser.get(path.as_uri())
    browser.execute_script("""
        const script = document.createElement("script");
        script.textContent = "window.pwned = 6";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='page.png' onerror='window.pwned = 7'>");
    """)
    wait(browser, "return document.querySelector('img').complete")
    assert browser.execute_script("return window.pwned === undefined")
    refusals = [entry["message"] for entry in browser.get_log("browser")]
    assert len(refusals) >= 2 and all("Content Security Policy" in message for message in refusals)


def test_page_needs_nothing_from_elsewhere(page):
    assert page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def test_keyboard(page):
    """j and k go to the next and previous pair, also across pages; o opens replies; n and p turn pages; / searches."""
    from selenium.webdriver import ActionChains

    def focused_after(keys: str) -> int:
        ActionChains(page).send_keys(keys).perform()
        return page.execute_script("return Number(document.activeElement.dataset.row)")

    rows = [pair.row for pair in PAIRS]
    assert focused_after("jj") == rows[1]
    assert focused_after("o") == rows[1]
    assert [len(replies) for replies in texts_of_articles(page, "details[open]")] == [0, 3] + 18 * [0]
    assert focused_after("k") == rows[0]
    assert focused_after("n") == rows[20] and rows_on_page(page) == rows[20:40]
    assert focused_after("j" * 20) == rows[40] and rows_on_page(page) == rows[40:]
    assert focused_after("pp") == rows[0]
    focused_after("/jn")  # typed there, no longer commands
    assert find(page, "#search").get_attribute("value") == "jn"


def test_screenshots_are_not_blank(page, tmp_path):
    """Wide, narrow and dark screenshots have the right size and many colours, the page's own among them."""
    looks = [
        (1280, "light", 0x2B66A8, 0xF6F6F3),
        (400, "light", 0x2B66A8, 0xF6F6F3),
        (1280, "dark", 0x79B0EE, 0x131519),
    ]
    for width, scheme, candidate, paper in looks:
        resize(page, width, 900, scheme)
        page.save_screenshot(str(tmp_path / "page.png"))
        pixels = pixels_of(tmp_path / "page.png")
        assert pixels.shape == (900, width)
        assert len(np.unique(pixels)) > 50
        assert (pixels == candidate).sum() > 100 and (pixels == paper).sum() > 5000


def test_page_without_pairs(browser, tmp_path):
    judges = [JudgeScores("a", np.empty((0, 2)), np.empty((0, 2), bool))]
    page_room.write_html(str(tmp_path / "none.html"), "none", nothing(("a",)), [], judges, reply_of, "compare.py")
    browser.get((tmp_path / "none.html").as_uri())
    assert find(browser, "#pairs").text == "There are no pairs." and not find(browser, "#next").is_enabled()
    assert browser.get_log("browser") == []
