"""The causal attention inside a layer, and which kernels compute it (docs/method.md, section 5)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse import flash_packages
from lighthouse.config import LighthouseConfig

#: Causal attention over [B, H, S, D] and [B, G, S, D]; called with ``enable_gqa=True`` where G < H.
InnerAttention = Callable[..., Tensor]

#: The names of kernels. ``auto``: the first of PRIORITY that can run; ``cudnn`` and ``flash``: torch's, and no other;
#: ``flash3`` and ``flash4``: those of packages (``lighthouse.flash_packages``).
AttentionName = Literal["auto", "cudnn", "flash", "flash3", "flash4"]
NAMES: tuple[AttentionName, ...] = get_args(AttentionName)

#: In which order SDPA's backends are tried on a GPU.
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ORDER: list[int] = [int(backend) for backend in PRIORITY]  # type: ignore[call-overload]

#: The backend of SDPA that a name stands for.
SDPA_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Limits:
    """What the kernels of a name can train on; all of them in bfloat16 and float16."""

    head_dim: int
    """The most columns of a head; their number must be a multiple of 8."""
    oldest: int
    newest: int
    """Compute capabilities of GPUs, the part before the point."""


LIMITS = {
    "cudnn": Limits(head_dim=128, oldest=8, newest=12),
    "flash": Limits(head_dim=256, oldest=8, newest=12),
    "flash3": Limits(head_dim=256, oldest=9, newest=9),
    "flash4": Limits(head_dim=128, oldest=9, newest=11),
}
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_STEP = 8


def causal_attention(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
    """Torch's causal SDPA; on a GPU cuDNN first, then Flash (torch's own default is 1.7× slower on Hopper)."""
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)
    if torch.compiler.is_compiling():  # knows this context, not the other
        with sdpa_kernel(PRIORITY, set_priority=True):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)
    with _tried_in_this_order():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)


@contextmanager
def _tried_in_this_order() -> Iterator[None]:
    """``sdpa_kernel(PRIORITY, set_priority=True)``, which looks every backend up by name four times: this takes the
    host some 40 µs less a layer."""
    before = torch._C._get_sdp_priority_order()
    torch._C._set_sdp_priority_order([*_ORDER, *(number for number in before if number not in _ORDER)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


def attend_by(name: str, query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool = False) -> Tensor:
    """Causal attention by the kernels of one name, never by others.

    Raises:
        ValueError: where they cannot run.
    """
    device, dtype = query.device, query.dtype
    if torch.is_autocast_enabled(device.type):  # as SDPA does itself
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if not torch.compiler.is_compiling():
        check_machine(name, device)
    check_settings(name, dtype, query.shape[-1])
    if name in SDPA_BACKENDS:
        with sdpa_kernel([SDPA_BACKENDS[name]]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=enable_gqa)
    rows: Tensor = flash_packages.OPERATORS[name](query, key, value)[0]
    return rows


#: What each name stands for.
BY_NAME: dict[str, InnerAttention] = {"auto": causal_attention, **{name: partial(attend_by, name) for name in LIMITS}}


def resolve(attention: InnerAttention | str | None, config: LighthouseConfig) -> InnerAttention:
    """The attention that is given, by name or itself, or the default.

    Raises:
        ValueError: for a name that does not exist, or where it could not do what ``combine`` asks for.
    """
    if isinstance(attention, str):
        check_name(attention)
    if config.combine == "softmax" and attention not in (None, "auto", causal_attention):
        raise ValueError(
            f"attention={attention!r}: combine='softmax' needs log-sum-exps, which it does not return; nearest valid "
            "value: None (or combine='sum')"
        )
    return BY_NAME[attention] if isinstance(attention, str) else attention or causal_attention


def check_name(name: str, setting: str = "attention") -> None:
    """Refuse a name that does not exist."""
    if name not in NAMES:
        raise ValueError(f"{setting}={name!r}: must be one of {', '.join(map(repr, NAMES))}")


def check_settings(name: str, dtype: torch.dtype, head_dim: int, setting: str = "attention") -> None:
    """Refuse kernels that cannot train in this precision, or at this width of a head.

    Args:
        name: of the kernels; ``auto`` takes everything.
        setting: what the name is the value of, in messages.

    Raises:
        ValueError: naming the value, the rule and the nearest valid value.
    """
    if name == "auto":
        return
    if dtype not in DTYPES:
        _refuse(name, setting, f"takes bfloat16 and float16, not {dtype}", "auto")
    most = LIMITS[name].head_dim
    if head_dim % HEAD_DIM_STEP or head_dim > most:
        takes_it = head_dim % HEAD_DIM_STEP == 0 and head_dim <= LIMITS["flash"].head_dim
        rule = f"takes heads of a multiple of {HEAD_DIM_STEP} columns, at most {most}, not {head_dim}"
        _refuse(name, setting, rule, "flash" if takes_it else "auto")


@functools.cache
def check_machine(name: str, device: torch.device, setting: str = "attention") -> None:
    """Refuse kernels that are not there, or do not run on this device; arguments and errors as ``check_settings``."""
    if name == "auto":
        return
    if device.type != "cuda":
        _refuse(name, setting, f"needs a GPU, and this is {device.type!r}", "auto")
    limits, (major, minor) = LIMITS[name], torch.cuda.get_device_capability(device)
    if not limits.oldest <= major <= limits.newest:
        flash = LIMITS["flash"]
        rule = f"runs on GPUs of compute capability {limits.oldest}.0 to {limits.newest}.x, and this is {major}.{minor}"
        _refuse(name, setting, rule, "flash" if flash.oldest <= major <= flash.newest else "auto")
    check_package(name, setting)


def check_package(name: str, setting: str = "attention") -> None:
    """Refuse kernels whose package cannot be imported; arguments and errors as ``check_settings``."""
    if name in flash_packages.PACKAGES:
        try:
            flash_packages.load(name)
        except ImportError as error:
            _refuse(name, setting, f"{error}", "flash")


def _refuse(name: str, setting: str, rule: str, nearest: str) -> NoReturn:
    raise ValueError(f"{setting}={name!r}: {rule}; nearest valid value: {nearest!r}")
