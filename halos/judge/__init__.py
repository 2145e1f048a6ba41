"""The judge."""

from halos.judge.functions import FunctionJudge, is_python
from halos.judge.judges import Judge, Reply, Stop, Unanswerable, Unavailable
from halos.judge.prompts import PromptTemplate, load_template

__all__ = [
    "FunctionJudge",
    "Judge",
    "PromptTemplate",
    "Reply",
    "Stop",
    "Unanswerable",
    "Unavailable",
    "is_python",
    "load_template",
]
