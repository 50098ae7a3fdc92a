"""What int8 weights (examples/int8.py) cost in answers and in scores.

    python tests/scripts/check_int8.py                    answers of the tiny model about held-out scenes and clips
    python tests/scripts/check_int8.py /tmp/random-2B     scores of the first token, against float32 (8.8 GB of memory)

Answers are decoded one token after the other, as the program does. Prints a Markdown table.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import int8
from bench_transformers import QUESTION, Case, Ours
from common import TINY, markdown
from epvlm import EPVLM, Options
from evidence import Sample, four_moments, samples

LOADERS = {
    "float32": lambda model: EPVLM.from_pretrained(model, device="cpu", dtype="float32"),
    "bfloat16": lambda model: EPVLM.from_pretrained(model, device="cpu", dtype="bfloat16"),
    "int8": int8.load,
}


def right(model: EPVLM, made: list[Sample], sparsity: float) -> list[bool]:
    """Whether each question is answered correctly."""
    found = []
    for sample in made:
        view = model.read(model.look(sample.image, sample.events if sparsity else None, Options(sparsity)))
        found += ["".join(model.stream(view, q.text)).strip() == q.answer for q in sample.questions]
    return found


def answers(count: int) -> Iterator[list]:
    made = {"stills": list(samples(count)), "clips": list(samples(count, four_moments))}
    yield ["weights", *(f"{what}, {s or 'dense'}" for what in made for s in (0, 0.5)), "all", "lost"]
    before = None
    for name, load in LOADERS.items():
        model = load(TINY)
        found = [right(model, some, sparsity) for some in made.values() for sparsity in (0, 0.5)]
        share = 100 * np.mean(np.concatenate(found))
        before = share if before is None else before
        yield [name, *(f"{100 * np.mean(some):.1f}" for some in found), f"{share:.2f}", f"{before - share:.2f}"]


@torch.inference_mode()
def scores(checkpoint: str) -> Iterator[list]:
    """Of 1024 patches at sparsity 0.5."""
    found = {}
    for name, load in LOADERS.items():
        model = load(checkpoint)
        view = Ours(model).look(Case(1024, 0.5))
        ids, positions = model.prompt(view, QUESTION)
        found[name] = model.llm.logits(model.llm(model.embed(view, ids), positions, wanted=1))[0, -1]
        del model
    yield [
        "weights",
        "largest difference from float32, in units of the largest score",
        "from bfloat16",
        "likeliest token",
    ]
    largest = found["float32"].abs().max()
    for name, each in found.items():
        errors = ((each - found[other]).abs().max() / largest for other in ("float32", "bfloat16"))
        yield [name, *(f"{error:.4f}" for error in errors), int(each.argmax())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?", help="compare the scores of this one")
    parser.add_argument("--questions", type=int, default=2000, help="of stills, and of clips (default: %(default)s)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of scenes in which only a corner moves
    head, *rows = scores(args.checkpoint) if args.checkpoint else answers(args.questions)
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
