"""A model of how several processes begin, fill and finish one embeddings folder, for `test_export_protocol.py`.

Each process runs its command again and again. Between any two writes to the folder another process may do its next
step, and any process may be killed. `explore` visits every state that can arise so, and holds each against what must
always be true. A *guard* is one thing that the code does so that this is true: without it, `explore` finds a way to go
wrong. The steps bear the names of the functions that they stand for: `_begin` is `shards.begin`, and so on.

What the model leaves out: the bytes of a file (a shard is the version of the items that it was made from), temporary
files, and how a lock tells a dead owner from a living one (`test_shards.py`). Here a killed process holds no lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

TURN = "begin and finish take turns"
OWN_LOCK = "each share has one writer"
ALONE = "a single writer keeps workers out"
NAMED = "a record counts only for the plan that it names"
COMPARED = "a shard of an earlier plan counts only if its rows are the same"
ADOPTED = "a shard without a record counts only if its rows are the same"
STATE_FIRST = "the state file is there before the manifest goes"
DEMOTED = "what is made again counts no more from the first moment"
DAMAGED_IN_TURN = "a damaged shard goes in a turn, after the manifest"
MOMENT = "the records of the last moment count"
SAME_PLAN = "a worker finishes only the plan that it began"
THERE = "a manifest that is there stays"
LEFT = "a complete folder is left as it is"
GUARDS = {  # what to leave out → the functions that hold it
    TURN: ("lock.turn",),
    OWN_LOCK: ("lock.writing",),
    ALONE: ("lock._refuse_others",),
    NAMED: (
        "shards._recorded",
        "shards.recorded_shards",
    ),
    COMPARED: (
        "shards.confirm",
        "shards._holds",
    ),
    ADOPTED: ("shards._adopt",),
    STATE_FIRST: ("shards._open",),
    DEMOTED: (
        "shards.begin",
        "shards._open",
    ),
    DAMAGED_IN_TURN: ("shards._checked",),
    MOMENT: ("shards.finish",),
    SAME_PLAN: ("shards.require_same_plan",),
    THERE: ("shards.finish",),
    LEFT: ("shards.begin",),
}


class Content(NamedTuple):
    """What a shard was made from."""

    version: int  # of its items
    failed: bool = False  # some row has a failure in place of a vector
    damaged: bool = False


@dataclass(frozen=True)
class Plan:
    """A plan: the version of the items of each shard. Two plans of the same versions are the same plan."""

    name: int
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Command:
    """What one process runs."""

    plan: Plan
    share: tuple[int, int] | None = None  # worker, workers; None for a single writer
    extend: bool = False
    retry: bool = False

    @property
    def own(self) -> range:
        """The shards that it makes."""
        count = len(self.plan.versions)
        return range(count) if self.share is None else range(self.share[0], count, self.share[1])


class Process(NamedTuple):
    """Where a process is, and what it remembers."""

    at: str = "out"
    number: int = 0  # of the shard it is at
    finished: frozenset[int] = frozenset()
    again: frozenset[int] = frozenset()
    manifest: tuple[int, tuple[Content | None, ...]] | None = None  # as it was when `_open` began
    new: Content | None = None  # the shard in hand


OUT = Process()
IN_TURN = ("records", "open", "state", "gone", "discard", "write", "tidy", "tidied")


class State(NamedTuple):
    """The folder and the processes."""

    manifest: tuple[int, tuple[Content | None, ...]] | None
    state: int | None  # the plan that the state file names
    parts: tuple[Content | None, ...]
    records: tuple[tuple[Content, int] | None, ...]  # content, and the plan it is recorded for; 0 for none
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Scenario:
    """A folder, and the commands that run in it, each as often as it likes."""

    name: str
    commands: tuple[Command, ...]
    plans: tuple[Plan, ...]
    complete: int | None = None  # the plan for which the folder is complete at the start
    parts: tuple[Content | None, ...] = ()  # at the start
    may_fail: frozenset[int] = frozenset()  # shards of which a row fails now and then


@dataclass
class Explored:
    """What `explore` found."""

    states: int = 0
    violations: list[str] = field(default_factory=list)


class Model:
    """The steps of all processes of a scenario."""

    def __init__(self, scenario: Scenario, without: str | None = None) -> None:
        self.scenario, self.without = scenario, without
        self.plans = {plan.name: plan for plan in scenario.plans}
        self.width = max(len(plan.versions) for plan in scenario.plans)
        self.first = self.start()

    def has(self, guard: str) -> bool:
        return guard != self.without

    def start(self) -> State:
        """Return the first state."""
        empty = (None,) * self.width
        parts = (self.scenario.parts + empty)[: self.width]
        manifest = None
        if self.scenario.complete is not None:
            count = len(self.plans[self.scenario.complete].versions)
            manifest = self.scenario.complete, tuple(part and part._replace(damaged=False) for part in parts[:count])
        return State(manifest, None, parts, empty, (OUT,) * len(self.scenario.commands))

    def right(self, plan: int, number: int, content: Content | None) -> bool:
        """Tell whether a shard holds the rows that a plan puts there."""
        versions = self.plans[plan].versions
        return content is not None and number < len(versions) and content.version == versions[number]

    def is_complete(self, state: State) -> bool:
        """Tell whether the folder is complete as one of the commands wants it."""
        if state.manifest is None or state.manifest[0] not in {command.plan.name for command in self.scenario.commands}:
            return False
        return not any(part is not None and part.damaged for part in state.parts)

    def next_states(self, state: State) -> Iterator[tuple[str, State]]:
        """Yield each state that one step, or the death, of one process leads to."""
        for index, process in enumerate(state.processes):
            step = getattr(self, f"_{process.at}")
            for after in step(state, index, process, self.scenario.commands[index]):
                yield f"process {index}, {process.at}", after
            if process.at != "out":
                yield f"process {index} is killed", self.moved(state, index, OUT)

    def moved(self, state: State, index: int, process: Process, /, **changes: object) -> State:
        processes = (*state.processes[:index], process, *state.processes[index + 1 :])
        return state._replace(processes=processes, **changes)

    # --- lock.writing, lock.turn ------------------------------------------------------------------------------
    def _out(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        for other, running in enumerate(state.processes):
            if other != index and running.at != "out" and self.are_rivals(command, self.scenario.commands[other]):
                return
        yield self.moved(state, index, Process("begin"))

    def are_rivals(self, one: Command, other: Command) -> bool:
        if one.share is None or other.share is None:
            return self.has(ALONE if one.share != other.share else OWN_LOCK)
        return self.has(OWN_LOCK) and one.share == other.share

    def turn_is_free(self, state: State, index: int) -> bool:
        if self.scenario.commands[index].share is None or not self.has(TURN):
            return True
        return not any(other.at in IN_TURN for place, other in enumerate(state.processes) if place != index)

    # --- shards.begin ---------------------------------------------------------------------------------------
    def _begin(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        if not self.turn_is_free(state, index):
            return
        known = state.manifest[0] if state.manifest else state.state
        foreign = known is None and (any(state.parts) or any(state.records))
        if foreign or (known not in (None, command.plan.name) and not (command.extend or command.retry)):
            yield self.moved(state, index, OUT)  # refused
            return
        process = Process("records", manifest=state.manifest)
        if self.has(TURN):  # nobody else writes between the two looks
            yield from self._records(state, index, process, command)
        else:
            yield self.moved(state, index, process)

    def _records(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        name = command.plan.name
        records: tuple[tuple[Content, int] | None, ...] = state.records
        if process.manifest is not None:
            plan, contents = process.manifest
            records = tuple(content and (content, plan) for content in contents)
        finished = {n for n, record in enumerate(records) if record is not None and self.counts(record, name)}
        failed = {n for n in finished if (record := records[n]) is not None and record[0].failed}
        again = frozenset(failed & set(command.own)) if command.retry else frozenset()
        if command.share is not None and self.has(MOMENT):
            finished &= set(command.own)  # it looks at the others again when it finishes
        process = process._replace(finished=frozenset(finished) - again, again=again, number=0)
        if process.manifest is not None and process.manifest[0] == name and not again and self.has(LEFT):
            yield self.moved(state, index, process._replace(at="check"), records=(None,) * self.width, state=None)
        else:
            yield from self._open(state, index, process._replace(at="open"), command)

    def counts(self, record: tuple[Content, int], plan: int) -> bool:
        return record[1] == plan or not self.has(NAMED)

    def _open(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        """Write the next record that is not yet as it should be; then the other two steps."""
        for n in range(process.number, self.width):
            record = state.records[n]
            if process.manifest is not None and n < len(process.manifest[1]):
                content = process.manifest[1][n]
                record = content and (content, process.manifest[0])
            if record and n in process.again and self.has(DEMOTED):
                record = record[0], 0
            if record != state.records[n]:
                records = put(state.records, n, record)
                yield self.moved(state, index, process._replace(at="open", number=n + 1), records=records)
                return
        step = self._state if self.has(STATE_FIRST) else self._gone
        yield from step(state, index, process._replace(number=0), command)

    def _state(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        after = process._replace(at="gone" if self.has(STATE_FIRST) else self.opened(process))
        # an unfinished export of this plan has the right one already
        if process.manifest is not None or state.state != command.plan.name:
            yield self.moved(state, index, after, state=command.plan.name)
        elif after.at == "gone":
            yield from self._gone(state, index, after, command)
        else:
            yield self.moved(state, index, after)

    def _gone(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        after = process._replace(at=self.opened(process) if self.has(STATE_FIRST) else "state")
        if not self.has(TURN) and process.at != "gone":
            yield self.moved(state, index, process._replace(at="gone"))  # others may come in between
        else:
            yield self.moved(state, index, after, manifest=None)

    def opened(self, process: Process) -> str:
        return "discard" if process.new is not None else "check"

    # --- shards._checked ------------------------------------------------------------------------------------
    def _check(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        """Look at the next of the own shards with which there is something to do."""
        for n in range(process.number, len(command.plan.versions)):
            if n in command.own and (after := self.checked(state, index, process, command, n)) is not None:
                yield after
                return
        yield from self._make(state, index, process._replace(number=0, manifest=None), command)

    def checked(self, state: State, index: int, process: Process, command: Command, n: int) -> State | None:
        plan, part, record = command.plan.name, state.parts[n], state.records[n]
        on = process._replace(number=n + 1)
        if (n in process.finished or record) and part is not None and part.damaged:
            damaged = process._replace(new=part, finished=process.finished - {n}, again=frozenset({n}))
            if self.has(DAMAGED_IN_TURN):
                return self.moved(state, index, damaged._replace(at="reopen"))
            return self.moved(state, index, damaged._replace(at="discard", new=None))
        if n in process.finished:
            return None
        if record is not None and not command.retry:
            if self.right(plan, n, part) or not self.has(COMPARED):
                return self.recorded(state, index, on, n, plan)
            return self.moved(state, index, on, records=put(state.records, n, None), parts=put(state.parts, n, None))
        if record is None and part is not None:
            if self.right(plan, n, part) or not self.has(ADOPTED):
                return self.recorded(state, index, on, n, 0 if command.retry and part.failed else plan)
            return self.moved(state, index, on, parts=put(state.parts, n, None))
        return None

    def recorded(self, state: State, index: int, process: Process, n: int, plan: int) -> State:
        part = state.parts[n]
        assert part is not None
        finished = process.finished | {n} if plan else process.finished
        return self.moved(
            state, index, process._replace(finished=finished), records=put(state.records, n, (part, plan))
        )

    def _reopen(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        if not self.turn_is_free(state, index):
            return
        if (state.manifest[0] if state.manifest else state.state) != command.plan.name:
            yield self.moved(state, index, OUT)  # require_same_plan
            return
        yield from self._open(state, index, process._replace(manifest=state.manifest, number=0), command)

    def _discard(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        (n,) = process.again
        after = process._replace(at="check", new=None, again=frozenset(), number=0)
        yield self.moved(state, index, after, records=put(state.records, n, None), parts=put(state.parts, n, None))

    # --- export: shards.confirm, shards.publish_shard -------------------------------------------------------
    def _make(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        """Decide about the next of the own shards, and encode it."""
        plan, missing = command.plan.name, [n for n in command.own if n not in process.finished]
        if not missing:
            keep = process.finished if command.share is None or not self.has(MOMENT) else frozenset()
            yield self.moved(state, index, Process("end", finished=keep))
            return
        n = missing[0]
        part, process = state.parts[n], process._replace(at="make", number=n, again=frozenset())
        if command.retry and self.right(plan, n, part) and part is not None and not part.failed:
            yield self.recorded(state, index, process._replace(number=0), n, plan)
        elif (state.manifest[0] if state.manifest else state.state) != plan:
            yield self.moved(state, index, OUT)  # Job.publish: require_same_plan
        else:
            for failed in (False, True) if n in self.scenario.may_fail else (False,):
                new = Content(command.plan.versions[n], failed)
                yield self.moved(state, index, process._replace(at="unrecord", new=new))

    def _unrecord(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        records = put(state.records, process.number, None)
        yield self.moved(state, index, process._replace(at="replace"), records=records)

    def _replace(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        parts = put(state.parts, process.number, process.new)
        yield self.moved(state, index, process._replace(at="record", new=None), parts=parts)

    def _record(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        n = process.number
        if state.parts[n] is None:  # somebody else removed it, which only a missing guard allows
            yield self.moved(state, index, OUT)
            return
        yield self.recorded(state, index, process._replace(at="make", number=0), n, command.plan.name)

    # --- shards.finish --------------------------------------------------------------------------------------
    def _end(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        if self.turn_is_free(state, index):
            yield from self._finish(state, index, process, command)

    def _finish(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        plan = command.plan.name
        if (state.manifest[0] if state.manifest else state.state) != plan and self.has(SAME_PLAN):
            yield self.moved(state, index, OUT)  # require_same_plan
            return
        if state.manifest is not None and self.has(THERE):
            yield self.moved(state, index, Process("tidy"))
            return
        finished = process.finished
        if command.share is not None and self.has(MOMENT):
            known = enumerate(state.records)
            finished = frozenset(n for n, record in known if record is not None and self.counts(record, plan))
        if not finished >= set(range(len(command.plan.versions))):
            yield self.moved(state, index, OUT)  # other workers still have shards to make
            return
        yield self.moved(state, index, Process("write"))

    def _write(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        count = len(command.plan.versions)
        contents = tuple(record[0] if record else part for record, part in zip(state.records, state.parts, strict=True))
        manifest = command.plan.name, contents[:count]
        yield self.moved(state, index, Process("tidy"), manifest=manifest)

    def _tidy(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        yield self.moved(state, index, Process("tidied"), records=(None,) * self.width)

    def _tidied(self, state: State, index: int, process: Process, command: Command) -> Iterator[State]:
        yield self.moved(state, index, OUT, state=None)

    # --- what must always be true ---------------------------------------------------------------------------
    def violations(self, before: State, state: State, step: str) -> Iterator[str]:
        """Yield what is wrong with a state, or with the step that led to it."""
        if state.manifest is not None:
            plan, contents = state.manifest
            for n, content in enumerate(contents):
                part = state.parts[n]
                if part is not None and part.damaged and state.manifest == self.first.manifest:
                    continue  # it was damaged before any of the commands began
                if part is None or part != content or part.damaged:
                    yield "a manifest over a shard that is missing, damaged or another one"
                elif not self.right(plan, n, part):
                    yield "a manifest over a shard of other items"
        if sum(process.at == "write" for process in state.processes) > 1:
            yield "two writers of the manifest"
        if before.manifest is not None and state.manifest is None and self.nothing_to_do(before):
            yield "a complete manifest was taken away"
        if before.manifest is not None and step.endswith("write"):
            yield "a second manifest over the first"
        for plan in self.plans:
            for n in range(self.width):
                record = before.records[n]
                committed = record is not None and record[1] == plan == self.newest and record[0] == before.parts[n]
                whole = committed and self.right(plan, n, before.parts[n]) and not before.parts[n].damaged  # type: ignore[union-attr]
                if whole and not self.right(plan, n, state.parts[n]):
                    yield "a committed shard was lost"

    @property
    def newest(self) -> int:
        return max(self.plans)

    def nothing_to_do(self, state: State) -> bool:
        """Tell whether no command wants anything of a complete folder."""
        assert state.manifest is not None
        contents = state.parts[: len(state.manifest[1])]
        if any(part is None or part.damaged for part in contents):
            return False
        if any(command.plan.name != state.manifest[0] for command in self.scenario.commands):
            return False
        return not any(part is not None and part.failed for part in contents)


def put(values: tuple, place: int, value: object) -> tuple:
    return (*values[:place], value, *values[place + 1 :])


def explore(scenario: Scenario, without: str | None = None, most: int = 10**6) -> Explored:
    """Visit every state, breadth first, and return how many there are and what is wrong with them.

    From each state some steps must lead to a complete folder. With a guard left out, the first violation ends it.
    """
    model, found = Model(scenario, without), Explored()
    first = model.first
    numbers: dict[State, int] = {first: 0}
    came_from: list[list[int]] = [[]]
    goals = [0] if model.is_complete(first) else []
    queue = [first]
    for state in queue:  # it grows meanwhile
        here = numbers[state]
        for what, after in model.next_states(state):
            if after == state:
                continue
            known = numbers.get(after)
            if known is None:
                known = numbers[after] = len(queue)
                queue.append(after)
                came_from.append([])
                if model.is_complete(after):
                    goals.append(known)
            came_from[known].append(here)
            for violation in model.violations(state, after, what):
                if len(found.violations) < 5:
                    found.violations.append(f"{scenario.name}: {violation}, after a step of {what}")
                if without is not None:
                    found.states = len(queue)
                    return found
        assert len(queue) < most, f"{scenario.name}: more than {most:,} states"
    found.states = len(queue)
    reached = bytearray(len(queue))
    for goal in goals:
        reached[goal] = 1
    for goal in goals:  # it grows, too
        for earlier in came_from[goal]:
            if not reached[earlier]:
                reached[earlier] = 1
                goals.append(earlier)
    if not all(reached):
        found.violations.append(f"{scenario.name}: no command completes the folder ({reached.count(0)} states)")
    return found


OLD, NEW = Plan(1, (1, 1, 1)), Plan(2, (2, 1, 2))
LONGER = Plan(2, (1, 1, 1))
SHORT = Plan(1, (1, 1))
MADE = (Content(1), Content(1), Content(1))


def workers(plan: Plan, shares: tuple[int, ...] = (0, 1, 2), of: int = 3, **choices: bool) -> tuple[Command, ...]:
    return tuple(Command(plan, (share, of), **choices) for share in shares)


SCENARIOS = (
    Scenario("three workers, a new folder", workers(OLD), (OLD,)),
    Scenario("two workers and a second process of the first", workers(SHORT, (0, 1, 0), 2), (SHORT,)),
    Scenario("--extend by three workers", workers(LONGER, extend=True), (SHORT, LONGER), 1, MADE[:2]),
    Scenario("--retry-failed by three workers, titles changed", workers(NEW, retry=True), (OLD, NEW), 1, MADE),
    Scenario(
        "--retry-failed by three workers, nothing changed",
        workers(OLD, retry=True),
        (OLD,),
        1,
        (Content(1, failed=True), Content(1, failed=True), Content(1)),
        frozenset({0, 1}),
    ),
    Scenario(
        "--retry-failed by two workers and a second process of the first",
        workers(SHORT, (0, 1, 0), 2, retry=True),
        (SHORT,),
        1,
        (Content(1, failed=True), Content(1, failed=True)),
        frozenset({0}),
    ),
    Scenario(
        "--retry-failed, the plain command and workers",
        (Command(NEW, retry=True), Command(NEW), Command(NEW, (0, 3))),
        (OLD, NEW),
        1,
        MADE,
    ),
    Scenario(
        "workers that still have the earlier items, and one that has the new ones",
        (*workers(OLD, (0, 1)), Command(NEW, (2, 3), retry=True), Command(NEW, retry=True)),
        (OLD, NEW),
    ),
    Scenario(
        "workers that still have the earlier items, of a complete folder, and one that has the new ones",
        (*workers(OLD, (0, 1)), Command(NEW, (2, 3), retry=True), Command(NEW, retry=True)),
        (OLD, NEW),
        1,
        MADE,
    ),
    Scenario(
        "two workers, a damaged shard of each",
        workers(SHORT, (0, 1), 2),
        (SHORT,),
        1,
        (Content(1, damaged=True), Content(1, damaged=True)),
    ),
    Scenario(
        "three workers, one damaged shard",
        workers(OLD),
        (OLD,),
        1,
        (Content(1), Content(1, damaged=True), Content(1)),
    ),
)
