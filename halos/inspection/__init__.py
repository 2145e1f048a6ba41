"""Reports on the data of a loader, before any GPU hour: numbers, warnings and coloured tokens. scripts/inspect_data.py.

    numbers.py    counts of a loader's rows: datasets, truncation, lengths, tokens that packing saves
    pairs.py      length bias, duplicates, contradictions, prompts that training and test share
    alarms.py     the warnings, in words, and their thresholds
    spans.py      the tokens of a row as spans, each with its kind; which rows are worth a look
    report.py     all of these for the loaders of a run
    facts.py      the numbers in words, for both reports
    terminal.py   the report in the terminal
    histogram.py  histograms of lengths, as SVG
    page.py       the report as one HTML page; its style is in page.html
    evaluation.py       an evaluation of a run: its datasets, reward by length, the worst examples
    evaluation_page.py  these as a page

Everything is read from the loaders that train.py builds. Nothing else in halos imports these rooms.
"""
