"""The nearest neighbours of many units: exact, block by block, roughly first where the processor is fast at that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from resect.errors import ScoreError

# Distances of so many units to as many others are held at once: 64 MB.
BLOCK = 4096
# Minima of so many distances are taken before the smallest are looked for: several times faster, and exact.
RUN = 16
# Candidates beyond the wanted neighbours; where the first of them is as near as the last neighbour, up to the rounding of
# products (a share of the squared norms), all are measured again.
SPARE = 6
UNSURE = 1e-5
# Numbers that are measured again at once: few enough to stay in cache.
MEASURED = 1 << 20
# From so many units on, and where a processor multiplies them fast, products of bfloat16 numbers come first, with so many
# candidates beyond the wanted ones. A number loses at most this share as it is stored.
ROUGH_FROM, ROUGH_SPARE, ROUNDING = 8192, 10, 2.0**-9


def squares(values: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """(pairs,) squared distances, from differences: exact to rounding, also where two units nearly coincide."""
    pairs = pairs.to(values.device)
    step = max(1, MEASURED // values.shape[1])
    return torch.cat([(values[part[:, 0]] - values[part[:, 1]]).square().sum(1) for part in pairs.split(step)])


def nearest(values: torch.Tensor, count: int, *, rows: np.ndarray | None = None, apart: np.ndarray | None = None) -> np.ndarray:
    """(rows, count) nearest other units of some units (default: all), the nearest first; exact, ties by index.

    values: (units, features), around their mean. apart: (units,) labels; only units of another label count.
    """
    labels = None if apart is None else torch.from_numpy(apart).to(values.device)
    asked = (torch.arange(len(values)) if rows is None else torch.from_numpy(rows)).to(values.device)
    if len(values) >= ROUGH_FROM and len(asked) > len(values) // 2 and rough_is_fast(values.device):
        at, sure = _roughly(values, labels, count)
        doubtful = torch.nonzero(~sure)[:, 0]
        at[doubtful] = _exactly(values, labels, count, doubtful)
        return at[asked].cpu().numpy()
    return _exactly(values, labels, count, asked).cpu().numpy()


def rough_is_fast(device: torch.device) -> bool:
    """Whether this processor multiplies bfloat16 numbers faster than float32 ones."""
    tells = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device.type == "cpu" and any(tell is not None and tell() for tell in tells)


def _exactly(values: torch.Tensor, labels: torch.Tensor | None, count: int, rows: torch.Tensor) -> torch.Tensor:
    """(rows, count) by products of float32 numbers."""
    many = len(rows) > len(values) // 2
    chosen = torch.arange(len(values), device=values.device) if many else rows
    wanted = min(count + SPARE, len(values) - 1)
    found = _Nearest.of(values, labels, chosen, wanted)
    if many:
        found.look_at_all()
    else:
        found.look_from(chosen)
    # Products of rounded numbers order neighbours well, but not those that are about as far: they are measured again.
    last, spare = found.square[:, count - 1], found.square[:, min(count, wanted - 1)]
    unsure = torch.nonzero(spare - last <= UNSURE * (found.norms[chosen] + found.norms.max()))[:, 0]
    for part in unsure.split(BLOCK):
        found.measure(part, chosen[part])
    return found.at[rows, :count] if many else found.at[:, :count]


def _roughly(values: torch.Tensor, labels: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(units, count) by products of bfloat16 numbers, candidates measured; and (units,) for which of them that is exact.

    Half a squared distance is a product of rounded values and of the squared norms, split in three so that they are whole. A
    unit that is no candidate looked at least as far as the farthest candidate; rounding can have made it look farther than it
    is by so much at most. Where the last neighbour is nearer still, nothing was missed.
    """
    found = _Nearest.of(values, labels, torch.arange(len(values)), min(count + ROUGH_SPARE, len(values) - 1), rough=True)
    found.look_at_all()
    farthest = 2 * found.square[:, -1]
    for part in torch.arange(len(values)).split(BLOCK):
        found.measure(part, part)
    last, norm = found.square[:, count - 1], found.norms.sqrt()
    lost = torch.cat([(part - part.bfloat16()).norm(dim=1) for part in values.split(BLOCK)])
    share = float((lost / norm.clamp_min(torch.finfo(norm.dtype).tiny)).max())
    # Two values of norms n and m lose at most 2 `share` n m of their product; whoever is as near as the last neighbour has at
    # most the norm n + distance. Sums of float32 numbers lose the rest.
    other = norm + last.sqrt()
    most = last + 4 * (1 + share) * share * norm * other + UNSURE * (norm.square() + other.square())
    return found.at[:, :count], most * (1 + 2 * ROUNDING) < farthest


