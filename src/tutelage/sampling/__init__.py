"""Samplers: token ids in, token ids and log-probs under the sampling policy out."""

from tutelage.sampling.base import RemoteSampler, Sample, Sampler, SamplingParams
from tutelage.sampling.transformers import TransformersSampler

__all__ = ["RemoteSampler", "Sample", "Sampler", "SamplingParams", "TransformersSampler"]
