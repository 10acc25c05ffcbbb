"""The backbone contract: frames become visual tokens, tokens become words.

A backbone is a vision path (``pixel_format``, ``encode``), a prompt format (``prompt``) and a language model that is
opened up layer by layer, so that :class:`xcomp.decoder.Decoder` can let tokens leave between layers. The language-model
side is written once here for every decoder of the Llama family (Llama, Mistral, Qwen2, Qwen2.5, Qwen3) as
``transformers`` builds it; a backbone file sets ``language_model`` and ``lm_head`` and writes the vision path.

Shape letters: B batch, T frames, F frames a clip, N tokens a frame, S positions, D width, H heads, K head size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from xcomp.config import Sampling
from xcomp.contract import check_encoded, check_tower, name_of
from xcomp.cost import count_macs
from xcomp.layout import TokenLayout, gather
from xcomp.pixels import PixelFormat
from xcomp.visual import VisualTokens

# Most elements of a mask, or of a matrix of attention probabilities, that is made at once (one row at the least).
ATTENTION_BLOCK = 2**24


class FrameText(NamedTuple):
    """Token ids that stand ``before`` and ``behind`` a frame's visual tokens, each 1-D; either may be empty."""

    before: Tensor
    behind: Tensor


@dataclass(frozen=True)
class Prompt:
    """Token ids around the video, each 1-D: ``prefix | video | question | header``.

    Models that write something between the frames (time stamps, subtitles, tokens that open and close a frame) give
    ``frame_texts``, one for each frame as the language model has them (T / merged_frames): the video is then ``before |
    frame | behind`` for each in turn.
    """

    prefix_ids: Tensor
    question_ids: Tensor
    header_ids: Tensor
    frame_texts: tuple[FrameText, ...] | None = None

    @property
    def suffix_ids(self) -> Tensor:
        """Everything after the video: question, then assistant header."""
        return torch.cat([self.question_ids, self.header_ids])

    @property
    def text_lengths(self) -> list[tuple[int, int]]:
        """Tokens of text before and behind each frame; empty where there is none."""
        return [(len(text.before), len(text.behind)) for text in self.frame_texts or ()]

    @property
    def before_question(self) -> tuple[tuple[int, ...], ...]:
        """All ids that stand before the question, to tell by which prompts a stored video may be shared."""
        texts = [ids for text in self.frame_texts or () for ids in text]
        return tuple(tuple(ids.tolist()) for ids in (self.prefix_ids, *texts))


class TrainingText(NamedTuple):
    """A conversation as a model's authors trained it: ids around the pictures, and which of them are supervised.

    All 1-D, the masks bool: ``prefix | pictures | suffix``. ``frame_texts`` as in :class:`Prompt`, never supervised.
    ``prompt_length``: ids of the suffix that stand before the first answer's own.
    """

    prefix_ids: Tensor
    prefix_mask: Tensor
    suffix_ids: Tensor
    suffix_mask: Tensor
    prompt_length: int
    frame_texts: tuple[FrameText, ...] | None = None


@dataclass(frozen=True)
class ShownVideo:
    """What a prompt may say about the video: its length in seconds and how many frames the model is shown.

    ``times`` are the shown frames' time stamps in seconds, where they are known.
    """

    duration: float
    num_frames: int
    times: tuple[float, ...] | None = None


class QuestionError(ValueError):
    """A question that cannot be put to a model with what it is shown, e.g. because it is too long; others can."""


def check_device(name: str) -> None:
    """ValueError unless tensors can be put on the device of that name."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from error


def no_autocast(device_type: str) -> AbstractContextManager:
    """No autocast inside; nothing on a device that has none."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def exact_frequencies(module: nn.Module) -> Iterator[None]:
    """``.to(device)`` inside moves ``inv_freq``; dtype casts leave it in float32, as half precision would be wrong."""
    exact = {name: buffer for name, buffer in module.named_buffers() if name.endswith("inv_freq")}
    yield
    for name, buffer in exact.items():
        owner, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner)
        setattr(owner, leaf, buffer.to(getattr(owner, leaf).device))


