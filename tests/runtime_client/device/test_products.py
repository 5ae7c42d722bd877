"""Products by expert on CPUs, in Triton's interpreter, against those of each expert on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeplan.runtime_client.device.launches import Launch
from moeplan.runtime_client.device.products import Owned, Products, Rows, tile_rows
from moeplan.runtime_client.device.routes import BORROWED, LENT, LOAN, AnswerShape

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has wheels for Linux only")

CPU = torch.device("cpu")


def drawn(rng: np.random.Generator, tokens: list[int]) -> tuple[Rows, list[slice]]:
    """Rows of experts with so many tokens, and where they are, in one part of some memory."""
    tile = tile_rows(CPU)
    sizes = [-(-count // tile) * tile for count in tokens]
    ends = np.cumsum(sizes)
    begins = ends - sizes
    fills = begins + tokens
    room = int(ends[-1]) + tile * int(rng.integers(1, 3))
    places = (torch.from_numpy(part.astype(np.int32)) for part in (ends, fills))
    rows = Rows(torch.zeros(99, dtype=torch.int32), slice(0, room), *places)
    return rows, [slice(int(begin), int(end)) for begin, end in zip(begins, fills, strict=True)]


def filled(rows: Rows, places: list[slice], width: int) -> Tensor:
    """Numbers in the rows of experts, zeros up to the end of their tiles, and what is no number behind them all."""
    values = torch.full((rows.part.stop, width), float("nan"))
    values[: int(rows.ends[-1])] = 0
    for place in places:
        values[place] = torch.randn(place.stop - place.start, width)
    return values


def apart(rows: Rows, owned: int) -> tuple[Rows, slice]:
    """Lent experts in rows of their own, which begin where those at home end; these rows."""
    begin = int(rows.ends[owned - 1])
    lent = Rows(
        rows.answer, slice(0, rows.part.stop - begin), *(part[owned:] - begin for part in (rows.ends, rows.fills))
    )
    return lent, slice(begin, rows.part.stop)


def products_of(seed: int) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    owned, spare = int(rng.integers(1, 6)), int(rng.integers(0, 4))
    shape = AnswerShape(owned + 2, spare + 1, owned, spare)
    products = Products(shape, CPU, most=1000)
    depth, width = (8 * int(rng.integers(1, 20)) for _ in range(2))
    tokens = (rng.integers(0, 40, owned + spare) * (rng.random(owned + spare) < 0.7)).tolist()
    borrowed = int(rng.integers(0, spare + 1))
    tokens[owned + borrowed :] = [0] * (spare - borrowed)
    rows, places = drawn(rng, tokens)
    matrices = torch.randn(owned + spare, width * depth + 8)[:, : width * depth].unflatten(1, (width, depth))

    left, right = filled(rows, places, width), filled(rows, places, depth)
    ahead = products.apply(right, matrices, rows.ends)
    back = products.apply_back(left, matrices, rows.ends)
    first, halves = int(rng.integers(0, owned + spare)), torch.full_like(ahead, float("nan"))
    products.apply(right, matrices[first:], rows.ends, halves)  # of the last experts
    begin = int(rows.ends[first - 1]) if first else 0
    assert halves[:begin].isnan().all()
    assert torch.equal(halves[begin : rows.ends[-1]], ahead[begin : rows.ends[-1]])
    if first:  # and of the others
        products.apply(right, matrices[:first], rows.ends[:first], halves)
    assert torch.equal(halves[: rows.ends[-1]], ahead[: rows.ends[-1]])
    for place, matrix in zip(places, matrices, strict=True):
        torch.testing.assert_close(ahead[place], right[place] @ matrix.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back[place], left[place] @ matrix, rtol=1e-4, atol=1e-4)

    lent = rng.permutation(owned)[: int(rng.integers(0, owned + 1))]
    answer = torch.zeros(shape.words, dtype=torch.int32)
    answer[LENT], answer[BORROWED] = len(lent), borrowed
    answer[shape.loans + LOAN * torch.arange(len(lent))] = torch.from_numpy(lent.astype(np.int32))
    rows = replace(rows, answer=answer)
    exact = torch.stack([left[place].T @ right[place] for place in places])
    scales = torch.full((owned, 1, 1), 0.25)
    scales[lent] = 1.0
    own = torch.full((owned, width * depth + 16), float("nan"), dtype=torch.float64)
    inside = own[:, 8:-8].unflatten(1, (width, depth))
    lent_to = torch.full((spare, width * depth + 8), 7.0)
    theirs = lent_to[:, 8:].unflatten(1, (width, depth))
    away, here = apart(rows, owned)
    for together in (True, False):
        for times in (1, 2):  # a round, and another one, which is added
            if together and spare:
                products.differentiate(left, right, rows, inside, theirs, scale=0.25, more=times > 1)
            else:
                products.differentiate(left, right, rows, inside, scale=0.25, more=times > 1)
            if not together and spare:  # in rows of their own
                products.differentiate(left[here], right[here], away, None, theirs, scale=0.25, more=times > 1)
            torch.testing.assert_close(inside.float(), times * scales * exact[:owned], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs[:borrowed], times * exact[owned : owned + borrowed], rtol=1e-4, atol=1e-4)
        assert (theirs[borrowed:] == 7.0).all()  # nobody's, and left alone
        assert (lent_to[:, :8] == 7.0).all()
        assert own[:, :8].isnan().all()
        assert own[:, -8:].isnan().all()


def heavy_experts(seed: int) -> None:
    """Gradients of experts with most of the rows, whose last tiles are summed in parts."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    shape = AnswerShape(6, 3, 3, 3)
    products = Products(shape, CPU, most=1000)
    products._tiles, products._blocks = products._tiles._replace(high=256, wide=256), 4  # a tile for all of a gradient
    products._sums = torch.empty(2 * 4 * 256 * 256)
    height, width = 8 * int(rng.integers(1, 10)) * 2 - 8, 8 * int(rng.integers(1, 20))
    heavy = int(rng.integers(0, 3))
    tokens = rng.integers(0, 9, 6)
    tokens[[heavy, 3 + heavy]] = rng.integers(100, 300, 2)
    rows, places = drawn(rng, tokens.tolist())
    left, right = filled(rows, places, height), filled(rows, places, width)
    answer = torch.zeros(shape.words, dtype=torch.int32)
    answer[BORROWED] = 3
    rows = replace(rows, answer=answer)
    exact = torch.stack([left[place].T @ right[place] for place in places])
    home, (away, here) = Rows(answer, rows.part, rows.ends[:3], rows.fills[:3]), apart(rows, 3)
    out = torch.full((6, height, width), float("nan"))
    alone = (left, right, home, out[:3], None), (left[here], right[here], away, None, out[3:])
    for calls in (alone, ((left, right, rows, out[:3], out[3:]),)):
        for times in (1, 2):
            for how in calls:
                products._sums.fill_(float("nan"))
                products.differentiate(*how, scale=0.5, more=times > 1)
                assert not products._sums.isnan().all(), "nothing was summed in parts"
            torch.testing.assert_close(out[:3], times * 0.5 * exact[:3], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out[3:], times * exact[3:], rtol=1e-4, atol=1e-4)


