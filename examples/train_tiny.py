"""Trains the tiny Qwen2-VL of examples/tiny on the scenes of scenes.py, dense: nothing is dropped.

    python examples/train_tiny.py STILLS_FOLDER                                     from scratch, on stills
    python examples/train_tiny.py CLIPS_FOLDER --start STILLS_FOLDER/model          then on clips and stills

It goes on from FOLDER/state.pt if there is one, so an interruption costs at most 250 steps and changes nothing.
FOLDER/log.txt lists the accuracy by kind of question, on scenes not seen before; FOLDER/model holds the checkpoint of
that time.

Training begins with one thing in a scene, and adds things when every kind of question is learned: with several from the
start, thousands of steps do not teach which colour belongs to which shape. The same holds for clips, and which way a
thing moves: see CLIPS. A batch is images, or clips, of one size; an image is read once, and each of its questions sees
the image but no other question.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import scenes
from common import Parser, exit_status, write_whole
from epvlm import EPVLM
from llm import mrope_positions, prompt_ids
from vit import Clip, ImageConfig, packed_patches
from weights import Checkpoint, build, published

QUESTIONS, CLIP_QUESTIONS = 8, 5  # of an image, of a clip
WARM_UP = 200  # steps: the learning rate rises
COOL_DOWN, CLIP_COOL_DOWN = 0.3, 0.6  # the last part of all steps, without and with clips: it falls to zero


@dataclass(frozen=True)
class Stage:
    """What a step shows, and what opens the next stage."""

    things: tuple[int, int]  # least and most in a scene
    opens: dict[str, float]  # accuracy by kind of question, of clips "clip KIND"
    over: int = 1500  # answers of a kind that its accuracy is taken over
    stills: int = 16
    clips: int = 0
    sides: tuple[int, int] = (4, 4)  # of a clip's frame, in groups, least and most
    frames: tuple[int, int] = (4, 4)
    spells: tuple[str, ...] = ("go",)
    kinds: tuple[str, ...] = scenes.CLIP_KINDS


LEARNED = {"colour": 0.88, "shape": 0.85, "count": 0.88, "relation": 0.80}  # places need no help
STILLS = [Stage(things, LEARNED) for things in ((1, 1), (2, 2), (2, 3), scenes.THINGS)]
ALL, MOVING = tuple(scenes.SPELLS), ("way", "which", "what")
CLIPS = [  # "nowhere" would be the likeliest answer as long as no direction is known, and hide it
    Stage((1, 1), {"clip way": 0.85}, 500, 6, 20, kinds=MOVING),
    Stage((2, 2), {"clip way": 0.85, "clip what": 0.85}, 500, 6, 20),
    Stage((2, 2), {"clip what": 0.85, "clip stop": 0.79}, 500, 6, 16, (4, 5), (3, 8), ALL),
    Stage((2, 3), {}, 500, 8, 16, scenes.CLIP_SIDES, (2, 8), ALL),
]
NAMES = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
         "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]  # fmt: skip
VISION = {"depth": 4, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 4, "in_chans": 3,
          "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}  # fmt: skip


def tokenizer(clips: bool = False) -> Tokenizer:
    """One in which each word of the questions, on request also about clips, is one token; any other text goes byte by
    byte."""
    made = [scenes.scene(scenes.TRAIN + seed) for seed in range(999)]
    made += [scenes.clip(scenes.TRAIN + seed) for seed in range(999)] if clips else []
    asked = [question for scene in made for question in scenes.questions(scene)]
    words = {word for q in asked for word in (q.text.rstrip("?") + " " + q.answer).split()}
    chat = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "?"]
    return byte_level([*chat, *sorted(words), *(f" {word}" for word in sorted(words))], 900)


def byte_level(text: list[str], size: int) -> Tokenizer:
    """Byte-level BPE as Qwen2's, trained on `text` to at most `size` tokens, and Qwen2-VL's special tokens."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in NAMES])
    return made


def settings(tokens: Tokenizer) -> dict:
    """config.json in its published form."""
    ids = {name: tokens.token_to_id(f"<|{name}|>") for name in NAMES}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": tokens.get_vocab_size(),
        "hidden_size": VISION["hidden_size"],
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-06,
        "rope_theta": 20.0,  # rows and columns have the slow frequencies: a large base would hardly turn them
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": ids["im_end"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "vision_token_id": ids["vision_pad"],
        "image_token_id": ids["image_pad"],
        "video_token_id": ids["video_pad"],
        "vision_config": VISION,
    }


