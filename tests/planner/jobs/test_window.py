"""The window of statistics, and the job that plans from it: order, repetition and loss of reports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.api.job_plans import JobPlan, Reason
from moeplan.api.jobs import Closing, Forecast, JobSpec, Payback, Replan
from moeplan.planner.jobs.job import PlanningJob, RankTakenError, SolveTask, StaleIncarnationError
from moeplan.planner.jobs.solve import LayersTask, plan_layers
from moeplan.planner.jobs.window import Cells, Report, Window
from moeplan.solvers import Cluster, ExpertSpec, Layout, ProblemError, SolveParameters
from moeplan.solvers.problem.arrays import Int64

LAYERS, RANKS, EXPERTS = 2, 4, 8
CLUSTER = Cluster.uniform(RANKS, 3)


def spec(**fields: object) -> JobSpec:
    values = {
        "cluster": CLUSTER,
        "layers": LAYERS,
        "experts": EXPERTS,
        "ranks": RANKS,
        "initial": (Layout.contiguous(EXPERTS, CLUSTER.slots),) * LAYERS,
        "parameters": SolveParameters(work_limit=50),
    }
    return JobSpec(**(values | fields))  # type: ignore[arg-type]


def counts(seed: int = 0, steps: int = 6) -> Int64:
    """int64[steps, layers, ranks, experts]"""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 1000, (steps, LAYERS, RANKS, EXPERTS)) ** 2 // 100


def report(tokens: Int64, step: int, ranks: list[int], layers: list[int] | None = None) -> Report:
    chosen = np.array(range(LAYERS) if layers is None else layers)
    return Report(step, Cells.of(chosen, np.array(ranks)), tokens[step][np.ix_(chosen, np.array(ranks))])


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.booleans())
def test_order_and_repetition_do_not_matter(random: object, merge: bool) -> None:
    """Reports of one step, split by layer and rank, shuffled and repeated, leave the same window."""
    tokens = counts(steps=3)
    window = Window(spec(merge_sources=merge))
    for step in range(3):
        cells = [(layer, rank) for layer in range(LAYERS) for rank in range(RANKS)]
        cells += cells[:3]
        random.shuffle(cells)  # type: ignore[attr-defined]
        for layer, rank in cells:
            window.add(report(tokens, step, [rank], [layer]), 0.0)
        assert window.close(0.0)
    assert window.count.accepted == 3 * LAYERS * RANKS
    assert window.count.duplicate == 3 * 3
    for layer in range(LAYERS):
        expected = tokens[:, layer].sum(axis=1, keepdims=True) if merge else tokens[:, layer]
        np.testing.assert_array_equal(window.layer(layer), expected)


@settings(max_examples=50)
@given(st.permutations(range(LAYERS)), st.permutations(range(RANKS)), st.integers(1, RANKS), st.booleans())
def test_layers_and_ranks_may_come_in_any_order(layers: list[int], ranks: list[int], first: int, merge: bool) -> None:
    """A step in two reports, whose ids follow each other or not, the second with one rank again."""
    tokens = counts(steps=1)
    window = Window(spec(merge_sources=merge))
    window.add(report(tokens, 0, ranks[:first], layers), 0.0)
    window.add(report(tokens, 0, ranks[first - 1 :], layers[::-1]), 0.0)
    assert window.close(0.0)
    assert (window.count.accepted, window.count.duplicate) == (LAYERS * RANKS, LAYERS)
    for layer in range(LAYERS):
        expected = tokens[:, layer].sum(axis=1, keepdims=True) if merge else tokens[:, layer]
        np.testing.assert_array_equal(window.layer(layer), expected)


def test_incomplete_step_closes_when_the_others_are_ahead() -> None:
    """A missing rank is taken to ask for what it asked last; it holds the others up by max_lag_steps only."""
    tokens = counts()
    window = Window(spec(closing=Closing(max_lag_steps=2)))
    window.add(report(tokens, 0, [0, 1, 2, 3]), 0.0)
    assert window.close(0.0)
    for step in (1, 2, 3):
        window.add(report(tokens, step, [0, 1, 2]), 0.0)
        assert not window.close(0.0), step
    window.add(report(tokens, 4, [0, 1, 2]), 0.0)
    assert window.close(0.0)
    assert window.closed_step == 1
    assert window.count.missing == LAYERS
    filled = window.layer(0)
    np.testing.assert_array_equal(filled[-1][:3], tokens[1, 0, :3])
    np.testing.assert_array_equal(filled[-1][3], tokens[0, 0, 3])
    window.add(report(tokens, 1, [3]), 0.0)
    assert window.count.late == LAYERS


def test_incomplete_step_closes_after_its_time() -> None:
    """Time is given by the caller, so a jump of the wall clock means nothing."""
    tokens = counts()
    window = Window(spec(closing=Closing(timeout_s=5)))
    window.add(report(tokens, 0, [0, 1]), 100.0)
    assert window.next_timeout_s() == 105.0
    assert not window.close(104.9)
    assert window.close(105.0)
    assert window.next_timeout_s() is None


def test_a_layer_without_quorum_is_not_used() -> None:
    tokens = counts()
    window = Window(spec(closing=Closing(timeout_s=5, quorum=0.75)))
    window.add(report(tokens, 0, [0, 1, 2], [1]), 0.0)
    window.add(report(tokens, 0, [0, 1], [0]), 0.0)
    assert window.close(9.0)
    assert not window.layer(0)
    assert window.layer(1)


def test_one_rank_with_a_wrong_step_closes_nothing() -> None:
    """A report from the far future is held or dropped; the steps of the others go on as if it were not there."""
    tokens = counts()
    window = Window(spec(closing=Closing(max_lag_steps=1)))
    for step in range(5):
        wild = Report(10**15 + step, Cells.of(np.array([0]), np.array([3])), tokens[0][:1, 3:])
        window.add(wild, 0.0)
    assert not window.close(1e6)  # nobody else has come that far, so no time closes it
    assert window.next_timeout_s() is None
    for step in range(3):
        window.add(report(tokens, step, [0, 1, 2, 3]), 0.0)
        assert window.close(1e6)
        assert window.closed_step == step
    assert window.count.late == 0
    assert window.count.accepted <= 3 * LAYERS * RANKS + 4


@pytest.mark.parametrize("quorum", [0.0, 0.5, 1.0])
def test_a_step_from_the_far_future_does_not_end_planning(quorum: float) -> None:
    """Whether it comes first or later: the window goes on, or comes back to where the ranks are."""
    tokens = counts()
    for first in (0, 3):
        window = Window(spec(closing=Closing(quorum=quorum, timeout_s=1)))
        now = 0.0
        for step in range(20):
            if step == first:
                window.add(Report(2**62, Cells.of(np.arange(LAYERS), np.array([3])), tokens[0][:, [3]]), now)
                now += 2
                window.close(now)
            window.add(Report(step, Cells.of(np.arange(LAYERS), np.arange(RANKS)), tokens[step % 6]), now)
            window.close(now)
        assert window.closed_step == 19
        assert len(window.layer(0)) == window.spec.forecast.window_steps


def test_a_rank_that_is_always_far_moves_nothing() -> None:
    tokens = counts()
    window = Window(spec(closing=Closing(quorum=0.25)))
    for step in range(50):
        window.add(Report(step, Cells.of(np.arange(LAYERS), np.arange(3)), tokens[0][:, :3]), 0.0)
        window.add(Report(10**9 + step, Cells.of(np.arange(LAYERS), np.array([3])), tokens[0][:, [3]]), 0.0)
        window.close(0.0)
    assert window.closed_step == 44  # as if rank 3 were silent
    assert window.count.early == 50 * LAYERS


def test_ranks_that_all_go_elsewhere_take_the_window_along() -> None:
    """Training that went back to a checkpoint, or skipped ahead, without a new incarnation."""
    tokens = counts()
    window = Window(spec())
    for step in [*range(100_000, 100_010), *range(10), *range(50_000, 50_010)]:
        window.add(Report(step, Cells.of(np.arange(LAYERS), np.arange(RANKS)), tokens[step % 6]), 0.0)
        window.close(0.0)
    assert window.closed_step == 50_009


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, RANKS - 1)), max_size=200))
def test_memory_is_bounded_and_steps_close_in_order(reports: list[tuple[int, int]]) -> None:
    tokens = counts(steps=1)[0]
    window = Window(spec(closing=Closing(max_lag_steps=2)))
    closed = -1
    for step, rank in reports:
        window.add(Report(step, Cells.of(np.arange(LAYERS), np.array([rank])), tokens[:, [rank]]), 0.0)
        window.close(0.0)
        assert len(window._open) <= window.spec.max_open_steps
        assert window.closed_step is None or window.closed_step >= closed
        closed = window.closed_step if window.closed_step is not None else -1
    count = window.count
    assert count.accepted + count.duplicate + count.late + count.early == LAYERS * len(reports)


def answer(job: PlanningJob, task: SolveTask) -> JobPlan | None:
    layers = LayersTask(task.layers, task.outlooks, task.policy, task.parameters, end=float("inf"))
    plan = job.solved(task, plan_layers(layers), 0.0)
    if plan is not None:
        assert job.commit(plan)
    return plan


def run(job: PlanningJob, reports: list[Report]) -> list[JobPlan]:
    plans = []
    for one in reports:
        task = job.report(one, 0.0)
        while task is not None:
            plan = answer(job, task)
            plans += [plan] if plan else []
            task = job.tick(0.0)
    return plans


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_same_statistics_same_plans(random: object) -> None:
    """The order in which ranks report a step changes neither the plans nor their versions."""
    tokens = counts(steps=3)
    ordered = [report(tokens, step, [rank]) for step in range(3) for rank in range(RANKS)]
    shuffled = []
    for step in range(3):
        part = ordered[step * RANKS : (step + 1) * RANKS]
        random.shuffle(part)  # type: ignore[attr-defined]
        shuffled += part
    first, second = run(PlanningJob.begin(spec(), 0), ordered), run(PlanningJob.begin(spec(), 0), shuffled)
    assert first
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.version == b.version
        assert a.decision == b.decision
        assert [layer.layout for layer in a.layers] == [layer.layout for layer in b.layers]


def test_every_n_steps() -> None:
    tokens = counts()
    job = PlanningJob.begin(spec(replan=Replan(every_steps=3)), 0)
    due = [job.report(report(tokens, step, [0, 1, 2, 3]), 0.0) is not None for step in range(3)]
    assert due == [False, False, True]


def test_moves_must_pay() -> None:
    """The same window: taken when the horizon is long enough, left when it is one step short of paying."""
    tokens = counts()
    expert = ExpertSpec(weight_bytes=400_000_000_000)  # a second per move within the node
    free = PlanningJob.begin(spec(expert=expert), 0)
    (plan,) = run(free, [report(tokens, 0, [0, 1, 2, 3])])
    assert plan.decision.reason is Reason.GAIN
    gain = plan.decision.cost_before_s - plan.decision.cost_after_s
    assert gain > 0
    assert plan.decision.move_cost_s > 0
    for horizon, expected in ((1, Reason.GAIN_TOO_SMALL), (1000, Reason.GAIN_PAYS)):
        payback = Payback(horizon, cost_factor=100 * gain / plan.decision.move_cost_s)
        job = PlanningJob.begin(spec(expert=expert, replan=Replan(payback=payback)), 0)
        run(job, [report(tokens, 0, [0, 1, 2, 3])])
        assert job.decision.reason is expected
        assert job.decision.horizon_steps == horizon


def test_incarnations_fence_and_sessions_hold_ranks() -> None:
    job = PlanningJob.begin(spec(), 5)
    with pytest.raises(StaleIncarnationError, match="at 5"):
        job.join(1, 4, (0,), "a")
    assert job.join(1, 5, (0, 1), "a") == []
    with pytest.raises(RankTakenError, match="rank 1"):
        job.join(2, 5, (1,), "b")
    assert job.join(3, 5, (0, 1), "a") == [1]  # a reconnect
    assert job.join(4, 6, (0,), "b") == [3]  # a restart of the training
    assert job.connected_ranks == 1
    job.end(3)
    assert job.connected_ranks == 1
    job.end(4)
    assert job.connected_ranks == 0


def test_a_restart_forgets_statistics_and_pending_answers_but_no_version() -> None:
    tokens = counts()
    job = PlanningJob.begin(spec(), 0)
    run(job, [report(tokens, 0, [0, 1, 2, 3])])
    version = job.plan.version
    task = job.report(report(tokens, 1, [0, 1, 2, 3]), 0.0)
    assert task is not None
    job.join(1, 1, (0,), "new")
    assert answer(job, task) is None
    assert job.plan.version == version
    plans = run(job, [report(tokens, 0, [0, 1, 2, 3])])
    assert all(plan.version > version for plan in plans)


def test_a_failed_plan_is_taken_back_under_a_new_version() -> None:
    tokens = counts()
    job = PlanningJob.begin(spec(), 0)
    first = job.plan
    (plan,) = run(job, [report(tokens, 0, [0, 1, 2, 3])])
    assert job.apply_failed(first.version, first.version, "old news") is None
    back = job.apply_failed(plan.version, first.version, "out of memory")
    assert back is not None
    assert job.commit(back)
    assert job.plan.version == plan.version + 1
    assert [layer.layout for layer in job.plan.layers] == [layer.layout for layer in first.layers]
    assert job.decision.reason is Reason.APPLY_FAILED
    assert job.decision.detail == "out of memory"


def test_spec_refuses_what_cannot_work() -> None:
    with pytest.raises(ProblemError, match="merge_sources"):
        spec(merge_sources=True, expert=ExpertSpec(token_bytes=1))
    with pytest.raises(ProblemError, match="initial_layouts"):
        spec(initial=spec().initial[:1])
    with pytest.raises(ProblemError, match="window_steps"):
        Forecast(window_steps=0)
