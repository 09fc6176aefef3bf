from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers import packages
from helpers.cases import make, qkv, random_rows, run
from lighthouse import (
    LighthouseAttention,
    LighthouseConfig,
    attend_selected,
    causal_attention,
    flash_packages,
    inner_attention,
    lighthouse_attention,
    select,
)
from lighthouse.inner_attention import (
    BY_NAME,
    LIMITS,
    NAMES,
    PRIORITY,
    SDPA_BACKENDS,
    _tried_in_this_order,
    attend_by,
    check_machine,
    check_settings,
    resolve,
)

PACKAGES = sorted(flash_packages.PACKAGES)
#: Of each precision, the largest relative error of a rounding.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def calls(monkeypatch) -> packages.Calls:
    return packages.install(monkeypatch)


def attention_only(name):
    """``run`` takes a layer with a geometry."""
    return lambda query, key, value, _: BY_NAME[name](query, key, value, enable_gqa=query.shape[1] != key.shape[1])


def test_backends_of_sdpa_are_tried_in_the_order_that_torch_would_set():
    before = torch._C._get_sdp_priority_order()
    with sdpa_kernel(PRIORITY, set_priority=True):
        expected = torch._C._get_sdp_priority_order()
    assert expected != before
    with pytest.raises(KeyError), _tried_in_this_order():
        assert torch._C._get_sdp_priority_order() == expected
        raise KeyError
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize("name", [None, "auto"])
def test_auto_is_the_default_bit_for_bit(name):
    config, seq_len = make(1024, 3, 2, 128)
    inputs = qkv(seq_len, heads=4, groups=2, dtype=torch.bfloat16)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.bfloat16)
    default = run(*inputs, config, grad)
    named = run(*inputs, config, grad, partial(lighthouse_attention, attention=name))
    given = run(*inputs, config, grad, partial(lighthouse_attention, attention=causal_attention))
    for one, other, third in zip(default, named, given, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert LighthouseAttention(config, name).attention is causal_attention


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_gets_and_gives_what_attention_does(name, groups, calls):
    """Rows by position, results with more than two values, gradients into tensors of its own: the adapter's part. The
    stand-in rounds once."""
    inputs = qkv(64, heads=4, groups=groups, batch=2, dtype=torch.bfloat16)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.bfloat16)
    got = run(*inputs, None, grad, attention_only(name))
    want = run(*(x.double() for x in inputs), None, grad.double(), attention_only("auto"))
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2.0**-8 + 1e-4, atol=1e-6)
    assert calls == [(name, (2, 64, 4, 16))]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_packages_operator_is_a_whole_one(name, calls):
    """Its fake has the strides of the real one, its gradient is registered: torch's own checks."""
    for rows in (qkv(32, heads=4, groups=2, dtype=torch.bfloat16), [x.transpose(1, 2) for x in qkv(4, 32)]):
        rows = [x.bfloat16().requires_grad_() for x in rows]
        torch.library.opcheck(flash_packages.OPERATORS[name], tuple(rows))
    # A gradient whose rows are not whole, as that of a sum.
    attend_by(name, *rows).sum().backward()
    assert all(x.grad.any() for x in rows)


@pytest.mark.parametrize("name", PACKAGES)
def test_the_choice_reaches_the_rows_that_lighthouse_selects(name, calls):
    config, seq_len = make(1024, 3, 2, 128, local_window=128)
    inputs = qkv(seq_len, heads=4, groups=2, dtype=torch.bfloat16)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.bfloat16)
    layer = LighthouseAttention(config, name)
    got = run(*inputs, config, grad, lambda *rows: layer(*rows[:3], enable_gqa=True))
    want = run(*(x.double() for x in inputs), config, grad.double())
    rows = (1, config.selected_length(seq_len), 4, 16)
    assert calls == [(name, rows)]
    for ours, exact in zip(got, want, strict=True):
        assert (ours - exact).norm() < 0.02 * exact.norm()
    # Through a selection that is made already, too.
    attend_selected(*inputs, select(*inputs[:2], config), config, attention=name)
    assert calls == [(name, rows)] * 2


