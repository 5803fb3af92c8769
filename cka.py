"""Centered Kernel Alignment (§4): how alike two models represent the same inputs.

First the estimators on matrices, then the paper's two ways of making the matrices from hidden
states. Rotation and scale change no estimator, but rotation changes what is z-scored first.
Notation: n rows (tokens or samples), d features, K = H H^T the Gram matrix [n, n]. Leading
dimensions, such as one per layer, are carried along. The estimators compute in float64: near 1, the
differences that matter are in the third digit and beyond.
"""
import torch
from torch.nn.utils.rnn import pad_sequence

KINDS = ("linear", "linear_debiased", "unit_debiased", "rbf", "rbf_debiased")


def linear_cka(x, y, debiased=False):
    """Linear CKA of x [..., n, d1] and y [..., n, d2]: float64 [...] (§4.2-4.3, Eqs. 1-4).

    Biased: in [0, 1]; of unrelated white inputs about d / (n + d), near 1 when n << d.
    debiased=True removes that bias, and can be negative. ValueError if the rows differ, or are
    fewer than 4 when debiased.

    >>> x, y = torch.tensor([[1.], [0.], [-1.]]), torch.tensor([[1.], [0.], [0.]])
    >>> linear_cka(x, y)  # one feature each: the squared correlation, 1^2 / (2 * 2/3)
    tensor(0.7500, dtype=torch.float64)
    >>> x, y = torch.tensor([[[1.], [1.], [-1.], [-1.]], [[1.], [-1.], [1.], [-1.]]])
    >>> _u_center(x @ x.mT)[0]  # the Gram matrix of y has its 4/3 in the third place
    tensor([ 0.0000,  1.3333, -0.6667, -0.6667])
    >>> linear_cka(x, y, debiased=True)  # (-8/9 - 8/9 + 4/9) / (16/9 + 4/9 + 4/9)
    tensor(-0.5000, dtype=torch.float64)
    """
    x, y = _centered(x), _centered(y)  # as C does below; here for precision, and for d < n
    _check_rows(x, y, debiased)
    if not debiased and max(x.size(-1), y.size(-1)) < x.size(-2):
        return _linear_cka_features(x, y)
    return _cka(x @ x.mT, y @ y.mT, debiased)  # Eqs. (1), (2): H [L, d], K = H H^T


def unit_rows(x):
    """x [..., n, d], each row scaled to norm 1: no row of huge norm, a massive activation, decides
    what CKA says of it.

    >>> unit_rows(torch.tensor([[3., 4.], [0., 0.]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = x.double()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def rbf_cka(x, y, threshold=1.0, debiased=False):
    """CKA with the kernel exp(-|h_i - h_j|^2 / (2 sigma^2)) (Kornblith 2019), as `linear_cka`.

    sigma^2 = threshold^2 * the median squared distance.

    >>> x, y = torch.tensor([[[1.], [1.], [-1.], [-1.]], [[1.], [-1.], [1.], [-1.]]])
    >>> rbf_cka(x, y, debiased=True)  # K is 1 or 1/e where the linear is 1 or -1: the same CKA
    tensor(-0.5000, dtype=torch.float64)
    """
    x, y = _centered(x), _centered(y)
    _check_rows(x, y, debiased)
    return _cka(rbf_gram(x @ x.mT, threshold), rbf_gram(y @ y.mT, threshold), debiased)


def rbf_gram(k, threshold=1.0):
    """The RBF Gram matrix of a linear one [..., n, n]. The median counts all n^2 distances.

    >>> h = torch.tensor([[0.], [1.], [2.]])
    >>> rbf_gram(h @ h.T)[0]  # the median of 3 * 0, 4 * 1, 2 * 4 is 1: exp(-0/2, -1/2, -4/2)
    tensor([1.0000, 0.6065, 0.1353])
    """
    norms = k.diagonal(dim1=-2, dim2=-1)
    distance = (norms[..., :, None] + norms[..., None, :] - 2 * k).clamp(min=0)
    every = distance.flatten(-2)
    n = every.size(-1)
    low, high = (every.kthvalue(nth).values for nth in ((n + 1) // 2, n // 2 + 1))  # from 1 on
    median = (low + high) / 2
    return (-distance / (2 * threshold ** 2 * median[..., None, None])).exp()


def _cka(k, l, debiased):
    """Eq. (4): HSIC(S, T) / sqrt(HSIC(S, S) HSIC(T, T)). The estimator's normalisation cancels."""
    center = _u_center if debiased else _center
    k, l = center(k), center(l)
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def hsic(k, l):
    """Eq. (3): tr(K_S C K_T C), as the sum of products of C K_S C and C K_T C [..., n, n].

    >>> k = _center(torch.tensor([[1.], [-1.]]) @ torch.tensor([[1., -1.]]))
    >>> hsic(k, k)  # 1 + 1 + 1 + 1
    tensor(4.)
    """
    return (k * l).sum((-2, -1))


