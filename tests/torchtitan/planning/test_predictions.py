"""Memory and speed as predicted, beside runs that were measured and beside what the compiler says."""

from dataclasses import replace

import pytest
import torch
from compare_plan import read_runs
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.experiments.lighthouse.errors import Refused
from torchtitan.experiments.lighthouse.planning import measure, memory, rates, step, tables
from torchtitan.experiments.lighthouse.planning.workload import (
    CHECKPOINTING,
    MEMORY_BUDGET,
    count_parameters,
    workload,
)
from torchtitan.experiments.lighthouse.runs.settings import build_model, model_arguments
from torchtitan.models.llama3.infra.parallelize import _op_sac_save_list

from helpers.settings import REPOSITORY, parse
from lighthouse.backend import load_kernels

REPORTS = REPOSITORY / "benchmarks/reports"
ONE_STEP_AT_ONCE = "--training.global_batch_size=-1"
WINDOW = "--lighthouse.local_window=512"
BUDGET = "memory_budget"
SOFTMAX = ("--lighthouse.selection=causal", "--lighthouse.local_window=128", "--lighthouse.combine=softmax")


def test_predictions_against_measured_runs():
    """The aim of the plan: memory within 10 %, tokens/s within 15 %, of runs that no constant was fitted to, too."""
    runs = [run for day in ("26", "27") for run in read_runs(REPORTS / f"2026-11-{day}-plan/runs.csv")]
    assert len([run for run in runs if run.part == "held out" and run.memory_gib]) >= 8
    # One is 11 % off: what the allocator holds beyond what is in use.
    assert {run.name for run in runs if abs(run.memory_error() or 0.0) > 0.10} == {"98k dense, selective, on an H100"}
    assert max(abs(run.memory_error() or 0.0) for run in runs) < 0.12
    assert {run.name: error for run in runs if abs(error := run.speed_error()) > 0.15} == {}


