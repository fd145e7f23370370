"""Refinement of a grouping: one member of every group is ejected, all are put back optimally."""

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy.optimize import linear_sum_assignment

from anonymization.grouping.units import Units
from utils.logs import progress


class Refinement:
    """Groups under refinement: members [C, m] padded with -1, their sums and masses."""

    def __init__(self, units: Units, assignment: Int[np.ndarray, ' u'], k: int) -> None:
        self.k, self.x, self.person = k, units.x, units.person
        self.weight = torch.from_numpy(units.weight).to(self.x)
        self.x_weighted = self.x * self.weight[:, None] if units.weight.max() > 1 else self.x
        self.squares = self.x_weighted.square().sum(1)
        self.size = np.bincount(assignment)
        order = np.argsort(assignment, kind='stable')
        leftover = len(order) - k * len(self.size)
        self.members = np.full((len(self.size), k + leftover), -1)
        column = np.arange(len(order)) - np.repeat(np.cumsum(self.size) - self.size, self.size)
        self.members[assignment[order], column] = order
        self._sum_up()

    def assignment(self) -> Int[np.ndarray, ' u']:
        """Group numbers of the units."""
        result = np.empty(len(self.x), int)
        group, column = np.nonzero(self.members >= 0)
        result[self.members[group, column]] = group
        return result

    def between(self) -> float:
        """Sum over groups of |sum|^2 / mass; the squared error is a constant minus this."""
        self._sum_up()
        return (self.sums.double().square().sum(1) / self.mass.double()).sum().item()

    def _sum_up(self) -> None:
        self.sums = torch.zeros(len(self.size), self.x.shape[1], device=self.x.device)
        self.mass = torch.zeros(len(self.size), device=self.x.device)
        for column in self.members.T:  # no group twice in a column: the same sums on any device
            group = np.flatnonzero(column >= 0)
            index = torch.from_numpy(column[group]).to(self.x.device)
            group = torch.from_numpy(group).to(self.x.device)
            self.sums[group] += self.x_weighted[index]
            self.mass[group] += self.weight[index]

    def refine(self, rng: np.random.Generator, rounds: int, block: int, tolerance: float) -> None:
        """Ejects a random member of every group and puts all back by an optimal assignment.

        Sending everybody home is among the candidates, so the error never grows. Stops after
        `rounds`, or when many rounds in a row have gained less than `tolerance` of the error.
        """
        if len(self.size) < 2:
            return
        patience = max(40, 2 * self.k**2)
        spread = (self.weight.double() @ self.x.double().square().sum(1)).item()
        gains = []
        bar = progress(total=rounds, desc='refining groups')
        for step in range(rounds):
            if step % 20 == 0:
                error = spread - self.between()
            gain = sum(self._reassign(near, rng) for near in self._blocks(rng, block))
            if step % 10 == 0:
                gain += self._move_leftovers()
            gains.append(gain)
            bar.update()
            if step >= patience and sum(gains[-patience:]) <= tolerance * max(error, 0):
                break
        bar.close()

    def _blocks(self, rng: np.random.Generator, limit: int) -> list[Int[np.ndarray, ' _']]:
        """Sets of at most `limit` groups near each other, different in every round."""
        means = self.sums / self.mass[:, None]
        pending, done = [np.arange(len(self.size))], []
        while pending:
            block = pending.pop()
            if len(block) <= limit:
                done.append(block)
                continue
            a, b = rng.choice(block, 2, replace=False)
            here = means[torch.from_numpy(block).to(means.device)]
            along = (here @ (means[a] - means[b])).cpu().numpy()
            halves = np.array_split(block[np.argsort(along, kind='stable')], 2)
            pending += halves
        return done

    def _reassign(self, block: Int[np.ndarray, ' b'], rng: np.random.Generator) -> float:
        """One assignment problem over the groups of a block; returns what the error loses."""
        column = rng.integers(self.size[block])
        ejected = self.members[block, column]
        groups = torch.from_numpy(block).to(self.x.device)
        units = torch.from_numpy(ejected).to(self.x.device)
        x, weight = self.x_weighted[units], self.weight[units]
        rest, mass = self.sums[groups] - x, self.mass[groups] - weight
        # [i, j]: |sum|^2 / mass of group j with unit i in it
        value = torch.addmm(rest.square().sum(1) + self.squares[units, None], x, rest.T, alpha=2)
        value /= mass + weight[:, None]
        # Seen from everybody at home: the optimum is the same, and the solver finds it sooner.
        value = (value - value.diagonal().clone()).cpu().numpy()
        if self.person is not None:
            value[self._clashes(block, column, ejected)] = -np.inf
        source, target = linear_sum_assignment(value, maximize=True)
        moved = np.flatnonzero(source != target)
        if not len(moved):
            return 0.0
        source, target = source[moved], target[moved]
        self.members[block[target], column[target]] = ejected[source]
        source, target = (torch.from_numpy(i).to(groups.device) for i in (source, target))
        self.sums[groups[target]] += x[source] - x[target]
        self.mass[groups[target]] += weight[source] - weight[target]
        return float(value[source.cpu(), target.cpu()].sum())

    def _clashes(
        self,
        block: Int[np.ndarray, ' b'],
        column: Int[np.ndarray, ' b'],
        ejected: Int[np.ndarray, ' b'],
    ) -> Bool[np.ndarray, 'b b']:
        """[i, j]: group j, without its own ejected unit, holds the patient of unit i."""
        rest = self.members[block]
        rest[np.arange(len(block)), column] = -1
        assert self.person is not None
        owner = self.person[ejected]
        clash = np.zeros((len(block), len(block)), bool)
        for others in rest.T:
            clash |= (owner[:, None] == self.person[others]) & (others >= 0)
        return clash

    def _move_leftovers(self) -> float:
        """Moves units out of groups above k while that lowers the error; returns the loss."""
        gained = 0.0
        for _ in range(4 * self.k):
            large = np.flatnonzero(self.size > self.k)
            if not len(large):
                break
            group, column = np.nonzero(self.members[large] >= 0)
            group = large[group]
            unit = self.members[group, column]
            home = torch.from_numpy(group).to(self.x.device)
            index = torch.from_numpy(unit).to(self.x.device)
            x, weight = self.x_weighted[index], self.weight[index]
            own = self.sums[home].square().sum(1) / self.mass[home]
            without = (self.sums[home] - x).square().sum(1) / (self.mass[home] - weight)
            squares = self.sums.square().sum(1)
            joined = torch.addmm(squares + self.squares[index, None], x, self.sums.T, alpha=2)
            joined /= self.mass + weight[:, None]
            gain = (joined - squares / self.mass + (without - own)[:, None]).cpu().numpy()
            gain[np.arange(len(unit)), group] = -np.inf
            if self.person is not None:
                for others in self.members.T:
                    gain[
                        (self.person[unit][:, None] == self.person[others]) & (others >= 0)
                    ] = -np.inf
            best = gain.argmax()
            i, target = np.unravel_index(best, gain.shape)
            if gain[i, target] <= 1e-6 * abs(own[i].item()):
                break
            gained += float(gain[i, target])
            source = group[i]
            self.size[source] -= 1
            self.members[source, column[i]] = self.members[source, self.size[source]]
            self.members[source, self.size[source]] = -1
            self.members[target, self.size[target]] = unit[i]
            self.size[target] += 1
            self.sums[source] -= x[i]
            self.sums[target] += x[i]
            self.mass[source] -= weight[i]
            self.mass[target] += weight[i]
        return gained
