"""How far an output graph drives apart what an input graph holds together: a quadratic form on every input edge.

With L the Laplacian of the input graph and B = L_out + eps: e_pq = (e_p - e_q)^T B^-1 L B^-1 (e_p - e_q).
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh

from resect.errors import ScoreError
from resect.scoring.spectral.graph import Graph, Laplacian
from resect.tracing.states import mixed

Mode = Literal["auto", "eig", "full", "jl", "proxy"]

REGULAR = 1e-3
# Wider groups are scored by projections: a dense inverse costs units^3 operations and units^2 numbers.
FULL_LIMIT = 4096
# Smaller problems are not worth an iterative eigensolver.
DENSE_EIGEN = 256
TOLERANCE, ITERATIONS, LOOK_EVERY = 1e-6, 2000, 8
# Of the eigenvalues, and of the solutions that an eigensolver asks for.
EIGEN, INNER = 1e-6, 1e-10
TIE = 1e-9
SIGNS = 64
# Fewer columns are soon multiplied, and threads would wait for each other longer than that.
THREADED = 8
EDGES_AT_ONCE = 1 << 16


def output_matrix(outputs: Graph, kind: Laplacian) -> sparse.csr_array:
    """B: the Laplacian of the output graph plus 1e-3 of its mean diagonal."""
    laplacian = outputs.laplacian(kind)
    return (laplacian + REGULAR * (laplacian.diagonal().mean() or 1.0) * sparse.eye_array(outputs.units)).tocsr()


def full(inputs: Graph, outputs: Graph, kind: Laplacian) -> np.ndarray:
    """(edges,) e on every input edge, in closed form; units^3 operations."""
    dense = torch.from_numpy(output_matrix(outputs, kind).toarray())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(dense.to(device))).cpu().numpy()
    form = inputs.laplacian(kind) @ inverse
    p, q = inputs.ends.T
    return np.concatenate(
        [
            np.einsum("eu,eu->e", inverse[a] - inverse[b], (form[:, a] - form[:, b]).T)
            for a, b in _parts(p, q, max(1, (1 << 23) // inputs.units))
        ]
    )


def eig(inputs: Graph, outputs: Graph, kind: Laplacian, *, pairs: int | None, seed: int = 0) -> np.ndarray:
    """(edges,) sum over the largest eigenpairs of L v = lambda B v of lambda (v_p - v_q)^2; with all pairs this is `full`."""
    units = inputs.units
    laplacian, matrix = inputs.laplacian(kind), output_matrix(outputs, kind)
    count = units if pairs is None else min(pairs, units)
    if count == units or units <= DENSE_EIGEN:
        if units > FULL_LIMIT:
            raise ScoreError(f'mode="eig" with all pairs of {units} units takes too long: name pairs=, or write mode="full"')
        values, vectors = eigh(laplacian.toarray(), matrix.toarray())
        # Pairs that tie with the last one come along: which of them an eigensolver puts first depends on the units' places.
        chosen = values >= values[-count] - TIE * values[-1]
        values, vectors = values[chosen], vectors[:, chosen]
    else:
        inverse = LinearOperator(matrix.shape, matvec=lambda v: solve(matrix, v.reshape(units, 1), tolerance=INNER)[:, 0])
        start = np.random.default_rng(seed).normal(size=units)
        values, vectors = eigsh(laplacian, k=count, M=matrix, Minv=inverse, which="LA", v0=start, tol=EIGEN)
    p, q = inputs.ends.T
    return np.concatenate([np.square(vectors[a] - vectors[b]) @ np.maximum(values, 0) for a, b in _parts(p, q, EDGES_AT_ONCE)])


def jl(inputs: Graph, outputs: Graph, kind: Laplacian, *, projections: int, order: np.ndarray, seed: int = 0) -> np.ndarray:
    """(edges,) `full`, estimated from random projections of the incidence matrix of the input graph.

    L = C^T C, so e_pq = |C B^-1 (e_p - e_q)|^2, which random signs R keep: |R C B^-1 (e_p - e_q)|^2 / projections, with a
    relative error of about sqrt(2 / projections). The same projections of the proxy, which is known exactly, tell most of that
    error, and it is taken off. order: (units,) ranks that go with the units and not with their places, so that every edge has
    its own signs whatever the order of the units. Source: Johnson & Lindenstrauss; Spielman & Srivastava 2011.
    """
    incidence = inputs.incidence(kind)
    rank = order[inputs.ends]
    turned = np.where(rank[:, 0] < rank[:, 1], 1.0, -1.0)
    edge = rank.min(1).astype(np.uint64) * np.uint64(inputs.units) + rank.max(1).astype(np.uint64)
    right = np.zeros((inputs.units, projections))
    for first in range(0, len(edge), EDGES_AT_ONCE):
        part = slice(first, first + EDGES_AT_ONCE)
        right += incidence[part].T @ (turned[part, None] * _signs(edge[part], projections, seed))
    right /= np.sqrt(projections)
    matrix = output_matrix(outputs, kind)
    places, rough = solve(matrix, right), right / matrix.diagonal()[:, None]
    p, q = inputs.ends.T
    error = [
        np.square(places[a] - places[b]).sum(1) - np.square(rough[a] - rough[b]).sum(1) for a, b in _parts(p, q, EDGES_AT_ONCE)
    ]
    return np.maximum(proxy(inputs, outputs, kind) + np.concatenate(error), 0)


def proxy(inputs: Graph, outputs: Graph, kind: Laplacian) -> np.ndarray:
    """(edges,) `full` with B^-1 replaced by the inverse of B's diagonal.

    For plain Laplacians d_in(p) / d_out(p)^2 + d_in(q) / d_out(q)^2 + 2 w_in(p, q) / (d_out(p) d_out(q)); linear in the edges.
    """
    inverse = 1 / output_matrix(outputs, kind).diagonal()
    incidence = inputs.incidence(kind)
    own = np.square(incidence).sum(0) * inverse**2
    p, q = inputs.ends.T
    entries = incidence.data.reshape(-1, 2).prod(1)
    return own[p] + own[q] - 2 * entries * inverse[p] * inverse[q]


def solve(matrix: sparse.csr_array, right: np.ndarray, *, tolerance: float = TOLERANCE) -> np.ndarray:
    """X with matrix X = right, (units, columns), by conjugate gradients on all columns at once, preconditioned by the diagonal.

    Raises ScoreError where the residual does not fall below `tolerance` of the right side.
    """
    inverse = torch.from_numpy(1 / matrix.diagonal()[:, None])
    times = _torch(matrix) if right.shape[1] >= THREADED else None
    residual = torch.from_numpy(right).clone()
    answer, direction = torch.zeros_like(residual), inverse * residual
    energy = (residual * direction).sum(0)
    goal = tolerance**2 * residual.square().sum(0).clamp_min(1e-300)
    for step in range(ITERATIONS):
        if step % LOOK_EVERY == 0 and bool((residual.square().sum(0) <= goal).all()):
            return answer.numpy()
        product = torch.from_numpy(matrix @ direction.numpy()) if times is None else times @ direction
        length = energy / (direction * product).sum(0).clamp_min(1e-300)
        answer.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        energy, before = (residual.square() * inverse).sum(0), energy
        direction.mul_(energy / before.clamp_min(1e-300)).addcmul_(inverse, residual)
    raise ScoreError(f'the output graph of {matrix.shape[0]} units is too badly conditioned to solve: write mode="proxy"')


def _torch(matrix: sparse.csr_array) -> torch.Tensor:
    """The same matrix where products use all threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        starts, columns = (torch.from_numpy(part.astype(np.int32)) for part in (matrix.indptr, matrix.indices))
        data = torch.from_numpy(matrix.data)
        return torch.sparse_csr_tensor(starts, columns, data, size=matrix.shape, check_invariants=False)


def _signs(edge: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(edges, count) random signs, the bits of hashes of the edges' numbers."""
    words = -(-count // SIGNS)
    salts = mixed(np.uint64(seed) + np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    hashes = mixed(mixed(edge + np.uint64(1))[:, None] ^ salts)
    bits = np.unpackbits(np.ascontiguousarray(hashes.astype("<u8")).view(np.uint8), axis=1)
    return 2.0 * bits[:, :count] - 1


def _parts(p: np.ndarray, q: np.ndarray, step: int):
    return ((p[first : first + step], q[first : first + step]) for first in range(0, max(len(p), 1), step))