@contextmanager
def watched_layer(layer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Of a vision tower's layer, as transformers builds it, what its last pass projected and gave: ``q`` and ``k``
    (T, P, W) before they are split into heads, ``hidden`` (T, P, W)."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, given, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    parts = {"q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj, "hidden": layer}
    hooks = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def encode_watched(
    layer: nn.Module,
    batches: Iterable[Tensor],
    encode: Callable[[Tensor], Tensor],
    describe: Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]],
    features: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """What :meth:`Backbone.encode_with` returns, where a tower is built as transformers builds them.

    ``encode`` makes tokens of each of the ``batches`` of frames, and ``describe`` the features, from what ``layer`` of
    the tower had for them: queries and keys (T, H, P, K), and its output (T, P, W).
    """
    tokens, parts = [], []
    with watched_layer(layer) as seen:
        for frames in batches:
            tokens.append(encode(frames))
            queries, keys = (seen[x].unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2) for x in "qk")
            parts.append(describe(queries, keys, seen["hidden"]))
    return torch.cat(tokens), {name: torch.cat([part[name] for part in parts]) for name in features}


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split form of the Llama family.

    ``x`` (B, H, S, K); ``cos``, ``sin`` (B, S, K).
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


@dataclass(frozen=True)
class Rotary:
    """Rotary tables of a sequence's positions, ``cos`` and ``sin`` (1 or B, S, K)."""

    cos: Tensor
    sin: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """(B, H, S, K) rotated to the positions."""
        return apply_rope(x, self.cos, self.sin)

    def rows(self, index: Tensor) -> Rotary:
        """Those at ``index`` (B, R)."""
        return Rotary(*(gather(t.expand(len(index), -1, -1), index) for t in (self.cos, self.sin)))

    def first(self, width: int) -> Rotary:
        """Those of the first ``width`` positions."""
        return Rotary(self.cos[:, :width], self.sin[:, :width])


