"""A pass through the language model that masks instead of dropping, and text to stand between its frames."""

import torch

from xcomp.backbone import FrameText, apply_rope, attention_probabilities, repeat_heads


def random_texts(frames, seed=0):
    """Text before and behind each of so many frames, some of it empty."""
    noise = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (frames, 2), generator=noise).tolist()
    return [FrameText(*(torch.randint(0, 97, (n,), generator=noise) for n in pair)) for pair in lengths]


def reference_logits(backbone, rule, visual, prefix, suffix, texts=None):
    """All positions at every layer, float32; dropped ones are masked out as keys and stay out of the numbering.

    With ``texts``, that of each frame stands around it; of frames that became one, the first has the tokens.
    """
    given, visual = len(visual), rule.before_llm(visual)
    frames, width, _ = visual.shape
    parts, slots = [backbone.embed(prefix)], [-1] * len(prefix)
    texts = texts or [(prefix[:0], prefix[:0])] * given
    for number, (before, behind) in enumerate(texts):
        parts.append(backbone.embed(before))
        slots += [-1] * len(before)
        if number * frames % given < frames:  # the first that went into its frame
            parts.append(visual[number * frames // given])
            slots += range(width)
        parts.append(backbone.embed(behind))
        slots += [-1] * len(behind)
    hidden = torch.cat([*parts, backbone.embed(suffix)])[None]
    slots = torch.tensor(slots + [-1] * len(suffix))
    plan = rule.plan(backbone.num_layers, width)
    for layer in range(backbone.num_layers):
        alive = torch.tensor([s < 0 or s in plan[layer] for s in slots.tolist()])
        cos, sin = backbone.rotary((alive.cumsum(0) - 1).clamp(min=0)[None])
        normed = backbone.input_norm(layer, hidden)
        keys, values = backbone.project_keys_values(layer, normed)
        queries = apply_rope(backbone.project_queries(layer, normed), cos, sin)
        mask = torch.ones(len(slots), len(slots), dtype=torch.bool).tril() & alive
        mask = mask | torch.eye(len(slots), dtype=torch.bool)  # a dropped row must look somewhere
        weights = attention_probabilities(queries, apply_rope(keys, cos, sin), mask)
        attended = (weights @ repeat_heads(values, weights.shape[1])).transpose(1, 2).flatten(2)
        hidden = backbone.add_mlp(layer, backbone.add_attention(layer, hidden, attended))
    return backbone.head(hidden)[0]
