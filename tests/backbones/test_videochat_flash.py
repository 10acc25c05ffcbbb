"""VideoChat-Flash against slow references written out here, recorded vectors and broken checkpoints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from damage import check_refused, contents, cut, drop_tensors, edit, edit_tensors
from golden import FOLDER, ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from xcomp.backbones import videochat_flash as vcf
from xcomp.backbones.videochat_flash import VideoChatFlash, merge_schedule, merge_tokens, position_table

from xcomp.backbone import ShownVideo
from xcomp.pixels import PixelFormat, resize_uint8

TINY = {
    "model_type": "videochat_flash_qwen",
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "use_sliding_window": False, "sliding_window": 99, "eos_token_id": 7,
    "mm_vision_tower": "umt-hd-large", "mm_projector_type": "tome16_mlp_hd64", "mm_hidden_size": 24,
    "mm_local_num_frames": 4, "mm_vision_select_layer": -2, "frame_aspect_ratio": "square", "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 40,
                      "patch_size": 8},
}  # fmt: skip


def build(seed: int = 0, noise: float = 0.1, options: dict | None = None, **changes) -> VideoChatFlash:
    """A tiny model whose biases and norms are random too, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = VideoChatFlash(VideoChatFlash.Config(architecture={**TINY, **changes}, **(options or {})))
    for parameter in model.parameters():
        parameter.data.add_(noise * torch.randn_like(parameter))
    return model


def load(folder, **options) -> VideoChatFlash:
    return VideoChatFlash(VideoChatFlash.Config(checkpoint=str(folder), **options))


