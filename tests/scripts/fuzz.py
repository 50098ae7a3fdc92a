"""Malformed files and questions, thousands of them, through all the readers: each is answered, or refused in a line.

    python tests/scripts/fuzz.py --cases 10000 --seed 0

Cases are good files that were mutated, and files made to be bad. A case fails if it raises anything but an error that
the command line turns into one line (`epvlm.exit_status`), if that line does not name the file, if it takes more than
10 s, or more memory than twice what a good file of its size takes, plus 64 MiB. Printed, by reader: how many were
tried, how they ended, and the largest memory and time seen. Exit status 1 if any case failed; `--case N` repeats one.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import convert
import tiny
import weights
from epvlm import EPVLM, Options, Sampling, exit_status, read_clip
from llm import prompt_ids
from test_convert import MADE, group, hdf5

SECONDS, SPARE = 10, 64 * 2**20
TOKEN = 4 * (128 + 4 * 64 + 3 * 96)  # bytes of one in the small model: keys, values and the widest layer, float32
ROWS = [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "u1")]
NASTY = [None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, float("inf"), float("nan"), "",
         "x", "0", [], [1], [16, 24, 24], [0, 0, 0], ["x"], {}, {"type": "mrope"}, "../config.json", "\ud800",
         "\0"]  # fmt: skip


class Bench:
    """A small model, good files, and a folder that each case may fill."""

    def __init__(self, folder: Path):
        self.good, self.work = folder / "good", folder / "work"
        tiny.write(self.good)
        self.model = EPVLM.from_pretrained(self.good, device="cpu")
        rng = np.random.default_rng(0)
        self.image = Image.fromarray(rng.integers(0, 256, (84, 112, 3), dtype=np.uint8))
        rows = np.zeros(500, ROWS)
        rows["x"], rows["y"], rows["t"] = rng.integers(0, 112, 500), rng.integers(0, 84, 500), np.arange(500) * 10
        rows["p"] = rng.integers(0, 2, 500)
        self.rows = rows

    def fresh(self) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        return self.work

    def answer(self, image=None, events=None, question="What?", model=None) -> None:
        model = model or self.model
        model.answer(image or self.image, events, question, sampling=Sampling(max_new_tokens=2))


def mutate(rng: np.random.Generator, data: bytes) -> bytes:
    """Cut, turned over, overwritten, doubled or with bytes put in; a few times."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(0, len(data) + 1)), int(2 ** rng.uniform(0, 9))
        match rng.integers(0, 7):
            case 0:
                del data[at:]
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = rng.bytes(length)
            case 3:
                data[at : at + length] = bytes([rng.choice([0, 255, 127, 48])]) * length
            case 4:
                data[at:at] = data[at : at + length]
            case 5 | 6:  # most headers are at the beginning
                at = int(min(2 ** rng.uniform(0, 12), len(data)))
                for place in range(at, min(at + int(rng.integers(1, 5)), len(data))):
                    data[place] = int(rng.integers(0, 256))
    return bytes(data)


# Images


def image_file(rng, bench: Bench) -> dict:
    path = bench.fresh() / "image.png"
    if rng.random() < 0.6:
        file, kind = io.BytesIO(), str(rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO"]))
        mode = "RGB" if kind in ("JPEG", "WEBP", "PPM", "ICO") else str(rng.choice(["RGB", "L", "P", "1"]))
        bench.image.convert(mode).save(file, kind)
        path.write_bytes(mutate(rng, file.getvalue()))
    else:
        odd_image(rng, path)
    return {"image": path}


def odd_image(rng, path: Path) -> None:
    match rng.integers(0, 9):
        case 0:
            sides = [(1, 1), (1, 10000), (10000, 1), (1, 201), (201, 1), (2, 400), (3, 5), (27, 5500)]
            Image.new("RGB", sides[rng.integers(len(sides))], (9, 8, 7)).save(path)
        case 1:  # a bomb: a header of huge sides, a body of nothing
            path.write_bytes(png(*(int(2 ** rng.uniform(10, 31)) for _ in range(2)), b"\0" * 20))
        case 2:
            mode = str(rng.choice(["CMYK", "YCbCr", "LAB", "HSV", "F", "I", "I;16", "LA", "PA", "RGBA", "1"]))
            kind = "TIFF" if mode in ("CMYK", "LAB", "F", "YCbCr", "HSV", "PA") else "PNG"
            try:
                Image.new(mode, (30, 40)).save(path, kind)
            except (OSError, ValueError, KeyError):
                Image.new("L", (30, 40)).save(path)
        case 3:
            grey = rng.integers(0, 2 ** int(rng.integers(1, 17)), (30, 40)).astype(np.uint16)
            Image.fromarray(grey).save(path)
        case 4:
            frames = [Image.new("P", (30, 30), n) for n in range(3)]
            frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
        case 5:
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(0, 300))
            Image.new("RGB", (30, 60)).save(path, "JPEG", exif=exif.tobytes() + rng.bytes(int(rng.integers(0, 9))))
        case 6:
            path.write_bytes(rng.bytes(int(2 ** rng.uniform(0, 14))))
        case 7:
            path.mkdir()
        case 8:
            path.symlink_to(path.name)


