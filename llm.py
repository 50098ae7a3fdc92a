"""The language model: Qwen2's decoder, with each kept visual token at its place in the dense image.

Equations: 4 (X_a = f(concat(H_v, H_q)): `Decoder` is f, `generate` reads the answer off it). M-RoPE, the decoder's own
position embedding, is not in the paper; the rule is that of Eq. 8: dense positions, then packed.

Glossary
    L                tokens of the prompt: text, and one for each group kept
    groups           (T, groups_h, groups_w) bool, the mask by group: True keeps, False drops; a still image has T = 1
    positions        (3, L) int64, M-RoPE: time, row and column of every token
    hidden           (B, L, hidden_size), B = 1 when answering

What differs from plain Qwen2-VL: the positions of visual tokens are packed, and text goes on after the DENSE image, so
dropping tokens moves no other token. Module names are the published tensor names.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from rope2d import cos_sin, rotate

SYSTEM = "You are a helpful assistant."  # the system turn of the published models
SPECIAL = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")


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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def prompt_ids(tokenizer: Tokenizer, question: str, system: str | None = None) -> tuple[list[int], list[int]]:
    """Token ids before the image and after it. Special tokens are put in by id; a text that spells one stays text.
    system: the system turn, None for the published models', "" for none. Raises ValueError for broken UTF-8."""
    im_start, im_end, vision_start, vision_end, *_ = (tokenizer.token_to_id(f"<|{name}|>") for name in SPECIAL)
    tokenizer.encode_special_tokens = True  # a state that a copied tokenizer loses, so set at each use

    def ids(text: str) -> list[int]:
        try:
            return tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise ValueError(f"{text[:40]!a} holds bytes that are no text; give it in UTF-8") from None

    system = SYSTEM if system is None else system
    turn = [im_start, *ids(f"system\n{system}"), im_end, *ids("\n")] if system else []
    before = [*turn, im_start, *ids("user\n"), vision_start]
    return before, [vision_end, *ids(question), im_end, *ids("\n"), im_start, *ids("assistant\n")]


def mrope_positions(before: int, groups: Tensor, after: int) -> Tensor:
    """Time, row and column of every token: `before` tokens of text, the groups kept of what is seen, `after` of text.
    groups (T, groups_h, groups_w) bool. Returns (3, L) int64. The image stands at c = before: t = c + moment, h = c +
    row, w = c + column; text goes on at c + the largest of T, groups_h, groups_w, whatever was dropped. Source:
    get_rope_index in transformers' modeling_qwen2_vl.py. Example, before = 1, after = 2, groups = [[[1, 0, 1]]] (the
    middle group is dropped): t = 0 1 1 4 5, h = 0 1 1 4 5, w = 0 1 3 4 5"""
    image = groups.nonzero().T + before  # (3, groups kept): as Eq. 8, the dense positions, packed
    head, tail = torch.arange(before), torch.arange(after) + before + max(groups.shape)
    return torch.cat((head.expand(3, -1), image, tail.expand(3, -1)), dim=1)


def mrope_angles(positions: Tensor, config: DecoderConfig) -> Tensor:
    """positions (3, ..., L) to angles (..., L, head_dim/2) float32: by time, then row, then column, not interleaved."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.unsqueeze(-1).float() * (1.0 / config.rope_theta**exponents)  # (3, ..., L, head_dim/2)
    chunks = angles.split(config.mrope_section, dim=-1)
    return torch.cat([chunk[axis] for axis, chunk in enumerate(chunks)], dim=-1)


class KVCache:
    """Keys and values of `length` tokens, (2, layers, 1, kv_heads, length, head_dim); `start` gives the first."""

    def __init__(self, config: DecoderConfig, length: int, like: Tensor, start: "KVCache | None" = None):
        shape = 2, config.num_hidden_layers, 1, config.num_key_value_heads, length, config.head_dim
        self.held, self.filled = like.new_empty(shape), start.filled if start else 0
        if start:
            self.held[..., : start.filled, :] = start.held[..., : start.filled, :]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (1, kv_heads, new, head_dim) after the tokens held, and returns all of the layer's."""
        end = self.filled + k.shape[2]
        self.held[:, layer, :, :, self.filled : end] = torch.stack((k, v))
        return self.held[:, layer, :, :, :end].unbind()


