"""Triton kernels of tokens on their way to experts, and of results on their way back. None of them waits.

Rows of a rank's computation are numbered ``0..rows-1``, experts at home from 0 and lent ones from the place where their
region begins; ``device * rows + row`` names a row of the group. Tokens of the group are numbered ``rank * TOKENS +
token``, ``GROUP_TOKENS`` in all. A token travels once to each rank that computes one of its choices, and the sum of
that rank's results travels back (as in DeepEP).
"""

from __future__ import annotations

import triton.language as tl

from moeplan.runtime_client.device.programs import program

__all__ = ["arrange", "collect", "give_back", "hand_out"]


@program("tokens", "rank")
def hand_out(
    source: tl.tensor,
    target: tl.tensor,
    arrived: tl.tensor,
    peers: tl.tensor,
    answer: tl.tensor,
    tokens: tl.tensor,
    rank: tl.tensor,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    AGAIN: tl.constexpr,
    FULLEST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A block for each `BLOCK` tokens: write each token once to every rank that computes one of its choices.

    If it is done `AGAIN`, then only where a rank has more rows than the `SPAN` of a round, of which nothing was kept.

    Args:
        source: [tokens, WIDTH].
        target: int32[tokens * CHOICES].
        arrived: [ranks, TOKENS, WIDTH] in symmetric memory, out.
        answer: The plan.
    """
    if AGAIN and tl.load(answer + FULLEST) <= SPAN:
        return
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = token < tokens
    row = (rank * TOKENS + token).to(tl.int64)
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < WIDTH)[None, :]
        values = tl.load(source + token.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=there[:, None] & inside)
        for choice in tl.static_range(CHOICES):
            goal = tl.load(target + token * CHOICES + choice, mask=there, other=-1)
            leads = leads_to(target, token, there, goal, choice, CHOICES, ROWS, ROWS, ROWS)
            units = tl.load(peers + goal // ROWS, mask=leads, other=0)
            to = arrived + units[:, None] * EACH + row[:, None] * WIDTH + column[None, :]
            tl.store(to, values, mask=leads[:, None] & inside)


@program("low")
def arrange(
    arrived: tl.tensor,
    where: tl.tensor,
    share: tl.tensor,
    rows: tl.tensor,
    scale: tl.tensor,
    kept_where: tl.tensor,
    answer: tl.tensor,
    low: tl.tensor,
    CHOICES: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENDS: tl.constexpr,
    FILLS: tl.constexpr,
    OWNED: tl.constexpr,
    REPLICAS: tl.constexpr,
) -> None:
    """Tokens that have arrived to the rows of a round; in the forward pass, also what backward needs.

    Rows between those of an expert and the next become zeros.

    Args:
        arrived: [GROUP_TOKENS, WIDTH].
        where: int32[GROUP_TOKENS, CHOICES], their rows.
        share: float32[GROUP_TOKENS, CHOICES], weights, read in the forward pass.
        rows: [rows of a round, WIDTH], out.
        scale: float32[rows of a round], out in the forward pass: the weight of each row.
        kept_where: As `where`, out in the forward pass.
        answer: The plan.
        low: First row of the round.
    """
    for start in range(tl.program_id(0) * BLOCK, GROUP_TOKENS, tl.num_programs(0) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < GROUP_TOKENS
        used = tl.zeros([BLOCK], tl.int1)
        for choice in tl.static_range(CHOICES):
            whole = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
            row = in_round(whole, low, JOINED, AWAY, SPAN)
            used = used | (row >= 0)
            if not BACKWARD:
                value = tl.load(share + token * CHOICES + choice, mask=row >= 0, other=0.0)
                tl.store(scale + row, value, mask=row >= 0)
                tl.store(kept_where + token * CHOICES + choice, whole, mask=inside)
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (column < WIDTH)[None, :]
            at = arrived + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
            values = tl.load(at, mask=used[:, None] & mask)
            for choice in tl.static_range(CHOICES):
                whole = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
                row = in_round(whole, low, JOINED, AWAY, SPAN)
                to = rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                tl.store(to, values, mask=(row >= 0)[:, None] & mask)
    clear(
        rows, scale, answer, low, tl.program_id(0), tl.num_programs(0), JOINED, AWAY, SPAN, WIDTH, BACKWARD, BLOCK,
        COLUMNS, ENDS, FILLS, OWNED, REPLICAS,
    )  # fmt: skip


@program()
def clear(
    rows: tl.tensor,
    scale: tl.tensor,
    answer: tl.tensor,
    low: tl.tensor,
    block: tl.tensor,
    blocks: tl.tensor,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    ENDS: tl.constexpr,
    FILLS: tl.constexpr,
    OWNED: tl.constexpr,
    REPLICAS: tl.constexpr,
) -> None:
    """Zeros into what `arrange` leaves between the rows of experts, and into their weights; the share of one block."""
    for replica in range(block, REPLICAS, blocks):
        begin = 0
        if not JOINED and replica >= OWNED:
            begin = AWAY
        end = begin + tl.load(answer + ENDS + replica)
        for start in range(begin + tl.load(answer + FILLS + replica), end, BLOCK):
            whole = start + tl.arange(0, BLOCK)
            row = tl.where(whole < end, in_round(whole, low, JOINED, AWAY, SPAN), -1)
            if not BACKWARD:
                tl.store(scale + row, tl.zeros([BLOCK], tl.float32), mask=row >= 0)
            for first in range(0, WIDTH, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                to = rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                nothing = tl.zeros([BLOCK, COLUMNS], rows.dtype.element_ty)
                tl.store(to, nothing, mask=(row >= 0)[:, None] & (column < WIDTH)[None, :])


@program("low")
def give_back(
    at_home: tl.tensor,
    away: tl.tensor,
    where: tl.tensor,
    share: tl.tensor,
    to_weight: tl.tensor,
    returned: tl.tensor,
    returned_weight: tl.tensor,
    peers: tl.tensor,
    low: tl.tensor,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    JOINED: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    EACH: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Sum each token's results of a round and write them to its source.

    Sums are taken in float32, in the order of the choices, weighted in the forward pass.

    Args:
        at_home: [SPAN, WIDTH], results.
        away: [SPAN, WIDTH], those of lent experts, where they are not `JOINED`.
        where: int32[GROUP_TOKENS, CHOICES], the row of each pair, -1 where it is not computed here.
        share: float32[GROUP_TOKENS, CHOICES], the weights, read in the forward pass.
        to_weight: float32[rows of a round], gradients of the routers' weights, read in the backward pass.
        returned: [TOKENS, CHOICES, WIDTH] in symmetric memory, out at the token's first choice of this rank and round.
        returned_weight: float32[TOKENS, CHOICES] in symmetric memory, out in the backward pass.
        low: First row of the round.
    """
    for start in range(tl.program_id(0) * BLOCK, GROUP_TOKENS, tl.num_programs(0) * BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < GROUP_TOKENS
        units = tl.load(peers + token // TOKENS, mask=inside, other=0)
        pair = (token % TOKENS) * CHOICES
        lead = tl.full([BLOCK], CHOICES, tl.int32)
        for choice in tl.static_range(CHOICES):
            row = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
            row = in_round(row, low, JOINED, AWAY, SPAN)
            lead = tl.where((row >= 0) & (lead == CHOICES), choice, lead)
            if BACKWARD:
                value = tl.load(to_weight + row, mask=row >= 0, other=0.0)
                tl.store(returned_weight + units * 4 + pair + choice, value, mask=row >= 0)
        to = (pair + lead).to(tl.int64)
        for first in range(0, WIDTH, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (column < WIDTH)[None, :]
            sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
            for choice in tl.static_range(CHOICES):
                row = tl.load(where + token * CHOICES + choice, mask=inside, other=-1)
                row = in_round(row, low, JOINED, AWAY, SPAN)
                here = row >= 0
                if not JOINED:
                    apart = row >= SPAN
                    at = away + (row - SPAN).to(tl.int64)[:, None] * WIDTH + column[None, :]
                    lent_values = tl.load(at, mask=apart[:, None] & mask, other=0.0).to(tl.float32)
                    here = here & (row < SPAN)
                at = at_home + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
                values = tl.load(at, mask=here[:, None] & mask, other=0.0).to(tl.float32)
                if not JOINED:
                    values += lent_values
                if not BACKWARD:
                    values *= tl.load(share + token * CHOICES + choice, mask=row >= 0, other=0.0)[:, None]
                sums += values
            at = returned + units[:, None] * EACH + to[:, None] * WIDTH + column[None, :]
            tl.store(at, sums.to(returned.dtype.element_ty), mask=(lead < CHOICES)[:, None] & mask)


@program("tokens", "replicas", "apart")
def collect(
    returned: tl.tensor,
    target: tl.tensor,
    out: tl.tensor,
    gradients: tl.tensor,
    answer: tl.tensor,
    abort: tl.tensor,
    host_words: tl.tensor,
    tokens: tl.tensor,
    replicas: tl.tensor,
    apart: tl.tensor,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    ABORTED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add up in float32 what each token got back from the ranks; not a number where the pass has failed.

    Args:
        returned: [tokens, CHOICES, WIDTH], the sum of a rank and round at the token's first choice that went there.
        target: int32[tokens * CHOICES].
        out: [tokens, WIDTH], out.
        gradients: Of the weights of experts, `apart` elements from each other; the first element is not a number where
            the pass has failed.
        replicas: Experts that have gradients.
    """
    stopped = tl.load(abort, volatile=True)
    failed = (tl.load(answer) != 0) | (stopped != 0)
    if failed & (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        nothing = tl.full([], float("nan"), tl.float32).to(gradients.dtype.element_ty)
        for replica in range(replicas):
            tl.store(gradients + tl.full([], replica, tl.int64) * apart, nothing)
    if (stopped != 0) & (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(host_words + ABORTED, stopped)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = token < tokens
    mask = (column < WIDTH)[None, :]
    sums = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        goal = tl.load(target + token * CHOICES + choice, mask=inside, other=-1)
        leads = leads_to(target, token, inside, goal, choice, CHOICES, ROWS, AWAY, SPAN)
        at = returned + (token.to(tl.int64) * CHOICES + choice)[:, None] * WIDTH + column[None, :]
        sums += tl.load(at, mask=leads[:, None] & mask, other=0.0).to(tl.float32)
    sums = tl.where(failed, float("nan"), sums)
    to = out + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & mask)


@program()
def leads_to(
    target: tl.tensor,
    token: tl.tensor,
    there: tl.tensor,
    goal: tl.tensor,
    choice: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    AWAY: tl.constexpr,
    SPAN: tl.constexpr,
) -> tl.tensor:
    """Whether this choice, which goes to `goal`, is the token's first that goes to its rank and round."""
    leads = goal >= 0
    for earlier in tl.static_range(choice):
        other = tl.load(target + token * CHOICES + earlier, mask=there, other=-1)
        leads = leads & ((other < 0) | (computed_by(other, ROWS, AWAY, SPAN) != computed_by(goal, ROWS, AWAY, SPAN)))
    return leads


@program()
def computed_by(goal: tl.tensor, ROWS: tl.constexpr, AWAY: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """A number for the rank and the round that compute a row of the group."""
    return goal // ROWS * (AWAY // SPAN) + goal % ROWS % AWAY // SPAN


@program()
def in_round(row: tl.tensor, low: tl.tensor, JOINED: tl.constexpr, AWAY: tl.constexpr, SPAN: tl.constexpr) -> tl.tensor:
    """Place of a row among those of the round that begins at row `low` of each region; -1 if it is not one of them."""
    place = row - low
    begin = tl.zeros_like(row)
    if not JOINED:
        place = tl.where(row >= AWAY, place - AWAY, place)
        begin = tl.where(row >= AWAY, SPAN, 0)
    return tl.where((row >= 0) & (place >= 0) & (place < SPAN), begin + place, -1)
