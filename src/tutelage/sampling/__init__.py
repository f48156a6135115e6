"""Samplers: token ids in, token ids and log-probs under the sampling policy out."""

from tutelage.sampling.base import Sample, Sampler, SamplingParams
from tutelage.sampling.transformers import TransformersSampler

__all__ = ["Sample", "Sampler", "SamplingParams", "TransformersSampler"]