def png(width: int, height: int, body: bytes) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width % 2**31, height % 2**31, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


# Clips


def clip(rng, bench: Bench) -> dict:
    """A list, a folder or an animated file of four frames, with something wrong in it or in its times."""
    folder, flags = bench.fresh(), {}
    for n in range(4):
        bench.image.save(folder / f"{n}.png")
    words = ["0", "1", "0.04", "-1", "1e300", "nan", "inf", "x", "", "0x10", "1_0", "1.5.2", "٣", "9" * 400, "#", ","]
    times = [words[n] for n in rng.integers(0, len(words), 4)] if rng.random() < 0.5 else ["0", "0.04", "0.08", "0.12"]
    path = folder / ("list.txt" if (kind := rng.integers(0, 4)) < 2 else "a.webp" if kind == 2 else ".")
    if kind < 2:
        names = ["0.png", "nowhere.png", "..", "", "a b.png", "0.png\0", "list.txt", "/dev/null"]
        lines = [f"{time} {n}.png" if rng.random() < 0.8 else f"{time} {names[rng.integers(len(names))]}"
                 for n, time in enumerate(times)]  # fmt: skip
        text = str(rng.choice(["\n", "\r\n", "\n\n"])).join(lines).encode()
        path.write_bytes(text if kind else mutate(rng, text))
    elif kind == 2:
        file = io.BytesIO()
        more = [bench.image] * 3
        bench.image.save(file, "WEBP", save_all=True, append_images=more, duration=int(rng.integers(0, 50)))
        path.write_bytes(mutate(rng, file.getvalue()))
    else:
        (folder / "1.png").write_bytes(mutate(rng, (folder / "1.png").read_bytes()))
        (folder / "times").write_text("\n".join(times))
        flags = {"times": str(folder / "times")} if rng.random() < 0.5 else {"fps": float(rng.choice([0, 25, -1, 1e9]))}
    return {"folder": folder, "clip": path, **flags}


# Events


def events_file(rng, bench: Bench) -> dict:
    path = bench.fresh() / ("events.npz" if rng.random() < 0.3 else "events.npy")
    if rng.random() < 0.6:
        file, kind = io.BytesIO(), rng.integers(0, 5)
        bare = np.stack([bench.rows[name].astype(np.float64) for name in "txyp"], 1)
        if path.suffix == ".npz":
            columns = {name: bench.rows[name] for name in "xytp"}
            (np.savez if kind % 2 else np.savez_compressed)(
                file, **({"event_data": bench.rows} if kind < 2 else columns)
            )
        else:
            np.save(file, [bench.rows, bare, np.asfortranarray(bare), np.ones((84, 112)), bench.rows[:0]][kind])
        path.write_bytes(mutate(rng, file.getvalue()))
    else:
        odd_events(rng, bench, path)
    return {"events": path}


