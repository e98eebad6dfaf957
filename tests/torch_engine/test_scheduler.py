"""Which request has which row, and what the rows contain, for random arrivals, steps and cancellations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama.engine import TokenStream
from llama.sampling_params import SamplingParams
from llama.torch_engine.prefix_cache import Copy, PrefixCache
from llama.torch_engine.scheduler import BatchRequest, RequestState, Scheduler

LENGTH = 64
SYSTEM = list(range(100, 120))


class SymbolicRows:
    """Rows that contain token ids in place of their keys and values, or None where nothing was written."""

    def __init__(self, rows: int) -> None:
        self.held: list[list[int | None]] = [[None] * LENGTH for _ in range(rows)]
        self.request: list[BatchRequest | None] = [None] * rows

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        self.held[target][:count] = self.held[source][:count]

    def swap(self, source: int, target: int, count: int) -> None:
        held = self.held
        held[source][:count], held[target][:count] = held[target][:count], held[source][:count]
        self.request[target] = self.request[source]

    def move(self, source: int, target: int, count: int) -> None:
        self.held[target][:count] = self.held[source][:count]
        self.request[target] = self.request[source]

    def clear(self, row: int, count: int) -> None:
        self.held[row][:count] = [None] * count

    def vacate(self, row: int) -> None:
        self.request[row] = None


def request(prompt: list[int], maximum: int = 8) -> BatchRequest:
    return BatchRequest(prompt, len(prompt), SamplingParams(max_new_tokens=maximum), TokenStream())


prompts = st.builds(
    lambda system, rest: (SYSTEM if system else [1]) + rest,
    st.booleans(),
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
)


class Serving(RuleBasedStateMachine):
    """Uses a scheduler as the engine does, with any requests in any order."""

    @initialize(rows=st.integers(1, 5), reuse=st.booleans())
    def start(self, rows: int, reuse: bool) -> None:
        self.rows = SymbolicRows(rows)
        self.limit = rows
        self.scheduler = Scheduler(rows, self.rows, prefix_reuse=reuse)
        self.arrived: list[BatchRequest] = []
        self.admitted: list[BatchRequest] = []
        self.finished: list[list[int]] = []
        self.left = 0

    def write(self, row: int, sequence: BatchRequest, count: int) -> None:
        end = sequence.cached + count
        self.rows.held[row][sequence.cached : end] = sequence.tokens[sequence.cached : end]
        sequence.cached = end

    @rule(prompt=prompts)
    def a_request_arrives(self, prompt: list[int]) -> None:
        sequence = request(prompt)
        self.arrived.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.finished)
    @rule(more=st.lists(st.integers(0, 1), min_size=1, max_size=4), data=st.data())
    def the_next_turn_of_a_dialogue_arrives(self, more: list[int], data: st.DataObject) -> None:
        history = data.draw(st.sampled_from(self.finished))
        self.a_request_arrives((history + more)[: LENGTH - 10])

    @rule(chunk=st.integers(1, 40), most=st.integers(1, 4))
    def prompts_are_read_in_one_step(self, chunk: int, most: int) -> None:
        together: dict[int, BatchRequest] = {}
        while len(together) < most and (entry := self.scheduler.next_prefill(together.keys())):
            row, sequence = entry
            assert row not in together
            together[row] = sequence
            if sequence not in self.admitted:
                self.admitted.append(sequence)
                self.rows.request[row] = sequence
                self.scheduler.reuse_prefix(row)
                assert sequence.cached < sequence.prompt_length
                assert self.rows.held[row][: sequence.cached] == sequence.tokens[: sequence.cached]
        for row, sequence in together.items():
            assert sequence.state is RequestState.READING
            self.write(row, sequence, min(chunk, sequence.prompt_length - sequence.cached))
            if sequence.cached == sequence.prompt_length:
                sequence.state = RequestState.DECODING
                sequence.tokens.append(7)

    @rule()
    def a_step_is_taken(self) -> None:
        for row, sequence in enumerate(self.scheduler.running):
            if sequence.state is RequestState.DECODING:
                self.write(row, sequence, 1)
                sequence.tokens.append(7)
        running = enumerate(self.scheduler.running)
        done = [
            row for row, s in running if s.state is RequestState.DECODING and s.generated >= s.params.maximum
        ]
        for row in sorted(done, reverse=True):
            self.finished.append(self.scheduler.running[row].tokens)
            self.release(row, sound=True)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data(), sound=st.booleans())
    def a_running_request_ends(self, data: st.DataObject, sound: bool) -> None:
        row = data.draw(st.integers(0, len(self.scheduler.running) - 1))
        self.release(row, sound=sound)

    @precondition(lambda self: self.scheduler.waiting)
    @rule(data=st.data())
    def a_waiting_request_is_cancelled(self, data: st.DataObject) -> None:
        waiting = [s for s in self.arrived if s not in self.admitted and not s.stream.cancelled]
        data.draw(st.sampled_from(waiting)).stream.cancel()
        self.scheduler.drop_cancelled_waiting()
        self.left += 1

    def release(self, row: int, sound: bool) -> None:
        before = list(self.scheduler.running)
        self.scheduler.release(row, sound=sound)
        expected = [s for s in before if s is not before[row]]
        assert sorted(map(id, self.scheduler.running)) == sorted(map(id, expected))
        assert before[row].state is RequestState.ENDED
        self.left += 1

    @invariant()
    def every_running_request_has_its_own_tokens_in_its_row(self) -> None:
        for row, sequence in enumerate(self.scheduler.running):
            assert self.rows.held[row][: sequence.cached] == sequence.tokens[: sequence.cached]

    @invariant()
    def every_running_request_has_its_state_in_its_row(self) -> None:
        running = self.scheduler.running
        assert self.rows.request == [*running, *[None] * (self.limit - len(running))]

    @invariant()
    def every_free_row_contains_the_tokens_that_the_prefix_cache_has_for_it(self) -> None:
        for row in range(len(self.scheduler.running), self.limit):
            kept = self.scheduler._prefixes._kept[row]
            assert self.rows.held[row][: len(kept)] == kept

    @invariant()
    def no_request_is_lost_and_no_row_is_assigned_twice(self) -> None:
        running = self.scheduler.running
        assert len(running) <= self.limit
        assert len(set(map(id, running))) == len(running)
        assert len(self.arrived) == len(running) + self.scheduler.waiting + self.left

    @invariant()
    def requests_are_served_in_the_order_of_arrival(self) -> None:
        places = [self.arrived.index(sequence) for sequence in self.admitted]
        assert places == sorted(places)
        overtaken = [s for s in self.arrived[: max(places, default=0)] if s not in self.admitted]
        assert all(sequence.stream.cancelled for sequence in overtaken)


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(prompts, min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_requests_that_wait_for_a_row_are_all_served_in_the_end(queue: list[list[int]], rows: int) -> None:
    scheduler = Scheduler(rows, SymbolicRows(rows), prefix_reuse=True)
    for prompt in queue:
        scheduler.add(request(prompt))
    served = 0
    while not scheduler.idle:
        while entry := scheduler.next_prefill():
            scheduler.reuse_prefix(entry[0])
            entry[1].cached = entry[1].prompt_length
            entry[1].state = RequestState.DECODING
        scheduler.release(0)
        served += 1
    assert served == len(queue)


def test_a_dialogue_continues_in_its_own_row_without_a_copy() -> None:
    prefixes = PrefixCache(4)
    history = list(range(40))
    prefixes.keep(0, history)
    assert prefixes.reuse(0, [*history, 1, 2], []) == ([], 40)


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    prefixes = PrefixCache(2)
    prefixes.keep(0, list(range(40)))
    assert prefixes.reuse(0, list(range(40)), [])[1] == 39


def test_a_request_that_shares_a_prefix_with_one_that_is_being_read_waits_for_it() -> None:
    scheduler = Scheduler(4, SymbolicRows(4), prefix_reuse=True)
    for prompt in ([*SYSTEM, 1], [*SYSTEM, 2], [*SYSTEM, 3]):
        scheduler.add(request(prompt))
    entry = scheduler.next_prefill()
    assert entry is not None
    row, first = entry
    assert row == 0
    assert scheduler.next_prefill([0]) is None
    first.cached, first.state = first.prompt_length, RequestState.DECODING
    entry = scheduler.next_prefill()
    assert entry is not None
    row, second = entry
    scheduler.reuse_prefix(1)
    assert (row, second.cached) == (1, len(SYSTEM))


def test_a_common_prefix_is_copied_from_a_running_request() -> None:
    prefixes = PrefixCache(4)
    assert prefixes.reuse(1, [*SYSTEM, 5, 6], [[*SYSTEM, 9, 9]]) == ([Copy(0, 1, len(SYSTEM))], len(SYSTEM))


def test_a_prefix_that_a_new_request_would_overwrite_moves_to_the_least_recently_used_row() -> None:
    prefixes = PrefixCache(3)
    first, second, third = ([number] * 30 for number in (1, 2, 3))
    for row, tokens in ((1, first), (2, second), (0, third)):
        prefixes.keep(row, tokens)
    assert prefixes.reuse(0, [*second, 8], []) == ([Copy(0, 1, 30), Copy(2, 0, 30)], 30)
    assert (prefixes._kept[1], prefixes._kept[2]) == (third, second)


def test_the_least_recently_used_row_is_overwritten_without_saving_its_prefix() -> None:
    prefixes = PrefixCache(2)
    prefixes.keep(0, [1] * 30)
    prefixes.keep(1, [2] * 30)
    assert prefixes.reuse(0, [3] * 30, []) == ([], 0)
    assert prefixes._kept[1] == [2] * 30


def test_a_prefix_of_a_few_tokens_is_not_copied() -> None:
    prefixes = PrefixCache(2)
    prefixes.keep(1, list(range(15)))
    assert prefixes.reuse(0, list(range(30)), []) == ([], 0)
