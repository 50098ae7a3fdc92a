"""RealWorldQA: the scoring rules on written-out cases, bad rows, and the file that keeps the answers."""

import pyarrow
import pytest
from pyarrow import parquet

from realworldqa import NUMBERS, Answers, choice, exact, normalise, options, rows

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


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"settings": {}', b"{}\n", b'{"settings": 1}\n', b"[]\n", b"\n", b"\xff\n"]
    + [b'{"settings": {"rows": 1}}\n' + line + b"\n" for line in (
        b"", b"{}", b"1", b'{"row": "x", "sparsity": 0.5, "error": ""}', b'{"row": 0, "sparsity": 0.5, "exact": true}',
        b'{"row": 0, "sparsity": 0.5, "error": null}', b'{"row": 0, "sparsity": 1, "error": ""}', b'{"row": 0}')],
)  # fmt: skip
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    answers = Answers(path, 0, {"rows": 1})
    answers.open()
    with pytest.raises(ValueError, match="something else than answers"):
        answers.read()
    assert path.read_bytes() == content


@pytest.mark.parametrize("torn", [b"", b'{"settings": {"ro', b'{"settings": {"rows": 1}}'])
def test_a_first_line_that_was_cut_off_is_written_anew(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    path.write_bytes(torn)
    answers = Answers(path, 0, {"rows": 1})
    answers.open()
    assert answers.read() == [] and path.read_bytes() == b'{"settings": {"rows": 1}}\n'


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    table = pyarrow.table([pyarrow.array([b"x"]), bad, pyarrow.array(["a"])], ["image", "question", "answer"])
    parquet.write_table(table, tmp_path / "bad.parquet")
    ((_, fault),) = rows([tmp_path / "bad.parquet"], {0})
    assert isinstance(fault, ValueError) and str(fault).startswith("the row's question cannot be read")
