"""Policies rule by rule: what each lane runs next, given what waits."""

import pytest

from qllm_ops.scheduler.core import Limits, Scheduler
from qllm_ops.scheduler.policies import BACKGROUND, FOREGROUND, POLICIES, Plan, View, get_policy
from qllm_ops.scheduler.request import BE, LS, Request

MAX_BATCH = 3
TOP_UP = 7


def request(name: str) -> Request:
    """L2 is latency-sensitive and b5 best-effort; the number is the arrival."""
    return Request(name, [1, 2], LS if name[0] == "L" else BE, arrival_s=float(name[1:]))


def view(ls_prefill="", ls_decode="", be_prefill="", be_decode="", busy=False, due=False, prefills=0) -> View:
    lists = [
        [request(name) for name in names.split()] for names in (ls_prefill, ls_decode, be_prefill, be_decode)
    ]
    return View(
        *lists,
        foreground_busy=busy,
        best_effort_due=due,
        prefills=prefills,
        max_batch=MAX_BATCH,
        top_up_tokens=TOP_UP,
    )


def told(plan: Plan | None) -> str | None:
    """A plan in a word: "prefill L1 L2 + b3 (7)"."""
    if plan is None:
        return None
    text = " ".join([plan.kind, *(r.id for r in plan.requests)])
    return text + (f" + {' '.join(r.id for r in plan.riders)} ({plan.rider_tokens})" if plan.riders else "")


FULL_LS = {"ls_decode": "L1 L2 L3"}

# Algorithm 1, down to where only best-effort work is left.
URGENT = [
    (
        "a full batch of urgent decodes first",
        view("L9", **FULL_LS, be_prefill="b4", be_decode="b5"),
        "decode L1 L2 L3",
    ),
    ("urgent prefill, topped up", view("L8 L9", "L1", "b4 b6", "b5"), "prefill L8 L9 + b4 b6 (7)"),
    ("urgent prefill, nobody to ride", view("L8", "L1 L2", "", "b5"), "prefill L8"),
    ("urgent decode, topped up with decodes only", view("", "L1 L2", "b4", "b5 b6"), "decode L1 L2 b5 b6"),
    ("urgent decode, nobody to ride", view("", "L2", "b4", ""), "decode L2"),
    ("urgent decodes that were passed over often enough", view("L9", "L1", prefills=MAX_BATCH), "decode L1"),
    ("one prefill short of often enough", view("L9", "L1", prefills=MAX_BATCH - 1), "prefill L9"),
    ("nothing to pass over", view("L9", "", prefills=MAX_BATCH + 5), "prefill L9"),
]

PATIENT = [
    (
        "prompts first while the decode batch is not full",
        view(be_prefill="b4 b6", be_decode="b1 b2"),
        "prefill b4 b6",
    ),
    ("a full decode batch first", view(be_prefill="b6", be_decode="b1 b2 b3"), "decode b1 b2 b3"),
    ("decodes when no prompt is left", view(be_decode="b1"), "decode b1"),
    (
        "decodes that waited long enough",
        view(be_prefill="b6", be_decode="b1", prefills=MAX_BATCH),
        "decode b1",
    ),
    ("nothing", view(), None),
]


@pytest.mark.parametrize("name", ["priority", "layer", "tile"])
@pytest.mark.parametrize(("rule", "seen", "expected"), URGENT)
def test_urgent_work_goes_by_algorithm_1(name, rule, seen, expected):
    assert told(get_policy(name).next_batch(FOREGROUND, seen)) == expected


@pytest.mark.parametrize(
    ("name", "lane"), [("priority", FOREGROUND), ("layer", BACKGROUND), ("tile", BACKGROUND)]
)
@pytest.mark.parametrize(("rule", "seen", "expected"), PATIENT)
def test_best_effort_work_fills_its_batch_first(name, lane, rule, seen, expected):
    assert told(get_policy(name).next_batch(lane, seen)) == expected