def _factors(values: torch.Tensor, norms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (units, features + 6) matrices in bfloat16, whose product is half the squared distance between all units."""
    rest, parts = norms / 2, []
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1]
    halves = torch.stack(parts, dim=1)
    ones = torch.ones_like(halves)
    rounded = values.bfloat16()
    return torch.cat([-rounded, halves, ones], dim=1), torch.cat([rounded, ones, halves], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Nearest:
    """The other units (of another label) nearest to some rows so far, by distances from products: (rows, count), sorted.

    factors: what `square` is a product of in bfloat16, halved, or None where it is that of the values themselves.
    """

    values: torch.Tensor
    labels: torch.Tensor | None
    norms: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor] | None
    square: torch.Tensor
    at: torch.Tensor

    @classmethod
    def of(
        cls, values: torch.Tensor, labels: torch.Tensor | None, rows: torch.Tensor, count: int, *, rough: bool = False
    ) -> _Nearest:
        square = torch.full((len(rows), count), torch.inf, device=values.device)
        at, norms = torch.zeros_like(square, dtype=torch.int64), _norms(values)
        factors = _factors(values, norms) if rough else None
        return cls(values=values, labels=labels, norms=norms, factors=factors, square=square, at=at)

    def look_at_all(self) -> None:
        """Every row is a unit: every pair of blocks is multiplied once."""
        units = torch.arange(len(self.values), device=self.values.device)
        for first in range(0, len(units), BLOCK):
            for second in range(first, len(units), BLOCK):
                one, other = slice(first, first + BLOCK), slice(second, second + BLOCK)
                square = self._between(units[one], other)
                self._keep(one, square, second)
                if first != second:
                    self._keep(other, square, first, down=True)

    def look_from(self, rows: torch.Tensor) -> None:
        """Some units as rows, against all units."""
        for start in range(0, len(rows), BLOCK):
            for first in range(0, len(self.values), BLOCK):
                square = self._between(rows[start : start + BLOCK], slice(first, first + BLOCK))
                self._keep(slice(start, start + BLOCK), square, first)

    def measure(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Order some rows by distances from differences, ties by index."""
        candidates = self.at[places].sort(1)[0]
        pairs = torch.stack([rows[:, None].expand_as(candidates), candidates], dim=-1)
        square = squares(self.values, pairs.flatten(0, 1)).view(candidates.shape)
        if self.labels is not None:
            square.masked_fill_(self.labels[candidates] == self.labels[rows][:, None], torch.inf)
        self.square[places], order = torch.sort(square, stable=True)
        self.at[places] = candidates.gather(1, order)

    def _between(self, rows: torch.Tensor, block: slice) -> torch.Tensor:
        """(rows, block) squared distances, infinite from a unit to itself and to units of its label."""
        if self.factors is not None:
            square = self.factors[0][rows] @ self.factors[1][block].T
        else:
            square = torch.addmm(self.norms[block], self.values[rows], self.values[block].T, alpha=-2)
            square.add_(self.norms[rows, None])
        if self.labels is not None:
            return square.masked_fill_(self.labels[rows, None] == self.labels[block], torch.inf)
        inside = torch.nonzero((rows >= block.start) & (rows < block.stop))[:, 0]
        square[inside, rows[inside] - block.start] = torch.inf
        return square

    def _keep(self, rows: slice, square: torch.Tensor, first: int, *, down: bool = False) -> None:
        smallest, place = _smallest(square, self.square.shape[1], down=down)
        smallest, place = torch.cat([self.square[rows], smallest], 1), torch.cat([self.at[rows], place + first], 1)
        self.square[rows], order = torch.topk(smallest, self.square.shape[1], largest=False)
        self.at[rows] = place.gather(1, order)


def _norms(values: torch.Tensor) -> torch.Tensor:
    """(units,) squared norms, without a copy of all values."""
    return torch.cat([part.square().sum(1) for part in values.split(BLOCK)])


def _smallest(square: torch.Tensor, count: int, *, down: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, count) smallest of every row (of every column: `down`) and where they are: they lie in the `count` runs, of every
    so many columns, with the smallest minima."""
    turned = square.T if down else square
    columns = turned.shape[1]
    if columns % RUN or columns // RUN <= 2 * count:
        return torch.topk(turned, min(count, columns), largest=False)
    # Minima are taken over what lies apart in memory: then many are at once.
    runs = square.unflatten(0, (RUN, -1)).amin(0).T.contiguous() if down else square.unflatten(1, (RUN, -1)).amin(1)
    place = torch.topk(runs, count, largest=False)[1]
    inside = (place[:, :, None] + columns // RUN * torch.arange(RUN, device=square.device)).flatten(1)
    smallest, order = torch.topk(turned.gather(1, inside), count, largest=False)
    return smallest, inside.gather(1, order)


def nearest_by_faiss(values: torch.Tensor, count: int) -> np.ndarray:
    """(units, count) near units by an inverted file of about 4 sqrt(units) cells, of which 32 are searched; nearly exact.

    Needs the extra `wide` (faiss), else ScoreError.
    """
    try:
        import faiss
    except ImportError:
        raise ScoreError('search="faiss" needs faiss: pip install "resect[wide]", or write search="exact"') from None
    data = values.cpu().numpy()
    cells = max(1, min(int(4 * len(data) ** 0.5), len(data) // 40))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(data.shape[1]), data.shape[1], cells)
    index.cp.seed = 0
    index.train(data)
    index.add(data)
    index.nprobe = min(32, cells)
    found = index.search(data, count + 1)[1]
    own = found == np.arange(len(data))[:, None]
    own[~own.any(1), -1] = True
    found = found[~own].reshape(len(data), count)
    return np.where(found < 0, np.roll(np.arange(len(data)), 1)[:, None], found)
