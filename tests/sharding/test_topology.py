"""Quantities, profiles, clusters by name, and what TOML may say."""

import pytest

from kernels.errors import UserError
from sharding import topology
from sharding.topology import QUANTITIES, detect, load_profiles, parse, profiles, quantity


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("80GiB", "bytes", 80 * 2**30),
        ("1_000 kB", "bytes", 1e6),
        ("3.35TB/s", "bytes/s", 3.35e12),
        ("400Gb/s", "bytes/s", 50e9),
        ("494.7TFLOP/s", "FLOP/s", 494.7e12),
        ("5us", "s", 5e-6),
        ("20ns", "s", 2e-8),
        ("70%", "share", 0.7),
    ],
)
def test_quantities(text, kind, value):
    assert quantity(text, kind, where="x") == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (80, "bytes", ["k = 80", "without a unit", "'80GiB'"]),
        ("80", "bytes", ["without a unit"]),
        ("80GHz", "bytes", ["'GHz' is not a unit of bytes"]),
        ("80GB", "bytes/s", ["'GB' is not a unit of bytes/s", "GB/s"]),
        ("0GiB", "bytes", ["above zero"]),
        ("-1GiB", "bytes", ["above zero"]),
        ("1e400GB", "bytes", ["finite"]),
        ("nanGB", "bytes", ["a number with its unit"]),
        ("lots", "s", ["a number with its unit", "'5us'"]),
        (True, "bytes", ["a number with its unit"]),
    ],
)
def test_bad_quantities(text, kind, words):
    with pytest.raises(UserError) as error:
        quantity(text, kind, where="k")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_number_of_every_profile_is_there_and_has_a_source():
    assert {"a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l4", "cpu"} <= set(profiles())
    for profile in profiles().values():
        for key in QUANTITIES:
            assert getattr(profile, key) >= 0
        missing = {k for k in QUANTITIES if getattr(profile, k) > 0} - set(profile.sources)
        assert not missing, f"{profile.name}: no source for {missing}"


def test_clusters():
    assert parse("h100-80gb:16x8").world_size == 128 and parse("h100-80gb:16x8").title == "h100-80gb:16x8"
    assert (parse("l4").hosts, parse("l4:3").world_size) == (1, 24)
    cpu = parse("cpu:1x4")
    assert cpu.device_memory == cpu.host_memory / 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100:2x8", ["no profile 'h100'", "h100-80gb"]),
        ("h100-80gb:2y8", ["'2y8'", "h100-80gb:16x8"]),
        ("h100-80gb:0x8", ["0 hosts"]),
    ],
)
def test_unknown_clusters(text, words):
    with pytest.raises(UserError) as error:
        parse(text)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_profiles_from_toml(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(
        '[profiles.ours]\nlike = "h100-80gb"\ndevice_memory = "70GiB"\nranks_per_host = 4\n'
        '[profiles.twice]\nlike = "ours"\ninter_bandwidth = "800Gb/s"\noverlap = false\n'
    )
    found = load_profiles(path)
    twice = parse("twice:2", found)
    assert twice.device_memory == 70 * 2**30 and twice.inter_bandwidth == 100e9
    assert twice.world_size == 8 and not twice.overlap
    assert twice.matrix_bf16 == profiles()["h100-80gb"].matrix_bf16
    assert str(path) in twice.sources["device_memory"]
    assert "inter_latency" in twice.estimates and "matrix_bf16" not in twice.estimates  # a data sheet's
    path.write_text('[profiles.known]\nlike = "h100-80gb"\ninter_latency = "12us"\n')
    (known,) = load_profiles(path).values()
    assert set(profiles()["h100-80gb"].estimates) - set(known.estimates) == {"inter_latency"}
    path.write_text('[profiles.cpu]\nlike = "cpu"\nmemory_bandwidth = "40GB/s"\n')
    own = parse("cpu:1x2", load_profiles(path))
    assert parse("cpu:1x2").guessed and not own.guessed and not profiles()["h100-80gb"].guessed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[profiles.a]\nlike = "h100-80gb"\nlink_efficiency = "120%"', ["link_efficiency = '120%'", "at most 100%"]),
        ('[profiles.a]\nlike = "h100-80gb"\ndevice_memory = 80', ["profiles.a.device_memory = 80", "without a unit"]),
        ('[profiles.a]\nlike = "h100-80gb"\nmemory = "80GB"', ["profiles.a.memory: unknown key", "host_memory"]),
        ('[profiles.a]\nlike = "v100"', ["profiles.a.like = 'v100'", "h100-80gb"]),
        ("[profiles.a]", ["profiles.a.like = None"]),
        ('[profiles.a]\nlike = "l4"\nranks_per_host = 0', ["ranks_per_host = 0"]),
        ('[profiles.a]\nlike = "l4"\noverlap = 1', ["overlap = 1", "true or false"]),
        ("[other]\nx = 1", ["[profiles.NAME]", "other"]),
        ("[[[", ["not valid TOML"]),
    ],
)
def test_bad_profiles(tmp_path, text, words):
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_profiles(path)
    assert all(word in str(error.value) for word in (*words, str(path))), str(error.value)


def test_this_machine():
    here = detect(world_size=4, local_world_size=2, device="cpu")
    assert (here.hosts, here.ranks_per_host, here.device) == (2, 2, "cpu")
    assert here.device_memory == topology.host_memory_bytes() / 2


@pytest.mark.parametrize(
    ("name", "gib", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", 79, "h100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 79, "a100-80gb"),
        ("NVIDIA L4", 22, "l4"),
        ("Some GPU", 139, "h200"),
    ],
)
def test_a_gpu_gets_the_profile_its_name_fits(name, gib, profile):
    assert topology._by_name(name, gib * 2**30, profiles()).name == profile
