"""What the benchmarks print fits a terminal of 80 columns, whatever the figures are."""

import pytest

from launch.bench import exchange, gpu, load, migrate, programs, shift, testbed
from launch.commands import evaluate

SHIFT_RUN = {
    "latency": {key: {"requests": 120, "mean": 12.34, "p95": 123.45} for key in ("before", "after", "overall")},
    "local_ratio": {"before": 0.6312, "right_after": None, "after": 0.512, "end": 1.0},
    "recovered_s": None,
    "adopted": 3,
    "kept": 12,
    "copies": 1234,
    "bytes": 123_456_789_012,
    "staging_s": 12.3,
    "longest_gap_s": 12.34,
}
SHIFT = {
    "shift_s": 120.0,
    "cut": {"before": -0.1234, "after": 0.2, "overall": 0.1},
    "staging_of_storage": 0.1234,
    **dict.fromkeys(shift._RUNS, SHIFT_RUN),
}
TESTBED = [
    {
        "strategy": strategy,
        "transport": transport,
        "mean": 130.52,
        "predicted": {"mean": 120.5},
        "advised": {"mean": 110.5},
        "p95": 155.01,
        "compute": 10.84,
        "network": 115.71,
        "waiting": 113.97,
        "remote": 0.456,
        "sent_bytes": 116.63e9,
        "least_bytes": 1.2e9,
    }
    for strategy, transport in (("eplb", "pairs"), ("redundance", "fixed"))
]
EXCHANGE = [
    {
        "placement": "spread over all",
        "case": "decode",
        "transport": "point to point",
        "total": 0.1234,
        "compute": 0.0123,
        "network": 0.1111,
        "sent_bytes": 123_456.0,
        "least_bytes": 23_456.0,
        "ratio": 5.26,
    }
]
LOAD = {
    "checkpoint_bytes": 2.63e9,
    "kept_bytes": 1.047e9,
    "peak_bytes": 1.105e9,
    "allowed_bytes": 1.2e9,
    "load_seconds": 121.2,
    "read_seconds": 122.7,
    "speed_ratio": 2.25,
    "drop_ratio": 0.33,
    "drop_seconds": 100.4,
}
MIGRATE = {
    "migrations": 12,
    "copies_moved_share": 0.35,
    "processes": 3,
    "longest_gap_s": 0.1234,
    "longest_gap_migrating_s": 0.2345,
    "p99_gap_s": 0.0123,
    "p99_gap_migrating_s": 0.0234,
    "read_alone_bytes_per_s": 1.2e9,
    "staged_bytes_per_s": 3.1e8,
    "rounds": 12.0,
    "migration_s": 1.23,
    "longest_stall_s": 0.0123,
    "peak_staged_bytes": 1.23e6,
    "staging_bytes": 1.23e6,
    "compilations": 0,
}
PROGRAM = {
    "model": "deepseek-v2-lite",
    "topology": "3x1x1",
    "step": "prefill",
    "launches": 115_510,
    "waits": 12_480,
    "written": 327_175e6,
    "copied": 175_625e6,
    "temporary": 4_331e6,
}
STEP = {"model": "deepseek-v2-lite", "weights": "bfloat16", "step": "prefill", "tokens": 1024, "kernels": "auto"}
GPU = {
    "card": "NVIDIA H100 80GB HBM3",
    "packages": {"jax": "0.12.0.1"},
    "dry_run": False,
    "checks": {"bundled model against the CPU": {"passed": True}, "family deepseek_v2_grouped": {"passed": False}},
    "speed": [
        {**STEP, "seconds": 0.1234, "of_memory_floor": 0.51, "of_matmul_rate": 0.123},
        {**STEP, "failed": "XlaRuntimeError: out of memory"},
    ],
}
EVALUATE = {
    "text": {
        name: {"bytes": 200_000, "bits_per_byte": 1.308, "zlib_bits_per_byte": 1.831} for name in ("code", "prose")
    },
    "routing": {
        "domains": ["code", "prose"],
        "top_quarter_share": [[0.403, 0.326], [0.362, 0.408]],
        "own": 0.405,
        "others": 0.344,
    },
    "sums": {"asked": 866, "right": 866, "exact_match": 1.0},
}


@pytest.mark.parametrize(
    ("show", "figures", "shown"),
    [
        (shift._print, (SHIFT,), ["mean latency before the shift (120 requests)", "12.34 s", "never", "no tokens"]),
        (testbed._print, (TESTBED, "29 requests for each plan, links of 500Mbps"), ["eplb", "redundance", "116.63 GB"]),
        (exchange._print, (EXCHANGE, "500Mbps"), ["spread over all", "123.4 ms", "123.5 kB"]),
        (load._print, (LOAD,), ["1105 MB", "121.20 s"]),
        (migrate._print, (MIGRATE,), ["longest gap between two tokens", "234.5 ms", "310 MB/s"]),
        (programs._print, ([PROGRAM],), ["115,510", "327,175"]),
        (gpu._print, (GPU,), ["FAILED", "123.40", "51%", "failed"]),
        (evaluate._print, (EVALUATE,), ["1.308", "40.3 %", "866 of 866 right (100.0 %)"]),
    ],
)
def test_tables_fit_eighty_columns(show, figures, shown, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    show(*figures)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(text in printed for text in shown)
