"""A Prometheus for tests: scrapes one daemon, and evaluates what the alerts ask for; see `evaluate` for how much."""

from __future__ import annotations

import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import eq, gt, lt
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.support.daemon import WAIT_S, DaemonProcess
from tests.support.repository import ROOT

__all__ = ["Prometheus", "Scrape", "Vector", "alerts", "evaluate"]

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Value = Vector | float

SECONDS = {"s": 1, "m": 60, "h": 3_600}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {"==": eq, ">": gt, "<": lt}
TOKEN = re.compile(r'\s*(\d+[smh]|\d+(?:\.\d+)?|\w+|"[^"]*"|==|=~|[-=<>*(){}\[\],])')


def alerts() -> list[dict[str, Any]]:
    """The alerts that are deployed."""
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@dataclass(frozen=True)
class Scrape:
    """What there was at a time, by the metric's name."""

    time_s: float
    samples: dict[str, Vector]


@dataclass
class Prometheus:
    """Scrapes a daemon whenever it is told to."""

    daemon: DaemonProcess
    scrapes: list[Scrape] = field(default_factory=list)

    def scrape(self) -> None:
        """Read all metrics; a daemon that does not answer is noted as `up` 0."""
        target = {"job": "moeplan", "instance": self.daemon.metrics}
        samples: dict[str, Vector] = {}
        now = time.time()
        try:
            with urllib.request.urlopen(f"http://{self.daemon.metrics}/metrics", timeout=WAIT_S) as reply:
                families = list(text_string_to_metric_families(reply.read().decode()))
        except urllib.error.URLError:
            families = []
        for sample in (sample for family in families for sample in family.samples):
            samples.setdefault(sample.name, {})[frozenset((sample.labels | target).items())] = sample.value
        samples["up"] = {frozenset(target.items()): float(bool(families))}
        self.scrapes.append(Scrape(now, samples))

    def fires(self, alert: str) -> bool:
        """Scrape, and see whether the alert's condition holds now; how long it must hold (`for`) is left out."""
        (rule,) = (rule for rule in alerts() if rule["alert"] == alert)
        self.scrape()
        return bool(evaluate(rule["expr"], self.scrapes))


def evaluate(expression: str, scrapes: list[Scrape]) -> Value:
    """The value of an expression at the last scrape, in the part of PromQL that the alerts use.

    That is: selectors with = and =~; rate, increase and avg_over_time of a range; sum by; histogram_quantile; time();
    numbers; * and -; ==, > and < (filters); and. Vectors are matched by all of their labels. Rates are those between
    the first and the last scrape of the range, where Prometheus extrapolates to its ends.

    Raises:
        ValueError: it is written otherwise.
    """
    return _Evaluation(expression, scrapes).whole()


