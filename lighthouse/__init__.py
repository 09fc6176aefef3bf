"""Lighthouse Attention, for any trainer."""

from lighthouse.attention import LighthouseAttention, Rotate, attend_selected, lighthouse_attention
from lighthouse.config import LighthouseConfig
from lighthouse.context_parallel import SequenceShards, ShardedLighthouseAttention, context_parallel_attention
from lighthouse.inner_attention import causal_attention
from lighthouse.selection import Selection, select

__version__ = "0.1.0"

__all__ = [
    "LighthouseAttention",
    "LighthouseConfig",
    "Rotate",
    "Selection",
    "SequenceShards",
    "ShardedLighthouseAttention",
    "attend_selected",
    "causal_attention",
    "context_parallel_attention",
    "lighthouse_attention",
    "select",
]
