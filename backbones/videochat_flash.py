"""VideoChat-Flash: a clip encoder whose tokens are merged to 16 a frame, and a Qwen2 language model.

Papers: "VideoChat-Flash: Hierarchical Compression for Long-Context Video Modeling" (arXiv 2501.00574); towers UMT-L/16
(arXiv 2303.16058) and InternVideo2-1B/14 (arXiv 2403.15377); merging after ToMe (arXiv 2210.09461). Checkpoints are
read and written in the released layout: the same config.json, tensor names and shapes.

Deviations:
- Merging is compared and summed in float32 whatever the model's type, and equal scores are taken in the order of
  position, so a clip's tokens do not depend on the sorting kernel.
- An image is one square tile of 16 tokens; the original's tiling of large pictures is left out.
- Vision tower without stochastic depth.

Shape letters: B clips · F frames a clip · T frames · N tokens a frame · P patch tokens of a clip, class token included
· W tower width · D language-model width · H heads.
"""

from __future__ import annotations

import copy
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2Model

from xcomp.backbone import Backbone, FrameText, Prompt, ShownVideo, TrainingText, attention_probabilities
from xcomp.checkpoint import (
    DTYPES,
    FLOATS,
    check_ids,
    check_options,
    check_rotary,
    check_save_dtype,
    check_sizes,
    check_text_config,
    find_folder,
    is_finite,
    load_tokenizer,
    read_json,
    refuse_tensors,
    refuse_values,
    require_tokenizer,
    resolve_attention,
    stored_tensors,
    weight_files,
    whole_folder,
    within,
    write_json,
)
from xcomp.merging import exact_float32
from xcomp.pixels import PixelFormat

SHARD_BYTES = 5_000_000_000
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n"
PREFIX = SYSTEM + USER
START, STOP = "<|im_start|>", ("<|im_end|>", "<|endoftext|>")
HEADER = "<|im_end|>\n<|im_start|>assistant\n"
TIME = "The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it."

# The original tells towers apart by a part of their name, tried in this order.
TOWERS = {
    "internvideo2": dict(kind="internvideo2", hidden_size=1408, num_hidden_layers=40, num_attention_heads=16,
                         image_size=224, patch_size=14, mlp_ratio=48 / 11),
    "umt-hd": dict(kind="umt", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=448,
                   patch_size=16, mlp_ratio=4.0),
    "umt": dict(kind="umt", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=224,
                patch_size=16, mlp_ratio=4.0),
}  # fmt: skip


# --- positions and merging: pure functions ----------------------------------------------------------------------------


