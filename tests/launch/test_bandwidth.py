"""Which hosts a preflight names for their network."""

import pytest

from launch import bandwidth
from launch.bandwidth import Expected, slow
from sharding import topology

PROMISED = Expected(profile="p", intra_gbps=100.0, inter_gbps=10.0, all_reduce_gb_s=1.0, all_to_all_gb_s=2.0)


def named(hosts, gbps, promised=None):
    return [line.split(":")[0] for line in slow(hosts, gbps, promised)]


def test_one_slow_host_of_many_is_named():
    assert slow(["a", "b", "c"], [10.0, 9.0, 8.0]) == []
    assert slow(["a", "b", "c", "d", "e"], [10.0, 1.0, 1.0, 10.0, 10.0]) == [
        "rank 2 on c: 1.00 and 1.00 Gbit/s to its neighbours; the median of such links is 10.00 Gbit/s"
    ]
    assert named(list("abcdefghij"), [9, 1, 1, 1, 1, 9, 9, 9, 9, 9]) == ["rank 2 on c", "rank 4 on e"], (
        "they explain d's links"
    )
    assert named(list("abc"), [1.0, 10.0, 10.0]) == [], "which end of one link is at fault is not to be known"


def test_links_are_compared_with_their_own_kind():
    hosts = ["a"] * 3 + ["b"] * 3 + ["c"] * 3 + ["d"] * 3
    gbps = [400.0, 400.0, 10.0] * 4
    assert slow(hosts, gbps) == []
    gbps[2] = gbps[5] = 1.0
    assert named(hosts, gbps) == ["ranks 3-5 on b"]
    gbps[7] = 20.0
    assert slow(hosts, gbps)[0].startswith("rank 7 on c: 20.00 Gbit/s to rank 8 on the same host; the median of")


def test_two_hosts_share_their_links():
    assert named(["a", "b"], [0.01, 0.01]) == ["rank 0 on a", "rank 1 on b"]


def test_all_links_are_held_against_the_profile():
    assert slow(["a", "b"], [3.0, 3.0], PROMISED) == [] == slow(["a", "a"], [30.0, 30.0], PROMISED)
    (first, _) = slow(["a", "b"], [2.0, 2.0], PROMISED)
    assert first.endswith("the median of such links is 2.00 Gbit/s, profile p has 10.00")
    assert named(["a", "a"], [20.0, 90.0], PROMISED) == ["rank 0 on a"]


def test_collectives_are_held_against_the_profile():
    good = {"all_reduce_gb_s": 0.3, "all_to_all_gb_s": 0.6}
    assert bandwidth.disappointing(good, PROMISED) == []
    (line,) = bandwidth.disappointing(good | {"all_to_all_gb_s": 0.1}, PROMISED)
    assert line.startswith("all-to-all: 0.10 GB/s a rank, 5% of the 2.00 of profile p")
    assert bandwidth.disappointing({}, None) == []


def test_what_a_profile_promises():
    """One host: a rank sends (W-1)/W of its bytes over its link, twice for an all-reduce, so bus bandwidth is the
    link's."""
    cluster = topology.parse("h100-80gb:1x8")
    promised = bandwidth.expected(cluster, 1 << 40)  # so large that latency does not count
    link = cluster.intra_bandwidth * cluster.link_efficiency / 1e9
    assert promised.intra_gbps == pytest.approx(8 * link)
    assert promised.all_to_all_gb_s == pytest.approx(link, rel=1e-3)
    assert promised.all_reduce_gb_s == pytest.approx(link * cluster.reduce_efficiency, rel=1e-3)
    assert bandwidth.expected(topology.parse("h100-80gb:2x8"), 1 << 30).all_to_all_gb_s < promised.all_to_all_gb_s