FCFS = [
    ("prompts by arrival, whatever their class", view("L5", "", "b4 b6", ""), "prefill b4 L5 b6"),
    ("decodes by arrival, whatever their class", view("", "L2 L5", "", "b1 b4"), "decode b1 L2 b4 L5"),
    ("prompts before decodes that are few", view("L9", "L2", "", "b1"), "prefill L9"),
    ("a full decode batch of both before prompts", view("L9", "L2", "b8", "b1 b3"), "decode b1 L2 b3"),
    ("decodes that waited long enough", view("L9", "L2", prefills=MAX_BATCH), "decode L2"),
    ("no floor: nobody is passed over", view("L9", "", "b8", "", due=True), "prefill b8 L9"),
    ("nothing", view(), None),
]


@pytest.mark.parametrize(("rule", "seen", "expected"), FCFS)
def test_fcfs_is_blind_to_class(rule, seen, expected):
    assert told(POLICIES["fcfs"].next_batch(FOREGROUND, seen)) == expected


@pytest.mark.parametrize("name", ["layer", "tile"])
def test_the_foreground_never_runs_best_effort_work_alone(name):
    assert get_policy(name).next_batch(FOREGROUND, view(be_prefill="b1", be_decode="b2")) is None


@pytest.mark.parametrize("name", ["layer", "tile"])
@pytest.mark.parametrize(("rule", "seen", "expected"), PATIENT)
def test_the_background_never_starts_while_urgent_work_runs(name, rule, seen, expected):
    busy = View(**{**vars(seen), "foreground_busy": True})
    assert get_policy(name).next_batch(BACKGROUND, busy) is None


@pytest.mark.parametrize("name", ["layer", "tile"])
def test_the_background_never_takes_urgent_work(name):
    assert get_policy(name).next_batch(BACKGROUND, view("L1", "L2")) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [("priority", "prefill b4"), ("layer", None), ("tile", None), ("fcfs", "prefill b4 L9")],
)
def test_when_the_floor_is_due(name, expected):
    """One lane runs best-effort work; of two, the foreground stands back."""
    seen = view("L9", "", "b4", "", due=True)
    assert told(get_policy(name).next_batch(FOREGROUND, seen)) == expected


def test_the_four_policies_and_where_their_pauses_stop():
    assert {
        name: (policy.name, policy.lanes, policy.granularity, policy.by_class)
        for name, policy in POLICIES.items()
    } == {
        "fcfs": ("fcfs", (FOREGROUND,), None, False),
        "priority": ("priority", (FOREGROUND,), None, True),
        "layer": ("layer", (FOREGROUND, BACKGROUND), "layer", True),
        "tile": ("tile", (FOREGROUND, BACKGROUND), "tile", True),
    }


def test_an_unknown_policy_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown policy 'lifo'; there are: fcfs, priority, layer, tile"):
        get_policy("lifo")
    with pytest.raises(TypeError, match=r"policy must be one of fcfs, .*, got None, which has no name"):
        get_policy(None)


class Lifo:
    """Somebody's own: the last one in goes first."""

    name = "lifo"
    lanes = (FOREGROUND,)
    granularity = None
    by_class = False

    def next_batch(self, lane, view):
        waiting = [*view.ls_prefill, *view.be_prefill]
        return Plan("prefill", [max(waiting, key=lambda r: r.arrival_s)]) if waiting else None


def test_a_policy_of_ones_own():
    scheduler = Scheduler(Lifo())
    assert scheduler.policy.name == "lifo"
    for name in ("L1", "b3", "L2"):
        scheduler.submit(request(name))
    assert [row.request.id for row in scheduler.next(FOREGROUND).rows] == ["b3"]


@pytest.mark.parametrize(
    ("attributes", "error", "said"),
    [
        ({"next_batch": None}, TypeError, r"which has no next_batch\(\)"),
        (
            {"lanes": ()},
            ValueError,
            r"lanes of policy 'lifo' must be 'foreground' with or without .*, got \(\)",
        ),
        ({"lanes": (BACKGROUND,)}, ValueError, "lanes of policy 'lifo' must be"),
        ({"lanes": (FOREGROUND, "middle")}, ValueError, "lanes of policy 'lifo' must be .*'middle'"),
        ({"granularity": "token"}, ValueError, "granularity of policy 'lifo' must be one of .*, got 'token'"),
    ],
)
def test_what_is_no_policy_is_refused_when_it_is_given(attributes, error, said):
    with pytest.raises(error, match=said):
        get_policy(type("Own", (Lifo,), attributes)())


