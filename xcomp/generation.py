"""Words from a prompt that has been run: transformers' own generation loop over a decoder's state.

Greedy search, sampling, beam search, stopping criteria, logits processors and streamers are those of
``transformers.GenerationMixin``; here is only what that loop needs of a model. The decoder
(:class:`xcomp.decoder.Decoder`) and its state are handed in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast


class _GenerationAdapter(PreTrainedModel, GenerationMixin):
    """A decoder and a state, in the form of a model that generates. It has no weights of its own."""

    _is_stateful = False  # beams may be reordered

    def __init__(self, decoder: Any, state: Any):
        super().__init__(PreTrainedConfig())
        self.decoder, self.state = decoder, state

    @property
    def device(self) -> torch.device:
        return self.decoder.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.backbone.dtype

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        """The first call, with nothing written yet, has the prompt's logits."""
        logits = self.decoder.decode(self.state, input_ids[:, -1]) if input_ids.shape[1] else self.state.logits
        return CausalLMOutputWithPast(logits=logits.unsqueeze(1), past_key_values=self.state.cache)


def generate(decoder: Any, state: Any, **options: Any) -> list[list[int]]:
    """Token ids that follow a state, for each of its samples, the stop token left out.

    ``options`` are those of ``GenerationConfig`` (``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``,
    ``num_beams``, ``repetition_penalty`` …) and of ``generate`` (``streamer``, ``stopping_criteria``,
    ``logits_processor``). What a processor sees as the text so far are the generated tokens alone, as in
    VideoChat-Flash, so a repetition penalty does not count the prompt. With ``num_return_sequences`` n, each sample has
    n answers in a row.

    The state grows with the answers; with several beams or sequences a copy does and the state stays as it is.
    """
    stop = decoder.backbone.stop_ids
    copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
    state = state if copies == 1 else state.repeat(copies)
    # Embeddings in place of a prompt: their content is never read, and the text so far starts empty.
    nothing = torch.zeros(len(state.logits) // copies, 1, 1, device=decoder.backbone.device)
    given = {"inputs_embeds": nothing, "attention_mask": nothing[:, :, 0] + 1, "past_key_values": state.cache}
    ends = {"eos_token_id": list(stop) or None, "pad_token_id": stop[0] if stop else 0}
    settings = {"do_sample": False} | ends | options
    penalty = settings.pop("repetition_penalty", None) or 1.0
    if penalty != 1.0:  # as a processor of ours: told of a penalty beside embeddings, transformers warns
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)])
        settings["logits_processor"] = processors + (settings.get("logits_processor") or [])
    written = _GenerationAdapter(decoder, state).generate(**given, **settings)
    return [_up_to(ids, stop) for ids in written.tolist()]


def _up_to(ids: list[int], stop: tuple[int, ...]) -> list[int]:
    """``ids`` before the first that stops; what follows in a batch is padding."""
    return next((ids[:i] for i, token in enumerate(ids) if token in stop), ids)
