"""The environment of a rank."""

from trainer import process


def test_what_the_user_has_set_stays():
    found = process.environment(threads=3, given={"OMP_WAIT_POLICY": "ACTIVE"})
    assert found["OMP_WAIT_POLICY"] == "ACTIVE" and found["OMP_NUM_THREADS"] == "3"
    assert set(found) == {*process.DEFAULTS, "OMP_NUM_THREADS"} - {"GOMP_SPINCOUNT"}, (
        "a count would overrule the policy"
    )
    assert process.environment(threads=3, given={}) == process.DEFAULTS | {"OMP_NUM_THREADS": "3"}
