"""Who is loaded and who is unloaded: by example, and over random histories."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.stables import LINGERS, Fetch, Load, Order, Refuse, Stables, Unload


def stables(**sizes: int | None) -> Stables:
    made = Stables({"ram": 3})
    for name, size in sizes.items():
        made.add(name, None if size is None else {"ram": size})
    return made


def load(made: Stables, *names: str, now: float) -> None:
    for name in names:
        made.ask(name, "caller", now)
        assert Load(name) in made.orders(now)
        made.ready(name, now)
        made.leave(name, "caller", now)


def test_the_least_recently_used_make_room_and_no_more_of_them_than_needed() -> None:
    made = stables(a=1, b=1, c=1, d=2)
    load(made, "a", now=1)
    load(made, "b", now=2)
    load(made, "c", now=3)
    made.ask("a", "caller", 4)
    made.leave("a", "caller", 4)
    made.ask("d", "caller", 5)
    assert made.orders(5) == [Unload("b", gentle=True), Unload("c", gentle=True)]
    made.gone("b")
    assert made.orders(6) == []
    made.gone("c")
    assert made.orders(7) == [Load("d")]


def test_neither_pinned_nor_used_nor_kept_models_make_room() -> None:
    made = Stables({"ram": 3})
    made.add("pinned", {"ram": 1}, pinned=True)
    made.add("used", {"ram": 1})
    made.add("kept", {"ram": 1})
    made.add("new", {"ram": 1})
    assert made.orders(0) == [Load("pinned")]
    made.ready("pinned", 0)
    made.ask("used", "caller", 0)
    made.keep("kept")
    assert made.orders(0) == [Load("kept"), Load("used")]
    made.ready("used", 0)
    made.ready("kept", 0)
    made.ask("new", "another", 1)
    assert made.orders(1) == []
    assert "(pinned)" in made.why_not("new")
    made.leave("used", "caller", 2)
    assert made.orders(2) == [Unload("used", gentle=True)]
    made.spared("used", 3)
    made.ask("used", "caller", 3)
    assert made.orders(3) == []
    made.let_go("kept", 4)
    assert made.orders(4) == [Unload("kept", gentle=True)]


def test_what_never_fits_is_refused_with_the_arithmetic_and_asked_again_refused_again() -> None:
    made = stables(huge=2**32)
    for now in (1, 2):
        made.ask("huge", "caller", now)
        (refusal,) = made.orders(now)
        assert isinstance(refusal, Refuse)
        assert "4.00 GiB" in refusal.reason
        assert made.orders(now) == []


def test_an_idle_model_is_unloaded_after_keep_alive_and_that_moment_is_foretold() -> None:
    made = Stables({})
    made.add("m", {}, keep_alive=10)
    load(made, "m", now=1)
    assert made.next_look(4) == 7
    assert made.orders(10.9) == []
    assert made.orders(11) == [Unload("m", gentle=True)]


def test_a_replaced_model_that_a_straggler_brings_back_doesnt_stay() -> None:
    made = Stables({})
    made.add("old", {})
    load(made, "old", now=1)
    made.replace("old")
    assert made.orders(2) == [Unload("old", gentle=False)]
    made.gone("old")
    load(made, "old", now=3)
    made.ask("old", "caller", 3)
    assert made.next_look(4) is None
    made.leave("old", "caller", 5)
    assert made.next_look(5) == LINGERS
    assert made.orders(5 + LINGERS) == [Unload("old", gentle=True)]
    made.gone("old")
    # Somebody goes back to it: it stays again.
    made.keep("old")
    assert made.orders(30) == [Load("old")]
    made.ready("old", 30)
    made.let_go("old", 30)
    assert made.next_look(30) is None


def test_later_ones_take_free_memory_but_nobodys_place_while_the_first_waits() -> None:
    made = stables(a=1, busy=1, big=3, small=1, other=1)
    load(made, "a", now=1)
    made.ask("busy", "caller", 2)
    assert made.orders(2) == [Load("busy")]
    made.ready("busy", 2)
    made.ask("big", "caller", 3)
    assert made.orders(3) == []
    made.ask("small", "caller", 4)
    assert made.orders(4) == [Load("small")]
    made.ready("small", 4)
    made.ask("other", "caller", 5)
    assert made.orders(5) == []
    for name in ("busy", "small"):
        made.leave(name, "caller", 6)
    assert {order.name for order in made.orders(6)} == {"a", "busy", "small"}


def test_a_model_that_is_asked_for_again_after_a_failure_is_tried_again() -> None:
    made = stables(m=None)
    made.ask("m", "caller", 1)
    assert made.orders(1) == [Fetch("m")]
    made.failed("m", 1)
    assert made.orders(2) == []
    made.ask("m", "caller", 3)
    assert made.orders(3) == [Fetch("m")]
    made.found("m", {"ram": 1})
    assert made.orders(4) == [Load("m")]


class Histories(RuleBasedStateMachine):
    """Six models, a budget for about three; workers come up, fail, and go in any order."""

    names = ("a", "b", "c", "d", "e", "f")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.budget = {"ram": 10, "gpu:0": 6}
        self.stables = Stables(self.budget)
        sizes = {"a": (3, 0), "b": (4, 3), "c": (2, 4), "d": (5, 0), "e": (10, 6), "f": (1, 1)}
        for name, (ram, gpu) in sizes.items():
            wants = {"ram": ram, "gpu:0": gpu}
            self.stables.add(name, None if name == "c" else wants, pinned=name == "f", keep_alive=5 if name == "a" else None)
        self.sizes = {name: {"ram": ram, "gpu:0": gpu} for name, (ram, gpu) in sizes.items()}
        self.pending: list[Order] = []
        self.users: set[tuple[str, int]] = set()

    def follow(self) -> None:
        for order in self.stables.orders(self.now):
            if isinstance(order, Unload) and order.gentle:
                stall = self.stables[order.name]
                assert not stall.users
                assert not stall.stays
            if not isinstance(order, Refuse):
                self.pending.append(order)

    @rule(name=st.sampled_from(names), user=st.integers(0, 2))
    def ask(self, name: str, user: int) -> None:
        self.users.add((name, user))
        self.stables.ask(name, user, self.now)
        self.follow()

    @rule(data=st.data())
    @precondition(lambda self: self.users)
    def leave(self, data: st.DataObject) -> None:
        name, user = data.draw(st.sampled_from(sorted(self.users)))
        self.users.discard((name, user))
        self.stables.leave(name, user, self.now)
        self.follow()

    @rule(name=st.sampled_from(names))
    def unload(self, name: str) -> None:
        if not self.stables[name].pinned:
            self.stables.unload(name)
            self.follow()

    @rule(name=st.sampled_from(names))
    def replace(self, name: str) -> None:
        if not self.stables[name].pinned:
            self.stables.replace(name)
            self.follow()

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.follow()

    @rule(data=st.data(), well=st.booleans())
    @precondition(lambda self: self.pending)
    def done(self, data: st.DataObject, well: bool) -> None:
        self.finish(data.draw(st.sampled_from(self.pending)), well)
        self.follow()

    def finish(self, order: Order, well: bool) -> None:
        self.pending.remove(order)
        if isinstance(order, Fetch):
            if well:
                self.stables.found(order.name, self.sizes[order.name])
            else:
                self.stables.failed(order.name, self.now)
        elif isinstance(order, Load):
            (self.stables.ready if well else self.stables.failed)(order.name, self.now)
        elif isinstance(order, Unload):
            if well or not order.gentle:
                self.stables.gone(order.name)
                # Who waits for it asks again.
                for name, user in self.users:
                    if name == order.name:
                        self.stables.ask(name, user, self.now)
            else:
                self.stables.spared(order.name, self.now)

    @invariant()
    def nothing_overshoots(self) -> None:
        held = self.stables.held()
        assert all(held.get(pool, 0) <= size for pool, size in self.budget.items())

    def teardown(self) -> None:
        # Everybody lets go, and one wants something that fits beside the pinned one: it must come.
        for name, user in self.users:
            self.stables.leave(name, user, self.now)
        self.now += 1000
        self.users = {("d", 9)}
        self.stables.ask("d", 9, self.now)
        self.follow()
        for _ in range(100):
            if not self.pending:
                break
            self.finish(self.pending[0], True)
            self.follow()
        assert self.stables["d"].state == "ready"
        assert self.stables["f"].state == "ready"
        self.nothing_overshoots()


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
