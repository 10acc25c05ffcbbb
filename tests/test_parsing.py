"""Odd outputs and the option that is read out of them by default."""

from __future__ import annotations

import time

import pytest

from xcomp.parsing import LETTERS, parse_option, parse_words

THINGS = ("red", "green car", "blue", "dog house", "tree")
SHADES = ("red", "dark red", "light red", "not red at all")
COUNTS = ("1", "2", "3", "12")
SHUFFLED = ("B", "A", "D", "C")
LABELLED = ("(A) 1636", "(B) 1366", "(C) 1363", "(D) 1633")
SENTENCES = ("A man in a red shirt", "A woman in a hat", "Nobody", "I cannot tell")
YES_NO = ("Yes", "No")
CHINESE = ("红色", "绿色的车", "蓝色", "狗屋")


# --- the outputs on which published parsers differ, and what is read by default ----------------------------------


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"), ("B.", "B"), ("b", "B"), ("(B)", "B"), ("(B) red", "B"), ("B. red", "B"), ("B) red", "B"),
        ("B: red", "B"), ("The answer is C.", "C"), ("The best option is C", "C"), ("Answer: D", "D"),
        ("A dog", None),
        ("It is a dog", None), ("Because D", "D"), ("", None), ("E", "E"), ("(A) or (C)", None), ("A or C", None),
        ("I'd say B", "B"), ("B\nbecause A", "B"), ("**C**", "C"), ("the answer seems to be the green car", "B"),
        ("None", None),
    ],
)  # fmt: skip
def test_outputs_on_which_published_parsers_differ(text, letter):
    assert read(text, THINGS) == letter


def read(text, options):
    found = parse_option(text, options)
    return None if found is None else LETTERS[found]


