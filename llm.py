"""The language model: Qwen2's decoder, told where each kept visual token stands in the dense image.

Equations: 4 (X_a = f(concat(H_v, H_q)): `Decoder` is f, `generate` reads the answer off it). M-RoPE, the decoder's own
position embedding, is not in the paper; the rule is that of Eq. 8: dense positions, then packed.

Glossary
    L                tokens of the prompt: text, and one for each group kept
    positions        (3, L) int64, M-RoPE: time, row and column of every token
    keep             (groups_h, groups_w) bool, the mask by group: True keeps, False drops
    hidden           (B, L, hidden_size), B = 1 when answering
    cache            keys and values of the tokens seen so far, preallocated; `seen`, those another cache holds
    angles           (..., L, head_dim/2) float32, half-split pairing

What differs from plain Qwen2-VL: the positions of the image are packed, and text goes on after the DENSE image, so
dropping tokens moves no other token. Module names are the published tensor names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope2d import cos_sin, pack, rotate


@dataclass(frozen=True)
class DecoderConfig:
    """config.json's text_config; the defaults are those of Qwen2VLTextConfig."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies turned by time, row, column
    tie_word_embeddings: bool = False

    def __post_init__(self):
        if self.num_hidden_layers > 999:
            raise ValueError(f"num_hidden_layers {self.num_hidden_layers} is over 999")
        width, heads, groups = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % heads or heads % groups:
            raise ValueError(f"hidden_size {width}, {heads} heads and {groups} key-value heads do not divide")
        section = self.mrope_section
        if len(section) != 3 or 2 * sum(section) != self.head_dim:
            raise ValueError(f"mrope_section {section} must be three numbers, half of head_dim {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def mrope_positions(before: int, keep: Tensor, after: int) -> Tensor:
    """Time, row and column of every token: `before` tokens of text, the kept groups of one image, `after` of text.

    keep (groups_h, groups_w) bool. Returns (3, L) int64. The image stands at c = before: t = c, h = c + row, w = c +
    column; text goes on at c + max(groups_h, groups_w), whatever was dropped. Source: get_rope_index in transformers'
    modeling_qwen2_vl.py. Example, before = 1, after = 2, keep = [[1, 0, 1]] (the middle group is dropped):
        t = 0 1 1 4 5,  h = 0 1 1 4 5,  w = 0 1 3 4 5"""
    groups_h, groups_w = keep.shape
    row, column = torch.meshgrid(torch.arange(groups_h), torch.arange(groups_w), indexing="ij")
    image = torch.stack((torch.zeros_like(row), row, column)).flatten(1) + before  # (3, groups_h * groups_w)
    image = pack(image, keep.flatten().cpu(), dim=1)  # as Eq. 8: dense positions, packed
    head, tail = torch.arange(before), torch.arange(after) + before + max(groups_h, groups_w)
    return torch.cat((head.expand(3, -1), image, tail.expand(3, -1)), dim=1)


def mrope_angles(positions: Tensor, config: DecoderConfig) -> Tensor:
    """positions (3, ..., L) to angles (..., L, head_dim/2) float32: the first section of the frequencies turns by time,
    the second by row, the third by column (in chunks, not interleaved)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.unsqueeze(-1).float() * (1.0 / config.rope_theta**exponents)  # (3, ..., L, head_dim/2)
    chunks = angles.split(config.mrope_section, dim=-1)
    return torch.cat([chunk[axis] for axis, chunk in enumerate(chunks)], dim=-1)


class KVCache:
    """Room for the keys and values of `length` tokens, allocated once: (2, layers, 1, kv_heads, length, head_dim).

    It may begin with those that another cache, `seen`, holds; they are copied."""

    def __init__(self, config: DecoderConfig, length: int, like: Tensor, seen: "KVCache | None" = None):
        shape = 2, config.num_hidden_layers, 1, config.num_key_value_heads, length, config.head_dim
        self.held, self.filled = like.new_empty(shape), seen.filled if seen else 0
        if seen:
            self.held[..., : seen.filled, :] = seen.held[..., : seen.filled, :]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (1, kv_heads, new, head_dim) after the tokens held, and returns all of the layer's."""
        end = self.filled + k.shape[2]
        self.held[0, layer, :, :, self.filled : end] = k
        self.held[1, layer, :, :, self.filled : end] = v
        return self.held[0, layer, :, :, :end], self.held[1, layer, :, :, :end]


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # normalised in float32, cast back, then times the weight
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. One row in bfloat16 is doubled on the CPU: that reads the weights a fifth faster."""
    if x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return F.linear(x.view(1, -1).expand(2, -1), weight, bias)[:1].view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal attention with grouped queries: several query heads share one head of keys and values."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int, wanted: int) -> Tensor:
        q, k, v = self.q_proj(x[:, -wanted:]), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        q = rotate(q, cos[..., -wanted:, :, :], sin[..., -wanted:, :, :]).transpose(1, 2)
        k, v = rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, kv_heads, seen + new, head_dim)
        if wanted == 1:  # it sees all; query heads that share a key head are as good as several queries
            out = F.scaled_dot_product_attention(q.view(len(q), k.shape[1], -1, self.head_dim), k, v)
            return self.o_proj(out.flatten(1).unsqueeze(1))
        before = k.shape[2] - wanted
        mask = torch.ones(wanted, k.shape[2], dtype=torch.bool, device=x.device).tril(before) if before else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not before, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int, wanted: int) -> Tensor:
        """x (B, L, hidden_size) to the output of its last `wanted` positions."""
        x = x[:, -wanted:] + self.self_attn(self.input_layernorm(x), cos, sin, cache, layer, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """f of Eq. 4. The head shares the embedding's weights where the checkpoint ties them (2B)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict()
        # left unfilled: nn.Embedding's own filling takes a second, even of a model on the meta device
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model["embed_tokens"] = nn.Embedding.from_pretrained(table, freeze=False)
        self.model["layers"] = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) int64 to (B, L, hidden_size): H_q of Eq. 4 where they are text."""
        return self.model["embed_tokens"](ids)

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache | None = None, wanted: int = 0) -> Tensor:
        """hidden (B, L, hidden_size) and positions (3, L) or (3, B, L) of tokens that follow those in `cache`.

        Returns the last layer's output, normalised, of the last `wanted` positions, all L unless told: (B, wanted,
        hidden_size). `logits` turns it into scores. The last layer computes only those."""
        cos, sin = cos_sin(mrope_angles(positions.to(hidden.device), self.config), hidden.dtype)
        *layers, last = self.model["layers"]
        new = hidden.shape[1]
        for number, layer in enumerate(layers):
            hidden = layer(hidden, cos, sin, cache, number, new)
        hidden = last(hidden, cos, sin, cache, len(layers), wanted or new)
        if cache is not None:
            cache.filled += new
        return self.model["norm"](hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) to (..., vocab_size) float32."""
        head = self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head
        return product(hidden, head.weight).float()

    def flops(self, tokens: int, scored: int = 1) -> tuple[int, int]:
        """FLOPs for so many tokens of which the last `scored` are wanted and get logits, a multiply-add being two:
        those of the linear layers, and those of attention as plain products, the whole square (a fused kernel skips
        what the causal mask hides). Norms, activations, softmax and rotations are left out: 1 %."""
        config, D = self.config, self.config.hidden_size
        kv = 2 * D * config.num_key_value_heads * config.head_dim  # of a token
        others = 2 * D * D + 3 * D * config.intermediate_size
        full = (config.num_hidden_layers - 1) * tokens + scored  # the last layer computes what is wanted
        linear = config.num_hidden_layers * tokens * kv + full * others + scored * D * config.vocab_size
        return 2 * linear, 2 * 2 * D * full * tokens


