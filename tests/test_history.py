"""The checker of histories must see every kind of broken promise, and must not cry wolf."""

from __future__ import annotations

import pytest

from history import Operation, Outcome, violations

A, B = "10.0.0.1", "10.0.0.2"
OK, REFUSED, UNKNOWN = Outcome.OK, Outcome.REFUSED, Outcome.UNKNOWN


def grant(holder: str, began: float, ended: float, address: str = A, outcome: Outcome = OK) -> Operation:
    return Operation("grant", holder, began, ended, outcome, address if outcome is OK else "")


def release(holder: str, began: float, ended: float, outcome: Outcome = OK) -> Operation:
    return Operation("release", holder, began, ended, outcome, A)


GOOD = {
    "nothing": ([], {}),
    "one holder": ([grant("x", 0, 1)], {A: "x"}),
    "one after the other": ([grant("x", 0, 1), release("x", 2, 3), grant("y", 4, 5)], {A: "y"}),
    "given again while the release was still on its way": (
        [grant("x", 0, 1), release("x", 2, 9), grant("y", 3, 4)],
        {A: "y"},
    ),
    "released before the answer to the grant was read": (
        [grant("x", 0, 5), release("x", 2, 3), grant("y", 3, 4)],
        {A: "y"},
    ),
    "an unknown grant left its lease": ([grant("x", 0, 1, outcome=UNKNOWN)], {A: "x"}),
    "an unknown grant left nothing": ([grant("x", 0, 1, outcome=UNKNOWN)], {}),
    "an unknown release happened": (
        [grant("x", 0, 1), release("x", 2, 3, UNKNOWN), grant("y", 4, 5)],
        {A: "y"},
    ),
    "an unknown release did not happen": ([grant("x", 0, 1), release("x", 2, 3, UNKNOWN)], {A: "x"}),
    "a release was refused, and again acknowledged": (
        [grant("x", 0, 1), release("x", 2, 3, REFUSED), release("x", 4, 5), grant("y", 6, 7)],
        {A: "y"},
    ),
    "a refused grant left nothing": ([grant("x", 0, 1), grant("y", 0, 1, outcome=REFUSED)], {A: "x"}),
    "two addresses": ([grant("x", 0, 1), grant("y", 0, 1, B)], {A: "x", B: "y"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_history_that_some_order_explains_is_good(name: str) -> None:
    """What may have happened in some order is no violation, and unknown goes either way."""
    operations, final = GOOD[name]
    assert violations(operations, final) == []


BAD = {
    "two holders at once": (
        [grant("x", 0, 1), grant("y", 0, 1)],
        {A: "x"},
        [f"{A} had two holders, x and y", f"{A} was given to y and never released, but etcd says x has it"],
    ),
    "two holders, the second long after": (
        [grant("x", 0, 1), grant("y", 100, 101), release("y", 102, 103)],
        {A: "x"},
        [f"{A} had two holders, x and y"],
    ),
    "given again before the release was sent": (
        [grant("x", 0, 1), grant("y", 2, 3), release("x", 4, 5)],
        {A: "y"},
        [f"{A} had two holders, x and y"],
    ),
    "given again before an unknown release was sent": (
        [grant("x", 0, 1), grant("y", 2, 3), release("x", 4, 5, UNKNOWN)],
        {A: "y"},
        [f"{A} had two holders, x and y"],
    ),
    "given again after a refused release": (
        [grant("x", 0, 1), release("x", 2, 3, REFUSED), grant("y", 4, 5), release("y", 6, 7)],
        {A: "x"},
        [f"{A} had two holders, x and y"],
    ),
    "a third among three": (
        [grant("x", 0, 1), release("x", 2, 3), grant("y", 4, 5), grant("z", 6, 7), release("y", 8, 9)],
        {A: "z"},
        [f"{A} had two holders, y and z"],
    ),
    "both of two short ones beside a long one": (
        [grant("x", 0, 1), grant("y", 2, 3), release("y", 4, 5), grant("z", 6, 7), release("z", 8, 9)],
        {A: "x"},
        [f"{A} had two holders, x and y", f"{A} had two holders, x and z"],
    ),
    "an acknowledged lease is gone": ([grant("x", 0, 1)], {}, [f"{A} was given to x and never released, but it is"]),
    "an acknowledged lease is another's": (
        [grant("x", 0, 1), grant("y", 0, 1, outcome=UNKNOWN)],
        {A: "y"},
        [f"{A} was given to x and never released, but etcd says y has it"],
    ),
    "a refused request's lease stays": (
        [grant("x", 0, 1, outcome=REFUSED)],
        {A: "x"},
        [f"{A} is x's in etcd, whose request was refused"],
    ),
    "a released lease stays": (
        [grant("x", 0, 1), release("x", 2, 3)],
        {A: "x"},
        [f"{A} is x's in etcd, although its release was acknowledged"],
    ),
    "one request left two leases": (
        [grant("x", 0, 1)],
        {A: "x", B: "x"},
        [f"{B} is x's in etcd, who was given {A}"],
    ),
    "a lease of nobody": ([], {A: "x"}, [f"{A} is x's in etcd, who never asked"]),
    "a name used twice": ([grant("x", 0, 1), grant("x", 2, 3)], {A: "x"}, ["x asked twice"]),
    "a release of nothing": ([release("x", 0, 1)], {}, ["x released what it never asked for"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_promise_is_seen(name: str) -> None:
    """Each of these histories breaks exactly the promises that are named, and the sentence says whose."""
    operations, final, expected = BAD[name]
    found = violations(operations, final)
    assert len(found) == len(expected), found
    for sentence, beginning in zip(found, expected, strict=True):
        assert sentence.startswith(beginning)
