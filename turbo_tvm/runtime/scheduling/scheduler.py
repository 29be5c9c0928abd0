"""The batch scheduler: which of the waiting requests run together. Small pure functions, one per policy.

    POLICIES[name](requests, cost, limits) -> batches, each a list of request ids, in the order in which they should run

cost: `cost(lengths) -> seconds`, the only thing that a policy knows about a model. limits: what binds every policy.

- `nobatch`: every request by itself, in order of arrival.
- `naive`: everything that waits, in order of arrival, in as few batches as the limits allow.
- `token_budget`: first come, first served, under the limit on tokens.
- `dp`: the least total time (Fang et al., "TurboTransformers", PPoPP 2021; `partition` says when it is exact).
- `dp_latency`: the least mean time until a request is answered.
- `deadline`: the most requests inside their deadlines.

Higher priorities run first, each planned by itself. Whatever the policy and the priorities, a request that has waited
for `BatchLimits.max_wait_s` is in the next batch unless others have waited longer. `triggers` decide when a policy is
asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from turbo_tvm.errors import InputError
from turbo_tvm.runtime.scheduling import partition
from turbo_tvm.runtime.scheduling.batch_limits import BatchLimits, Request
from turbo_tvm.runtime.scheduling.partition import Cost

LOOKED_AT = 64  # most urgent requests that `deadline` tries to keep on time; the others are planned as `dp` does


Batches = list[list[Any]]
Groups = list[list[Request]]
Policy = Callable[[Sequence[Request], Cost, BatchLimits], Batches]


def nobatch(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Put every request in a batch of its own, first come, first served."""
    return _ids([r] for r in _in_order(requests, limits))


