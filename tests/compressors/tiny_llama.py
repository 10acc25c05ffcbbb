"""The whole tiny Llama of a reference case as a backbone, and what is needed to look into it."""

from __future__ import annotations

import transformers
from golden import Case
from torch import Tensor, nn

from xcomp.backbone import Rotary
from xcomp.compressor import LayerOutput
from xcomp.layout import TokenLayout
from xcomp.tiny import TinyBackbone


def llama_of(case: Case) -> TinyBackbone:
    """The case's weights ``w.*``; id i stands for row i of its ``inputs_embeds``."""
    config = dict(case.params["config"])
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    backbone = TinyBackbone(TinyBackbone.Config(family="llama"))
    backbone.language_model = transformers.LlamaModel(transformers.LlamaConfig(**config, rope_parameters=rope))
    weights = {name[2:]: tensor for name, tensor in case.inputs.items() if name.startswith("w.")}
    head = weights.pop("lm_head.weight", None)
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    backbone.language_model.load_state_dict(weights)
    backbone.lm_head = nn.Identity()
    if head is not None:
        backbone.lm_head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        backbone.lm_head.weight.data.copy_(head)
    return backbone.eval().requires_grad_(False)


def layout_of(case: Case) -> TokenLayout:
    """One frame of all visual tokens, text around it."""
    start, length = case.params["image_start"], case.params["image_length"]
    return TokenLayout.sequence([(start, 1, length, case.inputs["inputs_embeds"].shape[1] - start - length)])


def rotary_at(backbone: TinyBackbone, positions: Tensor) -> Rotary:
    return Rotary(*backbone.rotary(positions.unsqueeze(0)))


def layer_output(
    backbone: TinyBackbone, layer: int, entered: Tensor, hidden: Tensor, layout: TokenLayout, rotary: Rotary
) -> LayerOutput:
    """What a rule sees after a layer (0-based)."""
    last, count = layout.last_index(), layout.visual_counts
    known = {"embeddings": entered, "entered": layout, "layer_input": entered}
    return LayerOutput(layer, backbone.num_layers, hidden, layout, backbone, rotary, last, count, **known)