class RotaryTables:
    """Rotary tables of one pass, computed anew only where the positions are new."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone
        self.positions: Tensor | None = None
        self.rotary: Rotary | None = None

    def of(self, layout: TokenLayout) -> Rotary:
        """Tables of a layout's positions."""
        positions = self.backbone.positions(layout)
        width = positions.shape[-1]
        if self.positions is None or not torch.equal(self.positions[..., :width], positions):
            self.positions = positions
            self.rotary = Rotary(*self.backbone.rotary(positions.to(self.backbone.device)))
        return self.rotary.first(width)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Key or value heads (B, H_kv, S, K) repeated for grouped queries → (B, H, S, K)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def attention_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products in float32, under autocast too: (B, H, Q, K), (B, H_kv, S, K) → (B, H, Q, S), not scaled."""
    with no_autocast(queries.device.type):
        return queries.float() @ repeat_heads(keys, queries.shape[1]).float().transpose(-1, -2)


def attention_probabilities(
    queries: Tensor, keys: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Softmax attention in float32: (B, H, Q, K), (B, H_kv, S, K) → (B, H, Q, S). ``mask`` True where to look."""
    scores = attention_scores(queries, keys) * queries.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: TokenLayout,
    rows: Tensor | None,
    *,
    scaling: float,
    eager: bool,
) -> Tensor:
    """Attention under an explicit mask, as many queries at a time as ``ATTENTION_BLOCK`` allows.

    Arguments and result (B, Q, H, K) as in :meth:`Backbone.attend`; ``eager`` computes the probabilities in float32.
    """
    batch, heads, count, _ = queries.shape
    rows = torch.arange(count).expand(batch, -1) if rows is None else rows
    keys, values = repeat_heads(keys.float() if eager else keys, heads), repeat_heads(values, heads)
    step = max(1, ATTENTION_BLOCK // (batch * layout.width * (heads if eager else 1)))
    blocks = []
    for part, seen in zip(queries.split(step, 2), rows.split(step, 1)):
        mask = layout.causal_mask(seen, queries.device)
        if eager:
            blocks.append(attention_probabilities(part, keys, mask).to(values.dtype) @ values)
        else:
            blocks.append(scaled_dot_product_attention(part, keys, values, mask, scale=scaling))
    return torch.cat(blocks, 2).transpose(1, 2)


class Backbone(nn.Module):
    """Base class of all backbones. A subclass fills in what is listed here."""

    Config: type
    tokens_per_frame: int  # N
    clip_frames: int  # F; ``encode`` takes multiples of it
    merged_frames: int = 1  # pictures that share a group of N tokens; the language model's "frame" is such a group
    message_tokens: int = 0  # tokens that ``prompt`` puts between the video and the question, e.g. a time message
    grid: tuple[int, int] | None = None  # rows and columns of a frame's tokens, where these are places in the picture
    tower_features: tuple[str, ...] = ()  # names of xcomp.visual.TOWER_FEATURES that ``encode_with`` gives
    pixel_format: PixelFormat
    language_model: nn.Module  # a transformers *Model: embed_tokens, layers, norm, rotary_emb
    lm_head: nn.Module
    tokenizer: Any

    # --- what every backbone writes -------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T / merged_frames, N, D); T is a multiple of ``clip_frames``."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(pixels)")

    def encode_with(self, pixels: Tensor, features: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """What ``encode`` gives, and of ``tower_features`` those asked for, by name.

        Each is (T / merged_frames · N, …), or (T / merged_frames, …) for ``frame``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode_with(pixels, features)")

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """Token ids around the video for one question."""
        raise NotImplementedError(f"{type(self).__name__} must define prompt(question, video)")

    def follow_up(self, question: str) -> Tensor:
        """Token ids that put a further question after an answer's stop token, assistant header included."""
        raise NotImplementedError(f"{type(self).__name__} must define follow_up(question)")

    # --- what tuning on pictures, on text alone, and as the model's authors did it needs, where a backbone has it ----

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T, N, D), each picture on its own; as frames, where clips are of one frame."""
        if self.clip_frames == self.merged_frames == 1:
            return self.encode(pixels)
        raise NotImplementedError(f"{type(self).__name__} must define encode_images(pixels)")

    def image_prompt(self, texts: Sequence[str]) -> Prompt:
        """Token ids around pictures: n + 1 texts in whose gaps n pictures stand; a single text is a question alone.

        Between pictures stands ``Prompt.frame_texts``, and of a question alone all but itself is prefix and header.
        """
        raise NotImplementedError(f"{type(self).__name__} must define image_prompt(texts)")

    def training_text(
        self, texts: Sequence[str], turns: Sequence[tuple[str, str]], video: ShownVideo | None
    ) -> TrainingText:
        """A conversation as the authors' training code has it. ``texts``: the first question cut at its pictures, as in
        ``image_prompt``; ``turns``: all questions and answers; ``video`` None: pictures, or text alone."""
        raise NotImplementedError(f"{type(self).__name__} must define training_text(texts, turns, video)")

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write a checkpoint folder that ``xcomp.load_backbone`` (and the model's own code) reads."""
        raise NotImplementedError(f"{type(self).__name__} must define save_pretrained(folder)")

    def parts(self) -> dict[str, list[nn.Module]]:
        """What tuning can train or freeze: the modules of ``vision``, ``projector`` and ``llm``."""
        raise NotImplementedError(f"{type(self).__name__} must define parts()")

    def _apply(self, fn, recurse=True):
        """Moves and casts as any module does, but leaves rotary frequencies in float32."""
        with exact_frequencies(self):
            return super()._apply(fn, recurse)

    # --- derived --------------------------------------------------------------------------------------------------

    def preprocess(self, frames: Tensor) -> Tensor:
        """(T, H, W, 3) uint8 → (T, 3, h, w) normalised pixels of the model's type, by ``pixel_format``."""
        return self.pixel_format(frames, self.dtype)

    def visual(self, pixels: Tensor, needs: Sequence[str] = ()) -> VisualTokens:
        """(T, 3, h, w) → a video's tokens with their grid, and what compressors need of the tower (their ``needs``)."""
        names, who = [need for need in needs if need != "grid"], name_of("backbone", self)
        tokens, tower = self.encode_with(pixels, names) if names else (self.encode(pixels), {})
        shape = (len(pixels) // self.merged_frames, self.tokens_per_frame, self.text_config.hidden_size)
        check_encoded(who, tokens, shape)
        check_tower(who, tower, names, *shape[:2])
        return VisualTokens.from_frames(tokens, self.grid, tower)

    def images(self, pixels: Tensor) -> VisualTokens:
        """(T, 3, h, w) → tokens of pictures that stand beside one another, each a frame of its own."""
        tokens = self.encode_images(pixels)
        shape = (len(pixels), self.tokens_per_frame, self.text_config.hidden_size)
        check_encoded(name_of("backbone", self), tokens, shape, "encode_images")
        return VisualTokens.from_frames(tokens, self.grid)

    def check_frames(self, count: int) -> None:
        """ValueError unless ``count`` frames fill the clips that are encoded together; names a number that does."""
        clip = self.clip_frames
        if count % clip:
            fits = max(count // clip, 1) * clip
            raise ValueError(f"a budget of {count} frames does not divide into encoder clips of {clip}; take {fits}")

    def check_sampling(self, sampling: Sampling) -> None:
        """ValueError unless whatever number of frames the rule takes fills the clips that are encoded together."""
        for name in ("multiple", "min_frames"):
            count = getattr(sampling, name)
            if count % self.clip_frames:
                raise ValueError(
                    f"sampling.{name} is {count}; it must be a multiple of {self.clip_frames}, "
                    "the frames that the backbone encodes together"
                )

    @torch.no_grad()
    def clip_macs(self, size: tuple[int, int]) -> int:
        """MACs of encoding one clip of pictures of ``size`` (h, w), counted once on a clip of zeros."""
        known = self.__dict__.setdefault("_clip_macs", {})
        if size not in known:
            pixels = torch.zeros(self.clip_frames, 3, *size, dtype=self.dtype, device=self.device)
            known[size] = count_macs(lambda: self.encode(pixels))[1]
        return known[size]

    # --- the language model, opened up ----------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.language_model.layers)

    @property
    def text_config(self) -> Any:
        return self.language_model.config

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.tokenizer.eos_token_id,)

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (…) → embeddings (…, D)."""
        return self.language_model.embed_tokens(ids)

    def positions(self, layout: TokenLayout) -> Tensor:
        """Positions at a layer whose tokens ``layout`` describes: (1 or B, S) long on the CPU; padding's are anything.

        Here the running count, as in the Llama family: where tokens left, the rest is counted anew, unless the rule
        keeps positions (``layout.position``). A model whose tokens keep their places on several axes computes
        (axes, B, S) from ``layout.frame`` and ``layout.places``: they say the same of a token at every layer. Text that
        follows text goes on by one on every axis.
        """
        if layout.position is not None:
            return layout.position
        if layout.gaps:
            return layout.real.cumsum(1) - 1
        return torch.arange(layout.width).unsqueeze(0)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, S) or (axes, B, S) → (cos, sin), each (B, S, K), float of the model's dtype."""
        like = self.language_model.embed_tokens.weight
        return self.language_model.rotary_emb(like, positions)

    def queries(self, layer: int, hidden: Tensor) -> Tensor:
        """Layer input (B, S, D) → queries (B, H, S, K) before RoPE, input norm included."""
        return self.project_queries(layer, self.input_norm(layer, hidden))

    def input_norm(self, layer: int, hidden: Tensor) -> Tensor:
        return self.language_model.layers[layer].input_layernorm(hidden)

    def project_queries(self, layer: int, normed: Tensor) -> Tensor:
        """Normed layer input (B, S, D) → queries (B, H, S, K) before RoPE."""
        attention = self.language_model.layers[layer].self_attn
        return self._heads(attention.q_proj(normed), attention, "q_norm").transpose(1, 2)

    def project_keys_values(self, layer: int, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Normed layer input (B, S, D) → keys before RoPE and values, each (B, H_kv, S, K)."""
        attention = self.language_model.layers[layer].self_attn
        keys = self._heads(attention.k_proj(normed), attention, "k_norm")
        values = self._heads(attention.v_proj(normed), attention, None)
        return keys.transpose(1, 2), values.transpose(1, 2)

    @staticmethod
    def _heads(x: Tensor, attention: nn.Module, norm: str | None) -> Tensor:
        x = x.unflatten(-1, (-1, attention.head_dim))
        head_norm = getattr(attention, norm, None) if norm else None  # Qwen3 normalises each head
        return x if head_norm is None else head_norm(x)

    def attend(
        self,
        layer: int,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: TokenLayout,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Attention by the chosen implementation, after RoPE: (B, H, Q, K), (B, H_kv, S, K) twice → (B, Q, H·K).

        ``layout`` describes the keys. The queries are those of its positions ``rows`` (B, Q), None: of all; each looks
        at what is real up to itself. Rows of padding come out as anything.
        """
        attention = self.language_model.layers[layer].self_attn
        name = self.text_config._attn_implementation
        if name == "eager" or (rows is not None and not layout.all_visible(rows)):
            # flash-attention 2 knows no arbitrary masks; rows under one are few (a question, a decoded token).
            eager = name != "sdpa"
            attended = masked_attention(queries, keys, values, layout, rows, scaling=attention.scaling, eager=eager)
        else:
            real = None
            if name == "flash_attention_2" and rows is None and layout.padded:
                real = layout.real.to(queries.device)  # padding is taken out, and sequences run at their own lengths
            causal = rows is None and queries.shape[2] > 1
            attended, _ = ALL_ATTENTION_FUNCTIONS[name](
                attention, queries, keys, values, real, dropout=0.0, scaling=attention.scaling, is_causal=causal
            )
        return attended.flatten(2)

    def add_attention(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """End of a layer's first half: residual ``hidden`` (B, S, D) and ``attended`` (B, S, H·K) → (B, S, D)."""
        return hidden + self.language_model.layers[layer].self_attn.o_proj(attended)

    def add_mlp(self, layer: int, hidden: Tensor) -> Tensor:
        """A layer's second half: (B, S, D) → (B, S, D)."""
        block = self.language_model.layers[layer]
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What stands between the last layer and the head: (…, D) → (…, D)."""
        return self.language_model.norm(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """Last layer's output (…, D) → logits (…, V), final norm included."""
        return self.lm_head(self.final_norm(hidden))
