"""The public names, once: `__init__.py` reads them from here, and so do type checkers."""

from .affinity.placement import AffinityPlan, crossings, place_by_affinity
from .choice.expert_kind import KindChoice, KindCost, choose_kind
from .homes.home_plan import HomePlan, plan_homes, spilled_imbalance
from .known.known_plan import KnownPlan, plan_known
from .known.known_routes import KnownRoutes, count_choices
from .plan.cost import LAER, STEP, Cost, CostModel
from .plan.parameters import SolveParameters
from .plan.plan import Plan
from .plan.termination import Termination
from .policies.registry import Policy, Progress, available_policies, policy
from .problem.cluster import Cluster, Link
from .problem.constraints import Constraints
from .problem.demand import Demand
from .problem.errors import InfeasibleError, ProblemError
from .problem.forecast import Widening, forecast, widened
from .problem.forecast_spec import Forecast, ForecastMethod
from .problem.layout import EMPTY, Layout
from .problem.moves import Moves
from .problem.problem import ExpertSpec, Problem
from .problem.split_rules import RANK_RULES, SplitRule
from .routing.balanced_assignment import Assignment, balanced_assignment, optimal_assignment
from .solving.layers import solve_layers
from .solving.sharing import Shares, share_slots
from .solving.solver import evaluate, solve, solve_anytime
from .solving.warm import warm_up
from .spill.llep import LlepPlanner
from .spill.options import NO_CAP, SpillOptions, transfer_tokens
from .spill.quota import QuotaPlanner
from .spill.reference import ExactSpill, solve_exactly
from .spill.spill_plan import SpillPlan
from .split.rules import Split

__all__ = [
    "EMPTY",
    "LAER",
    "NO_CAP",
    "RANK_RULES",
    "STEP",
    "AffinityPlan",
    "Assignment",
    "Cluster",
    "Constraints",
    "Cost",
    "CostModel",
    "Demand",
    "ExactSpill",
    "ExpertSpec",
    "Forecast",
    "ForecastMethod",
    "HomePlan",
    "InfeasibleError",
    "KindChoice",
    "KindCost",
    "KnownPlan",
    "KnownRoutes",
    "Layout",
    "Link",
    "LlepPlanner",
    "Moves",
    "Plan",
    "Policy",
    "Problem",
    "ProblemError",
    "Progress",
    "QuotaPlanner",
    "Shares",
    "SolveParameters",
    "SpillOptions",
    "SpillPlan",
    "Split",
    "SplitRule",
    "Termination",
    "Widening",
    "available_policies",
    "balanced_assignment",
    "choose_kind",
    "count_choices",
    "crossings",
    "evaluate",
    "forecast",
    "optimal_assignment",
    "place_by_affinity",
    "plan_homes",
    "plan_known",
    "policy",
    "share_slots",
    "solve",
    "solve_anytime",
    "solve_exactly",
    "solve_layers",
    "spilled_imbalance",
    "transfer_tokens",
    "warm_up",
    "widened",
]
