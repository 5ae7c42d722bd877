"""One file per policy; `moeplan.solvers.policies.registry` finds them by looking here."""
