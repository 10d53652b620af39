# SPDX-License-Identifier: Apache-2.0
"""Every op and layer through pytest-benchmark: ``pytest bench --benchmark-only --benchmark-group-by=group``."""

from bench._interleave import Result, percentiles


def test_implementation(benchmark, request, result: Result) -> None:
    timer = request.node.get_closest_marker("benchmark").kwargs["timer"]
    timer.load(result.seconds)
    for name, samples in (("seconds", result.seconds), ("ratio_to_floor", result.ratios)):
        benchmark.extra_info[f"{name}_p50_p20_p80"] = percentiles(samples) if samples else None
    benchmark.extra_info["variant"] = result.detail
    benchmark.extra_info["error_against_float64"] = result.error
    benchmark.extra_info["saved_bytes"] = result.saved
    benchmark.extra_info["peak_bytes"] = result.peak
    benchmark.pedantic(lambda: None, rounds=max(len(result.seconds), 1))