class RMSNorm(nn.RMSNorm):  # normalised in float32, cast back, then times the weight
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, layer: int, wanted: int) -> Tensor:
        q, k, v = self.q_proj(x[:, -wanted:]), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (B, L, heads, head_dim)
        q = rotate(q, *(part[..., -wanted:, :, :] for part in rope)).transpose(1, 2)
        k, v = rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, kv_heads, held + new, head_dim)
        if wanted == 1:
            return self.o_proj(attend_last(q, k, v))
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

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, layer: int, wanted: int) -> Tensor:
        """x (B, L, hidden_size) to the output of its last `wanted` positions; rope: see `cos_sin`."""
        x = x[:, -wanted:] + self.self_attn(self.input_layernorm(x), rope, cache, layer, wanted)
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
        """Embeddings of ids (B, L) int64: (B, L, hidden_size). Those of text are H_q of Eq. 4."""
        return self.model["embed_tokens"](ids.to(self.model["embed_tokens"].weight.device))

    def forward(self, hidden: Tensor, positions: Tensor, cache: KVCache | None = None, wanted: int = 0) -> Tensor:
        """hidden (B, L, hidden_size) and positions (3, L) or (3, B, L) of tokens that follow those in `cache`. Returns
        the last layer's output, normalised, of the last `wanted` positions, 0 for all: (B, wanted, hidden_size);
        `logits` turns it into scores. The last layer computes only the wanted positions."""
        rope = cos_sin(mrope_angles(positions.to(hidden.device), self.config), hidden.dtype)
        *layers, last = self.model["layers"]
        new = hidden.shape[1]
        for number, layer in enumerate(layers):
            hidden = layer(hidden, rope, cache, number, new)
        hidden = last(hidden, rope, cache, len(layers), wanted or new)
        if cache is not None:
            cache.filled += new
        return self.model["norm"](hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) to (..., vocab_size) float32."""
        head = self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head
        return product(hidden, head.weight).float()

    def flops(self, tokens: int, scored: int = 1) -> tuple[int, int]:
        """As in vit.py, for so many tokens of which the last `scored` get logits; of attention the whole square."""
        config, D, layers = self.config, self.config.hidden_size, self.config.num_hidden_layers
        kv, others = 2 * D * config.num_key_value_heads * config.head_dim, 2 * D * D + 3 * D * config.intermediate_size
        full = (layers - 1) * tokens + scored  # the last layer computes what is wanted
        return 2 * (layers * tokens * kv + full * others + scored * D * config.vocab_size), 2 * 2 * D * full * tokens


def sampler(sampling, ids: Tensor) -> Callable[[Tensor], int]:
    """How the next token is chosen from logits (vocab_size,): the largest at temperature 0, else drawn from the
    smallest set of tokens that holds `top_p` of the probability. Before that the scores of tokens that occur in the
    prompt's ids (L,) or in the answer are divided by the repetition penalty, negative ones multiplied. sampling: an
    `epvlm.Sampling`. Source: RepetitionPenaltyLogitsProcessor and TopPLogitsWarper of transformers."""
    generator, seen = torch.Generator().manual_seed(sampling.seed % 2**63), set(ids.tolist())

    def choose(logits: Tensor) -> int:
        if (penalty := sampling.repetition_penalty or 1) != 1:
            logits, old = logits.clone(), torch.tensor(sorted(seen), device=logits.device)
            logits[old] = torch.where(logits[old] < 0, logits[old] * penalty, logits[old] / penalty)
        token = logits.argmax()
        if sampling.temperature > 0:
            logits = logits.cpu().double()  # and the largest taken off: a small temperature must not overflow
            probability, order = ((logits - logits.max()) / sampling.temperature).softmax(-1).sort(descending=True)
            probability[probability.cumsum(-1) - probability >= sampling.top_p] = 0  # those before it fill top_p
            token = order[torch.multinomial(probability, 1, generator=generator)]
        seen.add(int(token))
        return int(token)

    return choose


def generate(decoder: Decoder, hidden: Tensor, positions: Tensor, cache: KVCache, choose) -> Iterator[int]:
    """Yields token ids as they are decided, without end; the caller stops. Raises ValueError for scores not finite.
    hidden (1, L, hidden_size), positions (3, L): the embedded prompt, or what of it is not in `cache`. choose: see
    `sampler`. Token n of the answer stands at the prompt's largest DENSE position + 1 + n, not at L + n (packed)."""
    hidden, position = decoder(hidden, positions, cache, wanted=1), positions[:, -1:]
    while True:
        logits = decoder.logits(hidden[0, -1])
        if not logits.isfinite().all():
            raise ValueError(f"scores in {hidden.dtype} are not finite; try a wider dtype, or another model")
        yield (token := choose(logits))
        position = position + 1
        hidden = decoder(decoder.embed(torch.tensor([[token]])), position, cache)


# What makes it faster on a CPU; the plain formulas are F.linear and F.scaled_dot_product_attention(q, k, v).


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias. A single row in bfloat16 is doubled, which reads the weights faster (tests/README.md)."""
    if x.numel() == x.shape[-1] and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return F.linear(x.view(1, -1).expand(2, -1), weight, bias)[:1].view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last token, without a mask: (B, 1, heads * head_dim) from q (B, heads, 1, head_dim), k and v (B,
    kv_heads, ...). Query heads that share a key head are its queries, so nothing is copied: 12 times faster."""
    out = F.scaled_dot_product_attention(q.view(len(q), k.shape[1], -1, q.shape[-1]), k, v)
    return out.flatten(1).unsqueeze(1)