@pytest.mark.parametrize(
    "text, letter",
    [
        # a letter and nothing else
        ("  b \n", "B"), ("(b)", "B"), ("B)", "B"), ("[B]", "B"), ("b.", "B"), ("`B`", "B"), ("*B*", "B"),
        ("__B__", "B"),
        ('"B"', "B"), ("Ｂ", "B"), ("（B）", "B"), ("B:", "B"), ("- B", "B"), ("# B", "B"), ("> B", "B"), ("$B$", "B"),
        ("F", None), ("Z.", None), ("?", None), ("   ", None), ("...", None), ("BB", None), ("AB", None), ("4", None),
        ("a", "A"), ("A", "A"), ("(a)", "A"), ("e", "E"), ("🅱", None), ("B 🙂", "B"),
        # on a line of its own, behind others
        ("The clip shows the kitchen\nB", "B"), ("Answer\nB", "B"), ("Thinking about it\nB.", "B"),
        ("Step 1: look\nStep 2: decide\nB", "B"),
        # after words that say it
        ("The answer is b", "B"), ("the correct answer is (B).", "B"), ("Answer: B", "B"), ("**Answer:** B", "B"),
        ("Answer: **B**", "B"), ("ANSWER = B", "B"), ("The answer is: B) red", "B"), ("My answer would be B", "B"),
        ("The answer should be option B.", "B"), ("The correct option is B, since it is green.", "B"),
        ("I choose B", "B"), ("I'll go with (c)", "C"), ("I would pick option D here", "D"), ("Final answer: D", "D"),
        ("The answer is A because it is red", "A"), ("The answer is A, as the man says.", "A"),
        ("Answer: A dog", None),
        ("The answer is a dog", None), ("The answer is a", "A"), ("The answer is a.", "A"),
        ("The answer is A man", None),
        ("The answer is B? No, the answer is C.", "C"), ("The answer is A or B", None),
        ("The answer is A and C", None),
        ("The answer is not B", None), ("The answer is not B, the answer is C", "C"),
        ("The answer isn't B but C", "C"),
        ("The answer is F", None), ("Answer:", None), ("Answer:\nB", "B"), ("The answer to this question is B", "B"),
        ("The answer -> B", "B"), ("Best option: C", "C"), ("The answer is E.", "E"),
        ("The answer could be A. But it is C.", None),
        ("answer is e because of it", "E"),
        # as a label
        ("B - red", "B"), ("B – red", "B"), ("B, since the car is red", "B"), ("B because the car is red", "B"),
        ("b) red", "B"), ("B.red", "B"), ("A. red", "A"), ("(A) red", "A"), ("(A): blue", "A"), ("A is right", "A"),
        ("A because of it", "A"), ("B\n\nThe car is red.", "B"), ("E. red", "E"), ("A, since it is so", "A"),
        ("A. red\nB. green car\nC. blue\nD. dog house", None), ("E.g. something", None),
        ("B is wrong. It is C.", "C"),
        ("(B) is incorrect, so the answer is (D)", "D"),
        # named otherwise: letters
        ("Option B", "B"), ("option b.", "B"), ("It is option (B)", "B"), ("I think (B) is right", "B"),
        ("I think **B** is right", "B"), ("Maybe 'B' then", "B"), ("(A) and (B) differ", None), ("A/B", None),
        ("A, B and C", None), ("B, C", None), ("Either A or B", None), ("Both A and C", None), ("A & D", None),
        ("not B", None), ("Not B, but C", "C"), ("Neither A nor B", None), ("Neither A nor B, so C", "C"),
        ("It can't be A or B. C.", "C"), ("Rather than A, C", None), ("Instead of A it is C", "C"),
        ("It must be D", "D"), ("D, I guess", "D"),
        ("A man walks", None), ("I do not know", None), ("A", "A"), ("It is A.", "A"), ("T-shirt", None),
        ("B-flat is played", None), ("in the U.S.A. today", None), ("The plan is called D", "D"), ("D'accord", None),
        ("Choice C seems right", "C"), ("The letter is D", "D"), ("Options A and C are wrong, so D", "D"),
        # named otherwise: words
        ("Red", "A"), ("red.", "A"), ("RED!", "A"), ('"red"', "A"), ("**Red**", "A"), ("The car is red.", "A"),
        ("It is a green\ncar.", "B"), ("a redder one", None), ("infrared", None), ("red and blue", None),
        ("not red but blue", "C"), ("It isn't red", None), ("neither red nor blue: a tree", "E"), ("treehouse", None),
        ("It is red (A)", "A"), ("It is red, option C", "C"), ("The red one is A, the blue one is C", None),
        ("I see red and blue, so (C)", "C"), ("a dog-house", None), ("the dog house's roof", "D"), ("red_", "A"),
        ("Answer: red", "A"), ("The answer is the dog house.", "D"), ("**Answer**: dog house", "D"),
        # thoughts, boxes, tags
        ("<think>It could be A or B.</think>C", "C"), ("<think>It is A", None), ("It is A.</think>\n\nB", "B"),
        ("<thinking>red</thinking>\nThe answer is D", "D"), ("<answer>B</answer>", "B"),
        ("A <answer>\nb\n</answer>", "B"),
        (r"\boxed{B}", "B"), (r"So the answer is $\boxed{\text{C}}$.", "C"),
        (r"\boxed{A} or \boxed{(D) dog house}", "D"),
        (r"\boxed{red}", "A"), (r"$\mathbf{B}$", "B"), (r"\textbf{(C)}", "C"),
        # other languages
        ("答案是B", "B"), ("答案：C", "C"), ("我选D", "D"), ("选项B", "B"), ("正确答案是B。", "B"),
        ("答えはBです", "B"), ("正解はCです。", "C"), ("정답은 D입니다", "D"), ("La respuesta es B", "B"),
        ("La respuesta correcta es la C.", "C"), ("La réponse est B", "B"),
        ("Die richtige Antwort ist D", "D"), ("A resposta é B", "B"), ("Ответ: C", "C"),
        ("La risposta è E", "E"), ("选B因为它是绿色的", "B"), ("不是B", None), ("उत्तर: B", "B"),
    ],
)  # fmt: skip
def test_what_is_read_out_of_odd_outputs(text, letter):
    assert read(text, THINGS) == letter


