"""Bases made of a whole matrix W (m, n), k = min(m, n), the same wherever they are computed again; and Deltas on them.

    all_triples   W = U diag(s) Vᵀ, all k of them
    smallest      P Q, the part of W in its r smallest singular directions: P (m, r), Q (r, n)
    ldu           W = L diag(d) U: L (m, k) unit lower but for the order of its rows, which is W's; U (k, n) unit upper

Everything is computed in float64, whatever W is. That costs little (a symmetric eigenproblem of the small side in place
of a decomposition) and turns vectors of close singular values, one apart by g, by 1e-16 / g only: with float32's 1e-7
the few closest pairs of a layer would come out mixed on another machine, and what is trained between them be lost.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fallow.core.delta import Delta, MethodOptions, Site, one_of
from fallow.core.errors import AdapterError
from fallow.core.linalg import EXACT_BELOW, OVERSAMPLING, Triples, low_rank

FLAT = 1e-5  # below this share of the largest singular value, the small Gram matrix has lost the direction
INVERSE_STEPS = 8
CLOSE = 1e-6  # gaps between singular values, as shares of the largest, that no machine resolves alike


def all_triples(matrix: Tensor) -> Triples:
    """U (m, k), s (k,) in descending order, Vᵀ (k, n), in the dtype of `matrix`.

    Each pair (u, v) has the sign that makes u's product with a fixed random vector positive, so that u_i v_jᵀ is the
    same wherever it is computed. From the eigenvectors of the smaller Gram matrix, which loses what is below 1e-8 of
    the largest singular value; where any is below 1e-5, from the decomposition.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.mT if wide else matrix).double()
    v = torch.linalg.eigh(lower_gram(tall.mT))[1].flip(-1)
    u = tall @ v
    s = u.square().sum(0).sqrt_()
    if bool(s.min() > FLAT * s.max()):
        u, vt = u.div_(s), v.mT
    else:
        u, s, vt = torch.linalg.svd(tall, full_matrices=False)
    if wide:
        u, vt = vt.mT, u.mT
    sign = torch.where(probe(u) < 0, -1.0, 1.0).to(u)
    return u.mul_(sign).to(matrix.dtype), s.to(matrix.dtype), vt.mul_(sign.unsqueeze(1)).to(matrix.dtype)


def leading(matrix: Tensor, rank: int, generator: torch.Generator) -> Triples:
    """The first `rank` triples: by the range finder where it is the cheaper way, as in `low_rank`, else exact."""
    if min(matrix.shape) > EXACT_BELOW and 4 * rank <= min(matrix.shape):
        return low_rank(matrix, rank, generator=generator)
    u, s, vt = all_triples(matrix)
    return u[:, :rank], s[:rank], vt[:rank]


def probe(u: Tensor) -> Tensor:
    """(k,): the products of the columns of u (m, k) with a fixed random vector, of about 1 for a column of norm 1."""
    vector = torch.randn(u.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return vector.to(u) @ u


def smallest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P (m, r) and Q (r, n), in the dtype of `matrix`: P Q is what `matrix` loses with its r smallest triples.

    With Z (k, r) the last eigenvectors of the smaller Gram matrix, P Q = Z (Zᵀ W): no singular value is divided by, so
    it does not matter that those below 1e-8 of the largest are not told apart; they contribute nothing.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.mT).double().contiguous()
    z = torch.linalg.eigh(lower_gram(work))[1][:, :rank]
    kept = z.mT @ work
    p, q = (z, kept) if wide else (kept.mT, z.mT)
    return p.to(matrix.dtype).contiguous(), q.to(matrix.dtype).contiguous()