def _center(k):
    """C K C with C = I - 11^T/n."""
    return k - k.mean(-1, keepdim=True) - k.mean(-2, keepdim=True) + k.mean((-2, -1), keepdim=True)


def _u_center(k):
    """K U-centred (Szekely & Rizzo 2014). Of two of these, `hsic` is n (n - 3) times the unbiased
    estimate (Song et al. 2012)."""
    n = k.size(-1)
    off_diagonal = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k = k * off_diagonal
    means = k.sum(-1) / (n - 2)
    means = means - means.sum(-1, keepdim=True) / (2 * (n - 1))
    return (k - means[..., :, None] - means[..., None, :]) * off_diagonal


def _linear_cka_features(x, y):
    """|Y^T X|^2 / (|X^T X| |Y^T Y|) of centred x, y: `_cka` from d x d matrices, for d < n."""
    cross, xx, yy = (torch.linalg.matrix_norm(a.mT @ b) for a, b in ((y, x), (x, x), (y, y)))
    return cross ** 2 / (xx * yy)


def _centered(x):
    x = x.double()
    return x - x.mean(-2, keepdim=True)


def _check_rows(x, y, debiased):
    n, m = x.size(-2), y.size(-2)
    if n != m:
        raise ValueError(f"CKA compares the same rows: {n} in one, {m} in the other")
    if debiased and n < 4:
        raise ValueError("the debiased estimator needs at least 4 rows")


@torch.no_grad()
def hidden_states(model, sequences, last=False, done=None):
    """Every block's output, the last one's after the final norm, for each sequence of ids:
    [[n_layer, T - 1 or 1, D], …], on the CPU, in the model's type.

    A sequence is a prompt and its ground truth, less the first token: its huge norm would decide
    every similarity. last: the last token only. done(n): called with how many were just read.
    """
    states: list = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # little padding
    for batch in (order[start:start + 8] for start in range(0, len(order), 8)):
        rows = [torch.tensor(sequences[i]) for i in batch]
        ids = pad_sequence(rows, batch_first=True).to(model.device)
        layers = torch.stack(model.backbone(ids, hidden=True)[1]).cpu()  # [n_layer, B, T, D]
        for row, i in enumerate(batch):
            length = len(sequences[i])
            first = length - 1 if last else 1
            states[i] = layers[:, row, first:length].clone()
        if done:
            done(len(batch))
    return states


def token_level(a, b):
    """{kind: [n_layer]}: §4.2, CKA over the tokens of each sequence, averaged over sequences."""
    each = [_all_kinds(x, y) for x, y in zip(a, b) if x.size(1) >= 4]  # debiased needs 4 tokens
    if not each:
        raise ValueError("token-level CKA needs a sequence of at least 5 tokens")
    return {kind: torch.stack([found[kind] for found in each]).mean(0).tolist() for kind in KINDS}


def sample_level(a, b):
    """{kind: [n_layer]}: §5.4, CKA over sequences, one vector each: the last token's, z-scored."""
    return {kind: value.tolist() for kind, value in _all_kinds(_samples(a), _samples(b)).items()}


def between_layers(a, b):
    """[n_layer of a][n_layer of b]: debiased linear CKA of all pairs of layers, as `sample_level`.

    >>> b = [torch.tensor([[[v]], [[w]]]) for v, w in ((1., 1.), (1., -1.), (-1., 1.), (-1., -1.))]
    >>> a = [h[:1] for h in b]  # 4 sequences of one token; a has the first of b's two layers
    >>> torch.tensor(between_layers(a, b))
    tensor([[ 1.0000, -0.5000]])
    """
    k, l = (_u_center(x @ x.mT).flatten(1) for x in (_samples(a), _samples(b)))  # [n_layer, n n]
    return ((k @ l.mT) / (k.norm(dim=1)[:, None] * l.norm(dim=1))).tolist()


def _samples(states):
    """Each sequence's last token, the end of the answer's turn (the paper names none), dimensions
    z-scored: [n_layer, n, D]."""
    x = torch.stack([h[:, -1] for h in states], dim=1).double()
    return (x - x.mean(-2, keepdim=True)) / x.std(-2, keepdim=True).clamp(min=1e-12)


def _all_kinds(x, y):
    return {"linear": linear_cka(x, y), "linear_debiased": linear_cka(x, y, debiased=True),
            "unit_debiased": linear_cka(unit_rows(x), unit_rows(y), debiased=True),
            "rbf": rbf_cka(x, y), "rbf_debiased": rbf_cka(x, y, debiased=True)}