@pytest.mark.parametrize(
    "options, text, letter",
    [
        # options that contain each other: the longest
        (SHADES, "dark red", "B"), (SHADES, "It is dark red.", "B"), (SHADES, "It is red.", "A"),
        (SHADES, "Red", "A"),
        (SHADES, "It is red or dark red", None), (SHADES, "not red at all", "D"),
        (SHADES, "It's not red at all!", "D"),
        (SHADES, "light  red", "C"), (SHADES, "It is not dark red but light red", "C"),
        # digits
        (COUNTS, "2", "B"), (COUNTS, "There are 2.", "B"), (COUNTS, "12", "D"), (COUNTS, "12 dogs", "D"),
        (COUNTS, "2.5", None), (COUNTS, "1, 2", None), (COUNTS, "B", "B"), (COUNTS, "(B) 2", "B"),
        (COUNTS, "4", None),
        (COUNTS, "21", None), (COUNTS, "D. 12", "D"), (("-2", "2", "2%"), "-2", "A"), (("-2", "2", "2%"), "2%", "C"),
        (("5", "10", "15"), "at 10:15", None), (("5", "10", "15"), "about 15", "C"),
        # options that are letters: words come first
        (SHUFFLED, "A", "B"), (SHUFFLED, "b", "A"), (SHUFFLED, "The answer is C", "C"), (SHUFFLED, "(D)", "C"),
        # options that carry their letters
        (LABELLED, "1366", "B"), (LABELLED, "(B) 1366", "B"), (LABELLED, "(B)", "B"), (LABELLED, "B. 1366", "B"),
        (LABELLED, "in 1363.", "C"), (LABELLED, "(D) 1633.", "D"),
        # sentences that open with an article or a pronoun
        (SENTENCES, "A man in a red shirt", "A"), (SENTENCES, "A woman in a hat", "B"),
        (SENTENCES, "a woman in a hat.", "B"),
        (SENTENCES, "A man", None), (SENTENCES, "I cannot tell", "D"), (SENTENCES, "I think nobody", "C"),
        (SENTENCES, "B. A woman in a hat", "B"), (SENTENCES, "(D) I cannot tell", "D"),
        (THINGS[1:], "A man in a red shirt", None),
        (tuple("abcdefghi"), "I", "I"), (tuple(f"thing {i}" for i in range(10)), "I think so", None),
        # yes and no
        (YES_NO, "Yes", "A"), (YES_NO, "No, he does not.", "B"), (YES_NO, "yes, he does", "A"),
        (YES_NO, "Yes and no", None),
        (YES_NO, "Nobody knows", None), (YES_NO, "A", "A"), (YES_NO, "C", None),
        # scripts without spaces
        (CHINESE, "红色", "A"), (CHINESE, "答案是绿色的车。", "B"), (CHINESE, "它是蓝色的", "C"), (CHINESE, "B", "B"),
        (CHINESE, "红色和蓝色", None), (("Straße", "Weg"), "STRASSE", "A"), (("café", "bar"), "Café", "A"),
        # equal and empty options
        (("red", "red", "blue"), "red", "A"), (("", "", "blue"), "", None), (("", "", "blue"), "it is blue", "C"),
        (("red", "Red.", "blue"), "It is red", "A"), (("a", "the", "x y"), "It is a dog", None),
    ],
)  # fmt: skip
def test_options_of_all_kinds(options, text, letter):
    assert read(text, options) == letter


@pytest.mark.parametrize("options", [THINGS, SHADES, COUNTS, LABELLED, SENTENCES, YES_NO, CHINESE])
def test_each_option_is_found_in_its_letter_and_its_words(options):
    for number, option in enumerate(options):
        for text in (
            option,
            option.upper(),
            f"{option}.",
            f" ({LETTERS[number]}) {option}",
            f"{LETTERS[number]}. {option}",
        ):
            assert parse_option(text, options) == number
        for text in ("{}", "({})", "{}.", "**{}**", "The answer is {}.", "Answer: ({})", r"\boxed{{{}}}"):
            assert parse_option(text.format(LETTERS[number]), options) == number


def test_words_alone():
    assert parse_words(" **Dog house**. ", THINGS) == 3
    assert parse_words("B", THINGS) is None and parse_words("a dog house", THINGS) is None


def test_a_long_text_takes_no_longer_than_its_length():
    texts = (
        "(",
        "A or ",
        "not ",
        "<think>",
        "\\boxed{",
        "red ",
        "A. red\n",
        "**",
        "I think it is a dog ",
        "The answer is ",
    )
    started = time.perf_counter()
    for text in texts:
        parse_option(text * (40000 // len(text)) + "B", THINGS)
    assert time.perf_counter() - started < 5  # in quadratic time, a minute
