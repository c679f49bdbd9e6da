"""Several machines as one: where all of them stand together is a state, so that a character takes one look-up, and not one for each."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.policies.filters.automaton import THREADS_KEPT, Machine, Position

FOLLOWERS_KEPT = 50_000
"""Over all states; beyond it they are forgotten and made anew (about 25 MiB)."""


class JointState(dict[str, "JointState"]):
    """Where all machines stand, with the states that were already seen to follow by character."""

    __slots__ = ("hits", "hold", "joint", "positions")

    def __init__(self, joint: Joint, positions: tuple[Position, ...]) -> None:
        self.joint = joint
        self.positions = positions
        self.hits = any(position.hits for position in positions)
        """Whether a machine has one."""
        self.hold = max((position.hold for position in positions), default=0)

    def __missing__(self, character: str) -> JointState:
        return self.joint.follow(self, character)


class Joint:
    """Machines side by side; shared by all texts."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        self._machines = tuple(machines)
        self._states: dict[tuple[int, ...], JointState] = {}
        self._kept = 0
        self._threads = 0
        """Of all positions that are kept: a machine that forgets a state doesn't free it while a joint state stands there."""
        self.start = self.state(tuple(machine.start for machine in machines))

    def state(self, positions: tuple[Position, ...]) -> JointState:
        # By identity: each machine has one object for a state, and the joint state keeps it alive.
        names = tuple(map(id, positions))
        found = self._states.get(names)
        if found is None:
            if self._threads > THREADS_KEPT:
                self._forget()
            self._threads += sum(len(position.threads) for position in positions)
            found = self._states[names] = JointState(self, positions)
        return found

    def follow(self, state: JointState, character: str) -> JointState:
        if self._kept >= FOLLOWERS_KEPT:
            self._forget()
        self._kept += 1
        after = state[character] = self.state(
            tuple(position[machine.classes[character]] for position, machine in zip(state.positions, self._machines, strict=True))
        )
        return after

    def _forget(self) -> None:
        self._states.clear()
        self.start.clear()
        self._kept = self._threads = 0