def owned_parts(seed: int) -> None:
    """Gradients of which parts go elsewhere, scaled: for some experts, and wherever parts begin and end."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    replicas = int(rng.integers(1, 5))
    products = Products(AnswerShape(replicas, 0, replicas, 0), CPU, most=1000)
    rows, places = drawn(rng, [int(rng.choice([0, 5, 9, 200])) for _ in range(replicas)])
    height, width = (8 * int(rng.integers(1, 9)) for _ in range(2))
    left, right = filled(rows, places, height), filled(rows, places, width)
    part = int(rng.integers(1, 2 * height * width))
    dtype = torch.float64 if seed % 3 == 0 else torch.float32
    expected = torch.full((replicas, height, width), float("nan"), dtype=torch.float16)
    products.differentiate(left, right, rows, expected)
    line = torch.from_numpy(rng.permutation(2 * replicas)[:replicas].astype(np.int32))
    line[torch.from_numpy(rng.random(replicas) < 0.3)] = -1
    one, other = rng.integers(-height * width, height * width, 2).tolist()
    for begin, scale in ((one, 1 / 3), (other, 1 / 3), (other, 0.7)):
        total = torch.full((2 * replicas, part), -7.0, dtype=dtype)
        out = torch.full_like(expected, -7.0)
        products.differentiate(left, right, rows, out, owned=Owned(total, line, begin, scale))
        assert_apart(expected.flatten(1), out.flatten(1), Owned(total, line, begin, scale))


def beside_lent(seed: int) -> None:
    """Parts go elsewhere for experts at home alone; lent ones are in any distance, by the same products."""
    torch.manual_seed(seed)
    owned, spare, height, width = 3, 2, 16, 24
    shape = AnswerShape(5, 3, owned, spare)
    products = Products(shape, CPU, most=1000)
    rows, places = drawn(np.random.default_rng(seed), [9, 5, 0, 7, 12])
    left, right = filled(rows, places, height), filled(rows, places, width)
    answer = torch.zeros(shape.words, dtype=torch.int32)
    answer[BORROWED] = spare
    rows = replace(rows, answer=answer)
    exact = torch.stack([left[place].T @ right[place] for place in places])
    line = torch.tensor([2, -1, 0, 1, 1], dtype=torch.int32)  # behind the first three: what must not be read
    for room in (0, 8):
        home = torch.full((owned, height, width), 7.0)
        lent = torch.full((spare, height * width + room), 7.0)[:, : height * width].unflatten(1, (height, width))
        products.differentiate(left, right, rows, home, lent, scale=0.5)
        torch.testing.assert_close(lent, exact[owned:], rtol=1e-4, atol=1e-4)
        lent.fill_(7.0)
        total = torch.full((owned, 40), -7.0)
        products.differentiate(left, right, rows, home, lent, scale=0.5, owned=Owned(total, line[:owned], 8, 2.0))
        torch.testing.assert_close(lent, exact[owned:], rtol=1e-4, atol=1e-4)
        assert (total[1] == -7.0).all()
        torch.testing.assert_close(total[[2, 0]], exact[[0, 2]].flatten(1)[:, 8:48], rtol=1e-4, atol=1e-4)


def assert_apart(known: Tensor, found: Tensor, owned: Owned) -> None:
    """The parts of gradients [replicas, elements] are where they belong, scaled, and nothing else has been written."""
    total, line, begin, part = owned.total, owned.line, owned.begin, owned.total.shape[1]
    apart = torch.zeros(known.shape[1], dtype=torch.bool)
    apart[max(begin, 0) : max(begin + part, 0)] = True
    for replica, to in enumerate(line.tolist()):
        there = apart & (to >= 0)
        assert torch.equal(found[replica, ~there], known[replica, ~there])
        assert (found[replica, there] == -7.0).all()
        first = max(-begin, 0)
        if to >= 0:
            got, wanted = total[to, first : first + int(apart.sum())], known[replica, apart].to(total.dtype)
            assert torch.equal(got, wanted * torch.tensor(owned.scale, dtype=total.dtype))
            total[to, first : first + int(apart.sum())] = -7.0
    assert (total == -7.0).all()  # and nowhere else


class _Nothing(Launch):
    """Leaves memory as it is."""

    def __call__(self, *_: Any) -> None:
        pass


def many_tiles(seed: int) -> bool:
    """Gradients of many tiles by any number of blocks, whose parts have no more room than they need; whether there were
    parts.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    owned, spare = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    shape = AnswerShape(owned + 2, spare + 1, owned, spare)
    products = Products(shape, CPU, most=1000)
    high, wide = 8 * int(rng.integers(1, 3)), 16
    products._tiles = products._tiles._replace(high=high, wide=wide)
    products._blocks = int(rng.integers(1, 14))
    room = torch.empty(2, 2 * products._blocks * high * wide)
    products._sums, behind = room
    height, width = (8 * int(rng.integers(1, 7)) for _ in range(2))
    borrowed = int(rng.integers(0, spare + 1))
    tokens = rng.integers(0, 9, owned + spare)
    heavy = rng.random(owned + spare) < rng.choice([0.3, 0.9])
    tokens[heavy] = rng.integers(31, 80, int(heavy.sum()))
    tokens[owned + borrowed :] = 0
    rows, places = drawn(rng, tokens.tolist())
    left, right = filled(rows, places, height), filled(rows, places, width)
    answer = torch.zeros(shape.words, dtype=torch.int32)
    answer[LENT], answer[BORROWED] = 1, borrowed
    answer[shape.loans] = sent = int(rng.integers(owned))
    exact = torch.stack([left[place].T @ right[place] for place in places])
    exact[:owned] *= 0.5
    exact[sent] *= 2
    rows = replace(rows, answer=answer)
    some = replace(rows, ends=rows.ends[:-1], fills=rows.fills[:-1])  # of all but one
    away, here = apart(rows, owned)
    lent, few = exact[owned : owned + borrowed], int(rng.integers(1, owned + 1))
    summed = False
    for each, part, home, spares in (
        (rows, slice(None), owned, spare),
        (away, here, 0, spare),
        (rows, slice(None), owned, 0),
        (some, slice(None), few, 0),
    ):
        out = torch.full((home + spares, height, width), float("nan"))
        to = out[:home] if home else None, out[home:] if spares else None
        known = torch.cat([exact[:home], lent[: borrowed * min(spares, 1)]])
        for times in (1, 2):
            room.fill_(float("nan"))
            how = left[part], right[part], each, *to
            products.differentiate(*how, scale=0.5, more=times > 1)
            torch.testing.assert_close(out[: len(known)], times * known, rtol=1e-4, atol=1e-4)
            assert out[len(known) :].isnan().all()
            assert behind.isnan().all()
        parts = not products._sums.isnan().all()
        products._gradients = {key: (_Nothing(None, 1), whole) for key, (_, whole) in products._gradients.items()}
        products._sums.fill_(float("nan"))
        products.differentiate(*how, scale=0.5)
        assert out[: len(known)].isnan().any() == parts  # what is summed in parts is not computed again
        products._gradients.clear()
        summed |= parts
    return summed


def few_rows(most: int) -> None:
    """A gradient of as many rows as there are at most, too few for parts or just enough."""
    torch.manual_seed(most)
    products = Products(AnswerShape(3, 1, 1, 1), CPU, most)
    rows, (place, _) = drawn(np.random.default_rng(most), [most, 0])
    left, right = filled(rows, [place], 16), filled(rows, [place], 24)
    out = torch.full((1, 16, 24), float("nan"))
    products.differentiate(left, right, rows, out)
    torch.testing.assert_close(out[0], left[place].T @ right[place], rtol=1e-4, atol=1e-4)
    assert (len(products._sums) > 0) == (most >= products._tiles.many)


def products_of_all(seeds: range) -> None:
    for seed in seeds:
        products_of(seed)
        heavy_experts(seed)
        owned_parts(seed)
    beside_lent(0)
    for most in (31, 32):
        few_rows(most)
    assert sum(many_tiles(seed) for seed in seeds) > len(seeds) // 2


def test_products_are_those_of_each_expert_alone(ranks: Callable[..., list[Any]]) -> None:
    ranks(1, products_of_all, range(12), timeout_s=200)
