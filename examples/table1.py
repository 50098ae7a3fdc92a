"""Table 1 of the paper: what Qwen2-VL costs at each sparsity, and how well it answers RealWorldQA.

    python examples/table1.py costs
    python examples/table1.py accuracy DIR         the answers that evaluate.py wrote there, beside the paper's figures

`costs` counts from shapes, without weights. FLOPs, a multiply-add being two, are counted in two ways; MACs are half.
    linear           linear layers only, lm_head at every position: what the paper's counter saw, since it does not look
                     into fused attention
    all              what runs up to the first token of the answer: attention too, but lm_head and the last layer's
                     queries and MLP at the last position alone
"""

import sys
from itertools import product
from pathlib import Path

import torch

from common import Parser, by_job, exit_status, markdown, read_answers
from evaluate import table_of
from events import budget, need
from llm import Decoder, DecoderConfig
from vit import VisionConfig, VisionTransformer

MODELS = {
    "2B": DecoderConfig(151936, 1536, 8960, 28, 12, 2, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "7B": DecoderConfig(152064, 3584, 18944, 28, 28, 4, rms_norm_eps=1e-6),
    "72B": DecoderConfig(152064, 8192, 29568, 80, 64, 8, rms_norm_eps=1e-6),
}
SPARSITIES = (0.0, 0.3, 0.5, 0.7)
ENCLOSING = 2  # tokens of text that enclose the image: <|vision_start|> and <|vision_end|>
PARAMS = {"2B": 2.21, "7B": 8.29}  # billions, as the paper prints them
PAPER = {  # per cent right, FLOPs and MACs in T
    ("2B", 0.0): (62.9, 14.7, 7.4), ("7B", 0.0): (70.1, 31.1, 15.5),
    ("2B", 0.3): (62.7, 10.3, 5.2), ("7B", 0.3): (67.3, 24.7, 12.3),
    ("2B", 0.5): (61.4, 7.4, 3.7), ("7B", 0.5): (67.2, 17.9, 8.9),
    ("2B", 0.7): (59.1, 4.5, 2.2), ("7B", 0.7): (64.8, 11.1, 5.5),
}  # fmt: skip


def modules(config: DecoderConfig) -> tuple[VisionTransformer, Decoder]:
    """Our own modules at a published size, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return VisionTransformer(VisionConfig(hidden_size=config.hidden_size)), Decoder(config)


def costs(patches: int, text: int) -> None:
    """Prints the costs of an image of so many patches and a question of so many tokens."""
    fine = patches >= 4 and patches % 4 == 0 and text >= 1
    need(fine, f"patches {patches} and text {text}: give a multiple of 4, and 1 or more")
    print(f"{patches} patches ({patches // 4} tokens), {text} tokens of text and {ENCLOSING} that enclose the image.\n")
    head, lines = ["model", "sparsity", "params B", "paper"], []
    head += [f"{unit} T {which}" for unit in ("FLOPs", "MACs") for which in ("linear", "paper", "difference", "all")]
    for name, sparsity in product(MODELS, SPARSITIES):
        vit, llm = modules(MODELS[name])
        params = sum(parameter.numel() for part in (vit, llm) for parameter in part.parameters()) / 1e9
        groups = budget(patches // 4, 1 - sparsity)
        tokens, seen = groups + text + ENCLOSING, vit.flops([4 * groups], groups)
        linear, every = (seen[0] + llm.flops(tokens, scored=tokens)[0]) / 1e12, sum(seen + llm.flops(tokens)) / 1e12
        cells = [name, f"{sparsity:g}", f"{params:.2f}", PARAMS.get(name, "–")]
        for share, paper in zip((1, 0.5), PAPER.get((name, sparsity), "–––")[1:], strict=True):
            ours = share * linear
            cells += [f"{ours:.2f}", paper, "–" if paper == "–" else f"{ours - paper:+.2f}", f"{share * every:.2f}"]
        lines.append(cells)
    print(markdown(head, lines))


def measured(folder: Path, size: str | None) -> None:
    """Prints what the answers in a folder of evaluate.py say, beside the paper's figures for the model's size."""
    found = [*read_answers(folder).values()]
    records = by_job(record for _, some in found for record in some)
    need(bool(records), f"{folder}: no answers there; give the folder that evaluate.py wrote (--output)")
    size = size or next((size for size in PARAMS if f"-{size}" in Path(str(found[0][0].get("model"))).name), "")
    head, lines = table_of([{**records[job], "group": ""} for job in sorted(records)])
    lines = [[*line, *PAPER.get((size, float(line[0])), "–––")] for line in lines]
    print(markdown([*head, "paper: %", "TFLOPs linear", "TMACs linear"], lines))


def main(argv: list[str] | None = None) -> int:
    """Prints one of the two tables; returns the exit status."""
    parser = Parser("table1", description="The paper's Table 1: costs, and accuracy.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="costs | accuracy")
    add = commands.add_parser("costs", help="parameters, FLOPs and MACs", allow_abbrev=False).add_argument
    add("--patches", type=int, default=7056, help="of the dense image (default: %(default)s)")
    add("--text", type=int, default=60, help="tokens of text (default: %(default)s)")
    add = commands.add_parser("accuracy", help="what evaluate.py measured", allow_abbrev=False).add_argument
    add("folder", type=Path, metavar="DIR", help="where evaluate.py wrote its answers (--output)")
    add("--size", choices=tuple(PARAMS), help="of the paper's model (default: as the model's name says)")
    args = vars(parser.parse_args(argv))
    work = {"costs": costs, "accuracy": measured}[args.pop("command")]
    return exit_status("table1", lambda: work(**args))


if __name__ == "__main__":
    sys.exit(main())
