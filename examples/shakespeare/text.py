"""The words of the sonnets, and batches of contexts with the word that comes next."""

import re
from pathlib import Path

import numpy as np

CONTEXT, BATCH = 8, 64


def read():
    """Returns the words that there are, in alphabetical order, and the text as their numbers, int32 ``[words]``."""
    text = re.findall(r"[a-z'-]+|[.,:;!?]", Path(__file__).with_name("sonnets.txt").read_text().lower())
    words = sorted(set(text))
    number = {word: i for i, word in enumerate(words)}
    return words, np.array([number[word] for word in text], np.int32)


def batches(text, first, steps):
    """Yields step, ids ``[BATCH * CONTEXT, 1]``, a row for each word of each context, and the next words ``[BATCH]``.

    A step has the same batch whenever training comes to it.
    """
    for step in range(first, first + steps):
        begin = np.random.default_rng(step).choice(len(text) - CONTEXT, BATCH, replace=False)
        yield step, text[begin[:, None] + np.arange(CONTEXT)].reshape(-1, 1), text[begin + CONTEXT]
