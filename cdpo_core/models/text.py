"""A model's own text conventions: turns, beginnings, ends and dates, and which words are never control words.

All of it is taken from the tokenizer, its chat template and the generation config. What a template writes may hold
control words; what a user or a model said never does, whatever it looks like: "<|im_end|>" in a prompt is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from cdpo_core.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CHAT = "chat"
PLAIN = "{prompt}"
# Stand-ins by which a chat template shows where it writes the words of a turn.
STAND_INS = ("XquartzX", "XwindowX")
ROLES = ("user", "assistant")
# Around the names that control words get where only the template's own count: a private-use character no text needs.
PRIVATE = "\ue000"

Frame = tuple[str, ...]
"""A text in pieces: template, words, template (, words, template): every second piece is somebody's words."""


class Written(NamedTuple):
    """One text as tokens.

    Attributes:
        tokens: what the model reads.
        cut: tokens left out of the first words (at their left end) and of the second (at their right end).
        words: tokens of the first words that are left.
    """

    tokens: list[int]
    cut: tuple[int, int]
    words: int


class TextWriter:
    """Writes texts as tokens as its tokenizer does, with nobody's words becoming control tokens.

    Args:
        tokenizer: the model's.
        template: a template of the user's, beside the chat template.
        ends: ids that end a response.

    Attributes:
        control: control words -> ids: special tokens, and added ones that a template writes or that end a response.
        start: the tokens that the tokenizer's own call puts in front of a text (BOS, or nothing).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "", ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.template, self.ends = tokenizer, template, frozenset(ends)
        self._expected: dict[Frame, int] = {}

    @cached_property
    def control(self) -> dict[str, int]:
        """Control words -> ids, the longest first."""
        written = self.template + _written_by(self.tokenizer)
        words = {
            token.content: number
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special or number in self.ends or (token.content in written and not token.content.isspace())
        }
        return {word: words[word] for word in sorted(words, key=lambda word: (-len(word), word))}

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer's own call puts in front."""
        whole, bare = self.tokenizer("a")["input_ids"], self._plainly(["a"])[0]
        places = range(len(whole) - len(bare) + 1)
        return next((list(whole[:at]) for at in places if list(whole[at : at + len(bare)]) == bare), [])

    def write(self, frames: Sequence[Frame], limit: int = 0, *, own_start: bool = False) -> list[Written]:
        """Tokens of each frame, equal to the tokenizer's own of the whole text unless words hold control words.

        Args:
            frames: the texts in pieces.
            limit: most tokens; too long a text loses tokens of its first words from the left and, when none is left,
                of its second from the right, never of the template. 0 is no limit.
            own_start: put `start` in front, unless the template has written it.
        """
        rows = self._plainly(["".join(frame) for frame in frames])
        written = []
        for frame, row in zip(frames, rows, strict=True):
            ids, owners = row, None
            if self._is_spoken(frame[1::2]) or self._count(row) != self._count_of(frame[::2]):
                ids, owners = self._apart(frame)
            start = self.start if own_start and ids[: len(self.start)] != self.start else []
            over = len(start) + len(ids) - limit if limit else 0
            if over > 0:
                kept = _shortened(owners or self._owners(frame), over)
                written.append(Written([*start, *(ids[place] for place in kept.places)], kept.cut, kept.words))
            else:
                written.append(Written([*start, *ids], (0, 0), len(ids)))
        return written

    def words(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of somebody's words alone."""
        return [written.tokens for written in self.write([("", text, "") for text in texts])]

    def pairs(self, firsts: Sequence[str], seconds: Sequence[str], limit: int) -> list[tuple[Written, int]]:
        """The tokenizer's own sentence pairs with their special tokens, and where the second begins by its type ids.

        Too long a pair loses tokens of the first text from the left, then of the second from the right.
        """
        if not firsts:
            return []
        found = self.tokenizer(list(firsts), list(seconds), return_token_type_ids=True)
        written = []
        for row, texts in enumerate(zip(firsts, seconds, strict=True)):
            ids, types = found["input_ids"][row], found["token_type_ids"][row]
            if self.tokenizer.is_fast:
                owners = [0 if owner is None else 2 * owner + 1 for owner in found.sequence_ids(row)]
            else:
                owners = [0 if one in self._control_ids else 2 * kind + 1 for one, kind in zip(ids, types, strict=True)]
            said = [number for number, owner in zip(ids, owners, strict=True) if owner]
            if self._is_spoken(texts) or self._count(said):
                encoding = self._renamed.encode(*texts)
                ids, types = encoding.ids, encoding.type_ids
                owners = [0 if owner is None else 2 * owner + 1 for owner in encoding.sequence_ids]
            kept = _shortened(owners, max(len(ids) - limit, 0))
            types = [types[place] for place in kept.places]
            first = types.index(1) if 1 in types else len(types)
            written.append((Written([ids[place] for place in kept.places], kept.cut, kept.words), first))
        return written

    def _plainly(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        # What a tokenizer cannot write at all becomes its unknown token, which is then no control token.
        return frozenset(self.control.values()) - ({self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id})

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control)) or "(?!)")

    def _is_spoken(self, words: Sequence[str]) -> bool:
        return any(self._pattern.search(text) for text in words)

    def _count(self, ids: Sequence[int]) -> int:
        return sum(number in self._control_ids for number in ids)

    def _count_of(self, pieces: Frame) -> int:
        """Control tokens that the template's pieces hold."""
        if pieces not in self._expected:
            self._expected[pieces] = sum(map(self._count, self._plainly([piece for piece in pieces if piece])))
        return self._expected[pieces]

    @cached_property
    def _renamed(self) -> Tokenizer:
        """The tokenizer with its control words under private names, so that no text but a template's holds one."""
        from tokenizers import Tokenizer

        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = self._names
        for token in content["added_tokens"]:
            if token["content"] in names:
                token |= {"content": names[token["content"]], "normalized": False}
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): number for word, number in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))

    @cached_property
    def _names(self) -> dict[str, str]:
        return {word: f"{PRIVATE}{number}{PRIVATE}" for word, number in self.control.items()}

    def _apart(self, frame: Frame) -> tuple[list[int], list[int]]:
        """Tokens of a frame whose words hold control words, and the piece that each token belongs to."""
        if not self.tokenizer.is_fast:
            return self._in_pieces(frame)
        pieces = [
            piece.replace(PRIVATE, "\ufffd") if at % 2 else self._pattern.sub(lambda m: self._names[m[0]], piece)
            for at, piece in enumerate(frame)
        ]
        encoding = self._renamed.encode("".join(pieces), add_special_tokens=False)
        return encoding.ids, _owners(pieces, encoding.offsets)

    def _owners(self, frame: Frame) -> list[int]:
        """The piece that each token of the whole text belongs to."""
        if not self.tokenizer.is_fast:
            return self._in_pieces(frame)[1]
        found = self.tokenizer("".join(frame), add_special_tokens=False, return_offsets_mapping=True)
        return _owners(frame, found["offset_mapping"])

    def _in_pieces(self, frame: Frame) -> tuple[list[int], list[int]]:
        """The pieces one after the other, for tokenizers that do not say where in a text a token stands."""
        ids: list[int] = []
        owners: list[int] = []
        for at, piece in enumerate(frame):
            said = bool(at % 2)
            tokens = self.tokenizer(piece, add_special_tokens=False, split_special_tokens=said)["input_ids"]
            tokens = [number for number in tokens if not (said and number in self._control_ids)]
            ids += tokens
            owners += [at] * len(tokens)
        return ids, owners


