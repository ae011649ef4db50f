"""The simulation in miniature finds nothing where every guard is on, and each that is missing."""

import pytest

from soak import simulation

FOUND = {
    "fencing": "holds no more",
    "unique_charge": "ended twice",
    "lease_renewal": "taken from a worker that lived",
    "delivery_row": "nobody will be told",
    "repair": "for ever",
    "idempotency": "ordered, ",
}


def test_with_every_guard_nothing_is_found_and_every_kind_of_fault_was_there() -> None:
    world = simulation.World(seed=2)

    world.run(6000)

    assert {"kill", "freeze", "redis", "away", "database"} <= {
        name.removeprefix("fault: ") for name in world.counts
    }
    assert world.counts["completed"] > 100
    assert world.counts["workers lost"] > 10


def test_a_seed_is_the_same_again() -> None:
    first, again, other = (simulation.World(seed) for seed in (5, 5, 6))
    for world in (first, again, other):
        world.run(1500)

    assert (first.now, first.counts) == (again.now, again.counts)
    assert (first.now, first.counts) != (other.now, other.counts)


@pytest.mark.parametrize("guard", simulation.GUARDS)
def test_a_missing_guard_is_found_with_its_seed_and_the_story_of_the_task(guard: str) -> None:
    with pytest.raises(simulation.Violation) as found:
        simulation.World(seed=1, without=[guard]).run(6000)

    head, task, *story = str(found.value).splitlines()
    assert head.startswith("seed 1, step ")
    assert FOUND[guard] in head
    assert task.startswith("task ")
    assert "submitted" in story[0]
