"""Run HuggingFace Mixture-of-Experts models whose experts do not fit in fast memory.

model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
promoe_triton.patch(model, slots="12GiB")
model.generate(...)
"""

from promoe_triton._version import __version__
from promoe_triton.config import Config
from promoe_triton.counters import Stats
from promoe_triton.errors import PromoeError
from promoe_triton.loading import from_pretrained
from promoe_triton.patch._swap import patch, record_timeline, save_profile, stats, unpatch
from promoe_triton.timeline import Timeline

__all__ = [
    "Config",
    "PromoeError",
    "Stats",
    "Timeline",
    "__version__",
    "from_pretrained",
    "patch",
    "record_timeline",
    "save_profile",
    "stats",
    "unpatch",
]