def begin(folder: Path, start: Path | None = None) -> EPVLM:
    """The model with random weights, or with those of the checkpoint `start` and more words; its settings and tokenizer
    are written into `folder`. Raises ValueError if another tokenizer is there."""
    known = start and EPVLM.from_pretrained(start, device="cpu", dtype="float32")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, images = tokenizer(clips=start is not None), ImageConfig(max_pixels=224 * 224)
    path = folder / "tokenizer.json"
    if path.exists() and Tokenizer.from_file(str(path)).to_str() != tokens.to_str():
        raise ValueError(f"{path}: of another training; give --start as it was given then, or another folder")
    tokens.save(str(path))
    limits = {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels}
    for name, content in (("config", settings(tokens)), ("preprocessor_config", limits)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    vit, llm = build(folder)
    torch.manual_seed(0)
    for part in (vit, llm):
        part.to_empty(device="cpu")
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif hasattr(module, "weight"):  # RMSNorm
                torch.nn.init.ones_(module.weight)
    torch.nn.init.normal_(llm.model["embed_tokens"].weight, std=0.02)  # learns several times faster than with 1
    model = EPVLM(Checkpoint(vit, llm, tokens, images))
    if known:
        carry(known, model)
    return model


@torch.no_grad()
def carry(known: EPVLM, model: EPVLM) -> None:
    """All weights of a model into one that knows more words: rows of the embedding go by their tokens, and new ones are
    random, as large as the old ones."""
    weights = published(model.vit, model.llm)
    for name, old in published(known.vit, known.llm).items():
        if "embed_tokens" in name:
            old_ids, new = known.tokenizer.get_vocab(), torch.randn(weights[name].shape) * old.std()
            for token, row in model.tokenizer.get_vocab().items():
                if token in old_ids:
                    new[row] = old[old_ids[token]]
            old = new
        weights[name].copy_(old)


class Shared:
    """In place of llm.KVCache: the keys and values of a batch of images, then seen by each of their questions."""

    def __init__(self):
        self.stored, self.filled = [], 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self.filled:
            self.stored.append((k, v))
            return k, v
        images = (part.repeat_interleave(len(k) // len(part), 0) for part in self.stored[layer])
        return tuple(torch.cat(parts, 2) for parts in zip(images, (k, v), strict=True))


def ask(model: EPVLM, questions: list[scenes.Question]) -> tuple[list[int], Tensor, Tensor]:
    """Token ids before the image; of each question what comes after it, the answer and its end included, padded to
    (questions, L) int64; and where the answer stands, (questions, L) bool."""
    rows, end = [], model.tokenizer.token_to_id("<|im_end|>")
    for question in questions:
        before, after = prompt_ids(model.tokenizer, question.text)
        rows.append((after, [*model.tokenizer.encode(question.answer).ids, end]))
    ids = torch.zeros(len(rows), max(len(after + answer) for after, answer in rows), dtype=torch.int64)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (after, answer) in enumerate(rows):
        ids[row, : len(after + answer)] = torch.tensor(after + answer)
        wanted[row, len(after) : len(after + answer)] = True
    return before, ids, wanted


def score(model: EPVLM, H_v: Tensor, groups: Tensor, questions: list[scenes.Question]) -> tuple[Tensor, Tensor]:
    """Loss of each question, and whether greedy decoding answers it correctly: whether every token of the answer, and
    its end, is the likeliest after those before it.

    H_v (B, groups kept, hidden_size) of B images of one size; groups (T, groups_h, groups_w) bool; as many questions of
    each image. Returns (questions,) float32, (questions,) bool."""
    before, ids, wanted = ask(model, questions)
    image = torch.cat((model.llm.embed(torch.tensor(before)).expand(len(H_v), -1, -1), H_v), 1)
    positions = mrope_positions(len(before), groups, ids.shape[1] - 1)
    cache = Shared()
    model.llm(image, positions[:, : image.shape[1]], cache)
    hidden = model.llm(model.llm.embed(ids[:, :-1]), positions[:, image.shape[1] :], cache)
    wanted, target = wanted[:, 1:], ids[:, 1:][wanted[:, 1:]]
    logits = model.llm.logits(hidden[wanted])
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == target
    losses = torch.zeros(wanted.shape).masked_scatter(wanted, F.cross_entropy(logits, target, reduction="none"))
    return losses.sum(1) / wanted.sum(1), right.all(1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images or clips of one size, dense."""

    patches: Tensor  # (B * T, N, 1176): a moment of a clip attends to itself alone, as an image does
    keep: Tensor  # (T, grid_h, grid_w) bool, all True
    questions: list[scenes.Question]  # as many of each of the B


def stills(model: EPVLM, first: int, stage: Stage) -> Batch:
    """The scenes of the seeds from `first` on."""
    size = scenes.scene(first).size
    shown = [scenes.scene(first + k, stage.things, size) for k in range(stage.stills)]
    asked = [scenes.choose(scenes.questions(scene), QUESTIONS, first + k) for k, scene in enumerate(shown)]
    return packed(model, [Clip([Image.fromarray(scenes.render(scene))]) for scene in shown], asked, QUESTIONS)


def clips(model: EPVLM, first: int, stage: Stage) -> Batch:
    """The clips of the seeds from `first` on."""
    rng = np.random.default_rng(first)
    size = tuple(28 * int(side) for side in rng.integers(stage.sides[0], stage.sides[1] + 1, 2))
    frames = (int(rng.integers(stage.frames[0], stage.frames[1] + 1)),) * 2
    shown, asked = [], []
    for seed in range(first, first + stage.clips):
        shown.append(scenes.clip(seed, stage.things, frames, stage.spells, size))
        fit = [question for question in scenes.questions(shown[-1]) if question.kind in stage.kinds]
        asked.append(scenes.choose(fit, CLIP_QUESTIONS, seed, scenes.CLIP_KINDS))
    return packed(model, [scenes.shown(clip) for clip in shown], asked, CLIP_QUESTIONS)


def packed(model: EPVLM, shown: list[Clip], asked: list[list[scenes.Question]], count: int) -> Batch:
    """As many questions of each: those with fewer are asked some twice."""
    width, height = shown[0].size
    keep = torch.ones(shown[0].moments, height // 14, width // 14, dtype=torch.bool)
    patches = [packed_patches(clip, keep, model.vit.config, model.image_config) for clip in shown]
    questions = [question for several in asked for question in (several * count)[:count]]
    return Batch(torch.cat(patches).view(-1, keep[0].numel(), patches[0].shape[1]), keep, questions)


class Training:
    """Weights in float32, the model that works in bfloat16, and all that has to survive an interruption."""

    def __init__(self, folder: Path, steps: int, rate: float, start: Path | None = None):
        self.folder, self.steps, self.rate = folder, steps, rate
        self.stages, self.first = (CLIPS, 2 * scenes.TRAIN) if start else (STILLS, scenes.TRAIN)
        self.cool_down = CLIP_COOL_DOWN if start else COOL_DOWN
        self.apart = max(max(stage.stills, stage.clips) for stage in self.stages)  # no seed is shown twice
        self.model = begin(folder / "model", start)
        self.weights = {name: tensor.clone() for name, tensor in published(self.model.vit, self.model.llm).items()}
        parts = (self.model.vit.bfloat16(), self.model.llm.bfloat16())
        self.working = published(*parts)  # shares its memory with the model
        self.parameters = [parameter for part in parts for parameter in part.parameters()]
        matrix = [name for name, w in self.weights.items() if w.ndim == 2 and "embed_tokens" not in name]
        others = [w for name, w in self.weights.items() if name not in matrix]
        matrices = [self.weights[name] for name in matrix]
        self.optimisers = [
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),  # here sooner than AdamW
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01),
        ]
        self.step, self.stage = 0, 0
        self.recent: dict[str, list[bool]] = defaultdict(list)  # by kind: which of the last answers are right
        if (folder / "state.pt").exists():
            self.resume(folder / "state.pt")

    def resume(self, path: Path) -> None:
        """Goes on from a state that `save` wrote; ValueError for any other file."""
        try:
            self._take(torch.load(path, weights_only=True))
        except Exception as error:  # a damaged file raises errors of many kinds
            what = f"not a state of this training ({type(error).__name__})"
            raise ValueError(f"{path}: {what}; remove it to begin anew, or give another folder") from None

    def _take(self, state: dict) -> None:
        self.step, self.stage = state["step"], state["stage"]
        self.recent.update(state["recent"])
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def save(self) -> None:
        """The checkpoint first, then the state."""
        state = {"step": self.step, "stage": self.stage, "recent": dict(self.recent), "weights": self.weights}
        state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        tensors = save(self.weights, metadata={"format": "pt"})
        write_whole(self.folder / "model" / "model.safetensors", lambda file: file.write(tensors))
        write_whole(self.folder / "state.pt", lambda file: torch.save(state, file))

    def advance(self) -> float:
        """One step; returns its loss."""
        for name, weight in self.weights.items():
            self.working[name].copy_(weight)
        stage, losses = self.stages[self.stage], []
        for make, count in ((stills, stage.stills), (clips, stage.clips)):
            if count:
                shown = make(self.model, self.first + self.step * self.apart, stage)
                losses.append(self.learn(shown, "clip " * (make is clips)))
        for weight, parameter in zip(self.weights.values(), self.parameters, strict=True):
            weight.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        left = (self.steps - self.step) / self.steps
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = self.rate * min(1, (self.step + 1) / WARM_UP, left / self.cool_down)
            optimiser.step()
        self.step += 1
        return sum(losses)

    def learn(self, shown: Batch, what: str) -> float:
        """Adds the gradients of a batch, and its answers to the recent ones; returns its loss."""
        with sdpa_kernel(SDPBackend.MATH):  # at this size the fused kernel's backward pass is the slower one
            H_v = self.model.vit(shown.patches.bfloat16(), shown.keep[:1])
            H_v = H_v.reshape(-1, len(shown.keep) * H_v.shape[1], H_v.shape[2])  # the moments of a clip in a row
            losses, right = score(self.model, H_v, shown.keep[:, ::2, ::2], shown.questions)
            often = Counter(question.kind for question in shown.questions)
            share = torch.tensor([1 / often[question.kind] for question in shown.questions]) / len(often)
            loss = (losses * share).sum()  # all kinds count alike
            loss.backward()
        for question, ok in zip(shown.questions, right.tolist(), strict=True):
            answers = self.recent[what + question.kind]
            answers.append(ok)
            del answers[: -self.stages[self.stage].over]
        return loss.item()

    def accuracy(self) -> dict[str, float]:
        """By kind of question, over the last of each."""
        return {kind: float(np.mean(answers)) for kind, answers in sorted(self.recent.items())}

    def open_stage(self) -> None:
        """Goes on to the next stage once what opens it is learned."""
        stage, shown = self.stages[self.stage], self.accuracy()
        asked = [kind for kind in stage.opens if kind in shown]
        learned = asked and all(len(self.recent[k]) == stage.over and shown[k] > stage.opens[k] for k in asked)
        if learned and self.stage + 1 < len(self.stages):
            self.stage += 1
            self.recent.clear()


def main(argv: list[str] | None = None) -> int:
    parser = Parser("train_tiny", description="Trains the tiny Qwen2-VL on made-up scenes.")
    parser.add_argument("folder", type=Path, help="of the run; it goes on from what is there")
    parser.add_argument("--start", type=Path, help="a checkpoint that knows stills, to learn clips (default: none)")
    parser.add_argument("--steps", type=int, help="in all (default: 9000 on stills, 3200 on clips)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    args = parser.parse_args(argv)
    steps = (3200 if args.start else 9000) if args.steps is None else args.steps
    return exit_status("train_tiny", lambda: train(args.folder, steps, args.rate, args.start))


def train(folder: Path, steps: int, rate: float, start: Path | None = None) -> None:
    """Up to step `steps`; saves at every 250th, logs the accuracy at every 50th."""
    if steps < 1 or not 0 < rate < 1:
        raise ValueError(f"steps {steps} and rate {rate:g}: give 1 or more, and a rate between 0 and 1")
    training = Training(folder, steps, rate, start)
    print(f"from step {training.step} to {steps}", file=sys.stderr)
    begun, losses = time.monotonic(), []
    while training.step < steps:
        losses.append(training.advance())
        if training.step % 50 == 0:
            line = f"step {training.step} stage {training.stage} loss {np.mean(losses[-50:]):.4f}"
            line += "".join(f" {kind} {value:.3f}" for kind, value in training.accuracy().items())
            with (folder / "log.txt").open("a") as log:
                for file in (log, sys.stderr):
                    print(f"{line} ({time.monotonic() - begun:.0f} s)", file=file)
            training.open_stage()
        if training.step % 250 == 0 or training.step == steps:
            training.save()


if __name__ == "__main__":
    sys.exit(main())