@lru_cache(maxsize=16)
def position_table(
    width: int, num_frames: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Positions of one clip, (F·rows·columns, W): sines and cosines of 4×14×14 flat positions, resized to the clip.

    Space is resized first (bicubic), then time (linear). A single frame has the table of 14×14 positions, which is
    the first frame's.
    """
    with torch.inference_mode(False):  # a table made while evaluating must still serve training
        position = torch.arange(4 * 14 * 14, dtype=torch.float64, device="cpu").unsqueeze(1)
        channel = torch.arange(width, device="cpu")
        angle = position / 10000.0 ** (2 * (channel // 2).double() / width)
        table = torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().view(4, 14, 14, width)
        table = (table[:1] if num_frames == 1 else table).permute(0, 3, 1, 2)
        if (rows, columns) != (14, 14):
            table = F.interpolate(table, (rows, columns), mode="bicubic", align_corners=False)
        if num_frames not in (1, 4):
            over_time = table.permute(1, 2, 3, 0).flatten(0, 2).unsqueeze(0)
            over_time = F.interpolate(over_time, num_frames, mode="linear", align_corners=False)
            table = over_time[0].view(width, rows, columns, num_frames).permute(3, 0, 1, 2)
        return table.permute(0, 2, 3, 1).reshape(-1, width).to(device, dtype)


def merge_schedule(num_tokens: int, target: int) -> list[int]:
    """Tokens merged away in each round: half of what is there, until ``target`` remain."""
    rounds = []
    while num_tokens > target:
        rounds.append(min(num_tokens - target, num_tokens // 2))
        num_tokens -= rounds[-1]
    return rounds


def merge_tokens(tokens: Tensor, target: int, num_heads: int) -> Tensor:
    """Merge each clip's most alike tokens: (B, P, W) → (B, target, W), each a mean over the patches it stands for.

    Output order: the last round's unmerged even tokens from most to least alike, then the odd ones in order. Gradients
    flow through the means, not through the choice.
    """
    return merge_with(tokens, tokens[..., :0], target, num_heads)[0]


def merge_with(tokens: Tensor, more: Tensor, target: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """:func:`merge_tokens`, and the means of what else is known of the patches, ``more`` (B, P, K), float32."""
    width = tokens.shape[-1]
    with exact_float32(tokens.device.type):
        # Sums, with the number of patches in a last column; dividing once at the end gives the running means.
        ones = tokens.new_ones(*tokens.shape[:2], 1, dtype=torch.float32)
        sums = torch.cat([tokens.float(), more.float(), ones], dim=-1)
        for num_merged in merge_schedule(tokens.shape[1], target):
            sums = merge_round(sums, num_merged, num_heads, width)
        means = sums[..., :-1] / sums[..., -1:]
        return means[..., :width].to(tokens.dtype), means[..., width:]


def merge_round(sums: Tensor, num_merged: int, num_heads: int, width: int) -> Tensor:
    """One bipartite round: the ``num_merged`` even tokens most like an odd one join it. (B, P, W + K + 1) float32."""
    even, odd = sums[:, ::2], sums[:, 1::2]
    # Mean over heads, then length one: the counts cancel, so sums serve as well as means.
    metric = F.normalize(sums.detach()[..., :width].unflatten(-1, (num_heads, -1)).mean(-2), dim=-1)
    score, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = score.argsort(dim=-1, descending=True, stable=True)
    merged, kept = order[:, :num_merged], order[:, num_merged:]
    partner = partner.gather(1, merged).unsqueeze(1)
    # A product with zeros and ones: unlike scatter_add it sums in the same order every time on a GPU too.
    joins = sums.new_zeros(len(sums), odd.shape[1], num_merged).scatter(1, partner, 1.0)
    odd = odd + joins @ _rows(even, merged)
    return torch.cat([_rows(even, kept), odd], dim=1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


# --- vision towers and projector --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of a vision tower; ``num_blocks`` are those that exist and run."""

    kind: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    mlp_ratio: float
    num_blocks: int


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(3, width, (1, patch, patch), stride=(1, patch, patch))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, F, 3, h, w) → (B, P, W) in order of time, row, column."""
        # A convolution whose stride is its kernel is a product on patches; that is much faster in half precision.
        patches = clips.unflatten(-1, (-1, self.patch)).unflatten(-3, (-1, self.patch)).permute(0, 1, 3, 5, 2, 4, 6)
        return F.linear(patches.flatten(1, 3).flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Attention of every token of a clip to every other. UMT biases queries and values, InternVideo2 normalises."""

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width, self.num_heads = sizes.hidden_size, sizes.num_attention_heads
        self.normalise = sizes.kind == "internvideo2"
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        if self.normalise:
            self.q_norm, self.k_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        else:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, P, K)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.normalise:
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, v = q + self.q_bias, v + self.v_bias
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * self.gamma.float()).to(x.dtype)


class Block(nn.Module):
    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width, scaled = sizes.hidden_size, sizes.kind == "internvideo2"
        norm = nn.RMSNorm if scaled else nn.LayerNorm
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.attn, self.mlp = Attention(sizes), Mlp(width, int(width * sizes.mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if scaled else (nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class UMT(nn.Module):
    """UMT vision transformer: computed positions, so any clip length and picture size; LayerNorm at the end."""

    released_prefix = "model.vision_tower.vision_tower.encoder."

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        self.patch_embed = PatchEmbed(sizes.hidden_size, sizes.patch_size)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_blocks))
        self.vision_layernorm = nn.LayerNorm(sizes.hidden_size, eps=1e-12)
        self.apply(_init_vision)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, F, 3, h, w) pixels → (B, P, W) features."""
        x, patch = self.patch_embed(clips), self.patch_embed.patch
        rows, columns = clips.shape[-2] // patch, clips.shape[-1] // patch
        x = x + position_table(x.shape[-1], clips.shape[1], rows, columns, x.device, x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.vision_layernorm(x)


class InternVideo2(nn.Module):
    """InternVideo2 vision transformer: learned positions for clips of four frames and for single images."""

    released_prefix = "model.vision_tower.vision_tower."

    def __init__(self, sizes: VisionSizes):
        super().__init__()
        width, patches = sizes.hidden_size, (sizes.image_size // sizes.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4 * patches + 1, width))
        self.img_pos_embed = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.patch_embed = PatchEmbed(width, sizes.patch_size)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_blocks))
        self.apply(_init_vision)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, F, 3, h, w) pixels, F 4 or 1 → (B, P − 1, W) features; the class token stays inside."""
        x = self.patch_embed(clips)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + (self.img_pos_embed if clips.shape[1] == 1 else self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:]


