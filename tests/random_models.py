"""Tiny decoders whose every parameter is random: norms too, and wide enough to tell mistakes apart."""

import torch

from wmtp.models import MTPDecoder, llama_mtp


def random_decoder(**sizes) -> MTPDecoder:
    torch.manual_seed(0)
    model = llama_mtp(**sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.scale") else 0.0, 0.2)
    return model