def relative(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def video(num_frames: int, size: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


# --- positions --------------------------------------------------------------------------------------------------------


def cubic_weights(t: float) -> list[float]:
    a = -0.75

    def weight(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a

    return [weight(t + 1), weight(t), weight(1 - t), weight(2 - t)]


def resize_axis(x: np.ndarray, count: int, taps: int) -> np.ndarray:
    """Axis 0 to ``count`` entries, linear (2 taps) or bicubic (4), pixel centres aligned, the border repeated."""
    rows = []
    for i in range(count):
        source = (i + 0.5) * len(x) / count - 0.5
        if taps == 2:
            source = max(source, 0.0)
        first = math.floor(source)
        t = source - first
        weights = [1 - t, t] if taps == 2 else cubic_weights(t)
        offsets = range(first, first + 2) if taps == 2 else range(first - 1, first + 3)
        rows.append(sum(w * x[min(max(j, 0), len(x) - 1)] for w, j in zip(weights, offsets)))
    return np.stack(rows)


def slow_table(width: int, frames: int, rows: int, columns: int) -> np.ndarray:
    table = np.zeros((4, 14, 14, width))
    for p in range(784):
        for j in range(width):
            angle = p / 10000 ** (2 * (j // 2) / width)
            table[p // 196, p % 196 // 14, p % 14, j] = math.cos(angle) if j % 2 else math.sin(angle)
    slices = table[:1] if frames == 1 else table
    if (rows, columns) != (14, 14):
        slices = [resize_axis(s, rows, 4).swapaxes(0, 1) for s in slices]
        slices = np.stack([resize_axis(s, columns, 4).swapaxes(0, 1) for s in slices])
    if frames not in (1, 4):
        slices = resize_axis(slices, frames, 2)
    return slices.reshape(-1, width)


@pytest.mark.parametrize(
    "frames, rows, columns", [(4, 14, 14), (1, 14, 14), (1, 6, 6), (8, 6, 6), (4, 28, 28), (16, 5, 7), (3, 14, 14)]
)
def test_positions_follow_the_formula(frames, rows, columns):
    ours = position_table(6, frames, rows, columns, torch.device("cpu"), torch.float32)
    theirs = torch.tensor(slow_table(6, frames, rows, columns)).float()
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_positions_made_in_inference_mode_serve_training():
    position_table.cache_clear()
    model = build()
    with torch.inference_mode():
        model.encode(video(4))
    model.encode(video(4)).sum().backward()
    assert model.vision_tower.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.state_dict().keys() == dict(model.named_parameters(remove_duplicate=False)).keys()  # no tables in it


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, target, rounds",
    [
        (3136, 64, [1568, 784, 392, 196, 98, 34]),
        (6272, 128, [3136, 1568, 784, 392, 196, 68]),
        (784, 16, [392, 196, 98, 49, 24, 9]),
        (1024, 64, [512, 256, 128, 64]),
        (9, 9, []),
    ],
)
def test_merge_schedule(tokens, target, rounds):
    assert merge_schedule(tokens, target) == rounds


def slow_merge(tokens: np.ndarray, target: int, heads: int) -> np.ndarray:
    """One clip, one token at a time: (P, W) → (target, W)."""
    entries = [(row.astype(np.float64), 1) for row in tokens]
    while len(entries) > target:
        merges = min(len(entries) - target, len(entries) // 2)
        metric = [value.reshape(heads, -1).mean(0) for value, _ in entries]
        metric = [m / np.sqrt((m * m).sum()) for m in metric]
        best = []
        for a in range(0, len(entries), 2):
            scores = [float(metric[a] @ metric[b]) for b in range(1, len(entries), 2)]
            partner = max(range(len(scores)), key=lambda b: (round(scores[b], 12), -b))
            best.append((-round(scores[partner], 12), a, 2 * partner + 1))
        best.sort()  # the most alike first, then the lower position
        odd = {b: [entries[b]] for b in range(1, len(entries), 2)}
        for _, a, b in best[:merges]:
            odd[b].append(entries[a])
        joined = [(sum(v * n for v, n in group) / sum(n for _, n in group), sum(n for _, n in group))
                  for group in odd.values()]  # fmt: skip
        entries = [entries[a] for _, a, _ in best[merges:]] + joined
    return np.stack([value for value, _ in entries])


@pytest.mark.parametrize("count, target, heads", [(36, 16, 2), (37, 16, 2), (144, 64, 3), (5, 3, 1), (101, 16, 4)])
def test_merging_agrees_with_one_token_at_a_time(count, target, heads):
    tokens = torch.randn(3, count, 12, generator=torch.Generator().manual_seed(count))
    ours = merge_tokens(tokens, target, heads)
    theirs = np.stack([slow_merge(clip, target, heads) for clip in tokens.numpy()])
    torch.testing.assert_close(ours, torch.tensor(theirs).float(), atol=2e-6, rtol=0)


def test_equal_scores_are_taken_in_order_of_position():
    # Unit vectors score exactly 0 or 1, so nearly everything ties; the lengths tell the tokens apart.
    direction = torch.randint(0, 3, (2, 41), generator=torch.Generator().manual_seed(0))
    length = 2.0 ** torch.randint(-2, 3, (2, 41, 1), generator=torch.Generator().manual_seed(1))
    tokens = torch.eye(4)[direction] * length
    ours = merge_tokens(tokens, 26, 1)
    theirs = np.stack([slow_merge(clip, 26, 1) for clip in tokens.numpy()])
    assert np.abs(ours.numpy() - theirs).max() < 1e-6


def test_merging_is_a_mean_and_so_is_its_gradient():
    tokens = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(3))
    jacobian = torch.autograd.functional.jacobian(lambda x: merge_tokens(x, 12, 2), tokens)
    jacobian = jacobian[0, :, :, 0]  # (12, 8, 30, 8)
    same = jacobian.diagonal(dim1=1, dim2=3)  # (12, 30, 8): output channel to the same input channel
    torch.testing.assert_close(same, same[..., :1].expand_as(same))
    weights = same[..., 0]
    torch.testing.assert_close(weights.sum(1), torch.ones(12))
    assert ((weights > 0).sum(0) == 1).all()  # every patch stands behind exactly one token
    torch.testing.assert_close(weights @ tokens[0], merge_tokens(tokens, 12, 2)[0])
    assert jacobian.abs().sum() == pytest.approx(same.abs().sum().item())  # nothing crosses channels


def test_merging_ignores_autocast_and_leaves_the_precision_setting():
    tokens = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(4))
    expected = merge_tokens(tokens, 32, 4)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(merge_tokens(tokens, 32, 4), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


# --- vision towers ----------------------------------------------------------------------------------------------------


def slow_norm(x, norm):
    if isinstance(norm, nn.RMSNorm):
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def slow_attention(x, attention):
    width, size = x.shape[-1], x.shape[-1] // attention.num_heads
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(width))
    if attention.normalise:
        q, k = slow_norm(q, attention.q_norm), slow_norm(k, attention.k_norm)
    else:
        q, v = q + attention.q_bias, v + attention.v_bias
    out = torch.zeros_like(x)
    for head in range(attention.num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.exp(q[:, part] @ k[:, part].T * size**-0.5)
        out[:, part] = scores / scores.sum(1, keepdim=True) @ v[:, part]
    return out @ attention.proj.weight.T + attention.proj.bias


def slow_tower(tower, clip):
    """(F, 3, h, w) → (P, W), one clip; convolution, attention, norms and GELU written out."""
    patch, kernel = tower.patch_embed.patch, tower.patch_embed.proj.weight[:, :, 0]
    rows, columns = clip.shape[-2] // patch, clip.shape[-1] // patch
    x = torch.stack([
        (kernel * frame[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]).sum((1, 2, 3))
        for frame in clip for r in range(rows) for c in range(columns)
    ]) + tower.patch_embed.proj.bias  # fmt: skip
    stored = isinstance(tower, vcf.InternVideo2)
    if stored:
        x = torch.cat([tower.cls_token[0], x]) + (tower.img_pos_embed if len(clip) == 1 else tower.pos_embed)[0]
    else:
        x = x + torch.tensor(slow_table(x.shape[-1], len(clip), rows, columns)).float()
    for block in tower.blocks:
        y = slow_attention(slow_norm(x, block.norm1), block.attn)
        x = x + (y * block.ls1.gamma if stored else y)
        y = slow_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5)) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
        x = x + (y * block.ls2.gamma if stored else y)
    return x[1:] if stored else slow_norm(x, tower.vision_layernorm)


IV2 = {"mm_vision_tower": "internvideo2", "vision_config": {**TINY["vision_config"], "mlp_ratio": 48 / 11}}


@pytest.mark.parametrize(
    "changes, frames, size",
    [({}, 1, 40), ({}, 4, 40), ({}, 8, 48), ({}, 16, 32), ({}, 4, 112), (IV2, 4, 40), (IV2, 1, 40)],
)
def test_tower_agrees_with_arithmetic_written_out(changes, frames, size):
    tower = build(**changes).vision_tower
    clips = video(2 * frames, size).unflatten(0, (2, frames))
    with torch.no_grad():
        ours, theirs = tower(clips), torch.stack([slow_tower(tower, clip) for clip in clips])
    assert ours.shape == (2, frames * (size // 8) ** 2, 24)
    assert relative(ours, theirs) < 2e-5


def test_tokens_are_the_mlp_of_merged_features():
    model = build()
    with torch.no_grad():
        features = model.vision_tower(video(8).unflatten(0, (2, 4)))
        merged = torch.tensor(np.stack([slow_merge(clip, 64, 2) for clip in features.numpy()])).float()
        first, _, second = model.projector.mlp
        hidden = merged @ first.weight.T + first.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        expected = (hidden @ second.weight.T + second.bias).reshape(8, 16, 32)
        assert relative(model.encode(video(8)), expected) < 2e-5


def test_encoding_does_not_depend_on_the_batch():
    one, many = build(options={"clip_batch": 1}), build(options={"clip_batch": 3})
    with torch.no_grad():
        together = many.encode(video(20))
        apart = torch.cat([many.encode(clip) for clip in video(20).split(4)])
        torch.testing.assert_close(one.encode(video(20)), together, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-4)
        images = many.encode_images(video(3))
        torch.testing.assert_close(images[1], many.encode_images(video(3)[1:2])[0], atol=1e-5, rtol=1e-4)
    assert together.shape == (20, 16, 32) and images.shape == (3, 16, 32)


def test_every_vision_parameter_learns():
    for changes in ({}, IV2):
        model = build(**changes)
        (model.encode(video(4)).pow(2).sum() + model.encode_images(video(1)).pow(2).sum()).backward()
        for module in (model.vision_tower, model.projector):
            idle = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert not idle


@pytest.mark.parametrize("shape", [(6, 3, 40, 40), (0, 3, 40, 40), (4, 1, 40, 40), (4, 3, 40, 44), (4, 3, 16, 16)])
def test_encode_refuses_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=str(shape[0]) if shape[0] % 4 or not shape[0] else "pixels"):
        build().encode(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    name = str(dtype).removeprefix("torch.")
    model, exact = build(noise=0, options={"dtype": name}), build(noise=0)
    exact.load_state_dict(model.state_dict())
    assert {p.dtype for p in model.parameters()} == {dtype}
    clips = video(8).unflatten(0, (2, 4))
    with torch.no_grad():
        assert relative(model.vision_tower(clips.to(dtype)).float(), exact.vision_tower(clips)) < 0.05
        assert model.encode(video(8)).dtype == dtype and model.encode(video(8)).isfinite().all()
        hidden = model.language_model(inputs_embeds=model.encode(video(4)).flatten(0, 1).unsqueeze(0))
    assert model.head(hidden.last_hidden_state).isfinite().all()


def test_casting_keeps_rotary_frequencies_exact():
    model = build()
    expected = 5e5 ** -(torch.arange(0, 8, 2).float() / 8)
    for cast in (model.bfloat16(), nn.ModuleList([model]).half()[0], build(options={"dtype": "bfloat16"})):
        torch.testing.assert_close(cast.language_model.rotary_emb.inv_freq, expected)
    assert model.lm_head.weight is model.language_model.embed_tokens.weight


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_released_names_and_shapes(tmp_path):
    build().save_pretrained(tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    tower = "model.vision_tower.vision_tower.encoder."
    expected = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}."
        for part, rows in (("q", 32), ("k", 16), ("v", 16)):
            expected[f"{layer}self_attn.{part}_proj.weight"] = (rows, 32)
            expected[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
        expected[f"{layer}self_attn.o_proj.weight"] = (32, 32)
        expected |= {f"{layer}mlp.{part}_proj.weight": (48, 32) for part in ("gate", "up")}
        expected[f"{layer}mlp.down_proj.weight"] = (32, 48)
        expected |= {f"{layer}{part}_layernorm.weight": (32,) for part in ("input", "post_attention")}
        block = f"{tower}blocks.{i}."
        expected |= {f"{block}{norm}.{leaf}": (24,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
        expected |= {f"{block}attn.qkv.weight": (72, 24), f"{block}attn.q_bias": (24,), f"{block}attn.v_bias": (24,)}
        expected |= {f"{block}attn.proj.weight": (24, 24), f"{block}attn.proj.bias": (24,)}
        expected |= {f"{block}mlp.fc1.weight": (96, 24), f"{block}mlp.fc1.bias": (96,)}
        expected |= {f"{block}mlp.fc2.weight": (24, 96), f"{block}mlp.fc2.bias": (24,)}
    expected |= {f"{tower}patch_embed.proj.weight": (24, 3, 1, 8, 8), f"{tower}patch_embed.proj.bias": (24,)}
    expected |= {f"{tower}vision_layernorm.{leaf}": (24,) for leaf in ("weight", "bias")}
    expected |= {"model.mm_projector.mlp.0.weight": (32, 24), "model.mm_projector.mlp.0.bias": (32,)}
    expected |= {"model.mm_projector.mlp.2.weight": (32, 32), "model.mm_projector.mlp.2.bias": (32,)}
    assert {name: tuple(t.shape) for name, t in stored.items()} == expected


def test_internvideo2_names(tmp_path):
    build(**IV2).save_pretrained(tmp_path / "m")
    names = {n for n in load_file(tmp_path / "m" / "model.safetensors") if "vision_tower" in n and "blocks.1" not in n}
    root, block = "model.vision_tower.vision_tower.", "model.vision_tower.vision_tower.blocks.0."
    expected = {root + n for n in ("cls_token", "pos_embed", "img_pos_embed")}
    expected |= {root + "patch_embed.proj." + n for n in ("weight", "bias")}
    expected |= {block + n + ".weight" for n in ("norm1", "norm2", "attn.qkv", "attn.q_norm", "attn.k_norm")}
    expected |= {block + n + leaf for n in ("attn.proj", "mlp.fc1", "mlp.fc2") for leaf in (".weight", ".bias")}
    assert names == expected | {block + n for n in ("ls1.gamma", "ls2.gamma")}


def test_released_sizes():
    """Parameter counts of the tower and projector, and the sizes each tower name stands for."""
    released = {k: v for k, v in TINY.items() if k not in ("vision_config", "mm_hidden_size")} | {"hidden_size": 1536}
    with torch.device("meta"):
        tower = vcf.UMT(vcf.vision_sizes(released))
        projector = vcf.ToMeProjector(1024, 1536, 16, 16)
        other = vcf.InternVideo2(vcf.vision_sizes({**released, "mm_vision_tower": "internvideo2"}))
    assert sum(p.numel() for p in tower.parameters()) == 290_479_104
    assert sum(p.numel() for p in projector.parameters()) == 3_935_232
    assert vcf.vision_sizes(released).image_size == 448 and len(tower.blocks) == 23
    assert vcf.vision_sizes({**released, "mm_vision_tower": "umt-large"}).image_size == 224
    assert tuple(other.pos_embed.shape) == (1, 1025, 1408) and len(other.blocks) == 39
    assert other.blocks[0].mlp.fc1.out_features == 6144
    assert tower.vision_layernorm.eps == 1e-12 and tower.blocks[0].norm1.eps == other.blocks[0].norm2.eps == 1e-6


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_round_trip_is_bit_equal(tmp_path, monkeypatch, tied, shard_bytes):
    monkeypatch.setattr(vcf, "SHARD_BYTES", shard_bytes)
    model = build(tie_word_embeddings=tied, note={"kept": [1]})
    model.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2 if shard_bytes == 20_000 else True
    theirs = again.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert (again.lm_head.weight is again.language_model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(model.encode(video(4)), again.encode(video(4)))
        positions = torch.arange(5).unsqueeze(0)
        assert torch.equal(model.rotary(positions)[0], again.rotary(positions)[0])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == {**TINY, "tie_word_embeddings": tied, "note": {"kept": [1]}, "torch_dtype": "float32"}
    assert again.text_config.rope_parameters["rope_theta"] == 5e5 and again.text_config.sliding_window is None


def test_saving_in_another_type_and_over_an_old_folder(tmp_path, monkeypatch):
    model, target = build(), tmp_path / "m"
    monkeypatch.setattr(vcf, "SHARD_BYTES", 20_000)
    model.save_pretrained(target)
    (target / "notes.txt").write_text("mine")
    (target / "generation_config.json").write_text('{"repetition_penalty": 1.1}')
    monkeypatch.setattr(vcf, "SHARD_BYTES", 10**9)
    load(target).save_pretrained(target, dtype="bfloat16")
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt", "generation_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    stored = load_file(target / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], model.language_model.norm.weight.bfloat16())
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = load(target, dtype="float32")
    assert torch.equal(wide.language_model.norm.weight, stored["model.norm.weight"].float())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model, target = build(), tmp_path / "m"
    model.save_pretrained(target)
    before = (target / "model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(vcf, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        build(seed=1).save_pretrained(target)
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    build().save_pretrained(tmp_path / "m")
    model = load(tmp_path / "m")
    expected = model.language_model.norm.weight.clone()
    with open(tmp_path / "m" / "model.safetensors", "r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert torch.equal(model.language_model.norm.weight, expected)


def test_a_stored_tied_head_is_accepted(tmp_path):
    build().save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    model = load(tmp_path / "m")
    assert model.lm_head.weight is model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def edit_config(**changes):
    return edit("config.json", lambda config: config.update(changes))


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "cut off": (cut, "model.safetensors' is cut off"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "config.json' is not valid JSON"),
    "list json": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "pickle": (pickle_only, "pytorch_model.bin' is a pickle.*convert it.*python -c .*weights_only=True"),
    "missing shard": (missing_shard, "missing: model-00001-of-00002.safetensors"),
    "other model": (edit_config(model_type="llama"), "model_type 'llama'.*needed: 'videochat_flash_qwen'"),
    "other class": (edit_config(architectures=["Qwen2ForCausalLM"]), "Qwen2ForCausalLM.*needed"),
    "other tower": (edit_config(mm_vision_tower="siglip"), "unknown mm_vision_tower 'siglip'.*umt-hd"),
    "other projector": (edit_config(mm_projector_type="linear"), "unsupported mm_projector_type 'linear'"),
    "tower key": (edit_config(vision_config={"depth": 3}), r"unknown vision_config keys \['depth'\]"),
    "tower width": (edit_config(mm_hidden_size=1024), "mm_hidden_size 1024 is not the tower's width 24"),
    "select layer": (edit_config(mm_vision_select_layer=1), "mm_vision_select_layer 1 must count from the end"),
    "few patches": (edit_config(mm_projector_type="tome64_mlp_hd64"), "25 patches, fewer than the 64 tokens"),
    "no clip length": (edit_config(mm_local_num_frames=None), "no mm_local_num_frames; give clip_frames"),
    "missing": (edit_tensors(lambda t: t.pop("model.norm.weight")), r"1 tensors .*missing model.norm.weight \[32\]"),
    "many missing": (drop_tensors("layers."), "24 tensors .*and 4 more"),
    "unexpected": (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), r"unexpected extra \[2\]"),
    "shape": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
        r"model.norm.weight is F32 \[31\], should be floating-point \[32\]",
    ),
    "quantised": (
        edit_tensors(lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
        "model.norm.weight is I8",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "m"
    build().save_pretrained(folder)
    return contents(folder)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_say_what_is_wrong(case, sound, tmp_path):
    check_refused(sound, tmp_path, *BROKEN[case], load)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "exactly one of checkpoint"),
        ({"architecture": TINY, "checkpoint": "x"}, "exactly one of checkpoint"),
        ({"checkpoint": "/nowhere/at/all"}, "neither a folder nor a hub id"),
        ({"architecture": TINY, "dtype": "bf16"}, "dtype is 'bf16'.*float32, bfloat16, float16"),
        ({"architecture": TINY, "clip_batch": 0}, "clip_batch is 0"),
        ({"architecture": TINY, "clip_frames": -1}, "clip_frames is -1"),
        ({"architecture": TINY, "attn_implementation": "fast"}, "attn_implementation is 'fast'"),
        ({"architecture": TINY, "attn_implementation": "flash_attention_2"}, "flash_attention_2' needs a CUDA device"),
        ({"architecture": {**TINY, **IV2}, "clip_frames": 8}, "clips of 4 frames"),
        ({"architecture": {k: v for k, v in TINY.items() if k != "vocab_size"}}, "lacks .*vocab_size"),
        ({"architecture": TINY, "tokenizer": "tests_no_such_folder"}, "tokenizer 'tests_no_such_folder' is neither"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VideoChatFlash(VideoChatFlash.Config(**options))


def test_options_reach_the_model(tmp_path):
    model = build(options={"clip_frames": 8, "attn_implementation": "eager"})
    assert model.clip_frames == 8 and model.text_config._attn_implementation == "eager"
    assert build().text_config._attn_implementation == "sdpa" and build().clip_frames == 4
    assert model.encode(video(8)).shape == (8, 16, 32)
    model.save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").clip_frames == 8
    assert model.parts()["vision"] == [model.vision_tower]
    owned = {p for modules in model.parts().values() for module in modules for p in module.parameters()}
    assert owned == set(model.parameters())


def test_random_weights_follow_the_seed():
    first, same, other = (build(seed=s, noise=0).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["projector.mlp.0.weight"], other["projector.mlp.0.weight"])
    for name, tensor in first.items():
        if "norm" in name and name.endswith("weight"):
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        elif name.startswith(("vision_tower", "projector")):  # Xavier
            expected = (2 / sum(tensor.flatten(1).shape)) ** 0.5
            assert 0.8 * expected < tensor.std() < 1.2 * expected, name
        else:
            assert 0.015 < tensor.std() < 0.025, name


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def byte_tokenizer(tmp_path):
    """One token a byte, and the three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    "\nThe video lasts for 12.35 seconds, and 64 frames are uniformly sampled from it. What is it?",
    "<|im_end|>\n<|im_start|>assistant\n",
)


def test_prompt(byte_tokenizer, tmp_path):
    model = build(vocab_size=300, options={"tokenizer": byte_tokenizer})
    prompt = model.prompt("What is it?", ShownVideo(duration=12.346, num_frames=64))
    parts = (prompt.prefix_ids, prompt.question_ids, prompt.header_ids)
    assert tuple(model.tokenizer.decode(part) for part in parts) == PROMPT
    assert all(part.ndim == 1 and part.dtype == torch.int64 for part in parts)
    assert model.tokenizer.convert_ids_to_tokens(list(model.stop_ids)) == ["<|im_end|>", "<|endoftext|>"]
    model.save_pretrained(tmp_path / "m")
    follow_up = model.follow_up("And then?")
    assert model.tokenizer.decode(follow_up) == f"\n<|im_start|>user\nAnd then?{PROMPT[2]}"
    again = load(tmp_path / "m").prompt("What is it?", ShownVideo(duration=12.346, num_frames=64))
    assert torch.equal(again.suffix_ids, prompt.suffix_ids)


def test_without_a_tokenizer_only_prompts_fail():
    model = build()
    assert model.tokenizer is None and model.stop_ids == (7,)
    with pytest.raises(ValueError, match="give tokenizer=<folder>"):
        model.prompt("why?", ShownVideo(duration=1.0, num_frames=4))


def test_released_tokenizer():
    folder = ROOT.parent / "data" / "videochat_flash_2b"
    if not folder.is_dir():
        pytest.skip("the released tokenizer's files are not here")
    model = build(vocab_size=151_700, options={"tokenizer": str(folder)})
    prompt = model.prompt("What is it?", ShownVideo(duration=12.346, num_frames=64))
    assert len(prompt.prefix_ids) == 14 and prompt.prefix_ids[0] == 151644
    assert prompt.question_ids[0] == 198 and model.stop_ids == (151645, 151643)
    assert prompt.header_ids.tolist() == [151645, 198, 151644, 77091, 198]
    whole = model.tokenizer(PROMPT[1] + PROMPT[2]).input_ids
    assert prompt.suffix_ids.tolist() == whole


def test_released_training_text_in_the_released_tokens():
    """Nine tokens of a sample with one turn are supervised beside the answer; the blank before the question's line
    break makes one token of both, which is not."""
    folder = ROOT.parent / "data" / "videochat_flash_2b"
    if not folder.is_dir():
        pytest.skip("the released tokenizer's files are not here")
    model = build(vocab_size=151_700, options={"tokenizer": str(folder)})
    turns = [("What is it?", "A cross.")]
    text = model.training_text(("", "\nWhat is it?"), turns, ShownVideo(duration=12.346, num_frames=64))
    assert len(text.prefix_ids) == 14 and text.suffix_ids[0] == 198 and 715 in text.suffix_ids
    answer = model.tokenizer("<|im_start|>assistant\nA cross.<|im_end|>\n").input_ids
    asked = len(text.suffix_ids) - len(answer)
    assert text.suffix_ids[asked:].tolist() == answer and text.suffix_mask[asked:].all()
    others = torch.cat([text.prefix_ids[text.prefix_mask], text.suffix_ids[:asked][text.suffix_mask[:asked]]])
    assert others.tolist() == [151644, 198, 151645, 198, 151644, 198, 198, 151645, 198]
    assert text.prompt_length == asked + 3
    alone = model.training_text(("\nWhat?",), [("What?", "A")], None)  # text alone: "user" and two line breaks
    assert alone.suffix_ids[:3].tolist() == [151644, 872, 271]


# --- pixels -----------------------------------------------------------------------------------------------------------


def pillow(frames, size):
    resized = [Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC) for f in frames.numpy()]
    return torch.tensor(np.stack([np.asarray(image) for image in resized]))


def picture(num_frames, height, width):
    """Smooth colours with hard edges and noise."""
    generator = torch.Generator().manual_seed(height)
    ramp = torch.linspace(0, 200, height)[None, :, None, None] + torch.zeros(num_frames, height, width, 3)
    ramp[:, :, width // 3 : width // 2] = 255
    return (ramp + 50 * torch.rand(ramp.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("shape, size", [((90, 160), (40, 40)), ((30, 20), (48, 64)), ((37, 53), (37, 20))])
def test_resizing_agrees_with_pillow(shape, size, monkeypatch):
    frames = picture(3, *shape)
    theirs = pillow(frames, size).float()
    ours = resize_uint8(frames.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).float()
    assert (ours - theirs).abs().mean() < 0.05 and (ours - theirs).abs().max() <= 2  # of 255 levels
    # the way of accelerators, on the CPU
    monkeypatch.setattr("xcomp.pixels.INTEGER_DEVICES", ())
    ours = resize_uint8(frames.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1).float()
    assert (ours - theirs).abs().mean() < 0.005 and (ours - theirs).abs().max() <= 1


def test_preprocess():
    model, frames = build(), picture(5, 72, 128)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    theirs = ((pillow(frames, (40, 40)) / 255 - mean) / std).permute(0, 3, 1, 2)
    ours = model.preprocess(frames)
    assert ours.shape == (5, 3, 40, 40) and ours.dtype == torch.float32
    assert ((ours - theirs).abs().mean(dim=(0, 2, 3)) * std).max() < 1 / 255 / 20
    batched = PixelFormat(40, mean.tolist(), std.tolist())(frames, batch_size=2)
    assert torch.equal(batched, ours)


def test_shortest_edge_and_crop():
    frames = picture(2, 60, 100)
    resized = pillow(frames, (30, 50))[:, 3:27, 13:37]
    ours = PixelFormat(30, shortest_edge=True, crop=24)(frames) * 255
    assert (ours - resized.permute(0, 3, 1, 2)).abs().mean() < 0.05
    tall = PixelFormat(30, shortest_edge=True)(frames.transpose(1, 2))
    assert tall.shape == (2, 3, 50, 30)


@pytest.mark.parametrize(
    "frames, options, message",
    [
        (torch.zeros(2, 8, 8, 3), {}, r"\(T, H, W, 3\) uint8, T at least 1, not \(2, 8, 8, 3\) torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, "colour channel last"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {"crop": 9}, r"crop \(9, 9\) is larger"),
    ],
)
def test_pixels_are_checked(frames, options, message):
    with pytest.raises(ValueError, match=message):
        PixelFormat(8, **options)(frames)


# --- recorded vectors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    if not FOLDER.is_dir():
        pytest.skip("the reference vectors are not here; XCOMP_GOLDEN may point to them")
    tensors = load_file(FOLDER / "golden.safetensors")
    pixels = ((tensors["frames_uint8"][:16].float() - 127) / 63.5).repeat_interleave(4, -1).repeat_interleave(4, -2)
    return load(FOLDER), pixels, tensors


def test_golden_video(golden):
    model, pixels, tensors = golden
    with torch.no_grad():
        features = model.vision_tower(pixels.unflatten(0, (2, 8)))
        if (expected := tensors.get("vision.video_clips_out")) is not None:
            assert relative(features, expected) < 2e-5
        assert relative(model.encode(pixels).reshape(2, 128, 64), tensors["projector.video_tokens"]) < 2e-5


def test_golden_images(golden):
    model, pixels, tensors = golden
    with torch.no_grad():
        assert relative(model.vision_tower(pixels[:2].unsqueeze(1)), tensors["vision.image_out"]) < 2e-5
        assert relative(model.encode_images(pixels[:2]), tensors["projector.image_tokens"]) < 2e-5


def test_golden_checkpoint_round_trip(golden, tmp_path):
    model = golden[0]
    model.save_pretrained(tmp_path / "m")
    original = load_file(FOLDER / "model.safetensors")
    ours = load_file(tmp_path / "m" / "model.safetensors")
    assert set(ours) | {"lm_head.weight"} == set(original) | {"lm_head.weight"}
    assert all(torch.equal(tensor, original[name]) for name, tensor in ours.items())
    before = json.loads((FOLDER / "config.json").read_text())
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == before