def test_predictions_against_measured_layers():
    """One layer on an H100, as a CUDA graph (benchmarks/reports/2026-11-27-plan.md). In a step it is slower, by what
    elementwise kernels leave in the caches, too: up to 20 %."""
    h100 = rates.read_rates("h100", None)
    work = workload(parse("530m_stage1.toml", "--activation_checkpoint.mode=none", *SOFTMAX, WINDOW), 1)
    geometry = {
        "softmax": work.geometry,
        "sum": replace(work.geometry, combine="sum"),
        "no window": replace(work.geometry, combine="sum", local_window=0),
    }
    predicted = {name: 1e3 * step._lighthouse(replace(work, geometry=one), h100) for name, one in geometry.items()}
    measured = {"softmax": 9.86, "sum": 9.82, "no window": 5.43}
    for name, milliseconds in measured.items():
        assert 1 <= predicted[name] / milliseconds <= 1.2, name
    assert predicted["softmax"] / predicted["sum"] == pytest.approx(9.86 / 9.82, abs=0.03)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("none", ("--llama.n_layers=2", "--lighthouse.layers=1")),
        (BUDGET, ("--llama.n_layers=2", "--lighthouse.layers=1")),
        *((mode, ("--llama.n_layers=1", "--lighthouse.layers=0", *SOFTMAX)) for mode in ("none", BUDGET, "selective")),
    ],
)
def test_a_layer_keeps_what_the_compiler_keeps(mode, words):
    """Torch's own partitioner of compiled code, with grouped heads, on a dense layer and one through Lighthouse, or on
    one with a softmax of levels and window, whose operators are on a CPU those of a GPU."""
    seq_len = 768
    small = (
        *("--llama.dim=128", "--llama.n_heads=2", "--llama.n_kv_heads=1", "--llama.ffn_dim=192"),
        *("--llama.vocab_size=320", f"--training.seq_len={seq_len}", f"--activation_checkpoint.mode={mode}"),
        f"--activation_checkpoint.memory_budget={MEMORY_BUDGET}",
        *("--lighthouse.num_levels=2", "--lighthouse.pooling_factor=2", "--lighthouse.top_k=128"),
        *(ONE_STEP_AT_ONCE, *words),
    )
    settings = parse("530m_stage1.toml", *small, "--lighthouse.backend=triton")
    work = workload(settings, 1)
    model = build_model(settings, "cpu").bfloat16()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    if mode in ("selective", "full"):
        worth_saving = {*_op_sac_save_list, *load_kernels().WORTH_SAVING}
        apply_ac(model, settings.activation_checkpoint, model_compile_enabled=True, op_sac_save_list=worth_saving)
    angles = torch.ones(seq_len, 32, dtype=torch.complex64)

    def layers(hidden):
        for layer in model.layers.values():
            hidden = layer(hidden, angles, attention_masks=None)
        return hidden

    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(1, seq_len, work.dim, dtype=torch.bfloat16, requires_grad=True)
    budget = MEMORY_BUDGET if mode == BUDGET else 1.0
    torch.compiler.reset()  # code that was compiled with another budget is not compiled again
    with (
        torch._functorch.config.patch(activation_memory_budget=budget),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        torch.compile(layers, backend="aot_eager_decomp_partition", fullgraph=True)(1.0 * hidden)
    for constant in (*model.parameters(), angles):
        kept.pop(constant.untyped_storage()._cdata, None)
    dense, through = work.n_layers - work.lighthouse_layers, work.lighthouse_layers
    predicted = dense * memory._kept(work, through=False) + through * memory._kept(work, through=True)
    # Beside rows there are small things, which are not counted: a number for each row and norm, and the selection.
    assert predicted <= sum(kept.values()) <= 1.02 * predicted


def test_operations_and_parameters_are_the_models():
    """As the trainer counts them for MFU; it counts all pairs of a causal attention, also those above the diagonal."""
    settings = parse("530m_stage1.toml", ONE_STEP_AT_ONCE, "--lighthouse.local_window=512", "--llama.n_kv_heads=2")
    work, args = workload(settings, 1), model_arguments(settings)
    parameters, operations = args.get_nparams_and_flops(build_model(settings), work.seq_len)
    assert work.parameters == parameters
    assert work.parameters == count_parameters(work.dim, work.kv_dim, work.ffn_dim, work.vocab_size, work.n_layers)
    pairs = 4 * work.seq_len + 26 * (work.rows**2 / work.seq_len + work.window)
    counted = step.product_operations(work) + 6 * work.vocab_size * work.dim
    counted += 3 * 2 * step.attention_operations(work.dim, 1, pairs)
    assert counted == pytest.approx(operations - 6 * args.n_layers * 2 * work.dim - 6 * work.dim, rel=1e-6)


def test_more_work_takes_longer_and_more_memory():
    h200 = rates.read_rates("NVIDIA H200", None)
    work = workload(parse("530m_cp.toml", "--lighthouse.top_k=2048"), 8)
    now = step.predict(work, h200)
    for more in ({"ffn_dim": 2048}, {"n_layers": 32}, {"seq_len": 131072}):
        then = step.predict(replace(work, **more), h200)
        assert then.memory_gib > now.memory_gib and then.tokens_per_second < now.tokens_per_second
    order = [replace(work, checkpointing=mode) for mode in CHECKPOINTING]
    assert sorted(order, key=memory.peak_gib, reverse=True) == order
    assert sorted(order, key=lambda one: step.predict(one, h200).seconds) == order
    none, _, _, full = (step.gpu_seconds(one, h200)["products"] for one in order)
    again = 1 - work.dim * work.ffn_dim / work.layer_products
    assert full / none == pytest.approx(1 + again / 3), "every forward product again, but the layer's last"
    # Half of the sequences of a step on each GPU: twice the speed of all, and not a bit more.
    assert step.predict(replace(work, gpus=16), h200).tokens_per_second <= now.tokens_per_second
    # A slow host sets the pace, and then attention costs nothing.
    slow = replace(h200, launch=1.0)
    assert step.predict(work, slow).seconds == step.predict(work, slow).host > now.seconds


def test_offloaded_layers_leave_their_inputs_elsewhere():
    """All but two: that of the layer that runs backward, and the one that is on its way."""
    words = ["--training.seq_len=131072", "--lighthouse.top_k=2048", "--activation_checkpoint.mode=full"]
    work = workload(parse("530m_stage1.toml", *words, "--activation_checkpoint.offload_layers=22"), 8)
    row = 131072 * 1024 * 2 / 2**30
    assert memory.host_gib(work) == 22 * row
    for layers, elsewhere in ((0, 0), (22, 22), (28, 28), (29, 28)):
        lower = memory.peak_gib(replace(work, offloaded=0)) - memory.peak_gib(replace(work, offloaded=layers))
        assert lower == pytest.approx(elsewhere * row)


def test_a_softmax_of_levels_and_window():
    """Beside the sum of levels: it keeps neither the window's rows nor those of the selected entries, and reads both to
    merge them. Over several ranks it keeps the keys and values of all, and the window's rows too."""
    h200 = rates.read_rates("h200", None)
    words = (*SOFTMAX, WINDOW, "--lighthouse.top_k=2048", "--activation_checkpoint.mode=none")
    soft = workload(parse("530m_stage1.toml", *words), 8)
    plain = replace(soft, geometry=replace(soft.geometry, combine="sum"))
    less = memory.peak_gib(plain) - memory.peak_gib(soft)
    # The layer that runs backward holds no more than its memory, and the loss comes before it.
    assert less * memory.GIB == pytest.approx(26 * 2 * 1024 * (soft.seq_len + soft.rows))
    both = [[replace(one, checkpointing=mode) for mode in CHECKPOINTING] for one in (soft, plain)]
    by_softmax, by_sum = ([step.gpu_seconds(one, h200)["Lighthouse"] for one in modes] for modes in both)
    assert by_sum[0] < by_softmax[0] < 1.1 * by_sum[0]
    # Selective checkpointing attends to the window again in a softmax only; full does in both.
    assert by_softmax[2] / by_softmax[0] > 1.05 > by_sum[2] / by_sum[0]
    assert (by_softmax[1], by_sum[1]) == (by_softmax[0], by_sum[0]), "a memory budget of 0.9 attends to nothing again"
    # Four ranks: the whole model keeps 3/4 of it elsewhere, but for keys and values.
    four = replace(soft, context_parallel=4)
    assert four.by_flex and not soft.by_flex
    one_layer = memory._kept(four, through=True)
    rows = 2 * 1024 * four.rows_at_once * (2 + 2 * 4)
    assert one_layer == 2 * four.tokens_at_once * (9 * 1024 + 3 * four.ffn_dim) + rows
    assert step.predict(four, h200).tokens_per_second < step.predict(soft, h200).tokens_per_second


def test_a_graph_leaves_nothing_to_the_host():
    h100 = rates.read_rates("h100", None)
    work = workload(parse("32m_32k.toml"), 1)
    eager, graph = step.predict(work, h100), step.predict(replace(work, cuda_graph=True), h100)
    assert graph.host == 0 and eager.host == eager.seconds > sum(eager.parts.values())
    assert graph.seconds == sum(graph.parts.values()) < sum(eager.parts.values())
    # Its own gradients, the sums of those of several batches, and those of the graph of dense steps.
    for changes, times in (({}, 1), ({"sequences_per_step": 2}, 2), ({"dense_every": 8}, 2)):
        one = replace(work, **changes)
        more = memory.peak_gib(replace(one, cuda_graph=True)) - memory.peak_gib(one)
        assert more * memory.GIB == pytest.approx(4 * times * work.parameters)


def test_what_is_not_predicted_is_refused():
    for setting, names in {
        "--lighthouse.scorer=gla": "lighthouse.scorer=gla.*norm",
        "--training.cuda_graph": "training.cuda_graph=true: WORLD_SIZE=8.*nearest valid value: false",
        "--training.global_batch_size=33": "nearest valid value: 32",
        "--lighthouse.top_k=1500": "nearest valid values: 1408 or 1536",
    }.items():
        with pytest.raises(Refused, match=names):
            workload(parse("530m_stage1.toml", setting), 8)


def test_rates_are_measured_and_read_back(tmp_path):
    sizes = measure.Sizes(
        rows=256, columns=64, heads=2, head_dim=32, seq_len=512, window=128, launch_len=2048,
        copied=2**20, exchanged=2**20, seconds=0.01,
    )  # fmt: skip
    found = measure.measure(torch.device("cpu"), sizes)
    # A CPU core makes more than a thousandth of an H200, in nothing, and less than all of it.
    h200 = rates.read_rates("h200", None)
    for name in ("matmul", "attention_forward", "attention_backward", "window_forward", "window_backward", "copy"):
        assert 1e-6 < getattr(found, name) / getattr(h200, name) < 1, name
    assert found.launch > h200.launch and found.memory_gib > 1
    rates.write_rates(found, tmp_path / "cpu.json")
    assert rates.read_rates("h200", tmp_path / "cpu.json") == found
    printed = tables.measured(replace(h200, copy=2e12))
    assert any(line.split() == ["copy", "2,000.00", "3,900.00", "GB/s"] for line in printed), "beside the shipped ones"
    assert any(line.split()[:3] == ["launch", f"{1e3 * found.launch:,.2f}", "ms"] for line in tables.measured(found))
    assert "link" in found.assumed, "one process has nothing to measure it with"
    (tmp_path / "other.json").write_text('{"gpu": "mine"}')
    with pytest.raises(Refused, match=r"other\.json: holds no rates"):
        rates.read_rates(None, tmp_path / "other.json")
    with pytest.raises(Refused, match="--gpu b300: must be one of h200, h100"):
        rates.read_rates("b300", None)