class ToMeProjector(nn.Module):
    """Merge a clip's patch tokens to N a frame, then an MLP to the language model's width."""

    def __init__(self, tower_width: int, width: int, num_heads: int, tokens_per_frame: int):
        super().__init__()
        self.num_heads, self.tokens_per_frame = num_heads, tokens_per_frame
        self.mlp = nn.Sequential(nn.Linear(tower_width, width), nn.GELU(), nn.Linear(width, width))
        self.apply(_init_vision)

    def forward(self, features: Tensor, num_frames: int) -> Tensor:
        """(B, P, W) features of clips of ``num_frames`` → (B, F·N, D)."""
        return self.mlp(merge_tokens(features, num_frames * self.tokens_per_frame, self.num_heads))

    def forward_with(self, features: Tensor, more: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """The same, and the means of ``more`` (B, P, K) over the patches that each token stands for."""
        tokens, means = merge_with(features, more, num_frames * self.tokens_per_frame, self.num_heads)
        return self.mlp(tokens), means


def _init_vision(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Conv3d)):
        nn.init.xavier_uniform_(module.weight.data.flatten(1))  # scales with the width, so that small towers learn too
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, InternVideo2):
        for parameter in (module.cls_token, module.pos_embed, module.img_pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)


# --- config.json ------------------------------------------------------------------------------------------------------


def vision_sizes(architecture: dict[str, Any]) -> VisionSizes:
    """Tower sizes: by the tower's name, single ones replaced by a ``vision_config`` where config.json has one."""
    name = str(architecture.get("mm_vision_tower"))
    base = next((sizes for part, sizes in TOWERS.items() if part in name), None)
    if base is None:
        raise ValueError(f"unknown mm_vision_tower '{name}'; its name must contain {', '.join(TOWERS)}")
    given = architecture.get("vision_config") or {}
    if not isinstance(given, dict) or (unknown := sorted(set(given) - set(base))):
        problem = f"unknown vision_config keys {unknown}" if isinstance(given, dict) else f"vision_config is {given!r}"
        raise ValueError(f"{problem}; known: {', '.join(base)}")
    sizes = {**base, **given}
    if sizes["kind"] not in ("umt", "internvideo2"):
        raise ValueError(f"vision_config's kind is {sizes['kind']!r}; it must be umt or internvideo2")
    if missing := [key for key, value in sizes.items() if value is None]:
        raise ValueError(f"vision_config gives no {', '.join(missing)}")
    if not isinstance(sizes["mlp_ratio"], (int, float)) or not 0 < sizes["mlp_ratio"] <= 100:
        raise ValueError(f"vision_config's mlp_ratio is {sizes['mlp_ratio']!r}; it must be a number up to 100")
    layer = architecture.get("mm_vision_select_layer", -2)
    num_blocks = sizes["num_hidden_layers"] + layer + 1 if type(layer) is int else 0
    if num_blocks < 1 or layer >= 0:
        raise ValueError(f"mm_vision_select_layer {layer} must count from the end, -1 to -{sizes['num_hidden_layers']}")
    for divisor, whole in (("num_attention_heads", "hidden_size"), ("patch_size", "image_size")):
        if sizes[whole] % sizes[divisor]:
            raise ValueError(f"vision {whole} {sizes[whole]} is no multiple of {divisor} {sizes[divisor]}")
    if (width := architecture.get("mm_hidden_size", sizes["hidden_size"])) != sizes["hidden_size"]:
        raise ValueError(f"mm_hidden_size {width} is not the tower's width {sizes['hidden_size']}")
    return VisionSizes(**sizes, num_blocks=num_blocks)