def test_a_class_or_half_a_policy_is_no_policy():
    with pytest.raises(TypeError, match="got the class Lifo and not an object of it"):
        get_policy(Lifo)
    for left_out in ("name", "lanes", "granularity", "by_class"):
        names = {name: value for name, value in vars(Lifo).items() if name != left_out}
        with pytest.raises(TypeError, match=f"which has no {left_out}$"):
            get_policy(type("Half", (), names)())


def test_a_plan_of_nothing_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="requests of a plan must hold at least one"):
        Plan("prefill", [])
    with pytest.raises(ValueError, match='kind of a plan must be "prefill" or "decode", got \'Prefill\''):
        Plan("Prefill", [request("L1")])


# -- from a plan to rows -------------------------------------------------------------------------------

# Prompt lengths of urgent and best-effort requests, then the rows: (request, tokens).
ROWS = [
    ("one chunk of a long prompt", {"prefill_tokens": 16}, [40], [], [("L0", 16)]),
    ("as many prompts as fit", {"prefill_tokens": 16}, [6, 6, 6], [], [("L0", 6), ("L1", 6), ("L2", 4)]),
    ("as many rows as fit", {"prefill_tokens": 16, "max_batch": 2}, [2, 2, 2], [], [("L0", 2), ("L1", 2)]),
    ("nobody rides by default", {"prefill_tokens": 16}, [4], [4], [("L0", 4)]),
    (
        "riders up to their limit",
        {"prefill_tokens": 16, "top_up_tokens": 5},
        [4],
        [3, 9],
        [("L0", 4), ("b0", 3), ("b1", 2)],
    ),
    (
        "riders up to the iteration's",
        {"prefill_tokens": 6, "top_up_tokens": 5},
        [4],
        [9],
        [("L0", 4), ("b0", 2)],
    ),
    ("riders up to the rows", {"max_batch": 2, "top_up_tokens": 50}, [4], [3, 9], [("L0", 4), ("b0", 3)]),
    ("no room to ride", {"prefill_tokens": 4, "top_up_tokens": 50}, [4], [3], [("L0", 4)]),
]


@pytest.mark.parametrize(("rule", "limits", "urgent", "patient", "expected"), ROWS)
@pytest.mark.parametrize("policy", ["priority", "layer", "tile"])
def test_rows_of_a_prefill(policy, rule, limits, urgent, patient, expected):
    scheduler = Scheduler(policy, Limits(**limits))
    for kind, priority, lengths in (("L", LS, urgent), ("b", BE, patient)):
        for i, length in enumerate(lengths):
            scheduler.submit(Request(f"{kind}{i}", [0] * length, priority))
    batch = scheduler.next(FOREGROUND)
    assert [(row.request.id, len(row.tokens)) for row in batch.rows] == expected
    assert [row.samples for row in batch.rows] == [
        len(row.tokens) == len(row.request.prompt) for row in batch.rows
    ]


@pytest.mark.parametrize(("policy", "rows"), [("fcfs", 3), ("priority", 3), ("layer", 3), ("tile", 3)])
def test_best_effort_rows_ride_in_an_urgent_decode(policy, rows):
    scheduler = Scheduler(policy, Limits(max_batch=rows, be_floor=0.0))
    for name in ("b1", "b2", "b3"):
        scheduler.submit(request(name))
    lane = scheduler.policy.lanes[-1]
    batch = scheduler.next(lane)
    scheduler.complete(batch, [(5, 1.0)] * len(batch.rows))
    scheduler.submit(request("L4"))
    batch = scheduler.next(FOREGROUND)
    if policy == "fcfs":
        assert [row.request.id for row in batch.rows] == ["b1", "b2", "b3"]
        return
    assert (batch.kind, [row.request.id for row in batch.rows]) == ("prefill", ["L4"])
    scheduler.complete(batch, [(5, 1.0)])
    batch = scheduler.next(FOREGROUND)
    assert (batch.kind, [row.request.id for row in batch.rows]) == ("decode", ["L4", "b1", "b2"])
    assert [(row.start, row.tokens, row.samples) for row in batch.rows] == [(2, [5], True)] * 3
    assert batch.urgent
