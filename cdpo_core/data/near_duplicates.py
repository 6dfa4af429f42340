"""Units: prompts that are one question in several spellings, or that the data itself calls one group.

Two hundred questions in six spellings each are not 1,200 independent prompts: what a policy does with one spelling it
does with the others. Such prompts stay on one side of every split and count as one in every interval and test.

Prompts are compared as sets of words (case, accents and punctuation gone, courtesies left out, slips of one letter
undone), a word weighing log2(N/n)² where n of the N different prompts have it. So a template's own words, or an
instruction that stands before every question, weigh next to nothing, and two questions of one template that differ in
the word that matters stay apart. The similarity is the weighted Jaccard index: what the shared words weigh, as a share
of what the words of either weigh.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from cdpo_core.randomness import numpy_stream

PERMUTATIONS: Final = 128
# Of the errors of the search, a pair that it misses is the dearer one: the others are compared and turned away.
SEARCH_WEIGHTS: Final = (0.1, 0.9)
HIGHEST_SEARCHED: Final = 0.99
"""From a higher similarity on the library has no bands; what it finds is compared with the one asked for anyway."""

SLIP_LETTERS: Final = 4
"""Fewest letters of a word in which a slip of one letter is undone."""

SLIP_RATIO: Final = 4
"""How many times as often the right word must occur as the one with the slip; `boats` beside `boots` are two words."""

COURTESIES: Final = frozenset(["please", "pls", "plz", "kindly", "hi", "hello", "hey", "thanks", "thank", "dear"])
# Scripts that put no space between words (Chinese, Japanese, Thai, ...): each character counts as a word.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_APOSTROPHES: Final = re.compile("['\u2019\u02bc`]")


def prompt_units(
    prompt_ids: Sequence[str], prompts: Sequence[str], groups: Mapping[str, Iterable[str]], threshold: float
) -> list[str]:
    """The unit of each prompt: the connected components of near duplicates and of explicit groups.

    Args:
        prompt_ids: [P] distinct ids.
        prompts: [P] their texts.
        groups: prompt id -> names of the groups that the data puts it in; prompts that share one are one unit.
        threshold: similarity in (0, 1] from which two prompts are near duplicates; 0 looks for none.

    Returns:
        [P] labels: the smallest prompt id of the unit, so that they hang on content alone.
    """
    names = list(prompt_ids)
    sets = DisjointSet(range(len(names)))
    members: dict[str, int] = {}
    place = {name: index for index, name in enumerate(names)}
    for name, labels in groups.items():
        for label in labels:
            sets.merge(members.setdefault(label, place[name]), place[name])
    if threshold > 0:
        for left, right in near_duplicates(prompts, threshold, sets):
            sets.merge(left, right)
    first: dict[int, str] = {}
    for index, name in enumerate(names):
        root = sets[index]
        first[root] = min(first.get(root, name), name)
    return [first[sets[index]] for index in range(len(names))]


def near_duplicates(
    prompts: Sequence[str], threshold: float, joined: DisjointSet | None = None
) -> Iterator[tuple[int, int]]:
    """Pairs of places in `prompts` whose similarity is at least `threshold`.

    Enough of them that their connected components are all near duplicates': of prompts with the same words each is
    paired with the next one. Other pairs are found by MinHash and locality-sensitive hashing (Broder 1997; library
    datasketch), which at the threshold itself misses a few in a hundred, and are then compared exactly.

    Args:
        prompts: texts.
        threshold: in (0, 1].
        joined: what is joined already, which need not be compared again.
    """
    texts = _without_slips([words_of(prompt) for prompt in prompts])
    same: dict[frozenset[str], list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        if text:
            same[text].append(index)
    for places in same.values():
        yield from pairwise(places)
    distinct = [(words, places[0]) for words, places in same.items()]
    weights = word_weights([words for words, _ in distinct])
    known = dict(distinct)
    sets = joined or DisjointSet(range(len(prompts)))
    ordered = list(known)
    for left, right in _candidates(ordered, weights, threshold):
        first, second = known[ordered[left]], known[ordered[right]]
        if not sets.connected(first, second) and similarity(ordered[left], ordered[right], weights) >= threshold:
            sets.merge(first, second)
            yield first, second


def words_of(prompt: str) -> list[str]:
    """The words that two spellings of a question share: folded, without accents, punctuation and courtesies."""
    folded = unicodedata.normalize("NFKD", _APOSTROPHES.sub("", prompt).casefold())
    plain = "".join(letter for letter in folded if not unicodedata.combining(letter))
    words = _WORD.findall(unicodedata.normalize("NFC", plain))
    return [word for word in words if word not in COURTESIES] or words


def word_weights(texts: Sequence[Iterable[str]]) -> dict[str, float]:
    """log2(N/n)² of each word that n of the N texts have: 0 for a word that all have."""
    counts = Counter(word for text in texts for word in text)
    return {word: float(np.log2(len(texts) / count)) ** 2 for word, count in counts.items()}


def similarity(left: frozenset[str], right: frozenset[str], weights: Mapping[str, float]) -> float:
    """The weighted Jaccard index, in [0, 1]; 0 where no word of either weighs anything."""
    shared = sum(weights[word] for word in sorted(left & right))
    whole = shared + sum(weights[word] for word in sorted(left ^ right))
    return shared / whole if whole > 0 else 0.0


def _without_slips(texts: Sequence[Sequence[str]]) -> list[frozenset[str]]:
    """The texts' words, rare ones replaced by a much commoner one that is a slip of one letter away.

    Two words are, if they become equal when each loses at most one letter: one letter too many, too few, another one,
    or two that changed places. Words with digits in them stay as they are.
    """
    counts = Counter(word for text in texts for word in set(text))
    alike: dict[str, list[str]] = defaultdict(list)
    for word in counts:
        if len(word) >= SLIP_LETTERS and word.isalpha():
            for form in {word, *(word[:at] + word[at + 1 :] for at in range(len(word)))}:
                alike[form].append(word)
    meant: dict[str, str] = {}
    for words in alike.values():
        best = min(words, key=lambda word: (-counts[word], word))
        for word in words:
            known = meant.get(word, word)
            if counts[best] >= SLIP_RATIO * counts[word] and (-counts[best], best) < (-counts[known], known):
                meant[word] = best
    return [frozenset(meant.get(word, word) for word in text) for text in texts]


def _candidates(
    texts: Sequence[frozenset[str]], weights: Mapping[str, float], threshold: float
) -> Iterator[tuple[int, int]]:
    """Pairs that collide in a band of their signatures.

    A signature holds, for each of PERMUTATIONS draws, the word of the text with the earliest exponential time at a
    rate of its weight; two texts agree in one with a probability of their weighted Jaccard index.
    """
    from datasketch import MinHash, MinHashLSH

    vocabulary = {word: index for index, word in enumerate(sorted(word for word, w in weights.items() if w > 0))}
    rates = np.array([weights[word] for word in vocabulary], dtype=np.float32)
    generator = numpy_stream(0, "near duplicates")
    times = generator.standard_exponential((len(vocabulary), PERMUTATIONS), dtype=np.float32) / rates[:, None]
    search = MinHashLSH(threshold=min(threshold, HIGHEST_SEARCHED), num_perm=PERMUTATIONS, weights=SEARCH_WEIGHTS)
    for index, text in enumerate(texts):
        rows = np.array(sorted(vocabulary[word] for word in text if word in vocabulary), dtype=np.int64)
        if not len(rows):
            continue
        signature = MinHash(num_perm=PERMUTATIONS, hashvalues=rows[times[rows].argmin(axis=0)])
        for other in sorted(search.query(signature)):
            yield other, index
        search.insert(index, signature, check_duplication=False)
