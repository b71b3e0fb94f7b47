"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) with the scalings for long contexts.

linear    every frequency divided by the factor (Chen et al. 2023, arXiv 2306.15595)
dynamic   plain up to the length that the model was trained for; more is refused where its checkpoint is read,
          since keys and values would depend on the length of the whole text
yarn      fast frequencies stay, slow ones are divided by the factor, and all scores grow a little
          (Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4)
llama3    the same two ends with another way between them, and no growth (Llama 3.1)
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import RotaryPositionalEmbeddings

from wmtp.pretrained.shape import DecoderShape


class RoPE(RotaryPositionalEmbeddings):
    """torchtune's module with the angles of any kind of RoPE.

    Its ``cache`` [max_seq_len, head_dim / 2, 2] holds their cosines and sines in float32, times yarn's growth.
    """

    def __init__(self, shape: DecoderShape, base: float, scaling: dict[str, Any] | None) -> None:
        self.scaling = scaling or {}
        super().__init__(shape.head_dim, shape.max_seq_len, base)

    def rope_init(self) -> None:
        """Computes the cache, on torch's current device."""
        theta = 1.0 / (self.base ** (torch.arange(0, self.dim, 2).float() / self.dim))
        self.register_buffer("theta", self._scaled(theta), persistent=False)
        self.build_rope_cache(self.max_seq_len)
        if self.scaling.get("rope_type") == "yarn":
            growth = self.scaling.get("attention_factor", 0.1 * math.log(max(self.scaling["factor"], 1.0)) + 1.0)
            self.cache *= growth  # of queries and of keys, so the scores grow by its square

    def _scaled(self, theta: Tensor) -> Tensor:
        """Scales plain RoPE's frequencies [head_dim / 2]."""
        kind, factor = self.scaling.get("rope_type"), self.scaling.get("factor", 1.0)
        if kind == "linear":
            return theta / factor
        if kind == "llama3":
            low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
            length, wavelength = self.scaling["original_max_position_embeddings"], 2 * math.pi / theta
            smooth = (length / wavelength - low) / (high - low)
            between = (1 - smooth) * theta / factor + smooth * theta
            slow = torch.where(wavelength > length / low, theta / factor, between)
            return torch.where(wavelength < length / high, theta, slow)
        if kind == "yarn":
            slow = self._ramp(self.scaling.get("beta_fast", 32), self.scaling.get("beta_slow", 1), theta)
            return theta / factor * slow + theta * (1 - slow)
        return theta

    def _ramp(self, beta_fast: float, beta_slow: float, theta: Tensor) -> Tensor:
        """Returns 0 for frequencies of more than beta_fast turns in the trained length, 1 for less than beta_slow."""
        length = self.scaling["original_max_position_embeddings"]

        def place(turns: float) -> float:  # of the frequency that makes so many
            return self.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

        first, last = place(beta_fast), place(beta_slow)
        if self.scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dim - 1)
        index = torch.arange(len(theta), dtype=torch.float32, device=theta.device)
        return ((index - first) / (last - first or 1e-3)).clamp(0, 1)  # it falls where the last comes before the first