def test_it_holds_in_compiled_code(calls):
    config, seq_len = make(256, 2, 2, 128)
    inputs = qkv(seq_len, heads=4, groups=2, dtype=torch.bfloat16)
    grad = random_rows(*inputs[0].shape, seed=9, dtype=torch.bfloat16)
    layer = partial(lighthouse_attention, attention="flash4")
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(*inputs, config, grad, compiled), run(*inputs, config, grad, layer), strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)
    assert len(calls) == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_only_the_chosen_backend_of_sdpa_may_run(name, compiled, monkeypatch):
    """Whatever else is enabled, and in whatever order."""
    enabled = []
    sdp = torch.backends.cuda

    @torch._dynamo.disable
    def record():
        on = {"cudnn": sdp.cudnn_sdp_enabled(), "flash": sdp.flash_sdp_enabled()}
        enabled.append([*(one for one in on if on[one]), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled()])

    def spy(query, key, value, **more):
        record()
        assert more == {"is_causal": True, "enable_gqa": True}
        return query.clone()

    monkeypatch.setattr(inner_attention, "check_machine", lambda *_: None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend = BY_NAME[name]
    if compiled:
        torch.compiler.reset()
        attend = torch.compile(attend, backend="eager")
    attend(*qkv(32, heads=4, groups=2, dtype=torch.bfloat16), enable_gqa=True)
    assert enabled == [[name, False, False]]
    assert sdp.math_sdp_enabled()


def test_autocast_decides_the_precision_as_for_sdpa(calls):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend_by("flash4", *qkv(32, dtype=torch.float32)).dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=r"^attention='flash4': takes bfloat16 and float16, not torch\.float32; .*'auto'$"
    ):
        attend_by("flash4", *qkv(32, dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "message"),
    [
        ("cudnn", torch.float32, 64, "takes bfloat16 and float16, not torch.float32; nearest valid value: 'auto'"),
        ("flash3", torch.float64, 64, "takes bfloat16 and float16, not torch.float64; nearest valid value: 'auto'"),
        ("cudnn", torch.bfloat16, 192, "multiple of 8 columns, at most 128, not 192; nearest valid value: 'flash'"),
        ("flash4", torch.float16, 256, "multiple of 8 columns, at most 128, not 256; nearest valid value: 'flash'"),
        ("flash", torch.float16, 264, "multiple of 8 columns, at most 256, not 264; nearest valid value: 'auto'"),
        ("flash", torch.float16, 20, "multiple of 8 columns, at most 256, not 20; nearest valid value: 'auto'"),
    ],
)
def test_what_kernels_cannot_take_is_refused(name, dtype, head_dim, message):
    with pytest.raises(ValueError) as refusal:
        check_settings(name, dtype, head_dim, "lighthouse.inner_attention")
    assert str(refusal.value).startswith(f"lighthouse.inner_attention={name!r}: ")
    assert str(refusal.value).endswith(message)
    for valid in NAMES:
        check_settings(valid, torch.bfloat16, 128)
    check_settings("auto", dtype, head_dim)