class _Kept(NamedTuple):
    places: list[int]
    cut: tuple[int, int]
    words: int


def _shortened(owners: Sequence[int], over: int) -> _Kept:
    """The places that are left when `over` tokens go: of piece 1 from the left, then of piece 3 from the right."""
    first = [place for place, owner in enumerate(owners) if owner == 1]
    second = [place for place, owner in enumerate(owners) if owner == 3]
    early = min(over, len(first))
    late = min(over - early, len(second))
    gone = {*first[:early], *second[len(second) - late :]}
    return _Kept([place for place in range(len(owners)) if place not in gone], (early, late), len(first) - early)


def _owners(pieces: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token its piece: the words that it overlaps, else a template's (0)."""
    spans, end = [], 0
    for at, piece in enumerate(pieces):
        if at % 2:
            spans.append((at, end, end + len(piece)))
        end += len(piece)
    return [next((at for at, low, high in spans if first < high and last > low), 0) for first, last in offsets]


def prompt_frames(tokenizer: PreTrainedTokenizerBase, template: str, prompts: Sequence[str]) -> list[Frame]:
    """Each prompt within its template, ready for the answer.

    Raises:
        InputError: as `chat_frames`.
    """
    if template == CHAT:
        return chat_frames(tokenizer, [(prompt,) for prompt in prompts], generation=True)
    before, after = template.split(PLAIN)
    return [(before, prompt, after) for prompt in prompts]


def chat_frames(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, ...]], *, generation: bool = False
) -> list[Frame]:
    """Conversations by the tokenizer's chat template, in pieces.

    Args:
        tokenizer: has a chat template.
        turns: for each conversation the user's words (, the assistant's).
        generation: let the template write the head of the assistant's next turn.

    Raises:
        InputError: the template refuses a conversation, or does not write each turn's words once.
    """
    if not turns:
        return []
    shown = STAND_INS[: len(turns[0])]
    sample, *texts = _rendered(tokenizer, [shown, *turns], generation)
    if any(sample.count(word) != 1 for word in shown):
        raise InputError(
            "the chat template does not write the words of each turn once",
            where="the tokenizer's chat template",
            fix="set policy.template to a text with {prompt} in it",
        )
    pieces = re.split("|".join(shown), sample)
    return [_framed(text, pieces, words) for text, words in zip(texts, turns, strict=True)]


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Frame], generation: bool) -> list[str]:
    conversations = [
        [{"role": role, "content": words} for role, words in zip(ROLES, conversation, strict=False)]
        for conversation in turns
    ]
    try:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=generation)
    except Exception as error:  # a template's code may raise anything
        raise InputError(
            f"the chat template refuses a conversation: {next(iter(str(error).splitlines()), type(error).__name__)}",
            where="the tokenizer's chat template",
            fix="set policy.template to a text with {prompt} in it",
        ) from error
    return [str(text) for text in texts]


