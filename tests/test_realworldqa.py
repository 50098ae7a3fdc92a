"""RealWorldQA: the scoring rules on written-out cases."""

import pytest

from realworldqa import NUMBERS, choice, exact, normalise, options

SIDES = "Which way does the wheel face?\n\nA. Left\nB. Straight\nC. Right\nPlease answer with the letter only."

# Scoring rules: question, key, answer, right by exact, right by choice

CASES = [
    (SIDES, "C", "C", True, True),
    (SIDES, "C", "c.", True, True),
    (SIDES, "C", " C. ", True, True),
    (SIDES, "C", "Right", True, True),
    (SIDES, "C", "right.", True, True),
    (SIDES, "C", "C. Right", True, True),
    (SIDES, "C", "(C)", True, True),
    (SIDES, "C", "C) right", True, True),
    (SIDES, "Right", "C", True, True),
    (SIDES, "C", "The answer is C.", False, True),
    (SIDES, "C", "C, because the wheel is turned.", False, True),
    (SIDES, "C", "It faces right", False, False),
    (SIDES, "C", "A", False, False),
    (SIDES, "C", "Either B or C", False, False),  # not one letter
    (SIDES, "C", "CAT", False, False),  # not a letter alone
    (SIDES, "C", "D", False, False),
    (SIDES, "C", "", False, False),
    (SIDES, "A", "A", True, True),
    (SIDES, "A", "A is right", False, True),
    (SIDES, "A", "A car turns left", False, False),  # the article
    (SIDES, "C", "A car turns. It is C", False, True),
    (SIDES, "C", "C\nA car turns.", False, True),
    (SIDES, "B", "A or B", False, False),
    (SIDES, "B", "A and B", False, False),
    (SIDES, "A", "A because the wheel is turned", False, True),
    (SIDES, "A", "A seems right", False, True),
    (SIDES, "A", "A left", True, True),
    (SIDES, "C", "C)", True, True),
    (SIDES, "C", "C: Right", True, True),
    (SIDES, "C", "option c", False, False),  # letters are capitals, but for an answer that is nothing else
    (SIDES, "B", "the wheel faces a wall: B", False, True),
    ("Which letter?\nA. C\nB. A\nC. D", "A", "B", False, False),  # a letter is first of all a letter
    ("Which letter?\nA. C\nB. A\nC. D", "B", "A", False, False),
    ("Which letter?\nA. C\nB. A\nC. D", "C", "D", True, True),
    ("U.S. highway, which side?\nA. Left\nB. Right", "B", "Right", True, True),
    ("How many cars?", "2", "two", True, True),
    ("How many cars?", "2", "Two.", True, True),
    ("How many cars?", "twenty-one", "21", True, True),
    ("How many cars?", "2", "2 cars", False, False),
    ("How many cars?", "two cars", "2  cars", True, True),
    ("How many cars?", "12", "1", False, False),
    ("Is it day?", "Yes", "yes.", True, True),
    ("Is it day?", "Yes", "No", False, False),
    ("Is it day?", "Yes", "Yes, it is", False, False),  # no options: as exact
    ("How many?\nA. 2\nB. 3", "A", "two", True, True),
    ("How many?\n(A) 2\n(B) 3", "B", "3", True, True),
    ("Same?\nA. no\nB. no", "A", "no", False, False),  # two options of one text
    ("Odd list?\nB. one\nC. two", "B", "one", False, False),  # no options: they do not begin with A
    ("Odd list?\nA. one", "A", "one", False, False),  # nor is one line a choice
    (SIDES, "Green", "C", False, False),  # a key that is no option: as exact
    (SIDES, "Green", "green.", True, True),
]


@pytest.mark.parametrize("question, key, answer, by_exact, by_choice", CASES)
def test_scoring_rules(question, key, answer, by_exact, by_choice):
    assert (exact(question, key, answer), choice(question, key, answer)) == (by_exact, by_choice)


def test_options_and_number_words():
    assert options(SIDES) == {"A": "Left", "B": "Straight", "C": "Right"}
    assert options("A: one\r\nB: two\r\n") == {"A": "one", "B": "two"} and options("What?") == {}
    assert len(NUMBERS) == 100
    assert set(NUMBERS.values()) == {str(n) for n in range(100)}
    assert [NUMBERS[word] for word in ("zero", "nine", "thirteen", "forty", "ninety-nine")] == [
        "0",
        "9",
        "13",
        "40",
        "99",
    ]
    assert normalise("  Two   RED cars. ") == "2 red cars" and normalise("3.5") == "3.5"