def sampler(
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, penalty: float = 1.0, ids: Tensor | None = None
) -> Callable[[Tensor], int]:
    """How the next token is chosen from logits (vocab_size,): the largest at temperature 0, else drawn from the
    smallest set of tokens that holds `top_p` of the probability. Scores of the prompt's `ids` (L,) and of the tokens
    chosen since are first divided by the repetition penalty, negative ones multiplied (RepetitionPenaltyLogitsProcessor
    of transformers). Raises ValueError for settings out of range."""
    if not (0 <= temperature < float("inf") and 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature} must be 0 or more, top-p {top_p} above 0 and at most 1")
    if not 0 < penalty < float("inf"):
        raise ValueError(f"repetition-penalty {penalty} must be above 0; 1 is none")
    generator, seen = torch.Generator().manual_seed(seed % 2**63), set(() if ids is None else ids.tolist())

    def choose(logits: Tensor) -> int:
        if penalty != 1:
            logits, used = logits.clone(), torch.tensor(sorted(seen), device=logits.device)
            logits[used] = torch.where(logits[used] < 0, logits[used] * penalty, logits[used] / penalty)
        seen.add(token := draw(logits))
        return token

    def draw(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().double()  # and the largest taken off: a small temperature must not overflow
        probability, token = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
        probability[probability.cumsum(-1) - probability >= top_p] = 0  # what the tokens before it already fill
        return int(token[torch.multinomial(probability, 1, generator=generator)])

    return choose


def generate(
    decoder: Decoder, hidden: Tensor, positions: Tensor, limit: int, stop: set[int], choose, seen: KVCache | None = None
) -> Iterator[int]:
    """Yields up to `limit` token ids as they are decided, the one in `stop` that ends the answer included.

    hidden (1, L, hidden_size), positions (3, L): the embedded prompt, or what of it follows `seen`. Token n of the
    answer stands at the prompt's largest DENSE position + 1 + n on all three axes: not at L + n, since L counts the
    kept tokens only."""
    cache = KVCache(decoder.config, (seen.filled if seen else 0) + hidden.shape[1] + limit, hidden, seen)
    hidden, position = decoder(hidden, positions, cache, wanted=1), positions[:, -1:]
    for n in range(limit):
        logits = decoder.logits(hidden[0, -1])
        if not logits.isfinite().all():
            dtype = str(hidden.dtype).removeprefix("torch.")
            other = {"float16": "--dtype bfloat16 or float32", "bfloat16": "--dtype float32"}
            raise ValueError(f"scores in {dtype} are not finite; try {other.get(dtype, 'other weights with --model')}")
        token = choose(logits)
        yield token
        if token in stop or n == limit - 1:
            return
        position = position + 1
        hidden = decoder(decoder.embed(torch.tensor([[token]], device=hidden.device)), position, cache)