class _Evaluation:
    def __init__(self, expression: str, scrapes: list[Scrape]) -> None:
        self._expression, self._scrapes = expression, scrapes
        self._tokens = TOKEN.findall(expression)
        if "".join(self._tokens) != re.sub(r"\s(?=[^\"]*(?:\"[^\"]*\"[^\"]*)*$)", "", expression):
            raise self._unknown("a character")

    def whole(self) -> Value:
        value = self._and()
        if self._tokens:
            raise self._unknown(self._tokens[0])
        return value

    def _and(self) -> Value:
        left = self._comparison()
        while self._found("and"):
            right = self._comparison()
            if isinstance(left, float) or isinstance(right, float):
                raise self._unknown("and of a number")
            left = {labels: value for labels, value in left.items() if labels in right}
        return left

    def _comparison(self) -> Value:
        left = self._difference()
        for sign, holds in COMPARISONS.items():
            if self._found(sign):
                if isinstance(left, float):
                    raise self._unknown("a comparison with a number on the left")
                right = self._difference()
                return {
                    labels: value
                    for labels, value in left.items()
                    if holds(value, right if isinstance(right, float) else right.get(labels, math.nan))
                }
        return left

    def _difference(self) -> Value:
        left = self._product()
        while self._found("-"):
            left = self._calculated(left, self._product(), lambda a, b: a - b)
        return left

    def _product(self) -> Value:
        left = self._operand()
        while self._found("*"):
            left = self._calculated(left, self._operand(), lambda a, b: a * b)
        return left

    def _calculated(self, left: Value, right: Value, operation: Callable[[float, float], float]) -> Value:
        if not isinstance(right, float):
            raise self._unknown("a vector on the right of * or -")
        if isinstance(left, float):
            return operation(left, right)
        return {labels: operation(value, right) for labels, value in left.items()}

    def _operand(self) -> Value:
        name = self._next()
        if re.fullmatch(r"[\d.]+", name):
            return float(name)
        if name == "(":
            return self._closed(self._and())
        if name == "sum":
            return self._sum()
        if not self._found("("):
            return self._selected(self._scrapes[-1], name, self._matchers())
        match name:
            case "time":
                return self._closed(self._scrapes[-1].time_s)
            case "histogram_quantile":
                quantile = float(self._next())
                self._expect(",")
                buckets = self._and()
                if isinstance(buckets, float):
                    raise self._unknown("a quantile of a number")
                return self._closed(_quantiles(quantile, buckets))
            case "rate" | "increase" | "avg_over_time":
                return self._closed(self._over_time(name))
        raise self._unknown(name)

    def _sum(self) -> Vector:
        self._expect("by")
        kept = self._listed("(", ")", self._next)
        self._expect("(")
        summed: Vector = {}
        terms = self._and()
        if isinstance(terms, float):
            raise self._unknown("a sum of a number")
        for labels, value in terms.items():
            group = frozenset((label, its) for label, its in labels if label in kept)
            summed[group] = summed.get(group, 0.0) + value
        return self._closed(summed)

    def _over_time(self, function: str) -> Vector:
        name, matchers = self._next(), self._matchers()
        self._expect("[")
        length = self._next()
        self._expect("]")
        from_s = self._scrapes[-1].time_s - int(length[:-1]) * SECONDS[length[-1]]
        series: dict[Labels, list[tuple[float, float]]] = {}
        for scrape in self._scrapes:
            if scrape.time_s >= from_s:
                for labels, value in self._selected(scrape, name, matchers).items():
                    series.setdefault(labels, []).append((scrape.time_s, value))
        if function == "avg_over_time":
            return {labels: sum(value for _, value in found) / len(found) for labels, found in series.items()}
        vector: Vector = {}
        for labels, found in series.items():
            (first_s, _), (last_s, _) = found[0], found[-1]
            if last_s > first_s:  # one sample alone says nothing, even of a counter that has only just begun
                values = [value for _, value in found]
                # A counter that is less than before began anew.
                steps = (after - before if after >= before else after for before, after in pairwise(values))
                vector[labels] = sum(steps) / (1.0 if function == "increase" else last_s - first_s)
        return vector

    def _matchers(self) -> list[tuple[str, re.Pattern[str]]]:
        def matcher() -> tuple[str, re.Pattern[str]]:
            label, how, value = self._next(), self._next(), self._next()[1:-1]
            if how not in ("=", "=~"):
                raise self._unknown(how)
            return label, re.compile(value if how == "=~" else re.escape(value))

        return self._listed("{", "}", matcher) if self._tokens[:1] == ["{"] else []

    @staticmethod
    def _selected(scrape: Scrape, name: str, matchers: list[tuple[str, re.Pattern[str]]]) -> Vector:
        return {
            labels: value
            for labels, value in scrape.samples.get(name, {}).items()
            if all(pattern.fullmatch(dict(labels).get(label, "")) for label, pattern in matchers)
        }

    def _listed(self, begin: str, end: str, item: Callable[[], Any]) -> list[Any]:
        self._expect(begin)
        items = [item()]
        while self._found(","):
            items.append(item())
        self._expect(end)
        return items

    def _closed(self, value: Any) -> Any:
        self._expect(")")
        return value

    def _found(self, token: str) -> bool:
        if self._tokens[:1] == [token]:
            del self._tokens[0]
            return True
        return False

    def _expect(self, token: str) -> None:
        if not self._found(token):
            raise self._unknown(f"no {token}")

    def _next(self) -> str:
        if not self._tokens:
            raise self._unknown("an end too early")
        return str(self._tokens.pop(0))

    def _unknown(self, what: str) -> ValueError:
        return ValueError(
            f"{self._expression!r}: {what} is not known here; write it otherwise, or teach it to this module"
        )


def _quantiles(quantile: float, buckets: Vector) -> Vector:
    """As Prometheus has it: linear within a bucket, the end of the last finite one above it, NaN of nothing."""
    groups: dict[Labels, dict[float, float]] = {}
    for labels, count in buckets.items():
        end = float(dict(labels)["le"])
        groups.setdefault(frozenset((label, its) for label, its in labels if label != "le"), {})[end] = count
    return {labels: _quantile(quantile, sorted(counts.items())) for labels, counts in groups.items()}


def _quantile(quantile: float, counts: list[tuple[float, float]]) -> float:
    rank = quantile * counts[-1][1]
    start, below = 0.0, 0.0
    for end, count in counts:
        if count >= rank > 0:
            return start if math.isinf(end) else start + (end - start) * (rank - below) / (count - below)
        start, below = end, count
    return math.nan