def naive(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Put everything that waits in batches in order of arrival; a batch is full when a limit says so."""
    return _ids(_filled(_in_order(requests, limits), limits))


def token_budget(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Fill batches first come, first served, until the next request exceeds the limit on tokens.

    Raises InputError without `max_tokens`; the other limits bind too.
    """
    if limits.max_tokens is None:
        raise InputError("the policy 'token_budget' needs a limit on tokens: BatchLimits(max_tokens=...)")
    return naive(requests, cost, limits)


def dp(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Find the batches of the least total time; those that answer most requests per second run first."""
    return _planned(requests, limits, lambda some: _least_total(some, cost, limits))


def dp_latency(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Find the batches of the least mean time until a request is answered, among runs of requests sorted by length.

    A batch that starts when n requests are not answered delays all n: its time counts n times.
    """

    def plan(some: Sequence[Request]) -> Groups:
        ordered = _by_length(some)
        starts = partition.best_runs(_lengths(ordered), cost, limits, weigh_waiting=True)
        return _answering_first(_cut(ordered, starts), cost)

    return _planned(requests, limits, plan)


def deadline(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Batches:
    """Answer many requests inside their deadlines; those that cannot make it run last, in the least total time.

    Requests join in order of deadline, in runs of that order that finish as early as can be. When one cannot make it,
    the longest so far is put off. For single requests this is Moore and Hodgson's rule (1968), which is exact.
    """

    def plan(some: Sequence[Request]) -> Groups:
        urgent = sorted((r for r in some if r.deadline_s is not None), key=lambda r: (_due(r), r.arrival_s))
        hopeless = {r.id for r in urgent if limits.now_s + cost([r.length]) > _due(r)}
        candidates = [r for r in urgent if r.id not in hopeless][:LOOKED_AT]
        runs = partition.EarliestRuns(cost, limits)
        kept: list[Request] = []
        for request in candidates:
            kept.append(request)
            runs.append(request.length, _due(request))
            while not runs.on_time:
                worst = max(range(len(kept)), key=lambda i: (kept[i].length, i))
                del kept[worst]
                runs.remove(worst)
        chosen = {r.id for r in kept}
        hopeful = [r for r in some if r.id not in chosen and r.id not in hopeless]
        late = [r for r in some if r.id in hopeless]
        return [*_cut(kept, runs.starts()), *_least_total(hopeful, cost, limits), *_least_total(late, cost, limits)]

    return _planned(requests, limits, plan)


POLICIES: dict[str, Policy] = {
    "nobatch": nobatch,
    "naive": naive,
    "token_budget": token_budget,
    "dp": dp,
    "dp_latency": dp_latency,
    "deadline": deadline,
}
FIRST_COME = (nobatch, naive, token_budget)


def next_batch(requests: Sequence[Request], policy: Policy, cost: Cost, limits: BatchLimits) -> list[Any]:
    """Return the ids to run next: the first batch of a plan, which is made anew when that batch is done.

    requests: in order of arrival.
    """
    if len(requests) == 1:
        return [requests[0].id]
    if policy in FIRST_COME and limits.max_batch is not None and len({r.priority for r in requests}) == 1:
        requests = requests[: limits.max_batch]  # no other can be in the first batch
    return policy(requests, cost, limits)[0]


def policy(name: str) -> Policy:
    """Return the policy of this name. Raises InputError, with the names that there are."""
    if name not in POLICIES:
        raise InputError(f"there is no scheduling policy {name!r}; use one of {', '.join(POLICIES)}")
    return POLICIES[name]


def _planned(requests: Sequence[Request], limits: BatchLimits, plan: Callable[[Sequence[Request]], Groups]) -> Batches:
    """Plan each priority by itself, the highest first; then move up the batches with requests that waited too long."""
    if len(requests) == 1:
        return [[requests[0].id]]
    groups: Groups = []
    for priority in sorted({r.priority for r in requests}, reverse=True):
        groups += plan([r for r in requests if r.priority == priority])
    if limits.max_wait_s is not None:
        oldest = [min(group, key=lambda r: r.arrival_s) for group in groups]
        order = sorted(range(len(groups)), key=lambda i: oldest[i].arrival_s if limits.overdue(oldest[i]) else math.inf)
        groups = [groups[i] for i in order]
    return _ids(groups)


def _in_order(requests: Sequence[Request], limits: BatchLimits) -> list[Request]:
    """Sort requests that have waited too long by arrival, and behind them the others by priority and arrival."""
    if len({r.priority for r in requests}) == 1:
        return sorted(requests, key=lambda r: r.arrival_s)
    return sorted(requests, key=lambda r: (0, 0, r.arrival_s) if limits.overdue(r) else (1, -r.priority, r.arrival_s))


def _by_length(requests: Sequence[Request]) -> list[Request]:
    return sorted(requests, key=lambda r: (r.length, r.arrival_s))


def _ids(groups: Iterable[Sequence[Request]]) -> Batches:
    return [[r.id for r in group] for group in groups]


def _due(request: Request) -> float:
    return math.inf if request.deadline_s is None else request.deadline_s


def _lengths(group: Sequence[Request]) -> list[int]:
    return [r.length for r in group]


def _cut(ordered: Sequence[Request], starts: Sequence[int]) -> Groups:
    """Cut an ordered list into runs that begin at `starts`."""
    ends = [*starts[1:], len(ordered)] if starts else []
    return [list(ordered[start:end]) for start, end in zip(starts, ends, strict=True)]


def _filled(ordered: Sequence[Request], limits: BatchLimits) -> Groups:
    """Fill batches with the requests in this order, each as long as the limits allow."""
    groups: Groups = []
    lengths: list[int] = []
    tokens = 0
    for request in ordered:
        tokens += request.length
        full = limits.max_batch is not None and len(lengths) >= limits.max_batch
        full = full or (limits.max_tokens is not None and tokens > limits.max_tokens)
        if groups and not full and limits.fits_memory([*lengths, request.length]):
            groups[-1].append(request)
            lengths.append(request.length)
        else:
            groups.append([request])
            lengths, tokens = [request.length], request.length
    return groups


def _answering_first(groups: Groups, cost: Cost) -> Groups:
    """Sort batches by requests per second, the most first: the least mean completion time (Smith, 1956)."""
    return sorted(groups, key=lambda group: cost(_lengths(group)) / len(group)) if len(groups) > 1 else groups


def _least_total(requests: Sequence[Request], cost: Cost, limits: BatchLimits) -> Groups:
    """Return a partition of the least total cost, the batches that answer most requests per second first."""
    ordered, lengths = _by_length(requests), sorted(r.length for r in requests)
    if len(lengths) <= partition.EXACT:
        groups = [[ordered[i] for i in group] for group in partition.best_subsets(lengths, cost, limits)]
    else:
        groups = _cut(ordered, partition.best_runs(lengths, cost, limits))
    return _answering_first(groups, cost)