def near_smallest(matrix: Tensor, rank: int, generator: torch.Generator) -> Triples:
    """About the `rank` smallest triples U (m, r), S (r,), Vᵀ (r, n) of a matrix (m, n), in k³ / 3 multiplications; the
    eigenvectors of all of the small Gram matrix take ten times as many and more. S Vᵀ = Uᵀ W, or U S = W V of a tall
    one, whatever was found.

    Subspace iteration with the inverse of the Gram matrix, by its Cholesky factor. |S| is within 2 % of the least there
    is (spectra of random matrices and of 1 / i). Values below 1e-6 of the largest are not told apart.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    work = (matrix if wide else matrix.mT).double().contiguous()
    gram = lower_gram(work)
    shift = len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max()) or 1.0
    while True:
        gram.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not bool(failed):
            break
        shift *= 10
    del gram
    width = min(rank + OVERSAMPLING, len(work))
    x = torch.randn(len(work), width, generator=generator, dtype=work.dtype).to(work.device)
    for _ in range(INVERSE_STEPS):
        x = torch.linalg.qr(torch.cholesky_solve(x, factor))[0]
    u, s, vt = torch.linalg.svd(x.mT @ work, full_matrices=False)
    u, s, vt = (x @ u)[:, -rank:], s[-rank:], vt[-rank:]
    if not wide:
        u, vt = vt.mT, u.mT
    return u.to(matrix.dtype), s.to(matrix.dtype), vt.to(matrix.dtype)


def lower_gram(rows: Tensor) -> Tensor:
    """R Rᵀ (k, k) of R (k, m), but for zeros in places above the diagonal, where `torch.linalg.eigh` does not look: two
    thirds of the multiplications of a large matrix.
    """
    k = rows.shape[0]
    step = k if k <= EXACT_BELOW else -(-k // 4)
    made = torch.zeros(k, k, dtype=rows.dtype, device=rows.device)
    for start in range(0, k, step):
        part = slice(start, start + step)
        torch.mm(rows[start:], rows[part].mT, out=made[start:, part])
    return made


def ldu(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L (m, k), d (k,), U (k, n), in the dtype of `matrix`, and the rows of its k pivots (k,), int32.

    Partial pivoting. Where a pivot is zero (below 1e-12 of the largest), as in matrices of lower rank, the row of U
    stays undivided and d is 1; the product is W all the same.
    """
    work, size = matrix.double(), min(matrix.shape)
    packed, swaps, _ = torch.linalg.lu_factor_ex(work[:, :size])  # a wide one's other columns decide on no pivot
    _, lower, upper = torch.lu_unpack(packed, swaps, unpack_pivots=False)
    order = list(range(matrix.shape[0]))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    if size < matrix.shape[1]:
        rest = torch.linalg.solve_triangular(lower, work[order, size:], upper=False, unitriangular=True)
        upper = torch.cat([upper, rest], 1)
    left = torch.empty_like(lower)
    left[torch.tensor(order, device=matrix.device)] = lower
    d = upper.diagonal().clone()
    d[d.abs() <= 1e-12 * d.abs().max()] = 1.0
    pivots = torch.tensor(order[: d.numel()], dtype=torch.int32, device=matrix.device)
    dtype = matrix.dtype
    return left.to(dtype), d.to(dtype), (upper / d.unsqueeze(1)).to(dtype), pivots


class OnBases(Delta):
    """A Delta between frozen tensors that are made of W: made again when it is loaded, and in its file only where the
    option `save_basis` says so. `mark`: a small buffer that is always in the file and tells whether they came out the
    same; `differs(mark)` compares. The option `form`: "added", D x beside the layer, or "rewritten", one product with
    W' in its place.
    """

    mark: Tensor

    def keep(self, **tensors: Tensor) -> None:
        """Frozen tensors that are made of W."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous(), persistent=self.o.save_basis)

    def settle(self, site: Site, mark: Tensor) -> None:
        """The last thing in setup."""
        self.register_buffer("mark", mark)
        if self.o.form == "rewritten":
            self.__dict__["mode"] = "weight"

    def differs(self, mark: Tensor) -> bool:
        """Whether the saved `mark` is of other bases than those made here."""
        if not mark.is_floating_point():
            return not torch.equal(mark.to(self.mark), self.mark)
        near = max(1e-4, 2 * torch.finfo(mark.dtype).eps, 2 * torch.finfo(self.mark.dtype).eps)
        return not torch.allclose(mark.to(self.mark), self.mark, rtol=near, atol=1e-6 * float(self.mark.abs().max()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mark = state_dict.get(prefix + "mark")
        made_here = not self.o.save_basis and not self.mark.is_meta
        if made_here and mark is not None and (mark.shape != self.mark.shape or self.differs(mark)):
            raise AdapterError(
                f"'{self.name}' on '{self.site_name}': what its file was trained on is made of the weight, and comes "
                "out otherwise here. Either the base is another one; or it has another dtype: load the adapter on the "
                "base as it was in training, then cast; or this machine orders values that are close to each other "
                "otherwise: save the adapter where it was trained, with save_basis=True"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_bases(options: MethodOptions) -> None:
    """ConfigError unless `form` and `save_basis` are what OnBases takes."""
    from_options: Any = options
    one_of("form", from_options.form, ("added", "rewritten"))
    one_of("save_basis", from_options.save_basis, (True, False))


def warn_if_close(site: Site, s: Tensor, trained: int) -> None:
    """Warn where the first `trained` of the descending s (k,), or the cut after them, are not told apart everywhere."""
    if trained and s.numel() > 1 and bool((s[:-1] - s[1:])[:trained].min() < CLOSE * s[0]):
        warnings.warn(
            f"'{site.name}' has singular values within 1e-6 of each other (relative to the largest), whose directions "
            "another machine may find otherwise; give save_basis=True to keep them in the adapter's file",
            stacklevel=2,
        )
