"""Exact batched generation: continuous batching over KV caches, keyed sampling, self-speculative decoding."""

from wmtp.generation.generate import check_decoder, generate
from wmtp.generation.requests import Completion, DecodingStats, Request, Step
from wmtp.generation.sampling import Sampling
