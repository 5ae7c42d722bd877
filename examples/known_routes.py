"""One step of reinforcement learning whose routes the rollout engine has recorded, planned before it runs.

    python examples/known_routes.py

The samples are made up, as a trainer has them: eight answers to each of 32 prompts, next to each other, which prefer
the experts of their prompt. 16 ranks in four link domains train them in four micro-batches.
"""

from __future__ import annotations

import numpy as np

from moeplan.solvers import KnownPlan, KnownRoutes, SpillOptions, count_choices, plan_known

PROMPTS, ANSWERS, LAYERS, EXPERTS, TOP_K = 32, 8, 4, 64, 4
RANKS, DOMAIN, SPARE = 16, 4, 2


def recorded(seed: int = 0) -> list[np.ndarray]:
    """int64[tokens, layers, k] of each sample: experts of every token, without one twice."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(PROMPTS):
        preferred = rng.normal(0, 1, (LAYERS, EXPERTS))
        for _ in range(ANSWERS):
            scores = preferred + rng.gumbel(size=(int(rng.integers(100, 400)), LAYERS, EXPERTS))
            samples.append(np.argpartition(-scores, TOP_K, axis=2)[..., :TOP_K])
    return samples


def show(name: str, plan: KnownPlan) -> None:
    replicas = [spill.replicas for m in range(plan.routes.micro_batches) for spill in plan.spills(m)]
    print(
        f"{name:22} {plan.after:.4f}   {plan.moved.sum() / plan.home.size:5.1%} of experts move,"
        f" {np.mean(replicas):4.1f} replicas of a layer and micro-batch"
    )


def main() -> None:
    routes = KnownRoutes.by_rank(count_choices(recorded(), EXPERTS), RANKS, size=PROMPTS * ANSWERS // RANKS // 4)
    options = SpillOptions.uniform(EXPERTS, RANKS, SPARE, domain=DOMAIN)
    few = EXPERTS // 10
    show("spilling alone", plan_known(routes, options, max_moves=0, reordered=False))
    show("order", plan_known(routes, options, max_moves=0))
    show("homes", plan_known(routes, options, max_moves=few, reordered=False))
    show("homes and order", plan_known(routes, options, max_moves=few))


if __name__ == "__main__":
    main()
