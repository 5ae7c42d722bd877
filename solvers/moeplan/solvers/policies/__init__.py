"""One file per policy; `moeplan.solvers.policy` finds them by looking here."""
