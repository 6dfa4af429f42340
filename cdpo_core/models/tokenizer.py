"""A byte-level BPE tokenizer trained on the data, for policies from scratch."""

from __future__ import annotations

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL_TOKENS = (PAD, BOS, EOS)

Pair = tuple[str, str]


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every text can be written, and decoding gives it back exactly.

    The merges are learned here and not by the tokenizers library, whose hash maps leave the order
    of equally frequent pairs to chance: equal texts, in any order, give equal files in every process.

    Args:
        texts: the training texts; repeated ones count as often as they come.
        vocabulary_size: most tokens, at least 3 special ones and 256 bytes; fewer come out when no
            pair of tokens is left that occurs twice.

    Returns:
        A fast tokenizer with <pad>, <bos>, <eos> as ids 0, 1, 2. Its own calls add <bos>.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for text, count in Counter(texts).items():
        for word, _ in splitter.pre_tokenize_str(text):
            words[word] += count
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    merges = _learn_merges(words, vocabulary, vocabulary_size)

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def _learn_merges(words: Counter[str], vocabulary: dict[str, int], size: int) -> list[Pair]:
    """Merge the most frequent pair of tokens, the alphabetically first among equals, until `size` tokens.

    Adds the new tokens to `vocabulary`.
    """
    spellings = [list(word) for word in words]
    frequency = list(words.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, spelling in enumerate(spellings):
        _count_pairs(spelling, frequency[index], index, counts, places)
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[Pair] = []
    while queue and len(vocabulary) < size:
        negative, pair = heapq.heappop(queue)
        if -negative != counts[pair]:
            continue  # an older count of this pair; the present one is further down the queue
        if -negative < 2:
            break
        merges.append(pair)
        vocabulary.setdefault(pair[0] + pair[1], len(vocabulary))
        changed: Counter[Pair] = Counter()
        for index in places.pop(pair):
            _count_pairs(spellings[index], -frequency[index], index, changed, places)
            spellings[index] = _merged(spellings[index], pair)
            _count_pairs(spellings[index], frequency[index], index, changed, places)
        for other, change in changed.items():
            if change:
                counts[other] += change
                heapq.heappush(queue, (-counts[other], other))
    return merges


def _count_pairs(
    spelling: list[str], frequency: int, index: int, counts: Counter[Pair], places: defaultdict[Pair, set[int]]
) -> None:
    for pair in pairwise(spelling):
        counts[pair] += frequency
        places[pair].add(index)


def _merged(spelling: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(spelling):
        if tuple(spelling[position : position + 2]) == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(spelling[position])
            position += 1
    return merged
