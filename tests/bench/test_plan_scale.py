"""The plan on paper against sums made by hand."""

from collections.abc import Callable

import pytest

from bench.plan_scale import Cluster, Corpus, Outcome, disk_bytes, exponential, gpu_hours, simulate
from pipeline.backbone.sizes import ModelSizes
from pipeline.optim.gpus import Gpu

# 168 weights a layer, 376 in all; queries 6 wide.
SIZES = ModelSizes(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=3, vocabulary=10, tied=True)


def cluster(nodes: int = 2, shard_rows: int = 10, restart: float = 5.0, writer: float = 1e9) -> Cluster:
    """Of a row a second a node."""
    return Cluster(nodes, 1.0, shard_rows, restart, writer)


def lifetimes(*drawn: float) -> Callable[[], float]:
    """These, then none ends."""
    left = list(drawn)
    return lambda: left.pop(0) if left else float("inf")


def outcome(rows: int, cluster: Cluster, *drawn: float) -> Outcome:
    found = simulate(rows, cluster, lifetimes(*drawn))
    return Outcome(round(found.seconds, 6), found.failures, found.recomputed_rows)


def test_nodes_share_the_rows_and_the_last_shard_may_be_small() -> None:
    assert outcome(40, cluster()) == Outcome(20.0, 0, 0)
    assert outcome(23, cluster()) == Outcome(13.0, 0, 0)
    assert outcome(7, cluster(nodes=3)) == Outcome(7.0, 0, 0)


def test_a_node_that_fails_loses_its_shard_and_another_takes_it() -> None:
    # The first node has delivered one shard and worked 5 s on its second; both nodes are free at 20 s.
    assert outcome(40, cluster(), 15.0) == Outcome(30.0, 1, 5)
    # With 30 s until it is back the other node alone does the last shard.
    assert outcome(40, cluster(restart=30.0), 15.0) == Outcome(30.0, 1, 5)
    # Shards half as large: the last two are begun at 15 s, and the lost one again at 20 s.
    assert outcome(40, cluster(shard_rows=5), 17.0) == Outcome(25.0, 1, 2)
    # It fails again 3 s after it is back at 20 s.
    assert outcome(20, cluster(nodes=1), 15.0, 3.0) == Outcome(38.0, 2, 5 + 3)


def test_a_node_that_fails_while_it_waits_loses_nothing() -> None:
    # The second node is free from 2 s on and fails at 4 s; the first fails at 8 s, and the second is back at 9 s.
    assert outcome(12, cluster(), 8.0, 4.0) == Outcome(19.0, 1, 8)


def test_one_writer_bounds_many_nodes() -> None:
    # Four shards arrive at 10 s, each takes 20 s to commit.
    assert outcome(40, cluster(nodes=4, writer=0.5)) == Outcome(90.0, 0, 0)


@pytest.mark.parametrize("hours_a_shard", [0.24, 2.4])
def test_random_failures_cost_what_the_exponential_law_says(hours_a_shard: float) -> None:
    """Of attempts of T seconds at a rate of r failures a second, (exp(rT) - 1) / r - T seconds a shard are lost."""
    seconds, rate = hours_a_shard * 3600, 1 / 86400
    shards = 40_000
    work = Cluster(10, 1.0, round(seconds), 60.0, 1e9)
    found = simulate(shards * work.shard_rows, work, exponential(1.0, seed=0))
    expected = shards * ((2.718281828459045 ** (rate * seconds) - 1) / rate - seconds)
    assert found.recomputed_rows == pytest.approx(expected, rel=0.15)
    assert simulate(1000, cluster(), exponential(0.0, seed=0)).failures == 0


def test_hours_by_hand() -> None:
    # 40 % of its operations are 3,600 a second.
    gpu = Gpu("slow", flops=9000, bandwidth=500, memory=1e9, source="made up")
    hours = gpu_hours(SIZES, gpu, Corpus(rows=5, prompt=4, answer=2))
    assert hours["embed"] == pytest.approx(5 * 2 * 2 * (336 + 24 * 2) / 3600**2)
    assert hours["start"] == pytest.approx(5 * 14 * 2 * (336 + 24 * 14) / 3600**2)
    assert gpu_hours(SIZES, Gpu("tiny", 1.0, 1.0, 800, "made up"), Corpus(5, 4, 2))["generate"] is None


def test_bytes_of_targets_are_two_and_four_a_number() -> None:
    small, large = (disk_bytes(width, Corpus(rows=10, prompt=4, answer=2)) for width in (100, 200))
    assert large["targets"] - small["targets"] == 10 * 2 * 100
    assert large["work/embed"] - small["work/embed"] == 10 * 4 * 100
    assert large["work/generate"] == large["responses"]