@pytest.mark.parametrize("name", LIMITS)
def test_a_cpu_is_refused(name):
    config, seq_len = make(256, 2, 2, 128)
    inputs = qkv(seq_len, dtype=torch.bfloat16)
    for call in (
        lambda: lighthouse_attention(*inputs, config, attention=name),
        lambda: check_machine(name, torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=f"^attention='{name}': needs a GPU, and this is 'cpu'; .*'auto'$"):
            call()
    check_machine("auto", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("flash3", (10, 0), "capability 9.0 to 9.x, and this is 10.0; nearest valid value: 'flash'"),
        ("flash4", (8, 6), "capability 9.0 to 11.x, and this is 8.6; nearest valid value: 'flash'"),
        ("cudnn", (7, 5), "capability 8.0 to 12.x, and this is 7.5; nearest valid value: 'auto'"),
    ],
)
def test_a_gpu_that_kernels_are_not_made_for_is_refused(name, capability, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(ValueError) as refusal:
        check_machine.__wrapped__(name, torch.device("cuda"))
    assert str(refusal.value).startswith(f"attention={name!r}: runs on GPUs of compute ")
    assert str(refusal.value).endswith(message)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_or_too_old_is_refused(name, monkeypatch):
    module, how = flash_packages.PACKAGES[name]
    monkeypatch.setattr(flash_packages, "load", flash_packages.load.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(packages.sys.modules, module, None)
    start = f"attention={name!r}: {module} ({how}) cannot be imported: "
    for call in (
        lambda: LighthouseAttention(LighthouseConfig(), name),
        lambda: check_machine.__wrapped__(name, torch.device("cuda")),
    ):
        with pytest.raises(ValueError) as refusal:
            call()
        assert str(refusal.value).startswith(f"{start}ModuleNotFoundError: ")
        assert str(refusal.value).endswith("; nearest valid value: 'flash'")
    monkeypatch.setitem(packages.sys.modules, module, packages.ModuleType(module))
    with pytest.raises(ValueError, match="ImportError: it has no "):
        LighthouseAttention(LighthouseConfig(), name)


def test_names_and_what_does_not_go_with_them():
    config = LighthouseConfig()
    with pytest.raises(
        ValueError, match=r"^attention='flash2': must be one of 'auto', 'cudnn', 'flash', 'flash3', 'fl"
    ):
        resolve("flash2", config)
    merged = LighthouseConfig(combine="softmax", local_window=128)
    assert resolve("auto", merged) is resolve(None, merged) is causal_attention
    for name in LIMITS:
        with pytest.raises(
            ValueError, match=f"^attention='{name}': combine='softmax' needs log-sum-exps, .*combine='sum'"
        ):
            resolve(name, merged)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    ("dtype", "groups", "compiled"),
    [
        (torch.bfloat16, 4, False),
        (torch.bfloat16, 2, False),
        (torch.float16, 2, False),
        (torch.bfloat16, 2, True),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_on_a_gpu(name, dtype, groups, compiled):
    """Against float64 on the same inputs. Kernels round the weights before they sum, in the backward the gradients of
    the scores too, and then the result. These errors have any sign: their sum is under two roundings of the whole."""
    if name in PACKAGES:
        try:
            flash_packages.load(name)
        except ImportError as error:
            pytest.skip(str(error))
    inputs = qkv(1000, heads=4, groups=groups, head_dim=128, batch=2, dtype=dtype, device="cuda")
    grad = random_rows(*inputs[0].shape, seed=9, dtype=dtype, device="cuda")
    attend = attention_only(name)
    if compiled:
        torch.compiler.reset()
        attend = torch.compile(attend, fullgraph=True)
    got = run(*inputs, None, grad, attend)

    def exactly(query, key, value, _):
        return packages.attend(*(x.transpose(1, 2) for x in (query, key, value)))[0].transpose(1, 2)

    for ours, exact in zip(got, run(*(x.double() for x in inputs), None, grad.double(), exactly), strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert (ours - exact).norm() <= 2 * HALF[dtype] * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", SDPA_BACKENDS)
def test_the_chosen_backend_is_the_one_that_runs_on_a_gpu(name):
    inputs = qkv(512, head_dim=64, dtype=torch.bfloat16, device="cuda")
    with sdpa_kernel([SDPA_BACKENDS[name]]):
        want = F.scaled_dot_product_attention(*inputs, is_causal=True)
    with sdpa_kernel([SDPBackend.MATH]):  # what is enabled around it does not count
        assert torch.equal(BY_NAME[name](*inputs), want)
    # Nor does it fall back.
    with pytest.raises(ValueError, match="takes bfloat16"):
        BY_NAME[name](*(x.float() for x in inputs))
