"""Linear assignment: which row gets which column, for the least sum of costs.

By shortest augmenting paths (Crouse 2016, DOI 10.1109/TAES.2016.140952), row by row, as SciPy's
``linear_sum_assignment`` does, with its choice among equals. SciPy's own would load all of ``scipy.optimize``, which
takes most processes that solve as long as everything else that they need of SciPy and NumPy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.solvers.problem.arrays import Float64, Int64
from moeplan.solvers.problem.kernel import kernel

__all__ = ["linear_assignment"]


def linear_assignment(cost: npt.ArrayLike, *, maximize: bool = False) -> tuple[Int64, Int64]:
    """Rows and their columns, as many pairs as the table is long on its shorter side.

    Args:
        cost: float64[rows, columns], finite.
        maximize: Look for the largest sum instead.

    Returns:
        Rows int64[min(rows, columns)], ascending, and the column of each.
    """
    table = np.asarray(cost, np.float64)
    if maximize:
        table = -table
    if table.shape[0] <= table.shape[1]:
        return np.arange(len(table)), _column_of_each_row(np.ascontiguousarray(table))
    row = _column_of_each_row(np.ascontiguousarray(table.T))
    order = np.argsort(row)
    return row[order], order


@kernel
def _column_of_each_row(cost: Float64) -> Int64:
    """int64[rows], of a float64[rows, columns] with no more rows than columns."""
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    column_of, row_of = np.full(rows, -1), np.full(columns, -1)
    before = np.full(columns, -1)  # the row from which the shortest path comes to a column
    distance = np.empty(columns)
    reached_rows, reached_columns = np.empty(rows, np.bool_), np.empty(columns, np.bool_)
    waiting = np.empty(columns, np.int64)  # columns that no shortest path is known to, the first `left`
    for new in range(rows):
        reached_rows[:] = False
        reached_columns[:] = False
        distance[:] = np.inf
        for place in range(columns):
            waiting[place] = columns - 1 - place  # so that among equals row i gets column i
        left = columns
        row, path, end = new, 0.0, -1
        while end < 0:
            reached_rows[row] = True
            nearest, lowest = -1, np.inf
            for place in range(left):
                column = waiting[place]
                through = path + cost[row, column] - row_price[row] - column_price[column]
                if through < distance[column]:
                    before[column] = row
                    distance[column] = through
                if distance[column] < lowest or (distance[column] == lowest and row_of[column] < 0):
                    lowest = distance[column]
                    nearest = place
            path = lowest
            column = waiting[nearest]
            reached_columns[column] = True
            left -= 1
            waiting[nearest] = waiting[left]
            if row_of[column] < 0:
                end = column
            else:
                row = row_of[column]
        row_price[new] += path
        for row in range(rows):
            if reached_rows[row] and row != new:
                row_price[row] += path - distance[column_of[row]]
        for column in range(columns):
            if reached_columns[column]:
                column_price[column] -= path - distance[column]
        column = end
        while True:  # along the path, each row takes its new column
            row = before[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == new:
                break
    return column_of