def tokens_per_frame(architecture: dict[str, Any], sizes: VisionSizes) -> int:
    """N, from the projector's name."""
    name = str(architecture.get("mm_projector_type"))
    found = re.fullmatch(r"tome([1-9]\d{0,5})_mlp_hd64", name)
    if not found:
        raise ValueError(f"unsupported mm_projector_type '{name}'; it must be like 'tome16_mlp_hd64'")
    patches = (sizes.image_size // sizes.patch_size) ** 2
    if patches < int(found[1]):
        raise ValueError(f"a frame has {patches} patches, fewer than the {found[1]} tokens of '{name}'")
    return int(found[1])


def text_config(architecture: dict[str, Any], attention: str) -> Qwen2Config:
    """The language model's part of config.json as transformers wants it."""
    needed = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    if missing := [key for key in needed if key not in architecture]:
        raise ValueError(f"it lacks the language model's {', '.join(missing)}")
    optional = ["num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"]
    optional += ["tie_word_embeddings", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"]
    optional += ["attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"]
    values = {key: architecture[key] for key in needed + optional if key in architecture}
    rope = {"rope_type": "default", "rope_theta": architecture.get("rope_theta", 1e6)}
    rope.update(architecture.get("rope_scaling") or {})
    rope.update(architecture.get("rope_parameters") or {})
    text = Qwen2Config(**values, rope_parameters=rope, attn_implementation=attention)
    check_text_config(text)
    return text


def read_architecture(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, checked to be this model's."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no config.json; a VideoChat-Flash checkpoint folder is needed")
    architecture = read_json(path)
    kind, classes = architecture.get("model_type"), architecture.get("architectures") or []
    known = ("VideoChatFlashQwenForCausalLM", "LlavaQwenForCausalLM")
    known_kind = kind in ("videochat_flash_qwen", "llava_qwen", "qwen2")
    if not known_kind or not isinstance(classes, list) or any(name not in known for name in classes):
        raise ValueError(
            f"'{path}' describes model_type '{kind}', architectures {classes}; needed: 'videochat_flash_qwen', {known}"
        )
    if "mm_vision_tower" not in architecture:
        raise ValueError(f"'{path}' names no mm_vision_tower: a plain '{kind}' language model, not a VideoChat-Flash")
    return architecture


# --- the backbone -----------------------------------------------------------------------------------------------------


class VideoChatFlash(Backbone):
    """VideoChat-Flash with a UMT-L or InternVideo2-1B tower and a Qwen2 language model."""

    tower_features = ("attention", "keys", "frame", "pooling_attention")
    message_tokens = 27  # the time message; counted so by the released frame selection whatever its digits

    @dataclass
    class Config:
        checkpoint: str | None = None  # a folder, hub id, or a shipped one by name
        architecture: dict[str, Any] | None = None  # a config.json's content, with random weights; no checkpoint then
        tokenizer: str | None = None  # a folder; null: the checkpoint's
        clip_frames: int | None = None  # frames encoded together; null: the checkpoint's
        dtype: str = "float32"  # float32, bfloat16 or float16
        device: str = "cpu"  # cpu, cuda, cuda:1, …
        attn_implementation: str = "auto"  # auto (flash-attention where it can run), sdpa, eager or flash_attention_2
        clip_batch: int | None = None  # clips in one pass of the tower, which bounds its memory; null: CPU 2, else 8

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        check_options(config, clip_batch=config.clip_batch, clip_frames=config.clip_frames)
        shapes = config.device == "meta"  # no weights are read or made
        folder = find_folder(config.checkpoint, weights=not shapes)
        self.architecture = copy.deepcopy(config.architecture) if folder is None else read_architecture(folder)
        where = "architecture" if folder is None else f"'{folder / 'config.json'}'"
        check_sizes(self.architecture, where)
        attention = resolve_attention(config.attn_implementation, config.device, DTYPES[config.dtype])
        with torch.device("cpu" if folder is None and not shapes else "meta"), within(where):
            self._build(attention)
        if folder is not None and not shapes:
            self._load_weights(folder)
        with within(where):
            self._keep_rotary()
            check_rotary(self.language_model)
        self.to(device=config.device, dtype=DTYPES[config.dtype])
        self._folder = folder
        self.tokenizer = load_tokenizer(folder, config.tokenizer, self.text_config)
        if self.tokenizer is not None:
            self._check_words(config.tokenizer or folder)

    def _check_words(self, place: Any) -> None:
        """ValueError unless the tokenizer in ``place`` has the tokens that prompts are made of."""
        known = self.tokenizer.get_vocab()
        if lacking := [token for token in (START, *STOP) if token not in known]:
            raise ValueError(f"tokenizer '{place}' has no {', '.join(lacking)}; give the tokenizer of this checkpoint")
        check_ids([known[token] for token in (START, *STOP)], self.text_config.vocab_size, place)

    def _build(self, attention: str) -> None:
        """Modules from ``architecture`` and options, on the ambient device."""
        self.vision_sizes = sizes = vision_sizes(self.architecture)
        self.pixel_format = PixelFormat(sizes.image_size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        self.tokens_per_frame = tokens_per_frame(self.architecture, sizes)
        self.clip_frames = self._clip_frames()
        text = text_config(self.architecture, attention)
        self.vision_tower = InternVideo2(sizes) if sizes.kind == "internvideo2" else UMT(sizes)
        self.projector = ToMeProjector(
            sizes.hidden_size, text.hidden_size, sizes.num_attention_heads, self.tokens_per_frame
        )
        self.language_model = Qwen2Model(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=text.initializer_range)
        self._tie()

    def _clip_frames(self) -> int:
        frames = self.config.clip_frames or self.architecture.get("mm_local_num_frames")
        if frames is None:
            raise ValueError("it has no mm_local_num_frames; give clip_frames (released models: 4)")
        if self.vision_sizes.kind == "internvideo2" and frames not in (1, 4):
            raise ValueError(f"InternVideo2 has stored positions for clips of 4 frames (or 1), not of {frames}")
        return int(frames)

    def _tie(self) -> None:
        if self.text_config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def _keep_rotary(self) -> None:
        """Compute the rotary frequencies anew on the CPU: built on ``meta`` they hold nothing."""
        with torch.device("cpu"):
            self.language_model.rotary_emb = type(self.language_model.rotary_emb)(config=self.text_config)

    # --- weights ------------------------------------------------------------------------------------------------------

    def released_name(self, name: str) -> str:
        """Name of one of this module's parameters in a released checkpoint."""
        for own, released in (
            ("vision_tower.", self.vision_tower.released_prefix),
            ("projector.", "model.mm_projector."),
            ("language_model.", "model."),
        ):
            if name.startswith(own):
                return released + name.removeprefix(own)
        return name

    def _load_weights(self, folder: Path) -> None:
        """Fill the meta parameters one by one: little more than the model itself is ever held."""
        wanted = {self.released_name(name): name for name, _ in self.named_parameters()}
        stored = stored_tensors(weight_files(folder))
        self._check_tensors(folder, wanted, stored)
        dtype, broken = DTYPES[self.config.dtype], []
        # The largest first, while there is room; files are reopened because a mapped file counts as memory.
        for name in sorted(wanted, key=lambda name: -math.prod(stored[name][1])):
            with safe_open(stored[name][0], framework="pt") as file:
                tensor = file.get_tensor(name).to(self.config.device, dtype, copy=True)
            broken += [] if is_finite(tensor) else [name]
            module, _, leaf = wanted[name].rpartition(".")
            setattr(self.get_submodule(module), leaf, nn.Parameter(tensor))
        refuse_values(folder, broken, dtype)
        self._tie()
        self._check_tied(folder, stored)

    def _check_tied(self, folder: Path, stored: dict) -> None:
        """ValueError where config.json ties the head to the embedding, but another head is stored."""
        if not self.text_config.tie_word_embeddings or "lm_head.weight" not in stored:
            return
        with safe_open(stored["lm_head.weight"][0], framework="pt") as file:
            head = file.get_tensor("lm_head.weight").to(self.lm_head.weight)
        if not torch.equal(head, self.lm_head.weight):
            raise ValueError(
                f"'{folder / 'config.json'}' says tie_word_embeddings, but lm_head.weight is stored and is not "
                "model.embed_tokens.weight; set it to false, or take the tensor out"
            )

    def _check_tensors(self, folder: Path, wanted: dict[str, str], stored: dict) -> None:
        shapes = {name: list(self.get_parameter(own).shape) for name, own in wanted.items()}
        if self.text_config.tie_word_embeddings and "lm_head.weight" in stored:
            shapes["lm_head.weight"] = list(self.lm_head.weight.shape)  # a tied head may be stored or not
        wrong = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in stored]
        wrong += [f"unexpected {name} {stored[name][1]}" for name in stored if name not in shapes]
        for name in sorted(set(shapes) & set(stored)):
            _, shape, dtype = stored[name]
            if shape != shapes[name] or dtype not in FLOATS:
                wrong.append(f"{name} is {dtype} {shape}, should be floating-point {shapes[name]}")
        refuse_tensors(folder, wrong)

    def save_pretrained(self, folder: str, dtype: str | None = None) -> None:
        """Write a checkpoint in the released layout, in ``dtype`` (default: the model's own).

        An existing folder is replaced only once everything is written; a tied head is not stored twice.
        """
        check_save_dtype(dtype)
        with whole_folder(folder) as fresh:
            self._write_weights(fresh, DTYPES[dtype] if dtype else self.dtype)
            self._write_config(fresh, dtype or str(self.dtype).removeprefix("torch."))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(fresh)
            if self._folder is not None:  # what the model's own code needs beside the weights
                for path in [self._folder / "generation_config.json", *self._folder.glob("*.py")]:
                    if path.is_file():
                        shutil.copyfile(path, fresh / path.name)

    def _write_config(self, folder: Path, dtype: str) -> None:
        values = {"model_type": "videochat_flash_qwen", "architectures": ["VideoChatFlashQwenForCausalLM"]}
        values |= self.architecture | {"torch_dtype": dtype, "mm_local_num_frames": self.clip_frames}
        if "dtype" in values:
            values["dtype"] = dtype
        write_json(folder / "config.json", values)

    def _write_weights(self, folder: Path, dtype: torch.dtype) -> None:
        own = {self.released_name(name): parameter for name, parameter in self.named_parameters()}
        plan = split_torch_state_dict_into_shards(
            {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in own.items()},
            max_shard_size=SHARD_BYTES,
        )
        for filename, names in plan.filename_to_tensors.items():
            shard = {name: own[name].detach().to("cpu", dtype).contiguous() for name in names}
            save_file(shard, folder / filename, metadata={"format": "pt"})
            (folder / filename).chmod(0o644)  # safetensors leaves it to the owner alone
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(folder / "model.safetensors.index.json", index)

    # --- frames to visual tokens --------------------------------------------------------------------------------------

    def encode(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → visual tokens (T, N, D); T is a multiple of ``clip_frames``.

        Tokens are merged over a whole clip: its F·N tokens come in groups of N, which are not its frames one by one.
        """
        return self._encode(pixels, self.clip_frames)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(T, 3, h, w) → (T, N, D), each picture on its own."""
        return self._encode(pixels, 1)

    def _encode(self, pixels: Tensor, clip_frames: int) -> Tensor:
        tokens = [self.projector(self.vision_tower(clips), clip_frames) for clips in self._clips(pixels, clip_frames)]
        return torch.cat(tokens).reshape(len(pixels), self.tokens_per_frame, -1)

    def _clips(self, pixels: Tensor, clip_frames: int) -> Iterator[Tensor]:
        """As many clips (B, F, 3, h, w) as go through the tower at once."""
        self._check_pixels(pixels, clip_frames)
        weight = self.vision_tower.patch_embed.proj.weight
        clip_batch = self.config.clip_batch or (2 if weight.device.type == "cpu" else 8)
        for clips in pixels.unflatten(0, (-1, clip_frames)).split(clip_batch):
            yield clips.to(weight.device, weight.dtype)

    def encode_with(self, pixels: Tensor, features: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens, and of the tower's last layer what the patches receive, averaged as the patches are merged.

        ``frame`` is the mean of a frame's patches, so ``pooling_attention`` is the attention that they receive.
        """
        attention, seen, found = self.vision_tower.blocks[-1].attn, [], {name: [] for name in features}
        hook, tokens = attention.register_forward_pre_hook(lambda module, given: seen.append(given[0])), []
        try:
            for clips in self._clips(pixels, self.clip_frames):
                output = self.vision_tower(clips)
                queries, keys, _ = attention.project(seen.pop())
                # One clip and head at a time: a clip's patches squared are many.
                received = torch.stack(
                    [
                        sum(attention_probabilities(q[None, None], k[None, None])[0, 0].mean(0) for q, k in zip(*clip))
                        for clip in zip(queries, keys)
                    ]
                ).div(attention.num_heads)
                more = torch.cat([received.unsqueeze(-1), keys.float().mean(1)], -1)[:, -output.shape[1] :]
                merged, means = self.projector.forward_with(output, more, self.clip_frames)
                tokens.append(merged)
                frames = output.float().unflatten(1, (self.clip_frames, -1)).mean(2).flatten(0, 1)
                means = means.flatten(0, 1)
                known = {"attention": means[:, 0], "pooling_attention": means[:, 0]}
                known |= {"keys": means[:, 1:], "frame": frames}
                for name in features:
                    found[name].append(known[name])
        finally:
            hook.remove()
        tokens = torch.cat(tokens).reshape(len(pixels), self.tokens_per_frame, -1)
        return tokens, {name: torch.cat(parts) for name, parts in found.items()}

    def _check_pixels(self, pixels: Tensor, clip_frames: int) -> None:
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be (T, 3, h, w), not {tuple(pixels.shape)}")
        if len(pixels) == 0 or len(pixels) % clip_frames:
            raise ValueError(
                f"{len(pixels)} frames do not fill clips of {clip_frames}; encode a positive multiple of {clip_frames}"
            )
        size, patch = tuple(pixels.shape[-2:]), self.vision_sizes.patch_size
        fixed = self.vision_sizes.kind == "internvideo2" and size != (self.vision_sizes.image_size,) * 2
        if fixed or size[0] % patch or size[1] % patch or math.prod(size) < self.tokens_per_frame * patch**2:
            raise ValueError(f"pixels of {size} do not fit patches of {patch}; use what preprocess() returns")

    def parts(self) -> dict[str, list[nn.Module]]:
        llm = [self.language_model, self.lm_head]
        return {"vision": [self.vision_tower], "projector": [self.projector], "llm": llm}

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids of ``<|im_end|>`` and ``<|endoftext|>``; without a tokenizer, what config.json says ends an answer."""
        if self.tokenizer is not None:
            return tuple(self.tokenizer.convert_tokens_to_ids(list(STOP)))
        ids = self.architecture.get("eos_token_id")
        return () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)

    def prompt(self, question: str, video: ShownVideo) -> Prompt:
        """System line and user header | video | time message and question | assistant header."""
        time = TIME.format(duration=video.duration, num_frames=video.num_frames)
        return Prompt(*(self._ids(text) for text in (PREFIX, f"\n{time} {question}", HEADER)))

    def follow_up(self, question: str) -> Tensor:
        return self._ids(f"\n{USER}{question}{HEADER}")

    def image_prompt(self, texts: Sequence[str]) -> Prompt:
        """As ``prompt``, without a message; what stands before the first picture belongs to the prefix."""
        first, *between, last = ["", *texts] if len(texts) == 1 else texts
        return Prompt(self._ids(PREFIX + first), self._ids(last), self._ids(HEADER), self._between(between))

    def _between(self, texts: Sequence[str]) -> tuple[FrameText, ...] | None:
        """Text behind each of several pictures but the last."""
        none = torch.empty(0, dtype=torch.long)
        return (*(FrameText(none, self._ids(t)) for t in texts), FrameText(none, none)) if texts else None

    def training_text(
        self, texts: Sequence[str], turns: Sequence[tuple[str, str]], video: ShownVideo | None
    ) -> TrainingText:
        """The released training's: turns of ``<|im_start|>role, newline, text, <|im_end|>, newline``, split into tokens
        one by one; answers are supervised with all that is around them, elsewhere the three ids of that frame are.

        The time message stands right behind the video, with a blank behind it and whatever the question begins with.
        """
        # A turn is split into tokens as a whole, but where a picture stands.
        before, (*between, last) = (SYSTEM, [USER + texts[0]]) if len(texts) == 1 else (PREFIX + texts[0], texts[1:])
        if video is not None:
            last = f"\n{TIME.format(duration=video.duration, num_frames=video.num_frames)} {last}"
        turn, frame = "{}<|im_end|>\n", torch.tensor([self._ids(text)[0] for text in (START, STOP[0], "\n")])
        prefix = self._ids(before)
        ids = [self._ids(turn.format(last))]
        masks = [torch.isin(ids[0], frame)]
        for number, (question, answer) in enumerate(turns):
            if number:
                ids.append(self._ids(USER + turn.format(question)))
                masks.append(torch.isin(ids[-1], frame))
            ids.append(self._ids(f"{START}assistant\n{turn.format(answer)}"))
            masks.append(torch.ones_like(ids[-1], dtype=torch.bool))
        prompt_length = len(ids[0]) + len(self._ids(f"{START}assistant\n"))
        return TrainingText(
            prefix, torch.isin(prefix, frame), torch.cat(ids), torch.cat(masks), prompt_length, self._between(between)
        )

    def _ids(self, text: str) -> Tensor:
        require_tokenizer(self.tokenizer)
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
