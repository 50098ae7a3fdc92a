"""RealWorldQA, or any parquet file like it: rows of image, question and answer, two rules for what is right, and the
file that keeps the answers given.

Scoring rules; both judge the same answer to the raw question, and whatever is right by the first is so by the second
    exact            answer and key are equal when both are normalised: white space around, a trailing full stop and
                     capitals do not count, number words are digits, and the text of an option is its letter
    choice           of a question with lettered options: the answer is an option's text or names just one option's
                     letter, and it is the key's; a question without options is judged as by `exact`
"""

import glob
import json
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow
from huggingface_hub import snapshot_download
from PIL import Image
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from events import write_whole

COLUMNS = ("image", "question", "answer")
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
COUNTED = ONES + TEENS + [f"{ten}-{one}" if one != "zero" else ten for ten in TENS for one in ONES]
NUMBERS = {word: str(n) for n, word in enumerate(COUNTED)}  # zero to ninety-nine
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]*(\S.*?)[ \t\r]*$", re.MULTILINE)  # a line such as "A. Left"
ARTICLE = re.compile(r"(^|[.!?]\s+)A(?= (?!is\b)[a-z])")  # begins a sentence: "A car", but not "A is"
LETTER = re.compile(r"(?<![\w'])[A-Z](?![\w'])")


class Row(NamedTuple):
    image: Image.Image
    question: str
    answer: str


def find(data: str, revision: str | None = None) -> list[Path]:
    """The parquet files of `data`: a file, a folder, or a dataset's name on the hub, which is downloaded. ValueError
    says what is wrong."""
    place = Path(data).expanduser()
    if place.is_file():
        return [place]
    try:
        if not place.exists():
            place = Path(snapshot_download(data, repo_type="dataset", revision=revision, allow_patterns="*.parquet"))
    except Exception as error:  # whatever the hub's client, its network library and the disk raise
        told = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ValueError(f"{data}: neither a file nor a dataset that can be downloaded ({told}); correct it") from None
    files = sorted(place.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{data}: no .parquet file in it; give the file, or a folder that holds it")
    return files


def count(files: list[Path]) -> int:
    """Rows in all the files. ValueError names one that is no parquet, or lacks one of COLUMNS."""
    total = 0
    for path in files:
        try:
            table = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({_line(error)}); fetch it again") from None
        missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: has no column {missing[0]}; it needs {', '.join(COLUMNS)}")
        total += table.metadata.num_rows
    return total


def rows(files: list[Path], wanted: set[int]) -> Iterator[tuple[int, Row | ValueError]]:
    """Number, counted from 0 over all files, and content of each wanted row, read in pieces; in place of a bad row,
    what is wrong with it."""
    number = 0
    for path in files:
        try:
            table = parquet.ParquetFile(path)
            end = number + table.metadata.num_rows
            if not any(number <= row < end for row in wanted):
                number = end
                continue
            for piece in table.iter_batches(batch_size=8, columns=COLUMNS):
                for place in range(piece.num_rows):
                    if number in wanted:
                        yield number, _row({name: piece[name][place].as_py() for name in COLUMNS})
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: broken after row {number} ({_line(error)}); fetch it again") from None


def _row(content: dict) -> Row | ValueError:
    image = content["image"]
    image = image.get("bytes") if isinstance(image, dict) else image  # the hub's image column, or bare bytes
    if not isinstance(image, bytes):
        return ValueError("the row has no image")
    for name in ("question", "answer"):
        if not isinstance(content[name], str) or not content[name].strip():
            return ValueError(f"the row's {name} is {content[name]!r}, not a text")
    try:
        return Row(Image.open(BytesIO(image)), content["question"], content["answer"])
    except Exception as error:  # Pillow's readers raise of many kinds
        return ValueError(f"the row's image cannot be read ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def options(question: str) -> dict[str, str]:
    """The lettered options of a question, from A on without a gap: {"A": "Left", "B": "Right"}; {} if it has none."""
    found = OPTION.findall(question)
    letters = [letter for letter, _ in found]
    return dict(found) if len(found) > 1 and letters == [chr(ord("A") + n) for n in range(len(found))] else {}


def normalise(answer: str, question: str = "") -> str:
    """An answer as `exact` compares it. Example: "Two cars." is "2 cars", and "Left" is "a" where A. is Left."""
    text = _plain(answer)
    known: dict[str, set[str]] = {}
    for letter, told in options(question).items():
        for spelling in (told, f"{letter}. {told}", f"{letter}) {told}", f"({letter}) {told}", f"({letter})"):
            known.setdefault(_plain(spelling), set()).add(letter.lower())
    letters = known.get(text, set())
    return letters.pop() if len(letters) == 1 else text


def _plain(text: str) -> str:
    words = text.strip().lower().removesuffix(".").split()
    return " ".join(NUMBERS.get(word, word) for word in words)


def exact(question: str, key: str, answer: str) -> bool:
    return normalise(answer, question) == normalise(key, question)


def choice(question: str, key: str, answer: str) -> bool:
    key, said = normalise(key, question), normalise(answer, question)
    letters = {letter.lower() for letter in options(question)}
    if key in letters and said not in letters:
        named = {letter.lower() for letter in LETTER.findall(ARTICLE.sub(r"\1", answer))} & letters
        return named == {key}
    return said == key


class Answers:
    """A JSONL file of one process: a line with the settings, then one for each answer. That of rank 0 bears the name
    given; the others lie beside it until all are joined."""

    def __init__(self, path: Path, rank: int, settings: dict):
        self.path, self.settings = path, settings
        self.own = path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path

    def parts(self) -> list[Path]:
        """The files of the run that this machine has."""
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*{glob.escape(self.path.suffix)}")
        return [part for part in (self.path, *sorted(others)) if part.exists()]

    def read(self) -> list[dict]:
        """What has been answered. A line without an end is none: the process was killed while it wrote. ValueError if
        a file holds something else, or answers given under other settings."""
        return [record for part in self.parts() for record in self._records(part)]

    def _records(self, part: Path) -> list[dict]:
        lines = part.read_bytes().split(b"\n")[:-1]
        if not lines:
            return []
        try:
            first, *records = [json.loads(line) for line in lines]
            changed = [key for key, now in self.settings.items() if first["settings"].get(key) != now]
            whole = all({"row", "sparsity"} < set(record) and set(record) & {"exact", "error"} for record in records)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{part}: holds something else than answers; give another file with --answers")
        for key in changed:
            told = f"made with {key} {first['settings'].get(key)!r}, not {self.settings[key]!r}"
            raise ValueError(f"{part}: {told}; go on with the same, or give another file with --answers")
        return records

    def open(self) -> None:
        """Makes ready to append; an unfinished last line goes."""
        whole = self.own.read_bytes() if self.own.exists() else b""
        self.file = self.own.open("ab", buffering=0)
        self.file.truncate(whole.rfind(b"\n") + 1)
        if b"\n" not in whole:
            self.append({"settings": self.settings})

    def append(self, record: dict) -> None:
        self.file.write(_json_line(record))

    def join(self, records: list[dict]) -> None:
        """By rank 0: all records to its file, which is then the only one."""
        lines = b"".join(map(_json_line, [{"settings": self.settings}, *records]))
        write_whole(self.path, lambda file: file.write(lines))
        for part in self.parts()[1:]:
            part.unlink()


def _json_line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"
