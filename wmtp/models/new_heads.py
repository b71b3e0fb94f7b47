"""How extra heads start that a checkpoint lacks.

    copies          as its last block, head 1: the new head predicts what head 1 does, the next token
    zero_residual   as the last block too, but what attention and MLP add to the states is zero: the block is the
                    identity, and the new head reads the trunk's state as it is

Where nothing norms what attention and MLP give, their output projections start at zero. Where a norm does (Gemma 3,
OLMo 2), its scale starts at zero instead: a norm of zeros multiplies their gradient by 1 / sqrt(eps), and one step
would carry the block from nothing to the norm's full length. Either way the gradient of what is zero is not.
"""

import re
from typing import Any

from wmtp.errors import UserError
from wmtp.pretrained.shape import DecoderShape

HEAD_INITS = ("copies", "zero_residual")


def start_value(name: str, model: Any) -> float | None:
    """Returns the number that a parameter of an extra head starts with, all over; None where it starts otherwise."""
    inside = re.fullmatch(r"extra_heads\.\d+\.(.+)", name)
    if inside is None or model.head_init != "zero_residual":
        return None
    return _zeros(model.config).get(inside[1])


def _zeros(shape: DecoderShape) -> dict[str, float]:
    """Returns the parameters in a block that make it the identity, and the value of each that does."""
    if shape.norms == "pre":
        return dict.fromkeys(("attn.output_proj.weight", "mlp.w2.weight"), 0.0)
    return dict.fromkeys(("sa_post_norm.scale", "mlp_post_norm.scale"), -1.0 if shape.norm_offset else 0.0)


def check_new_heads(model: Any) -> None:
    """Refuses new heads that start at zero residual and that the model's adapters, if any, could not train.

    Raises:
        UserError: the frozen zeros would stop every gradient.
    """
    adapters = getattr(model, "adapters", None)
    if model.head_init != "zero_residual" or adapters is None or adapters.heads != "lora":
        return
    if model.config.norms != "pre":
        if not adapters.train_norms:
            raise UserError(
                f"head_init zero_residual starts the norms of {model.config.family} behind attention and MLP at zero, "
                "and adapters.train_norms is false: the heads would stay there; set it to true, or head_init=copies"
            )
    elif not {"output_proj", "w2"} <= set(adapters.targets):
        raise UserError(
            "head_init zero_residual starts output_proj and w2 at zero, and adapters.targets has not both: the heads "
            "would stay there; add them, or set head_init=copies"
        )
    elif adapters.dora:
        raise UserError(
            "head_init zero_residual starts output_proj and w2 at zero, whose direction adapters.dora cannot scale; "
            "set dora=false, heads=full, or head_init=copies"
        )