def _written_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's source, and what it makes of a conversation: control words may be put together there."""
    template = tokenizer.chat_template
    if not template:
        return ""
    source = template if isinstance(template, str) else "".join(template.values())
    try:
        return source + "".join(_rendered(tokenizer, [STAND_INS, STAND_INS[:1]], True))
    except InputError:
        return source


def _framed(text: str, pieces: Sequence[str], words: Frame) -> Frame:
    """A rendered conversation in pieces: where it is not the template's around stand-ins, all that differs is words."""
    head = _common(text, pieces[0])
    tail = _common(text[head:][::-1], pieces[-1][::-1])
    inside = text[head : len(text) - tail]
    before, after = text[:head], text[len(text) - tail :]
    if len(words) == 1:
        return before, inside, after
    middle = pieces[1]
    for first in (words[0], words[0].strip(), words[0].rstrip(), words[0].lstrip()):
        if inside.startswith(first + middle):
            return before, first, middle, inside[len(first + middle) :], after
    first, middle, second = inside.partition(middle)
    return before, first, middle, second, after


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    if one.startswith(other):
        return len(other)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template ends an assistant's turn with; None when it writes nothing there.

    Raises:
        InputError: it ends turns with text, at which no sampling can stop; or as `chat_frames`.
    """
    (frame,) = chat_frames(tokenizer, [STAND_INS])
    after = frame[-1].strip()
    added = sorted(tokenizer.added_tokens_decoder.items(), key=lambda item: -len(item[1].content))
    for number, token in added:
        if token.content.strip() and after.startswith(token.content.strip()):
            return int(number)
    if _rendered(tokenizer, [STAND_INS], True) == _rendered(tokenizer, [STAND_INS], False):
        # It always writes the head of a next turn, which is no end.
        after = frame[-1].partition("\n")[0].strip()
    if not after:
        return None
    raise InputError(
        f"the chat template ends the model's turns with text ({after[:40]!r}) and not with one token, so nothing says "
        "where a response ends",
        where="policy.template = chat",
        fix="use a model whose template ends turns with a token of the tokenizer's, or set policy.template to a text "
        "with {prompt} in it: responses then end with EOS",
    )


def declared_ends(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids at which the model's own generate() stops.

    Where no generation config came with the model, transformers makes one of config.json, whose id may be its
    class's default and an ordinary word here: such a one counts only as a token that was added to the tokenizer.
    """
    given = getattr(generation_config, "eos_token_id", None)
    ids = [] if given is None else [given] if isinstance(given, int) else list(given)
    if getattr(generation_config, "_from_model_config", False):
        ids = [number for number in ids if number in tokenizer.added_tokens_decoder]
    return tuple(sorted({int(number) for number in ids}))
