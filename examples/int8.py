"""The published weights as int8: half the memory, and on a CPU, where reading them takes the time, words twice as fast.

    python examples/int8.py image.png events.npy "What is moving?"

Each row of a linear layer's weights, and of the embedding, becomes W = s q: whole numbers q = round(W / s), and a scale
s = max |W| / 127. Activations, norms, biases and the patch embedding stay in bfloat16.
"""

import sys
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import EPVLM
from epvlm import main, weights

CHUNK = 2**20  # weights quantised at a time, so that they stay in the cache
HELD, LOCK = torch.empty(2**24, dtype=torch.bfloat16), threading.Lock()  # all use it, since fresh memory is slower


class Linear8(nn.Module):
    """(x q^T) s + bias: q (out, in) int8, in `weight`; s and bias (out,) bfloat16. One row goes through torch's int8
    product; for more, q becomes bfloat16 in HELD, which is exact, for a plain product."""

    def __init__(self, q: nn.Parameter, s: Tensor, bias: nn.Parameter | None = None):
        super().__init__()
        self.weight, self.s, self.bias = q, nn.Parameter(s, requires_grad=False), bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.numel() == x.shape[-1] and x.shape[-1] % 16 == 0:  # torch's reads 16 weights at a time, unchecked
            y = torch._weight_int8pack_mm(x.reshape(1, -1).contiguous(), self.weight, self.s).view(*x.shape[:-1], -1)
        else:
            with LOCK:  # as many rows at a time as HELD has room for
                parts = self.weight.split(len(HELD) // x.shape[-1])
                y = torch.cat([F.linear(x, HELD[: q.numel()].view_as(q).copy_(q)) for q in parts], dim=-1).mul_(self.s)
        return y if self.bias is None else y.add_(self.bias)


def quantised(W: Tensor) -> tuple[Tensor, Tensor]:
    """q and s of W (out, in) bfloat16; s is rounded first, and q made for it."""
    s = (torch.maximum(W.amax(dim=1), -W.amin(dim=1)) / 127).clamp_(min=torch.finfo(W.dtype).tiny)
    q, rows, held = torch.empty(W.shape, dtype=torch.int8), max(1, CHUNK // W.shape[1]), HELD.view(torch.float32)
    for some_q, some_W, some_s in zip(q.split(rows), W.split(rows), s.split(rows), strict=True):
        with LOCK:
            some_W = held[: some_W.numel()].view_as(some_W).copy_(some_W)
            some_q.copy_(some_W.div_(some_s.unsqueeze(1)).round_())
    return q, s


def load(model: str | Path, revision: str | None = None, device=None, dtype=None) -> EPVLM:
    """As `EPVLM.from_pretrained`, but only on the CPU and in bfloat16. Quantises one tensor after another."""
    for name, given, only in (("device", device, "cpu"), ("dtype", dtype, "bfloat16")):
        fits = str(given or only).removeprefix("torch.").partition(":")[0] == only
        weights.need(fits, f"{name} {given}", f"int8 runs only with {only}", "leave it out")
    scales = {}  # s by the tensor's published name

    def change(name: str, W: Tensor) -> Tensor:
        if W.ndim != 2:
            return W.clone()  # so that its file can go
        q, scales[name] = quantised(W)
        return q

    checkpoint = weights.load(model, revision, "cpu", torch.bfloat16, change)
    for part, prefix in ((checkpoint.vit, "visual."), (checkpoint.llm, "")):
        for name, old in list(part.named_modules()):
            if isinstance(old, nn.Linear):
                part.set_submodule(name, Linear8(old.weight, scales[f"{prefix}{name}.weight"], old.bias))
    llm, q, s = checkpoint.llm, checkpoint.llm.model["embed_tokens"].weight, scales[weights.EMBEDDING]
    head = Linear8(q, s) if llm.config.tie_word_embeddings else llm.lm_head
    llm.embed = lambda ids: q[ids] * s[ids].unsqueeze(-1)  # both in the place of Decoder's methods
    llm.logits = lambda hidden: head(hidden).float()
    return EPVLM(checkpoint)


if __name__ == "__main__":
    sys.exit(main(load=load))