def odd_events(rng, bench: Bench, path: Path) -> None:
    path = path.with_suffix(path.suffix)
    rows = bench.rows.astype(
        [(name, str(rng.choice(["<f8", "<f4", "<i8", ">i4", "<i2", "<u8", "<f2"]))) for name in "xytp"]
    )
    match rng.integers(0, 12):
        case 0:  # a header that claims far more rows than follow
            count = int(10 ** rng.uniform(3, 18))
            header = {"descr": ROWS, "fortran_order": False, "shape": (count,)}
            file = io.BytesIO()
            np.lib.format.write_array_header_2_0(file, header)
            data = file.getvalue() + b"\1" * 1000
            path.write_bytes(data if path.suffix == ".npy" else zipped({"event_data.npy": data}))
            return
        case 1:
            np.save(path.open("wb"), np.array([{"x": 1}, None], dtype=object), allow_pickle=True)
            return
        case 2:
            name = str(rng.choice(list("xytp")))
            value = [np.nan, np.inf, -np.inf, -1, 0.5, 1e300, 2**31, 65535, -(2**15)][rng.integers(9)]
            with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
                rows[name][rng.integers(0, len(rows), 3)] = np.array(value).astype(rows[name].dtype)
        case 3:
            rows = rows[rng.permutation(len(rows))] if rng.random() < 0.5 else rows[::-1]
        case 4:
            rows["t"] = 7
        case 5:
            rows = rows[: rng.integers(0, 3)]
        case 6:
            rows["p"] = rng.integers(0, 4, len(rows))
        case 7:
            names = [str(name) for name in rng.permutation(["x", "y", "t", "p", "time", "X", "polarity", "z"])]
            rows = rows.copy()
            rows.dtype.names = names[:4]
        case 8:  # a bomb
            size = int(2 ** rng.uniform(20, 33))
            path.write_bytes(zipped({"event_data.npy": bomb(size)} if size < 2**26 else {"x.npy": (size, b"\0")}))
            return
        case 9:
            rows = np.stack([rows[name].astype(np.float64) for name in "xytp"], 1)[:, : rng.integers(1, 6)]
        case 10:
            rows = rng.integers(0, 300, tuple(rng.integers(0, 9, rng.integers(0, 4)))).astype(
                str(rng.choice(["u1", "i2", "f2", "c8", "U3", "S2", "M8[s]", "?"]))
            )
        case 11:
            path.write_bytes(rng.bytes(int(2 ** rng.uniform(0, 14))))
            return
    with path.open("wb") as file:
        np.savez(file, rows) if path.suffix == ".npz" else np.save(file, rows)


