"""Each published answer parser reads what its source does; where a source draws at random, ours finds nothing."""

import pytest

from xcomp.answer_parsers import PARSERS, check_parser, parse_with
from xcomp.benchmark import LETTERS

OPTIONS = ("red", "green car", "blue", "dog house", "tree")
COLUMNS = (
    "videochat_flash",
    "videochat_flash_longvideobench",
    "videochat_flash_videomme",
    "lmms_eval",
    "lmms_eval_longvideobench",
    "mlvu",
    "lvbench",
)
# What the sources' own parsers gave, in the order of COLUMNS; "-": no option, an empty answer, or one at random.
FROM_SOURCES = [
    ("B", "B B B B B B B"),
    ("B.", "B B B B B - B"),
    ("b", "B - - - - - -"),
    ("(B)", "B B B B B B B"),
    ("(B) red", "B B B B B B B"),
    ("B. red", "B B B B B - B"),
    ("B) red", "B - B B B B B"),
    ("B: red", "B - B B B - B"),
    ("The answer is C.", "C C C C C - -"),
    ("The best option is C", "C C C C C - -"),
    ("Answer: D", "D D A D A - A"),
    ("A dog", "A A A A A - A"),
    ("It is a dog", "A - - - - - -"),
    ("Because D", "D D B D B - B"),
    ("", "- - - - - - -"),
    ("E", "E E - - E E E"),
    ("(A) or (C)", "A C A C A A A"),
    ("A or C", "A C A A A - A"),
    ("I'd say B", "D B B B B - -"),
    ("B\nbecause A", "B A B B B - B"),
    ("**C**", "C - C C C - -"),
    ("the answer seems to be the green car", "- B - - - - -"),
    ("None", "- - - - - - -"),
]
# Worked out by hand from the rules.
FROM_RULES = [
    ("(b)", "B - - - - - -"),
    ("b.", "B - - - - - -"),
    ("b)", "B - - - - - -"),
    ("d: dog", "D - - - - - -"),
    ("C)", "C - C C C C C"),
    ("(C", "C C C C C - C"),
    ("C,", "C C C C C - C"),
    ("C, because", "C - C C C - C"),
    ("C!", "C C C C C - C"),
    ("'C'", "C C C C C - -"),
    ('"C"', "C - C C C - -"),
    ("[C]", "C - C C C - -"),
    ("{C}", "C - C C C - -"),
    ("<C>", "C - C C C - -"),
    ("`C`", "C - C C C - -"),
    ("C;", "C C C C C - C"),
    ("C\n", "C - C C C C C"),
    ("\tC", "C C C C C C C"),
    ("  C  ", "C C C C C C C"),
    ("C.\nBecause", "C C C C C - C"),
    ("C. blue\nA", "C A C C C - C"),
    ("c. blue", "C - - - - - -"),
    ("A.B", "A B A A A - A"),
    ("A/B", "A B A A A - A"),
    ("A, B", "A B A A A - A"),
    ("B and C", "B C B B B - B"),
    ("(B), (C)", "B C B C B B B"),
    ("(C), not (B)", "C B C B C C C"),
    ("D.C.", "D C D D D - D"),
    ("Answer: (B)", "B B A B A B A"),
    ("answer is b", "B - - - - - -"),
    ("The answer is (D).", "D D D D D D -"),
    ("The correct answer is B", "B B B B B - -"),
    ("Best option: (A", "A A B A A - B"),
    ("The answer: C", "C C C C C - -"),
    ("My answer is A because B is not", "A B A A A - -"),
    ("Option B", "B B B B B - -"),
    ("I choose C", "C C C C C - -"),
    ("Both A and D are wrong", "A D B D B - B"),
    ("NBA", "- A B A B - -"),
    ("NASA", "- A A A A - -"),
    ("USA B", "B B A B A - -"),
    ("a", "A - - - - - -"),
    ("A", "A A A A A A A"),
    ("I", "- - - - - - -"),
    ("e", "E - - - - - -"),
    ("F", "- - - - - - -"),
    ("1", "- - - - - - -"),
    ("1,000 B", "B B B B B - -"),
    ("2.5 A", "A A A A A - -"),
    ("B 2.5", "B B B B B - B"),
    ("None of the above", "- - - - - - -"),
    ("ABCD", "- D A D A - A"),
    ("It shows a red car at night in the rain", "A A - - - - -"),
    ("It shows the tree and then the red dog house", "- D - - - - -"),
    ("The man in blue stands near the green car today", "- B - - - - -"),
    ("정답은 B", "B B B B B - -"),
    ("答案是C", "- C C C C - -"),
    ("B입니다", "- - B B B - B"),
    ("답: B", "B B B B B - -"),
    ("???", "- - - - - - -"),
    ("...", "- - - - - - -"),
    ("</think> B", "B B B B B - -"),
    ("\\boxed{B}", "B - B B B - -"),
    ("**B. green car**", "B B B B B - -"),
    ("B - green car", "B B B B B - B"),
    ("B>A", "B A B B B - B"),
    ("Therefore, D", "D D D D D - -"),
    ("d", "D - - - - - -"),
    ("A man", "A A A A A - A"),
    ("a man in a red shirt", "A A - - - - -"),
    ("The dog house", "- - - - - - -"),
    ("E.", "E E - - E - E"),
    ("(E)", "E E - - E E E"),
    ("It is E", "E E - - E - -"),
]


@pytest.mark.parametrize("text, letters", FROM_SOURCES + FROM_RULES)
def test_a_published_parser_reads_what_its_source_does(text, letters):
    found = {name: parse_with(name, text, OPTIONS) for name in COLUMNS}
    assert {name: "-" if i is None else LETTERS[i] for name, i in found.items()} == dict(zip(COLUMNS, letters.split()))


def test_every_parser_is_tested():
    assert set(PARSERS) == {*COLUMNS, "xcomp"} and len(FROM_SOURCES + FROM_RULES) >= 60


def test_a_letter_that_is_no_option_is_no_answer():
    assert PARSERS["videochat_flash"]("E", OPTIONS[:4]) == "E"
    assert parse_with("videochat_flash", "E", OPTIONS[:4]) is None and parse_with("mlvu", "Z", OPTIONS) is None
    assert parse_with("videochat_flash", "d", OPTIONS[:4]) == 3


def test_the_projects_own_rules_are_one_of_them():
    assert parse_with("xcomp", "green car", OPTIONS) == 1 and parse_with("xcomp", "C", OPTIONS) == 2
    assert parse_with("xcomp", "", OPTIONS) is None


def test_an_unknown_parser_suggests_the_nearest():
    with pytest.raises(ValueError, match="parser is 'lmms'; did you mean 'lmms_eval'. parsers: videochat_flash, "):
        check_parser("lmms")
