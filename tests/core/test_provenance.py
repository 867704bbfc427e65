import json

from slimserve.core.hardware import probe_hardware
from slimserve.core.provenance import bench_line, versions


def test_a_bench_line_is_one_json_object_with_spread_and_origin() -> None:
    line = bench_line("launch", {"prefill_ratio": [2.0, 1.0, 4.0]})
    document = json.loads(line)
    assert "\n" not in line
    assert document["bench"] == "launch"
    assert document["metrics"] == {"prefill_ratio": {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}}
    assert document["hardware"]["cores"] == list(probe_hardware().cores)
    assert document["versions"] == versions()
    assert document["commit"]


def test_the_hardware_has_cpu_memory_and_sorted_cores() -> None:
    hardware = probe_hardware()
    assert hardware.cpu
    assert hardware.memory_gib > 1
    assert list(hardware.cores) == sorted(hardware.cores)
