"""The judge: which of two responses to a prompt is better, asked of a model or a Python function. docs/judging.md

    settings.py        Settings, one field per flag of compare.py
    comparison.py      compare(settings) -> summary: the whole way, and what kind of judge a name is
    samples.py         Pair; reading sample files, taking a sample of pairs, which response is shown first
    prompts.py         PromptTemplate; what a chat judge is told about a pair
    judges.py          Judge, the interface of every judge; Reply, and the three ways in which a call can fail
    functions.py       FunctionJudge, a Python function as a judge
    reward.py          RewardJudge, a reward model as a judge
    chat.py            ChatJudge, a model behind an OpenAI-compatible server: calls, parameters, errors, prices
    servers.py         addresses and keys of servers, Azure's included, and the clients for them
    completions.py     read_completion: from the body of a server's answer to a Reply
    verdicts.py        parse_verdict: from the text of a reply to 1, 2, a tie, or nothing
    units.py           Unit, one pair in one order before one judge: keys, what is missing, scores, costs
    run.py             judge_all: ask for all missing verdicts, with retries, failures and Ctrl-C
    gate.py            Gate: calls in flight, pace, pauses and budget; every call passes it
    journal.py         Journal: the append-only file of calls and verdicts
    records.py         problem_with: what a line of the journal must hold
    statistics.py      summarize: win rate, position bias, agreement, with their uncertainty
    length_control.py  the win rate at equal lengths, or why the data cannot tell it
    table.py           what a comparison leaves: the table in the terminal, and the line in the results file
    outputs.py         which files can be written, and writing them whole; devices are written to directly
    figure.py          the picture of --plot
    page.py            the page of --report
    feedback.py        export_feedback: verdicts as a dataset of preference pairs

These rooms import `errors`, `files`, `datafiles` and `secrets` of halos, and nothing else of it; nothing else of halos
imports them. openai, scipy and matplotlib are imported where they are used.
"""

from halos.judge.comparison import compare
from halos.judge.functions import FunctionJudge, is_python
from halos.judge.judges import Judge, Reply, Stop, Unanswerable, Unavailable
from halos.judge.prompts import PromptTemplate, load_template
from halos.judge.settings import Settings

__all__ = [
    "FunctionJudge",
    "Judge",
    "PromptTemplate",
    "Reply",
    "Settings",
    "Stop",
    "Unanswerable",
    "Unavailable",
    "compare",
    "is_python",
    "load_template",
]
