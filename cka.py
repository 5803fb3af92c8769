"""Centered Kernel Alignment (§4): how alike two models represent the same inputs, whatever the rotation or scale.

First the estimators on matrices, then the paper's two ways of making the matrices from hidden states. Notation: n rows (tokens or
samples), d features, K = H H^T the Gram matrix [n, n]. Leading dimensions, such as one per layer, are carried along. All is
computed in float64: near 1, the differences that matter are in the third digit and beyond.
"""
import torch
from torch.nn.utils.rnn import pad_sequence

KINDS = ("linear", "linear_debiased", "rbf", "rbf_debiased")


def linear_cka(x, y, debiased=False):
    """Linear CKA of x [..., n, d1] and y [..., n, d2] -> float64 [...], 0-d for two matrices (§4.2-4.3, Eqs. 1-4).

    Biased: in [0, 1], and close to 1 for any two inputs when n < d. debiased=True removes that bias (and can be negative).
    ValueError if the rows differ, or are fewer than 4 when debiased.
    """
    x, y = _centered(x), _centered(y)
    _check_rows(x, y, debiased)
    if not debiased and max(x.size(-1), y.size(-1)) < x.size(-2):
        return _linear_cka_features(x, y)
    return _cka(x @ x.mT, y @ y.mT, debiased)


def rbf_cka(x, y, threshold=1.0, debiased=False):
    """CKA with the kernel exp(-|h_i - h_j|^2 / (2 sigma^2)), sigma^2 = threshold^2 * median squared distance (Kornblith 2019)."""
    x, y = _centered(x), _centered(y)
    _check_rows(x, y, debiased)
    return _cka(rbf_gram(x @ x.mT, threshold), rbf_gram(y @ y.mT, threshold), debiased)


def rbf_gram(k, threshold=1.0):
    """Linear Gram matrix [..., n, n] -> RBF Gram matrix; the median is over all n^2 squared distances, zeros included."""
    norms = k.diagonal(dim1=-2, dim2=-1)
    distance = (norms[..., :, None] + norms[..., None, :] - 2 * k).clamp(min=0)
    ordered = distance.flatten(-2).sort(dim=-1).values
    middle = (ordered.size(-1) - 1) // 2, ordered.size(-1) // 2
    median = (ordered[..., middle[0]] + ordered[..., middle[1]]) / 2
    return (-distance / (2 * threshold ** 2 * median[..., None, None])).exp()


def _cka(k, l, debiased):
    """Eq. (4): HSIC(S, T) / sqrt(HSIC(S, S) HSIC(T, T)). The estimator's normalisation cancels."""
    center = _u_center if debiased else _center
    k, l = center(k), center(l)
    return (k * l).sum((-2, -1)) / ((k * k).sum((-2, -1)) * (l * l).sum((-2, -1))).sqrt()


def _center(k):
    """C K C with C = I - 11^T/n. Eq. (3): tr(K_S C K_T C) is the sum of products of two such matrices."""
    return k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-2, -1), keepdim=True)


def _u_center(k):
    """U-centering (Szekely & Rizzo 2014): the sum of products of two such matrices is n (n - 3) times the unbiased HSIC
    of Song et al. (2012)."""
    n = k.size(-1)
    off_diagonal = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k = k * off_diagonal
    means = k.sum(-1) / (n - 2)
    means = means - means.sum(-1, keepdim=True) / (2 * (n - 1))
    return (k - means[..., :, None] - means[..., None, :]) * off_diagonal


def _linear_cka_features(x, y):
    """The same number from d x d matrices, for centred x, y: |Y^T X|^2 / (|X^T X| |Y^T Y|), cheaper when d < n."""
    cross, xx, yy = (torch.linalg.matrix_norm(a.mT @ b) for a, b in ((y, x), (x, x), (y, y)))
    return cross ** 2 / (xx * yy)


def _centered(x):
    x = x.double()
    return x - x.mean(-2, keepdim=True)


def _check_rows(x, y, debiased):
    if x.size(-2) != y.size(-2):
        raise ValueError(f"CKA compares the same rows: {x.size(-2)} in one, {y.size(-2)} in the other")
    if debiased and x.size(-2) < 4:
        raise ValueError("the debiased estimator needs at least 4 rows")


@torch.no_grad()
def hidden_states(model, sequences, last=False):
    """Every block's output for each sequence of ids (prompt + ground truth): a list of [n_layer, T - 1, D] on the CPU.

    The first token is left out: its huge norm would decide every similarity by itself. last: only the last, [n_layer, 1, D].
    """
    device, states = model.device, [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # rows of like length together, little padding
    for batch in (order[start:start + 8] for start in range(0, len(order), 8)):
        rows = [torch.tensor(sequences[i]) for i in batch]
        layers = model.backbone(pad_sequence(rows, batch_first=True).to(device), hidden=True)[1]
        layers = torch.stack(layers).float().cpu()  # [n_layer, B, T, D]
        for row, i in enumerate(batch):
            states[i] = layers[:, row, len(sequences[i]) - 1 if last else 1:len(sequences[i])].clone()
    return states


def token_level(a, b):
    """§4.2: CKA over the tokens of each sequence, averaged over sequences; a, b from `hidden_states` -> {kind: [n_layer]}."""
    pairs = [(x, y) for x, y in zip(a, b) if x.size(1) >= 4]  # the debiased estimator needs as many
    if not pairs:
        raise ValueError("token-level CKA needs a sequence of at least 5 tokens")
    total = sum(torch.stack(list(_all_kinds(x, y).values())) for x, y in pairs) / len(pairs)
    return dict(zip(KINDS, total.tolist()))


def sample_level(a, b):
    """§5.4: one vector per sequence, at its last token (the paper does not say which), each dimension z-scored."""
    return {kind: value.tolist() for kind, value in _all_kinds(_samples(a), _samples(b)).items()}


def between_layers(a, b):
    """Debiased linear CKA of every layer of a with every layer of b, as `sample_level` -> [n_layer of a][n_layer of b]."""
    k, l = (_u_center(x @ x.mT).flatten(1) for x in (_samples(a), _samples(b)))  # [n_layer, n n]
    return ((k @ l.mT) / (k.norm(dim=1)[:, None] * l.norm(dim=1))).tolist()


def _samples(states):
    """The last token of each sequence, every dimension z-scored: [n_layer, n, D]."""
    x = torch.stack([h[:, -1] for h in states], dim=1).double()
    return (x - x.mean(-2, keepdim=True)) / x.std(-2, keepdim=True).clamp(min=1e-12)


def _all_kinds(x, y):
    return {"linear": linear_cka(x, y), "linear_debiased": linear_cka(x, y, debiased=True),
            "rbf": rbf_cka(x, y), "rbf_debiased": rbf_cka(x, y, debiased=True)}
