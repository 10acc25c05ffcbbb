"""How published evaluations read an option's letter from a model's answer, by name: ``PARSERS``.

Each takes the answer and the options, and returns a letter or None. Sources: the evaluation code of VideoChat-Flash,
which is XComp's too, lmms-eval, and the repositories of MLVU and LVBench. Some are odd (``videochat_flash_videomme``
reads "Answer: D" as A); that is how the published figures came about.

Deviation: where a source picks an option at random (LongVideoBench's two), None is returned, which counts as wrong.
With four options a published figure may so be higher by a quarter of the share of answers that name no option.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from xcomp.benchmark import LETTERS, parse_option
from xcomp.messages import nearest

PUNCTUATION = ",.!?;:'"


def videochat_flash(text: str, options: Sequence[str] = ()) -> str | None:
    """A–E that the answer begins with before a period, else the first that stands alone, in either case.

    Before the latter, punctuation goes; an apostrophe or colon stays, so that in "I'd say B" the first is D.
    """
    start = re.fullmatch(r"([A-E])\.\s*(.+)?", text.strip(), re.IGNORECASE)
    if start:
        return start.group(1).upper()
    cleaned = re.sub(r"[\n\t]", " ", text)
    between_digits = re.search(r"\d,\d", cleaned)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        loose = f"{mark} " in cleaned or f" {mark}" in cleaned or between_digits
        cleaned = cleaned.replace(mark, "" if loose else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=32)
    alone = re.search(r"\b([a-e])\b", cleaned.strip("'\")( ").lower())
    return alone.group(1).upper() if alone else None


def videochat_flash_longvideobench(text: str, options: Sequence[str] = ()) -> str | None:
    """Capital letters as ``(X)``, else before a space, else before a period, else options by their words.

    Words are looked for in answers of more than five. Of several options the one that is named last; a letter before a
    space counts there only if it stands alone. A random option in the source where there is none.
    """
    for mark in PUNCTUATION:
        text = text.strip(mark)
    text = f" {text} "
    letters = LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        text = text.lower()
        places = {letter: text.rfind(option.lower()) for letter, option in zip(letters, options)}
        found = [letter for letter, place in places.items() if place >= 0]
        return max(found, key=places.get, default=None)
    return None


def _first_capital(text: str, phrases: Sequence[str], letters: str) -> str | None:
    """The first of the capital ``letters``, anywhere, once the ``phrases`` are taken out in their order."""
    for phrase in phrases:
        text = text.replace(phrase, "")
    found = re.search(f"[{letters}]", text)
    return found.group() if found else None


_PHRASES = ("The best answer is", "The correct answer is", "The answer is", "The answer")
_MORE_PHRASES = ("The best option is", "The correct option is", "Best answer:", "Best option:")


def videochat_flash_videomme(text: str, options: Sequence[str] = ()) -> str | None:
    """The first capital A–D anywhere, even within a word, but for four phrases like "The answer is"."""
    return _first_capital(text, _PHRASES, "ABCD")


def lmms_eval_longvideobench(text: str, options: Sequence[str] = ()) -> str | None:
    """The first capital A–E anywhere, but for eight phrases like "The answer is"; else random in the source."""
    return _first_capital(text, _PHRASES + _MORE_PHRASES, "ABCDE")


_ANSWER_IS = r"(?:answer|option|choice) is|answer:|i (?:choose|select|pick)|정답은|답은|答案是|答案为|选择?|答えは"
_FORMS = (
    (10, r"^([A-D])(?![^\W\d_])"),
    (9, r"(?<![^\W\d_])([A-D])$"),
    (7, rf"(?i:{_ANSWER_IS})[:：]?\s*\(?([A-D])(?![^\W\d_])"),
    (6, r"\(([A-D])\)"),
    (5, r"([A-D])\."),
    (4, r"([A-D]):"),
    (3, r"([A-D])\)"),
    (2, r"([A-D]) "),
    (0, r"([A-D])"),
)


def lmms_eval(text: str, options: Sequence[str] = ()) -> str | None:
    """The capital A–D in the most telling form: first thing, last thing, behind "answer is", ``(X)``, ``X.`` and so on.

    Of equal forms the later place wins.
    """
    text = text.strip().strip(f'{PUNCTUATION}" ')
    found = [(rank, match.start(1), match.group(1)) for rank, form in _FORMS for match in re.finditer(form, text)]
    return max(found)[2] if found else None


def mlvu(text: str, options: Sequence[str] = ()) -> str | None:
    """What stands before the first closing bracket, else the whole answer, if that is a capital letter."""
    head, bracket, _ = text.strip().partition(")")
    return _capital(head[-1:] if bracket else head)


def lvbench(text: str, options: Sequence[str] = ()) -> str | None:
    """The first character of the first word behind an opening and before a closing bracket, if a capital letter."""
    words = text.split()
    return _capital(words[0].partition(")")[0].rpartition("(")[2][:1]) if words else None


def _capital(text: str) -> str | None:
    return text if len(text) == 1 and text in LETTERS else None


def xcomp(text: str, options: Sequence[str] = ()) -> str | None:
    """The project's own rules (:func:`xcomp.benchmark.parse_option`)."""
    found = parse_option(text, tuple(options))
    return None if found is None else LETTERS[found]


PARSERS: dict[str, Callable[[str, Sequence[str]], str | None]] = {
    function.__name__: function
    for function in (
        videochat_flash,
        videochat_flash_longvideobench,
        videochat_flash_videomme,
        lmms_eval,
        lmms_eval_longvideobench,
        mlvu,
        lvbench,
        xcomp,
    )
}


def parse_with(name: str, text: str, options: Sequence[str]) -> int | None:
    """The option that an answer names by the parser ``name``; None if it names none, or one that is not there."""
    letter = PARSERS[name](text, options)
    found = -1 if letter is None else LETTERS.index(letter)
    return found if 0 <= found < len(options) else None


def check_parser(name: str) -> None:
    """ValueError unless there is a parser of that name."""
    if name not in PARSERS:
        raise ValueError(f"parser is '{name}';{nearest(name, PARSERS)} parsers: {', '.join(PARSERS)}")
