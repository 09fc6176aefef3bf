"""Lighthouse Attention in plain torch, for any trainer."""

from lighthouse.attention import LighthouseAttention, attend_selected, causal_attention, lighthouse_attention
from lighthouse.config import LighthouseConfig
from lighthouse.selection import Selection, select

__all__ = [
    "LighthouseAttention",
    "LighthouseConfig",
    "Selection",
    "attend_selected",
    "causal_attention",
    "lighthouse_attention",
    "select",
]
