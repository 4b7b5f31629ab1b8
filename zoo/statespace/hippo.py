"""The matrices that state space layers start from, in NumPy float64.

A state of N holds N/2 conjugate pairs of modes; a function that returns modes returns the one of each pair that turns
forward (imaginary part >= 0), in order of frequency.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

Init = Literal["legs", "lin", "inv"]
INITS = get_args(Init)


class Modes(NamedTuple):
    """A system in the basis of its modes: A = diag(diagonal) - low_rank low_rank^*, one entry per conjugate pair."""

    diagonal: np.ndarray  # complex [N/2]
    input_matrix: np.ndarray  # complex [N/2]
    low_rank: np.ndarray  # complex [N/2]


def legs(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The HiPPO-LegS matrix, whose state holds the Legendre coefficients of all that came before.

        A_nk = -sqrt(2n+1) sqrt(2k+1) if n > k,  -(n + 1) if n = k,  0 if n < k;    B_n = sqrt(2n+1)     (S4 eq. 2)

    Returns: (A [N, N], B [N]).
    Example:
        >>> legs(2)[0].round(3).tolist()
        [[-1.0, 0.0], [-1.732, -2.0]]

    Source: Gu et al., HiPPO, NeurIPS 2020, arXiv 2008.07669; arXiv 2111.00396, eq. 2.
    """
    order = np.arange(state_size)
    root = np.sqrt(2 * order + 1)
    return np.tril(-np.outer(root, root), -1) - np.diag(order + 1.0), root


def legs_basis(state_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(Lambda [N/2], V [N, N/2]): modes of the normal part of HiPPO-LegS, A + P P^T = V Lambda V^*.

    An eigenvector is free up to its phase. Here the phase makes the entry of V^* B positive, and with it that of V^* P,
    which is V^* B / sqrt(2): the same numbers on every machine.
    """
    matrix, inputs = legs(state_size)
    low_rank = np.sqrt(np.arange(state_size) + 0.5)
    skew = matrix + np.outer(low_rank, low_rank) + 0.5 * np.eye(state_size)
    frequency, basis = np.linalg.eigh(-1j * skew)
    frequency, basis = frequency[frequency > 0], basis[:, frequency > 0]
    return -0.5 + 1j * frequency, basis * np.exp(1j * np.angle(basis.conj().T @ inputs))


def legs_modes(state_size: int) -> Modes:
    """HiPPO-LegS as normal plus low rank, in the basis where the normal part is diagonal (S4 theorem 1).

        A + P P^T = -1/2 I + skew-symmetric = V Lambda V^*,    P_n = sqrt(n + 1/2);    modes: Lambda, V^* B, V^* P
    """
    diagonal, basis = legs_basis(state_size)
    magnitude = np.abs(basis.conj().T @ legs(state_size)[1])
    return Modes(diagonal, magnitude + 0j, magnitude / np.sqrt(2) + 0j)


def diagonal_modes(init: Init, state_size: int) -> Modes:
    """The diagonal initialisations of S4D; `low_rank` is 0.

        legs:  Lambda of HiPPO-LegS,                        B = V^* B_LegS / 2     (S4D theorem 3: the same as N grows)
        inv:   A_n = -1/2 + i (N / pi) (N / (2n + 1) - 1),  B = 1                              (S4D-Inv)
        lin:   A_n = -1/2 + i pi n,                         B = 1                              (S4D-Lin)

    Source: Gu et al., arXiv 2206.11893, section 4.
    """
    pairs = state_size // 2
    if init == "legs":
        modes = legs_modes(state_size)
        return Modes(modes.diagonal, modes.input_matrix / 2, np.zeros(pairs, complex))
    order = np.arange(pairs)
    frequency = np.pi * order if init == "lin" else state_size / np.pi * (state_size / (2 * order + 1) - 1)
    return Modes(-0.5 + 1j * frequency, np.ones(pairs, complex), np.zeros(pairs, complex))


def blocks(init: Init, state_size: int, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(Lambda [N/2], V [N, N/2]) of equal blocks side by side, as S5 starts from; V is the modes' basis.

    LegS has its own. The other initialisations are diagonal by themselves: a mode takes two real numbers as its parts.
    """
    size = state_size // num_blocks
    if init == "legs":
        diagonal, basis = legs_basis(size)
    else:
        diagonal = diagonal_modes(init, size).diagonal
        pairs = np.eye(size // 2) / np.sqrt(2)
        basis = np.concatenate([pairs, -1j * pairs])
    return np.tile(diagonal, num_blocks), np.kron(np.eye(num_blocks), basis)
