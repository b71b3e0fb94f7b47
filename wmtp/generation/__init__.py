"""Exact batched generation: continuous batching over KV caches, keyed sampling, self-speculative decoding."""

from wmtp.generation.generate import Completion, DecodingStats, Request, generate
from wmtp.generation.sampling import Sampling
