"""BLIP's image-text model (Li et al. 2022, arXiv:2201.12086) in the shape of a CLIPModel, so that every objective and task takes it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sd_erase.hub import folder_of, loading, weight_files
from sd_erase.weights import build, stored
from sd_erase.weights import load as load_strictly

TEMPERATURE = 0.07  # that BLIP's contrastive loss starts from; transformers' checkpoints do not hold the trained one


class BlipText(torch.nn.Module):
    """The text encoder without cross-attention; its pooled state is the first token's."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = False) -> Any:
        """As a CLIPTextModel's; what stands behind the first end-of-text token [batch, positions] is not seen."""
        ends = (input_ids == self.config.sep_token_id).long()
        seen = (ends.cumsum(1) - ends) == 0
        output = self.encoder(input_ids=input_ids, attention_mask=seen.long(), output_hidden_states=output_hidden_states)
        states = output.last_hidden_state
        return BaseModelOutputWithPooling(states, pooler_output=states[:, 0], hidden_states=output.hidden_states)


class BlipVision(torch.nn.Module):
    """The vision encoder; its pooled state is the class token's behind one norm, as BLIP's contrastive loss takes it."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(self, pixel_values: torch.Tensor) -> Any:
        states = self.encoder(pixel_values=pixel_values).last_hidden_state
        return BaseModelOutputWithPooling(states, pooler_output=states[:, 0])


class BlipAsClip(torch.nn.Module):
    """The two encoders and projections of a BlipForImageTextRetrieval under a CLIPModel's names; the matching head is left out."""

    def __init__(self, model: Any):
        super().__init__()
        self.config = model.config
        self.text_model, self.vision_model = BlipText(model.text_encoder), BlipVision(model.vision_model)
        self.text_projection, self.visual_projection = model.text_proj, model.vision_proj
        self.logit_scale = torch.nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))


def load(source: str) -> tuple[BlipAsClip, Any, Any]:
    """The model in float32, its tokenizer and its image processor, of a folder or hub id.

    Raises:
        UserError: a file cannot be read, or the tensors do not fit the configuration.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, BlipConfig, BlipForImageTextRetrieval

    folder = folder_of(source)
    with loading(source):
        model = build(lambda: BlipForImageTextRetrieval(BlipConfig.from_pretrained(folder)))
        # without the word, transformers asks on the terminal whether to run the code that a folder brings
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    found = stored(weight_files(source, "", "model", f"BLIP {source}"))
    load_strictly(model, found, torch.float32, "BLIP", source, finite=True)
    if tokenizer.eos_token_id is None:  # BERT's tokenizer ends a text with its separator
        tokenizer.eos_token = tokenizer.sep_token
    return BlipAsClip(model), tokenizer, processor
