"""RealWorldQA, or any parquet file like it: rows of image, question and answer, two rules of scoring, and the file that
keeps the answers.

Scoring rules; both judge the same answer to the raw question, and what is correct by the first is so by the second
    exact            answer and key are equal once both are normalised: white space around, a trailing full stop and
                     capitals do not count, number words are digits, and the text of an option is its letter
    choice           of a question with lettered options: the answer is an option's text or names just one option's
                     letter as a capital, and it is the key's; a question without options is scored as by `exact`
"""

import fcntl
import glob
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow
from huggingface_hub import snapshot_download
from PIL import Image, UnidentifiedImageError
from pyarrow import parquet

from common import write_whole

COLUMNS = ("image", "question", "answer")
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
COUNTED = ONES + TEENS + [f"{ten}-{one}" if one != "zero" else ten for ten in TENS for one in ONES]
NUMBERS = {word: str(n) for n, word in enumerate(COUNTED)}  # zero to ninety-nine
OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t\r]*$", re.MULTILINE)  # a line such as "A. Left"
ARTICLE = re.compile(r"(^|[.!?]\s+)A(?= (?!(and|as|because|is|looks|or|seems|since)\b)[a-z])", re.MULTILINE)  # "A car"
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
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise ValueError(
            f"{data}: neither a file nor a dataset that can be downloaded ({reason}); correct it"
        ) from None
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
        for name in COLUMNS:
            if (times := table.schema_arrow.names.count(name)) != 1:
                needs = f"it needs {', '.join(COLUMNS)}, once each"
                raise ValueError(f"{path}: has {times} columns {name}; {needs}")
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
                        yield number, _row({name: piece[name][place] for name in COLUMNS})
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: broken after row {number} ({_line(error)}); fetch it again") from None


def _row(cells: dict[str, pyarrow.Scalar]) -> Row | ValueError:
    content = {}
    for name, cell in cells.items():
        try:
            content[name] = cell.as_py()
        except ValueError as error:  # text that is no UTF-8
            return ValueError(f"the row's {name} cannot be read ({_line(error)})")
    image = content["image"]
    image = image.get("bytes") if isinstance(image, dict) else image  # the hub's image column, or bare bytes
    if not isinstance(image, bytes):
        return ValueError("the row has no image")
    for name in ("question", "answer"):
        if not isinstance(content[name], str) or not content[name].strip():
            return ValueError(f"the row's {name} is {content[name]!r}, not a text")
    try:
        return Row(Image.open(BytesIO(image)), content["question"], content["answer"])
    except UnidentifiedImageError:
        return ValueError("the row's image is in no known format")
    except Exception as error:  # Pillow's readers raise errors of many kinds
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
        named = {letter.lower() for letter in LETTER.findall(ARTICLE.sub(r"\1", answer))} & letters
        return named == {key}
    return given == key


ANSWER = {"answer": str, "key": str, "exact": bool, "choice": bool, "tokens": int, "of": int, "linear": int, "all": int,
          "seconds": float}  # fmt: skip


class Answers:
    """A JSONL file of one process: a line with the settings, then one for each answer, or for what kept a question from
    being asked. The file of rank 0 bears the name given; the others lie beside it until all are joined."""

    def __init__(self, path: Path, rank: int, settings: dict):
        self.path, self.settings = path, settings
        self.own = path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path

    def parts(self) -> list[Path]:
        """The files of the run that this machine has."""
        others = self.path.parent.glob(f"{glob.escape(self.path.stem)}.rank*{glob.escape(self.path.suffix)}")
        return [part for part in (self.path, *sorted(others)) if part.exists()]

    def refuse_old(self) -> None:
        """ValueError if there are answers already."""
        if there := self.parts():
            raise ValueError(f"{there[0]}: has answers already; go on with --resume, or give another with --answers")

    def open(self) -> None:
        """Takes this process's file for itself. ValueError if another run has it."""
        self.file = self.own.open("ab", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.own}: another run is writing it; wait for it, or end it") from None

    def read(self) -> list[dict]:
        """What has been answered, and makes ready to append. An unfinished last line goes: the process was killed while
        it wrote. ValueError if a file holds something else, or answers given under other settings."""
        found = [record for part in self.parts() for record in self._records(part)]
        whole = self.own.read_bytes()
        self.file.truncate(whole.rfind(b"\n") + 1)
        if b"\n" not in whole:
            self.append({"settings": self.settings})
        return found

    def _records(self, part: Path) -> list[dict]:
        first, *lines = part.read_bytes().split(b"\n")
        if not lines and _json_line({"settings": self.settings}).startswith(first):
            return []
        try:
            was = json.loads(first)["settings"]
            changed = [key for key, now in self.settings.items() if was.get(key) != now]
            records = [json.loads(line) for line in lines[:-1]]
            whole = bool(lines) and all(map(_is_record, records))
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{part}: holds something else than answers; give another file with --answers")
        for key in changed:
            other = f"made with {key} {was.get(key)!r}, not {self.settings[key]!r}"
            raise ValueError(f"{part}: {other}; go on with the same, or give another file with --answers")
        return records

    def append(self, record: dict) -> None:
        line = _json_line(record)
        if self.file.write(line) != len(line):
            raise OSError(f"{self.own}: the disk is full; make room, and go on with --resume")

    def join(self, records: list[dict]) -> None:
        """By rank 0: all records to its file, which is then the only one."""
        lines = b"".join(map(_json_line, [{"settings": self.settings}, *records]))
        write_whole(self.path, lambda file: file.write(lines))
        for part in self.parts()[1:]:
            part.unlink(missing_ok=True)


def _json_line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _is_record(record) -> bool:
    if type(record["row"]) is not int or type(record["sparsity"]) is not float:
        return False
    return type(record.get("error")) is str or all(type(record.get(key)) is kind for key, kind in ANSWER.items())
