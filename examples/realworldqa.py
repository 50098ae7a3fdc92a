"""How RealWorldQA's answers are scored, and those to any other questions.

Scoring rules; both judge the same answer, and what is correct by the first is so by the second
    exact            answer and key are equal once both are normalised: white space around, a trailing full stop and
                     capitals do not count, number words are digits, and the text of an option is its letter
    choice           of a question with lettered options: the answer is an option's text or names just one option's
                     letter as a capital, and it is the key's; a question without options is scored as by `exact`
"""

import re

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
COUNTED = ONES + TEENS + [f"{ten}-{one}" if one != "zero" else ten for ten in TENS for one in ONES]
NUMBERS = {word: str(n) for n, word in enumerate(COUNTED)}  # zero to ninety-nine
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t\r]*$", re.MULTILINE)  # a line such as "A. Left"
ARTICLE = re.compile(r"(^|[.!?]\s+)A(?= (?!(and|as|because|is|looks|or|seems|since)\b)[a-z])", re.MULTILINE)  # "A car"
LETTER = re.compile(r"(?<![\w'])[A-Z](?![\w'])")


def options(question: str) -> dict[str, str]:
    """The lettered options of a question, from A on without a gap: {"A": "Left", "B": "Right"}; {} if it has none."""
    found = OPTION.findall(question)
    letters = [letter for letter, _ in found]
    return dict(found) if len(found) > 1 and letters == [chr(ord("A") + n) for n in range(len(found))] else {}


def normalise(answer: str, question: str = "") -> str:
    """An answer as `exact` compares it. Example: "Two cars." is "2 cars", and "Left" is "a" where A. is Left."""
    text, known = _plain(answer), {}
    for letter, option in options(question).items():
        letter = letter.lower()
        for form in ("{1}", "{0} {1}", "{0}. {1}", "{0}) {1}", "{0}: {1}", "({0}) {1}", "{0})", "({0})"):
            known.setdefault(_plain(form.format(letter, option)), set()).add(letter)
    letters = {text} if text.upper() in options(question) else known.get(text, set())
    return letters.pop() if len(letters) == 1 else text


def _plain(text: str) -> str:
    words = text.strip().lower().removesuffix(".").split()
    return " ".join(NUMBERS.get(word, word) for word in words)


def exact(question: str, key: str, answer: str) -> bool:
    return normalise(answer, question) == normalise(key, question)


def choice(question: str, key: str, answer: str) -> bool:
    key, given = normalise(key, question), normalise(answer, question)
    letters = {letter.lower() for letter in options(question)}
    if key in letters and given not in letters:
        return {letter.lower() for letter in LETTER.findall(ARTICLE.sub(r"\1", answer))} & letters == {key}
    return given == key
