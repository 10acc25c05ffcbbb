"""Reading a chosen option out of what a model wrote, where a benchmark has no rules of its own."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What may follow a letter that could also be an article: "A is right", but not "A man".
_GOES_ON = "as because based due for if is looks makes matches seems since was which would"
_JOINS = r"(?:,|/|&|\+|or|nor|and|oder|und|ou|et|y|e|或|和|と|и)"
_JOINED = re.compile(rf"[)\]]*\s*(?:,\s*)?{_JOINS}\s*(?:the\s+|an?\s+)?[(\[]*", re.IGNORECASE)
_NEAR = 60  # characters within which words belong to what they stand beside
_ANSWER = r"""
    (?:answers?|solution|(?:best|correct|right|final|my)\s+(?:option|choice|one|letter))
        (?:\s+(?:to\s+th\w+\s+question|here|letter|option|choice))*\s*
        (?:is|are|was|=|:|[-=]>|→|–|(?:would|should|must|has\s+to|seems\s+to|appears\s+to)\s+be)+
    | \b(?:i|we)(?:\s+(?:would|will|shall|must|have\s+to)|['’](?:d|ll))?\s+
        (?:choose|chose|pick|select|say|guess|answer|take|go\s+(?:with|for)|vote\s+for)
    | respuesta(?:\s+correcta)?\s*(?:es|:) | opción\s+correcta\s*(?:es|:)
    | r[ée]ponse(?:\s+(?:correcte|juste))?\s*(?:est|:) | (?:richtige\s+)?antwort\s*(?:ist|lautet|:)
    | risposta(?:\s+(?:corretta|giusta))?\s*(?:è|:) | resposta(?:\s+correta)?\s*(?:é|:)
    | (?:правильный\s+)?ответ\s*(?:[:—–-]|это|-\s*это)?
    | 答案(?:应该|應該)?\s*(?:是|为|為|选|選|:)? | (?:我)?(?:选|選)(?:择|擇)?(?:项|項)?\s*(?:是|:)?
    | (?:正解|答え)\s*(?:は|:)? | (?:정답|답)\s*(?:은|:)? | उत्तर\s*(?:है|:)? | الإجابة\s*(?:هي|:)?
"""
_NAMED = r"(?:option|choice|letter|opción|opcion|réponse|antwort|la|le|die|a)"
_AFTER_ANSWER = re.compile(rf"(?:{_ANSWER})\s*(?:the\s+)?(?:{_NAMED}\s+)?:?\s*", re.IGNORECASE | re.VERBOSE)
_NOT_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|no|except|without|excluding|unlike|nicht|kein\w*|pas|instead\s+of|rather\s+than"
    r"|other\s+than|rul\w+\s+out|eliminat\w+|reject\w*)|n['’]t|不是|不选|不選)\s*"
    r"(?:\b(?:the|an?|be|is|really|likely|probably|answer|options?|choices?|either|in)\s+)*[\"'“‘(\[]*$",
    re.IGNORECASE,
)
_NOT_BEHIND = re.compile(
    r"[\"'”’)\]]*\s+(?:is|are|was|seems|looks|would\s+be|can)(?:n['’]t|not|\s+(?:not|wrong|incorrect|false|out\b|ruled"
    r"|excluded|impossible|unlikely))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Mention:
    """An option that a text names, between two places of it."""

    option: int
    start: int
    end: int


def parse_option(text: str, options: Sequence[str]) -> int | None:
    """The index of the option that ``text`` chooses; None if it chooses none, or more than one.

    The first of these rules that applies decides. Case, width (NFKC), markup (Markdown, LaTeX, quotes) and outer
    punctuation do not count; of a text with ``<think>``, what is thought does not; of one with ``<answer>`` or
    ``\\boxed``, only what stands in the last of them counts. A letter counts if there is an option of that letter.

    1. The text is an option's words and nothing else, the option's own label ("(A) …") left out.
    2. It is a letter and nothing else: "b", "(B)", "B.", "**B**".
    3. It says what the answer is, in some language: "The answer is B", "I'd say (b)", "答案是B". The last time counts.
    4. It begins with a letter as a label: "(B) …", "B. …", "B: …", "B - …", a line that is a letter, "B, …",
       "B because …". The letter is taken, whatever words follow. Several labelled lines are no choice.
    5. What it names otherwise: letters in brackets, in bold, or called "option B"; if none, options by their words,
       whole words only, the longest where one holds another ("dark red" is not "red"); if none, capital letters that
       stand alone. Where one of these names several options, the next ones decide between them; if they do not, there
       is no choice.

    An article is no letter: "a" and "A" before a word ("A man"), and "I", count only in brackets, as a label, or where
    the sentence goes on as behind a noun ("A is right"). What is denied is not named ("not B", "C is wrong", "neither
    red nor blue"). Several letters as one answer ("A or C") are no choice.
    """
    text = _plain(text)
    words = _words_of(tuple(options))
    if (found := _same_words(text, words)) is not None:
        return found
    letter = re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", text)
    if letter:
        return _index(letter[1], len(options))
    for rule in (_after_answer, _labels):
        named = rule(text, len(options))
        if named:
            return named[0].option if len({m.option for m in named}) == 1 else None
    chosen: set[int] = set()
    for found in (_marked(text, len(options)), _named(text, words), _alone(text, len(options))):
        options_named = {mention.option for mention in _affirmed(text, found)}
        chosen = (chosen & options_named or chosen) if chosen else options_named
        if len(chosen) == 1:
            return chosen.pop()
    return None


def parse_words(text: str, options: Sequence[str]) -> int | None:
    """The option that ``text`` consists of, whatever its case; None if it is none of them."""
    return _same_words(_plain(text), _words_of(tuple(options)))


# --- text without what is not said ------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """What is said, without markup. Emphasised and quoted single letters stand in brackets."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"<(think(?:ing)?)>.*?(?:</\1>|\Z)", " ", text, flags=re.DOTALL | re.IGNORECASE)
    text = re.split(r"</think(?:ing)?>", text, flags=re.IGNORECASE)[-1]
    for pattern in (r"<answer>(.*?)(?:</answer>|\Z)", r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"):
        held = re.findall(pattern, text, flags=re.DOTALL | re.IGNORECASE)
        text = held[-1] if held else text
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|emph)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(\*\*|__|[`\"'“‘«])\s*([A-Za-z])\s*[.:)]?\s*(?:\*\*|__|[`\"'”’»])(?!\w)", r"(\2)", text)
    text = re.sub(r"(?<!\w)_+|_+(?!\w)|[*`$\\]|^\s*(?:#+|>)\s*", "", text, flags=re.MULTILINE)
    return text.strip()


@lru_cache(maxsize=1024)  # every arm is asked the same questions
def _words_of(options: tuple[str, ...]) -> list[str]:
    """The options' words; where every option begins with its own letter as a label, without it."""
    label = r"\s*[(\[]?{}\s*[.):\]]+\s*"
    own = [re.match(label.format(LETTERS[i]), option) for i, option in enumerate(options[: len(LETTERS)])]
    if own and all(own):
        options = [option[match.end() :] or option for option, match in zip(options, own)]
    return [_words(_plain(option)) for option in options]


def _words(text: str) -> str:
    """Case folded, on one line, without outer punctuation (but for signs of numbers)."""
    text = re.sub(r"[\"“”«»]", "", " ".join(text.casefold().split()))
    return re.sub(r"^[^\w+\-−%$€£°]+|[^\w%$€£°+]+$", "", text) or text


def _same_words(text: str, words: Sequence[str]) -> int | None:
    said = _words(text)
    return next((number for number, option in enumerate(words) if option and option == said), None)


def _index(letter: str, num_options: int) -> int | None:
    found = LETTERS.find(letter.upper())
    return found if 0 <= found < num_options else None


# --- what is named where ----------------------------------------------------------------------------------------------


def _after_answer(text: str, num_options: int) -> list[_Mention]:
    """The letter, or letters, behind the last words that say what the answer is."""
    for said in reversed(list(_AFTER_ANSWER.finditer(text))):
        found = _letters(text, said.end(), num_options)
        if found and not _NOT_BEHIND.match(text, found[-1].end):
            return found
    return []


def _letters(text: str, place: int, num_options: int) -> list[_Mention]:
    """Letters that stand at a place, joined as in "A or C"."""
    found: list[_Mention] = []
    while letter := re.compile(r"\s*([(\[]?)([A-Za-z])(?:(?<=[(\[].)[)\]])?").match(text, place):
        option, end = _index(letter[2], num_options), letter.end()
        if option is None or not (letter[1] or _is_letter(text, letter.start(2))):
            break
        found.append(_Mention(option, letter.start(2), end))
        joined = re.compile(rf"[)\].]*\s*{_JOINS}\s*(?:option\s+)?(?=[(\[]?[A-Za-z](?![A-Za-z]))", re.I).match(
            text, end
        )
        if not joined:
            break
        place = joined.end()
    return found


def _is_letter(text: str, place: int) -> bool:
    """Whether a bare letter is neither part of a word nor an article or pronoun."""
    before, letter, behind = text[:place][-2:], text[place], text[place + 1 :]
    if re.search(r"[A-Za-z0-9_À-ɏ'’-]\Z|\w\.\Z", before) or re.match(r"[A-Za-z0-9_À-ɏ'’]|[-.][A-Za-z0-9]\W?", behind):
        return False
    word = re.match(r"[ \t]+([^\W\d_]+)", behind)
    if not word or (letter.isupper() and letter not in "AI"):
        return True
    joined = re.match(rf"[ \t]+{_JOINS}\s+[(\[]?[A-Za-z][)\]]?(?![A-Za-z])", behind)
    return bool(joined) or word[1].casefold() in (("is",) if letter in "Ii" else _GOES_ON.split())


_LABEL = re.compile(
    r"^[\s\-•]*(?:[(\[]([A-Za-z])[)\]][.:,)]?(?=\s|\w|$)|([A-Za-z])(?:[):](?!\d)|\.(?=\s|$|\w{2}))"
    r"|([B-HJ-Z])(?:[ \t]+[-–—]+(?=\s)|,(?=\s))|(A)(?:[ \t]+[-–—]+(?=\s)|,(?=\s))|([A-Za-z])[ \t]*$)",
    re.MULTILINE,
)


def _labels(text: str, num_options: int) -> list[_Mention]:
    """The letter that the text begins with, or those that its lines do; nothing if the first line has none."""
    found = []
    for label in _LABEL.finditer(text):
        letter = next(group for group in label.groups() if group)
        option = _index(letter, num_options)
        if option is not None:
            found.append(_Mention(option, label.start(), label.end()))
    if found and found[0].start == 0:
        joined = _letters(text, 0, num_options)
        if joined and _NOT_BEHIND.match(text, joined[-1].end):
            return []
        return [*found, *joined]
    goes_on = re.match(rf"([A-Z])\s+(?:{'|'.join(_GOES_ON.split())})\b", text)
    option = _index(goes_on[1], num_options) if goes_on else None
    if option is None or goes_on[1] == "I" or _NOT_BEHIND.match(text, 1):
        return []
    return [_Mention(option, 0, 1)]


def _marked(text: str, num_options: int) -> list[_Mention]:
    """Letters in brackets, or called an option."""
    marked = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]|\b(?:option|choice|letter)\s+([A-Za-z])(?![\w'’-])", re.IGNORECASE)
    found = ((_index(m[1] or m[2], num_options), m) for m in marked.finditer(text))
    return [_Mention(option, m.start(), m.end()) for option, m in found if option is not None]


def _alone(text: str, num_options: int) -> list[_Mention]:
    """Capital letters that stand alone."""
    found = ((_index(m[0], num_options), m) for m in re.finditer("[A-Z]", text))
    return [
        _Mention(option, m.start(), m.end())
        for option, m in found
        if option is not None and _is_letter(text, m.start())
    ]


def _named(text: str, words: Sequence[str]) -> list[_Mention]:
    """Options whose words stand in the text, but for those within the words of a longer one."""
    text = text.casefold()
    found = []
    for option, said in enumerate(words):
        if said and not re.fullmatch(r"[a-z]", said) and words.index(said) == option:
            pattern = r"\s+".join(map(re.escape, said.split()))
            left = r"(?<!\w)(?<!\d[.,:])" if _is_spaced(said[0]) else ""
            right = r"(?!\w)(?![.,:]\d)" if _is_spaced(said[-1]) else ""
            found += [_Mention(option, m.start(), m.end()) for m in re.finditer(left + pattern + right, text)]
    longest: list[_Mention] = []
    for mention in sorted(found, key=lambda m: (m.start, -m.end)):
        if not longest or mention.end > longest[-1].end:
            longest.append(mention)
    return longest


def _is_spaced(character: str) -> bool:
    """Whether words of its script stand between spaces, which those of Chinese, Japanese and Thai do not."""
    return not ("\u0e00" <= character <= "\u0eff" or character >= "\u2e80")


def _affirmed(text: str, mentions: Sequence[_Mention]) -> list[_Mention]:
    """The mentions that are not denied; what is joined ("A or B", "A, B and C") is denied together."""
    groups: list[list[_Mention]] = []
    for mention in sorted(mentions, key=lambda m: m.start):
        between = text[groups[-1][-1].end : mention.start] if groups else ""
        if groups and len(between) <= _NEAR and _JOINED.fullmatch(between):
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return [mention for group in groups if not _denied(text, group[0].start, group[-1].end) for mention in group]


def _denied(text: str, start: int, end: int) -> bool:
    return bool(_NOT_BEFORE.search(text[max(0, start - _NEAR) : start]) or _NOT_BEHIND.match(text, end))
