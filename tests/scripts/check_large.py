"""Runs the program at real shapes: an answer from the command line, and first-token logits against transformers.

    python tests/scripts/check_large.py /tmp/random-2B frame.png events.npy --window 67500 87500

The checkpoint is one written by random_checkpoint.py, or the published one. Each model runs in a process of its own,
one after the other, since two float32 copies of 2B (8.8 GB each) seldom fit. Prints the answer, the peak resident
memory of each process, and the largest difference between the logits in units of the largest logit. Exit status 1 if
that exceeds 1e-3.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is moving?"

OURS = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np
from epvlm import EPVLM
model = EPVLM.from_pretrained(sys.argv[2], dtype="float32", device="cpu")
view, question = model.look(sys.argv[3]), sys.argv[4]
np.savez(sys.argv[5], ids=model.prompt(view, question)[0], patches=view.patches, grid=view.keep.shape,
         logits=model.logits(view, question)[-1])
"""

THEIRS = """
import sys
import numpy as np, torch
from transformers import Qwen2VLForConditionalGeneration
model = Qwen2VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
given = np.load(sys.argv[2])
ids = torch.from_numpy(given["ids"])[None]
with torch.no_grad():
    out = model(input_ids=ids, mm_token_type_ids=(ids == 151655).int(), pixel_values=torch.from_numpy(given["patches"]),
                image_grid_thw=torch.from_numpy(given["grid"])[None], logits_to_keep=1)
np.save(sys.argv[3], out.logits[0, -1].numpy())
"""

MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:]).returncode
print(f"peak resident memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f} GiB", file=sys.stderr)
sys.exit(status)
"""


def measured(title: str, *command: str) -> None:
    print(f"== {title}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-c", MEASURED, sys.executable, *map(str, command)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("image")
    parser.add_argument("events")
    parser.add_argument("--window", nargs=2, required=True)
    args = parser.parse_args()
    program = ROOT / "epvlm.py", args.image, args.events, QUESTION, "--model", args.checkpoint, "--window", *args.window
    measured("command line, as stored", *program, "--max-new-tokens", "16")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.npz", Path(folder) / "theirs.npy"
        measured("ours, float32, dense", "-c", OURS, ROOT, args.checkpoint, args.image, QUESTION, ours)
        measured("transformers, float32, dense", "-c", THEIRS, args.checkpoint, ours, theirs)
        a, b = np.load(ours)["logits"], np.load(theirs)
    largest, difference = np.abs(b).max(), np.abs(a - b).max()
    print(
        f"first token: {a.argmax()} and {b.argmax()}; largest logit {largest:.4g}; largest difference {difference:.3g}"
    )
    print(f"ratio {difference / largest:.3g} (limit 1e-3)")
    return int(not difference <= 1e-3 * largest)


if __name__ == "__main__":
    sys.exit(main())
