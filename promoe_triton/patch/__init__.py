"""Put the ProMoE layer where a model's experts stand, and take it out again: per instance, by data."""

from promoe_triton.patch._swap import patch, stats, unpatch

__all__ = ["patch", "stats", "unpatch"]
