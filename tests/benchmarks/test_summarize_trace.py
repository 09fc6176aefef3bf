import gzip
import json

import pytest
from summarize_trace import main, read_trace, report, summarize


def kernel(name, start, length, group=None, collective=None, cat="kernel"):
    args = {"Process Group Description": group, "Collective name": collective} if group else {}
    return {"cat": cat, "name": name, "ts": start, "dur": length, "args": args}


EVENTS = [
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
    kernel("nvjet_tst_256x128", 100, 40),
    kernel("_pool_kernel", 150, 10),
    kernel("triton_poi_fused_add", 150, 10),  # on another stream
    kernel("Memset (Device)", 160, 5, cat="gpu_memset"),
    kernel("ncclDevKernel_AllGather", 120, 30, "mesh_cp", "all_gather"),  # 20 behind the product, 10 exposed
    kernel("ncclDevKernel_SendRecv", 145, 15, "mesh_cp", "all_to_allv"),  # the last 10 behind the kernels
    kernel("ncclDevKernel_ReduceScatter", 180, 20, "mesh_fsdp", "reduce_scatter"),
]


def test_every_microsecond_is_accounted_for():
    summary = summarize(EVENTS)
    assert summary.total == 100
    assert summary.compute == {
        "matrix products": 40, "Lighthouse kernels": 10, "compiled elementwise": 10, "copies and fills": 5
    }  # fmt: skip
    assert summary.communication == {
        "mesh_cp all_gather": 30,
        "mesh_cp all_to_allv": 15,
        "mesh_fsdp reduce_scatter": 20,
    }
    assert summary.exposed == {"mesh_cp all_gather": 10, "mesh_cp all_to_allv": 5, "mesh_fsdp reduce_scatter": 20}
    assert summary.idle == 15  # from 165 to 180
    lines = report(summary).splitlines()
    assert "| step | 0.1 | 100.0% |" in lines and "| idle | 0.0 | 15.0% |" in lines


def test_leaves_out_what_the_device_still_does_of_the_step_before():
    before = [kernel("nvjet_tst_256x128", 0, 90), kernel("ncclDevKernel_AllGather", 80, 15, "mesh_fsdp", "all_gather")]
    steps = [
        kernel(f"ProfilerStep#{step}", start, length, cat="gpu_user_annotation")
        for step, start, length in ((6, 0, 100), (7, 100, 100))
    ]
    assert summarize(steps[::-1] + before + EVENTS) == summarize(EVENTS)


def test_reads_both_forms_of_a_trace_and_refuses_one_without_a_gpu(tmp_path, monkeypatch):
    text = json.dumps({"traceEvents": EVENTS})
    plain, packed = tmp_path / "trace.json", tmp_path / "trace.json.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_trace(plain) == read_trace(packed) == EVENTS
    plain.write_text(json.dumps({"traceEvents": EVENTS[:1]}))
    monkeypatch.setattr("sys.argv", ["summarize_trace", str(plain)])
    with pytest.raises(SystemExit, match="holds no work of a GPU"):
        main()
