"""QC-Comp's scores by their definition: float32, every layer and window with a sequence of its own."""

import math

import torch

import xcomp


def turn(x, positions, theta):
    """RoPE, position by position: (S, H, K)."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-2 * i / (2 * half))
            cos, sin = math.cos(angle), math.sin(angle)
            a, b = x[row, :, i], x[row, :, half + i]
            out[row, :, i], out[row, :, half + i] = a * cos - b * sin, b * cos + a * sin
    return out


def attention_of(backbone, layer, hidden):
    """Probabilities (H, S, S) of a layer for a sequence numbered 0, 1, 2, …, and the values. No mask is applied."""
    block = backbone.language_model.layers[layer]
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    theta = backbone.text_config.rope_parameters["rope_theta"]

    def heads(projection, norm):
        x = projection(normed).unflatten(-1, (-1, attention.head_dim))
        x = getattr(attention, norm)(x) if hasattr(attention, norm) else x
        return turn(x, range(len(hidden)), theta)

    queries, keys = heads(attention.q_proj, "q_norm"), heads(attention.k_proj, "k_norm")
    values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    group = queries.shape[1] // keys.shape[1]
    logits = [queries[:, h] @ keys[:, h // group].T / math.sqrt(attention.head_dim) for h in range(queries.shape[1])]
    return torch.stack(logits), [values[:, h // group] for h in range(queries.shape[1])]


def forward(backbone, layer, hidden):
    logits, values = attention_of(backbone, layer, hidden)
    causal = torch.ones(len(hidden), len(hidden)).tril().bool()
    weights = logits.masked_fill(~causal, -math.inf).softmax(-1)
    attended = torch.cat([weights[h] @ values[h] for h in range(len(weights))], -1)
    block = backbone.language_model.layers[layer]
    hidden = hidden + block.self_attn.o_proj(attended)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def score_of_clips(backbone, layer, hidden, cells, clips, config, num_rows, num_keys):
    """Scores of ``clips`` in a sequence of the positions in ``cells``: (where, clip or None, is it a question row)."""
    where = [place for place, _, _ in cells]
    logits, _ = attention_of(backbone, layer, hidden[where])
    if config.causal:
        logits = logits.masked_fill(~torch.ones(len(where), len(where)).tril().bool(), -math.inf)
    rows = [i for i, (_, _, asks) in enumerate(cells) if asks]
    assert len(rows) == num_rows and len(cells) == num_keys
    weights = logits.softmax(-1)[:, rows].mean((0, 1))
    scores = {}
    for clip in clips:
        own = [weights[i].item() for i, (_, c, _) in enumerate(cells) if c == clip]
        scores[clip] = sum(own) / len(own) if own else 0.0
    return scores


def windows_of(num_clips, size, stride):
    """Every ``stride`` clips a window, as long as it fits; one more at the end if clips are left over."""
    found = [list(range(s, s + size)) for s in range(0, num_clips, stride) if s + size <= num_clips]
    if num_clips <= size:
        return [list(range(num_clips))]
    if found[-1][-1] != num_clips - 1:
        found.append(list(range(num_clips - size, num_clips)))
    return found


@torch.no_grad()
def slow_clip_scores(selector, backbone, tokens, prefix, question, header, rule=None, texts=None):
    """(L, clips); NaN for what is discarded. ``texts`` stand before and behind the frames, and count for no clip."""
    config, rule = selector.config, rule or xcomp.Compressor(None)
    num_clips = math.ceil(len(tokens) / config.clip_frames)
    visual = rule.before_llm(tokens)
    frames, width, _ = visual.shape
    plan = rule.plan(backbone.num_layers, width)
    parts, kinds = [backbone.embed(prefix)], [("prefix", None, None)] * len(prefix)
    for number, (before, behind) in enumerate(texts or [(prefix[:0], prefix[:0])] * len(tokens)):
        frame = number * frames // len(tokens)
        parts.append(backbone.embed(before))
        kinds += [("between", frame, None)] * len(before)
        if ("video", frame, 0) not in kinds:
            parts.append(visual[frame])
            kinds += [("video", frame, slot) for slot in range(width)]
        parts.append(backbone.embed(behind))
        kinds += [("between", frame, None)] * len(behind)
    hidden = torch.cat([*parts, backbone.embed(torch.cat([question, header]))])
    kinds += [("skipped" if i < config.query_bias else "question", None, None) for i in range(len(question))]
    kinds += [("header", None, None)] * len(header)
    scores = torch.full((backbone.num_layers, num_clips), math.nan)
    for layer in range(backbone.num_layers):
        if plan is not None:
            kept = [i for i, (kind, _, slot) in enumerate(kinds) if kind != "video" or slot in plan[layer]]
            hidden, kinds = hidden[kept], [kinds[i] for i in kept]
        # A frame of the language model may stand for several of the video: the clip is that of its first.
        clips = [None if f is None else int(f * len(tokens) / frames) // config.clip_frames for _, f, _ in kinds]
        cells = [
            (i, clip if kind == "video" else None, kind == "question")
            for i, ((kind, _, _), clip) in enumerate(zip(kinds, clips))
        ]
        rows = len(question) - config.query_bias
        if config.variant == "global":
            found = score_of_clips(backbone, layer, hidden, cells, range(num_clips), config, rows, len(kinds))
            scores[layer] = torch.tensor([found[clip] for clip in range(num_clips)])
        else:
            cells = [cell for cell, (kind, _, _) in zip(cells, kinds) if kind != "header"]
            clips = [clip for clip, (kind, _, _) in zip(clips, kinds) if kind != "header"]
            collected = [[] for _ in range(num_clips)]
            for window in windows_of(num_clips, config.window_clips, config.window_stride):
                inside = [cell for cell, clip in zip(cells, clips) if clip is None or clip in window]
                found = score_of_clips(backbone, layer, hidden, inside, window, config, rows, len(inside))
                for clip in window:
                    collected[clip].append(found[clip])
            needed = min(config.window_clips // config.window_stride, max(map(len, collected)))
            for clip, values in enumerate(collected):
                if len(values) >= needed:
                    scores[layer, clip] = sum(values) / len(values)
        hidden = forward(backbone, layer, hidden)
        if plan is None:
            gone = rule.gone(layer, hidden, kinds)
            kept = [i for i in range(len(kinds)) if i not in gone]
            hidden, kinds = hidden[kept], [kinds[i] for i in kept]
    return scores


@torch.no_grad()
def slow_frame_scores(selector, backbone, pixels, *ids, rule=None, texts=None):
    """One chunk after the other, each encoded and scored anew."""
    config, num_frames = selector.config, len(pixels)
    stride = min(config.chunk_frames, math.ceil(num_frames / config.clip_frames) * config.clip_frames)
    margin = 0 if config.variant == "global" else (config.window_clips - config.window_stride) * config.clip_frames
    layers = selector.layers(backbone.num_layers)
    found = [[[] for _ in range(num_frames)] for _ in layers]
    for turn_number in range(config.n_repeat):
        for chunk in range(math.ceil(num_frames / stride)):
            start = turn_number * (config.clip_frames // config.n_repeat) + turn_number * (stride // config.n_repeat)
            frames = [(start + chunk * stride + i) % num_frames for i in range(stride + 2 * margin)]
            own = [texts[frame] for frame in frames] if texts else None
            scores = slow_clip_scores(selector, backbone, backbone.encode(pixels[frames]), *ids, rule, own)
            for row, layer in enumerate(layers):
                for i, frame in enumerate(frames):
                    score = scores[layer, i // config.clip_frames].item()
                    if not math.isnan(score):
                        found[row][frame].append(score)
    return torch.tensor([sum(sum(row[f]) / len(row[f]) for row in found) for f in range(num_frames)])
