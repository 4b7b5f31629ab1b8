"""Iterations on small matrices, one per sample and head: the pseudo-inverse of Nystromformer, the balancing of Sinkhorn."""

from jaxtyping import Array, Float

from subquad.kernels import checks, dispatch
from subquad.kernels.matrix import reference, xla

__all__ = ["pseudo_inverse", "sinkhorn"]


PSEUDO_INVERSE = dispatch.implementations("pseudo_inverse", xla, reference)
SINKHORN = dispatch.implementations("sinkhorn", xla, reference)


def pseudo_inverse(
    matrix: Float[Array, "B N M M"],
    *,
    iterations: int = 6,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B N M M"]:
    """Approximates the Moore-Penrose inverse of each matrix by an iteration of third order.

        Z_0 = A^T / (|A|_1 |A|_inf)                                             (Nystromformer, section 3.2)
        Z_{k+1} = 1/4 Z_k (13 I - A Z_k (15 I - A Z_k (7 I - A Z_k)))           (Nystromformer, eq. 11)

    |A|_1 is the largest sum of absolute values of a column, |A|_inf of a row: the scale is the matrix's own. Some
    implementations take these maxima over the whole batch, and a sample's output depends on its batch-mates.

    Cost: time O(B N iterations M^3), memory O(B N M^2), in the backward pass O(B N iterations M^2) on XLA and O(B N M^2)
        in Triton, which computes the iterates again.
    Differs from the paper: a matrix of zeros has the inverse 0.

    Args:
        matrix: A [B, N, M, M]. Triton serves M <= 128.
        iterations: of the second equation, at least 1. Directions of singular value s below |A|_2 / 2^iterations have not
            converged: they are smaller than in the inverse, as if regularised.
        implementation: None takes the best that can run here.
    Returns: Z [B, N, M, M] in the dtype of `matrix`.
    Raises:
        ValueError: shapes that do not fit, iterations that are no integer of at least 1.
        TypeError: integers or complex numbers.
        NotImplementedError: an implementation that does not exist here or declines the call.
    Numerics: float32 throughout, also for bfloat16, in which the iteration diverges: products by three TF32 passes on a
        GPU. The scale is differentiated. |A|_1 |A|_inf must be a float32, so entries lie between about 1e-18 and 1e18. Where A
        is singular, each iteration makes the rounding in its null space 3.25 times larger: 20 of them are worse than 8.
    Example:
        >>> matrix = jnp.array([[[[2.0, 0.0], [0.0, 4.0]]]])
        >>> pseudo_inverse(matrix)[0, 0].round(3).tolist()
        [[0.5, 0.0], [0.0, 0.25]]

    Source: Xiong et al., Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention, AAAI 2021,
        arXiv 2102.03902; the iteration is by Razavi et al., 2014.
    """
    owner = "matrix.pseudo_inverse"
    _check(owner, "matrix", matrix, iterations)
    return dispatch.run(owner, PSEUDO_INVERSE, implementation, matrix, int(iterations))


def sinkhorn(
    logits: Float[Array, "B N M M"],
    *,
    iterations: int = 8,
    is_causal: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B N M M"]:
    """Balances each matrix: rows and columns of exp(logits) are normalised in turn, until both sum to 1.

        L_{k+1} = C(R(L_k)),    L_0 = logits,    output exp(L_iterations)
        R(L)_ij = L_ij - log sum_j exp L_ij,    C(L)_ij = L_ij - log sum_i exp L_ij       (section 3.1.1)

    Columns come last, so they sum to 1 exactly and rows nearly. With u and v the sums of what was subtracted from rows and
    columns, L = logits - u_i - v_j: an iteration is u_i = log sum_j exp(logits_ij - v_j) and the same for v, and nothing but
    these vectors needs to be kept for the backward pass.

    Cost: time O(B N iterations M^2), memory O(B N M (M + iterations)).
    Differs from the paper: the matrix is returned, not its logarithm.

    Args:
        logits: [B, N, M, M]. -inf forbids a pair, and so does what is below -5e29, as `jnp.finfo(jnp.float32).min`; a row or
            column without an allowed pair is 0, with a gradient of 0. Triton serves M <= 128.
        iterations: of rows and columns, at least 1.
        is_causal: leaves the pairs j > i out of all sums, and returns 0 there. What remains is not strictly causal: the
            sum over a column reaches the rows after i, so entry ij depends on the logits of later rows.
        implementation: None takes the best that can run here.
    Returns: [B, N, M, M] in the dtype of `logits`.
    Raises:
        ValueError: shapes that do not fit, iterations that are no integer of at least 1.
        TypeError: integers or complex numbers.
        NotImplementedError: an implementation that does not exist here or declines the call.
    Numerics: float32, in the domain of logarithms, with the maximum taken out of every sum. A row or column whose logits are
        all large, as -1e9, has lost their differences, and counts all the same: forbid it by -inf.
    Example:
        >>> balanced = sinkhorn(jnp.array([[[[0.0, 3.0], [1.0, 0.0]]]]), iterations=20)
        >>> balanced[0, 0].sum(0).round(3).tolist(), balanced[0, 0].sum(1).round(3).tolist()
        ([1.0, 1.0], [1.0, 1.0])

    Source: Tay et al., Sparse Sinkhorn Attention, ICML 2020, arXiv 2002.11296; Adams and Zemel, Ranking via Sinkhorn
        Propagation, 2011, arXiv 1106.1925.
    """
    owner = "matrix.sinkhorn"
    _check(owner, "logits", logits, iterations)
    return dispatch.run(owner, SINKHORN, implementation, logits, int(iterations), bool(is_causal))


def _check(owner, name, array, iterations) -> None:
    checks.shape(owner, name, array, "B N M M", "Give one square matrix per sample and head.")
    checks.floating(owner, **{name: array})
    checks.at_least(owner, "iterations", iterations, 1, "Six to eight are usual.")