def bomb(size: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": ROWS, "fortran_order": False, "shape": (size // 13,)})
    return file.getvalue() + b"\0" * (size // 13 * 13)


def zipped(members: dict) -> bytes:
    """An archive; of a member (size, byte) so many of the byte, in pieces."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                if isinstance(data, bytes):
                    member.write(data)
                else:
                    head = io.BytesIO()
                    shape = {"descr": "|u1", "fortran_order": False, "shape": (data[0],)}
                    np.lib.format.write_array_header_2_0(head, shape)
                    member.write(head.getvalue())
                    for _ in range(data[0] // 2**22):
                        member.write(data[1] * 2**22)
    return file.getvalue()


# Homographies and recordings


def homography(rng, bench: Bench) -> dict:
    """A matrix near a mirror's in a file, perhaps mutated, or one of odd numbers."""
    path = bench.fresh() / str(rng.choice(["H.npy", "H.txt"]))
    H = np.array([[-1.0, 0, 111], [0, 1, 0], [0, 0, 1]]) + rng.normal(size=(3, 3)) * [
        [0.01, 0.01, 9],
        [0.01, 0.01, 9],
        [0.001, 0.001, 0],
    ]
    odd = rng.random() < 0.4
    if odd:
        values = [0, 1, -1, 1e-300, 1e308, -1e5, 5e-324, np.nan, np.inf, 112]
        H[rng.random((3, 3)) < 0.3] = values[rng.integers(len(values))]
        H = H[: rng.integers(1, 4)] * 10 ** rng.uniform(-20, 0) if rng.random() < 0.5 else -H
    file, kind = io.BytesIO(), str(rng.choice(["<f8", ">f4", "c16", "U9", "O"], p=[0.6, 0.1, 0.1, 0.1, 0.1]))
    with warnings.catch_warnings(action="ignore"):
        np.save(file, H.astype(kind)) if path.suffix == ".npy" else np.savetxt(
            file, H, delimiter=rng.choice([" ", ","])
        )
    path.write_bytes(file.getvalue() if odd or rng.random() < 0.4 else mutate(rng, file.getvalue()))
    return {"homography": path}


def recording(rng, bench: Bench) -> dict:
    """Of any kind that `convert.py` reads, mutated, perhaps under another's name; HDF5 of odd columns; and flags."""
    name = list(MADE)[rng.integers(len(MADE))]
    content, suffix = MADE[name][0], Path(name).suffix
    if rng.random() < 0.2:
        suffix = str(rng.choice([".raw", ".dat", ".bin", ".h5", ".txt", ".aedat4", ".npy", ""]))
    path = bench.fresh() / f"recording{suffix}"
    path.write_bytes(mutate(rng, content) if rng.random() < 0.8 else odd_hdf5(rng, bench))
    edges = [-1e18, -1.0, 0.0, 5000.0, 100_000.0, 1e9, 1.5e15 + 9e4, 1e18]
    window = tuple(edges[n] for n in sorted(rng.choice(len(edges), 2, replace=False)))
    flags = {"window": window if rng.random() < 0.5 else None, "rectify": None, "calibration": None}
    flags["time_unit"] = [None, None, "s", "us", "ns"][rng.integers(5)]
    flags |= {"order": [None, None, "txyp", "pyxt"][rng.integers(4)], "camera": str(rng.choice(["left", "right"]))}
    return {"recording": path, **flags}


def odd_hdf5(rng, bench: Bench) -> bytes:
    odd = [lambda a: a[:0], lambda a: a[:, None], lambda a: a[3], lambda a: a.astype("S4"), lambda a: a * np.nan,
           lambda a: a[::-1], lambda a: a.astype("f4") / 7, lambda a: a.astype("u8") + 2**63, lambda a: a[:9],
           lambda a: h5py.Empty("i4"), lambda a: -a.astype("i8"), lambda a: a.view([("x", a.dtype)])]  # fmt: skip
    columns = [bench.rows[name] for name in "xytp"]
    for n in rng.integers(0, 4, rng.integers(0, 3)):
        with contextlib.suppress(ValueError, TypeError, IndexError, AttributeError):
            columns[n] = odd[rng.integers(len(odd))](columns[n])

    def change(h5) -> None:
        group(h5, str(rng.choice(["events", "left", "a/right/b"])), *columns)
        offset = [0, 5, 2**62, -1.5, np.nan, "x", [1, 2], h5py.SoftLink("/nowhere"), np.dtype("i4")][rng.integers(9)]
        if rng.random() < 0.5:
            h5["t_offset"] = offset
        if rng.random() < 0.3:
            h5.attrs["sensor_resolution"] = [5, "240x180", [1, 2, 3], [np.nan, 1], []][rng.integers(5)]

    return hdf5(change)


def converted(case: dict) -> None:
    """Converts; after an error nothing lies beside the recording."""
    path = case["recording"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            convert.run(argparse.Namespace(**case, frame=None, output=path.with_name("out.npy")))
    except ValueError:
        if left := [each.name for each in path.parent.iterdir() if each != path]:
            raise AssertionError(f"{left} half-written") from None
        raise


# Checkpoints and tokenizers


def checkpoint(rng, bench: Bench) -> dict:
    folder = bench.fresh() / "model"
    folder.mkdir()
    for file in bench.good.iterdir():
        os.link(file, folder / file.name)
    match rng.integers(0, 6):
        case 0:
            rewrite(folder / "model.safetensors", mutate(rng, (bench.good / "model.safetensors").read_bytes()))
        case 1:
            lying_header(rng, folder / "model.safetensors")
        case 2:
            json_value(rng, folder / "config.json")
        case 3:
            path = folder / str(rng.choice(["config.json", "tokenizer.json", *settings(bench)]))
            rewrite(path, mutate(rng, path.read_bytes() if path.exists() else b"{}"))
        case 4:
            index(rng, folder)
        case 5:
            name, content = list(settings(bench).items())[rng.integers(4)]
            rewrite(folder / name, json.dumps(content).encode())
            json_value(rng, folder / name)
    return {"model": folder}


def settings(bench: Bench) -> dict[str, dict]:
    """Good files of settings that a checkpoint may have or lack."""
    limits = {"min_pixels": 3136, "max_pixels": 10**6, "image_mean": [0.5] * 3, "size": {"longest_edge": 10**6}}
    token = {"content": "<|new|>", "special": True, "lstrip": False}
    listed = {str(bench.model.tokenizer.get_vocab_size()): token}
    return {
        "preprocessor_config.json": limits,
        "processor_config.json": {"image_processor": limits},
        "generation_config.json": {"eos_token_id": [3], "repetition_penalty": 1.05},
        "tokenizer_config.json": {"added_tokens_decoder": listed, "chat_template": "a text"},
    }


def rewrite(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # it is a link to the good one
    path.write_bytes(data)


def json_value(rng, path: Path) -> None:
    """Puts something nasty in the place of a value, or takes it away; anywhere in the object."""
    content = json.loads(path.read_text())
    for _ in range(rng.integers(1, 3)):
        place = content
        while True:
            key = list(place)[rng.integers(len(place))] if place else "x"
            if not isinstance(place.get(key), dict) or rng.random() < 0.2:
                break
            place = place[key]
        if rng.random() < 0.2:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])  # which the next one may change
    rewrite(path, json.dumps(content).encode())


def lying_header(rng, path: Path) -> None:
    """safetensors: a length, a JSON header, the data; the header changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = [key for key in header if key != "__metadata__"][rng.integers(len(header) - 1)]
    match rng.integers(0, 7):
        case 0:
            header[name]["shape"] = [[2**62, 2], [-1], [10**6, 10**6], [], [0], "x"][rng.integers(6)]
        case 1:
            header[name]["data_offsets"] = [[0, 2**62], [-4, 4], [4, 0], [0], [len(body), len(body) + 4]][
                rng.integers(5)
            ]
        case 2:
            header[name]["dtype"] = str(rng.choice(["F64", "I8", "BOOL", "X", "F8_E4M3", "BF16", "F4"]))
        case 3:
            header[name + "x"] = header.pop(name)
        case 4:
            del header[name]
        case 5:  # the values are no numbers
            start, end = header[name]["data_offsets"]
            body = body[:start] + np.full((end - start) // 4, np.nan, "<f4").tobytes() + body[end:]
        case 6:
            length = [2**63, 10**9, 0, length + 1][rng.integers(4)]
            rewrite(path, struct.pack("<Q", length) + data[8:])
            return
    text = json.dumps(header).encode()
    rewrite(path, struct.pack("<Q", len(text)) + text + body)


def index(rng, folder: Path) -> None:
    """Shards that are missing, or lie where they must not."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    outside = folder.parent / "outside.safetensors"
    shutil.copy(folder / "model-00001-of-00001.safetensors", outside)
    names = ["../outside.safetensors", str(outside), "nowhere.safetensors", "model-00001-of-00001.safetensors", "",
             ".", "..", "a\0b.safetensors", "C:\\x.safetensors", 5, None, ["x"], "config.json"]  # fmt: skip
    content = {"weight_map": {"model.norm.weight": names[rng.integers(len(names))]}}
    if rng.random() < 0.2:
        content = [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "x"}][rng.integers(5)]
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def tokenizer(rng, bench: Bench) -> dict:
    folder = bench.fresh()
    good = (bench.good / "tokenizer.json").read_bytes()
    match rng.integers(0, 4):
        case 0:
            data = mutate(rng, good)
        case 1:
            (folder / "tokenizer.json").write_bytes(good)
            json_value(rng, folder / "tokenizer.json")
            data = (folder / "tokenizer.json").read_bytes()
        case 2:
            content = json.loads(good)
            special = content["added_tokens"]
            del special[rng.integers(len(special))]
            data = json.dumps(content).encode()
        case 3:
            data = [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000][rng.integers(7)]
    (folder / "tokenizer.json").write_bytes(data)
    return {"tokenizer": folder}


# Questions


def question(rng, bench: Bench) -> dict:
    pieces = [*tiny.SPECIALS, "What?", " ", "\n", "\0", "\ud800", "\udcff", "א", "ع", "\u202e", "👩\u200d👧", "e\u0301"]
    pieces += ["\ufeff", "\u2028", "<|", "|>", "im_end", "Ω", "\x1b[2J", "�", "\U0010ffff", "\r", "\t", "<think>"]
    chosen = [pieces[n] for n in rng.integers(0, len(pieces), rng.integers(0, 12))]
    text = "".join(chosen) * int(10 ** max(0, rng.uniform(-3, 4)))
    return {"question": text[:100_000]}


READERS = {"images": image_file, "clips": clip, "events": events_file, "homographies": homography,
           "recordings": recording, "checkpoints": checkpoint, "tokenizers": tokenizer,
           "questions": question}  # fmt: skip


def use(bench: Bench, case: dict) -> None:
    """What the program would do with it."""
    if "model" in case:
        bench.answer(model=EPVLM.from_pretrained(case["model"], device="cpu"))
    elif "clip" in case:
        found = read_clip(case["clip"], case.get("times"), case.get("fps"))
        bench.model.look(case["clip"] if found is None else found, None, Options(0.5, rule="cover", max_pixels=10**4))
    elif "homography" in case:
        bench.model.look(bench.image, bench.rows, Options(homography=case["homography"]))
    elif "recording" in case:
        converted(case)
    elif "tokenizer" in case:
        found = weights.read_tokenizer(case["tokenizer"], 400)
        EPVLM(dataclasses.replace(bench.model.checkpoint, tokenizer=found))
        prompt_ids(found, "What is moving?")
    elif "question" in case:
        tokenizer = bench.model.tokenizer
        before, after = prompt_ids(tokenizer, case["question"])
        special = {tokenizer.token_to_id(text) for text in tiny.SPECIALS}
        inner = after[1 : after.index(tokenizer.token_to_id("<|im_end|>"), 1)]
        if special & set(inner) or sum(token in special for token in before + after) != 7:
            raise AssertionError("a special token came from the question")
        bench.answer(question=case["question"])
    else:
        bench.answer(**case)


def peak() -> int:
    """Largest resident memory since `reset`, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def run(bench: Bench, case: dict) -> tuple[str, str, float, int]:
    """How a case ended (answered, refused, or what failed), in what words, its seconds and bytes."""
    start, before, stderr = time.perf_counter(), reset(), io.StringIO()
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(stderr):
            status = exit_status("fuzz", lambda: use(bench, case))
        if status == 130:
            raise KeyboardInterrupt
        ended, told = {0: "answered", 2: "refused"}.get(status, f"ended with {status}"), stderr.getvalue()
        if told.count("\n") != (status == 2):
            ended = "printed other than one line"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what the libraries raise past Exception
        ended, told = f"raised {type(error).__name__}", "".join(traceback.format_exception(error)[-3:])
    seconds, memory = time.perf_counter() - start, peak() - before
    path = next(iter(case.values()))
    if ended == "refused" and isinstance(path, Path) and str(path) not in told and not named(told):
        ended = "refused without a name"
    if seconds > SECONDS:
        ended = "took too long"
    size = sum(file.stat().st_size for file in path.rglob("*")) if isinstance(path, Path) and path.is_dir() else 0
    size = path.stat().st_size if isinstance(path, Path) and path.is_file() else size
    if memory > 2 * max(20 * size, claimed(case)) + SPARE:  # a good compressed file may hold twenty times its size
        ended = "took too much memory"
    return ended, told, seconds, memory


def claimed(case: dict) -> int:
    """Bytes that a good image or question of its size needs: of the pixels in its header, as long as Pillow takes so
    many; of its characters, each perhaps a token."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = case.get("image", case.get("clip"))
            width, height = Image.open(image).size if image else (0, 0)
        return 4 * width * height + TOKEN * len(case.get("question", ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0


def named(told: str) -> bool:
    """Whether a line names what is wrong in another way than by the file's path."""
    return any(
        word in told
        for word in (
            "question",
            "max_pixels",
            "sensor",
            "scores in",
            "the image",
            "crop it",
            "fps",
            "perhaps homography",
        )
    )


def fuzz(cases: int, seed: int, only: int | None = None) -> Counter:
    """Prints the table; returns how many cases of each reader ended how."""
    ends, worst, shown = Counter(), {}, Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for number in [only] if only is not None else range(cases):
            rng = np.random.default_rng((seed, number))
            reader = list(READERS)[number % len(READERS)]
            case = READERS[reader](rng, bench)
            ended, told, seconds, memory = run(bench, case)
            ends[reader, ended] += 1
            old = worst.get(reader, (0, 0))
            worst[reader] = max(old[0], seconds), max(old[1], memory)
            if only is not None or (ended not in ("answered", "refused") and shown[reader, ended] < 5):
                shown[reader, ended] += 1
                print(f"case {number} ({reader}) {ended}: {told[-2000:]}", file=sys.stderr)
            if sys.stderr.isatty() and number % 50 == 0:
                print(f"\r{number} of {cases}", end="\r", file=sys.stderr)
    heads = ("reader", "tried", "answered", "refused", "failed", "longest, s", "most memory, MiB")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for reader in READERS:
        tried = {ended: n for (name, ended), n in ends.items() if name == reader}
        good = [tried.get("answered", 0), tried.get("refused", 0)]
        cells = [reader, sum(tried.values()), *good, sum(tried.values()) - sum(good)]
        seconds, memory = worst.get(reader, (0, 0))
        print(f"| {' | '.join(map(str, cells))} | {seconds:.2f} | {memory / 2**20:.0f} |")
    return ends


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one, with its words")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ends = fuzz(args.cases, args.seed, args.case)
    return int(any(ended not in ("answered", "refused") for _, ended in ends))


if __name__ == "__main__":
    sys.exit(main())
